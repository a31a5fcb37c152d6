// SPDX-License-Identifier: GPL-2.0
/*
 * virtio_bufshare: brackets of imports. To the device a guest is one user of an attachment, with a
 * bit of each kind: this counts who is in a bracket, or about to be, and has the last who leaves
 * send END. A BEGIN may wait for others for long, and nobody waits for it but other BEGINs.
 */
#include <linux/minmax.h>
#include <linux/mutex.h>
#include <linux/spinlock.h>

#include "virtio_bufshare.h"

#define BUFSHARE_SYNC_ACCESS (BUFSHARE_SYNC_F_READ | BUFSHARE_SYNC_F_WRITE)

/* One user less of each kind of @flags. Returns the kinds that have none left. */
static u32 bufshare_bracket_uncount(struct bufshare_import *import, u32 flags, bool by_file)
{
	unsigned int i;
	u32 last = 0;

	for (i = 0; i < ARRAY_SIZE(import->users); i++) {
		if (!(flags & BUFSHARE_SYNC_F_READ << i))
			continue;
		if (by_file && import->file_users[i])
			import->file_users[i]--;
		if (import->users[i])
			import->users[i]--;
		if (!import->users[i])
			last |= BUFSHARE_SYNC_F_READ << i;
		import->file_users[i] = min(import->file_users[i], import->users[i]);
	}
	return last;
}

/* Nobody of these kinds is left. */
static int bufshare_bracket_clear(struct bufshare_import *import, struct bufshare_sync *arg,
				  u32 last)
{
	struct bufshare_sync sync = *arg;
	int ret;

	sync.flags = BUFSHARE_SYNC_F_END | last;
	/* Of writers that left before only this is known: what they wrote is theirs. */
	if (last & import->owed & BUFSHARE_SYNC_F_WRITE) {
		sync.offset = 0;
		sync.len = 0;
	}
	import->owed &= ~last;
	ret = bufshare_req_sync(import->bs, &sync);
	if (!ret)
		arg->generation = sync.generation;
	return ret;
}

/* Gives up sync_lock while it waits for others, so that who is in can leave. */
static int bufshare_bracket_begin(struct bufshare_import *import, struct bufshare_sync *arg,
				  bool by_file)
{
	struct bufshare_sync sync = *arg;
	bool writers = import->users[1];
	unsigned int i;
	u32 last;
	int ret;

	for (i = 0; i < ARRAY_SIZE(import->users); i++) {
		if (!(arg->flags & BUFSHARE_SYNC_F_READ << i))
			continue;
		import->users[i]++;
		import->file_users[i] += by_file;
	}
	for (;;) {
		/* What a writer of this guest has not completed yet must not be overwritten. */
		sync.offset = writers ? import->size : arg->offset;
		sync.len = writers ? 0 : arg->len;
		mutex_unlock(&import->sync_lock);
		ret = bufshare_req_sync(import->bs, &sync);
		mutex_lock(&import->sync_lock);
		if (ret || !writers || import->users[1])
			break;
		/* The last writer has completed it, and others may have written after that. */
		writers = false;
		import->owed |= arg->flags & BUFSHARE_SYNC_ACCESS;
	}
	if (ret) {
		last = bufshare_bracket_uncount(import, arg->flags, by_file) & import->owed;
		sync = (struct bufshare_sync) { .handle = import->handle };
		if (last)
			bufshare_bracket_clear(import, &sync, last);
	} else {
		arg->generation = sync.generation;
	}
	return ret;
}

static int bufshare_bracket_end(struct bufshare_import *import, struct bufshare_sync *arg,
				bool by_file)
{
	u32 last = bufshare_bracket_uncount(import, arg->flags, by_file);

	import->owed |= arg->flags & BUFSHARE_SYNC_ACCESS & ~last;
	arg->generation = import->generation;
	return last ? bufshare_bracket_clear(import, arg, last) : 0;
}

/**
 * bufshare_import_sync() - begin or end a bracket
 * @import: the import
 * @arg: in: what the user wants, but for the handle; out: the generation
 * @by_file: through the open file, whose close ends the bracket, else through the dma-buf
 *
 * Context: Process context, outside bufshare_enter().
 * Return: 0, -EINTR after a signal, or another negative error.
 */
int bufshare_import_sync(struct bufshare_import *import, struct bufshare_sync *arg, bool by_file)
{
	bool end = arg->flags & BUFSHARE_SYNC_F_END;
	int ret;

	arg->handle = import->handle;
	/* One after the other: what is brought for one must not overwrite what the next writes. */
	if (!end && arg->flags & BUFSHARE_SYNC_F_NONBLOCK) {
		if (!mutex_trylock(&import->begin_lock))
			return -EAGAIN;
	} else if (!end && mutex_lock_interruptible(&import->begin_lock)) {
		return -EINTR;
	}
	ret = READ_ONCE(import->error);
	if (!ret)
		ret = bufshare_enter(import->bs, import->session);
	if (!ret) {
		mutex_lock(&import->sync_lock);
		ret = end ? bufshare_bracket_end(import, arg, by_file) :
			    bufshare_bracket_begin(import, arg, by_file);
		if (!ret)
			import->generation = max(import->generation, arg->generation);
		mutex_unlock(&import->sync_lock);
		bufshare_leave(import->bs);
	}
	if (!end)
		mutex_unlock(&import->begin_lock);
	return ret;
}

/* The file is gone that began these brackets. */
static void bufshare_bracket_leave(struct bufshare_import *import)
{
	struct bufshare_sync sync = { .flags = 0 };
	unsigned int i;

	mutex_lock(&import->sync_lock);
	for (i = 0; i < ARRAY_SIZE(import->users); i++) {
		if (!import->file_users[i])
			continue;
		import->users[i] -= import->file_users[i] - 1;
		import->file_users[i] = 1;
		sync.flags |= BUFSHARE_SYNC_F_END | BUFSHARE_SYNC_F_READ << i;
	}
	mutex_unlock(&import->sync_lock);
	if (sync.flags)
		bufshare_import_sync(import, &sync, true);
}

/**
 * bufshare_imports_close() - a file is closed: end its brackets; the dma-bufs live on
 * @file: the file
 *
 * Context: Process context, outside bufshare_enter().
 */
void bufshare_imports_close(struct bufshare_file *file)
{
	struct bufshare_import *import;

	for (;;) {
		spin_lock(&bufshare_loan_lock);
		import = list_first_entry_or_null(&file->imports, struct bufshare_import,
						  file_node);
		if (import) {
			list_del(&import->file_node);
			bufshare_inbox_close(&import->inbox);
			kref_get(&import->ref);
		}
		spin_unlock(&bufshare_loan_lock);
		if (!import)
			break;
		bufshare_bracket_leave(import);
		bufshare_import_put(import);
	}
}
