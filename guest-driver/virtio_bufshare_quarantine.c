// SPDX-License-Identifier: GPL-2.0
/*
 * virtio_bufshare: the quarantine, which is the loans that no open file can end. Every loan holds a
 * reference to the module; <debugfs>/bufshare/quarantine tells what keeps it from being unloaded.
 *
 * A session that is over can tell no RELEASED any more. Its loans end when a later session of the
 * same device answers that no export of an earlier one lingers. Not one of another epoch: a device
 * that lost its state knows nothing of what it lent out before. Those stay until a reboot.
 */
#include <linux/debugfs.h>
#include <linux/seq_file.h>
#include <linux/spinlock.h>
#include <linux/string.h>

#include "virtio_bufshare.h"

static struct dentry *bufshare_debugfs;

/**
 * bufshare_loans_settle() - the device answered that nothing of earlier sessions lingers
 * @bs: the device
 *
 * Context: Process context, while the session lasts.
 */
void bufshare_loans_settle(struct bufshare *bs)
{
	struct bufshare_loan *loan, *found;

	do {
		found = NULL;
		spin_lock(&bufshare_loan_lock);
		list_for_each_entry(loan, &bufshare_loans, node) {
			if (bufshare_loan_in_session(loan) ||
			    loan->peer_id != bs->config.peer_id ||
			    loan->epoch != bs->config.epoch ||
			    strcmp(loan->bs->where, bs->where))
				continue;
			kref_get(&loan->ref);
			found = loan;
			break;
		}
		spin_unlock(&bufshare_loan_lock);
		if (found)
			bufshare_loan_end(found, NULL);
		bufshare_loan_put(found);
	} while (found);
}

static bool bufshare_loan_quarantined(const struct bufshare_loan *loan)
{
	return !loan->inbox.file || !bufshare_loan_in_session(loan) || !loan->handle;
}

/**
 * bufshare_loans_quarantined() - how many loans no open file can release
 *
 * Return: the number, of all devices.
 */
unsigned int bufshare_loans_quarantined(void)
{
	struct bufshare_loan *loan;
	unsigned int n = 0;

	spin_lock(&bufshare_loan_lock);
	list_for_each_entry(loan, &bufshare_loans, node)
		n += bufshare_loan_quarantined(loan);
	spin_unlock(&bufshare_loan_lock);
	return n;
}

static const char *bufshare_loan_reason(const struct bufshare_loan *loan)
{
	if (!loan->handle)
		return "unanswered";
	if (!bufshare_loan_in_session(loan))
		return "session-over";
	if (READ_ONCE(loan->bs->dead))
		return "device-dead";
	if (loan->state == BUFSHARE_LOAN_RELEASING)
		return "in-use";
	return "exported";
}

static int bufshare_quarantine_show(struct seq_file *m, void *unused)
{
	struct bufshare_loan *loan;

	seq_puts(m, "# device epoch handle bytes why owner uuid\n");
	spin_lock(&bufshare_loan_lock);
	list_for_each_entry(loan, &bufshare_loans, node)
		seq_printf(m, "%s %u %llu %llu %s %s %pUb\n", loan->bs->where, loan->epoch,
			   loan->handle, loan->size, bufshare_loan_reason(loan),
			   loan->owner, loan->uuid);
	spin_unlock(&bufshare_loan_lock);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(bufshare_quarantine);

/**
 * bufshare_quarantine_init() - the debugfs files
 */
void bufshare_quarantine_init(void)
{
	bufshare_debugfs = debugfs_create_dir("bufshare", NULL);
	debugfs_create_file("quarantine", 0400, bufshare_debugfs, NULL, &bufshare_quarantine_fops);
	bufshare_imports_init(bufshare_debugfs);
}

/**
 * bufshare_quarantine_exit() - undo bufshare_quarantine_init()
 */
void bufshare_quarantine_exit(void)
{
	debugfs_remove_recursive(bufshare_debugfs);
}
