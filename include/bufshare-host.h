/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * The host socket of vhost-device-bufshare: the bytes between the daemon and a program on the same
 * host. The text is spec/host-socket.md; its listings are this file.
 *
 * All integers are little-endian. No implicit padding; every 64-bit field is 8-byte aligned; every
 * fixed part is a multiple of 8 bytes. `reserved` is 0 in a request, else it is refused with INVAL;
 * in a response or an event it is ignored.
 */
#ifndef BUFSHARE_HOST_H
#define BUFSHARE_HOST_H

#include <stddef.h>
#include <stdint.h>

typedef uint16_t bufshare_le16;
typedef uint32_t bufshare_le32;
typedef uint64_t bufshare_le64;

/* ---- constants ------------------------------------------------------------------------------ */
#define BUFSHARE_HOST_VERSION    1u
#define BUFSHARE_HOST_MAX_PACKET 8192u /* bytes; no packet in either direction is longer */

#define BUFSHARE_PEER_HOST 1u
#define BUFSHARE_PEER_ANY  0xffffffffu

enum bufshare_host_type {
	/* any client */
	BUFSHARE_HOST_HELLO        = 0x0001, /* first request of a connection */
	BUFSHARE_HOST_LIST         = 0x0002,
	BUFSHARE_HOST_WATCH        = 0x0003,
	BUFSHARE_HOST_QUERY        = 0x0004,
	BUFSHARE_HOST_STATS        = 0x0005,
	BUFSHARE_HOST_INSPECT      = 0x0006,
	BUFSHARE_HOST_HOLDERS      = 0x0007,
	BUFSHARE_HOST_PEERS        = 0x0008,
	/* the holder of a lease; RELEASE, SYNC and CANCEL: an exporter, too */
	BUFSHARE_HOST_ACQUIRE      = 0x0100,
	BUFSHARE_HOST_RELEASE      = 0x0101,
	BUFSHARE_HOST_SYNC         = 0x0102, /* BEGIN and END; BEGIN may stay pending */
	BUFSHARE_HOST_CANCEL       = 0x0103,
	BUFSHARE_HOST_POINT_SIGNAL = 0x0104,
	BUFSHARE_HOST_POINT_WAIT   = 0x0105, /* may stay pending */
	/* an exporter */
	BUFSHARE_HOST_EXPORT       = 0x0200,
	BUFSHARE_HOST_GRANT        = 0x0201,
	/* events of own exports */
	BUFSHARE_HOST_EVT_RELEASED  = 0x1000,
	BUFSHARE_HOST_EVT_IDLE      = 0x1001,
	BUFSHARE_HOST_EVT_BUSY      = 0x1002,
	/* events of a WATCH; CHANGED of own exports, too */
	BUFSHARE_HOST_EVT_OFFERED   = 0x1100,
	BUFSHARE_HOST_EVT_REVOKED   = 0x1101,
	BUFSHARE_HOST_EVT_WITHDRAWN = 0x1102,
	BUFSHARE_HOST_EVT_CHANGED   = 0x1103,
	BUFSHARE_HOST_EVT_RESYNC    = 0x12ff, /* kept: this version never needs to send it */
};

enum bufshare_status { /* VIRTIO_BUFSHARE_S_* */
	BUFSHARE_S_OK       = 0,
	BUFSHARE_S_UNSUPP   = 1,
	BUFSHARE_S_INVAL    = 2,
	BUFSHARE_S_NOENT    = 3,
	BUFSHARE_S_ACCESS   = 4,
	BUFSHARE_S_BUSY     = 5,
	BUFSHARE_S_NOMEM    = 6,
	BUFSHARE_S_QUOTA    = 7,
	BUFSHARE_S_RANGE    = 8,
	BUFSHARE_S_FAULT    = 9,
	BUFSHARE_S_TOOMANY  = 10,
	BUFSHARE_S_TIMEDOUT = 11,
	BUFSHARE_S_REVOKED  = 12,
	BUFSHARE_S_CANCELED = 13,
	BUFSHARE_S_AGAIN    = 14,
	BUFSHARE_S_IO       = 15,
};

#define BUFSHARE_ACCESS_READ  (1u << 0)
#define BUFSHARE_ACCESS_WRITE (1u << 1)

#define BUFSHARE_MODE_ZERO_COPY 1u /* the fd holds the exporter's own pages */
#define BUFSHARE_MODE_COPY      2u /* the daemon copies on SYNC             */

#define BUFSHARE_METADATA_NONE  0u
#define BUFSHARE_METADATA_IMAGE 1u

#define BUFSHARE_ACQUIRE_F_ZERO_COPY (1u << 0) /* fail with ACCESS rather than copy */
#define BUFSHARE_ACQUIRE_F_NOTICE    (1u << 1) /* time to finish when revoked by force */

#define BUFSHARE_SYNC_F_END      (1u << 0) /* clear: BEGIN */
#define BUFSHARE_SYNC_F_READ     (1u << 1)
#define BUFSHARE_SYNC_F_WRITE    (1u << 2)
#define BUFSHARE_SYNC_F_NONBLOCK (1u << 3)

#define BUFSHARE_FD_DMABUF 1u
#define BUFSHARE_FD_MEMFD  2u

#define BUFSHARE_LEASE_F_WRITABLE (1u << 0) /* the fd can be written whatever the access says */

#define BUFSHARE_PEER_F_ONLINE (1u << 0) /* its device is in use */

#define BUFSHARE_GRANT_F_ONCE  (1u << 0) /* consumed by the first ATTACH                  */
#define BUFSHARE_GRANT_F_FORCE (1u << 1) /* with access == 0: revoke attachments too      */

#define BUFSHARE_RELEASE_F_FORCE (1u << 0) /* of an export: void all rights at once */

enum bufshare_state { /* VIRTIO_BUFSHARE_ST_* */
	BUFSHARE_ST_RELEASING = 3,
	BUFSHARE_ST_RELEASED  = 4,
};

enum bufshare_fault { /* `detail` of FAULT */
	BUFSHARE_FAULT_KIND     = 1, /* neither a dma-buf nor a memfd of ordinary pages        */
	BUFSHARE_FAULT_UNSEALED = 2, /* a memfd without F_SEAL_SHRINK                          */
	BUFSHARE_FAULT_ACCESS   = 3, /* sealed against, or not open for, the access that is asked */
	BUFSHARE_FAULT_SIZE     = 4, /* `size` is not the size of the fd                       */
	BUFSHARE_FAULT_MAP      = 5, /* a dma-buf that cannot be mapped                        */
};

/* ---- headers -------------------------------------------------------------------------------- */
struct bufshare_host_req {
	bufshare_le16 type;
	bufshare_le16 flags;
	bufshare_le32 reserved;
	bufshare_le64 cookie; /* the client's own number, echoed by the response */
};
struct bufshare_host_resp { /* responses and events */
	bufshare_le16 type;   /* of the request, or BUFSHARE_HOST_EVT_* */
	bufshare_le16 status; /* event: the reason */
	bufshare_le32 detail; /* HELLO with UNSUPP: the daemon's version; EXPORT with FAULT: why; else 0 */
	bufshare_le64 cookie; /* of the request; event: of the WATCH, or of the EXPORT */
};

/* ---- a buffer that is offered to the host ----------------------------------------------------- */
struct bufshare_host_buffer {
	uint8_t uuid[16];
	uint8_t name[32];             /* UTF-8, NUL padded; for people */
	uint8_t exporter_name[64];    /* UTF-8, NUL padded: the operator's name for the VM, or "host" */
	bufshare_le64 size;           /* bytes */
	bufshare_le64 generation;     /* completed SYNC(END|WRITE) of any endpoint */
	bufshare_le32 exporter;       /* peer id */
	bufshare_le32 access;         /* the most that a lease can have; 0: not offered any more */
	bufshare_le32 mode;           /* BUFSHARE_MODE_* */
	bufshare_le32 use_count;      /* attachments + leases + 1 if others on the host hold it */
	bufshare_le32 metadata_type;
	bufshare_le32 metadata_len;   /* bytes */
	bufshare_le32 reserved[2];
};

/* Metadata of type IMAGE: the bytes of struct virtio_bufshare_image. */
struct bufshare_plane {
	bufshare_le64 offset; /* bytes from the start of the buffer */
	bufshare_le32 stride; /* bytes */
	bufshare_le32 reserved;
};
struct bufshare_image {
	bufshare_le32 fourcc;    /* DRM_FORMAT_* */
	bufshare_le32 nr_planes; /* 1..4 */
	bufshare_le64 modifier;  /* DRM_FORMAT_MOD_* */
	bufshare_le32 width;     /* pixels */
	bufshare_le32 height;    /* pixels */
	struct bufshare_plane planes[4];
};

/* ---- HELLO ------------------------------------------------------------------------------------ */
struct bufshare_host_hello {
	struct bufshare_host_req hdr;
	bufshare_le32 version; /* BUFSHARE_HOST_VERSION */
	bufshare_le32 reserved;
	uint8_t name[32];      /* of the client, UTF-8, NUL padded; for people */
};
struct bufshare_host_resp_hello {
	struct bufshare_host_resp hdr;
	bufshare_le32 version;
	bufshare_le32 peer_id;     /* BUFSHARE_PEER_HOST */
	bufshare_le32 max_leases;  /* per client; more: QUOTA */
	bufshare_le32 max_waits;   /* pending BEGINs and WAITs per client; more: BUSY */
	bufshare_le32 max_wait_ms; /* upper bound of any wait */
	bufshare_le32 max_exports; /* per client; more: QUOTA */
	uint8_t daemon[64];        /* name and release of the daemon; for people */
};

/* ---- LIST: the offers whose UUIDs, as bytes, follow `after`, in that order ---------------------- */
struct bufshare_host_list {
	struct bufshare_host_req hdr;
	uint8_t after[16]; /* zeros: from the start */
};
struct bufshare_host_resp_list {
	struct bufshare_host_resp hdr;
	bufshare_le32 count; /* 0: no more */
	bufshare_le32 reserved;
	/* struct bufshare_host_buffer buffers[count]; */
};

/* ---- WATCH: replaces the connection's watch ----------------------------------------------------- */
struct bufshare_host_watch {
	struct bufshare_host_req hdr;
	uint8_t uuid[16]; /* zeros: every buffer */
};
struct bufshare_host_event {
	struct bufshare_host_resp hdr;
	struct bufshare_host_buffer buffer; /* as it is now; WITHDRAWN, REVOKED, RELEASED: uuid only */
};

/* ---- QUERY ---------------------------------------------------------------------------------------- */
struct bufshare_host_query {
	struct bufshare_host_req hdr;
	uint8_t uuid[16];
};
struct bufshare_host_lease {
	bufshare_le64 lease;
	bufshare_le32 pid; /* of the client when it connected, as the daemon sees it */
	bufshare_le32 access;
	uint8_t client[32];
};
struct bufshare_host_resp_query {
	struct bufshare_host_resp hdr;
	struct bufshare_host_buffer buffer;
	bufshare_le32 count;     /* leases that follow */
	bufshare_le32 nr_leases; /* all leases; may exceed count */
	/* u8 metadata[buffer.metadata_len], then zeros up to a multiple of 8 */
	/* struct bufshare_host_lease leases[count]; */
};

/* ---- STATS ---------------------------------------------------------------------------------------- */
struct bufshare_host_stats {
	struct bufshare_host_req hdr;
	bufshare_le32 first; /* index */
	bufshare_le32 reserved;
};
struct bufshare_host_stat {
	uint8_t name[32]; /* ASCII, NUL padded */
	bufshare_le64 value;
};
struct bufshare_host_resp_stats {
	struct bufshare_host_resp hdr;
	bufshare_le32 count;    /* values that follow */
	bufshare_le32 nr_stats; /* all values */
	/* struct bufshare_host_stat stats[count]; */
};

/* ---- PEERS: those that may share with the host, in either direction ------------------------------ */
struct bufshare_host_peers {
	struct bufshare_host_req hdr;
	bufshare_le32 first; /* index */
	bufshare_le32 reserved;
};
struct bufshare_host_peer {
	bufshare_le32 peer_id;
	bufshare_le32 flags;  /* BUFSHARE_PEER_F_* */
	bufshare_le32 access; /* the most that policy lets a host client grant it */
	bufshare_le32 reserved;
	uint8_t name[64];     /* UTF-8, NUL padded: the operator's name for the VM */
};
struct bufshare_host_resp_peers {
	struct bufshare_host_resp hdr;
	bufshare_le32 count;    /* peers that follow */
	bufshare_le32 nr_peers; /* all peers */
	/* struct bufshare_host_peer peers[count]; */
};

/* ---- ACQUIRE: the response carries one fd -------------------------------------------------------- */
struct bufshare_host_acquire {
	struct bufshare_host_req hdr; /* flags: BUFSHARE_ACQUIRE_F_* */
	uint8_t uuid[16];
	bufshare_le32 access;
	bufshare_le32 reserved;
};
struct bufshare_host_resp_acquire {
	struct bufshare_host_resp hdr;
	bufshare_le64 lease;   /* not 0; never reused while the daemon runs */
	bufshare_le32 access;
	bufshare_le32 mode;    /* of this lease: COPY where policy says read-only */
	bufshare_le32 fd_kind; /* BUFSHARE_FD_* */
	bufshare_le32 flags;   /* BUFSHARE_LEASE_F_* */
	struct bufshare_host_buffer buffer;
	/* u8 metadata[buffer.metadata_len] */
};

/* ---- RELEASE, SYNC, CANCEL ------------------------------------------------------------------------- */
struct bufshare_host_release {
	struct bufshare_host_req hdr; /* flags: BUFSHARE_RELEASE_F_* */
	bufshare_le64 lease;          /* or handle of an export */
};
struct bufshare_host_resp_release {
	struct bufshare_host_resp hdr;
	bufshare_le32 state;     /* BUFSHARE_ST_* */
	bufshare_le32 use_count; /* RELEASING: what is still waited for */
};
struct bufshare_host_sync {
	struct bufshare_host_req hdr; /* flags: BUFSHARE_SYNC_F_* */
	bufshare_le64 lease;      /* or handle of an export */
	bufshare_le64 offset;     /* bytes */
	bufshare_le64 len;        /* bytes; 0: to the end */
	bufshare_le64 timeout_ns; /* relative; at most max_wait_ms */
};
struct bufshare_host_resp_sync {
	struct bufshare_host_resp hdr;
	bufshare_le64 generation;
};
struct bufshare_host_cancel {
	struct bufshare_host_req hdr;
	bufshare_le64 target; /* cookie of a pending BEGIN or WAIT of this connection */
};

/* ---- POINT_SIGNAL, POINT_WAIT ---------------------------------------------------------------------- */
#define BUFSHARE_TL_ACQUIRE 0u
#define BUFSHARE_TL_RELEASE 1u

struct bufshare_host_point {
	struct bufshare_host_req hdr;
	bufshare_le64 lease;      /* or handle of an export */
	bufshare_le32 timeline;   /* BUFSHARE_TL_* */
	bufshare_le32 error;      /* SIGNAL: 0, or the status that waiters get */
	bufshare_le64 point;
	bufshare_le64 timeout_ns; /* WAIT: relative; at most max_wait_ms */
};
struct bufshare_host_resp_point {
	struct bufshare_host_resp hdr;
	bufshare_le64 reached;
};

/* ---- INSPECT, HOLDERS ------------------------------------------------------------------------------ */
#define BUFSHARE_HOLDER_EXPORTER   1u
#define BUFSHARE_HOLDER_LEASE      2u
#define BUFSHARE_HOLDER_ATTACHMENT 3u
#define BUFSHARE_HOLDER_F_REVOKED  (1u << 0) /* dead, but not handed back */
#define BUFSHARE_HOLDER_F_FENCE    (1u << 1) /* waits for a fence of the host */
#define BUFSHARE_REPORT_F_OWNER_GONE (1u << 0) /* its exporter's session is over */

struct bufshare_host_inspect {
	struct bufshare_host_req hdr;
	uint8_t after[16]; /* zeros: from the start */
};
struct bufshare_host_report {
	struct bufshare_host_buffer buffer;
	bufshare_le64 age_ms;         /* since EXPORT */
	bufshare_le32 state;          /* VIRTIO_BUFSHARE_ST_*, as the exporter sees it */
	bufshare_le32 nr_leases;
	bufshare_le32 nr_attachments; /* of other VMs */
	bufshare_le32 nr_mappings;    /* of these attachments */
	bufshare_le32 nr_waits;       /* pending BEGINs and WAITs of anybody */
	bufshare_le32 flags;          /* BUFSHARE_REPORT_F_* */
};
struct bufshare_host_resp_inspect {
	struct bufshare_host_resp hdr;
	bufshare_le32 count; /* 0: no more */
	bufshare_le32 reserved;
	/* struct bufshare_host_report reports[count]; */
};
struct bufshare_host_holders {
	struct bufshare_host_req hdr;
	uint8_t uuid[16];
	bufshare_le32 first; /* index */
	bufshare_le32 reserved;
};
struct bufshare_host_holder {
	uint8_t name[64];          /* the operator's name for the VM; what the client calls itself */
	bufshare_le64 number;      /* of the lease; handle of the export or attachment */
	bufshare_le64 age_ms;      /* since ACQUIRE, ATTACH or EXPORT */
	bufshare_le32 kind;        /* BUFSHARE_HOLDER_* */
	bufshare_le32 peer;        /* peer id */
	bufshare_le32 pid;         /* of a host client when it connected, as the daemon sees it; else 0 */
	bufshare_le32 access;      /* what it may do */
	bufshare_le32 holds;       /* BEGIN without END */
	bufshare_le32 waits;       /* BEGIN that is pending */
	bufshare_le32 place;       /* of its first pending BEGIN in the queue, from 1; 0: none */
	bufshare_le32 left_ms;     /* until that one times out */
	bufshare_le32 nr_mappings; /* ATTACHMENT */
	bufshare_le32 flags;       /* BUFSHARE_HOLDER_F_* */
	bufshare_le64 acquire_point; /* of ACQUIRE, the next one that it waits for; 0: none */
	bufshare_le64 release_point; /* of RELEASE */
	bufshare_le64 released;      /* what its own RELEASE reached */
	bufshare_le32 points_left_ms; /* until the first of these waits times out */
	bufshare_le32 reserved;
};
struct bufshare_host_resp_holders {
	struct bufshare_host_resp hdr;
	struct bufshare_host_report report;
	bufshare_le64 device;     /* st_dev and st_ino of the fd that leases get; 0: there is none */
	bufshare_le64 inode;
	bufshare_le32 references; /* on this host, besides the daemon's own; ~0: unknown */
	bufshare_le32 fd_kind;    /* BUFSHARE_FD_* */
	bufshare_le32 count;      /* holders that follow */
	bufshare_le32 nr_holders; /* all holders */
	bufshare_le64 acquired;   /* what ACQUIRE reached */
	/* struct bufshare_host_holder holders[count]; */
};

/* ---- EXPORT: the request carries one fd; GRANT replaces what the peer was granted ----------------- */
struct bufshare_host_export {
	struct bufshare_host_req hdr;
	bufshare_le64 size;          /* bytes: of the whole fd */
	bufshare_le32 access;        /* the most that any peer can be granted */
	bufshare_le32 metadata_type;
	bufshare_le32 metadata_len;  /* bytes */
	bufshare_le32 reserved;
	uint8_t name[32];            /* UTF-8, NUL padded; for people */
	/* u8 metadata[metadata_len] */
};
struct bufshare_host_resp_export {
	struct bufshare_host_resp hdr;
	bufshare_le64 handle;  /* not 0; never reused while the daemon runs, for a lease neither */
	uint8_t uuid[16];      /* version 4, made by the daemon */
	bufshare_le32 fd_kind; /* BUFSHARE_FD_*: what VMs can map, if anything */
	bufshare_le32 reserved;
};
struct bufshare_host_grant {
	struct bufshare_host_req hdr; /* flags: BUFSHARE_GRANT_F_* */
	bufshare_le64 handle;
	bufshare_le32 peer_id;
	bufshare_le32 access;         /* 0 withdraws */
	bufshare_le64 lifetime_ms;    /* 0: until withdrawn */
};

#ifndef __cplusplus
#define BUFSHARE_SIZE(t, n) _Static_assert(sizeof(struct t) == (n) && (n) % 8 == 0, #t)
BUFSHARE_SIZE(bufshare_host_req, 16);
BUFSHARE_SIZE(bufshare_host_resp, 16);
BUFSHARE_SIZE(bufshare_host_buffer, 160);
BUFSHARE_SIZE(bufshare_plane, 16);
BUFSHARE_SIZE(bufshare_image, 88);
BUFSHARE_SIZE(bufshare_host_hello, 56);
BUFSHARE_SIZE(bufshare_host_resp_hello, 104);
BUFSHARE_SIZE(bufshare_host_list, 32);
BUFSHARE_SIZE(bufshare_host_resp_list, 24);
BUFSHARE_SIZE(bufshare_host_watch, 32);
BUFSHARE_SIZE(bufshare_host_event, 176);
BUFSHARE_SIZE(bufshare_host_query, 32);
BUFSHARE_SIZE(bufshare_host_lease, 48);
BUFSHARE_SIZE(bufshare_host_resp_query, 184);
BUFSHARE_SIZE(bufshare_host_stats, 24);
BUFSHARE_SIZE(bufshare_host_stat, 40);
BUFSHARE_SIZE(bufshare_host_resp_stats, 24);
BUFSHARE_SIZE(bufshare_host_peers, 24);
BUFSHARE_SIZE(bufshare_host_peer, 80);
BUFSHARE_SIZE(bufshare_host_resp_peers, 24);
BUFSHARE_SIZE(bufshare_host_acquire, 40);
BUFSHARE_SIZE(bufshare_host_resp_acquire, 200);
BUFSHARE_SIZE(bufshare_host_release, 24);
BUFSHARE_SIZE(bufshare_host_resp_release, 24);
BUFSHARE_SIZE(bufshare_host_sync, 48);
BUFSHARE_SIZE(bufshare_host_resp_sync, 24);
BUFSHARE_SIZE(bufshare_host_cancel, 24);
BUFSHARE_SIZE(bufshare_host_point, 48);
BUFSHARE_SIZE(bufshare_host_resp_point, 24);
BUFSHARE_SIZE(bufshare_host_inspect, 32);
BUFSHARE_SIZE(bufshare_host_report, 192);
BUFSHARE_SIZE(bufshare_host_resp_inspect, 24);
BUFSHARE_SIZE(bufshare_host_holders, 40);
BUFSHARE_SIZE(bufshare_host_holder, 152);
BUFSHARE_SIZE(bufshare_host_resp_holders, 248);
BUFSHARE_SIZE(bufshare_host_export, 72);
BUFSHARE_SIZE(bufshare_host_resp_export, 48);
BUFSHARE_SIZE(bufshare_host_grant, 40);
#undef BUFSHARE_SIZE
#endif

#endif
