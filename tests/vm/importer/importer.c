/* SPDX-License-Identifier: GPL-2.0 */
/*
 * importer SOURCE CHECK...: what other drivers of a guest do with a dma-buf of virtio_bufshare.
 *
 * Sources: `own` allocates a buffer, fills it and exports it (shown to nobody); `offered` attaches the first buffer that another
 * peer offers, READ and WRITE if it can be had.
 *   uuid          virtio drivers learn its UUID; `no-uuid`: this kernel has nothing that could tell them
 *   kernel        static, dynamic and peer-to-peer importers map it for DMA, and all see what a program sees
 *   kernel-p2p    the same, but only peer-to-peer importers can
 *   prime         every DRM device of this guest imports it, and gives back the same object
 *   scanout       vkms shows it: the same checksum as of a buffer of its own with the same picture
 *   revoked       waits for its end, mapped by the kernel all the time
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <drm/drm.h>
#include <drm/drm_fourcc.h>
#include <drm/drm_mode.h>
#include <linux/bufshare.h>
#include <linux/dma-buf.h>

#define WIDTH 640
#define HEIGHT 480
#define SIZE (WIDTH * HEIGHT * 4)

static int device, fd;
static uint64_t handle;
static uint8_t uuid[16];
static uint8_t *content;
static bool own, writable = true;

static void fail(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	fputs("failed: ", stdout);
	vprintf(format, args);
	puts("");
	exit(1);
}

static void must(int ret, const char *what)
{
	if (ret < 0)
		fail("%s: %s", what, strerror(errno));
}

static void expect(int ret, int error, const char *what)
{
	if (ret >= 0 || errno != error)
		fail("%s: %s instead of %s", what, ret < 0 ? strerror(errno) : "success", strerror(error));
}

static void sync_cpu(uint64_t flags)
{
	struct dma_buf_sync sync = { .flags = flags };

	must(ioctl(fd, DMA_BUF_IOCTL_SYNC, &sync), "DMA_BUF_IOCTL_SYNC");
}

/* The test module: each file attaches once. */
static int kernel_open(void)
{
	int file = open("/sys/kernel/debug/bufshare_importer", O_RDWR);

	must(file, "the module of the test is not there");
	return file;
}

static int kernel(int file, char *answer, const char *format, ...)
{
	char line[64];
	va_list args;
	ssize_t n;
	int ret;

	va_start(args, format);
	vsnprintf(line, sizeof(line), format, args);
	ret = write(file, line, strlen(line));
	if (answer && ret >= 0) {
		n = read(file, answer, 63);
		answer[n > 0 ? n - 1 : 0] = '\0';
	}
	return ret;
}

static void check_uuid(bool there)
{
	char answer[64], want[37] = "", *p = want;
	struct bufshare_alloc alloc = { .size = 4096 };
	int file = kernel_open(), i;

	for (i = 0; i < 16; i++)
		p += sprintf(p, "%s%02x", i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "", uuid[i]);
	if (!there) {
		expect(kernel(file, NULL, "uuid %d", fd), EOPNOTSUPP, "UUID");
		return;
	}
	must(kernel(file, answer, "uuid %d", fd), "UUID");
	if (strcmp(answer, want))
		fail("UUID %s instead of %s", answer, want);
	must(ioctl(device, BUFSHARE_IOC_ALLOC, &alloc), "ALLOC");
	expect(kernel(file, NULL, "uuid %d", alloc.fd), ENODEV, "UUID of what is not exported");
	close(alloc.fd);
	if (own) {
		struct bufshare_release release = { .handle = handle };

		must(ioctl(device, BUFSHARE_IOC_RELEASE, &release), "RELEASE");
		expect(kernel(file, NULL, "uuid %d", fd), ENODEV, "UUID of what is not exported any more");
	}
	close(file);
}

static void check_kernel(bool p2p_only)
{
	static const char *const kinds[] = { "static", "dynamic", "p2p" };
	char vmapped[64], mapped[64];
	unsigned int i, pieces;
	uint64_t hash = 0xcbf29ce484222325, dma;
	int file;

	sync_cpu(DMA_BUF_SYNC_START | DMA_BUF_SYNC_READ);
	for (i = 0; i < SIZE; i++)
		hash = (hash ^ content[i]) * 0x100000001b3;
	for (i = 0; i < 3; i++) {
		file = kernel_open();
		if (kernel(file, NULL, "attach %d %s", fd, kinds[i]) < 0) {
			/* Linux 6.12 maps for static importers when they attach. */
			if (!p2p_only || i || errno != EOPNOTSUPP)
				fail("%s: %s", kinds[i], strerror(errno));
			close(file);
			continue;
		}
		must(kernel(file, vmapped, "vmap"), "vmap");
		if (strtoull(vmapped, NULL, 16) != hash)
			fail("%s: vmap sees %s, a program %016lx", kinds[i], vmapped, hash);
		if (p2p_only && i < 2) {
			expect(kernel(file, NULL, "map"), EOPNOTSUPP, "map without struct pages");
		} else {
			must(kernel(file, mapped, "map"), "map");
			if (sscanf(mapped, "%u %lx", &pieces, &dma) != 2 || dma != hash)
				fail("%s: DMA sees %s, a program %016lx", kinds[i], mapped, hash);
			printf("%s: pieces=%u\n", kinds[i], pieces);
			if (writable) {
				must(kernel(file, NULL, "fill %u", 0x40 + i), "fill");
				if (content[0] != 0x40 + i || content[SIZE - 1] != 0x40 + i)
					fail("%s: what DMA wrote is not there", kinds[i]);
				hash = 0xcbf29ce484222325;
				for (unsigned int at = 0; at < SIZE; at++)
					hash = (hash ^ content[at]) * 0x100000001b3;
			}
		}
		close(file);
	}
	sync_cpu(DMA_BUF_SYNC_END | DMA_BUF_SYNC_READ);
}

static void check_revoked(void)
{
	char answer[64] = "0";
	int file = kernel_open();

	must(kernel(file, NULL, "attach %d p2p", fd), "attach");
	must(kernel(file, NULL, "vmap"), "vmap");
	must(kernel(file, NULL, "map"), "map");
	puts("mapped");
	fflush(stdout);
	while (!strcmp(answer, "0")) {
		usleep(20000);
		must(kernel(file, answer, "notified"), "notified");
	}
	must(kernel(file, NULL, "unmap"), "unmap");
	must(kernel(file, NULL, "vunmap"), "vunmap");
	expect(kernel(file, NULL, "map"), ENODEV, "map of what is revoked");
	close(file);
	file = kernel_open();
	expect(kernel(file, NULL, "attach %d p2p", fd), ENODEV, "attach what is revoked");
	close(file);
}

/* ---- DRM ---- */

/* Opens the next card that has this driver, or any; *index is where to go on. */
static int drm_open(const char *driver, int *index)
{
	char path[32], name[32];
	int card;

	for (; *index < 8; ++*index) {
		struct drm_version version = { .name = name, .name_len = sizeof(name) - 1 };

		snprintf(path, sizeof(path), "/dev/dri/card%d", *index);
		card = open(path, O_RDWR);
		if (card < 0)
			continue;
		must(ioctl(card, DRM_IOCTL_VERSION, &version), "VERSION");
		name[version.name_len] = '\0';
		if (!driver || !strcmp(driver, name)) {
			++*index;
			printf("%s: %s\n", path, name);
			return card;
		}
		close(card);
	}
	return -1;
}

static uint32_t prime(int card)
{
	struct drm_prime_handle arg = { .fd = fd };

	must(ioctl(card, DRM_IOCTL_PRIME_FD_TO_HANDLE, &arg), "PRIME_FD_TO_HANDLE");
	return arg.handle;
}

static void check_prime(void)
{
	int index = 0, cards = 0, card;

	while ((card = drm_open(NULL, &index)) >= 0) {
		struct drm_prime_handle arg = { .handle = prime(card), .flags = DRM_CLOEXEC };
		struct drm_gem_close gem = { .handle = arg.handle };
		struct stat here, there;

		if (prime(card) != arg.handle)
			fail("the second import is another object");
		must(ioctl(card, DRM_IOCTL_PRIME_HANDLE_TO_FD, &arg), "PRIME_HANDLE_TO_FD");
		must(fstat(fd, &here), "stat");
		must(fstat(arg.fd, &there), "stat");
		if (here.st_ino != there.st_ino)
			fail("another dma-buf came back");
		close(arg.fd);
		must(ioctl(card, DRM_IOCTL_GEM_CLOSE, &gem), "GEM_CLOSE");
		close(card);
		cards++;
	}
	if (!cards)
		fail("there is no DRM device");
}

/* Shows a buffer of a card, and returns the checksum of what is seen. */
static uint32_t show(int card, uint32_t object)
{
	uint32_t connector, crtc, checksum = 0;
	struct drm_mode_modeinfo modes[256];
	struct drm_mode_card_res res = { 0 };
	struct drm_mode_get_connector get = { 0 };
	struct drm_mode_fb_cmd2 fb = {
		.width = WIDTH, .height = HEIGHT, .pixel_format = DRM_FORMAT_XRGB8888,
		.handles = { object }, .pitches = { WIDTH * 4 },
	};
	struct drm_mode_crtc set = { .mode_valid = 1, .count_connectors = 1 };
	uint32_t ids[3][8];
	char path[64], line[128];
	struct stat st;
	unsigned int i;
	int control, data;

	res.crtc_id_ptr = (uintptr_t)ids[0];
	res.connector_id_ptr = (uintptr_t)ids[1];
	res.encoder_id_ptr = (uintptr_t)ids[2];
	res.count_crtcs = res.count_connectors = res.count_encoders = 8;
	must(ioctl(card, DRM_IOCTL_MODE_GETRESOURCES, &res), "GETRESOURCES");
	crtc = ids[0][0];
	connector = ids[1][0];
	get.connector_id = connector;
	must(ioctl(card, DRM_IOCTL_MODE_GETCONNECTOR, &get), "GETCONNECTOR"); /* finds the modes */
	get = (struct drm_mode_get_connector){
		.connector_id = connector, .modes_ptr = (uintptr_t)modes, .count_modes = 256,
	};
	must(ioctl(card, DRM_IOCTL_MODE_GETCONNECTOR, &get), "GETCONNECTOR");
	for (i = 0; i < get.count_modes; i++) {
		if (modes[i].hdisplay == WIDTH && modes[i].vdisplay == HEIGHT)
			set.mode = modes[i];
	}
	must(ioctl(card, DRM_IOCTL_MODE_ADDFB2, &fb), "ADDFB2");
	set.set_connectors_ptr = (uintptr_t)&connector;
	set.crtc_id = crtc;
	set.fb_id = fb.fb_id;
	must(ioctl(card, DRM_IOCTL_MODE_SETCRTC, &set), "SETCRTC");

	must(fstat(card, &st), "stat");
	snprintf(path, sizeof(path), "/sys/kernel/debug/dri/%u/crtc-0/crc/control", (unsigned int)(st.st_rdev & 0xff));
	control = open(path, O_WRONLY);
	must(control, path);
	must(write(control, "auto", 4), "crc/control");
	strcpy(strrchr(path, '/'), "/data");
	data = open(path, O_RDONLY);
	must(data, path);
	/* The first may be that of a frame before. */
	for (i = 0; i < 3; i++) {
		must(read(data, line, sizeof(line)), "crc/data");
		if (sscanf(line, "%*s %x", &checksum) != 1)
			fail("no checksum: %s", line);
	}
	close(data);
	close(control);
	must(ioctl(card, DRM_IOCTL_MODE_RMFB, &fb.fb_id), "RMFB");
	return checksum;
}

static void check_scanout(void)
{
	struct drm_mode_create_dumb dumb = { .width = WIDTH, .height = HEIGHT, .bpp = 32 };
	struct drm_mode_map_dumb map = { 0 };
	uint32_t native, imported, other;
	int index = 0, card = drm_open("vkms", &index);
	void *pixels;

	must(card, "vkms");
	must(ioctl(card, DRM_IOCTL_MODE_CREATE_DUMB, &dumb), "CREATE_DUMB");
	map.handle = dumb.handle;
	must(ioctl(card, DRM_IOCTL_MODE_MAP_DUMB, &map), "MAP_DUMB");
	pixels = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, card, map.offset);
	if (pixels == MAP_FAILED)
		fail("mmap: %s", strerror(errno));
	other = show(card, dumb.handle);
	sync_cpu(DMA_BUF_SYNC_START | DMA_BUF_SYNC_READ);
	memcpy(pixels, content, SIZE);
	native = show(card, dumb.handle);
	imported = show(card, prime(card));
	sync_cpu(DMA_BUF_SYNC_END | DMA_BUF_SYNC_READ);
	printf("checksums: black=%08x own=%08x imported=%08x\n", other, native, imported);
	if (imported != native || imported == other)
		fail("vkms shows something else");
}

int main(int argc, char **argv)
{
	int i;

	if (argc < 3)
		fail("usage: importer own|offered CHECK...");
	own = !strcmp(argv[1], "own");
	device = open("/dev/bufshare0", O_RDWR);
	must(device, "/dev/bufshare0");
	if (own) {
		struct bufshare_alloc alloc = { .size = SIZE };
		struct bufshare_export export = { .access = BUFSHARE_ACCESS_READ, .name = "importer" };

		must(ioctl(device, BUFSHARE_IOC_ALLOC, &alloc), "ALLOC");
		fd = export.fd = alloc.fd;
		must(ioctl(device, BUFSHARE_IOC_EXPORT, &export), "EXPORT");
		handle = export.handle;
		memcpy(uuid, export.uuid, sizeof(uuid));
	} else {
		struct bufshare_offer offer = { 0 };
		struct bufshare_attach attach = { 0 };

		while (ioctl(device, BUFSHARE_IOC_OFFER, &offer))
			usleep(50000);
		writable = offer.access & BUFSHARE_ACCESS_WRITE;
		attach.access = offer.access;
		memcpy(attach.uuid, offer.uuid, sizeof(uuid));
		must(ioctl(device, BUFSHARE_IOC_ATTACH, &attach), "ATTACH");
		if (attach.size != SIZE)
			fail("%lu bytes are offered", (unsigned long)attach.size);
		fd = attach.fd;
		memcpy(uuid, attach.uuid, sizeof(uuid));
	}
	content = mmap(NULL, SIZE, writable ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED, fd, 0);
	if (content == MAP_FAILED)
		fail("mmap: %s", strerror(errno));
	if (own) {
		for (i = 0; i < SIZE; i++)
			content[i] = i * 7 + (i >> 12);
	}
	for (i = 2; i < argc; i++) {
		if (!strcmp(argv[i], "uuid") || !strcmp(argv[i], "no-uuid"))
			check_uuid(argv[i][0] == 'u');
		else if (!strcmp(argv[i], "kernel") || !strcmp(argv[i], "kernel-p2p"))
			check_kernel(argv[i][6]);
		else if (!strcmp(argv[i], "prime"))
			check_prime();
		else if (!strcmp(argv[i], "scanout"))
			check_scanout();
		else if (!strcmp(argv[i], "revoked"))
			check_revoked();
		else
			fail("%s: no such check", argv[i]);
		printf("%s: ok\n", argv[i]);
		fflush(stdout);
	}
	return 0;
}
