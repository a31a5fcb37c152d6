// SPDX-License-Identifier: GPL-2.0
/*
 * virtio_bufshare: what an importer says to the device, one function per request. Every function
 * runs inside bufshare_enter(), or while a session starts or ends.
 */
#include <linux/slab.h>
#include <linux/string.h>

#include "virtio_bufshare.h"

/**
 * bufshare_req_attach() - ATTACH
 * @bs: the device
 * @import: what the answer is about; its access says what is wanted
 * @zero_copy: fail rather than copy
 *
 * Context: Process context.
 * Return: 0 or a negative error.
 */
int bufshare_req_attach(struct bufshare *bs, struct bufshare_import *import, bool zero_copy)
{
	u32 room = bs->config.max_metadata;
	struct virtio_bufshare_resp_attach *resp;
	struct virtio_bufshare_attach *req;
	struct bufshare_msg *msg;
	u32 len;
	int ret;

	msg = bufshare_req(VIRTIO_BUFSHARE_ATTACH,
			   zero_copy ? VIRTIO_BUFSHARE_ATTACH_F_ZERO_COPY : 0,
			   sizeof(*req), sizeof(*resp) + room);
	if (!msg)
		return -ENOMEM;
	req = msg->req;
	resp = msg->resp;
	msg->resp_need = sizeof(*resp);
	memcpy(req->uuid, import->uuid, sizeof(req->uuid));
	req->access = cpu_to_le32(import->access);
	req->max_metadata = cpu_to_le32(room);
	ret = bufshare_call(bs, msg);
	if (ret)
		goto out;

	import->handle = le64_to_cpu(resp->handle);
	import->size = le64_to_cpu(resp->size);
	import->generation = le64_to_cpu(resp->generation);
	import->exporter = le32_to_cpu(resp->exporter);
	import->mode = le32_to_cpu(resp->mode);
	import->metadata_type = le32_to_cpu(resp->metadata_type);
	len = le32_to_cpu(resp->metadata_len);
	memcpy(import->name, resp->name, sizeof(import->name));
	if (len > room || sizeof(*resp) + len > msg->used) {
		ret = -EIO;
		goto out;
	}
	import->metadata = kmemdup(resp + 1, len, GFP_KERNEL_ACCOUNT);
	if (import->metadata)
		import->metadata_len = len;
	else
		ret = -ENOMEM;
out:
	bufshare_msg_put(msg);
	return ret;
}

static int bufshare_req_plain(struct bufshare *bs, u16 type, u64 number)
{
	struct virtio_bufshare_handle *req;
	struct bufshare_msg *msg;
	int ret;

	BUILD_BUG_ON(sizeof(struct virtio_bufshare_unmap) != sizeof(*req));
	msg = bufshare_req(type, 0, sizeof(*req), sizeof(struct virtio_bufshare_resp));
	if (!msg)
		return -ENOMEM;
	req = msg->req;
	req->handle = cpu_to_le64(number);
	ret = bufshare_call(bs, msg);
	bufshare_msg_put(msg);
	return ret;
}

/**
 * bufshare_req_detach() - DETACH
 * @bs: the device
 * @handle: of the attachment
 *
 * Return: 0 or a negative error.
 */
int bufshare_req_detach(struct bufshare *bs, u64 handle)
{
	return bufshare_req_plain(bs, VIRTIO_BUFSHARE_DETACH, handle);
}

/**
 * bufshare_req_unmap() - UNMAP
 * @bs: the device
 * @mapping: from MAP
 *
 * Return: 0 or a negative error.
 */
int bufshare_req_unmap(struct bufshare *bs, u64 mapping)
{
	return bufshare_req_plain(bs, VIRTIO_BUFSHARE_UNMAP, mapping);
}

/**
 * bufshare_req_map() - MAP of all of an attachment
 * @bs: the device
 * @import: the attachment, with its own pages or its place in the window
 * @unsure: out: the device may have done it all the same
 *
 * Return: 0 or a negative error.
 */
int bufshare_req_map(struct bufshare *bs, struct bufshare_import *import, bool *unsure)
{
	bool copy = import->where == BUFSHARE_ON_PAGES;
	struct sg_table *sgt = &import->buffer.sgt;
	struct virtio_bufshare_resp_map *resp;
	struct virtio_bufshare_map *req;
	struct bufshare_msg *msg;
	int count = 0;
	int ret;

	*unsure = false;
	if (copy)
		count = bufshare_segments(sgt, false, import->size, bs->config.granule, NULL,
					  min(bs->config.max_segments, BUFSHARE_MAX_SEGMENTS));
	if (count < 0)
		return count;
	msg = bufshare_req(VIRTIO_BUFSHARE_MAP, copy ? VIRTIO_BUFSHARE_MAP_F_COPY : 0,
			   sizeof(*req) + count * sizeof(struct virtio_bufshare_segment),
			   sizeof(*resp));
	if (!msg)
		return -ENOMEM;
	req = msg->req;
	resp = msg->resp;
	req->handle = cpu_to_le64(import->handle);
	req->len = cpu_to_le64(import->size);
	req->access = cpu_to_le32(import->access);
	req->nr_segments = cpu_to_le32(count);
	if (copy)
		bufshare_segments(sgt, false, import->size, bs->config.granule,
				  (void *)(req + 1), count);
	else
		req->shm_offset = cpu_to_le64(import->offset);
	ret = bufshare_call(bs, msg);
	if (!ret) {
		import->mapping = le64_to_cpu(resp->mapping);
		import->cache = le32_to_cpu(resp->cache);
	} else {
		*unsure = !bufshare_refused(msg);
	}
	bufshare_msg_put(msg);
	return ret;
}
