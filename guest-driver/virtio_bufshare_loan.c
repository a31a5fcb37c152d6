// SPDX-License-Identifier: GPL-2.0
/*
 * virtio_bufshare: loans. From EXPORT to RELEASED the pages of an export belong to this guest but
 * may be read or written by others, so they must not be reused. A loan keeps them, whatever happens
 * to the file, the process or the device binding: closing the file, unbind, reset and a device that
 * stopped to answer only move it into the quarantine.
 */
#include <linux/dma-buf.h>
#include <linux/hashtable.h>
#include <linux/module.h>
#include <linux/sched.h>
#include <linux/slab.h>
#include <linux/string.h>

#include "virtio_bufshare.h"

/* Guards what the header says; never held while sleeping, never taken in interrupts. */
DEFINE_SPINLOCK(bufshare_loan_lock);
LIST_HEAD(bufshare_loans);
static DEFINE_HASHTABLE(bufshare_handles, 10);

/**
 * bufshare_loan_lookup() - a loan by its handle
 * @bs: the device
 * @session: of the device
 * @handle: from the device
 *
 * Context: Under the loan lock.
 * Return: the loan, not counted, or NULL.
 */
struct bufshare_loan *bufshare_loan_lookup(struct bufshare *bs, u32 session, u64 handle)
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
	INIT_LIST_HEAD(&loan->inbox.node);
	loan->bs = bs;
	loan->session = file->session;
	loan->peer_id = bs->config.peer_id;
	loan->epoch = bs->config.epoch;
	loan->inbox.file = file;
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
		bufshare_inbox_put(&loan->inbox, BUFSHARE_NEWS_LAST, event);
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
	if (loan && loan->inbox.file != file)
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
 * bufshare_loan_own() - an export by its UUID
 * @file: who asks; must own it, since a UUID is no right and a dma-buf knows no lesser rights
 * @arg: in: the UUID; out, if it is found: what it is
 *
 * Return: a counted reference to its dma-buf, or NULL if @file has no such export.
 */
struct dma_buf *bufshare_loan_own(struct bufshare_file *file, struct bufshare_attach *arg)
{
	struct dma_buf *dmabuf = NULL;
	struct bufshare_loan *loan;

	spin_lock(&bufshare_loan_lock);
	list_for_each_entry(loan, &file->loans, file_node) {
		if (loan->state != BUFSHARE_LOAN_LIVE ||
		    memcmp(loan->uuid, arg->uuid, sizeof(arg->uuid)))
			continue;
		dmabuf = bufshare_memory_dmabuf(loan->memory);
		get_dma_buf(dmabuf);
		arg->mode = BUFSHARE_MODE_ZERO_COPY;
		arg->handle = 0;
		arg->offset = loan->offset;
		arg->size = loan->size;
		arg->generation = 0;
		arg->exporter = loan->peer_id;
		arg->metadata_type = 0;
		arg->metadata_len = 0;
		memset(arg->name, 0, sizeof(arg->name));
		break;
	}
	spin_unlock(&bufshare_loan_lock);
	return dmabuf;
}

/**
 * bufshare_loan_uuid() - the UUID of a dma-buf of this module
 * @dmabuf: the dma-buf
 * @uuid: out: of the first export of all of it
 *
 * Context: Process context; as an operation of the dma-buf.
 * Return: 0, or -ENODEV if it is not exported.
 */
int bufshare_loan_uuid(struct dma_buf *dmabuf, uuid_t *uuid)
{
	struct bufshare_loan *loan;
	int ret = -ENODEV;

	spin_lock(&bufshare_loan_lock);
	list_for_each_entry(loan, &bufshare_loans, node) {
		if (loan->state != BUFSHARE_LOAN_LIVE || !bufshare_loan_in_session(loan) ||
		    loan->size != dmabuf->size ||
		    bufshare_memory_dmabuf(loan->memory) != dmabuf)
			continue;
		import_uuid(uuid, loan->uuid);
		ret = 0;
		break;
	}
	spin_unlock(&bufshare_loan_lock);
	return ret;
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
	if (loan && loan->inbox.file == file) {
		memory = bufshare_memory_share(loan->memory);
		memcpy(uuid, loan->uuid, sizeof(loan->uuid));
	}
	spin_unlock(&bufshare_loan_lock);
	return memory;
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
