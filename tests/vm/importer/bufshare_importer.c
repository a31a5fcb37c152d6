// SPDX-License-Identifier: GPL-2.0
/*
 * An importer of dma-bufs for the test bed: what drivers of a guest do with a dma-buf of
 * virtio_bufshare, by command. Knows nothing of virtio_bufshare. Each open file of
 * <debugfs>/bufshare_importer attaches one dma-buf; a line that is written is a command, its error
 * is that of the write, and a read tells the result:
 *
 *	uuid FD		what virtio's flavour of dma-bufs says of it
 *	attach FD KIND	static, dynamic (pins it, as that of a GPU that scans out) or p2p
 *	map, unmap	for DMA; tells the number of pieces and a hash of what is at their addresses
 *	fill BYTE	as if by DMA
 *	vmap, vunmap	tells a hash of the content
 *	notified	how often the exporter took it back
 */
#include <linux/debugfs.h>
#include <linux/dma-buf.h>
#include <linux/dma-mapping.h>
#include <linux/dma-resv.h>
#include <linux/fs.h>
#include <linux/io.h>
#include <linux/iosys-map.h>
#include <linux/module.h>
#include <linux/platform_device.h>
#include <linux/scatterlist.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/uaccess.h>
#include <linux/version.h>
#include <linux/virtio_dma_buf.h>

#define FNV_START 0xcbf29ce484222325ull
#define FNV_PRIME 0x100000001b3ull

struct importer {
	struct dma_buf *dmabuf;
	struct dma_buf_attachment *attach;
	bool dynamic;
	struct sg_table *sgt;
	struct iosys_map map;
	unsigned int notified;
	char result[64];
};

static struct platform_device *importer_device;
static struct dentry *importer_file;

static u64 importer_hash(u64 hash, const void *data, size_t len)
{
	const u8 *p = data;

	while (len--)
		hash = (hash ^ *p++) * FNV_PRIME;
	return hash;
}

static void importer_notified(struct dma_buf_attachment *attach)
{
	struct importer *im = attach->importer_priv;

	im->notified++;
}

#if LINUX_VERSION_CODE < KERNEL_VERSION(7, 0, 0)
#define invalidate_mappings move_notify
#endif

static const struct dma_buf_attach_ops importer_dynamic = {
	.invalidate_mappings = importer_notified,
};

static const struct dma_buf_attach_ops importer_p2p = {
	.allow_peer2peer = true,
	.invalidate_mappings = importer_notified,
};

static int importer_uuid(struct importer *im, int fd)
{
	int ret = -EOPNOTSUPP;
#if IS_REACHABLE(CONFIG_VIRTIO_DMA_SHARED_BUFFER)
	struct dma_buf *dmabuf = dma_buf_get(fd);
	uuid_t uuid;

	if (IS_ERR(dmabuf))
		return PTR_ERR(dmabuf);
	ret = virtio_dma_buf_get_uuid(dmabuf, &uuid);
	if (!ret)
		snprintf(im->result, sizeof(im->result), "%pUb\n", &uuid);
	dma_buf_put(dmabuf);
#endif
	return ret;
}

static int importer_attach(struct importer *im, int fd, const char *kind)
{
	const struct dma_buf_attach_ops *ops = NULL;
	struct dma_buf_attachment *attach;
	struct dma_buf *dmabuf;

	if (im->attach)
		return -EBUSY;
	if (!strcmp(kind, "p2p"))
		ops = &importer_p2p;
	else if (!strcmp(kind, "dynamic"))
		ops = &importer_dynamic;
	dmabuf = dma_buf_get(fd);
	if (IS_ERR(dmabuf))
		return PTR_ERR(dmabuf);
	attach = dma_buf_dynamic_attach(dmabuf, &importer_device->dev, ops, im);
	if (IS_ERR(attach)) {
		dma_buf_put(dmabuf);
		return PTR_ERR(attach);
	}
	im->dmabuf = dmabuf;
	im->attach = attach;
	im->dynamic = ops;
	return 0;
}

/* What is at the DMA addresses, for the CPU. To be given back to importer_close_piece(). */
static void *importer_piece(struct scatterlist *sg)
{
	phys_addr_t phys = sg_dma_address(sg);

	if (pfn_valid(PHYS_PFN(phys)))
		return phys_to_virt(phys);
	return memremap(phys, sg_dma_len(sg), MEMREMAP_WB);
}

static void importer_close_piece(struct scatterlist *sg, void *piece)
{
	if (!pfn_valid(PHYS_PFN(sg_dma_address(sg))))
		memunmap(piece);
}

/* Hashes the content, or fills it if @byte is not negative. */
static int importer_dma(struct importer *im, int byte, u64 *hash)
{
	struct scatterlist *sg;
	u64 bytes = 0;
	void *piece;
	int i;

	*hash = FNV_START;
	for_each_sgtable_dma_sg(im->sgt, sg, i) {
		piece = importer_piece(sg);
		if (!piece)
			return -ENOMEM;
		if (byte < 0)
			*hash = importer_hash(*hash, piece, sg_dma_len(sg));
		else
			memset(piece, byte, sg_dma_len(sg));
		importer_close_piece(sg, piece);
		bytes += sg_dma_len(sg);
	}
	return bytes == im->dmabuf->size ? 0 : -EIO;
}

static int importer_map(struct importer *im)
{
	struct sg_table *sgt;
	u64 hash;
	int ret = 0;

	if (!im->attach || im->sgt)
		return -EBADFD;
	dma_resv_lock(im->dmabuf->resv, NULL);
	if (im->dynamic)
		ret = dma_buf_pin(im->attach);
	if (!ret) {
		sgt = dma_buf_map_attachment(im->attach, DMA_BIDIRECTIONAL);
		ret = PTR_ERR_OR_ZERO(sgt);
		if (!ret)
			im->sgt = sgt;
		else if (im->dynamic)
			dma_buf_unpin(im->attach);
	}
	dma_resv_unlock(im->dmabuf->resv);
	if (!ret)
		ret = importer_dma(im, -1, &hash);
	if (!ret)
		snprintf(im->result, sizeof(im->result), "%u %016llx\n", im->sgt->nents, hash);
	return ret;
}

static void importer_unmap(struct importer *im)
{
	if (!im->sgt)
		return;
	dma_resv_lock(im->dmabuf->resv, NULL);
	dma_buf_unmap_attachment(im->attach, im->sgt, DMA_BIDIRECTIONAL);
	if (im->dynamic)
		dma_buf_unpin(im->attach);
	dma_resv_unlock(im->dmabuf->resv);
	im->sgt = NULL;
}

static int importer_vmap(struct importer *im)
{
	u64 hash = FNV_START;
	u8 chunk[256];
	size_t at;
	int ret;

	if (!im->attach || !iosys_map_is_null(&im->map))
		return -EBADFD;
	ret = dma_buf_vmap_unlocked(im->dmabuf, &im->map);
	if (ret)
		return ret;
	for (at = 0; at < im->dmabuf->size; at += sizeof(chunk)) {
		iosys_map_memcpy_from(chunk, &im->map, at, sizeof(chunk));
		hash = importer_hash(hash, chunk, sizeof(chunk));
	}
	snprintf(im->result, sizeof(im->result), "%016llx\n", hash);
	return 0;
}

static void importer_vunmap(struct importer *im)
{
	if (iosys_map_is_null(&im->map))
		return;
	dma_buf_vunmap_unlocked(im->dmabuf, &im->map);
	iosys_map_clear(&im->map);
}

static int importer_command(struct importer *im, const char *line)
{
	char kind[16];
	u64 hash;
	int n;

	im->result[0] = '\0';
	if (sscanf(line, "uuid %d", &n) == 1)
		return importer_uuid(im, n);
	if (sscanf(line, "attach %d %15s", &n, kind) == 2)
		return importer_attach(im, n, kind);
	if (sscanf(line, "fill %d", &n) == 1)
		return im->sgt ? importer_dma(im, n, &hash) : -EBADFD;
	if (!strcmp(line, "map"))
		return importer_map(im);
	if (!strcmp(line, "vmap"))
		return importer_vmap(im);
	if (!strcmp(line, "unmap"))
		importer_unmap(im);
	else if (!strcmp(line, "vunmap"))
		importer_vunmap(im);
	else if (!strcmp(line, "notified"))
		snprintf(im->result, sizeof(im->result), "%u\n", im->notified);
	else
		return -EINVAL;
	return 0;
}

static int importer_open(struct inode *inode, struct file *file)
{
	file->private_data = kzalloc_obj(struct importer);
	return file->private_data ? 0 : -ENOMEM;
}

static int importer_release(struct inode *inode, struct file *file)
{
	struct importer *im = file->private_data;

	importer_vunmap(im);
	importer_unmap(im);
	if (im->attach) {
		dma_buf_detach(im->dmabuf, im->attach);
		dma_buf_put(im->dmabuf);
	}
	kfree(im);
	return 0;
}

static ssize_t importer_write(struct file *file, const char __user *user, size_t len, loff_t *pos)
{
	char line[64] = "";
	int ret;

	if (len >= sizeof(line))
		return -EINVAL;
	if (copy_from_user(line, user, len))
		return -EFAULT;
	ret = importer_command(file->private_data, strim(line));
	return ret ? ret : len;
}

static ssize_t importer_read(struct file *file, char __user *user, size_t len, loff_t *pos)
{
	struct importer *im = file->private_data;
	loff_t start = 0;

	return simple_read_from_buffer(user, len, &start, im->result, strlen(im->result));
}

static const struct file_operations importer_fops = {
	.owner = THIS_MODULE,
	.open = importer_open,
	.release = importer_release,
	.write = importer_write,
	.read = importer_read,
};

static int __init importer_init(void)
{
	int ret;

	importer_device = platform_device_register_simple("bufshare_importer", -1, NULL, 0);
	if (IS_ERR(importer_device))
		return PTR_ERR(importer_device);
	ret = dma_coerce_mask_and_coherent(&importer_device->dev, DMA_BIT_MASK(64));
	if (ret) {
		platform_device_unregister(importer_device);
		return ret;
	}
	importer_file = debugfs_create_file_unsafe("bufshare_importer", 0600, NULL, NULL,
						   &importer_fops);
	return 0;
}

static void __exit importer_exit(void)
{
	debugfs_remove(importer_file);
	platform_device_unregister(importer_device);
}

module_init(importer_init);
module_exit(importer_exit);

MODULE_DESCRIPTION("Importer of dma-bufs for tests");
MODULE_AUTHOR("The vhost-device-bufshare authors");
MODULE_LICENSE("GPL");
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 13, 0)
MODULE_IMPORT_NS("DMA_BUF");
#else
MODULE_IMPORT_NS(DMA_BUF);
#endif
