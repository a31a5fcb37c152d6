// SPDX-License-Identifier: GPL-2.0
/*
 * virtio_bufshare: imports, which are attachments to buffers of other peers. An import lives as
 * long as its dma-buf. It dies earlier when it is revoked or its session ends: then nobody sees
 * its content any more before the device is told UNMAP, and all that is left is a dma-buf on
 * which everything fails.
 *
 * In COPY mode the device writes to pages of this guest. They are freed after it answered UNMAP, or
 * after it was reset, never before.
 */
#include <linux/debugfs.h>
#include <linux/dma-buf.h>
#include <linux/fs.h>
#include <linux/hashtable.h>
#include <linux/sched.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/string.h>

#include "virtio_bufshare.h"

static DEFINE_HASHTABLE(bufshare_imports, 8);
/* All imports of the module, for people; guarded by the loan lock. */
static LIST_HEAD(bufshare_all_imports);

static void bufshare_import_free(struct kref *ref)
{
	struct bufshare_import *import = container_of(ref, struct bufshare_import, ref);

	spin_lock(&bufshare_loan_lock);
	list_del(&import->all);
	spin_unlock(&bufshare_loan_lock);
	bufshare_view_close(import);
	if (import->where == BUFSHARE_ON_PAGES)
		bufshare_buffer_fini(&import->buffer);
	iput(import->inode);
	dma_resv_fini(&import->resv);
	mutex_destroy(&import->begin_lock);
	mutex_destroy(&import->sync_lock);
	mutex_destroy(&import->view_lock);
	mutex_destroy(&import->lock);
	kfree(import->metadata);
	put_device(&import->bs->dev);
	kfree(import);
}

/**
 * bufshare_import_put() - give up an import
 * @import: the import, or NULL
 *
 * Context: Process context.
 */
void bufshare_import_put(struct bufshare_import *import)
{
	if (import)
		kref_put(&import->ref, bufshare_import_free);
}

/**
 * bufshare_import_lookup() - an import by its handle
 * @bs: the device
 * @session: of the device
 * @handle: from the device
 *
 * Context: Under the loan lock.
 * Return: the import, not counted, or NULL.
 */
static struct bufshare_import *bufshare_import_lookup(struct bufshare *bs, u32 session, u64 handle)
{
	struct bufshare_import *import;

	hash_for_each_possible(bufshare_imports, import, hash, handle) {
		if (import->handle == handle && import->bs == bs && import->session == session)
			return import;
	}
	return NULL;
}

/**
 * bufshare_import_find() - an import by its handle
 * @file: who asks; must have attached it
 * @handle: from ATTACH
 *
 * One that is dead is found as well, as long as its dma-buf is there: its error says why.
 *
 * Return: the import with a reference, or NULL.
 */
struct bufshare_import *bufshare_import_find(struct bufshare_file *file, u64 handle)
{
	struct bufshare_import *import, *dead;

	spin_lock(&bufshare_loan_lock);
	import = bufshare_import_lookup(file->bs, file->session, handle);
	if (!import) {
		list_for_each_entry(dead, &file->imports, file_node) {
			if (dead->handle == handle)
				import = dead;
		}
	}
	if (import && import->inbox.file != file)
		import = NULL;
	if (import)
		kref_get(&import->ref);
	spin_unlock(&bufshare_loan_lock);
	return import;
}

/* ---- the end of an import ---- */

/* Nothing works on it any more, and nobody sees its content. */
static void bufshare_import_kill(struct bufshare_import *import, int error)
{
	mutex_lock(&import->lock);
	if (!import->error)
		WRITE_ONCE(import->error, error);
	mutex_unlock(&import->lock);
	bufshare_view_zap(import);
}

/*
 * Tells the device that a dead import is over, unless the kernel still uses the window, or somebody
 * is about to make its dma-buf and will see then. Nobody can wait for that when the session ends
 * (@force), and the reset ends it.
 *
 * Context: while the session lasts.
 */
static void bufshare_import_retire(struct bufshare_import *import, bool force)
{
	struct bufshare *bs = import->bs;
	bool keep = import->unsure;
	int ret = 0;

	mutex_lock(&import->lock);
	if (import->retired || (!force && (import->pins || !import->dmabuf))) {
		mutex_unlock(&import->lock);
		return;
	}
	import->retired = true;
	if (!import->pins)
		bufshare_view_close(import);
	mutex_unlock(&import->lock);

	if (import->mapping)
		ret = bufshare_req_unmap(bs, import->mapping);
	if (ret && ret != -ENOENT)
		keep = true;
	if (import->where == BUFSHARE_IN_WINDOW && !keep)
		bufshare_window_give(&bs->window, import->offset, import->size);
	bufshare_req_detach(bs, import->handle);

	spin_lock(&bufshare_loan_lock);
	hash_del(&import->hash);
	list_del_init(&import->node);
	if (keep) {
		kref_get(&import->ref);
		list_add_tail(&import->node, &bs->kept);
	}
	spin_unlock(&bufshare_loan_lock);
}

static void bufshare_retire_work(struct work_struct *work)
{
	struct bufshare_import *import = container_of(work, struct bufshare_import, retire);
	struct bufshare *bs = import->bs;

	/* Not bufshare_enter(): of a dead device the memory is to be kept. */
	down_read(&bs->users);
	if (bs->session == import->session)
		bufshare_import_retire(import, false);
	up_read(&bs->users);
	bufshare_import_put(import);
}

static void bufshare_import_retire_later(struct bufshare_import *import)
{
	kref_get(&import->ref);
	if (!queue_work(bufshare_wq, &import->retire))
		bufshare_import_put(import);
}

/* The dma-buf is gone, or there was none. */
static void bufshare_import_over(struct bufshare_import *import)
{
	mutex_lock(&import->view_lock);
	mutex_lock(&import->lock);
	import->dmabuf = NULL;
	if (!import->error)
		WRITE_ONCE(import->error, -ENODEV);
	mutex_unlock(&import->lock);
	mutex_unlock(&import->view_lock);
	spin_lock(&bufshare_loan_lock);
	if (import->inbox.file) {
		list_del(&import->file_node);
		bufshare_inbox_close(&import->inbox);
	}
	spin_unlock(&bufshare_loan_lock);
}

/**
 * bufshare_import_close() - the dma-buf of an import is gone
 * @import: the import
 *
 * Context: Process context, outside bufshare_enter().
 */
void bufshare_import_close(struct bufshare_import *import)
{
	struct bufshare *bs = import->bs;

	bufshare_import_over(import);
	/* Not bufshare_enter(): of a dead device the memory is to be kept. */
	down_read(&bs->users);
	if (bs->session == import->session)
		bufshare_import_retire(import, true);
	up_read(&bs->users);
	bufshare_import_put(import);
}

/**
 * bufshare_import_pin() - the kernel or a device begins to use the window
 * @import: the import
 *
 * Context: Process context.
 * Return: 0, or why nothing works any more.
 */
int bufshare_import_pin(struct bufshare_import *import)
{
	int ret;

	mutex_lock(&import->lock);
	ret = import->error;
	if (!ret)
		import->pins++;
	mutex_unlock(&import->lock);
	return ret;
}

/**
 * bufshare_import_unpin() - undo bufshare_import_pin()
 * @import: the import
 *
 * Context: Process context.
 */
void bufshare_import_unpin(struct bufshare_import *import)
{
	bool last;

	mutex_lock(&import->lock);
	last = !--import->pins && import->error && !import->retired;
	mutex_unlock(&import->lock);
	if (last)
		bufshare_import_retire_later(import);
}

/**
 * bufshare_imports_event() - tell an event about an import to whom it concerns
 * @bs: the device
 * @event: one that is about a handle
 *
 * Context: Process context, under export_lock.
 */
void bufshare_imports_event(struct bufshare *bs, const struct bufshare_event *event)
{
	bool revoked = event->type == BUFSHARE_EVENT_REVOKED;
	struct bufshare_import *import;

	if (!revoked && event->type != BUFSHARE_EVENT_CHANGED)
		return;
	spin_lock(&bufshare_loan_lock);
	import = bufshare_import_lookup(bs, READ_ONCE(bs->session), event->handle);
	if (import)
		kref_get(&import->ref);
	spin_unlock(&bufshare_loan_lock);
	if (!import)
		return;
	if (revoked)
		bufshare_import_kill(import, -EOWNERDEAD);
	spin_lock(&bufshare_loan_lock);
	bufshare_inbox_put(&import->inbox, revoked ? BUFSHARE_NEWS_LAST : BUFSHARE_NEWS_CHANGED,
			   event);
	spin_unlock(&bufshare_loan_lock);
	if (revoked)
		bufshare_import_retire_later(import);
	bufshare_import_put(import);
}

/**
 * bufshare_imports_end() - end all imports of a session
 * @bs: the device
 *
 * Context: Process context; users of the device are locked out.
 */
void bufshare_imports_end(struct bufshare *bs)
{
	struct bufshare_import *import;

	for (;;) {
		spin_lock(&bufshare_loan_lock);
		import = list_first_entry_or_null(&bs->imports, struct bufshare_import, node);
		if (import)
			kref_get(&import->ref);
		spin_unlock(&bufshare_loan_lock);
		if (!import)
			break;
		bufshare_import_kill(import, -ENODEV);
		bufshare_import_retire(import, true);
		bufshare_import_put(import);
	}
}

/**
 * bufshare_imports_forget() - the device was reset: it does not write any more
 * @bs: the device
 *
 * Context: Process context; users of the device are locked out.
 */
void bufshare_imports_forget(struct bufshare *bs)
{
	struct bufshare_import *import;

	for (;;) {
		spin_lock(&bufshare_loan_lock);
		import = list_first_entry_or_null(&bs->kept, struct bufshare_import, node);
		if (import)
			list_del_init(&import->node);
		spin_unlock(&bufshare_loan_lock);
		if (!import)
			break;
		bufshare_import_put(import);
	}
}

/* ---- its beginning ---- */

static int bufshare_import_map_window(struct bufshare_import *import)
{
	struct bufshare *bs = import->bs;
	int ret;

	ret = bufshare_window_take(&bs->window, import->size, &import->offset);
	if (ret)
		return ret;
	import->where = BUFSHARE_IN_WINDOW;
	ret = bufshare_req_map(bs, import, &import->unsure);
	if (!ret)
		return bufshare_view_open(import);
	if (!import->unsure) {
		bufshare_window_give(&bs->window, import->offset, import->size);
		import->where = BUFSHARE_NOWHERE;
	}
	return ret;
}

/* Finds a place for the content: in the window, or else on own pages if a copy will do. */
static int bufshare_import_map(struct bufshare_import *import, bool zero_copy)
{
	struct bufshare *bs = import->bs;
	int ret = -EOPNOTSUPP;

	if (bs->window.len) {
		ret = bufshare_import_map_window(import);
		if (!ret || import->where != BUFSHARE_NOWHERE)
			return ret;
		/* The window or what the monitor can map is used up, or it refuses to. */
		if (ret != -ENOSPC && ret != -EOPNOTSUPP && ret != -EIO)
			return ret;
	}
	if (!(bs->features & BIT_ULL(VIRTIO_BUFSHARE_F_COPY)) || zero_copy)
		return ret;
	ret = bufshare_buffer_init(&import->buffer, import->size, bs->config.granule);
	if (ret)
		return ret;
	import->where = BUFSHARE_ON_PAGES;
	import->mode = BUFSHARE_MODE_COPY;
	return bufshare_req_map(bs, import, &import->unsure);
}

static int bufshare_import_attach(struct bufshare_import *import, struct bufshare_file *file,
				  bool zero_copy)
{
	struct bufshare *bs = import->bs;
	int ret;

	mutex_lock(&bs->export_lock);
	ret = bufshare_req_attach(bs, import, zero_copy);
	spin_lock(&bufshare_loan_lock);
	if (!ret && (!import->handle || !import->size ||
		     !IS_ALIGNED(import->size, max_t(u32, bs->config.granule, PAGE_SIZE)) ||
		     bufshare_import_lookup(bs, import->session, import->handle)))
		ret = -EIO;
	if (!ret) {
		hash_add(bufshare_imports, &import->hash, import->handle);
		list_add_tail(&import->node, &bs->imports);
		list_add_tail(&import->file_node, &file->imports);
		import->inbox.file = file;
	}
	spin_unlock(&bufshare_loan_lock);
	mutex_unlock(&bs->export_lock);
	return ret;
}

/**
 * bufshare_import_new() - attach a buffer of another peer
 * @file: who gets the events
 * @uuid: of the buffer
 * @access: BUFSHARE_ACCESS_*
 * @zero_copy: fail with -EACCES rather than copy
 *
 * Context: Process context, inside bufshare_enter().
 * Return: the import, whose one reference is that of its dma-buf, or an error.
 */
struct bufshare_import *bufshare_import_new(struct bufshare_file *file, const u8 *uuid,
					    u32 access, bool zero_copy)
{
	struct bufshare_import *import;
	struct bufshare *bs = file->bs;
	int ret;

	if (!(bs->features & BIT_ULL(VIRTIO_BUFSHARE_F_IMPORT)))
		return ERR_PTR(-EOPNOTSUPP);
	import = kzalloc_obj(*import, GFP_KERNEL_ACCOUNT);
	if (!import)
		return ERR_PTR(-ENOMEM);
	get_device(&bs->dev);
	kref_init(&import->ref);
	INIT_LIST_HEAD(&import->node);
	INIT_HLIST_NODE(&import->hash);
	INIT_LIST_HEAD(&import->file_node);
	INIT_LIST_HEAD(&import->inbox.node);
	mutex_init(&import->begin_lock);
	mutex_init(&import->sync_lock);
	dma_resv_init(&import->resv);
	mutex_init(&import->view_lock);
	mutex_init(&import->lock);
	INIT_WORK(&import->retire, bufshare_retire_work);
	import->bs = bs;
	import->session = file->session;
	import->access = access;
	memcpy(import->uuid, uuid, sizeof(import->uuid));
	get_task_comm(import->owner, current);
	spin_lock(&bufshare_loan_lock);
	list_add_tail(&import->all, &bufshare_all_imports);
	spin_unlock(&bufshare_loan_lock);

	ret = bufshare_import_attach(import, file, zero_copy);
	if (ret) {
		if (import->handle)
			bufshare_req_detach(bs, import->handle);
		bufshare_import_put(import);
		return ERR_PTR(ret);
	}
	ret = bufshare_import_map(import, zero_copy);
	if (!ret)
		ret = bufshare_view_new(import);
	if (ret) {
		bufshare_import_over(import);
		bufshare_import_retire(import, true);
		bufshare_import_put(import);
		return ERR_PTR(ret);
	}
	/* Whoever heard meanwhile that it is revoked has left the rest to us. */
	if (READ_ONCE(import->error))
		bufshare_import_retire(import, false);
	return import;
}

/* ---- for people ---- */

static int bufshare_imports_show(struct seq_file *m, void *unused)
{
	static const char * const where[] = { "nowhere", "window", "pages" };
	struct bufshare_import *import;

	seq_puts(m, "# device handle bytes exporter mode where state readers writers owner uuid\n");
	spin_lock(&bufshare_loan_lock);
	list_for_each_entry(import, &bufshare_all_imports, all)
		seq_printf(m, "%s %llu %llu %u %s %s %s %u %u %s %pUb\n", import->bs->where,
			   import->handle, import->size, import->exporter,
			   import->mode == BUFSHARE_MODE_ZERO_COPY ? "zero-copy" : "copy",
			   where[import->where], !import->error ? "live" :
			   import->error == -EOWNERDEAD ? "revoked" : "over",
			   import->users[0], import->users[1], import->owner, import->uuid);
	spin_unlock(&bufshare_loan_lock);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(bufshare_imports);

/**
 * bufshare_imports_init() - the debugfs file
 * @dir: of the module
 */
void bufshare_imports_init(struct dentry *dir)
{
	debugfs_create_file("imports", 0400, dir, NULL, &bufshare_imports_fops);
}
