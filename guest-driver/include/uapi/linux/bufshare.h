/* SPDX-License-Identifier: ((GPL-2.0 WITH Linux-syscall-note) OR BSD-3-Clause) */
/*
 * User interface of /dev/bufshareN: share a buffer of this guest with the host and with other
 * virtual machines, and use theirs. Integers are native-endian. Every structure has a fixed size;
 * a flag that is not listed here and a reserved field that is not 0 are refused with EINVAL.
 *
 * A handle belongs to the open file that exported or attached it: nobody else can use it. Closing
 * the file releases its exports; the dma-bufs that it attached live on. An open file belongs to
 * one session of the device: after the device was removed or the guest was suspended it answers
 * ENODEV, and the file is to be opened again.
 *
 * Errors beyond the usual ones: EOWNERDEAD revoked, or the exporter is gone; ECANCELED released
 * while waiting; EIO the device does not answer, and nothing will work until it is probed again.
 */
#ifndef _UAPI_LINUX_BUFSHARE_H
#define _UAPI_LINUX_BUFSHARE_H

#include <linux/ioctl.h>
#include <linux/types.h>

#define BUFSHARE_PEER_HOST 1u
#define BUFSHARE_PEER_ANY 0xffffffffu

#define BUFSHARE_ACCESS_READ (1u << 0)
#define BUFSHARE_ACCESS_WRITE (1u << 1)

#define BUFSHARE_MODE_ZERO_COPY 1u /* consumers see the exporter's own pages */
#define BUFSHARE_MODE_COPY 2u /* the device copies on SYNC */

#define BUFSHARE_INFO_F_ALIVE (1u << 0) /* clear: the device does not answer any more */
#define BUFSHARE_LINGERING_UNKNOWN 0xffffffffu

/**
 * struct bufshare_info - BUFSHARE_IOC_INFO: the device and its limits
 * @flags: BUFSHARE_INFO_F_*
 * @peer_id: this endpoint
 * @epoch: changes when the device lost its session state
 * @lingering: exports of earlier sessions that somebody still uses
 * @granule: bytes; sizes and offsets in a pool are multiples of it
 * @max_segments: pieces of physically contiguous memory in one export
 * @max_buffer_size: bytes
 * @max_total_size: bytes exported at once
 * @max_exports: exports at once
 * @max_metadata: bytes
 * @max_wait_ms: upper bound of a wait in BUFSHARE_IOC_SYNC and BUFSHARE_IOC_POINT_WAIT
 * @max_waits: waits at once, in BUFSHARE_IOC_SYNC and for points
 * @features: the negotiated feature bits of the device
 * @quarantined: exports of this module whose memory is not back yet and that no open file owns
 * @max_attachments: buffers of others at once; 0: none can be attached
 * @window: bytes of others' memory that can be seen without copies; 0: it is always copied
 * @max_mappings: attached buffers that can be seen at once
 * @reserved: 0
 */
struct bufshare_info {
	__u32 flags;
	__u32 peer_id;
	__u32 epoch;
	__u32 lingering;
	__u32 granule;
	__u32 max_segments;
	__u64 max_buffer_size;
	__u64 max_total_size;
	__u32 max_exports;
	__u32 max_metadata;
	__u32 max_wait_ms;
	__u32 max_waits;
	__u64 features;
	__u32 quarantined;
	__u32 max_attachments;
	__u64 window;
	__u32 max_mappings;
	__u32 reserved;
};

/**
 * struct bufshare_alloc - BUFSHARE_IOC_ALLOC: zeroed memory that is easy to export
 * @size: bytes; in: what is needed, out: rounded up to the granule
 * @flags: 0
 * @fd: out: a dma-buf, close-on-exec
 * @reserved: 0
 */
struct bufshare_alloc {
	__u64 size;
	__u32 flags;
	__s32 fd;
	__u64 reserved[2];
};

#define BUFSHARE_EXPORT_F_ZERO_COPY (1u << 0) /* fail with EFAULT rather than copy */
#define BUFSHARE_EXPORT_F_PART (1u << 1) /* an image of a pool; see @pool */

#define BUFSHARE_METADATA_NONE 0u
#define BUFSHARE_METADATA_IMAGE 1u /* struct virtio_bufshare_image, little-endian */

/**
 * struct bufshare_export - BUFSHARE_IOC_EXPORT: offer a buffer
 * @fd: a dma-buf of this guest, from BUFSHARE_IOC_ALLOC or of another driver; -1 with F_PART
 * @flags: BUFSHARE_EXPORT_F_*
 * @access: BUFSHARE_ACCESS_*: the most that any peer can be granted
 * @mode: out: BUFSHARE_MODE_* as host consumers will see it
 * @pool: with F_PART: handle of the export that the part lies in; else 0
 * @offset: with F_PART: bytes from the start of the pool; else 0
 * @size: with F_PART: bytes; else 0 for all of the dma-buf, or exactly its size
 * @metadata: address of the metadata, or 0
 * @metadata_len: bytes
 * @metadata_type: BUFSHARE_METADATA_*, or 0x80000000 and more: private to the users
 * @name: UTF-8, NUL padded; for people
 * @handle: out: for the other requests
 * @uuid: out: names the buffer on the whole host
 * @reserved: 0
 *
 * Until the export is released and everybody has let go, the memory must not be used for anything
 * else; the driver keeps a reference to the dma-buf.
 *
 * Other virtio drivers of this guest can ask a dma-buf from BUFSHARE_IOC_ALLOC or
 * BUFSHARE_IOC_ATTACH for the UUID, if this kernel has such drivers
 * (CONFIG_VIRTIO_DMA_SHARED_BUFFER). Of several exports of a dma-buf it is that of the first.
 */
struct bufshare_export {
	__s32 fd;
	__u32 flags;
	__u32 access;
	__u32 mode;
	__u64 pool;
	__u64 offset;
	__u64 size;
	__u64 metadata;
	__u32 metadata_len;
	__u32 metadata_type;
	__u8 name[32];
	__u64 handle;
	__u8 uuid[16];
	__u64 reserved[2];
};

#define BUFSHARE_GRANT_F_ONCE (1u << 0) /* consumed by the first use */
#define BUFSHARE_GRANT_F_FORCE (1u << 1) /* with access == 0: revoke present users too */

/**
 * struct bufshare_grant - BUFSHARE_IOC_GRANT: give a peer a right, or take it back
 * @handle: of the export
 * @peer_id: BUFSHARE_PEER_HOST, BUFSHARE_PEER_ANY or a number from BUFSHARE_IOC_PEER
 * @access: BUFSHARE_ACCESS_*; replaces the earlier grant; 0 withdraws it
 * @lifetime_ms: 0: until withdrawn
 * @flags: BUFSHARE_GRANT_F_*
 * @reserved: 0
 */
struct bufshare_grant {
	__u64 handle;
	__u32 peer_id;
	__u32 access;
	__u64 lifetime_ms;
	__u32 flags;
	__u32 reserved;
};

#define BUFSHARE_SYNC_F_END (1u << 0) /* clear: BEGIN */
#define BUFSHARE_SYNC_F_READ (1u << 1)
#define BUFSHARE_SYNC_F_WRITE (1u << 2)
#define BUFSHARE_SYNC_F_NONBLOCK (1u << 3) /* EAGAIN instead of waiting; so does O_NONBLOCK */

/**
 * struct bufshare_sync - BUFSHARE_IOC_SYNC: bracket an access to the content
 * @handle: of the export or attachment
 * @offset: bytes
 * @len: bytes; 0: to the end
 * @timeout_ns: relative; longer ones are cut to max_wait_ms, and 0 of END means max_wait_ms; then
 *	ETIMEDOUT
 * @flags: BUFSHARE_SYNC_F_*
 * @reserved: 0
 * @generation: out: how often the content was declared complete
 *
 * BEGIN waits until no other endpoint is in a conflicting bracket. END first waits for the fences
 * of this guest's own devices on the dma-buf, then declares; END with WRITE advances the
 * generation. A signal ends either wait with EINTR. An END that failed declared nothing.
 *
 * END with READ waits for all of those fences, END with WRITE alone for those of writers. poll() on
 * the dma-buf tells of the same fences, as on any other. Neither knows what other endpoints do:
 * that is no fence of this guest, and only BEGIN waits for it.
 *
 * Of an attachment in COPY mode, BEGIN with READ brings the range up to date and END with WRITE
 * hands all bytes of its range to the others, those too that were not written. BEGIN with WRITE
 * alone brings nothing: in what is not written then, END finds what an earlier bracket left there,
 * or zeros, and overwrites what others wrote. So BEGIN with READ, too, unless all of END's range is
 * written. DMA_BUF_IOCTL_SYNC on its dma-buf is the same for all of it, so that
 * DMA_BUF_SYNC_WRITE without DMA_BUF_SYNC_READ is only for who writes every byte.
 */
struct bufshare_sync {
	__u64 handle;
	__u64 offset;
	__u64 len;
	__u64 timeout_ns;
	__u32 flags;
	__u32 reserved;
	__u64 generation;
};

/**
 * struct bufshare_name - BUFSHARE_IOC_SET_NAME
 * @handle: of the export
 * @name: UTF-8, NUL padded; for people
 */
struct bufshare_name {
	__u64 handle;
	__u8 name[32];
};

#define BUFSHARE_STATE_EXPORTED 1u
#define BUFSHARE_STATE_IN_USE 2u
#define BUFSHARE_STATE_RELEASING 3u
#define BUFSHARE_STATE_RELEASED 4u
#define BUFSHARE_STATE_ATTACHED 5u
#define BUFSHARE_STATE_MAPPED 6u
#define BUFSHARE_STATE_REVOKED 7u

/**
 * struct bufshare_query - BUFSHARE_IOC_QUERY
 * @handle: of the export or attachment
 * @state: out: BUFSHARE_STATE_*
 * @use_count: out: attachments, host leases, and 1 if others on the host hold it
 * @nr_mappings: out: mappings in other virtual machines
 * @access: out: as exported or attached
 * @size: out: bytes
 * @generation: out: how often the content was declared complete
 * @uuid: out
 * @mode: out: BUFSHARE_MODE_*
 * @reserved: 0
 */
struct bufshare_query {
	__u64 handle;
	__u32 state;
	__u32 use_count;
	__u32 nr_mappings;
	__u32 access;
	__u64 size;
	__u64 generation;
	__u8 uuid[16];
	__u32 mode;
	__u32 reserved;
};

#define BUFSHARE_RELEASE_F_FORCE (1u << 0) /* void all rights at once */

/**
 * struct bufshare_release - BUFSHARE_IOC_RELEASE: stop to offer, and get the memory back
 * @handle: of the export
 * @flags: BUFSHARE_RELEASE_F_*
 * @state: out: BUFSHARE_STATE_RELEASED: the memory is back and the handle is gone;
 *	BUFSHARE_STATE_RELEASING: BUFSHARE_EVENT_RELEASED will tell when it is
 */
struct bufshare_release {
	__u64 handle;
	__u32 flags;
	__u32 state;
};

#define BUFSHARE_PEER_F_ONLINE (1u << 0)
#define BUFSHARE_PEER_F_WINDOW (1u << 1) /* can map without copies */

/**
 * struct bufshare_peer - BUFSHARE_IOC_PEER: who may be granted something
 * @index: 0 to nr_peers - 1; past the end: ENOENT
 * @nr_peers: out
 * @peer_id: out
 * @flags: out: BUFSHARE_PEER_F_*
 * @epoch: out: changes when the peer lost its session state
 * @reserved: 0
 * @name: out: UTF-8, NUL padded: the operator's name for it
 */
struct bufshare_peer {
	__u32 index;
	__u32 nr_peers;
	__u32 peer_id;
	__u32 flags;
	__u32 epoch;
	__u32 reserved;
	__u8 name[64];
};

#define BUFSHARE_ATTACH_F_ZERO_COPY (1u << 0) /* fail with EACCES rather than copy */

/**
 * struct bufshare_attach - BUFSHARE_IOC_ATTACH: use a buffer that another peer offers
 * @uuid: names the buffer
 * @flags: BUFSHARE_ATTACH_F_*
 * @access: BUFSHARE_ACCESS_*: what is wanted; with READ alone @fd can only be mapped for reading
 * @metadata: address of room for the metadata, or 0
 * @metadata_len: bytes; in: how much room, out: how much there is
 * @metadata_type: out: BUFSHARE_METADATA_*
 * @fd: out: a dma-buf, close-on-exec
 * @mode: out: BUFSHARE_MODE_ZERO_COPY: @fd is the exporter's memory; BUFSHARE_MODE_COPY: a copy
 *	that BUFSHARE_IOC_SYNC or DMA_BUF_IOCTL_SYNC brings up to date
 * @handle: out: for BUFSHARE_IOC_SYNC, BUFSHARE_IOC_QUERY and events; 0: an export of this file
 * @offset: out: where the buffer begins in @fd, bytes; not 0 only for an own part
 * @size: out: bytes
 * @generation: out: how often the content was declared complete
 * @exporter: out: a peer id
 * @reserved: 0
 * @name: out: UTF-8, NUL padded
 * @reserved2: 0
 *
 * The attachment lasts as long as the dma-buf. When it is revoked, the exporter goes or the session
 * of the device ends, whoever has @fd mapped gets SIGBUS, and everything else on it fails.
 *
 * An export of this open file comes back as the dma-buf that was exported, of a part that of its
 * pool, without name, metadata and generation. Other exports of this guest are ENOENT, as all that
 * was not granted to it: a UUID is no right. Who is to use one in this guest is given its dma-buf.
 *
 * Other drivers of this guest can import @fd. What is seen without copies has no struct pages: it can
 * be mapped for the CPU, and for DMA by drivers that accept peer-to-peer memory; others get EOPNOTSUPP.
 */
struct bufshare_attach {
	__u8 uuid[16];
	__u32 flags;
	__u32 access;
	__u64 metadata;
	__u32 metadata_len;
	__u32 metadata_type;
	__s32 fd;
	__u32 mode;
	__u64 handle;
	__u64 offset;
	__u64 size;
	__u64 generation;
	__u32 exporter;
	__u32 reserved;
	__u8 name[32];
	__u64 reserved2;
};

/**
 * struct bufshare_offer - BUFSHARE_IOC_OFFER: the next buffer that may be attached
 * @id: in: that of the last one seen, 0: from the start; out: of this one; past the last: ENOENT
 * @peer_id: out: who offers it
 * @uuid: out
 * @size: out: bytes
 * @generation: out: when it was offered
 * @access: out: BUFSHARE_ACCESS_*
 * @metadata_type: out: BUFSHARE_METADATA_*
 * @reserved: 0
 *
 * BUFSHARE_EVENT_OFFERED and BUFSHARE_EVENT_WITHDRAWN tell what changes afterwards.
 */
struct bufshare_offer {
	__u32 id;
	__u32 peer_id;
	__u8 uuid[16];
	__u64 size;
	__u64 generation;
	__u32 access;
	__u32 metadata_type;
	__u64 reserved;
};

#define BUFSHARE_TIMELINE_ACQUIRE 0u /* "content N is ready": one of each buffer */
#define BUFSHARE_TIMELINE_RELEASE 1u /* "I am done with N": one of each attachment and host lease */

/**
 * struct bufshare_point_signal - BUFSHARE_IOC_POINT_SIGNAL: a timeline reaches a point
 * @handle: of the export or attachment
 * @point: more than what the timeline reached, else EINVAL
 * @timeline: BUFSHARE_TIMELINE_*: ACQUIRE needs BUFSHARE_ACCESS_WRITE, and RELEASE an attachment
 * @error: 0, or an enum virtio_bufshare_status, whose errno those get who wait for this very point;
 *	not BUSY, TIMEDOUT or AGAIN: these mean to those who wait that it is not reached
 *
 * Timelines order those who use a buffer by numbers that only grow, as those of a drm_syncobj do.
 * They are user space's: nobody knows what a point means, and neither a fence nor BUFSHARE_IOC_SYNC
 * waits for one. Nor does a point move bytes or wait for devices of this guest: BUFSHARE_IOC_SYNC
 * does, with END before "ready" and BEGIN after it.
 *
 * Without VIRTIO_BUFSHARE_F_TIMELINE in bufshare_info.features EOPNOTSUPP.
 */
struct bufshare_point_signal {
	__u64 handle;
	__u64 point;
	__u32 timeline;
	__u32 error;
};

#define BUFSHARE_POINT_F_NONBLOCK (1u << 0) /* EAGAIN instead of waiting; so does O_NONBLOCK */

/**
 * struct bufshare_point_wait - BUFSHARE_IOC_POINT_WAIT: until a timeline reaches a point
 * @handle: of the export or attachment
 * @point: 0 is reached from the start, so that waiting for it tells @reached
 * @timeline: BUFSHARE_TIMELINE_*; RELEASE of an export: until all who use it now reached the point
 *	or are gone; of an attachment: its own
 * @flags: BUFSHARE_POINT_F_*
 * @timeout_ns: relative; longer ones are cut to max_wait_ms; then ETIMEDOUT
 * @reached: out: what the timeline reached; RELEASE of an export: the least of all who use it,
 *	~0 where nobody does
 *
 * Who waits may come before who signals, as with DRM_SYNCOBJ_WAIT_FLAGS_WAIT_FOR_SUBMIT. If the point
 * was signalled with an error, the wait fails with it, unless a later point is reached before it
 * is asked for. A signal ends a wait with EINTR, RELEASE those for an export with ECANCELED, and
 * EOWNERDEAD says that the attachment is revoked. EBUSY: max_waits are pending.
 */
struct bufshare_point_wait {
	__u64 handle;
	__u64 point;
	__u32 timeline;
	__u32 flags;
	__u64 timeout_ns;
	__u64 reached;
};

/**
 * struct bufshare_point_eventfd - BUFSHARE_IOC_POINT_EVENTFD: an eventfd waits for a point
 * @handle: of the export or attachment
 * @point: as in BUFSHARE_IOC_POINT_WAIT, as @timeline
 * @timeline: BUFSHARE_TIMELINE_*
 * @fd: the eventfd; may be closed afterwards
 * @flags: 0
 * @reserved: 0
 *
 * 1 is added to the eventfd once, without a timeout: when the point is reached, or at once if it is,
 * or when it will not be: signalled with an error, revoked, released, this file closed, or the
 * device gone. BUFSHARE_IOC_POINT_WAIT with BUFSHARE_POINT_F_NONBLOCK then tells which it was.
 * At most half of max_waits are for eventfds, for all files together, else EBUSY.
 */
struct bufshare_point_eventfd {
	__u64 handle;
	__u64 point;
	__u32 timeline;
	__s32 fd;
	__u32 flags;
	__u32 reserved;
};

#define BUFSHARE_IOC_MAGIC 0xbd
#define BUFSHARE_IOC_INFO _IOR(BUFSHARE_IOC_MAGIC, 0x00, struct bufshare_info)
#define BUFSHARE_IOC_ALLOC _IOWR(BUFSHARE_IOC_MAGIC, 0x01, struct bufshare_alloc)
#define BUFSHARE_IOC_EXPORT _IOWR(BUFSHARE_IOC_MAGIC, 0x02, struct bufshare_export)
#define BUFSHARE_IOC_GRANT _IOW(BUFSHARE_IOC_MAGIC, 0x03, struct bufshare_grant)
#define BUFSHARE_IOC_SYNC _IOWR(BUFSHARE_IOC_MAGIC, 0x04, struct bufshare_sync)
#define BUFSHARE_IOC_SET_NAME _IOW(BUFSHARE_IOC_MAGIC, 0x05, struct bufshare_name)
#define BUFSHARE_IOC_QUERY _IOWR(BUFSHARE_IOC_MAGIC, 0x06, struct bufshare_query)
#define BUFSHARE_IOC_RELEASE _IOWR(BUFSHARE_IOC_MAGIC, 0x07, struct bufshare_release)
#define BUFSHARE_IOC_PEER _IOWR(BUFSHARE_IOC_MAGIC, 0x08, struct bufshare_peer)
#define BUFSHARE_IOC_ATTACH _IOWR(BUFSHARE_IOC_MAGIC, 0x09, struct bufshare_attach)
#define BUFSHARE_IOC_OFFER _IOWR(BUFSHARE_IOC_MAGIC, 0x0a, struct bufshare_offer)
#define BUFSHARE_IOC_POINT_SIGNAL _IOW(BUFSHARE_IOC_MAGIC, 0x0b, struct bufshare_point_signal)
#define BUFSHARE_IOC_POINT_WAIT _IOWR(BUFSHARE_IOC_MAGIC, 0x0c, struct bufshare_point_wait)
#define BUFSHARE_IOC_POINT_EVENTFD _IOW(BUFSHARE_IOC_MAGIC, 0x0d, struct bufshare_point_eventfd)

#define BUFSHARE_EVENT_RELEASED 0x1000u /* the memory is back: the last event of a handle */
#define BUFSHARE_EVENT_IDLE 0x1001u /* nobody uses it any more; still exported */
#define BUFSHARE_EVENT_BUSY 0x1002u /* somebody uses it */
#define BUFSHARE_EVENT_OFFERED 0x1100u /* a peer offers a buffer */
#define BUFSHARE_EVENT_REVOKED 0x1101u /* an attachment is dead: its last event */
#define BUFSHARE_EVENT_WITHDRAWN 0x1102u /* an offer is gone */
#define BUFSHARE_EVENT_CHANGED 0x1103u /* the generation advanced; only the latest is told */
#define BUFSHARE_EVENT_PEER 0x1200u /* a peer came, went or changed epoch */
#define BUFSHARE_EVENT_RESYNC 0x12ffu /* something was missed: ask INFO, QUERY and OFFER again */

/**
 * struct bufshare_event - what read() returns, as many as fit
 * @type: BUFSHARE_EVENT_*
 * @flags: ignore
 * @status: 0, or the reason: enum virtio_bufshare_status
 * @handle: of the export or attachment; 0 for OFFERED, WITHDRAWN, PEER and RESYNC
 * @uuid: of the buffer
 * @peer_id: who caused it
 * @access: BUFSHARE_ACCESS_*
 * @size: bytes
 * @generation: how often the content was declared complete
 * @metadata_type: BUFSHARE_METADATA_*
 * @epoch: of the peer, or of the device
 *
 * Events tell states, not histories: of one kind and handle only the latest is kept, so none is
 * lost however late they are read. Unknown types are to be ignored.
 */
struct bufshare_event {
	__u16 type;
	__u16 flags;
	__u32 status;
	__u64 handle;
	__u8 uuid[16];
	__u32 peer_id;
	__u32 access;
	__u64 size;
	__u64 generation;
	__u32 metadata_type;
	__u32 epoch;
};

#endif /* _UAPI_LINUX_BUFSHARE_H */
