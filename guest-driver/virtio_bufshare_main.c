// SPDX-License-Identifier: GPL-2.0
/*
 * virtio_bufshare: guest driver of the buffer sharing device (virtio ID 37).
 *
 * Shares dma-bufs of this guest with the host and other virtual machines through /dev/bufshareN
 * (see <linux/bufshare.h>). Build: make KDIR=/lib/modules/VERSION/build, for Linux 6.12 and 7.2.
 *
 * Not supported: packed rings and VIRTIO_F_ACCESS_PLATFORM (the device does not offer them),
 * timelines, and migration or hibernation while a buffer is live:
 * suspending ends the session and voids all rights to its exports.
 *
 * This file: sessions (from a reset to the next), events, and what the bus asks for.
 */
#include <linux/dma-mapping.h>
#include <linux/log2.h>
#include <linux/module.h>
#include <linux/reboot.h>
#include <linux/scatterlist.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/version.h>
#include <linux/virtio_config.h>

#include "virtio_bufshare.h"

#define BUFSHARE_MAX_EVENT_BUFS 64

struct workqueue_struct *bufshare_wq;

/* Memory of other drivers may come in pieces of any size. Static: attachments may outlive us. */
static struct device_dma_parameters bufshare_dma_parms = {
	.max_segment_size = UINT_MAX,
	.segment_boundary_mask = ULONG_MAX,
};

/**
 * bufshare_enter() - start to use the device
 * @bs: the device
 * @session: the caller's session
 *
 * Context: Process context. Undo with bufshare_leave().
 * Return: 0, -ENODEV if that session is over, -EIO if the device is dead.
 */
int bufshare_enter(struct bufshare *bs, u32 session)
{
	int ret = 0;

	down_read(&bs->users);
	if (!session || bs->session != session || READ_ONCE(bs->closing))
		ret = -ENODEV;
	else if (READ_ONCE(bs->dead))
		ret = -EIO;
	if (ret)
		up_read(&bs->users);
	return ret;
}

/**
 * bufshare_leave() - stop to use the device
 * @bs: the device
 */
void bufshare_leave(struct bufshare *bs)
{
	up_read(&bs->users);
}

static void bufshare_read_config(struct bufshare *bs)
{
	struct virtio_device *vdev = bs->vdev;
	struct bufshare_config *c = &bs->config;

	virtio_cread_le(vdev, struct virtio_bufshare_config, peer_id, &c->peer_id);
	virtio_cread_le(vdev, struct virtio_bufshare_config, granule, &c->granule);
	virtio_cread_le(vdev, struct virtio_bufshare_config, max_segments, &c->max_segments);
	virtio_cread_le(vdev, struct virtio_bufshare_config, max_buffer_size, &c->max_buffer_size);
	virtio_cread_le(vdev, struct virtio_bufshare_config, max_total_size, &c->max_total_size);
	virtio_cread_le(vdev, struct virtio_bufshare_config, max_exports, &c->max_exports);
	virtio_cread_le(vdev, struct virtio_bufshare_config, max_attachments, &c->max_attachments);
	virtio_cread_le(vdev, struct virtio_bufshare_config, max_metadata, &c->max_metadata);
	virtio_cread_le(vdev, struct virtio_bufshare_config, event_size, &c->event_size);
	virtio_cread_le(vdev, struct virtio_bufshare_config, max_wait_ms, &c->max_wait_ms);
	virtio_cread_le(vdev, struct virtio_bufshare_config, max_waits, &c->max_waits);
}

/* What may change while a session lasts. Returns whether nothing of earlier sessions lingers. */
static bool bufshare_read_state(struct bufshare *bs)
{
	u32 epoch, lingering, max_mappings;

	virtio_cread_le(bs->vdev, struct virtio_bufshare_config, epoch, &epoch);
	virtio_cread_le(bs->vdev, struct virtio_bufshare_config, lingering, &lingering);
	virtio_cread_le(bs->vdev, struct virtio_bufshare_config, max_mappings, &max_mappings);
	WRITE_ONCE(bs->config.epoch, epoch);
	WRITE_ONCE(bs->config.max_mappings, max_mappings);
	WRITE_ONCE(bs->config.lingering, lingering);
	return !lingering;
}

static int bufshare_check_config(struct bufshare *bs)
{
	const struct bufshare_config *c = &bs->config;

	if (is_power_of_2(c->granule) && c->granule >= SZ_4K && c->max_segments &&
	    c->max_metadata <= BUFSHARE_MAX_METADATA && c->event_size >= sizeof(struct virtio_bufshare_event) &&
	    c->event_size <= SZ_4K)
		return 0;
	dev_err(&bs->vdev->dev,
		"bad configuration: granule %u, max_segments %u, max_metadata %u, event_size %u\n",
		c->granule, c->max_segments, c->max_metadata, c->event_size);
	return -EINVAL;
}

/* ---- events ---- */

static int bufshare_event_feed(struct bufshare *bs, void *buf)
{
	struct scatterlist sg;

	sg_init_one(&sg, buf, bs->config.event_size);
	return virtqueue_add_inbuf(bs->event.vq, &sg, 1, buf, GFP_ATOMIC);
}

/* Takes the next event, and gives its buffer back to the device. False: there is none. */
static bool bufshare_event_take(struct bufshare *bs, struct virtio_bufshare_event *event, u32 *len)
{
	struct virtqueue *vq = bs->event.vq;
	bool kick = false;
	void *buf;

	spin_lock_irq(&bs->event.lock);
	do {
		virtqueue_disable_cb(vq);
		buf = virtqueue_get_buf(vq, len);
	} while (!buf && !virtqueue_is_broken(vq) && !virtqueue_enable_cb(vq));
	if (buf) {
		memcpy(event, buf, sizeof(*event));
		if (!bufshare_event_feed(bs, buf))
			kick = virtqueue_kick_prepare(vq);
	}
	spin_unlock_irq(&bs->event.lock);
	if (kick)
		virtqueue_notify(vq);
	return buf;
}

static void bufshare_event_work(struct work_struct *work)
{
	struct bufshare *bs = container_of(work, struct bufshare, event_work);
	unsigned int budget = 2 * BUFSHARE_MAX_EVENT_BUFS;
	struct virtio_bufshare_event wire;
	bool resync = false;
	u32 len;

	if (!READ_ONCE(bs->session))
		return;
	mutex_lock(&bs->export_lock);
	while (budget && bufshare_event_take(bs, &wire, &len)) {
		struct bufshare_event event;

		budget--;
		if (len < sizeof(wire))
			continue;
		event = (struct bufshare_event) {
			.type = le16_to_cpu(wire.type),
			.flags = le16_to_cpu(wire.flags),
			.status = le32_to_cpu(wire.status),
			.handle = le64_to_cpu(wire.handle),
			.peer_id = le32_to_cpu(wire.peer_id),
			.access = le32_to_cpu(wire.access),
			.size = le64_to_cpu(wire.size),
			.generation = le64_to_cpu(wire.generation),
			.metadata_type = le32_to_cpu(wire.metadata_type),
			.epoch = le32_to_cpu(wire.epoch),
		};
		memcpy(event.uuid, wire.uuid, sizeof(event.uuid));
		if (event.type == BUFSHARE_EVENT_RESYNC) {
			resync = true;
			if (bufshare_read_state(bs))
				bufshare_loans_settle(bs);
			bufshare_offers_forget(bs);
		}
		if (event.type == BUFSHARE_EVENT_OFFERED || event.type == BUFSHARE_EVENT_WITHDRAWN)
			bufshare_offers_event(bs, &event);
		bufshare_loans_event(bs, &event);
	}
	mutex_unlock(&bs->export_lock);
	if (resync)
		bufshare_loans_query(bs);
	/* Others wait for the lock, and for the end of this work: a device that babbles or not. */
	if (!budget)
		queue_work(bufshare_wq, work);
}

static void bufshare_control_done(struct virtqueue *vq)
{
	struct bufshare *bs = vq->vdev->priv;

	bufshare_queue_done(&bs->control);
}

static void bufshare_sync_done(struct virtqueue *vq)
{
	struct bufshare *bs = vq->vdev->priv;

	bufshare_queue_done(&bs->sync);
}

static void bufshare_event_done(struct virtqueue *vq)
{
	struct bufshare *bs = vq->vdev->priv;

	queue_work(bufshare_wq, &bs->event_work);
}

/* ---- sessions ---- */

static void bufshare_free_event_bufs(struct bufshare *bs)
{
	while (bs->nr_event_bufs)
		kfree(bs->event_bufs[--bs->nr_event_bufs]);
	kfree(bs->event_bufs);
	bs->event_bufs = NULL;
}

static int bufshare_fill_events(struct bufshare *bs)
{
	unsigned int max = min(virtqueue_get_vring_size(bs->event.vq), BUFSHARE_MAX_EVENT_BUFS);
	void *buf;
	int ret;

	bs->event_bufs = kcalloc(max, sizeof(*bs->event_bufs), GFP_KERNEL);
	if (!bs->event_bufs)
		return -ENOMEM;
	while (bs->nr_event_bufs < max) {
		buf = kzalloc(bs->config.event_size, GFP_KERNEL);
		if (!buf)
			return -ENOMEM;
		bs->event_bufs[bs->nr_event_bufs++] = buf;
		ret = bufshare_event_feed(bs, buf);
		if (ret)
			return ret;
	}
	return 0;
}

/* Users are locked out. The device may still write to everything until it is reset. */
static void bufshare_stop_queues(struct bufshare *bs)
{
	virtio_reset_device(bs->vdev);
	cancel_work_sync(&bs->event_work);
	bufshare_queue_empty(&bs->control);
	bufshare_queue_empty(&bs->sync);
	bs->vdev->config->del_vqs(bs->vdev);
	bufshare_free_event_bufs(bs);
	bufshare_imports_forget(bs);
	bufshare_offers_forget(bs);
	bufshare_window_exit(&bs->window);
}

/**
 * bufshare_session_start() - make a device that was just reset work
 * @bs: the device
 *
 * Context: Process context; probe or restore.
 * Return: 0 or a negative error.
 */
static int bufshare_session_start(struct bufshare *bs)
{
	static atomic_t last_session;
	struct virtqueue_info infos[] = {
		{ "control", bufshare_control_done },
		{ "event", bufshare_event_done },
		{ "sync", bufshare_sync_done },
	};
	struct virtqueue *vqs[ARRAY_SIZE(infos)];
	struct virtio_bufshare_resp_state resp;
	u32 session;
	int ret;

	bufshare_read_config(bs);
	ret = bufshare_check_config(bs);
	if (ret)
		return ret;
	if (virtio_has_feature(bs->vdev, VIRTIO_BUFSHARE_F_WINDOW)) {
		ret = bufshare_window_init(&bs->window, bs->vdev, bs->config.granule);
		if (ret)
			return ret;
	}
	ret = virtio_find_vqs(bs->vdev, ARRAY_SIZE(vqs), vqs, infos, NULL);
	if (ret) {
		bufshare_window_exit(&bs->window);
		return ret;
	}
	bs->control.vq = vqs[VIRTIO_BUFSHARE_VQ_CONTROL];
	bs->event.vq = vqs[VIRTIO_BUFSHARE_VQ_EVENT];
	bs->sync.vq = vqs[VIRTIO_BUFSHARE_VQ_SYNC];
	bs->features = bs->vdev->features;

	down_write(&bs->users);
	bs->dead = false;
	bs->closing = false;
	ret = bufshare_fill_events(bs);
	if (ret)
		goto stop;
	virtio_device_ready(bs->vdev);
	virtqueue_kick(bs->event.vq);

	do {
		session = atomic_inc_return(&last_session);
	} while (!session);
	WRITE_ONCE(bs->session, session);
	/*
	 * Not before it answered a request has the device certainly seen the reset: what lingers
	 * is worth nothing before that. The answer itself does not matter.
	 */
	ret = bufshare_req_query(bs, VIRTIO_BUFSHARE_QUERY_LINGER, 0, &resp);
	if (ret == -EIO || ret == -ENOMEM)
		goto stop;
	if (bufshare_read_state(bs))
		bufshare_loans_settle(bs);
	up_write(&bs->users);
	/* Events may have come before there was a session. */
	queue_work(bufshare_wq, &bs->event_work);
	return 0;

stop:
	WRITE_ONCE(bs->session, 0);
	bufshare_stop_queues(bs);
	up_write(&bs->users);
	return ret;
}

/**
 * bufshare_session_end() - void all rights, reset the device, forget the queues
 * @bs: the device
 *
 * Exports that somebody still holds stay in the quarantine.
 *
 * Context: Process context; remove or freeze.
 */
static void bufshare_session_end(struct bufshare *bs)
{
	WRITE_ONCE(bs->closing, true);
	bufshare_queue_abort(&bs->sync);
	down_write(&bs->users);
	if (bs->session) {
		bufshare_imports_end(bs);
		bufshare_loans_force(bs);
		flush_work(&bs->event_work);
		WRITE_ONCE(bs->session, 0);
		/* What still runs may have asked something: not to be reset under its feet. */
		cancel_work_sync(&bs->event_work);
		bufshare_stop_queues(bs);
	}
	up_write(&bs->users);
	bufshare_files_wake(bs);
}

static int bufshare_reboot(struct notifier_block *nb, unsigned long action, void *unused)
{
	struct bufshare *bs = container_of(nb, struct bufshare, reboot);

	/* What user space still does until the end must not lend out anything again. */
	WRITE_ONCE(bs->closing, true);
	bufshare_queue_abort(&bs->sync);
	down_write(&bs->users);
	if (bs->session) {
		bufshare_imports_end(bs);
		bufshare_loans_force(bs);
	}
	up_write(&bs->users);
	return NOTIFY_DONE;
}

/* ---- the driver ---- */

#define BUFSHARE_VHOST_USER_BIT 30 /* VHOST_USER_F_PROTOCOL_FEATURES */

/*
 * Drops what lacks something that it needs. The transport is then asked to finalize the features once
 * more. virtio_uml has a bit of its own among them, without which it does not tell its back end that
 * queues stop and start: the core has taken it out by then, so it is put back.
 */
static int bufshare_validate(struct virtio_device *vdev)
{
	static const unsigned int importers[] = {
		VIRTIO_BUFSHARE_F_WINDOW, VIRTIO_BUFSHARE_F_COPY,
	};
	struct virtio_shm_region region;
	unsigned int i;

	if (vdev->config->get_features &&
	    vdev->config->get_features(vdev) & BIT_ULL(BUFSHARE_VHOST_USER_BIT))
		__virtio_set_bit(vdev, BUFSHARE_VHOST_USER_BIT);
	if (!bufshare_window_find(vdev, &region))
		__virtio_clear_bit(vdev, VIRTIO_BUFSHARE_F_WINDOW);
	if (virtio_has_feature(vdev, VIRTIO_BUFSHARE_F_IMPORT))
		return 0;
	for (i = 0; i < ARRAY_SIZE(importers); i++)
		__virtio_clear_bit(vdev, importers[i]);
	return 0;
}

static int bufshare_probe(struct virtio_device *vdev)
{
	struct bufshare *bs;
	int ret;

	if (!vdev->config->get) {
		dev_err(&vdev->dev, "no configuration space\n");
		return -EINVAL;
	}
	vdev->dev.dma_parms = &bufshare_dma_parms;
	ret = dma_coerce_mask_and_coherent(&vdev->dev, DMA_BIT_MASK(64));
	if (ret)
		return ret;
	bs = bufshare_chardev_new(&vdev->dev);
	if (IS_ERR(bs))
		return PTR_ERR(bs);
	bs->vdev = vdev;
	strscpy(bs->where, dev_name(vdev->dev.parent));
	bufshare_queue_init(&bs->control);
	bufshare_queue_init(&bs->sync);
	bufshare_queue_init(&bs->event);
	INIT_WORK(&bs->event_work, bufshare_event_work);
	mutex_init(&bs->export_lock);
	bs->reboot.notifier_call = bufshare_reboot;
	vdev->priv = bs;

	ret = bufshare_session_start(bs);
	if (ret)
		goto put;
	ret = bufshare_chardev_add(bs);
	if (ret)
		goto end;
	register_reboot_notifier(&bs->reboot);
	dev_info(&vdev->dev, "%s: peer %u, %u segments, %llu MiB in all\n", dev_name(&bs->dev),
		 bs->config.peer_id, bs->config.max_segments, bs->config.max_total_size >> 20);
	return 0;

end:
	bufshare_session_end(bs);
put:
	vdev->priv = NULL;
	vdev->dev.dma_parms = NULL;
	put_device(&bs->dev);
	return ret;
}

static void bufshare_remove(struct virtio_device *vdev)
{
	struct bufshare *bs = vdev->priv;

	unregister_reboot_notifier(&bs->reboot);
	bufshare_chardev_del(bs);
	bufshare_session_end(bs);
	vdev->priv = NULL;
	vdev->dev.dma_parms = NULL;
	put_device(&bs->dev);
}

static int bufshare_freeze(struct virtio_device *vdev)
{
	bufshare_session_end(vdev->priv);
	return 0;
}

static int bufshare_restore(struct virtio_device *vdev)
{
	return bufshare_session_start(vdev->priv);
}

static const struct virtio_device_id bufshare_ids[] = {
	{ VIRTIO_ID_BUFSHARE, VIRTIO_DEV_ANY_ID },
	{ 0 },
};
MODULE_DEVICE_TABLE(virtio, bufshare_ids);

static const unsigned int bufshare_features[] = {
	VIRTIO_BUFSHARE_F_IMPORT,
	VIRTIO_BUFSHARE_F_WINDOW,
	VIRTIO_BUFSHARE_F_COPY,
	VIRTIO_BUFSHARE_F_TIMELINE,
	VIRTIO_BUFSHARE_F_PEERS,
};

static struct virtio_driver bufshare_driver = {
	.driver.name = KBUILD_MODNAME,
	.id_table = bufshare_ids,
	.feature_table = bufshare_features,
	.feature_table_size = ARRAY_SIZE(bufshare_features),
	.validate = bufshare_validate,
	.probe = bufshare_probe,
	.remove = bufshare_remove,
	.freeze = pm_sleep_ptr(bufshare_freeze),
	.restore = pm_sleep_ptr(bufshare_restore),
};

static int __init bufshare_init(void)
{
	int ret;

	bufshare_wq = alloc_workqueue("bufshare", WQ_UNBOUND, 0);
	if (!bufshare_wq)
		return -ENOMEM;
	ret = bufshare_chardev_init();
	if (ret)
		goto wq;
	bufshare_quarantine_init();
	ret = register_virtio_driver(&bufshare_driver);
	if (ret)
		goto chardev;
	return 0;

chardev:
	bufshare_quarantine_exit();
	bufshare_chardev_exit();
wq:
	destroy_workqueue(bufshare_wq);
	return ret;
}

static void __exit bufshare_exit(void)
{
	unregister_virtio_driver(&bufshare_driver);
	/* Drains what ended the last loans: it runs code of this module. */
	destroy_workqueue(bufshare_wq);
	bufshare_quarantine_exit();
	bufshare_chardev_exit();
}

module_init(bufshare_init);
module_exit(bufshare_exit);

MODULE_DESCRIPTION("Buffer sharing device (virtio)");
MODULE_AUTHOR("The vhost-device-bufshare authors");
MODULE_LICENSE("GPL");
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 13, 0)
MODULE_IMPORT_NS("DMA_BUF");
#else
MODULE_IMPORT_NS(DMA_BUF);
#endif
