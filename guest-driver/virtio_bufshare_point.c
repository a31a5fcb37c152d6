// SPDX-License-Identifier: GPL-2.0
/*
 * virtio_bufshare: requests of /dev/bufshareN about points of timelines. What a peer signals reaches
 * who waits in a system call, or an eventfd, and never a fence.
 *
 * An eventfd waits without a thread: it has a WAIT with the device, and a work item that runs when
 * that is answered, or when no answer came. It ends once, whatever the end is.
 */
#include <linux/eventfd.h>
#include <linux/jiffies.h>
#include <linux/slab.h>

#include "virtio_bufshare.h"

/**
 * struct bufshare_watch - an eventfd that waits for a point
 * @node: in bufshare_file.watches; guarded by the loan lock, as @eventfd and @cookie
 * @bs: the device; counted
 * @session: of @bs
 * @handle: of the export or attachment
 * @point: ...
 * @timeline: BUFSHARE_TIMELINE_*
 * @cookie: of @msg
 * @eventfd: NULL: the file is closed
 * @msg: the WAIT; belongs to @work, which alone frees the watch
 * @work: the answer to @msg, or that there is none
 */
struct bufshare_watch {
	struct list_head node;
	struct bufshare *bs;
	u32 session;
	u64 handle;
	u64 point;
	u32 timeline;
	u32 cookie;
	struct eventfd_ctx *eventfd;
	struct bufshare_msg *msg;
	struct delayed_work work;
};

/*
 * Enters for a request about an export or attachment of the file; on success to be undone by
 * bufshare_leave().
 */
static int bufshare_point_enter(struct bufshare_file *file, u64 handle, u32 timeline)
{
	struct bufshare_import *import = NULL;
	struct bufshare_loan *loan;
	int ret;

	if (timeline > BUFSHARE_TIMELINE_RELEASE)
		return -EINVAL;
	ret = bufshare_enter(file->bs, file->session);
	if (ret)
		return ret;
	loan = bufshare_loan_find(file, handle, NULL);
	if (!loan)
		import = bufshare_import_find(file, handle);
	if (!(file->bs->features & BIT_ULL(VIRTIO_BUFSHARE_F_TIMELINE)))
		ret = -EOPNOTSUPP;
	else if (import)
		ret = READ_ONCE(import->error);
	else if (!loan)
		ret = -ENOENT;
	bufshare_import_put(import);
	bufshare_loan_put(loan);
	if (ret)
		bufshare_leave(file->bs);
	return ret;
}

static u64 bufshare_longest_wait(const struct bufshare *bs)
{
	return (u64)bs->config.max_wait_ms * NSEC_PER_MSEC;
}

static struct bufshare_msg *bufshare_point_msg(u16 type, u64 handle, u32 timeline, u64 point)
{
	struct virtio_bufshare_point *req;
	struct bufshare_msg *msg;

	/* The numbers of the two interfaces are the same. */
	BUILD_BUG_ON(BUFSHARE_TIMELINE_ACQUIRE != (u32)VIRTIO_BUFSHARE_TL_ACQUIRE);
	BUILD_BUG_ON(BUFSHARE_TIMELINE_RELEASE != (u32)VIRTIO_BUFSHARE_TL_RELEASE);
	msg = bufshare_req(type, 0, sizeof(*req), sizeof(struct virtio_bufshare_resp_point));
	if (!msg)
		return NULL;
	req = msg->req;
	req->handle = cpu_to_le64(handle);
	req->timeline = cpu_to_le32(timeline);
	req->point = cpu_to_le64(point);
	return msg;
}

/**
 * bufshare_ioc_point_signal() - BUFSHARE_IOC_POINT_SIGNAL
 * @file: the open file
 * @arg: the argument
 *
 * Return: 0 or a negative error.
 */
int bufshare_ioc_point_signal(struct bufshare_file *file, struct bufshare_point_signal *arg)
{
	struct virtio_bufshare_point *req;
	struct bufshare_msg *msg;
	int ret;

	ret = bufshare_point_enter(file, arg->handle, arg->timeline);
	if (ret)
		return ret;
	ret = -ENOMEM;
	msg = bufshare_point_msg(VIRTIO_BUFSHARE_POINT_SIGNAL, arg->handle, arg->timeline,
				 arg->point);
	if (msg) {
		req = msg->req;
		req->error = cpu_to_le32(arg->error);
		ret = bufshare_call_sync(file->bs, msg, arg->handle, 0);
	}
	bufshare_msg_put(msg);
	bufshare_leave(file->bs);
	return ret;
}

/**
 * bufshare_ioc_point_wait() - BUFSHARE_IOC_POINT_WAIT
 * @file: the open file
 * @arg: the argument
 * @nonblock: as BUFSHARE_POINT_F_NONBLOCK
 *
 * Return: 0, -EINTR after a signal, or another negative error.
 */
int bufshare_ioc_point_wait(struct bufshare_file *file, struct bufshare_point_wait *arg,
			    bool nonblock)
{
	struct virtio_bufshare_resp_point *resp;
	struct virtio_bufshare_point *req;
	struct bufshare_msg *msg;
	u64 timeout_ns = 0;
	int ret;

	if (arg->flags & ~BUFSHARE_POINT_F_NONBLOCK)
		return -EINVAL;
	nonblock |= arg->flags & BUFSHARE_POINT_F_NONBLOCK;
	ret = bufshare_point_enter(file, arg->handle, arg->timeline);
	if (ret)
		return ret;
	if (!nonblock)
		timeout_ns = min(arg->timeout_ns, bufshare_longest_wait(file->bs));
	ret = -ENOMEM;
	msg = bufshare_point_msg(VIRTIO_BUFSHARE_POINT_WAIT, arg->handle, arg->timeline,
				 arg->point);
	if (msg) {
		req = msg->req;
		resp = msg->resp;
		req->timeout_ns = cpu_to_le64(timeout_ns);
		ret = bufshare_call_sync(file->bs, msg, arg->handle, timeout_ns);
		if (!ret)
			arg->reached = le64_to_cpu(resp->reached);
	}
	bufshare_msg_put(msg);
	bufshare_leave(file->bs);
	/* The device says either of what would have to wait. */
	if (nonblock && (ret == -ETIMEDOUT || ret == -EBUSY))
		ret = -EAGAIN;
	return ret;
}

/* ---- eventfds ---- */

/* Asks the device. Inside bufshare_enter(). */
static int bufshare_watch_arm(struct bufshare_watch *watch)
{
	u64 timeout_ns = bufshare_longest_wait(watch->bs);
	struct virtio_bufshare_point *req;
	struct bufshare *bs = watch->bs;
	bool closed;
	u32 cookie;
	int ret;

	cookie = bufshare_next_cookie(bs);
	spin_lock(&bufshare_loan_lock);
	watch->cookie = cookie;
	closed = !watch->eventfd;
	spin_unlock(&bufshare_loan_lock);
	if (closed)
		return -ECANCELED;

	watch->msg = bufshare_point_msg(VIRTIO_BUFSHARE_POINT_WAIT, watch->handle,
					watch->timeline, watch->point);
	if (!watch->msg)
		return -ENOMEM;
	req = watch->msg->req;
	req->hdr.cookie = cpu_to_le32(cookie);
	req->timeout_ns = cpu_to_le64(timeout_ns);
	watch->msg->then = &watch->work;
	/*
	 * Before the answer can come, which makes it run at once. Twice: to submit may take as long as
	 * an answer.
	 */
	queue_delayed_work(bufshare_wq, &watch->work,
			   2 * BUFSHARE_ANSWER_TIMEOUT + nsecs_to_jiffies(timeout_ns));
	ret = bufshare_submit(bs, &bs->sync, watch->msg);
	if (ret) {
		cancel_delayed_work(&watch->work);
		bufshare_msg_put(watch->msg);
	}
	return ret;
}

static void bufshare_watch_free(struct bufshare_watch *watch)
{
	atomic_dec(&watch->bs->watches);
	atomic_dec(&watch->bs->waits);
	put_device(&watch->bs->dev);
	kfree(watch);
}

static void bufshare_watch_end(struct bufshare_watch *watch)
{
	struct eventfd_ctx *eventfd;

	spin_lock(&bufshare_loan_lock);
	list_del_init(&watch->node);
	eventfd = watch->eventfd;
	spin_unlock(&bufshare_loan_lock);
	if (eventfd) {
		eventfd_signal(eventfd);
		eventfd_ctx_put(eventfd);
	}
	bufshare_watch_free(watch);
}

static void bufshare_watch_work(struct work_struct *work)
{
	struct bufshare_watch *watch = container_of(to_delayed_work(work), struct bufshare_watch,
						    work);
	struct bufshare *bs = watch->bs;
	bool pending;
	int ret;

	spin_lock_irq(&bs->sync.lock);
	pending = watch->msg->state == BUFSHARE_MSG_PENDING;
	spin_unlock_irq(&bs->sync.lock);
	if (pending) {
		/* All that wait are sent away, this one included: it runs once more. */
		if (!bufshare_enter(bs, watch->session)) {
			bufshare_set_dead(bs);
			bufshare_leave(bs);
		}
		return;
	}
	/* An answer that came at the last moment has queued it again. */
	cancel_delayed_work(&watch->work);
	ret = bufshare_answer(bs, watch->msg);
	bufshare_msg_put(watch->msg);
	if ((ret == -ETIMEDOUT || ret == -EBUSY) && !bufshare_enter(bs, watch->session)) {
		ret = bufshare_watch_arm(watch);
		bufshare_leave(bs);
		if (!ret)
			return;
	}
	bufshare_watch_end(watch);
}

static int bufshare_watch_new(struct bufshare_file *file, const struct bufshare_point_eventfd *arg,
			      struct eventfd_ctx *eventfd)
{
	struct bufshare *bs = file->bs;
	struct bufshare_watch *watch;
	int waits, watches;
	int ret = -EBUSY;

	watch = kzalloc_obj(*watch, GFP_KERNEL_ACCOUNT);
	if (!watch)
		return -ENOMEM;
	get_device(&bs->dev);
	watch->bs = bs;
	watch->session = file->session;
	watch->handle = arg->handle;
	watch->point = arg->point;
	watch->timeline = arg->timeline;
	watch->eventfd = eventfd;
	INIT_DELAYED_WORK(&watch->work, bufshare_watch_work);
	spin_lock(&bufshare_loan_lock);
	list_add_tail(&watch->node, &file->watches);
	spin_unlock(&bufshare_loan_lock);

	/* They stay for as long as somebody likes: the other half is for those who wait in turns. */
	waits = atomic_inc_return(&bs->waits);
	watches = atomic_inc_return(&bs->watches);
	if (waits <= bufshare_max_waits(bs) && watches <= bufshare_max_waits(bs) / 2)
		ret = bufshare_watch_arm(watch);
	if (!ret)
		return 0; /* it may be over already */

	spin_lock(&bufshare_loan_lock);
	list_del(&watch->node);
	spin_unlock(&bufshare_loan_lock);
	bufshare_watch_free(watch);
	return ret;
}

/**
 * bufshare_ioc_point_eventfd() - BUFSHARE_IOC_POINT_EVENTFD
 * @file: the open file
 * @arg: the argument
 *
 * Return: 0 or a negative error.
 */
int bufshare_ioc_point_eventfd(struct bufshare_file *file, struct bufshare_point_eventfd *arg)
{
	struct eventfd_ctx *eventfd;
	int ret;

	if (arg->flags || arg->reserved)
		return -EINVAL;
	eventfd = eventfd_ctx_fdget(arg->fd);
	if (IS_ERR(eventfd))
		return PTR_ERR(eventfd);
	ret = bufshare_point_enter(file, arg->handle, arg->timeline);
	if (!ret) {
		ret = bufshare_watch_new(file, arg, eventfd);
		bufshare_leave(file->bs);
	}
	if (ret)
		eventfd_ctx_put(eventfd);
	return ret;
}

/**
 * bufshare_points_close() - a file is closed: its eventfds wait no more
 * @file: the file
 *
 * Context: Process context, outside bufshare_enter().
 */
void bufshare_points_close(struct bufshare_file *file)
{
	struct bufshare *bs = file->bs;
	struct bufshare_watch *watch;
	struct eventfd_ctx *eventfd;
	u64 handle;
	u32 cookie;

	for (;;) {
		spin_lock(&bufshare_loan_lock);
		watch = list_first_entry_or_null(&file->watches, struct bufshare_watch, node);
		if (watch) {
			list_del_init(&watch->node);
			eventfd = watch->eventfd;
			watch->eventfd = NULL;
			handle = watch->handle;
			cookie = watch->cookie;
		}
		spin_unlock(&bufshare_loan_lock);
		if (!watch)
			break;
		/* The watch may go at any time from here on. */
		eventfd_signal(eventfd);
		eventfd_ctx_put(eventfd);
		if (!bufshare_enter(bs, file->session)) {
			bufshare_req_cancel(bs, handle, cookie);
			bufshare_leave(bs);
		}
	}
}
