// SPDX-License-Identifier: GPL-2.0
/*
 * virtio_bufshare: what an open file is told, and what it owns. Events are states: one record for
 * each kind and loan, the latest, in memory that is there since the export. So none is lost,
 * however late they are read.
 */
#include <linux/poll.h>
#include <linux/spinlock.h>

#include "virtio_bufshare.h"

/**
 * bufshare_loan_leave_file() - take a loan away from its file
 * @loan: the loan
 *
 * Context: Under the loan lock.
 * Return: true if the caller now has the file's reference.
 */
bool bufshare_loan_leave_file(struct bufshare_loan *loan)
{
	if (!loan->file)
		return false;
	list_del(&loan->file_node);
	list_del_init(&loan->news_node);
	loan->file = NULL;
	return true;
}

/**
 * bufshare_loan_news() - note an event for the file of a loan
 * @loan: the loan
 * @kind: of @event
 * @event: replaces an earlier one of this kind
 *
 * Context: Under the loan lock.
 */
void bufshare_loan_news(struct bufshare_loan *loan, enum bufshare_news kind,
			const struct bufshare_event *event)
{
	if (!loan->file)
		return;
	loan->events[kind] = *event;
	if (kind == BUFSHARE_NEWS_RELEASED)
		loan->news = 0; /* the last event of a handle */
	loan->news |= BIT(kind);
	if (list_empty(&loan->news_node))
		list_add_tail(&loan->news_node, &loan->file->news);
	wake_up_poll(&loan->file->wait, EPOLLIN);
}

static void bufshare_file_peer(struct bufshare_file *file, const struct bufshare_event *event)
{
	unsigned int i;

	for (i = 0; i < file->nr_peers; i++) {
		if (file->peers[i].peer_id == event->peer_id)
			break;
	}
	if (i == BUFSHARE_FILE_PEERS) {
		file->resync = true;
	} else {
		file->peers[i] = *event;
		file->nr_peers = max(file->nr_peers, i + 1);
	}
}

/**
 * bufshare_loans_event() - tell an event to whom it concerns
 * @bs: the device
 * @event: the event
 *
 * Context: Process context, under export_lock.
 */
void bufshare_loans_event(struct bufshare *bs, const struct bufshare_event *event)
{
	struct bufshare_loan *loan = NULL;
	struct bufshare_file *file;

	spin_lock(&bufshare_loan_lock);
	switch (event->type) {
	case BUFSHARE_EVENT_PEER:
	case BUFSHARE_EVENT_RESYNC:
		list_for_each_entry(file, &bs->files, node) {
			if (event->type == BUFSHARE_EVENT_PEER)
				bufshare_file_peer(file, event);
			else
				file->resync = true;
			wake_up_poll(&file->wait, EPOLLIN);
		}
		break;
	case BUFSHARE_EVENT_RELEASED:
	case BUFSHARE_EVENT_IDLE:
	case BUFSHARE_EVENT_BUSY:
	case BUFSHARE_EVENT_CHANGED:
		loan = bufshare_loan_lookup(bs, READ_ONCE(bs->session), event->handle);
		if (!loan)
			break;
		kref_get(&loan->ref);
		if (event->type == BUFSHARE_EVENT_CHANGED)
			bufshare_loan_news(loan, BUFSHARE_NEWS_CHANGED, event);
		else if (event->type != BUFSHARE_EVENT_RELEASED)
			bufshare_loan_news(loan, BUFSHARE_NEWS_USE, event);
		break;
	}
	spin_unlock(&bufshare_loan_lock);

	if (loan && event->type == BUFSHARE_EVENT_RELEASED)
		bufshare_loan_end(loan, event);
	bufshare_loan_put(loan);
}

/**
 * bufshare_file_add() - a file was opened
 * @file: the file
 */
void bufshare_file_add(struct bufshare_file *file)
{
	spin_lock(&bufshare_loan_lock);
	list_add_tail(&file->node, &file->bs->files);
	spin_unlock(&bufshare_loan_lock);
}

/**
 * bufshare_file_close() - a file is closed: release its exports
 * @file: the file
 *
 * Context: Process context, outside bufshare_enter().
 */
void bufshare_file_close(struct bufshare_file *file)
{
	bool alive = !bufshare_enter(file->bs, file->session);
	struct bufshare_loan *loan;
	bool live;
	u32 state;

	spin_lock(&bufshare_loan_lock);
	list_del(&file->node);
	while ((loan = list_first_entry_or_null(&file->loans, struct bufshare_loan, file_node))) {
		bufshare_loan_leave_file(loan);
		live = loan->state == BUFSHARE_LOAN_LIVE;
		spin_unlock(&bufshare_loan_lock);
		if (alive && live)
			bufshare_loan_release(loan, 0, &state);
		bufshare_loan_put(loan);
		spin_lock(&bufshare_loan_lock);
	}
	spin_unlock(&bufshare_loan_lock);
	if (alive)
		bufshare_leave(file->bs);
}

/**
 * bufshare_file_readable() - whether there is an event to read
 * @file: the file
 *
 * Return: true if there is.
 */
bool bufshare_file_readable(struct bufshare_file *file)
{
	bool ret;

	spin_lock(&bufshare_loan_lock);
	ret = file->resync || file->nr_peers || !list_empty(&file->news);
	spin_unlock(&bufshare_loan_lock);
	return ret;
}

/**
 * bufshare_file_next() - take the next event
 * @file: the file
 * @event: out
 *
 * Return: false if there is none.
 */
bool bufshare_file_next(struct bufshare_file *file, struct bufshare_event *event)
{
	struct bufshare_loan *loan, *over = NULL;
	bool ret = true;
	unsigned int kind;

	spin_lock(&bufshare_loan_lock);
	loan = list_first_entry_or_null(&file->news, struct bufshare_loan, news_node);
	if (file->resync) {
		file->resync = false;
		*event = (struct bufshare_event) {
			.type = BUFSHARE_EVENT_RESYNC,
			.peer_id = file->bs->config.peer_id,
			.epoch = file->bs->config.epoch,
		};
	} else if (file->nr_peers) {
		*event = file->peers[--file->nr_peers];
	} else if (loan) {
		kind = __ffs(loan->news);
		*event = loan->events[kind];
		loan->news &= ~BIT(kind);
		if (!loan->news)
			list_del_init(&loan->news_node);
		if (kind == BUFSHARE_NEWS_RELEASED && bufshare_loan_leave_file(loan))
			over = loan;
	} else {
		ret = false;
	}
	spin_unlock(&bufshare_loan_lock);
	bufshare_loan_put(over);
	return ret;
}

/**
 * bufshare_files_wake() - something happened that is no event: the device died or went
 * @bs: the device
 */
void bufshare_files_wake(struct bufshare *bs)
{
	struct bufshare_file *file;

	spin_lock(&bufshare_loan_lock);
	list_for_each_entry(file, &bs->files, node)
		wake_up_poll(&file->wait, EPOLLIN | EPOLLERR | EPOLLHUP);
	spin_unlock(&bufshare_loan_lock);
}
