/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the files of the virtio_bufshare module know of each other.
 *
 * main      probe, sessions, events, power management
 * queue     messages on the virtqueues; knows nothing of what they say
 * request   what is said: one function per request of the wire header
 * loan      exports whose memory the device may still use
 * quarantine those that no open file can end
 * file      what an open file owns and is told
 * memory    the pages behind an export, as the device is to see them
 * buffer    dma-bufs that this module allocates
 * chardev   /dev/bufshareN
 *
 * Locks, outermost first: bufshare.users, bufshare.export_lock, the loan lock (a spinlock, in
 * loan.c), bufshare_queue.lock (taken in interrupts). dma_resv locks are taken under the first two,
 * and nothing of this module but the loan lock is taken under them.
 */
#ifndef _VIRTIO_BUFSHARE_H
#define _VIRTIO_BUFSHARE_H

#include <linux/cdev.h>
#include <linux/completion.h>
#include <linux/device.h>
#include <linux/kref.h>
#include <linux/list.h>
#include <linux/mutex.h>
#include <linux/notifier.h>
#include <linux/rwsem.h>
#include <linux/spinlock.h>
#include <linux/types.h>
#include <linux/virtio.h>
#include <linux/wait.h>
#include <linux/workqueue.h>

#include <uapi/linux/bufshare.h>
#include <uapi/linux/virtio_bufshare.h>

struct bufshare_memory;
struct dma_buf;
struct sg_table;

/* A request that is bounded by nature and has no answer by then will never have one. */
#define BUFSHARE_ANSWER_TIMEOUT (30 * HZ)

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
 * @state: see enum bufshare_msg_state
 * @req: the request; contiguous in virtual memory only
 * @resp: the response, from kmalloc()
 * @req_len: bytes
 * @resp_len: bytes that a complete response has
 * @used: bytes that the device says it wrote
 * @status: from the response, read once
 */
struct bufshare_msg {
	struct kref ref;
	struct list_head node;
	struct completion done;
	enum bufshare_msg_state state;
	void *req;
	void *resp;
	u32 req_len;
	u32 resp_len;
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
	u32 max_metadata;
	u32 event_size;
	u32 max_wait_ms;
	u32 lingering;
	u32 max_waits;
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
 * @config: limits; lingering and epoch change with EVT_RESYNC
 * @export_lock: held from EXPORT to the entry of its handle, so that no event comes in between
 * @cookie: of the last sync request
 * @waits: sync requests that may stay pending
 * @files: open files, guarded by the loan lock
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
	struct mutex export_lock; /* from EXPORT to the entry of its handle */
	atomic_t cookie;
	atomic_t waits;
	struct list_head files;
	struct notifier_block reboot;
};

/* ---- loans ---- */

enum bufshare_loan_state {
	BUFSHARE_LOAN_ASKED, /* EXPORT was sent; without an answer nobody knows */
	BUFSHARE_LOAN_LIVE,
	BUFSHARE_LOAN_RELEASING,
	BUFSHARE_LOAN_OVER,
};

/* What a file is told about a loan: one record of each kind, the latest. */
enum bufshare_news {
	BUFSHARE_NEWS_USE,
	BUFSHARE_NEWS_CHANGED,
	BUFSHARE_NEWS_RELEASED,
	BUFSHARE_NR_NEWS,
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
 * @mode: BUFSHARE_MODE_*
 * @owner: process that exported it, for people
 * @file: who gets the events; NULL after close
 * @file_node: in bufshare_file.loans
 * @news_node: in bufshare_file.news
 * @news: bit mask of enum bufshare_news
 * @events: the records
 *
 * @state, @forced, @file and everything below are guarded by the loan lock; the rest is constant
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
	u32 mode;
	char owner[16];
	struct bufshare_file *file;
	struct list_head file_node;
	struct list_head news_node;
	unsigned long news;
	struct bufshare_event events[BUFSHARE_NR_NEWS];
};

#define BUFSHARE_FILE_PEERS 8

/**
 * struct bufshare_file - an open file of /dev/bufshareN
 * @bs: the device; the open file holds it
 * @session: of @bs when it was opened
 * @node: in bufshare.files
 * @loans: exports of this file
 * @news: loans with something to read
 * @peers: latest record of the peers that changed
 * @nr_peers: of @peers
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
	struct list_head news;
	struct bufshare_event peers[BUFSHARE_FILE_PEERS];
	unsigned int nr_peers;
	bool resync;
	wait_queue_head_t wait;
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
			const struct bufshare_export *arg, const u8 *pool_uuid);
int bufshare_req_grant(struct bufshare *bs, const struct bufshare_grant *arg);
int bufshare_req_release(struct bufshare *bs, u64 handle, u16 flags, u32 *state);
int bufshare_req_query(struct bufshare *bs, u16 type, u64 handle,
		       struct virtio_bufshare_resp_state *out);
int bufshare_req_set_name(struct bufshare *bs, const struct bufshare_name *arg);
int bufshare_req_peer(struct bufshare *bs, struct bufshare_peer *arg);
int bufshare_req_sync(struct bufshare *bs, struct bufshare_sync *arg);

/* loan */
extern spinlock_t bufshare_loan_lock;
extern struct list_head bufshare_loans;
struct bufshare_loan *bufshare_loan_lookup(struct bufshare *bs, u32 session, u64 handle);
struct bufshare_loan *bufshare_loan_new(struct bufshare_file *file);
void bufshare_loan_put(struct bufshare_loan *loan);
void bufshare_loan_lend(struct bufshare_loan *loan, struct bufshare_memory *memory);
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
void bufshare_loan_news(struct bufshare_loan *loan, enum bufshare_news kind,
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
int bufshare_memory_segments(const struct bufshare_memory *memory, u32 granule,
			     struct virtio_bufshare_segment *out, u32 max);
int bufshare_memory_finish(struct dma_buf *dmabuf, bool write, unsigned long timeout);

/* buffer */
struct dma_buf *bufshare_buffer_new(u64 size, u32 granule);
struct sg_table *bufshare_buffer_pages(struct dma_buf *dmabuf);

/* chardev */
int bufshare_chardev_add(struct bufshare *bs);
void bufshare_chardev_del(struct bufshare *bs);
struct bufshare *bufshare_chardev_new(struct device *parent);
int bufshare_chardev_init(void);
void bufshare_chardev_exit(void);

#endif /* _VIRTIO_BUFSHARE_H */
