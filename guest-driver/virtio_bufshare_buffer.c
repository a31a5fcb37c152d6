// SPDX-License-Identifier: GPL-2.0
/*
 * virtio_bufshare: dma-bufs that this module allocates, in pieces as large as they come, so that
 * an export needs few segments. Knows nothing of the device.
 */
#include <linux/align.h>
#include <linux/dma-buf.h>
#include <linux/dma-mapping.h>
#include <linux/highmem.h>
#include <linux/iosys-map.h>
#include <linux/list.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/scatterlist.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>

#include "virtio_bufshare.h"

/* As the operations of a dma-buf whose priv is a struct bufshare_buffer, see <linux/dma-buf.h>. */

struct bufshare_attachment {
	struct list_head node;
	struct device *dev;
	struct sg_table sgt;
	bool mapped;
};

int bufshare_buffer_attach(struct dma_buf *dmabuf, struct dma_buf_attachment *attach)
{
	struct bufshare_buffer *buffer = dmabuf->priv;
	struct bufshare_attachment *a;
	struct scatterlist *from, *to;
	int ret, i;

	a = kzalloc_obj(*a);
	if (!a)
		return -ENOMEM;
	ret = sg_alloc_table(&a->sgt, buffer->sgt.orig_nents, GFP_KERNEL);
	if (ret) {
		kfree(a);
		return ret;
	}
	to = a->sgt.sgl;
	for_each_sgtable_sg(&buffer->sgt, from, i) {
		sg_set_page(to, sg_page(from), from->length, 0);
		to = sg_next(to);
	}
	a->dev = attach->dev;
	attach->priv = a;
	mutex_lock(&buffer->lock);
	list_add(&a->node, &buffer->attachments);
	mutex_unlock(&buffer->lock);
	return 0;
}

void bufshare_buffer_detach(struct dma_buf *dmabuf, struct dma_buf_attachment *attach)
{
	struct bufshare_buffer *buffer = dmabuf->priv;
	struct bufshare_attachment *a = attach->priv;

	mutex_lock(&buffer->lock);
	list_del(&a->node);
	mutex_unlock(&buffer->lock);
	sg_free_table(&a->sgt);
	kfree(a);
}

struct sg_table *bufshare_buffer_map(struct dma_buf_attachment *attach,
				     enum dma_data_direction direction)
{
	struct bufshare_buffer *buffer = attach->dmabuf->priv;
	struct bufshare_attachment *a = attach->priv;
	int ret;

	ret = dma_map_sgtable(attach->dev, &a->sgt, direction, 0);
	if (ret)
		return ERR_PTR(ret);
	mutex_lock(&buffer->lock);
	a->mapped = true;
	mutex_unlock(&buffer->lock);
	return &a->sgt;
}

void bufshare_buffer_unmap(struct dma_buf_attachment *attach, struct sg_table *sgt,
			   enum dma_data_direction direction)
{
	struct bufshare_buffer *buffer = attach->dmabuf->priv;
	struct bufshare_attachment *a = attach->priv;

	mutex_lock(&buffer->lock);
	a->mapped = false;
	mutex_unlock(&buffer->lock);
	dma_unmap_sgtable(attach->dev, sgt, direction, 0);
}

int bufshare_buffer_begin(struct dma_buf *dmabuf, enum dma_data_direction direction)
{
	struct bufshare_buffer *buffer = dmabuf->priv;
	struct bufshare_attachment *a;

	mutex_lock(&buffer->lock);
	if (buffer->vmaps)
		invalidate_kernel_vmap_range(buffer->vaddr, dmabuf->size);
	list_for_each_entry(a, &buffer->attachments, node) {
		if (a->mapped)
			dma_sync_sgtable_for_cpu(a->dev, &a->sgt, direction);
	}
	mutex_unlock(&buffer->lock);
	return 0;
}

int bufshare_buffer_end(struct dma_buf *dmabuf, enum dma_data_direction direction)
{
	struct bufshare_buffer *buffer = dmabuf->priv;
	struct bufshare_attachment *a;

	mutex_lock(&buffer->lock);
	if (buffer->vmaps)
		flush_kernel_vmap_range(buffer->vaddr, dmabuf->size);
	list_for_each_entry(a, &buffer->attachments, node) {
		if (a->mapped)
			dma_sync_sgtable_for_device(a->dev, &a->sgt, direction);
	}
	mutex_unlock(&buffer->lock);
	return 0;
}

static int bufshare_buffer_mmap(struct dma_buf *dmabuf, struct vm_area_struct *vma)
{
	struct bufshare_buffer *buffer = dmabuf->priv;
	unsigned long addr = vma->vm_start;
	unsigned long skip = vma->vm_pgoff;
	struct scatterlist *sg;
	int ret, i;

	/* A private copy of a shared buffer is never what somebody wants. */
	if (!(vma->vm_flags & (VM_SHARED | VM_MAYSHARE)))
		return -EINVAL;
	for_each_sgtable_sg(&buffer->sgt, sg, i) {
		unsigned long pages = sg->length >> PAGE_SHIFT;
		unsigned long size;

		if (skip >= pages) {
			skip -= pages;
			continue;
		}
		size = min((pages - skip) << PAGE_SHIFT, vma->vm_end - addr);
		ret = remap_pfn_range(vma, addr, page_to_pfn(sg_page(sg)) + skip, size,
				      vma->vm_page_prot);
		if (ret)
			return ret;
		addr += size;
		skip = 0;
		if (addr == vma->vm_end)
			break;
	}
	return 0;
}

static void *bufshare_buffer_kmap(struct bufshare_buffer *buffer, unsigned int count)
{
	struct sg_page_iter iter;
	struct page **pages;
	unsigned int n = 0;
	void *vaddr;

	pages = kvmalloc_array(count, sizeof(*pages), GFP_KERNEL);
	if (!pages)
		return NULL;
	for_each_sgtable_page(&buffer->sgt, &iter, 0)
		pages[n++] = sg_page_iter_page(&iter);
	vaddr = vmap(pages, n, VM_MAP, PAGE_KERNEL);
	kvfree(pages);
	return vaddr;
}

int bufshare_buffer_vmap(struct dma_buf *dmabuf, struct iosys_map *map)
{
	struct bufshare_buffer *buffer = dmabuf->priv;
	int ret = 0;

	mutex_lock(&buffer->lock);
	if (!buffer->vmaps)
		buffer->vaddr = bufshare_buffer_kmap(buffer, dmabuf->size >> PAGE_SHIFT);
	if (buffer->vaddr) {
		buffer->vmaps++;
		iosys_map_set_vaddr(map, buffer->vaddr);
	} else {
		ret = -ENOMEM;
	}
	mutex_unlock(&buffer->lock);
	return ret;
}

void bufshare_buffer_vunmap(struct dma_buf *dmabuf, struct iosys_map *map)
{
	struct bufshare_buffer *buffer = dmabuf->priv;

	mutex_lock(&buffer->lock);
	if (!--buffer->vmaps) {
		vunmap(buffer->vaddr);
		buffer->vaddr = NULL;
	}
	mutex_unlock(&buffer->lock);
	iosys_map_clear(map);
}

/**
 * bufshare_buffer_fini() - free the memory
 * @buffer: from bufshare_buffer_init()
 */
void bufshare_buffer_fini(struct bufshare_buffer *buffer)
{
	struct scatterlist *sg;
	int i;

	for_each_sgtable_sg(&buffer->sgt, sg, i)
		__free_pages(sg_page(sg), get_order(sg->length));
	sg_free_table(&buffer->sgt);
	mutex_destroy(&buffer->lock);
}

static void bufshare_buffer_release(struct dma_buf *dmabuf)
{
	bufshare_buffer_fini(dmabuf->priv);
	kfree(dmabuf->priv);
}

static const struct virtio_dma_buf_ops bufshare_buffer_ops = {
	.ops = {
		.attach = bufshare_dma_buf_attach,
		.detach = bufshare_buffer_detach,
		.map_dma_buf = bufshare_buffer_map,
		.unmap_dma_buf = bufshare_buffer_unmap,
		.begin_cpu_access = bufshare_buffer_begin,
		.end_cpu_access = bufshare_buffer_end,
		.mmap = bufshare_buffer_mmap,
		.vmap = bufshare_buffer_vmap,
		.vunmap = bufshare_buffer_vunmap,
		.release = bufshare_buffer_release,
	},
	.device_attach = bufshare_buffer_attach,
	.get_uuid = bufshare_loan_uuid,
};

/* The largest piece that fits into @left and is to be had without effort, or else a small one. */
static struct page *bufshare_piece(u64 left, unsigned int min_order, unsigned int *max_order)
{
	/* Not movable, not high: the pages stay where the device was told that they are. */
	gfp_t gfp = GFP_KERNEL_ACCOUNT | __GFP_ZERO | __GFP_COMP | __GFP_NOWARN;
	unsigned int order;
	struct page *page;

	for (order = *max_order; order > min_order; order--) {
		if (left < PAGE_SIZE << order)
			continue;
		page = alloc_pages(gfp | __GFP_NORETRY, order);
		if (page)
			goto found;
	}
	order = min_order;
	page = alloc_pages(gfp | __GFP_RETRY_MAYFAIL, order);
	if (!page)
		return NULL;
found:
	/* What was not to be had a moment ago is not worth another try. */
	*max_order = order;
	return page;
}

static int bufshare_buffer_fill(struct bufshare_buffer *buffer, u64 size, unsigned int min_order)
{
	unsigned int order = MAX_PAGE_ORDER;
	unsigned int count = 0;
	struct page *page, *next;
	struct scatterlist *sg;
	LIST_HEAD(pages);
	u64 left = size;
	int ret;

	while (left) {
		ret = -EINTR;
		if (fatal_signal_pending(current))
			goto free;
		ret = -ENOMEM;
		page = bufshare_piece(left, min_order, &order);
		if (!page)
			goto free;
		list_add_tail(&page->lru, &pages);
		left -= PAGE_SIZE << order;
		count++;
		cond_resched();
	}
	ret = sg_alloc_table(&buffer->sgt, count, GFP_KERNEL);
	if (ret)
		goto free;
	sg = buffer->sgt.sgl;
	list_for_each_entry_safe(page, next, &pages, lru) {
		list_del(&page->lru);
		sg_set_page(sg, page, page_size(page), 0);
		sg = sg_next(sg);
	}
	return 0;

free:
	list_for_each_entry_safe(page, next, &pages, lru) {
		list_del(&page->lru);
		__free_pages(page, compound_order(page));
	}
	return ret;
}

/**
 * bufshare_buffer_init() - allocate zeroed memory
 * @buffer: what is to hold it, zeroed
 * @size: bytes, a multiple of @granule
 * @granule: alignment and least size of its pieces, a power of two
 *
 * Context: Process context.
 * Return: 0 or a negative error.
 */
int bufshare_buffer_init(struct bufshare_buffer *buffer, u64 size, u32 granule)
{
	int ret;

	if (!size || !IS_ALIGNED(size, max_t(u32, granule, PAGE_SIZE)) ||
	    get_order(granule) > MAX_PAGE_ORDER)
		return -EINVAL;
	if (size >> PAGE_SHIFT > totalram_pages())
		return -ENOMEM;
	ret = bufshare_buffer_fill(buffer, size, get_order(granule));
	if (ret)
		return ret;
	mutex_init(&buffer->lock);
	INIT_LIST_HEAD(&buffer->attachments);
	return 0;
}

/**
 * bufshare_buffer_new() - allocate zeroed memory as a dma-buf
 * @size: bytes, a multiple of @granule
 * @granule: alignment and least size of its pieces, a power of two
 *
 * Context: Process context.
 * Return: the dma-buf or an error.
 */
struct dma_buf *bufshare_buffer_new(u64 size, u32 granule)
{
	DEFINE_DMA_BUF_EXPORT_INFO(info);
	struct bufshare_buffer *buffer;
	struct dma_buf *dmabuf;
	int ret;

	buffer = kzalloc_obj(*buffer, GFP_KERNEL_ACCOUNT);
	if (!buffer)
		return ERR_PTR(-ENOMEM);
	ret = bufshare_buffer_init(buffer, size, granule);
	if (ret) {
		kfree(buffer);
		return ERR_PTR(ret);
	}

	info.ops = &bufshare_buffer_ops.ops;
	info.size = size;
	info.flags = O_RDWR | O_CLOEXEC;
	info.priv = buffer;
	dmabuf = dma_buf_export(&info);
	if (IS_ERR(dmabuf)) {
		bufshare_buffer_fini(buffer);
		kfree(buffer);
	}
	return dmabuf;
}

/**
 * bufshare_buffer_pages() - the pages of a dma-buf of this module
 * @dmabuf: any dma-buf
 *
 * Return: its pages, NULL if another driver exported it.
 */
struct sg_table *bufshare_buffer_pages(struct dma_buf *dmabuf)
{
	struct bufshare_buffer *buffer = dmabuf->priv;

	return dmabuf->ops == &bufshare_buffer_ops.ops ? &buffer->sgt : NULL;
}
