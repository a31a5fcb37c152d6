// SPDX-License-Identifier: GPL-2.0
/*
 * virtio_bufshare: requests of /dev/bufshareN for importers. Checks what users say.
 */
#include <linux/dma-buf.h>
#include <linux/file.h>
#include <linux/string.h>
#include <linux/uaccess.h>

#include "virtio_bufshare.h"

static int bufshare_attach_check(const struct bufshare_attach *arg)
{
	if (arg->flags & ~BUFSHARE_ATTACH_F_ZERO_COPY)
		return -EINVAL;
	if (!arg->access || arg->access & ~(BUFSHARE_ACCESS_READ | BUFSHARE_ACCESS_WRITE))
		return -EINVAL;
	return arg->reserved || arg->reserved2 ? -EINVAL : 0;
}

/* What came of it, for the user. @metadata is @arg->metadata_len bytes. */
static int bufshare_attach_answer(struct bufshare_attach *arg, const void *metadata, u32 room,
				  void __user *user)
{
	u32 len = min(arg->metadata_len, room);

	if (copy_to_user(u64_to_user_ptr(arg->metadata), metadata, len) ||
	    copy_to_user(user, arg, sizeof(*arg)))
		return -EFAULT;
	return 0;
}

/**
 * bufshare_ioc_attach() - BUFSHARE_IOC_ATTACH
 * @file: the open file
 * @user: address of the argument
 * @arg: the argument
 *
 * Return: 0 or a negative error.
 */
int bufshare_ioc_attach(struct bufshare_file *file, void __user *user,
			struct bufshare_attach *arg)
{
	struct bufshare_import *import = NULL;
	struct bufshare *bs = file->bs;
	const void *metadata = NULL;
	u32 room = arg->metadata_len;
	struct dma_buf *dmabuf;
	int ret;

	ret = bufshare_attach_check(arg);
	if (ret)
		return ret;
	ret = bufshare_enter(bs, file->session);
	if (ret)
		return ret;
	dmabuf = bufshare_loan_own(file, arg);
	if (!dmabuf) {
		import = bufshare_import_new(file, arg->uuid, arg->access,
					     arg->flags & BUFSHARE_ATTACH_F_ZERO_COPY);
		ret = PTR_ERR_OR_ZERO(import);
	}
	bufshare_leave(bs);
	if (ret)
		return ret;
	if (import) {
		dmabuf = import->dmabuf;
		arg->mode = import->mode;
		arg->handle = import->handle;
		arg->offset = 0;
		arg->size = import->size;
		arg->generation = import->generation;
		arg->exporter = import->exporter;
		arg->metadata_type = import->metadata_type;
		arg->metadata_len = import->metadata_len;
		memcpy(arg->name, import->name, sizeof(arg->name));
		metadata = import->metadata;
	}

	arg->fd = get_unused_fd_flags(O_CLOEXEC);
	if (arg->fd < 0) {
		ret = arg->fd;
		goto put;
	}
	ret = bufshare_attach_answer(arg, metadata, room, user);
	if (ret) {
		put_unused_fd(arg->fd);
		goto put;
	}
	fd_install(arg->fd, dmabuf->file);
	return 0;

put:
	dma_buf_put(dmabuf);
	return ret;
}

/**
 * bufshare_ioc_offer() - BUFSHARE_IOC_OFFER
 * @file: the open file
 * @arg: the argument
 *
 * Return: 0, -ENOENT past the last offer, -ENODEV if the session is over.
 */
int bufshare_ioc_offer(struct bufshare_file *file, struct bufshare_offer *arg)
{
	int ret;

	if (arg->reserved)
		return -EINVAL;
	ret = bufshare_enter(file->bs, file->session);
	if (ret)
		return ret;
	ret = bufshare_offer_next(file->bs, arg);
	bufshare_leave(file->bs);
	return ret;
}
