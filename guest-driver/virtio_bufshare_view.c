// SPDX-License-Identifier: GPL-2.0
/*
 * virtio_bufshare: the dma-buf of an import, which shows a part of the window or pages of this
 * guest that the device copies to. Pages of the window have no struct page: they are mapped by
 * number, and lent only to devices that can reach other devices' memory.
 *
 * Who maps it gets its pages by faults, so that all mappings can be taken away at once; later
 * faults are SIGBUS.
 */
#include <linux/dma-buf.h>
#include <linux/dma-mapping.h>
#include <linux/dma-resv.h>
#include <linux/fs.h>
#include <linux/io.h>
#include <linux/iosys-map.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/scatterlist.h>
#include <linux/slab.h>
#include <linux/version.h>

#include "virtio_bufshare.h"

/* Pages that one fault brings in. */
#define BUFSHARE_FAULT_AROUND 512

static struct bufshare_import *bufshare_view_import(struct dma_buf *dmabuf)
{
	return container_of_const((struct bufshare_buffer *)dmabuf->priv, struct bufshare_import,
				  buffer);
}

static phys_addr_t bufshare_view_phys(const struct bufshare_import *import)
{
	return import->bs->window.start + import->offset;
}

/* ---- mappings of user space ---- */

static vm_fault_t bufshare_view_insert(struct vm_fault *vmf, unsigned long *addr,
				       unsigned long pfn, unsigned long count)
{
	unsigned long end = min(vmf->vma->vm_end,
				vmf->address + BUFSHARE_FAULT_AROUND * PAGE_SIZE);
	vm_fault_t ret = VM_FAULT_NOPAGE;

	for (; count && *addr < end && ret == VM_FAULT_NOPAGE; count--, *addr += PAGE_SIZE)
		ret = vmf_insert_pfn(vmf->vma, *addr, pfn++);
	return ret;
}

static vm_fault_t bufshare_view_insert_pages(struct vm_fault *vmf, struct sg_table *sgt)
{
	unsigned long addr = vmf->address;
	unsigned long skip = vmf->pgoff;
	vm_fault_t ret = VM_FAULT_SIGBUS;
	struct scatterlist *sg;
	int i;

	for_each_sgtable_sg(sgt, sg, i) {
		unsigned long pages = sg->length >> PAGE_SHIFT;

		if (skip >= pages) {
			skip -= pages;
			continue;
		}
		ret = bufshare_view_insert(vmf, &addr, page_to_pfn(sg_page(sg)) + skip,
					   pages - skip);
		skip = 0;
		if (ret != VM_FAULT_NOPAGE)
			break;
	}
	return ret;
}

static vm_fault_t bufshare_view_fault(struct vm_fault *vmf)
{
	struct bufshare_import *import = vmf->vma->vm_private_data;
	unsigned long addr = vmf->address;
	vm_fault_t ret;

	/* Whoever takes the mappings away has set the error before. */
	mutex_lock(&import->lock);
	if (import->error)
		ret = VM_FAULT_SIGBUS;
	else if (import->where == BUFSHARE_IN_WINDOW)
		ret = bufshare_view_insert(vmf, &addr, PHYS_PFN(bufshare_view_phys(import)) +
					   vmf->pgoff,
					   (import->size >> PAGE_SHIFT) - vmf->pgoff);
	else
		ret = bufshare_view_insert_pages(vmf, &import->buffer.sgt);
	mutex_unlock(&import->lock);
	/* Pages that follow are a favour. */
	if (ret != VM_FAULT_NOPAGE && addr > vmf->address + PAGE_SIZE)
		ret = VM_FAULT_NOPAGE;
	return ret;
}

static const struct vm_operations_struct bufshare_view_vm_ops = {
	.fault = bufshare_view_fault,
};

static int bufshare_view_mmap(struct dma_buf *dmabuf, struct vm_area_struct *vma)
{
	struct bufshare_import *import = bufshare_view_import(dmabuf);

	/* A private copy of a shared buffer is never what somebody wants. */
	if (!(vma->vm_flags & (VM_SHARED | VM_MAYSHARE)))
		return -EINVAL;
	if (READ_ONCE(import->error))
		return import->error;
	vm_flags_set(vma, VM_PFNMAP | VM_DONTEXPAND | VM_DONTDUMP);
	if (import->where == BUFSHARE_IN_WINDOW) {
		vm_flags_set(vma, VM_IO);
		if (import->cache == VIRTIO_BUFSHARE_CACHE_WC)
			vma->vm_page_prot = pgprot_writecombine(vma->vm_page_prot);
		else if (import->cache != VIRTIO_BUFSHARE_CACHE_CACHED)
			vma->vm_page_prot = pgprot_noncached(vma->vm_page_prot);
	}
	vma->vm_private_data = import;
	vma->vm_ops = &bufshare_view_vm_ops;
	return 0;
}

/* ---- the kernel ---- */

/**
 * bufshare_view_open() - map the place in the window
 * @import: the import
 *
 * Also tells the kernel how that memory is cached, which user space's mappings follow.
 *
 * Return: 0 or -ENOMEM.
 */
int bufshare_view_open(struct bufshare_import *import)
{
	phys_addr_t phys = bufshare_view_phys(import);

	if (import->cache == VIRTIO_BUFSHARE_CACHE_CACHED)
		import->vaddr = memremap(phys, import->size, MEMREMAP_WB);
	else if (import->cache == VIRTIO_BUFSHARE_CACHE_WC)
		import->vaddr = (void __force *)ioremap_wc(phys, import->size);
	else
		import->vaddr = (void __force *)ioremap(phys, import->size);
	return import->vaddr ? 0 : -ENOMEM;
}

/**
 * bufshare_view_close() - undo bufshare_view_open()
 * @import: the import
 */
void bufshare_view_close(struct bufshare_import *import)
{
	if (!import->vaddr)
		return;
	if (import->cache == VIRTIO_BUFSHARE_CACHE_CACHED)
		memunmap(import->vaddr);
	else
		iounmap((void __iomem __force *)import->vaddr);
	import->vaddr = NULL;
}

static int bufshare_view_vmap(struct dma_buf *dmabuf, struct iosys_map *map)
{
	struct bufshare_import *import = bufshare_view_import(dmabuf);
	int ret = bufshare_import_pin(import);

	if (ret)
		return ret;
	if (import->where == BUFSHARE_IN_WINDOW) {
		if (import->cache == VIRTIO_BUFSHARE_CACHE_CACHED)
			iosys_map_set_vaddr(map, import->vaddr);
		else
			iosys_map_set_vaddr_iomem(map, (void __iomem __force *)import->vaddr);
		return 0;
	}
	ret = bufshare_buffer_vmap(dmabuf, map);
	if (ret)
		bufshare_import_unpin(import);
	return ret;
}

static void bufshare_view_vunmap(struct dma_buf *dmabuf, struct iosys_map *map)
{
	struct bufshare_import *import = bufshare_view_import(dmabuf);

	if (import->where == BUFSHARE_IN_WINDOW)
		iosys_map_clear(map);
	else
		bufshare_buffer_vunmap(dmabuf, map);
	bufshare_import_unpin(import);
}

static int bufshare_view_sync(struct dma_buf *dmabuf, enum dma_data_direction direction, bool end)
{
	struct bufshare_import *import = bufshare_view_import(dmabuf);
	struct bufshare_sync sync = {
		.flags = end ? BUFSHARE_SYNC_F_END : 0,
		.timeout_ns = U64_MAX,
	};

	if (direction != DMA_TO_DEVICE)
		sync.flags |= BUFSHARE_SYNC_F_READ;
	if (direction != DMA_FROM_DEVICE)
		sync.flags |= BUFSHARE_SYNC_F_WRITE;
	return bufshare_import_sync(import, &sync, false);
}

static int bufshare_view_begin(struct dma_buf *dmabuf, enum dma_data_direction direction)
{
	struct bufshare_import *import = bufshare_view_import(dmabuf);
	int ret = bufshare_view_sync(dmabuf, direction, false);

	if (!ret && import->where == BUFSHARE_ON_PAGES)
		ret = bufshare_buffer_begin(dmabuf, direction);
	return ret;
}

static int bufshare_view_end(struct dma_buf *dmabuf, enum dma_data_direction direction)
{
	struct bufshare_import *import = bufshare_view_import(dmabuf);
	int ret;

	/* The devices of this guest must have finished before others are told. */
	ret = bufshare_memory_finish(dmabuf->resv, direction == DMA_TO_DEVICE,
				     msecs_to_jiffies(import->bs->config.max_wait_ms));
	if (ret)
		return ret;
	if (import->where == BUFSHARE_ON_PAGES)
		bufshare_buffer_end(dmabuf, direction);
	return bufshare_view_sync(dmabuf, direction, true);
}

/* ---- devices of this guest ---- */

static int bufshare_view_attach(struct dma_buf *dmabuf, struct dma_buf_attachment *attach)
{
	struct bufshare_import *import = bufshare_view_import(dmabuf);

	if (READ_ONCE(import->error))
		return -ENODEV;
	return import->where == BUFSHARE_ON_PAGES ? bufshare_buffer_attach(dmabuf, attach) : 0;
}

static void bufshare_view_detach(struct dma_buf *dmabuf, struct dma_buf_attachment *attach)
{
	if (bufshare_view_import(dmabuf)->where == BUFSHARE_ON_PAGES)
		bufshare_buffer_detach(dmabuf, attach);
}

/* It never moves, but it can go: importers that pin it are told all the same. */
static int bufshare_view_pin(struct dma_buf_attachment *attach)
{
	return READ_ONCE(bufshare_view_import(attach->dmabuf)->error) ? -ENODEV : 0;
}

static void bufshare_view_unpin(struct dma_buf_attachment *attach)
{
}

static struct sg_table *bufshare_view_map_window(struct dma_buf_attachment *attach,
						 enum dma_data_direction direction)
{
	struct bufshare_import *import = bufshare_view_import(attach->dmabuf);
	struct sg_table *sgt;
	int ret;

	/* Not in attach: who lets the CPU read it, as drivers of simple displays do, needs no more. */
	if (!attach->peer2peer)
		return ERR_PTR(-EOPNOTSUPP);
	sgt = kzalloc_obj(*sgt);
	if (!sgt)
		return ERR_PTR(-ENOMEM);
	ret = -EOVERFLOW;
	if (import->size > UINT_MAX)
		goto free;
	ret = sg_alloc_table(sgt, 1, GFP_KERNEL);
	if (ret)
		goto free;
	sg_set_page(sgt->sgl, NULL, import->size, 0);
	sg_dma_len(sgt->sgl) = import->size;
	sg_dma_address(sgt->sgl) = dma_map_resource(attach->dev, bufshare_view_phys(import),
						    import->size, direction,
						    DMA_ATTR_SKIP_CPU_SYNC);
	ret = dma_mapping_error(attach->dev, sg_dma_address(sgt->sgl));
	if (ret)
		goto table;
	return sgt;

table:
	sg_free_table(sgt);
free:
	kfree(sgt);
	return ERR_PTR(ret);
}

static struct sg_table *bufshare_view_map(struct dma_buf_attachment *attach,
					  enum dma_data_direction direction)
{
	struct bufshare_import *import = bufshare_view_import(attach->dmabuf);
	struct sg_table *sgt;
	int ret;

	ret = bufshare_import_pin(import);
	if (ret)
		return ERR_PTR(-ENODEV);
	if (import->where == BUFSHARE_IN_WINDOW)
		sgt = bufshare_view_map_window(attach, direction);
	else
		sgt = bufshare_buffer_map(attach, direction);
	if (IS_ERR(sgt))
		bufshare_import_unpin(import);
	return sgt;
}

static void bufshare_view_unmap(struct dma_buf_attachment *attach, struct sg_table *sgt,
				enum dma_data_direction direction)
{
	struct bufshare_import *import = bufshare_view_import(attach->dmabuf);

	if (import->where == BUFSHARE_IN_WINDOW) {
		dma_unmap_resource(attach->dev, sg_dma_address(sgt->sgl), import->size, direction,
				   DMA_ATTR_SKIP_CPU_SYNC);
		sg_free_table(sgt);
		kfree(sgt);
	} else {
		bufshare_buffer_unmap(attach, sgt, direction);
	}
	bufshare_import_unpin(import);
}

/* ---- its life ---- */

static void bufshare_view_release(struct dma_buf *dmabuf)
{
	bufshare_import_close(bufshare_view_import(dmabuf));
}

static int bufshare_view_uuid(struct dma_buf *dmabuf, uuid_t *uuid)
{
	struct bufshare_import *import = bufshare_view_import(dmabuf);

	if (READ_ONCE(import->error))
		return -ENODEV;
	import_uuid(uuid, import->uuid);
	return 0;
}

static const struct virtio_dma_buf_ops bufshare_view_ops = {
	.ops = {
		.attach = bufshare_dma_buf_attach,
		.detach = bufshare_view_detach,
		.pin = bufshare_view_pin,
		.unpin = bufshare_view_unpin,
		.map_dma_buf = bufshare_view_map,
		.unmap_dma_buf = bufshare_view_unmap,
		.begin_cpu_access = bufshare_view_begin,
		.end_cpu_access = bufshare_view_end,
		.mmap = bufshare_view_mmap,
		.vmap = bufshare_view_vmap,
		.vunmap = bufshare_view_vunmap,
		.release = bufshare_view_release,
	},
	.device_attach = bufshare_view_attach,
	.get_uuid = bufshare_view_uuid,
};

/**
 * bufshare_view_is() - whether a dma-buf is that of an import
 * @dmabuf: any dma-buf
 *
 * Return: true if it is.
 */
bool bufshare_view_is(const struct dma_buf *dmabuf)
{
	return dmabuf->ops == &bufshare_view_ops.ops;
}

/**
 * bufshare_view_new() - make the dma-buf of an import
 * @import: the import, which has a place for its content
 *
 * Return: 0 or a negative error.
 */
int bufshare_view_new(struct bufshare_import *import)
{
	DEFINE_DMA_BUF_EXPORT_INFO(info);
	struct dma_buf *dmabuf;

	info.ops = &bufshare_view_ops.ops;
	info.size = import->size;
	info.flags = import->access & BUFSHARE_ACCESS_WRITE ? O_RDWR : O_RDONLY;
	info.flags |= O_CLOEXEC;
	info.priv = &import->buffer;
	info.resv = &import->resv;
	dmabuf = dma_buf_export(&info);
	if (IS_ERR(dmabuf))
		return PTR_ERR(dmabuf);
	import->inode = file_inode(dmabuf->file);
	ihold(import->inode);
	/* If it died already, whoever uses the dma-buf will find out. */
	mutex_lock(&import->view_lock);
	mutex_lock(&import->lock);
	import->dmabuf = dmabuf;
	mutex_unlock(&import->lock);
	mutex_unlock(&import->view_lock);
	return 0;
}

/**
 * bufshare_view_zap() - take all mappings away from user space, and tell devices
 * @import: a dead import
 *
 * A dma-buf lives as long as a path to it is open, its file may not: dmabuf->file cannot be used.
 *
 * Context: Process context.
 */
void bufshare_view_zap(struct bufshare_import *import)
{
	mutex_lock(&import->view_lock);
	if (import->dmabuf) {
		unmap_mapping_range(import->inode->i_mapping, 0, 0, 1);
		dma_resv_lock(&import->resv, NULL);
#if LINUX_VERSION_CODE >= KERNEL_VERSION(7, 0, 0)
		dma_buf_invalidate_mappings(import->dmabuf);
#else
		dma_buf_move_notify(import->dmabuf);
#endif
		dma_resv_unlock(&import->resv);
	}
	mutex_unlock(&import->view_lock);
}
