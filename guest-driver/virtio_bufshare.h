/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the files of the virtio_bufshare module know of each other.
 *
 * main      probe, sessions, events, power management
 * queue     messages on the virtqueues; knows nothing of what they say
 * request   what is said: one function per request of the wire header
 * ask       the same, what an importer says
 * loan      exports whose memory the device may still use
 * quarantine those that no open file can end
 * file      what an open file owns and is told
 * memory    the pages behind an export, as the device is to see them
 * buffer    memory that this module allocates, and dma-bufs of it
 * offer     what others offer to this guest
 * import    attachments to buffers of others
 * bracket   who of this guest is using them
 * view      the dma-buf of an import
 * window    who has which part of the window
 * chardev   /dev/bufshareN
 * attach    its requests for importers
 * point     its requests about timelines
 *
 * Locks, outermost first: bufshare_import.begin_lock, bufshare.users, bufshare_import.sync_lock,
 * bufshare.export_lock, bufshare_import.view_lock, dma_resv locks and mmap_lock,
 * bufshare_import.lock, bufshare_buffer.lock, the loan lock (a spinlock, in loan.c),
 * bufshare_queue.lock (taken in interrupts).
 */
#ifndef _VIRTIO_BUFSHARE_H
#define _VIRTIO_BUFSHARE_H

#include <linux/cdev.h>
#include <linux/completion.h>
#include <linux/device.h>
#include <linux/dma-resv.h>
#include <linux/kref.h>
#include <linux/list.h>
#include <linux/mutex.h>
#include <linux/notifier.h>
#include <linux/rwsem.h>
#include <linux/scatterlist.h>
#include <linux/sizes.h>
#include <linux/spinlock.h>
#include <linux/types.h>
#include <linux/uuid.h>
#include <linux/virtio.h>
#include <linux/virtio_dma_buf.h>
#include <linux/wait.h>
#include <linux/workqueue.h>
#include <linux/xarray.h>

#include <uapi/linux/bufshare.h>
#include <uapi/linux/virtio_bufshare.h>

struct bufshare_memory;
struct dma_buf;
struct dma_buf_attachment;
struct inode;
struct iosys_map;
struct virtio_shm_region;

/* A request that is bounded by nature and has no answer by then will never have one. */
#define BUFSHARE_ANSWER_TIMEOUT (30 * HZ)
/* More than any virtqueue can carry; keeps the length of a request in an int. */
#define BUFSHARE_MAX_SEGMENTS 1000000U
/* Bytes; a device that wants more is refused. */
#define BUFSHARE_MAX_METADATA SZ_4K

/* ---- queue ---- */

/**
 * struct bufshare_queue - a virtqueue
 * @vq: the virtqueue
 * @lock: guards @vq, @inflight and the state of the messages on it
 * @inflight: messages that the device may still write to
 * @space: woken when descriptors came back
 */
struct bufshare_queue {
	struct virtqueue *vq;
	spinlock_t lock; /* guards the rest */
	struct list_head inflight;
	wait_queue_head_t space;
};

enum bufshare_msg_state {
	BUFSHARE_MSG_NEW,
	BUFSHARE_MSG_PENDING,
	BUFSHARE_MSG_ANSWERED,
	BUFSHARE_MSG_ABORTED,
};

/**
 * struct bufshare_msg - a request and the room for its response
 * @ref: one for the waiter, one for the device from submission to the used ring
 * @node: in bufshare_queue.inflight
 * @done: completed when @state is neither new nor pending
 * @then: runs at once when @done is completed, or NULL
 * @state: see enum bufshare_msg_state
 * @req: the request; contiguous in virtual memory only
 * @resp: the response, from kmalloc()
 * @req_len: bytes
 * @resp_len: bytes that a complete response has at most
 * @resp_need: bytes that it has at least
 * @used: bytes that the device says it wrote
 * @status: from the response, read once
 */
struct bufshare_msg {
	struct kref ref;
	struct list_head node;
	struct completion done;
	struct delayed_work *then;
	enum bufshare_msg_state state;
	void *req;
	void *resp;
	u32 req_len;
	u32 resp_len;
	u32 resp_need;
	u32 used;
	u16 status;
};

/* ---- one device ---- */

/**
 * struct bufshare_config - the configuration space, native-endian
 * @peer_id: see struct virtio_bufshare_config, as all of these
 * @epoch: ...
 * @granule: ...
 * @max_segments: ...
 * @max_buffer_size: ...
 * @max_total_size: ...
 * @max_exports: ...
 * @max_attachments: ...
 * @max_mappings: ...
 * @max_metadata: ...
 * @event_size: ...
 * @max_wait_ms: ...
 * @lingering: ...
 * @max_waits: ...
 */
struct bufshare_config {
	u32 peer_id;
	u32 epoch;
	u32 granule;
	u32 max_segments;
	u64 max_buffer_size;
	u64 max_total_size;
	u32 max_exports;
	u32 max_attachments;
	u32 max_mappings;
	u32 max_metadata;
	u32 event_size;
	u32 max_wait_ms;
	u32 lingering;
	u32 max_waits;
};

/**
 * struct bufshare_window - a shared memory region of the device
 * @lock: guards @used
 * @start: guest-physical address
 * @len: bytes; 0: there is none
 * @granule: bytes that a bit of @used stands for
 * @count: bits of @used
 * @used: what is taken
 */
struct bufshare_window {
	struct mutex lock; /* guards used */
	phys_addr_t start;
	u64 len;
	u32 granule;
	unsigned long count;
	unsigned long *used;
};

/**
 * struct bufshare - one device, from probe until nobody knows it any more
 * @dev: the device of /dev/bufshareN; counts references
 * @cdev: /dev/bufshareN
 * @vdev: the virtio device; to be used while @session is not 0
 * @where: name of the bus device, to know it again after unbind and bind
 * @users: held for reading by whoever uses the queues, for writing to start or end a session
 * @session: number of the running session, unique in the module; 0: none
 * @closing: the session is about to end: no new users, no waits
 * @dead: the device stopped to answer; stays until the session ends
 * @control: control queue
 * @sync: sync queue
 * @event: event queue
 * @event_bufs: what @event is filled with
 * @nr_event_bufs: number of @event_bufs
 * @event_work: takes events from @event
 * @features: negotiated
 * @config: limits; lingering, max_mappings and epoch change with EVT_RESYNC
 * @window: where buffers of others can be shown
 * @export_lock: held from EXPORT or ATTACH to the entry of its handle, so that no event comes in
 *	between
 * @cookie: of the last sync request
 * @waits: sync requests that may stay pending
 * @watches: how many of these are for eventfds
 * @files: open files, guarded by the loan lock
 * @imports: attachments that the device knows, guarded by the loan lock
 * @kept: imports whose memory the device may write until it is reset, guarded by the loan lock
 * @offers: what others offer, by number
 * @reboot: releases everything before a reboot or kexec
 */
struct bufshare {
	struct device dev;
	struct cdev cdev;
	struct virtio_device *vdev;
	char where[64];
	struct rw_semaphore users;
	u32 session;
	bool closing;
	bool dead;
	struct bufshare_queue control;
	struct bufshare_queue sync;
	struct bufshare_queue event;
	void **event_bufs;
	unsigned int nr_event_bufs;
	struct work_struct event_work;
	u64 features;
	struct bufshare_config config;
	struct bufshare_window window;
	struct mutex export_lock; /* from EXPORT or ATTACH to the entry of its handle */
	atomic_t cookie;
	atomic_t waits;
	atomic_t watches;
	struct list_head files;
	struct list_head imports;
	struct list_head kept;
	struct xarray offers;
	struct notifier_block reboot;
};

/* ---- what files are told ---- */

/* About one export or attachment: one record of each kind, the latest. */
enum bufshare_news {
	BUFSHARE_NEWS_USE,
	BUFSHARE_NEWS_CHANGED,
	BUFSHARE_NEWS_LAST, /* RELEASED or REVOKED: nothing comes after it */
	BUFSHARE_NR_NEWS,
};

/**
 * struct bufshare_inbox - what the file of an export or attachment is to be told about it
 * @file: who is told; NULL after close
 * @node: in bufshare_file.news
 * @news: bit mask of enum bufshare_news
 * @events: the records
 *
 * Guarded by the loan lock.
 */
struct bufshare_inbox {
	struct bufshare_file *file;
	struct list_head node;
	unsigned long news;
	struct bufshare_event events[BUFSHARE_NR_NEWS];
};

#define BUFSHARE_FILE_PEERS 8
#define BUFSHARE_FILE_OFFERS 16

/**
 * struct bufshare_file - an open file of /dev/bufshareN
 * @bs: the device; the open file holds it
 * @session: of @bs when it was opened
 * @node: in bufshare.files
 * @loans: exports of this file
 * @imports: attachments of this file
 * @watches: eventfds that wait for points, on behalf of this file
 * @news: inboxes with something to read
 * @peers: latest record of the peers that changed
 * @nr_peers: of @peers
 * @offers: latest record of the offers that came or went
 * @nr_offers: of @offers
 * @resync: BUFSHARE_EVENT_RESYNC is to be read
 * @wait: woken when there is something to read
 *
 * Guarded by the loan lock.
 */
struct bufshare_file {
	struct bufshare *bs;
	u32 session;
	struct list_head node;
	struct list_head loans;
	struct list_head imports;
	struct list_head watches;
	struct list_head news;
	struct bufshare_event peers[BUFSHARE_FILE_PEERS];
	unsigned int nr_peers;
	struct bufshare_event offers[BUFSHARE_FILE_OFFERS];
	unsigned int nr_offers;
	bool resync;
	wait_queue_head_t wait;
};

/* ---- loans ---- */

enum bufshare_loan_state {
	BUFSHARE_LOAN_ASKED, /* EXPORT was sent; without an answer nobody knows */
	BUFSHARE_LOAN_LIVE,
	BUFSHARE_LOAN_RELEASING,
	BUFSHARE_LOAN_OVER,
};

/**
 * struct bufshare_loan - an export, from before the device knows it until its memory is back
 * @ref: one for the list, one for @file, and whoever looks at it
 * @node: in the module's list until the memory is back
 * @hash: by handle, while the device and the module know the handle
 * @memory: the pages; the loan's reference ends with the loan
 * @bs: whose export; counted
 * @session: of @bs; when that is over no RELEASED can come
 * @peer_id: of @bs at the time
 * @epoch: of @bs at the time
 * @state: see enum bufshare_loan_state
 * @forced: RELEASE(FORCE) was sent, or will be
 * @handle: from the device; 0 while not known
 * @uuid: from the device
 * @size: bytes
 * @offset: in the dma-buf: of a part, bytes
 * @mode: BUFSHARE_MODE_*
 * @owner: process that exported it, for people
 * @inbox: for its file
 * @file_node: in bufshare_file.loans
 *
 * @state, @forced, @inbox and everything below are guarded by the loan lock; the rest is constant
 * once the handle is known.
 */
struct bufshare_loan {
	struct kref ref;
	struct list_head node;
	struct hlist_node hash;
	struct bufshare_memory *memory;
	struct bufshare *bs;
	u32 session;
	u32 peer_id;
	u32 epoch;
	enum bufshare_loan_state state;
	bool forced;
	u64 handle;
	u8 uuid[16];
	u64 size;
	u64 offset;
	u32 mode;
	char owner[16];
	struct bufshare_inbox inbox;
	struct list_head file_node;
};

/* ---- imports ---- */

/**
 * struct bufshare_buffer - memory of a dma-buf
 * @sgt: its pieces; every entry is one allocation
 * @lock: guards the rest
 * @attachments: who in this guest has it mapped for DMA
 * @vmaps: users of @vaddr
 * @vaddr: kernel mapping
 */
struct bufshare_buffer {
	struct sg_table sgt;
	struct mutex lock; /* guards the rest */
	struct list_head attachments;
	unsigned int vmaps;
	void *vaddr;
};

enum bufshare_where {
	BUFSHARE_NOWHERE,
	BUFSHARE_IN_WINDOW,
	BUFSHARE_ON_PAGES, /* this guest's own, to which the device copies */
};

/**
 * struct bufshare_import - an attachment to another peer's buffer
 * @buffer: own pages; the priv of the dma-buf
 * @ref: one for the dma-buf, one for bufshare.kept, and whoever looks at it
 * @node: in bufshare.imports or bufshare.kept
 * @all: in the list of all imports
 * @hash: by handle, while the device and the module know the handle
 * @file_node: in bufshare_file.imports
 * @inbox: for its file; guarded by the loan lock, as the nodes
 * @bs: whose import; counted
 * @session: of @bs
 * @handle: from the device, as the following
 * @uuid: ...
 * @size: bytes
 * @generation: when it was attached
 * @access: BUFSHARE_ACCESS_*
 * @exporter: peer id
 * @mode: BUFSHARE_MODE_*
 * @name: ...
 * @metadata_type: ...
 * @metadata_len: bytes of @metadata
 * @metadata: ...
 * @owner: process that attached it, for people
 * @where: where its content is seen
 * @offset: in the window, bytes
 * @mapping: from the device
 * @unsure: the device may have a mapping that nobody can name
 * @cache: how the window is to be mapped
 * @vaddr: kernel mapping of the window
 * @begin_lock: held by the one BEGIN that is with the device
 * @sync_lock: guards the following
 * @users: how many in this guest are in a bracket of READ and of WRITE, or about to be
 * @file_users: how many of these through the file
 * @owed: BUFSHARE_SYNC_F_*: who left has left END to those who are still there
 * @resv: of @dmabuf, and outlives it
 * @inode: of @dmabuf: user space's mappings; counted
 * @view_lock: held while @dmabuf is used, which does not end then
 * @lock: guards the following
 * @dmabuf: not counted; NULL before and after its life; changes under both locks
 * @error: why nothing works any more, or 0
 * @pins: kernel mappings and DMA mappings of the window
 * @retired: the device was told that this is over
 * @retire: tells it
 */
struct bufshare_import {
	struct bufshare_buffer buffer;
	struct kref ref;
	struct list_head node;
	struct list_head all;
	struct hlist_node hash;
	struct list_head file_node;
	struct bufshare_inbox inbox;
	struct bufshare *bs;
	u32 session;
	u64 handle;
	u8 uuid[16];
	u64 size;
	u64 generation;
	u32 access;
	u32 exporter;
	u32 mode;
	u8 name[32];
	u32 metadata_type;
	u32 metadata_len;
	void *metadata;
	char owner[16];
	enum bufshare_where where;
	u64 offset;
	u64 mapping;
	bool unsure;
	u32 cache;
	void *vaddr;
	struct mutex begin_lock; /* held by the one BEGIN that is with the device */
	struct mutex sync_lock; /* guards the following */
	unsigned int users[2];
	unsigned int file_users[2];
	u32 owed;
	struct dma_resv resv;
	struct inode *inode;
	struct mutex view_lock; /* held while dmabuf is used */
	struct mutex lock; /* guards the following */
	struct dma_buf *dmabuf;
	int error;
	unsigned int pins;
	bool retired;
	struct work_struct retire;
};

/* main */
extern struct workqueue_struct *bufshare_wq;
int bufshare_enter(struct bufshare *bs, u32 session);
void bufshare_leave(struct bufshare *bs);

/* queue */
void bufshare_queue_init(struct bufshare_queue *queue);
void bufshare_queue_done(struct bufshare_queue *queue);
void bufshare_queue_abort(struct bufshare_queue *queue);
void bufshare_queue_empty(struct bufshare_queue *queue);
struct bufshare_msg *bufshare_msg_new(u32 req_len, u32 resp_len);
void bufshare_msg_put(struct bufshare_msg *msg);
int bufshare_call(struct bufshare *bs, struct bufshare_msg *msg);
int bufshare_submit(struct bufshare *bs, struct bufshare_queue *queue, struct bufshare_msg *msg);
int bufshare_answer(struct bufshare *bs, const struct bufshare_msg *msg);
bool bufshare_refused(const struct bufshare_msg *msg);
void bufshare_set_dead(struct bufshare *bs);

/* request */
int bufshare_req_export(struct bufshare *bs, struct bufshare_loan *loan,
			const struct bufshare_export *arg, const void *metadata,
			const u8 *pool_uuid);
int bufshare_req_grant(struct bufshare *bs, const struct bufshare_grant *arg);
int bufshare_req_release(struct bufshare *bs, u64 handle, u16 flags, u32 *state);
int bufshare_req_query(struct bufshare *bs, u16 type, u64 handle,
		       struct virtio_bufshare_resp_state *out);
int bufshare_req_set_name(struct bufshare *bs, const struct bufshare_name *arg);
int bufshare_req_peer(struct bufshare *bs, struct bufshare_peer *arg);
int bufshare_req_sync(struct bufshare *bs, struct bufshare_sync *arg);
int bufshare_req_cancel(struct bufshare *bs, u64 handle, u32 cookie);
int bufshare_call_sync(struct bufshare *bs, struct bufshare_msg *msg, u64 handle, u64 timeout_ns);
u32 bufshare_next_cookie(struct bufshare *bs);
int bufshare_max_waits(struct bufshare *bs);
struct bufshare_msg *bufshare_req(u16 type, u16 flags, u32 req_len, u32 resp_len);

/* ask */
int bufshare_req_attach(struct bufshare *bs, struct bufshare_import *import, bool zero_copy);
int bufshare_req_detach(struct bufshare *bs, u64 handle);
int bufshare_req_map(struct bufshare *bs, struct bufshare_import *import, bool *unsure);
int bufshare_req_unmap(struct bufshare *bs, u64 mapping);

/* loan */
extern spinlock_t bufshare_loan_lock;
extern struct list_head bufshare_loans;
struct bufshare_loan *bufshare_loan_lookup(struct bufshare *bs, u32 session, u64 handle);
struct bufshare_loan *bufshare_loan_new(struct bufshare_file *file);
void bufshare_loan_put(struct bufshare_loan *loan);
void bufshare_loan_lend(struct bufshare_loan *loan, struct bufshare_memory *memory);
struct dma_buf *bufshare_loan_own(struct bufshare_file *file, struct bufshare_attach *arg);
int bufshare_loan_uuid(struct dma_buf *dmabuf, uuid_t *uuid);
struct bufshare_memory *bufshare_loan_share(struct bufshare_file *file, u64 handle, u8 *uuid);
int bufshare_loan_answered(struct bufshare_loan *loan, u64 handle, const u8 *uuid, u32 mode);
void bufshare_loan_end(struct bufshare_loan *loan, const struct bufshare_event *event);
int bufshare_loan_release(struct bufshare_loan *loan, u16 flags, u32 *state);
struct bufshare_loan *bufshare_loan_find(struct bufshare_file *file, u64 handle,
					 struct dma_buf **dmabuf);
void bufshare_loans_force(struct bufshare *bs);
void bufshare_loans_revoke(void);
void bufshare_loans_query(struct bufshare *bs);

/**
 * bufshare_loan_in_session() - whether the session that a loan belongs to still lasts
 * @loan: the loan
 *
 * Return: true if it does.
 */
static inline bool bufshare_loan_in_session(const struct bufshare_loan *loan)
{
	return loan->session == READ_ONCE(loan->bs->session);
}

/* quarantine */
void bufshare_loans_settle(struct bufshare *bs);
unsigned int bufshare_loans_quarantined(void);
void bufshare_quarantine_init(void);
void bufshare_quarantine_exit(void);

/* file */
bool bufshare_loan_leave_file(struct bufshare_loan *loan);
void bufshare_inbox_close(struct bufshare_inbox *inbox);
void bufshare_inbox_put(struct bufshare_inbox *inbox, enum bufshare_news kind,
			const struct bufshare_event *event);
void bufshare_loans_event(struct bufshare *bs, const struct bufshare_event *event);
void bufshare_file_add(struct bufshare_file *file);
void bufshare_file_close(struct bufshare_file *file);
bool bufshare_file_readable(struct bufshare_file *file);
bool bufshare_file_next(struct bufshare_file *file, struct bufshare_event *event);
void bufshare_files_wake(struct bufshare *bs);

/* memory */
struct bufshare_memory *bufshare_memory_new(struct device *dev, struct dma_buf *dmabuf);
struct bufshare_memory *bufshare_memory_share(struct bufshare_memory *memory);
void bufshare_memory_put(struct bufshare_memory *memory);
struct dma_buf *bufshare_memory_dmabuf(struct bufshare_memory *memory);
bool bufshare_memory_revoked(const struct bufshare_memory *memory);
int bufshare_segments(struct sg_table *sgt, bool dma, u64 size, u32 granule,
		      struct virtio_bufshare_segment *out, u32 max);
int bufshare_memory_segments(const struct bufshare_memory *memory, u32 granule,
			     struct virtio_bufshare_segment *out, u32 max);
int bufshare_memory_finish(struct dma_resv *resv, bool write, unsigned long timeout);

/*
 * Our dma-bufs are of virtio's flavour: other virtio drivers can ask for their UUID. A kernel without
 * any such driver may lack that flavour; then they are plain ones.
 */
#if IS_REACHABLE(CONFIG_VIRTIO_DMA_SHARED_BUFFER)
#define bufshare_dma_buf_attach virtio_dma_buf_attach
#else
static inline int bufshare_dma_buf_attach(struct dma_buf *dmabuf,
					  struct dma_buf_attachment *attach)
{
	return container_of_const(dmabuf->ops, struct virtio_dma_buf_ops,
				  ops)->device_attach(dmabuf, attach);
}
#endif

/* buffer */
int bufshare_buffer_init(struct bufshare_buffer *buffer, u64 size, u32 granule);
void bufshare_buffer_fini(struct bufshare_buffer *buffer);
int bufshare_buffer_attach(struct dma_buf *dmabuf, struct dma_buf_attachment *attach);
void bufshare_buffer_detach(struct dma_buf *dmabuf, struct dma_buf_attachment *attach);
struct sg_table *bufshare_buffer_map(struct dma_buf_attachment *attach,
				     enum dma_data_direction direction);
void bufshare_buffer_unmap(struct dma_buf_attachment *attach, struct sg_table *sgt,
			   enum dma_data_direction direction);
int bufshare_buffer_begin(struct dma_buf *dmabuf, enum dma_data_direction direction);
int bufshare_buffer_end(struct dma_buf *dmabuf, enum dma_data_direction direction);
int bufshare_buffer_vmap(struct dma_buf *dmabuf, struct iosys_map *map);
void bufshare_buffer_vunmap(struct dma_buf *dmabuf, struct iosys_map *map);
struct dma_buf *bufshare_buffer_new(u64 size, u32 granule);
struct sg_table *bufshare_buffer_pages(struct dma_buf *dmabuf);

/* offer */
void bufshare_offers_event(struct bufshare *bs, const struct bufshare_event *event);
void bufshare_offers_forget(struct bufshare *bs);
int bufshare_offer_next(struct bufshare *bs, struct bufshare_offer *arg);

/* import */
struct bufshare_import *bufshare_import_new(struct bufshare_file *file, const u8 *uuid,
					    u32 access, bool zero_copy);
void bufshare_import_put(struct bufshare_import *import);
void bufshare_import_close(struct bufshare_import *import);
struct bufshare_import *bufshare_import_find(struct bufshare_file *file, u64 handle);
int bufshare_import_pin(struct bufshare_import *import);
void bufshare_import_unpin(struct bufshare_import *import);
void bufshare_imports_event(struct bufshare *bs, const struct bufshare_event *event);
void bufshare_imports_end(struct bufshare *bs);
void bufshare_imports_forget(struct bufshare *bs);
void bufshare_imports_init(struct dentry *dir);

/* bracket */
int bufshare_import_sync(struct bufshare_import *import, struct bufshare_sync *arg, bool by_file);
void bufshare_imports_close(struct bufshare_file *file);

/* view */
int bufshare_view_new(struct bufshare_import *import);
bool bufshare_view_is(const struct dma_buf *dmabuf);
int bufshare_view_open(struct bufshare_import *import);
void bufshare_view_close(struct bufshare_import *import);
void bufshare_view_zap(struct bufshare_import *import);

/* window */
bool bufshare_window_find(struct virtio_device *vdev, struct virtio_shm_region *region);
int bufshare_window_init(struct bufshare_window *window, struct virtio_device *vdev, u32 granule);
void bufshare_window_exit(struct bufshare_window *window);
int bufshare_window_take(struct bufshare_window *window, u64 size, u64 *offset);
void bufshare_window_give(struct bufshare_window *window, u64 offset, u64 size);

/* attach */
int bufshare_ioc_attach(struct bufshare_file *file, void __user *user,
			struct bufshare_attach *arg);
int bufshare_ioc_offer(struct bufshare_file *file, struct bufshare_offer *arg);

/* point */
int bufshare_ioc_point_signal(struct bufshare_file *file, struct bufshare_point_signal *arg);
int bufshare_ioc_point_wait(struct bufshare_file *file, struct bufshare_point_wait *arg,
			    bool nonblock);
int bufshare_ioc_point_eventfd(struct bufshare_file *file, struct bufshare_point_eventfd *arg);
void bufshare_points_close(struct bufshare_file *file);

/* chardev */
int bufshare_chardev_add(struct bufshare *bs);
void bufshare_chardev_del(struct bufshare *bs);
struct bufshare *bufshare_chardev_new(struct device *parent);
int bufshare_chardev_init(void);
void bufshare_chardev_exit(void);

#endif /* _VIRTIO_BUFSHARE_H */
