// SPDX-License-Identifier: GPL-2.0
/*
 * A DRM device without a GPU that offers timelines, which vgem and vkms do not: the kernel's own drm_syncobj, memory of ordinary
 * pages, and nothing else. For tests. Its driver is called vgem, by which Mesa knows that there is no GPU. A compositor on it takes
 * buffers, schedules and releases them; what it paints nobody sees.
 */
#include <linux/dma-mapping.h>
#include <linux/module.h>
#include <linux/platform_device.h>

#include <drm/drm_drv.h>
#include <drm/drm_file.h>
#include <drm/drm_gem_shmem_helper.h>
#include <drm/drm_ioctl.h>

DEFINE_DRM_GEM_FOPS(node_fops);

static const struct drm_driver node_driver = {
	.driver_features = DRIVER_GEM | DRIVER_RENDER | DRIVER_SYNCOBJ | DRIVER_SYNCOBJ_TIMELINE,
	.fops = &node_fops,
	DRM_GEM_SHMEM_DRIVER_OPS,
	.name = "vgem",
	.desc = "timelines for tests",
	.major = 1,
};

static struct platform_device *parent;
static struct drm_device *node;

static int __init node_init(void)
{
	int ret;

	parent = platform_device_register_simple("timelines", PLATFORM_DEVID_NONE, NULL, 0);
	if (IS_ERR(parent))
		return PTR_ERR(parent);
	ret = dma_coerce_mask_and_coherent(&parent->dev, DMA_BIT_MASK(64));
	if (ret)
		goto err;
	node = drm_dev_alloc(&node_driver, &parent->dev);
	if (IS_ERR(node)) {
		ret = PTR_ERR(node);
		goto err;
	}
	ret = drm_dev_register(node, 0);
	if (!ret)
		return 0;
	drm_dev_put(node);
err:
	platform_device_unregister(parent);
	return ret;
}

static void __exit node_exit(void)
{
	drm_dev_unregister(node);
	drm_dev_put(node);
	platform_device_unregister(parent);
}

module_init(node_init);
module_exit(node_exit);
MODULE_DESCRIPTION("DRM timelines without a GPU");
MODULE_LICENSE("GPL");
