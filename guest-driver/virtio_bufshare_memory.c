// SPDX-License-Identifier: GPL-2.0
/*
 * virtio_bufshare: the memory behind an export. Two legal paths only: the pages of a dma-buf that
 * this module allocated, and a dma-buf of another driver, attached dynamically and pinned for the
 * whole loan, of which only DMA addresses are used. The virtio device translates nothing, so these
 * are guest-physical addresses.
 */
#include <linux/dma-buf.h>
#include <linux/dma-mapping.h>
#include <linux/dma-resv.h>
#include <linux/kref.h>
#include <linux/scatterlist.h>
#include <linux/slab.h>
#include <linux/swiotlb.h>
#include <linux/version.h>

#include "virtio_bufshare.h"

/**
 * struct bufshare_memory - memory of one export and of the parts of it
 * @ref: one per loan
 * @dmabuf: counted
 * @attach: attachment to a foreign dma-buf; NULL: it is ours
 * @sgt: DMA addresses if @attach, else pages
 * @dev: the virtio device while attached; counted, the attachment may outlive its driver
 * @revoked: the foreign exporter took it away
 */
struct bufshare_memory {
	struct kref ref;
	struct dma_buf *dmabuf;
	struct dma_buf_attachment *attach;
	struct sg_table *sgt;
	struct device *dev;
	bool revoked;
};

/* The exporter's resv lock is held. */
static void bufshare_invalidate(struct dma_buf_attachment *attach)
{
	struct bufshare_memory *memory = attach->importer_priv;

	WRITE_ONCE(memory->revoked, true);
	bufshare_loans_revoke();
}

#if LINUX_VERSION_CODE < KERNEL_VERSION(7, 0, 0)
#define invalidate_mappings move_notify
#endif

/* Others are to move their memory to where a device of this guest can reach it. */
static const struct dma_buf_attach_ops bufshare_attach_ops = {
	.allow_peer2peer = false,
	.invalidate_mappings = bufshare_invalidate,
};

/* An import in the window cannot move: let the device say that it is not to be shared. */
static const struct dma_buf_attach_ops bufshare_reattach_ops = {
	.allow_peer2peer = true,
	.invalidate_mappings = bufshare_invalidate,
};

static int bufshare_memory_attach(struct bufshare_memory *memory, struct device *dev)
{
	struct dma_buf *dmabuf = memory->dmabuf;
	struct dma_buf_attachment *attach;
	struct sg_table *sgt;
	long ret;

	/* A bounce buffer is not the exporter's memory. */
	if (is_swiotlb_force_bounce(dev))
		return -EOPNOTSUPP;
	attach = dma_buf_dynamic_attach(dmabuf, dev, bufshare_view_is(dmabuf) ?
					&bufshare_reattach_ops : &bufshare_attach_ops, memory);
	if (IS_ERR(attach))
		return PTR_ERR(attach);

	ret = dma_resv_lock_interruptible(dmabuf->resv, NULL);
	if (ret)
		goto detach;
	ret = dma_buf_pin(attach);
	if (ret) {
		if (ret != -EINTR && ret != -ERESTARTSYS && ret != -ENOMEM)
			ret = -EOPNOTSUPP;
		goto unlock;
	}
	sgt = dma_buf_map_attachment(attach, DMA_BIDIRECTIONAL);
	if (IS_ERR(sgt)) {
		ret = PTR_ERR(sgt);
		goto unpin;
	}
	/* A move that is under way must have finished before the addresses mean anything. */
	ret = dma_resv_wait_timeout(dmabuf->resv, DMA_RESV_USAGE_KERNEL, true,
				    MAX_SCHEDULE_TIMEOUT);
	if (ret < 0)
		goto unmap;
	dma_resv_unlock(dmabuf->resv);

	memory->attach = attach;
	memory->sgt = sgt;
	memory->dev = get_device(dev);
	return 0;

unmap:
	dma_buf_unmap_attachment(attach, sgt, DMA_BIDIRECTIONAL);
unpin:
	dma_buf_unpin(attach);
unlock:
	dma_resv_unlock(dmabuf->resv);
detach:
	dma_buf_detach(dmabuf, attach);
	return ret;
}

/**
 * bufshare_memory_new() - the memory of a dma-buf
 * @dev: the virtio device
 * @dmabuf: ours or a foreign one; a reference of its own is taken
 *
 * Context: Process context; waits for the exporter.
 * Return: the memory, -EOPNOTSUPP if the exporter cannot pin it, -ERESTARTSYS or -EINTR after a
 * signal, or another error.
 */
struct bufshare_memory *bufshare_memory_new(struct device *dev, struct dma_buf *dmabuf)
{
	struct bufshare_memory *memory = kzalloc_obj(*memory, GFP_KERNEL_ACCOUNT);
	int ret = 0;

	if (!memory)
		return ERR_PTR(-ENOMEM);
	kref_init(&memory->ref);
	memory->dmabuf = dmabuf;
	memory->sgt = bufshare_buffer_pages(dmabuf);
	if (!memory->sgt)
		ret = bufshare_memory_attach(memory, dev);
	if (ret) {
		kfree(memory);
		return ERR_PTR(ret);
	}
	get_dma_buf(dmabuf);
	return memory;
}

static void bufshare_memory_free(struct kref *ref)
{
	struct bufshare_memory *memory = container_of(ref, struct bufshare_memory, ref);

	if (memory->attach) {
		dma_resv_lock(memory->dmabuf->resv, NULL);
		dma_buf_unmap_attachment(memory->attach, memory->sgt, DMA_BIDIRECTIONAL);
		dma_buf_unpin(memory->attach);
		dma_resv_unlock(memory->dmabuf->resv);
		dma_buf_detach(memory->dmabuf, memory->attach);
		put_device(memory->dev);
	}
	dma_buf_put(memory->dmabuf);
	kfree(memory);
}

/**
 * bufshare_memory_share() - one more loan of the same memory: a part of a pool
 * @memory: the pool's
 *
 * Return: @memory.
 */
struct bufshare_memory *bufshare_memory_share(struct bufshare_memory *memory)
{
	kref_get(&memory->ref);
	return memory;
}

/**
 * bufshare_memory_put() - a loan of the memory is over
 * @memory: the memory, or NULL
 *
 * Context: Process context.
 */
void bufshare_memory_put(struct bufshare_memory *memory)
{
	if (memory)
		kref_put(&memory->ref, bufshare_memory_free);
}

/**
 * bufshare_memory_dmabuf() - whose memory it is
 * @memory: the memory
 *
 * Return: the dma-buf, not counted.
 */
struct dma_buf *bufshare_memory_dmabuf(struct bufshare_memory *memory)
{
	return memory->dmabuf;
}

/**
 * bufshare_memory_revoked() - whether its exporter took it away
 * @memory: the memory, or NULL
 *
 * Return: true if it did.
 */
bool bufshare_memory_revoked(const struct bufshare_memory *memory)
{
	return memory && READ_ONCE(memory->revoked);
}

/* Appends a range, or lengthens the last segment. @count segments end at @end so far. */
static int bufshare_segment(struct virtio_bufshare_segment *out, u32 max, u32 granule, u32 *count,
			    u64 *end, u64 addr, u64 len)
{
	if (!IS_ALIGNED(addr | len, granule) || !len || addr + len < addr)
		return -EINVAL;
	if (!*count || addr != *end) {
		if (*count == max)
			return -E2BIG;
		if (out) {
			out[*count].addr = cpu_to_le64(addr);
			out[*count].len = 0;
		}
		++*count;
	}
	if (out)
		le64_add_cpu(&out[*count - 1].len, len);
	*end = addr + len;
	return 0;
}

/**
 * bufshare_segments() - memory as the device wants to hear it
 * @sgt: the memory
 * @dma: whether @sgt holds DMA addresses, else pages
 * @size: bytes
 * @granule: of the device
 * @out: segments, or NULL only to count them
 * @max: how many there may be
 *
 * Return: the number of segments, -E2BIG if there are more than @max, -EINVAL if they are not
 * aligned or do not add up to @size.
 */
int bufshare_segments(struct sg_table *sgt, bool dma, u64 size, u32 granule,
		      struct virtio_bufshare_segment *out, u32 max)
{
	struct scatterlist *sg;
	u64 total = 0, end = 0;
	u32 count = 0;
	int ret = 0;
	int i;

	if (dma) {
		for_each_sgtable_dma_sg(sgt, sg, i) {
			ret = bufshare_segment(out, max, granule, &count, &end,
					       sg_dma_address(sg), sg_dma_len(sg));
			if (ret)
				return ret;
			total += sg_dma_len(sg);
		}
	} else {
		for_each_sgtable_sg(sgt, sg, i) {
			ret = bufshare_segment(out, max, granule, &count, &end,
					       sg_phys(sg), sg->length);
			if (ret)
				return ret;
			total += sg->length;
		}
	}
	return total == size ? count : -EINVAL;
}

/**
 * bufshare_memory_segments() - the memory of an export as the device wants to hear it
 * @memory: the memory
 * @granule: of the device
 * @out: segments, or NULL only to count them
 * @max: how many there may be
 *
 * Return: as bufshare_segments().
 */
int bufshare_memory_segments(const struct bufshare_memory *memory, u32 granule,
			     struct virtio_bufshare_segment *out, u32 max)
{
	return bufshare_segments(memory->sgt, memory->attach, memory->dmabuf->size, granule, out,
				 max);
}

/**
 * bufshare_memory_finish() - wait until the devices of this guest are done with a dma-buf
 * @resv: of the dma-buf
 * @write: only the writers among them
 * @timeout: jiffies
 *
 * Return: 0, -EINTR after a signal, -ETIMEDOUT.
 */
int bufshare_memory_finish(struct dma_resv *resv, bool write, unsigned long timeout)
{
	long ret;

	ret = dma_resv_wait_timeout(resv, write ? DMA_RESV_USAGE_WRITE : DMA_RESV_USAGE_READ, true,
				    timeout);
	if (ret == -ERESTARTSYS)
		return -EINTR;
	if (ret < 0)
		return ret;
	return ret ? 0 : -ETIMEDOUT;
}
