/* SPDX-License-Identifier: ((GPL-2.0 WITH Linux-syscall-note) OR BSD-3-Clause) */
/*
 * Wire layout of the buffer sharing device (virtio-bufshare): what a driver and the device say to
 * each other on the virtqueues and in the configuration space. The ioctl interface of
 * /dev/bufshareN is in <linux/bufshare.h>.
 *
 * All integers are little-endian. No implicit padding; every 64-bit field is 8-byte aligned; every
 * fixed part is a multiple of 8 bytes. `reserved` is 0 on write; a non-zero reserved field or an
 * unknown flag in a request is refused with INVAL; in a response or event it is ignored. `cookie`
 * is the driver's own number for a sync request, for CANCEL to name it; 0 in all other requests.
 */
#ifndef _UAPI_LINUX_VIRTIO_BUFSHARE_H
#define _UAPI_LINUX_VIRTIO_BUFSHARE_H

#include <linux/types.h>

#define VIRTIO_ID_BUFSHARE 37 /* named "dmabuf" by Linux and QEMU, unassigned by OASIS */

/* ---- feature bits: 0..23 only ---- */
#define VIRTIO_BUFSHARE_F_IMPORT        0 /* ATTACH, DETACH, import events */
#define VIRTIO_BUFSHARE_F_WINDOW        1 /* MAP into shared memory region 1; needs IMPORT; the */
					  /* driver drops it where the region is absent */
#define VIRTIO_BUFSHARE_F_COPY          2 /* MAP onto the importer's own memory. Needs IMPORT */
#define VIRTIO_BUFSHARE_F_TIMELINE      3 /* POINT_SIGNAL, POINT_WAIT */
#define VIRTIO_BUFSHARE_F_PEERS         4 /* PEER_INFO and peer events */
#define VIRTIO_BUFSHARE_F_READ_ONLY     5 /* READ attachments are enforced, by a copy if need be */
#define VIRTIO_BUFSHARE_F_DEVICE_MEMORY 6 /* reserved: EXPORT of memory that the device allocates */
#define VIRTIO_BUFSHARE_F_OBJECT        7 /* reserved: objects of other virtio devices */
#define VIRTIO_BUFSHARE_F_REBACK        8 /* reserved: exporter replaces the backing */
/* Bits called reserved are never offered in this version. */

/* ---- queues and window ---- */
#define VIRTIO_BUFSHARE_VQ_CONTROL 0 /* bounded requests: never wait for a peer or a fence */
#define VIRTIO_BUFSHARE_VQ_EVENT   1 /* device-writable buffers of at least config.event_size */
#define VIRTIO_BUFSHARE_VQ_SYNC    2 /* requests may stay pending and complete in any order */
#define VIRTIO_BUFSHARE_SHM_WINDOW 1

#define VIRTIO_BUFSHARE_PEER_NONE 0u
#define VIRTIO_BUFSHARE_PEER_HOST 1u
#define VIRTIO_BUFSHARE_PEER_ANY  0xffffffffu

/* ---- configuration space: read-only for the driver ---- */
struct virtio_bufshare_config {
	__le32 peer_id;         /* 0x00 this endpoint; constant until system reset */
	__le32 epoch;           /* 0x04 changes when the device lost its session state */
	__le32 granule;         /* 0x08 bytes, power of two, >= 4096: alignment of ranges */
	__le32 max_segments;    /* 0x0c per request, after merging adjacent segments */
	__le64 max_buffer_size; /* 0x10 bytes */
	__le64 max_total_size;  /* 0x18 bytes exported at once by this endpoint */
	__le32 max_exports;     /* 0x20 */
	__le32 max_attachments; /* 0x24 0 without IMPORT */
	__le32 max_mappings;    /* 0x28 0 without WINDOW and COPY; may change, told by EVT_RESYNC */
	__le32 max_metadata;    /* 0x2c bytes, <= 4096 */
	__le32 event_size;      /* 0x30 bytes, >= 64 */
	__le32 max_wait_ms;     /* 0x34 upper bound of any wait on the sync queue */
	__le32 lingering;       /* 0x38 exports of earlier sessions still in use; ~0: */
				/* unknown; may change, told by EVT_RESYNC */
	__le32 max_waits;       /* 0x3c pending sync requests, at most queue size - 2; more: BUSY */
};

/* ---- headers ---- */
struct virtio_bufshare_req {
	__le16 type;
	__le16 flags;
	__le32 cookie; /* SYNC, POINT_*: for CANCEL; 0 in all other requests */
};

struct virtio_bufshare_resp {
	__le16 status;
	__le16 reserved;
	__le32 detail; /* FAULT: index of the segment; else 0 */
};

enum virtio_bufshare_type {
	/* control queue, exporter */
	VIRTIO_BUFSHARE_EXPORT       = 0x0100,
	VIRTIO_BUFSHARE_GRANT        = 0x0101,
	VIRTIO_BUFSHARE_RELEASE      = 0x0102,
	VIRTIO_BUFSHARE_QUERY        = 0x0103, /* importer too */
	VIRTIO_BUFSHARE_SET_NAME     = 0x0104,
	VIRTIO_BUFSHARE_QUERY_LINGER = 0x0105,
	/* control queue, importer */
	VIRTIO_BUFSHARE_ATTACH       = 0x0200,
	VIRTIO_BUFSHARE_DETACH       = 0x0201,
	VIRTIO_BUFSHARE_MAP          = 0x0202,
	VIRTIO_BUFSHARE_UNMAP        = 0x0203,
	/* control queue, anybody */
	VIRTIO_BUFSHARE_PEER_INFO    = 0x0300,
	VIRTIO_BUFSHARE_CANCEL       = 0x0301, /* pending sync requests */
	/* sync queue */
	VIRTIO_BUFSHARE_SYNC         = 0x0400,
	VIRTIO_BUFSHARE_POINT_SIGNAL = 0x0401,
	VIRTIO_BUFSHARE_POINT_WAIT   = 0x0402,
	/* event queue */
	VIRTIO_BUFSHARE_EVT_RELEASED  = 0x1000, /* exporter: memory is back, the last event */
	VIRTIO_BUFSHARE_EVT_IDLE      = 0x1001, /* exporter: use count fell to 0, still exported */
	VIRTIO_BUFSHARE_EVT_BUSY      = 0x1002, /* exporter: use count rose from 0 */
	VIRTIO_BUFSHARE_EVT_OFFERED   = 0x1100, /* importer: a grant for this peer exists */
	VIRTIO_BUFSHARE_EVT_REVOKED   = 0x1101, /* importer: the attachment is dead */
	VIRTIO_BUFSHARE_EVT_WITHDRAWN = 0x1102, /* importer: an offer went away before ATTACH */
	VIRTIO_BUFSHARE_EVT_CHANGED   = 0x1103, /* attached: generation advanced (latest only) */
	VIRTIO_BUFSHARE_EVT_PEER      = 0x1200, /* a peer came, went or changed epoch */
	VIRTIO_BUFSHARE_EVT_RESYNC    = 0x12ff, /* read config and QUERY again; live offers and */
						 /* dead attachments are told again after it */
};

enum virtio_bufshare_status { /* and the errno a Linux driver returns */
	VIRTIO_BUFSHARE_S_OK       = 0,
	VIRTIO_BUFSHARE_S_UNSUPP   = 1,  /* unknown type, or feature not negotiated EOPNOTSUPP */
	VIRTIO_BUFSHARE_S_INVAL    = 2,  /* malformed, reserved bits, sizes disagree EINVAL */
	VIRTIO_BUFSHARE_S_NOENT    = 3,  /* no such object, or no right to it ENOENT */
	VIRTIO_BUFSHARE_S_ACCESS   = 4,  /* a right exists, but not for this access EACCES */
	VIRTIO_BUFSHARE_S_BUSY     = 5,  /* DETACH while mapped, rate limit EBUSY */
	VIRTIO_BUFSHARE_S_NOMEM    = 6,  /* the host could not allocate ENOMEM */
	VIRTIO_BUFSHARE_S_QUOTA    = 7,  /* a limit of the config space ENOSPC */
	VIRTIO_BUFSHARE_S_RANGE    = 8,  /* outside the buffer or window, or misaligned ERANGE */
	VIRTIO_BUFSHARE_S_FAULT    = 9,  /* segment `detail` is not shareable memory EFAULT */
	VIRTIO_BUFSHARE_S_TOOMANY  = 10, /* too many segments even when merged E2BIG */
	VIRTIO_BUFSHARE_S_TIMEDOUT = 11, /* sync queue wait ETIMEDOUT */
	VIRTIO_BUFSHARE_S_REVOKED  = 12, /* revoked, or the exporter is gone EOWNERDEAD */
	VIRTIO_BUFSHARE_S_CANCELED = 13, /* CANCEL, RELEASE, queue reset ECANCELED */
	VIRTIO_BUFSHARE_S_AGAIN    = 14, /* SYNC with NONBLOCK would wait EAGAIN */
	VIRTIO_BUFSHARE_S_IO       = 15, /* failure inside the device EIO */
};

#define VIRTIO_BUFSHARE_ACCESS_READ  (1u << 0)
#define VIRTIO_BUFSHARE_ACCESS_WRITE (1u << 1)

/* How bytes travel. Reported, never guessed: a user who needs zero copies can refuse COPY. */
#define VIRTIO_BUFSHARE_MODE_ZERO_COPY 1u /* consumers see the exporter's own pages */
#define VIRTIO_BUFSHARE_MODE_COPY      2u /* the device copies on SYNC */

/* ---- EXPORT ---- */
#define VIRTIO_BUFSHARE_EXPORT_F_DEVICE_MEMORY (1u << 0) /* nr_segments == 0 */
#define VIRTIO_BUFSHARE_EXPORT_F_OBJECT        (1u << 1) /* nr_segments == 0; object is a UUID */
#define VIRTIO_BUFSHARE_EXPORT_F_ZERO_COPY     (1u << 2) /* fail with FAULT rather than copy */
#define VIRTIO_BUFSHARE_EXPORT_F_PART          (1u << 3)
/* F_PART: an image of a pool. object = UUID of the pool (an export of its own), nr_segments 1, */
/* segments[0].addr = offset in the pool. */
struct virtio_bufshare_segment {
	__le64 addr; /* same address space as descriptors; multiple of granule */
	__le64 len;  /* bytes; multiple of granule */
};

struct virtio_bufshare_export {
	struct virtio_bufshare_req hdr;
	__le64 size;          /* == sum of segments[].len; fixed for the life of the buffer */
	__le32 access;        /* the most that any peer can be granted */
	__le32 nr_segments;
	__le32 metadata_type; /* 0 none, 1 image, >= 0x80000000 private to the users */
	__le32 metadata_len;  /* bytes */
	__u8 name[32];        /* UTF-8, NUL padded; for people */
	__u8 object[16];      /* F_PART and F_OBJECT only, else 0 */
	/* struct virtio_bufshare_segment segments[nr_segments]; */
	/* __u8 metadata[metadata_len], then zeros up to a multiple of 8 */
};

struct virtio_bufshare_resp_export {
	struct virtio_bufshare_resp hdr;
	__le64 handle; /* not 0; never reused before device reset */
	__u8 uuid[16]; /* version 4, network byte order, made by the device */
	__le32 mode;   /* VIRTIO_BUFSHARE_MODE_* as host consumers will see it */
	__le32 reserved;
};

#define VIRTIO_BUFSHARE_METADATA_IMAGE 1u
struct virtio_bufshare_plane {
	__le64 offset; /* bytes from the start of the buffer */
	__le32 stride; /* bytes */
	__le32 reserved;
};

struct virtio_bufshare_image {
	__le32 fourcc;    /* DRM_FORMAT_* */
	__le32 nr_planes; /* 1..4 */
	__le64 modifier;  /* DRM_FORMAT_MOD_* */
	__le32 width;     /* pixels */
	__le32 height;    /* pixels */
	struct virtio_bufshare_plane planes[4];
};

/* ---- GRANT: replaces the peer's grant; access == 0 withdraws it ---- */
#define VIRTIO_BUFSHARE_GRANT_F_ONCE  (1u << 0) /* consumed by the first ATTACH */
#define VIRTIO_BUFSHARE_GRANT_F_FORCE (1u << 1) /* with access == 0: revoke attachments too */
struct virtio_bufshare_grant {
	struct virtio_bufshare_req hdr;
	__le64 handle;
	__le32 peer_id;
	__le32 access;
	__le64 lifetime_ms; /* 0: until withdrawn */
};

/* ---- RELEASE, QUERY, DETACH, QUERY_LINGER ---- */
#define VIRTIO_BUFSHARE_RELEASE_F_FORCE (1u << 0) /* void all rights at once, then unmap */
enum virtio_bufshare_state {
	VIRTIO_BUFSHARE_ST_EXPORTED  = 1,
	VIRTIO_BUFSHARE_ST_IN_USE    = 2,
	VIRTIO_BUFSHARE_ST_RELEASING = 3,
	VIRTIO_BUFSHARE_ST_RELEASED  = 4,
	VIRTIO_BUFSHARE_ST_ATTACHED  = 5,
	VIRTIO_BUFSHARE_ST_MAPPED    = 6,
	VIRTIO_BUFSHARE_ST_REVOKED   = 7,
};

struct virtio_bufshare_handle {
	struct virtio_bufshare_req hdr;
	__le64 handle; /* QUERY_LINGER: index */
};

struct virtio_bufshare_set_name {
	struct virtio_bufshare_req hdr;
	__le64 handle;
	__u8 name[32];
};

struct virtio_bufshare_resp_state { /* RELEASE, QUERY, QUERY_LINGER */
	struct virtio_bufshare_resp hdr;
	__le32 state;
	__le32 use_count; /* attachments + host leases + 1 if others on the host hold it */
	__le32 nr_mappings;
	__le32 access;
	__le64 size;
	__le64 generation; /* completed SYNC(END|WRITE) of any endpoint */
	__u8 uuid[16];
};

/* ---- ATTACH ---- */
#define VIRTIO_BUFSHARE_ATTACH_F_ZERO_COPY (1u << 0) /* fail with ACCESS rather than copy */
struct virtio_bufshare_attach {
	struct virtio_bufshare_req hdr;
	__u8 uuid[16];
	__le32 access;
	__le32 max_metadata; /* bytes of metadata[] that the response can take */
};

struct virtio_bufshare_resp_attach {
	struct virtio_bufshare_resp hdr;
	__le64 handle;
	__le64 size;
	__le64 generation;
	__le32 access;
	__le32 exporter; /* peer_id */
	__le32 mode;
	__le32 metadata_type;
	__le32 metadata_len; /* full length; may exceed max_metadata */
	__le32 reserved;
	__u8 name[32];
	/* __u8 metadata[min(metadata_len, max_metadata)] */
};

/* ---- MAP, UNMAP ---- */
#define VIRTIO_BUFSHARE_MAP_F_COPY (1u << 0) /* onto segments[]; else at shm_offset in the window */
enum virtio_bufshare_cache {
	VIRTIO_BUFSHARE_CACHE_CACHED   = 1,
	VIRTIO_BUFSHARE_CACHE_UNCACHED = 2,
	VIRTIO_BUFSHARE_CACHE_WC       = 3,
};

struct virtio_bufshare_map {
	struct virtio_bufshare_req hdr;
	__le64 handle;     /* attachment */
	__le64 offset;     /* bytes into the buffer; multiple of granule */
	__le64 len;        /* bytes; multiple of granule */
	__le64 shm_offset; /* bytes into the window, chosen by the driver; 0 with F_COPY */
	__le32 access;
	__le32 nr_segments; /* F_COPY only, else 0 */
	/* struct virtio_bufshare_segment segments[nr_segments]; */
};

struct virtio_bufshare_resp_map {
	struct virtio_bufshare_resp hdr;
	__le64 mapping; /* not 0; never reused before device reset */
	__le32 cache;
	__le32 reserved;
};

struct virtio_bufshare_unmap {
	struct virtio_bufshare_req hdr;
	__le64 mapping;
};

/* ---- sync queue ---- */
#define VIRTIO_BUFSHARE_SYNC_F_END      (1u << 0) /* clear: BEGIN */
#define VIRTIO_BUFSHARE_SYNC_F_READ     (1u << 1)
#define VIRTIO_BUFSHARE_SYNC_F_WRITE    (1u << 2)
#define VIRTIO_BUFSHARE_SYNC_F_NONBLOCK (1u << 3)
struct virtio_bufshare_sync { /* flags in hdr.flags */
	struct virtio_bufshare_req hdr;
	__le64 handle;     /* export or attachment */
	__le64 offset;     /* bytes */
	__le64 len;        /* bytes; 0: to the end */
	__le64 timeout_ns; /* relative; at most max_wait_ms */
};

struct virtio_bufshare_resp_sync {
	struct virtio_bufshare_resp hdr;
	__le64 generation;
};

enum virtio_bufshare_timeline {
	VIRTIO_BUFSHARE_TL_ACQUIRE = 0, /* "content is ready", one per buffer; signal: WRITE */
	/* "I am done": one per attachment and lease, signalled by its holder; the exporter's */
	/* WAIT ends when every holder reached the point or is gone */
	VIRTIO_BUFSHARE_TL_RELEASE = 1,
};

struct virtio_bufshare_point {
	struct virtio_bufshare_req hdr;
	__le64 handle;
	__le32 timeline;
	__le32 error;      /* SIGNAL: 0, or the status that waiters get */
	__le64 point;      /* SIGNAL: must advance its timeline, else INVAL */
	__le64 timeout_ns; /* WAIT only */
};

struct virtio_bufshare_resp_point {
	struct virtio_bufshare_resp hdr;
	__le64 reached;
};

struct virtio_bufshare_cancel { /* control queue */
	struct virtio_bufshare_req hdr;
	__le64 handle;
	__le32 cookie; /* 0: all pending sync requests of this handle */
	__le32 reserved;
};

/* ---- peers ---- */
#define VIRTIO_BUFSHARE_PEER_F_ONLINE (1u << 0)
#define VIRTIO_BUFSHARE_PEER_F_WINDOW (1u << 1) /* can map without copies */
struct virtio_bufshare_peer_info {
	struct virtio_bufshare_req hdr;
	__le32 index;
	__le32 reserved;
};

struct virtio_bufshare_resp_peer_info {
	struct virtio_bufshare_resp hdr;
	__le32 nr_peers;
	__le32 peer_id;
	__le32 flags;
	__le32 epoch;
	__u8 name[64]; /* UTF-8, NUL padded: the operator's name for the VM */
};

/* ---- events: one fixed record ---- */
struct virtio_bufshare_event {
	__le16 type;
	__le16 flags;
	__le32 status;  /* reason, VIRTIO_BUFSHARE_S_* */
	__le64 handle;  /* 0 for OFFERED, WITHDRAWN, PEER, RESYNC */
	__u8 uuid[16];
	__le32 peer_id; /* who caused it */
	__le32 access;
	__le64 size;
	__le64 generation;
	__le32 metadata_type;
	__le32 epoch;
};

#endif /* _UAPI_LINUX_VIRTIO_BUFSHARE_H */
