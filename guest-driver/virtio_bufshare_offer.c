// SPDX-License-Identifier: GPL-2.0
/*
 * virtio_bufshare: what other peers offer to this guest, as the device told it, for programs that
 * come later than the event.
 */
#include <linux/hashtable.h>
#include <linux/jhash.h>
#include <linux/mutex.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/xarray.h>

#include "virtio_bufshare.h"

/* A device that offers more is not heard. */
#define BUFSHARE_MAX_OFFERS 65536

struct bufshare_offer_entry {
	struct hlist_node hash;
	struct bufshare *bs;
	struct bufshare_offer offer;
};

static DEFINE_MUTEX(bufshare_offer_lock); /* guards the hash and bufshare.offers */
static DEFINE_HASHTABLE(bufshare_offer_hash, 10);

static struct bufshare_offer_entry *bufshare_offer_find(struct bufshare *bs, const u8 *uuid,
							u32 key)
{
	struct bufshare_offer_entry *entry;

	hash_for_each_possible(bufshare_offer_hash, entry, hash, key) {
		if (entry->bs == bs && !memcmp(entry->offer.uuid, uuid, sizeof(entry->offer.uuid)))
			return entry;
	}
	return NULL;
}

static void bufshare_offer_drop(struct bufshare_offer_entry *entry)
{
	hash_del(&entry->hash);
	xa_erase(&entry->bs->offers, entry->offer.id);
	kfree(entry);
}

static struct bufshare_offer_entry *bufshare_offer_add(struct bufshare *bs, u32 key)
{
	struct bufshare_offer_entry *entry = kzalloc_obj(*entry);

	if (!entry)
		return NULL;
	if (xa_alloc(&bs->offers, &entry->offer.id, entry, XA_LIMIT(1, BUFSHARE_MAX_OFFERS),
		     GFP_KERNEL)) {
		kfree(entry);
		return NULL;
	}
	entry->bs = bs;
	hash_add(bufshare_offer_hash, &entry->hash, key);
	return entry;
}

/**
 * bufshare_offers_event() - an offer came or went
 * @bs: the device
 * @event: OFFERED or WITHDRAWN
 *
 * Context: Process context.
 */
void bufshare_offers_event(struct bufshare *bs, const struct bufshare_event *event)
{
	u32 key = jhash(event->uuid, sizeof(event->uuid), 0);
	struct bufshare_offer_entry *entry;

	mutex_lock(&bufshare_offer_lock);
	entry = bufshare_offer_find(bs, event->uuid, key);
	if (event->type == BUFSHARE_EVENT_WITHDRAWN) {
		if (entry)
			bufshare_offer_drop(entry);
		goto out;
	}
	if (!entry)
		entry = bufshare_offer_add(bs, key);
	if (!entry) {
		dev_warn_ratelimited(&bs->dev, "an offer is not heard: no room for it\n");
		goto out;
	}
	memcpy(entry->offer.uuid, event->uuid, sizeof(entry->offer.uuid));
	entry->offer.peer_id = event->peer_id;
	entry->offer.access = event->access;
	entry->offer.size = event->size;
	entry->offer.generation = event->generation;
	entry->offer.metadata_type = event->metadata_type;
out:
	mutex_unlock(&bufshare_offer_lock);
}

/**
 * bufshare_offers_forget() - the session is over, or the device tells all offers again
 * @bs: the device
 *
 * Context: Process context.
 */
void bufshare_offers_forget(struct bufshare *bs)
{
	struct bufshare_offer_entry *entry;
	unsigned long id;

	mutex_lock(&bufshare_offer_lock);
	xa_for_each(&bs->offers, id, entry)
		bufshare_offer_drop(entry);
	mutex_unlock(&bufshare_offer_lock);
}

/**
 * bufshare_offer_next() - an offer after another
 * @bs: the device
 * @arg: in: number of the one before, or 0; out: the offer
 *
 * Return: 0, or -ENOENT past the last.
 */
int bufshare_offer_next(struct bufshare *bs, struct bufshare_offer *arg)
{
	struct bufshare_offer_entry *entry;
	unsigned long id = arg->id;

	mutex_lock(&bufshare_offer_lock);
	entry = xa_find_after(&bs->offers, &id, ULONG_MAX, XA_PRESENT);
	if (entry)
		*arg = entry->offer;
	mutex_unlock(&bufshare_offer_lock);
	return entry ? 0 : -ENOENT;
}
