// SPDX-License-Identifier: GPL-2.0
/*
 * virtio_bufshare: the window, a shared memory region of the device. Says who has which part of it;
 * knows nothing of what is shown there.
 */
#include <linux/align.h>
#include <linux/bitmap.h>
#include <linux/mm.h>
#include <linux/virtio_config.h>

#include "virtio_bufshare.h"

/**
 * bufshare_window_find() - where the device has its window
 * @vdev: the virtio device
 * @region: out
 *
 * Return: true if there is one that can be used.
 */
bool bufshare_window_find(struct virtio_device *vdev, struct virtio_shm_region *region)
{
	return virtio_get_shm_region(vdev, region, VIRTIO_BUFSHARE_SHM_WINDOW) &&
	       region->len >= PAGE_SIZE && PAGE_ALIGNED(region->addr);
}

/**
 * bufshare_window_init() - start with an empty window
 * @window: without memory of its own
 * @vdev: the virtio device
 * @granule: of the device
 *
 * Return: 0 or a negative error.
 */
int bufshare_window_init(struct bufshare_window *window, struct virtio_device *vdev, u32 granule)
{
	struct virtio_shm_region region;

	if (!bufshare_window_find(vdev, &region))
		return -ENODEV;
	mutex_init(&window->lock);
	window->start = region.addr;
	window->granule = max_t(u32, granule, PAGE_SIZE);
	window->count = region.len / window->granule;
	window->len = (u64)window->count * window->granule;
	window->used = kvcalloc(BITS_TO_LONGS(window->count), sizeof(long), GFP_KERNEL);
	return window->used ? 0 : -ENOMEM;
}

/**
 * bufshare_window_exit() - forget the window
 * @window: the window; may never have been there
 */
void bufshare_window_exit(struct bufshare_window *window)
{
	kvfree(window->used);
	window->used = NULL;
	window->len = 0;
}

/**
 * bufshare_window_take() - a place in the window
 * @window: the window
 * @size: bytes
 * @offset: out: bytes from its start
 *
 * Return: 0, or -ENOSPC.
 */
int bufshare_window_take(struct bufshare_window *window, u64 size, u64 *offset)
{
	unsigned long count, at;

	if (!window->used || size > window->len)
		return -ENOSPC;
	count = DIV_ROUND_UP_ULL(size, window->granule);
	mutex_lock(&window->lock);
	at = bitmap_find_next_zero_area(window->used, window->count, 0, count, 0);
	if (at < window->count)
		bitmap_set(window->used, at, count);
	mutex_unlock(&window->lock);
	if (at >= window->count)
		return -ENOSPC;
	*offset = (u64)at * window->granule;
	return 0;
}

/**
 * bufshare_window_give() - give a place back
 * @window: the window
 * @offset: from bufshare_window_take()
 * @size: bytes
 */
void bufshare_window_give(struct bufshare_window *window, u64 offset, u64 size)
{
	unsigned long at = div_u64(offset, window->granule);
	unsigned long end = at + DIV_ROUND_UP_ULL(size, window->granule);

	mutex_lock(&window->lock);
	/* A place that is given twice may be another's by then. */
	WARN_ON_ONCE(find_next_zero_bit(window->used, end, at) < end);
	bitmap_clear(window->used, at, end - at);
	mutex_unlock(&window->lock);
}
