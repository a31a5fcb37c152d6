// SPDX-License-Identifier: GPL-2.0
/*
 * virtio_bufshare: what the driver says to the device, one function per request. Every function
 * runs inside bufshare_enter(), or while a session starts or ends.
 */
#include <linux/dma-buf.h>
#include <linux/jiffies.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/string.h>

#include "virtio_bufshare.h"

/**
 * bufshare_req() - a new message with its header
 * @type: of the request
 * @flags: of the request
 * @req_len: bytes of the request
 * @resp_len: bytes of a complete response
 *
 * Return: the message, or NULL.
 */
struct bufshare_msg *bufshare_req(u16 type, u16 flags, u32 req_len, u32 resp_len)
{
	struct bufshare_msg *msg = bufshare_msg_new(req_len, resp_len);
	struct virtio_bufshare_req *hdr;

	if (!msg)
		return NULL;
	hdr = msg->req;
	hdr->type = cpu_to_le16(type);
	hdr->flags = cpu_to_le16(flags);
	return msg;
}

/**
 * bufshare_req_export() - EXPORT
 * @bs: the device
 * @loan: a new loan, with its memory
 * @arg: what the user wants
 * @metadata: that @arg names
 * @pool_uuid: UUID of the pool, or NULL if it is no part
 *
 * The loan knows afterwards what became of it: it is live, over, or, without an answer, unknown.
 *
 * Context: Process context.
 * Return: 0 or a negative error.
 */
int bufshare_req_export(struct bufshare *bs, struct bufshare_loan *loan,
			const struct bufshare_export *arg, const void *metadata,
			const u8 *pool_uuid)
{
	struct virtio_bufshare_segment *segments;
	struct virtio_bufshare_resp_export *resp;
	struct virtio_bufshare_export *req;
	struct bufshare_msg *msg = NULL;
	u16 flags = 0;
	int count = 1;
	u32 max;
	int ret;

	max = min(bs->config.max_segments, BUFSHARE_MAX_SEGMENTS);
	if (arg->metadata_len > bs->config.max_metadata) {
		ret = -ENOSPC;
		goto refused;
	}
	if (!pool_uuid)
		count = bufshare_memory_segments(loan->memory, bs->config.granule, NULL, max);
	if (count < 0) {
		ret = count;
		goto refused;
	}

	if (arg->flags & BUFSHARE_EXPORT_F_ZERO_COPY)
		flags |= VIRTIO_BUFSHARE_EXPORT_F_ZERO_COPY;
	if (pool_uuid)
		flags |= VIRTIO_BUFSHARE_EXPORT_F_PART;
	msg = bufshare_req(VIRTIO_BUFSHARE_EXPORT, flags,
			   sizeof(*req) + count * sizeof(*segments) + ALIGN(arg->metadata_len, 8),
			   sizeof(*resp));
	if (!msg) {
		ret = -ENOMEM;
		goto refused;
	}
	req = msg->req;
	resp = msg->resp;
	req->size = cpu_to_le64(loan->size);
	req->access = cpu_to_le32(arg->access);
	req->nr_segments = cpu_to_le32(count);
	req->metadata_type = cpu_to_le32(arg->metadata_type);
	req->metadata_len = cpu_to_le32(arg->metadata_len);
	memcpy(req->name, arg->name, sizeof(req->name));
	segments = (void *)(req + 1);
	if (pool_uuid) {
		memcpy(req->object, pool_uuid, sizeof(req->object));
		segments[0].addr = cpu_to_le64(arg->offset);
		segments[0].len = cpu_to_le64(loan->size);
	} else {
		bufshare_memory_segments(loan->memory, bs->config.granule, segments, count);
	}
	memcpy(segments + count, metadata, arg->metadata_len);

	mutex_lock(&bs->export_lock);
	ret = bufshare_call(bs, msg);
	if (!ret)
		ret = bufshare_loan_answered(loan, le64_to_cpu(resp->handle), resp->uuid,
					     le32_to_cpu(resp->mode));
	mutex_unlock(&bs->export_lock);
	if (!ret || !bufshare_refused(msg))
		goto out;
refused:
	bufshare_loan_end(loan, NULL);
out:
	bufshare_msg_put(msg);
	return ret;
}

/**
 * bufshare_req_grant() - GRANT
 * @bs: the device
 * @arg: what the user wants
 *
 * Return: 0 or a negative error.
 */
int bufshare_req_grant(struct bufshare *bs, const struct bufshare_grant *arg)
{
	struct virtio_bufshare_grant *req;
	struct bufshare_msg *msg;
	u16 flags = 0;
	int ret;

	if (arg->flags & BUFSHARE_GRANT_F_ONCE)
		flags |= VIRTIO_BUFSHARE_GRANT_F_ONCE;
	if (arg->flags & BUFSHARE_GRANT_F_FORCE)
		flags |= VIRTIO_BUFSHARE_GRANT_F_FORCE;
	msg = bufshare_req(VIRTIO_BUFSHARE_GRANT, flags, sizeof(*req),
			   sizeof(struct virtio_bufshare_resp));
	if (!msg)
		return -ENOMEM;
	req = msg->req;
	req->handle = cpu_to_le64(arg->handle);
	req->peer_id = cpu_to_le32(arg->peer_id);
	req->access = cpu_to_le32(arg->access);
	req->lifetime_ms = cpu_to_le64(arg->lifetime_ms);
	ret = bufshare_call(bs, msg);
	bufshare_msg_put(msg);
	return ret;
}

static int bufshare_req_state(struct bufshare *bs, u16 type, u16 flags, u64 handle,
			      struct virtio_bufshare_resp_state *out)
{
	struct virtio_bufshare_handle *req;
	struct bufshare_msg *msg;
	int ret;

	msg = bufshare_req(type, flags, sizeof(*req), sizeof(*out));
	if (!msg)
		return -ENOMEM;
	req = msg->req;
	req->handle = cpu_to_le64(handle);
	ret = bufshare_call(bs, msg);
	if (!ret)
		memcpy(out, msg->resp, sizeof(*out));
	bufshare_msg_put(msg);
	return ret;
}

/**
 * bufshare_req_release() - RELEASE
 * @bs: the device
 * @handle: of the export
 * @flags: VIRTIO_BUFSHARE_RELEASE_F_*
 * @state: out: VIRTIO_BUFSHARE_ST_RELEASED or VIRTIO_BUFSHARE_ST_RELEASING
 *
 * Return: 0 or a negative error.
 */
int bufshare_req_release(struct bufshare *bs, u64 handle, u16 flags, u32 *state)
{
	struct virtio_bufshare_resp_state resp;
	int ret;

	ret = bufshare_req_state(bs, VIRTIO_BUFSHARE_RELEASE, flags, handle, &resp);
	if (ret)
		return ret;
	*state = le32_to_cpu(resp.state);
	if (*state != VIRTIO_BUFSHARE_ST_RELEASED && *state != VIRTIO_BUFSHARE_ST_RELEASING)
		return -EIO;
	return 0;
}

/**
 * bufshare_req_query() - QUERY or QUERY_LINGER
 * @bs: the device
 * @type: VIRTIO_BUFSHARE_QUERY or VIRTIO_BUFSHARE_QUERY_LINGER
 * @handle: of the export, or the index
 * @out: the response, little-endian
 *
 * Return: 0 or a negative error.
 */
int bufshare_req_query(struct bufshare *bs, u16 type, u64 handle,
		       struct virtio_bufshare_resp_state *out)
{
	return bufshare_req_state(bs, type, 0, handle, out);
}

/**
 * bufshare_req_set_name() - SET_NAME
 * @bs: the device
 * @arg: what the user wants
 *
 * Return: 0 or a negative error.
 */
int bufshare_req_set_name(struct bufshare *bs, const struct bufshare_name *arg)
{
	struct virtio_bufshare_set_name *req;
	struct bufshare_msg *msg;
	int ret;

	msg = bufshare_req(VIRTIO_BUFSHARE_SET_NAME, 0, sizeof(*req),
			   sizeof(struct virtio_bufshare_resp));
	if (!msg)
		return -ENOMEM;
	req = msg->req;
	req->handle = cpu_to_le64(arg->handle);
	memcpy(req->name, arg->name, sizeof(req->name));
	ret = bufshare_call(bs, msg);
	bufshare_msg_put(msg);
	return ret;
}

/**
 * bufshare_req_peer() - PEER_INFO
 * @bs: the device
 * @arg: in: index; out: the rest
 *
 * Return: 0 or a negative error.
 */
int bufshare_req_peer(struct bufshare *bs, struct bufshare_peer *arg)
{
	struct virtio_bufshare_resp_peer_info *resp;
	struct virtio_bufshare_peer_info *req;
	struct bufshare_msg *msg;
	int ret;

	msg = bufshare_req(VIRTIO_BUFSHARE_PEER_INFO, 0, sizeof(*req), sizeof(*resp));
	if (!msg)
		return -ENOMEM;
	req = msg->req;
	resp = msg->resp;
	req->index = cpu_to_le32(arg->index);
	ret = bufshare_call(bs, msg);
	if (!ret) {
		arg->nr_peers = le32_to_cpu(resp->nr_peers);
		arg->peer_id = le32_to_cpu(resp->peer_id);
		arg->flags = le32_to_cpu(resp->flags);
		arg->epoch = le32_to_cpu(resp->epoch);
		memcpy(arg->name, resp->name, sizeof(arg->name));
	}
	bufshare_msg_put(msg);
	return ret;
}

/**
 * bufshare_req_cancel() - CANCEL
 * @bs: the device
 * @handle: that the canceled requests name
 * @cookie: of one of them; 0: all
 *
 * Return: 0, -ENOENT if there is none, or another negative error.
 */
int bufshare_req_cancel(struct bufshare *bs, u64 handle, u32 cookie)
{
	struct virtio_bufshare_cancel *req;
	struct bufshare_msg *msg;
	int ret;

	msg = bufshare_req(VIRTIO_BUFSHARE_CANCEL, 0, sizeof(*req),
			   sizeof(struct virtio_bufshare_resp));
	if (!msg)
		return -ENOMEM;
	req = msg->req;
	req->handle = cpu_to_le64(handle);
	req->cookie = cpu_to_le32(cookie);
	ret = bufshare_call(bs, msg);
	bufshare_msg_put(msg);
	return ret;
}

/* Waits for a sync request; a signal cancels it, and then its own answer tells what happened. */
static int bufshare_wait_sync(struct bufshare *bs, struct bufshare_msg *msg, u64 handle,
			      u32 cookie, unsigned long timeout)
{
	long left;
	int ret;

	left = wait_for_completion_interruptible_timeout(&msg->done, timeout);
	if (left > 0)
		return bufshare_answer(bs, msg);
	if (left < 0) {
		bufshare_req_cancel(bs, handle, cookie);
		left = wait_for_completion_timeout(&msg->done, BUFSHARE_ANSWER_TIMEOUT);
		if (left) {
			ret = bufshare_answer(bs, msg);
			return ret == -ECANCELED ? -EINTR : ret;
		}
	}
	bufshare_set_dead(bs);
	return bufshare_answer(bs, msg);
}

/**
 * bufshare_next_cookie() - a number for a sync request
 * @bs: the device
 *
 * Return: it; not 0.
 */
u32 bufshare_next_cookie(struct bufshare *bs)
{
	u32 cookie;

	do {
		cookie = atomic_inc_return(&bs->cookie);
	} while (!cookie);
	return cookie;
}

/**
 * bufshare_max_waits() - how many requests may stay pending
 * @bs: the device
 *
 * They must never fill the queue, or the END that they wait for finds no room in it. Each takes two
 * descriptors.
 *
 * Return: how many.
 */
int bufshare_max_waits(struct bufshare *bs)
{
	return min_t(int, bs->config.max_waits, virtqueue_get_vring_size(bs->sync.vq) / 2 - 2);
}

/**
 * bufshare_call_sync() - send a request on the sync queue and wait for its answer
 * @bs: the device
 * @msg: the message; keep your reference
 * @handle: of the export or attachment that it names
 * @timeout_ns: for so long it may stay pending; 0: it is answered at once
 *
 * Context: Process context, inside bufshare_enter().
 * Return: as bufshare_call(); -EBUSY if too many are pending, -EINTR after a signal.
 */
int bufshare_call_sync(struct bufshare *bs, struct bufshare_msg *msg, u64 handle, u64 timeout_ns)
{
	unsigned long timeout = BUFSHARE_ANSWER_TIMEOUT + nsecs_to_jiffies(timeout_ns);
	struct virtio_bufshare_req *hdr = msg->req;
	u32 cookie = bufshare_next_cookie(bs);
	int ret = -EBUSY;

	hdr->cookie = cpu_to_le32(cookie);
	if (!timeout_ns || atomic_inc_return(&bs->waits) <= bufshare_max_waits(bs))
		ret = bufshare_submit(bs, &bs->sync, msg);
	if (!ret)
		ret = bufshare_wait_sync(bs, msg, handle, cookie, timeout);
	if (timeout_ns)
		atomic_dec(&bs->waits);
	return ret;
}

/**
 * bufshare_req_sync() - SYNC
 * @bs: the device
 * @arg: in: what the user wants; out: the generation
 *
 * Return: 0, -EINTR after a signal, or another negative error.
 */
int bufshare_req_sync(struct bufshare *bs, struct bufshare_sync *arg)
{
	u64 timeout_ns = min_t(u64, arg->timeout_ns, (u64)bs->config.max_wait_ms * NSEC_PER_MSEC);
	const struct virtio_bufshare_resp_sync *resp;
	struct virtio_bufshare_sync *req;
	struct bufshare_msg *msg;
	u16 flags;
	int ret;

	/* The flags of the two interfaces are the same bits. */
	BUILD_BUG_ON(BUFSHARE_SYNC_F_END != VIRTIO_BUFSHARE_SYNC_F_END);
	BUILD_BUG_ON(BUFSHARE_SYNC_F_READ != VIRTIO_BUFSHARE_SYNC_F_READ);
	BUILD_BUG_ON(BUFSHARE_SYNC_F_WRITE != VIRTIO_BUFSHARE_SYNC_F_WRITE);
	BUILD_BUG_ON(BUFSHARE_SYNC_F_NONBLOCK != VIRTIO_BUFSHARE_SYNC_F_NONBLOCK);
	flags = arg->flags;
	if (flags & BUFSHARE_SYNC_F_END)
		flags &= ~BUFSHARE_SYNC_F_NONBLOCK; /* was about the fences of this guest */
	if (flags & (BUFSHARE_SYNC_F_END | BUFSHARE_SYNC_F_NONBLOCK))
		timeout_ns = 0;
	msg = bufshare_req(VIRTIO_BUFSHARE_SYNC, flags, sizeof(*req), sizeof(*resp));
	if (!msg)
		return -ENOMEM;
	req = msg->req;
	resp = msg->resp;
	req->handle = cpu_to_le64(arg->handle);
	req->offset = cpu_to_le64(arg->offset);
	req->len = cpu_to_le64(arg->len);
	req->timeout_ns = cpu_to_le64(timeout_ns);
	ret = bufshare_call_sync(bs, msg, arg->handle, timeout_ns);
	if (!ret)
		arg->generation = le64_to_cpu(resp->generation);
	bufshare_msg_put(msg);
	return ret;
}
