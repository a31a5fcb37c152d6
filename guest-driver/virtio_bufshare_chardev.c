// SPDX-License-Identifier: GPL-2.0
/*
 * virtio_bufshare: /dev/bufshareN. Checks what users say and turns it into requests; an open file
 * outlives the device and then answers ENODEV.
 */
#include <linux/dma-buf.h>
#include <linux/fs.h>
#include <linux/idr.h>
#include <linux/jiffies.h>
#include <linux/module.h>
#include <linux/poll.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/virtio_config.h>

#include "virtio_bufshare.h"

#define BUFSHARE_MINORS 256

static dev_t bufshare_devt;
static DEFINE_IDA(bufshare_minors);

static const struct class bufshare_class = {
	.name = "bufshare",
};

union bufshare_arg {
	struct bufshare_info info;
	struct bufshare_alloc alloc;
	struct bufshare_export export;
	struct bufshare_grant grant;
	struct bufshare_sync sync;
	struct bufshare_name name;
	struct bufshare_query query;
	struct bufshare_release release;
	struct bufshare_peer peer;
	struct bufshare_attach attach;
	struct bufshare_offer offer;
	struct bufshare_point_signal signal;
	struct bufshare_point_wait wait;
	struct bufshare_point_eventfd eventfd;
};

/* Why nothing will ever come any more, or 0. */
static int bufshare_file_error(struct bufshare_file *file)
{
	if (READ_ONCE(file->bs->session) != file->session)
		return -ENODEV;
	return READ_ONCE(file->bs->dead) ? -EIO : 0;
}

static int bufshare_ioc_info(struct bufshare_file *file, struct bufshare_info *arg)
{
	struct bufshare *bs = file->bs;
	const struct bufshare_config *config = &bs->config;
	int ret = -ENODEV;

	/* Not bufshare_enter(): a dead device can be asked, too. */
	down_read(&bs->users);
	if (bs->session == file->session) {
		*arg = (struct bufshare_info) {
			.flags = READ_ONCE(bs->dead) ? 0 : BUFSHARE_INFO_F_ALIVE,
			.peer_id = config->peer_id,
			.epoch = READ_ONCE(config->epoch),
			.lingering = READ_ONCE(config->lingering),
			.granule = config->granule,
			.max_segments = config->max_segments,
			.max_buffer_size = config->max_buffer_size,
			.max_total_size = config->max_total_size,
			.max_exports = config->max_exports,
			.max_metadata = config->max_metadata,
			.max_wait_ms = config->max_wait_ms,
			.max_waits = config->max_waits,
			.features = bs->features,
			.quarantined = bufshare_loans_quarantined(),
			.max_attachments = config->max_attachments,
			.window = bs->window.len,
			.max_mappings = READ_ONCE(config->max_mappings),
		};
		ret = 0;
	}
	up_read(&bs->users);
	return ret;
}

static int bufshare_ioc_alloc(struct bufshare_file *file, void __user *user,
			      struct bufshare_alloc *arg)
{
	struct bufshare *bs = file->bs;
	struct dma_buf *dmabuf;
	u32 granule;
	int ret;

	if (arg->flags || arg->reserved[0] || arg->reserved[1])
		return -EINVAL;
	ret = bufshare_enter(bs, file->session);
	if (ret)
		return ret;
	granule = max_t(u32, bs->config.granule, PAGE_SIZE);
	if (!arg->size)
		ret = -EINVAL;
	else if (arg->size > bs->config.max_buffer_size)
		ret = -ENOSPC;
	bufshare_leave(bs);
	if (ret)
		return ret;

	arg->size = ALIGN(arg->size, granule);
	dmabuf = bufshare_buffer_new(arg->size, granule);
	if (IS_ERR(dmabuf))
		return PTR_ERR(dmabuf);
	arg->fd = get_unused_fd_flags(O_CLOEXEC);
	if (arg->fd < 0) {
		dma_buf_put(dmabuf);
		return arg->fd;
	}
	if (copy_to_user(user, arg, sizeof(*arg))) {
		put_unused_fd(arg->fd);
		dma_buf_put(dmabuf);
		return -EFAULT;
	}
	fd_install(arg->fd, dmabuf->file);
	return 0;
}

static int bufshare_export_check(const struct bufshare_export *arg)
{
	bool part = arg->flags & BUFSHARE_EXPORT_F_PART;

	if (arg->flags & ~(BUFSHARE_EXPORT_F_ZERO_COPY | BUFSHARE_EXPORT_F_PART))
		return -EINVAL;
	if (!arg->access || arg->access & ~(BUFSHARE_ACCESS_READ | BUFSHARE_ACCESS_WRITE))
		return -EINVAL;
	if (arg->reserved[0] || arg->reserved[1])
		return -EINVAL;
	if (part ? arg->fd != -1 || !arg->pool || !arg->size : arg->pool || arg->offset)
		return -EINVAL;
	return 0;
}

/* The memory for an export: that of the pool, or of the dma-buf. */
static int bufshare_export_memory(struct bufshare_file *file, struct bufshare_loan *loan,
				  const struct bufshare_export *arg, u8 *pool_uuid)
{
	struct bufshare_memory *memory;
	struct dma_buf *dmabuf;

	if (arg->flags & BUFSHARE_EXPORT_F_PART) {
		memory = bufshare_loan_share(file, arg->pool, pool_uuid);
		if (!memory)
			return -ENOENT;
		loan->size = arg->size;
		loan->offset = arg->offset;
	} else {
		dmabuf = dma_buf_get(arg->fd);
		if (IS_ERR(dmabuf))
			return PTR_ERR(dmabuf);
		loan->size = dmabuf->size;
		if (arg->size && arg->size != loan->size)
			memory = ERR_PTR(-EINVAL);
		else
			memory = bufshare_memory_new(&file->bs->vdev->dev, dmabuf);
		dma_buf_put(dmabuf);
		if (IS_ERR(memory))
			return PTR_ERR(memory);
	}
	bufshare_loan_lend(loan, memory);
	return 0;
}

static int bufshare_ioc_export(struct bufshare_file *file, struct bufshare_export *arg)
{
	struct bufshare *bs = file->bs;
	struct bufshare_loan *loan;
	u8 pool_uuid[16];
	void *metadata;
	int ret;

	ret = bufshare_export_check(arg);
	if (ret)
		return ret;
	if (arg->metadata_len > BUFSHARE_MAX_METADATA)
		return -ENOSPC;
	/* Outside bufshare_enter(): a program may make it wait for as long as it likes. */
	metadata = memdup_user(u64_to_user_ptr(arg->metadata), arg->metadata_len);
	if (IS_ERR(metadata))
		return PTR_ERR(metadata);
	ret = bufshare_enter(bs, file->session);
	if (ret)
		goto free;
	loan = bufshare_loan_new(file);
	if (!loan) {
		ret = -ENOMEM;
		goto leave;
	}
	ret = bufshare_export_memory(file, loan, arg, pool_uuid);
	if (ret)
		bufshare_loan_end(loan, NULL);
	else
		ret = bufshare_req_export(bs, loan, arg, metadata,
					  arg->flags & BUFSHARE_EXPORT_F_PART ? pool_uuid : NULL);
	if (!ret) {
		arg->handle = loan->handle;
		arg->mode = loan->mode;
		arg->size = loan->size;
		memcpy(arg->uuid, loan->uuid, sizeof(arg->uuid));
	}
	bufshare_loan_put(loan);
leave:
	bufshare_leave(bs);
free:
	kfree(metadata);
	return ret == -ERESTARTSYS ? -EINTR : ret;
}

/* Enters, and finds the caller's loan; on success to be undone by bufshare_leave_loan(). */
static int bufshare_enter_loan(struct bufshare_file *file, u64 handle, struct bufshare_loan **loan)
{
	int ret = bufshare_enter(file->bs, file->session);

	if (ret)
		return ret;
	*loan = bufshare_loan_find(file, handle, NULL);
	if (*loan)
		return 0;
	bufshare_leave(file->bs);
	return -ENOENT;
}

static void bufshare_leave_loan(struct bufshare_file *file, struct bufshare_loan *loan)
{
	bufshare_loan_put(loan);
	bufshare_leave(file->bs);
}

static int bufshare_ioc_grant(struct bufshare_file *file, struct bufshare_grant *arg)
{
	struct bufshare_loan *loan;
	int ret;

	if (arg->flags & ~(BUFSHARE_GRANT_F_ONCE | BUFSHARE_GRANT_F_FORCE) || arg->reserved ||
	    arg->access & ~(BUFSHARE_ACCESS_READ | BUFSHARE_ACCESS_WRITE))
		return -EINVAL;
	ret = bufshare_enter_loan(file, arg->handle, &loan);
	if (ret)
		return ret;
	ret = bufshare_req_grant(file->bs, arg);
	bufshare_leave_loan(file, loan);
	return ret;
}

/* Before the content is declared complete, the devices of this guest must have completed it. */
static int bufshare_sync_fences(struct bufshare_file *file, const struct bufshare_sync *arg,
				struct dma_resv *resv)
{
	u64 max_ns = (u64)file->bs->config.max_wait_ms * NSEC_PER_MSEC;
	unsigned long timeout;
	int ret;

	timeout = nsecs_to_jiffies(arg->timeout_ns ? min(arg->timeout_ns, max_ns) : max_ns);
	if (arg->flags & BUFSHARE_SYNC_F_NONBLOCK)
		timeout = 0;
	ret = bufshare_memory_finish(resv, !(arg->flags & BUFSHARE_SYNC_F_READ), timeout);
	if (ret == -ETIMEDOUT && !timeout)
		ret = -EAGAIN;
	return ret;
}

/* The dma-buf behind an export of a file, or its attachment. */
static int bufshare_sync_find(struct bufshare_file *file, u64 handle, struct dma_buf **dmabuf,
			      struct bufshare_import **import)
{
	struct bufshare_loan *loan;
	int ret;

	/* Inside, so that a session that ends is not taken for a handle that is unknown. */
	ret = bufshare_enter(file->bs, file->session);
	if (ret)
		return ret;
	loan = bufshare_loan_find(file, handle, dmabuf);
	if (!loan) {
		*import = bufshare_import_find(file, handle);
		if (!*import)
			ret = -ENOENT;
	}
	bufshare_loan_put(loan);
	bufshare_leave(file->bs);
	return ret;
}

static int bufshare_ioc_sync(struct bufshare_file *file, struct bufshare_sync *arg, bool nonblock)
{
	const u32 access = BUFSHARE_SYNC_F_READ | BUFSHARE_SYNC_F_WRITE;
	struct bufshare_import *import = NULL;
	struct dma_buf *dmabuf = NULL;
	struct bufshare_loan *loan;
	int ret;

	if (arg->flags & ~(BUFSHARE_SYNC_F_END | BUFSHARE_SYNC_F_NONBLOCK | access) ||
	    !(arg->flags & access) || arg->reserved)
		return -EINVAL;
	if (nonblock)
		arg->flags |= BUFSHARE_SYNC_F_NONBLOCK;
	ret = bufshare_sync_find(file, arg->handle, &dmabuf, &import);
	if (ret)
		return ret;
	/* Outside bufshare_enter(): a removal need not wait for these devices. */
	if (arg->flags & BUFSHARE_SYNC_F_END)
		ret = bufshare_sync_fences(file, arg, import ? &import->resv : dmabuf->resv);
	if (ret)
		goto put;
	if (import) {
		ret = bufshare_import_sync(import, arg, true);
		goto put;
	}
	ret = bufshare_enter_loan(file, arg->handle, &loan);
	if (ret)
		goto put;
	ret = bufshare_req_sync(file->bs, arg);
	bufshare_leave_loan(file, loan);
put:
	bufshare_import_put(import);
	if (dmabuf)
		dma_buf_put(dmabuf);
	return ret;
}

static int bufshare_ioc_set_name(struct bufshare_file *file, struct bufshare_name *arg)
{
	struct bufshare_loan *loan;
	int ret;

	ret = bufshare_enter_loan(file, arg->handle, &loan);
	if (ret)
		return ret;
	ret = bufshare_req_set_name(file->bs, arg);
	bufshare_leave_loan(file, loan);
	return ret;
}

static int bufshare_ioc_query(struct bufshare_file *file, struct bufshare_query *arg)
{
	struct virtio_bufshare_resp_state resp;
	struct bufshare_import *import = NULL;
	struct bufshare_loan *loan;
	int ret;

	if (arg->reserved)
		return -EINVAL;
	ret = bufshare_enter(file->bs, file->session);
	if (ret)
		return ret;
	loan = bufshare_loan_find(file, arg->handle, NULL);
	if (!loan)
		import = bufshare_import_find(file, arg->handle);
	if (!loan && !import) {
		ret = -ENOENT;
		goto leave;
	}
	ret = bufshare_req_query(file->bs, VIRTIO_BUFSHARE_QUERY, arg->handle, &resp);
	if (!ret) {
		arg->state = le32_to_cpu(resp.state);
		arg->use_count = le32_to_cpu(resp.use_count);
		arg->nr_mappings = le32_to_cpu(resp.nr_mappings);
		arg->access = le32_to_cpu(resp.access);
		arg->size = le64_to_cpu(resp.size);
		arg->generation = le64_to_cpu(resp.generation);
		memcpy(arg->uuid, resp.uuid, sizeof(arg->uuid));
		arg->mode = loan ? loan->mode : import->mode;
	}
	bufshare_import_put(import);
	bufshare_loan_put(loan);
leave:
	bufshare_leave(file->bs);
	return ret;
}

static int bufshare_ioc_release(struct bufshare_file *file, struct bufshare_release *arg)
{
	struct bufshare_loan *loan;
	int ret;

	if (arg->flags & ~BUFSHARE_RELEASE_F_FORCE)
		return -EINVAL;
	ret = bufshare_enter_loan(file, arg->handle, &loan);
	if (ret)
		return ret;
	ret = bufshare_loan_release(loan, arg->flags & BUFSHARE_RELEASE_F_FORCE ?
				    VIRTIO_BUFSHARE_RELEASE_F_FORCE : 0, &arg->state);
	bufshare_leave_loan(file, loan);
	return ret;
}

static int bufshare_ioc_peer(struct bufshare_file *file, struct bufshare_peer *arg)
{
	int ret;

	if (arg->reserved)
		return -EINVAL;
	ret = bufshare_enter(file->bs, file->session);
	if (ret)
		return ret;
	ret = bufshare_req_peer(file->bs, arg);
	bufshare_leave(file->bs);
	return ret;
}

static long bufshare_ioctl(struct file *filp, unsigned int cmd, unsigned long address)
{
	struct bufshare_file *file = filp->private_data;
	void __user *user = (void __user *)address;
	union bufshare_arg arg;
	int ret;

	if (_IOC_TYPE(cmd) != BUFSHARE_IOC_MAGIC || _IOC_SIZE(cmd) > sizeof(arg))
		return -ENOTTY;
	memset(&arg, 0, sizeof(arg));
	if (_IOC_DIR(cmd) & _IOC_WRITE && copy_from_user(&arg, user, _IOC_SIZE(cmd)))
		return -EFAULT;

	switch (cmd) {
	case BUFSHARE_IOC_INFO:
		ret = bufshare_ioc_info(file, &arg.info);
		break;
	case BUFSHARE_IOC_ALLOC:
		return bufshare_ioc_alloc(file, user, &arg.alloc);
	case BUFSHARE_IOC_EXPORT:
		ret = bufshare_ioc_export(file, &arg.export);
		break;
	case BUFSHARE_IOC_GRANT:
		ret = bufshare_ioc_grant(file, &arg.grant);
		break;
	case BUFSHARE_IOC_SYNC:
		ret = bufshare_ioc_sync(file, &arg.sync, filp->f_flags & O_NONBLOCK);
		break;
	case BUFSHARE_IOC_SET_NAME:
		ret = bufshare_ioc_set_name(file, &arg.name);
		break;
	case BUFSHARE_IOC_QUERY:
		ret = bufshare_ioc_query(file, &arg.query);
		break;
	case BUFSHARE_IOC_RELEASE:
		ret = bufshare_ioc_release(file, &arg.release);
		break;
	case BUFSHARE_IOC_PEER:
		ret = bufshare_ioc_peer(file, &arg.peer);
		break;
	case BUFSHARE_IOC_ATTACH:
		return bufshare_ioc_attach(file, user, &arg.attach);
	case BUFSHARE_IOC_OFFER:
		ret = bufshare_ioc_offer(file, &arg.offer);
		break;
	case BUFSHARE_IOC_POINT_SIGNAL:
		ret = bufshare_ioc_point_signal(file, &arg.signal);
		break;
	case BUFSHARE_IOC_POINT_WAIT:
		ret = bufshare_ioc_point_wait(file, &arg.wait, filp->f_flags & O_NONBLOCK);
		break;
	case BUFSHARE_IOC_POINT_EVENTFD:
		ret = bufshare_ioc_point_eventfd(file, &arg.eventfd);
		break;
	default:
		return -ENOTTY;
	}
	if (!ret && _IOC_DIR(cmd) & _IOC_READ && copy_to_user(user, &arg, _IOC_SIZE(cmd)))
		ret = -EFAULT;
	return ret;
}

static ssize_t bufshare_read(struct file *filp, char __user *buf, size_t len, loff_t *pos)
{
	struct bufshare_file *file = filp->private_data;
	struct bufshare_event event;
	ssize_t done = 0;
	int ret;

	if (len < sizeof(event))
		return -EINVAL;
	for (;;) {
		while (len - done >= sizeof(event) && bufshare_file_next(file, &event)) {
			if (copy_to_user(buf + done, &event, sizeof(event)))
				return done ?: -EFAULT;
			done += sizeof(event);
		}
		if (done)
			return done;
		ret = bufshare_file_error(file);
		if (ret)
			return ret;
		if (filp->f_flags & O_NONBLOCK)
			return -EAGAIN;
		ret = wait_event_interruptible(file->wait, bufshare_file_readable(file) ||
					       bufshare_file_error(file));
		if (ret)
			return ret;
	}
}

static __poll_t bufshare_poll(struct file *filp, poll_table *wait)
{
	struct bufshare_file *file = filp->private_data;
	__poll_t mask = 0;

	poll_wait(filp, &file->wait, wait);
	if (bufshare_file_readable(file))
		mask |= EPOLLIN | EPOLLRDNORM;
	if (bufshare_file_error(file))
		mask |= EPOLLERR | EPOLLHUP;
	return mask;
}

static int bufshare_open(struct inode *inode, struct file *filp)
{
	struct bufshare *bs = container_of(inode->i_cdev, struct bufshare, cdev);
	struct bufshare_file *file;

	file = kzalloc_obj(*file, GFP_KERNEL_ACCOUNT);
	if (!file)
		return -ENOMEM;
	file->bs = bs;
	file->session = READ_ONCE(bs->session);
	if (!file->session) {
		kfree(file);
		return -ENODEV;
	}
	INIT_LIST_HEAD(&file->loans);
	INIT_LIST_HEAD(&file->imports);
	INIT_LIST_HEAD(&file->watches);
	INIT_LIST_HEAD(&file->news);
	init_waitqueue_head(&file->wait);
	bufshare_file_add(file);
	filp->private_data = file;
	return stream_open(inode, filp);
}

static int bufshare_close(struct inode *inode, struct file *filp)
{
	struct bufshare_file *file = filp->private_data;

	bufshare_file_close(file);
	kfree(file);
	return 0;
}

static const struct file_operations bufshare_fops = {
	.owner = THIS_MODULE,
	.open = bufshare_open,
	.release = bufshare_close,
	.read = bufshare_read,
	.poll = bufshare_poll,
	.unlocked_ioctl = bufshare_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
};

static void bufshare_dev_release(struct device *dev)
{
	kfree(container_of(dev, struct bufshare, dev));
}

/**
 * bufshare_chardev_new() - allocate a device, to be freed by put_device()
 * @parent: the virtio device
 *
 * Return: a device of which only @dev, @users and its lists are initialized, or an error.
 */
struct bufshare *bufshare_chardev_new(struct device *parent)
{
	struct bufshare *bs = kzalloc_obj(*bs);

	if (!bs)
		return ERR_PTR(-ENOMEM);
	INIT_LIST_HEAD(&bs->files);
	INIT_LIST_HEAD(&bs->imports);
	INIT_LIST_HEAD(&bs->kept);
	xa_init_flags(&bs->offers, XA_FLAGS_ALLOC1);
	init_rwsem(&bs->users);
	device_initialize(&bs->dev);
	bs->dev.class = &bufshare_class;
	bs->dev.parent = parent;
	bs->dev.release = bufshare_dev_release;
	return bs;
}

/**
 * bufshare_chardev_add() - make /dev/bufshareN
 * @bs: the device, ready to be used
 *
 * Return: 0 or a negative error.
 */
int bufshare_chardev_add(struct bufshare *bs)
{
	int minor = ida_alloc_max(&bufshare_minors, BUFSHARE_MINORS - 1, GFP_KERNEL);
	int ret;

	if (minor < 0)
		return minor;
	bs->dev.devt = MKDEV(MAJOR(bufshare_devt), minor);
	cdev_init(&bs->cdev, &bufshare_fops);
	bs->cdev.owner = THIS_MODULE;
	ret = dev_set_name(&bs->dev, "bufshare%d", minor);
	if (!ret)
		ret = cdev_device_add(&bs->cdev, &bs->dev);
	if (ret)
		ida_free(&bufshare_minors, minor);
	return ret;
}

/**
 * bufshare_chardev_del() - no new opens; open files stay
 * @bs: the device
 */
void bufshare_chardev_del(struct bufshare *bs)
{
	cdev_device_del(&bs->cdev, &bs->dev);
	/* The next device may have the number while the quarantine still knows this one. */
	ida_free(&bufshare_minors, MINOR(bs->dev.devt));
}

/**
 * bufshare_chardev_init() - what all devices share
 *
 * Return: 0 or a negative error.
 */
int bufshare_chardev_init(void)
{
	int ret = class_register(&bufshare_class);

	if (ret)
		return ret;
	ret = alloc_chrdev_region(&bufshare_devt, 0, BUFSHARE_MINORS, "bufshare");
	if (ret)
		class_unregister(&bufshare_class);
	return ret;
}

/**
 * bufshare_chardev_exit() - undo bufshare_chardev_init()
 */
void bufshare_chardev_exit(void)
{
	unregister_chrdev_region(bufshare_devt, BUFSHARE_MINORS);
	class_unregister(&bufshare_class);
	ida_destroy(&bufshare_minors);
}
