// SPDX-License-Identifier: GPL-2.0
/*
 * virtio_bufshare: what an open file is told, and what it owns. Events are states: one record for
 * each kind and export or attachment, the latest, in memory that is there since EXPORT or ATTACH.
 * So none is lost, however late they are read. Of peers and offers a few are kept; RESYNC tells
 * that there were more.
 */
#include <linux/poll.h>
#include <linux/spinlock.h>
#include <linux/string.h>

#include "virtio_bufshare.h"

/**
 * bufshare_inbox_close() - nobody is to be told any more
 * @inbox: of an export or attachment
 *
 * Context: Under the loan lock.
 */
void bufshare_inbox_close(struct bufshare_inbox *inbox)
{
	list_del_init(&inbox->node);
	inbox->file = NULL;
}

/**
 * bufshare_loan_leave_file() - take a loan away from its file
 * @loan: the loan
 *
 * Context: Under the loan lock.
 * Return: true if the caller now has the file's reference.
 */
bool bufshare_loan_leave_file(struct bufshare_loan *loan)
{
	if (!loan->inbox.file)
		return false;
	list_del(&loan->file_node);
	bufshare_inbox_close(&loan->inbox);
	return true;
}

/**
 * bufshare_inbox_put() - note an event for the file of an export or attachment
 * @inbox: of the export or attachment
 * @kind: of @event
 * @event: replaces an earlier one of this kind
 *
 * Context: Under the loan lock.
 */
void bufshare_inbox_put(struct bufshare_inbox *inbox, enum bufshare_news kind,
			const struct bufshare_event *event)
{
	if (!inbox->file)
		return;
	inbox->events[kind] = *event;
	if (kind == BUFSHARE_NEWS_LAST)
		inbox->news = 0;
	inbox->news |= BIT(kind);
	if (list_empty(&inbox->node))
		list_add_tail(&inbox->node, &inbox->file->news);
	wake_up_poll(&inbox->file->wait, EPOLLIN);
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

static void bufshare_file_offer(struct bufshare_file *file, const struct bufshare_event *event)
{
	unsigned int i;

	for (i = 0; i < file->nr_offers; i++) {
		if (!memcmp(file->offers[i].uuid, event->uuid, sizeof(event->uuid)))
			break;
	}
	if (i == BUFSHARE_FILE_OFFERS) {
		file->resync = true;
	} else {
		file->offers[i] = *event;
		file->nr_offers = max(file->nr_offers, i + 1);
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
	bool import = false;

	spin_lock(&bufshare_loan_lock);
	switch (event->type) {
	case BUFSHARE_EVENT_PEER:
	case BUFSHARE_EVENT_OFFERED:
	case BUFSHARE_EVENT_WITHDRAWN:
	case BUFSHARE_EVENT_RESYNC:
		list_for_each_entry(file, &bs->files, node) {
			if (event->type == BUFSHARE_EVENT_PEER)
				bufshare_file_peer(file, event);
			else if (event->type == BUFSHARE_EVENT_RESYNC)
				file->resync = true;
			else
				bufshare_file_offer(file, event);
			wake_up_poll(&file->wait, EPOLLIN);
		}
		break;
	case BUFSHARE_EVENT_RELEASED:
	case BUFSHARE_EVENT_IDLE:
	case BUFSHARE_EVENT_BUSY:
	case BUFSHARE_EVENT_CHANGED:
	case BUFSHARE_EVENT_REVOKED:
		loan = bufshare_loan_lookup(bs, READ_ONCE(bs->session), event->handle);
		if (!loan) {
			import = true;
			break;
		}
		kref_get(&loan->ref);
		if (event->type == BUFSHARE_EVENT_CHANGED)
			bufshare_inbox_put(&loan->inbox, BUFSHARE_NEWS_CHANGED, event);
		else if (event->type == BUFSHARE_EVENT_IDLE || event->type == BUFSHARE_EVENT_BUSY)
			bufshare_inbox_put(&loan->inbox, BUFSHARE_NEWS_USE, event);
		break;
	}
	spin_unlock(&bufshare_loan_lock);

	if (import)
		bufshare_imports_event(bs, event);
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
 * bufshare_file_close() - a file is closed: release its exports, end its brackets
 * @file: the file
 *
 * Context: Process context, outside bufshare_enter().
 */
void bufshare_file_close(struct bufshare_file *file)
{
	struct bufshare_loan *loan;
	bool alive, live;
	u32 state;

	bufshare_points_close(file);
	bufshare_imports_close(file);
	alive = !bufshare_enter(file->bs, file->session);
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
	ret = file->resync || file->nr_peers || file->nr_offers || !list_empty(&file->news);
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
	struct bufshare_inbox *inbox;
	bool ret = true;
	unsigned int kind;

	spin_lock(&bufshare_loan_lock);
	inbox = list_first_entry_or_null(&file->news, struct bufshare_inbox, node);
	if (file->resync) {
		file->resync = false;
		*event = (struct bufshare_event) {
			.type = BUFSHARE_EVENT_RESYNC,
			.peer_id = file->bs->config.peer_id,
			.epoch = file->bs->config.epoch,
		};
	} else if (file->nr_peers) {
		*event = file->peers[--file->nr_peers];
	} else if (file->nr_offers) {
		*event = file->offers[--file->nr_offers];
	} else if (inbox) {
		kind = __ffs(inbox->news);
		*event = inbox->events[kind];
		inbox->news &= ~BIT(kind);
		if (!inbox->news)
			list_del_init(&inbox->node);
		if (event->type == BUFSHARE_EVENT_RELEASED) {
			loan = container_of(inbox, struct bufshare_loan, inbox);
			if (bufshare_loan_leave_file(loan))
				over = loan;
		}
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
