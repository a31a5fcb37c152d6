// SPDX-License-Identifier: GPL-2.0
/*
 * virtio_bufshare: loans. From EXPORT to RELEASED the pages of an export belong to this guest but
 * may be read or written by others, so they must not be reused. A loan keeps them, whatever happens
 * to the file, the process or the device binding: closing the file, unbind, reset and a device that
 * stopped to answer only move it into the quarantine. Every loan holds a reference to the module;
 * <debugfs>/bufshare/quarantine tells what keeps it from being unloaded.
 *
 * A session that is over can tell no RELEASED any more. Its loans end when a later session of the
 * same device answers that no export of an earlier one lingers. Not one of another epoch: a device
 * that lost its state knows nothing of what it lent out before. Those stay until a reboot.
 */
#include <linux/debugfs.h>
#include <linux/dma-buf.h>
#include <linux/hashtable.h>
#include <linux/module.h>
#include <linux/poll.h>
#include <linux/sched.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/string.h>

#include "virtio_bufshare.h"

/* Guards what the header says; never held while sleeping, never taken in interrupts. */
static DEFINE_SPINLOCK(bufshare_loan_lock);
static LIST_HEAD(bufshare_loans);
static DEFINE_HASHTABLE(bufshare_handles, 10);
static struct dentry *bufshare_debugfs;

static bool bufshare_loan_in_session(const struct bufshare_loan *loan)
{
	return loan->session == READ_ONCE(loan->bs->session);
}

static struct bufshare_loan *bufshare_loan_lookup(struct bufshare *bs, u32 session, u64 handle)
{
	struct bufshare_loan *loan;

	hash_for_each_possible(bufshare_handles, loan, hash, handle) {
		if (loan->handle == handle && loan->bs == bs && loan->session == session)
			return loan;
	}
	return NULL;
}

static void bufshare_loan_free(struct kref *ref)
{
	struct bufshare_loan *loan = container_of(ref, struct bufshare_loan, ref);

	put_device(&loan->bs->dev);
	kfree(loan);
}

/**
 * bufshare_loan_put() - give up a loan
 * @loan: the loan, or NULL
 *
 * Context: Process context.
 */
void bufshare_loan_put(struct bufshare_loan *loan)
{
	if (loan)
		kref_put(&loan->ref, bufshare_loan_free);
}

/**
 * bufshare_loan_new() - start a loan, before the device is asked
 * @file: whose export it will be
 *
 * Context: Process context, inside bufshare_enter().
 * Return: the loan with a reference for the caller, or NULL.
 */
struct bufshare_loan *bufshare_loan_new(struct bufshare_file *file)
{
	struct bufshare *bs = file->bs;
	struct bufshare_loan *loan = kzalloc_obj(*loan, GFP_KERNEL_ACCOUNT);

	if (!loan)
		return NULL;
	__module_get(THIS_MODULE);
	get_device(&bs->dev);
	kref_init(&loan->ref); /* the caller's */
	kref_get(&loan->ref); /* the list's */
	kref_get(&loan->ref); /* the file's */
	INIT_HLIST_NODE(&loan->hash);
	INIT_LIST_HEAD(&loan->news_node);
	loan->bs = bs;
	loan->session = file->session;
	loan->peer_id = bs->config.peer_id;
	loan->epoch = bs->config.epoch;
	loan->file = file;
	get_task_comm(loan->owner, current);

	spin_lock(&bufshare_loan_lock);
	list_add_tail(&loan->node, &bufshare_loans);
	list_add_tail(&loan->file_node, &file->loans);
	spin_unlock(&bufshare_loan_lock);
	return loan;
}

/**
 * bufshare_loan_lend() - say what memory a new loan is about
 * @loan: the loan
 * @memory: the loan takes over the reference
 */
void bufshare_loan_lend(struct bufshare_loan *loan, struct bufshare_memory *memory)
{
	spin_lock(&bufshare_loan_lock);
	loan->memory = memory;
	spin_unlock(&bufshare_loan_lock);
}

/**
 * bufshare_loan_answered() - the device accepted the export
 * @loan: the loan
 * @handle: from the device
 * @uuid: from the device
 * @mode: from the device
 *
 * Context: Process context, under export_lock.
 * Return: 0, or -EIO if the device answered nonsense: then nobody knows what it did, and the loan
 * stays in the quarantine.
 */
int bufshare_loan_answered(struct bufshare_loan *loan, u64 handle, const u8 *uuid, u32 mode)
{
	int ret = 0;

	spin_lock(&bufshare_loan_lock);
	if (!handle || bufshare_loan_lookup(loan->bs, loan->session, handle)) {
		ret = -EIO;
	} else {
		loan->handle = handle;
		memcpy(loan->uuid, uuid, sizeof(loan->uuid));
		loan->mode = mode;
		loan->state = BUFSHARE_LOAN_LIVE;
		hash_add(bufshare_handles, &loan->hash, handle);
		if (bufshare_memory_revoked(loan->memory))
			bufshare_loans_revoke();
	}
	spin_unlock(&bufshare_loan_lock);
	return ret;
}

/* Takes the loan away from its file. Returns whether the caller now has the file's reference. */
static bool bufshare_loan_leave_file(struct bufshare_loan *loan)
{
	if (!loan->file)
		return false;
	list_del(&loan->file_node);
	list_del_init(&loan->news_node);
	loan->file = NULL;
	return true;
}

static void bufshare_loan_news(struct bufshare_loan *loan, enum bufshare_news kind,
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

/**
 * bufshare_loan_end() - the memory is back
 * @loan: the loan; may be over already
 * @event: to be told to the file; NULL: the file knows
 *
 * Context: Process context.
 */
void bufshare_loan_end(struct bufshare_loan *loan, const struct bufshare_event *event)
{
	struct bufshare_memory *memory;
	bool left = false;

	spin_lock(&bufshare_loan_lock);
	if (loan->state == BUFSHARE_LOAN_OVER) {
		spin_unlock(&bufshare_loan_lock);
		return;
	}
	loan->state = BUFSHARE_LOAN_OVER;
	list_del(&loan->node);
	hash_del(&loan->hash);
	if (event)
		bufshare_loan_news(loan, BUFSHARE_NEWS_RELEASED, event);
	else
		left = bufshare_loan_leave_file(loan);
	memory = loan->memory;
	loan->memory = NULL;
	spin_unlock(&bufshare_loan_lock);

	bufshare_memory_put(memory);
	if (left)
		bufshare_loan_put(loan);
	bufshare_loan_put(loan);
	module_put(THIS_MODULE);
}

/**
 * bufshare_loan_release() - RELEASE a loan
 * @loan: a loan of the running session, whose handle is known
 * @flags: VIRTIO_BUFSHARE_RELEASE_F_*
 * @state: out: BUFSHARE_STATE_RELEASED if the file need not wait for an event
 *
 * Context: Process context, inside bufshare_enter() or while a session ends.
 * Return: 0 or a negative error.
 */
int bufshare_loan_release(struct bufshare_loan *loan, u16 flags, u32 *state)
{
	int ret = bufshare_req_release(loan->bs, loan->handle, flags, state);

	if (ret == -ENOENT) {
		/* It went with an event that is still on its way. */
		*state = VIRTIO_BUFSHARE_ST_RELEASED;
		ret = 0;
	}
	if (ret)
		return ret;

	spin_lock(&bufshare_loan_lock);
	if (loan->state == BUFSHARE_LOAN_OVER)
		*state = BUFSHARE_STATE_RELEASING; /* the event was quicker: to be read */
	else if (*state == VIRTIO_BUFSHARE_ST_RELEASING)
		loan->state = BUFSHARE_LOAN_RELEASING;
	spin_unlock(&bufshare_loan_lock);
	if (*state == VIRTIO_BUFSHARE_ST_RELEASED)
		bufshare_loan_end(loan, NULL);
	return 0;
}

/**
 * bufshare_loan_find() - a loan by its handle
 * @file: who asks; must own it
 * @handle: from EXPORT
 * @dmabuf: out, or NULL: a counted reference to the memory
 *
 * Return: the loan with a reference, or NULL.
 */
struct bufshare_loan *bufshare_loan_find(struct bufshare_file *file, u64 handle,
					 struct dma_buf **dmabuf)
{
	struct bufshare_loan *loan;

	spin_lock(&bufshare_loan_lock);
	loan = bufshare_loan_lookup(file->bs, file->session, handle);
	if (loan && loan->file != file)
		loan = NULL;
	if (loan) {
		kref_get(&loan->ref);
		if (dmabuf) {
			*dmabuf = bufshare_memory_dmabuf(loan->memory);
			get_dma_buf(*dmabuf);
		}
	}
	spin_unlock(&bufshare_loan_lock);
	return loan;
}

/**
 * bufshare_loan_share() - the memory of a pool, for a part of it
 * @file: who asks; must own the pool
 * @handle: of the pool
 * @uuid: out: of the pool
 *
 * Return: a counted reference to the memory, or NULL.
 */
struct bufshare_memory *bufshare_loan_share(struct bufshare_file *file, u64 handle, u8 *uuid)
{
	struct bufshare_memory *memory = NULL;
	struct bufshare_loan *loan;

	spin_lock(&bufshare_loan_lock);
	loan = bufshare_loan_lookup(file->bs, file->session, handle);
	if (loan && loan->file == file) {
		memory = bufshare_memory_share(loan->memory);
		memcpy(uuid, loan->uuid, sizeof(loan->uuid));
	}
	spin_unlock(&bufshare_loan_lock);
	return memory;
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

/*
 * The first loan of the running session, of @bs or of any device, that comes after @after in the
 * list and satisfies @want.
 */
static struct bufshare_loan *bufshare_loan_next(struct bufshare *bs, struct bufshare_loan *after,
						bool (*want)(struct bufshare_loan *loan))
{
	struct bufshare_loan *loan, *found = NULL;

	spin_lock(&bufshare_loan_lock);
	loan = list_first_entry(&bufshare_loans, struct bufshare_loan, node);
	if (after && after->state != BUFSHARE_LOAN_OVER)
		loan = list_next_entry(after, node);
	list_for_each_entry_from(loan, &bufshare_loans, node) {
		if ((!bs || loan->bs == bs) && loan->handle && bufshare_loan_in_session(loan) &&
		    want(loan)) {
			kref_get(&loan->ref);
			found = loan;
			break;
		}
	}
	spin_unlock(&bufshare_loan_lock);
	return found;
}

static bool bufshare_loan_to_force(struct bufshare_loan *loan)
{
	if (loan->forced)
		return false;
	loan->forced = true;
	return true;
}

/**
 * bufshare_loans_force() - RELEASE with FORCE everything that this session exported
 * @bs: the device
 *
 * Context: Process context, inside bufshare_enter() or while a session ends.
 */
void bufshare_loans_force(struct bufshare *bs)
{
	struct bufshare_loan *loan = bufshare_loan_next(bs, NULL, bufshare_loan_to_force);
	u32 state;

	while (loan) {
		/* Before the loan is over and tells no way on. */
		struct bufshare_loan *next = bufshare_loan_next(bs, loan, bufshare_loan_to_force);

		bufshare_loan_release(loan, VIRTIO_BUFSHARE_RELEASE_F_FORCE, &state);
		bufshare_loan_put(loan);
		loan = next;
	}
}

static bool bufshare_loan_to_revoke(struct bufshare_loan *loan)
{
	return bufshare_memory_revoked(loan->memory) && bufshare_loan_to_force(loan);
}

/* Foreign exporters take back memory that is pinned and lent: void all rights to it at once. */
static void bufshare_revoke_work(struct work_struct *work)
{
	struct bufshare_loan *loan;
	u32 state;

	while ((loan = bufshare_loan_next(NULL, NULL, bufshare_loan_to_revoke))) {
		if (!bufshare_enter(loan->bs, loan->session)) {
			bufshare_loan_release(loan, VIRTIO_BUFSHARE_RELEASE_F_FORCE, &state);
			bufshare_leave(loan->bs);
		}
		bufshare_loan_put(loan);
	}
}

static DECLARE_WORK(bufshare_revoke, bufshare_revoke_work);

/**
 * bufshare_loans_revoke() - release loans whose memory was revoked, from a work item
 *
 * Context: Any.
 */
void bufshare_loans_revoke(void)
{
	queue_work(bufshare_wq, &bufshare_revoke);
}

static bool bufshare_loan_releasing(struct bufshare_loan *loan)
{
	return loan->state == BUFSHARE_LOAN_RELEASING;
}

/**
 * bufshare_loans_query() - after RESYNC: find releases whose event was missed
 * @bs: the device
 *
 * Context: Process context, while the session lasts.
 */
void bufshare_loans_query(struct bufshare *bs)
{
	struct bufshare_loan *loan = bufshare_loan_next(bs, NULL, bufshare_loan_releasing);
	struct virtio_bufshare_resp_state resp;

	while (loan) {
		struct bufshare_loan *next = bufshare_loan_next(bs, loan, bufshare_loan_releasing);
		struct bufshare_event event = {
			.type = BUFSHARE_EVENT_RELEASED,
			.handle = loan->handle,
			.size = loan->size,
			.epoch = loan->epoch,
		};

		memcpy(event.uuid, loan->uuid, sizeof(event.uuid));
		if (bufshare_req_query(bs, VIRTIO_BUFSHARE_QUERY, loan->handle, &resp) == -ENOENT)
			bufshare_loan_end(loan, &event);
		bufshare_loan_put(loan);
		loan = next;
	}
}

/**
 * bufshare_loans_settle() - the device answered that nothing of earlier sessions lingers
 * @bs: the device
 *
 * Context: Process context, while the session lasts.
 */
void bufshare_loans_settle(struct bufshare *bs)
{
	struct bufshare_loan *loan, *found;

	do {
		found = NULL;
		spin_lock(&bufshare_loan_lock);
		list_for_each_entry(loan, &bufshare_loans, node) {
			if (bufshare_loan_in_session(loan) ||
			    loan->peer_id != bs->config.peer_id ||
			    loan->epoch != bs->config.epoch ||
			    strcmp(loan->bs->where, bs->where))
				continue;
			kref_get(&loan->ref);
			found = loan;
			break;
		}
		spin_unlock(&bufshare_loan_lock);
		if (found)
			bufshare_loan_end(found, NULL);
		bufshare_loan_put(found);
	} while (found);
}

static bool bufshare_loan_quarantined(const struct bufshare_loan *loan)
{
	return !loan->file || !bufshare_loan_in_session(loan) || !loan->handle;
}

/**
 * bufshare_loans_quarantined() - how many loans no open file can release
 *
 * Return: the number, of all devices.
 */
unsigned int bufshare_loans_quarantined(void)
{
	struct bufshare_loan *loan;
	unsigned int n = 0;

	spin_lock(&bufshare_loan_lock);
	list_for_each_entry(loan, &bufshare_loans, node)
		n += bufshare_loan_quarantined(loan);
	spin_unlock(&bufshare_loan_lock);
	return n;
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

static const char *bufshare_loan_reason(const struct bufshare_loan *loan)
{
	if (!loan->handle)
		return "unanswered";
	if (!bufshare_loan_in_session(loan))
		return "session-over";
	if (READ_ONCE(loan->bs->dead))
		return "device-dead";
	if (loan->state == BUFSHARE_LOAN_RELEASING)
		return "in-use";
	return "exported";
}

static int bufshare_quarantine_show(struct seq_file *m, void *unused)
{
	struct bufshare_loan *loan;

	seq_puts(m, "# device epoch handle bytes why owner uuid\n");
	spin_lock(&bufshare_loan_lock);
	list_for_each_entry(loan, &bufshare_loans, node)
		seq_printf(m, "%s %u %llu %llu %s %s %pUb\n", loan->bs->where, loan->epoch,
			   loan->handle, loan->size, bufshare_loan_reason(loan),
			   loan->owner, loan->uuid);
	spin_unlock(&bufshare_loan_lock);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(bufshare_quarantine);

/**
 * bufshare_loans_init() - the debugfs file
 */
void bufshare_loans_init(void)
{
	bufshare_debugfs = debugfs_create_dir("bufshare", NULL);
	debugfs_create_file("quarantine", 0400, bufshare_debugfs, NULL, &bufshare_quarantine_fops);
}

/**
 * bufshare_loans_exit() - undo bufshare_loans_init()
 */
void bufshare_loans_exit(void)
{
	debugfs_remove_recursive(bufshare_debugfs);
}
