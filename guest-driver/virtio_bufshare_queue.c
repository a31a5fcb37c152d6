// SPDX-License-Identifier: GPL-2.0
/*
 * virtio_bufshare: messages on the control and sync queues.
 *
 * Memory that the device may write outlives whoever waits for it: a message is counted once for
 * the waiter and once for the device, and the device's reference ends on the used ring or after
 * the device was reset, never by a timeout.
 */
#include <linux/mm.h>
#include <linux/scatterlist.h>
#include <linux/sizes.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>

#include "virtio_bufshare.h"

/**
 * bufshare_queue_init() - prepare a queue
 * @queue: the queue, without a virtqueue
 */
void bufshare_queue_init(struct bufshare_queue *queue)
{
	spin_lock_init(&queue->lock);
	INIT_LIST_HEAD(&queue->inflight);
	init_waitqueue_head(&queue->space);
}

/**
 * bufshare_msg_new() - allocate a message
 * @req_len: bytes of the request
 * @resp_len: bytes of a complete response
 *
 * Small ones do not fail for want of memory: RELEASE gives memory back, and without CANCEL a wait
 * looks like a dead device.
 *
 * Context: Process context.
 * Return: a zeroed message, or NULL.
 */
struct bufshare_msg *bufshare_msg_new(u32 req_len, u32 resp_len)
{
	gfp_t gfp = GFP_KERNEL | (max(req_len, resp_len) <= SZ_1K ? __GFP_NOFAIL : 0);
	struct bufshare_msg *msg = kzalloc_obj(*msg, gfp);

	if (!msg)
		return NULL;
	msg->req = kvzalloc(req_len, gfp);
	msg->resp = kzalloc(resp_len, gfp);
	if (!msg->req || !msg->resp) {
		kvfree(msg->req);
		kfree(msg->resp);
		kfree(msg);
		return NULL;
	}
	kref_init(&msg->ref);
	INIT_LIST_HEAD(&msg->node);
	init_completion(&msg->done);
	msg->req_len = req_len;
	msg->resp_len = resp_len;
	msg->resp_need = resp_len;
	return msg;
}

static void bufshare_msg_free(struct kref *ref)
{
	struct bufshare_msg *msg = container_of(ref, struct bufshare_msg, ref);

	kvfree(msg->req);
	kfree(msg->resp);
	kfree(msg);
}

/**
 * bufshare_msg_put() - give up a message
 * @msg: the message, or NULL
 *
 * Context: Any, but not under a lock that disables interrupts.
 */
void bufshare_msg_put(struct bufshare_msg *msg)
{
	if (msg)
		kref_put(&msg->ref, bufshare_msg_free);
}

/* Whether the device wrote at least a header, and no more than there was room for. */
static bool bufshare_sound(const struct bufshare_msg *msg)
{
	return msg->used >= sizeof(struct virtio_bufshare_resp) && msg->used <= msg->resp_len;
}

static u16 bufshare_status(const struct bufshare_msg *msg)
{
	const struct virtio_bufshare_resp *resp = msg->resp;

	return bufshare_sound(msg) ? le16_to_cpu(READ_ONCE(resp->status)) : VIRTIO_BUFSHARE_S_IO;
}

/* Under the queue's lock: who sees the state there knows that @then is not queued any more. */
static void bufshare_msg_done(struct bufshare_msg *msg, enum bufshare_msg_state state)
{
	msg->state = state;
	complete(&msg->done);
	if (msg->then)
		mod_delayed_work(bufshare_wq, msg->then, 0);
}

/**
 * bufshare_queue_done() - take what the device has answered
 * @queue: a queue of messages
 *
 * Context: Virtqueue callback.
 */
void bufshare_queue_done(struct bufshare_queue *queue)
{
	struct bufshare_msg *msg, *next;
	unsigned long flags;
	LIST_HEAD(done);
	u32 used;

	spin_lock_irqsave(&queue->lock, flags);
	do {
		virtqueue_disable_cb(queue->vq);
		while ((msg = virtqueue_get_buf(queue->vq, &used))) {
			list_move_tail(&msg->node, &done);
			if (msg->state != BUFSHARE_MSG_PENDING)
				continue;
			msg->used = used;
			msg->status = bufshare_status(msg);
			bufshare_msg_done(msg, BUFSHARE_MSG_ANSWERED);
		}
	} while (!virtqueue_is_broken(queue->vq) && !virtqueue_enable_cb(queue->vq));
	spin_unlock_irqrestore(&queue->lock, flags);

	wake_up_all(&queue->space);
	list_for_each_entry_safe(msg, next, &done, node) {
		list_del(&msg->node);
		bufshare_msg_put(msg);
	}
}

/**
 * bufshare_queue_abort() - send all waiters away; the messages stay with the device
 * @queue: a queue of messages
 *
 * Context: Process context.
 */
void bufshare_queue_abort(struct bufshare_queue *queue)
{
	struct bufshare_msg *msg;
	unsigned long flags;

	spin_lock_irqsave(&queue->lock, flags);
	list_for_each_entry(msg, &queue->inflight, node) {
		if (msg->state == BUFSHARE_MSG_PENDING)
			bufshare_msg_done(msg, BUFSHARE_MSG_ABORTED);
	}
	spin_unlock_irqrestore(&queue->lock, flags);
	wake_up_all(&queue->space);
}

/**
 * bufshare_queue_empty() - take back what the device never answered
 * @queue: a queue of messages, whose device was reset
 *
 * Context: Process context; nobody else uses the queue.
 */
void bufshare_queue_empty(struct bufshare_queue *queue)
{
	struct bufshare_msg *msg, *next;

	bufshare_queue_abort(queue);
	while (virtqueue_detach_unused_buf(queue->vq))
		;
	list_for_each_entry_safe(msg, next, &queue->inflight, node) {
		list_del_init(&msg->node);
		bufshare_msg_put(msg);
	}
}

/**
 * bufshare_set_dead() - the device does not answer: nothing on this session can work any more
 * @bs: the device
 *
 * Context: Process context.
 */
void bufshare_set_dead(struct bufshare *bs)
{
	if (READ_ONCE(bs->dead))
		return;
	dev_err(&bs->vdev->dev, "no answer for %d s: the device is dead until it is probed again\n",
		BUFSHARE_ANSWER_TIMEOUT / HZ);
	WRITE_ONCE(bs->dead, true);
	bufshare_queue_abort(&bs->control);
	bufshare_queue_abort(&bs->sync);
	bufshare_files_wake(bs);
}

/* The pages of a buffer that need not be contiguous, one entry per run that is. */
static unsigned int bufshare_fill_sg(struct scatterlist *sg, unsigned int max, void *buf, u32 len)
{
	unsigned int n = 0;

	if (!is_vmalloc_addr(buf)) {
		sg_init_one(sg, buf, len);
		return 1;
	}
	sg_init_table(sg, max);
	while (len) {
		u32 step = min_t(u32, len, PAGE_SIZE);

		sg_set_page(&sg[n++], vmalloc_to_page(buf), step, 0);
		buf += step;
		len -= step;
	}
	sg_mark_end(&sg[n - 1]);
	return n;
}

/**
 * bufshare_submit() - put a message on a queue
 * @bs: the device
 * @queue: the queue
 * @msg: the message; keep your reference until it is done
 *
 * Waits for room if need be: whatever holds descriptors for long leaves room for the rest.
 *
 * Context: Process context, inside bufshare_enter() or while a session starts or ends.
 * Return: 0, -EIO if the device is dead, -ENODEV if the session ends, -E2BIG if the request can
 * never fit, -ENOMEM.
 */
int bufshare_submit(struct bufshare *bs, struct bufshare_queue *queue, struct bufshare_msg *msg)
{
	unsigned int max = DIV_ROUND_UP(msg->req_len, PAGE_SIZE);
	unsigned long deadline = jiffies + BUFSHARE_ANSWER_TIMEOUT;
	struct scatterlist one, resp, *req = &one, *sgs[2];
	unsigned int need;
	bool kick = false;
	int ret;

	if (max > 1)
		req = kmalloc_array(max, sizeof(*req), GFP_KERNEL);
	if (!req)
		return -ENOMEM;
	need = bufshare_fill_sg(req, max, msg->req, msg->req_len) + 1;
	sg_init_one(&resp, msg->resp, msg->resp_len);
	sgs[0] = req;
	sgs[1] = &resp;
	if (need > virtqueue_get_vring_size(queue->vq)) {
		ret = -E2BIG;
		goto out;
	}

	for (;;) {
		unsigned long now = jiffies;

		spin_lock_irq(&queue->lock);
		if (READ_ONCE(bs->dead)) {
			ret = -EIO;
		} else if (queue == &bs->sync && READ_ONCE(bs->closing)) {
			ret = -ENODEV;
		} else {
			ret = virtqueue_add_sgs(queue->vq, sgs, 1, 1, msg, GFP_ATOMIC);
			if (!ret) {
				kref_get(&msg->ref);
				msg->state = BUFSHARE_MSG_PENDING;
				list_add_tail(&msg->node, &queue->inflight);
				kick = virtqueue_kick_prepare(queue->vq);
			}
		}
		spin_unlock_irq(&queue->lock);
		if (ret != -ENOSPC)
			break;
		if (time_after_eq(now, deadline)) {
			bufshare_set_dead(bs);
			ret = -EIO;
			break;
		}
		wait_event_timeout(queue->space,
				   READ_ONCE(queue->vq->num_free) >= need || READ_ONCE(bs->dead) ||
				   (queue == &bs->sync && READ_ONCE(bs->closing)),
				   deadline - now);
	}
	if (kick)
		virtqueue_notify(queue->vq);
out:
	if (req != &one)
		kfree(req);
	return ret;
}

/* The one table from statuses to errors. */
static int bufshare_errno(u16 status)
{
	switch (status) {
	case VIRTIO_BUFSHARE_S_OK:
		return 0;
	case VIRTIO_BUFSHARE_S_UNSUPP:
		return -EOPNOTSUPP;
	case VIRTIO_BUFSHARE_S_INVAL:
		return -EINVAL;
	case VIRTIO_BUFSHARE_S_NOENT:
		return -ENOENT;
	case VIRTIO_BUFSHARE_S_ACCESS:
		return -EACCES;
	case VIRTIO_BUFSHARE_S_BUSY:
		return -EBUSY;
	case VIRTIO_BUFSHARE_S_NOMEM:
		return -ENOMEM;
	case VIRTIO_BUFSHARE_S_QUOTA:
		return -ENOSPC;
	case VIRTIO_BUFSHARE_S_RANGE:
		return -ERANGE;
	case VIRTIO_BUFSHARE_S_FAULT:
		return -EFAULT;
	case VIRTIO_BUFSHARE_S_TOOMANY:
		return -E2BIG;
	case VIRTIO_BUFSHARE_S_TIMEDOUT:
		return -ETIMEDOUT;
	case VIRTIO_BUFSHARE_S_REVOKED:
		return -EOWNERDEAD;
	case VIRTIO_BUFSHARE_S_CANCELED:
		return -ECANCELED;
	case VIRTIO_BUFSHARE_S_AGAIN:
		return -EAGAIN;
	case VIRTIO_BUFSHARE_S_IO:
	default:
		return -EIO;
	}
}

/**
 * bufshare_answer() - what became of a message that is done
 * @bs: the device
 * @msg: the message
 *
 * Return: 0 if there is a complete positive response; the error that the device answered; -EIO if
 * it broke the rules of the queue or is dead; -ENODEV if the session ends.
 */
int bufshare_answer(struct bufshare *bs, const struct bufshare_msg *msg)
{
	if (msg->state != BUFSHARE_MSG_ANSWERED)
		return READ_ONCE(bs->dead) ? -EIO : -ENODEV;
	if (msg->status == VIRTIO_BUFSHARE_S_OK && msg->used < msg->resp_need)
		return -EIO;
	return bufshare_errno(msg->status);
}

/**
 * bufshare_refused() - whether the device certainly did not do what a message asked for
 * @msg: a message that failed
 *
 * Return: true if the message never reached the device, or the device answered an error.
 */
bool bufshare_refused(const struct bufshare_msg *msg)
{
	if (msg->state == BUFSHARE_MSG_NEW)
		return true;
	return msg->state == BUFSHARE_MSG_ANSWERED && bufshare_sound(msg) &&
	       msg->status != VIRTIO_BUFSHARE_S_OK;
}

/**
 * bufshare_call() - send a control request and wait for its answer
 * @bs: the device
 * @msg: the message; keep your reference
 *
 * Not interruptible: the answer to an EXPORT must not be lost.
 *
 * Context: Process context, inside bufshare_enter() or while a session starts or ends.
 * Return: as bufshare_submit() and bufshare_answer().
 */
int bufshare_call(struct bufshare *bs, struct bufshare_msg *msg)
{
	int ret = bufshare_submit(bs, &bs->control, msg);

	if (ret)
		return ret;
	if (!wait_for_completion_timeout(&msg->done, BUFSHARE_ANSWER_TIMEOUT))
		bufshare_set_dead(bs);
	return bufshare_answer(bs, msg);
}
