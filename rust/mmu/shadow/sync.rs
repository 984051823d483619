// SPDX-License-Identifier: GPL-2.0

//! Bringing pages up to date with the guest's tables.
//!
//! Only what is mapped is looked at: what is not mapped is looked up in the guest's
//! tables at the next fault anyway. The host's frame of a guest frame can not have
//! changed while it is mapped, so that an entry only needs new permissions, or has
//! to go.

use super::{
    guest::{GuestTables, GROUP},
    host::{Counter, ShadowHost, ShadowVcpu},
    leaf::Leaf,
    page::{Entry, Page, PagePtr},
    roots::Root,
    unsync::{are_untouched, is_untouched, Purpose, Unsynced},
    Op, Shadow,
};
use crate::mmu::{
    spte::Spte,
    sync::{atomic::Ordering, MmuLocked, MmuWrite},
    table::ENTRIES,
    types::{Level, PAGE_SHIFT},
};

/// A page can not be brought up to date, and must be zapped.
#[derive(Debug)]
pub(super) struct OutOfSync;

/// Others want the lock, and not all is done.
#[derive(Debug)]
pub(super) struct Interrupted;

impl Shadow {
    /// Brings all pages below a root up to date, because the guest flushed its TLB
    /// or loads the root. The caller holds a reference to the root.
    pub fn sync_root<H: ShadowHost, V: ShadowVcpu<H>, G: GuestTables>(
        &self,
        host: &H,
        lock: &mut MmuWrite<'_>,
        vcpu: &mut V,
        guest: &G,
        root: PagePtr,
    ) {
        loop {
            let done = self.run(host, lock, |op| {
                op.sync_children(vcpu, guest, root.page(op.lock))
            });
            match done {
                Ok(()) => return,
                Err(Interrupted) => lock.relax(host),
            }
        }
    }

    /// Brings the translation of one address up to date, because the guest flushes
    /// it.
    pub fn invalidate_addr<H: ShadowHost, V: ShadowVcpu<H>, G: GuestTables>(
        &self,
        host: &H,
        lock: &mut MmuWrite<'_>,
        vcpu: &mut V,
        guest: &G,
        root: Root<'_>,
        addr: u64,
    ) {
        self.run(host, lock, |op| {
            let mut at = op.first_entry(root, addr);
            while let Some(entry) = at {
                if entry.page.is_unsync() {
                    op.invalidate_entry(vcpu, guest, entry);
                }
                if !entry.page.has_unsync_children() {
                    return;
                }
                at = op.next_entry(entry, addr);
            }
        });
    }
}

impl<'l, H: ShadowHost> Op<'l, H> {
    /// Brings all pages below `parent` up to date.
    pub(super) fn sync_children<V: ShadowVcpu<H>, G: GuestTables>(
        &self,
        vcpu: &mut V,
        guest: &G,
        parent: &'l Page,
    ) -> Result<(), Interrupted> {
        loop {
            let mut unsynced = Unsynced::new();
            self.shadow.syncing.store(true, Ordering::Relaxed);
            let all = self.collect_unsync(parent, &mut unsynced);
            // First the protection, then the look at the tables: what is written in
            // between faults.
            for page in unsynced.iter() {
                let smm = page.role().is_smm();
                if let Some(slot) = self.host.slot(smm, page.gfn()) {
                    let flush = self.protect_gfn(slot, page.gfn(), Level::L4K);
                    self.owe_flush(flush.needed());
                }
            }
            if !unsynced.is_empty() {
                self.flush_now();
            }
            for page in unsynced.iter() {
                self.mark_synced(page);
                match self.sync_page(vcpu, guest, page) {
                    Ok(flush) => self.owe_flush(flush),
                    Err(OutOfSync) => {
                        self.prepare_zap(page);
                    }
                }
            }
            self.shadow.syncing.store(false, Ordering::Release);
            if all.is_ok() {
                return Ok(());
            }
            if self.host.need_break() {
                return Err(Interrupted);
            }
        }
    }

    /// Brings a page up to date; true if a flush is owed.
    ///
    /// The flush is for what the MMU needs: notifiers and the dirty log must not
    /// overlook what a CPU still has. For the guest's own changes it flushes
    /// itself.
    pub(super) fn sync_page<V: ShadowVcpu<H>, G: GuestTables>(
        &self,
        vcpu: &mut V,
        guest: &G,
        page: &'l Page,
    ) -> Result<bool, OutOfSync> {
        if !page.role().syncs_with(vcpu.root_role()) {
            // The page goes, and is made again for the mode. That is right whoever is
            // to blame, so that it is no reason to end the VM.
            self.host
                .warn("rmmu: a page would be synced in a mode it is not for");
            return Err(OutOfSync);
        }
        self.host.count(Counter::Synced, 1);
        let mut flush = false;
        // Most tables are sparse, so that entries nobody has written to are passed
        // over by the group.
        for (group, cells) in page.entries().chunks_exact(GROUP).enumerate() {
            if are_untouched(cells) {
                continue;
            }
            let first = group.wrapping_mul(GROUP);
            // Entries side by side are read at once: what the guest writes from now
            // on faults, or counts when it flushes.
            let mut now = [0; GROUP];
            if !guest.read_group(guest_entry_gpa::<G>(page, first), &mut now) {
                return Err(OutOfSync);
            }
            for (i, raw) in now.into_iter().enumerate() {
                let entry = Entry::new(page, first.wrapping_add(i));
                if !is_untouched(entry.spte()) {
                    flush |= self.sync_entry(vcpu, guest, entry, raw)?;
                }
            }
        }
        Ok(flush)
    }

    fn invalidate_entry<V: ShadowVcpu<H>, G: GuestTables>(
        &self,
        vcpu: &mut V,
        guest: &G,
        entry: Entry<'l>,
    ) {
        if is_untouched(entry.spte()) {
            return;
        }
        let synced = if entry.page.role().syncs_with(vcpu.root_role()) {
            guest
                .read_entry(guest_entry_gpa::<G>(entry.page, entry.index))
                .ok_or(OutOfSync)
                .and_then(|raw| self.sync_entry(vcpu, guest, entry, raw))
        } else {
            Err(OutOfSync)
        };
        match synced {
            Ok(flush) => self.owe_flush(flush),
            Err(OutOfSync) => {
                self.zap_entry(entry, false);
                self.owe_flush(true);
            }
        }
    }

    /// Brings an entry of an unsync page, for which the guest's table says `raw`, up
    /// to date; true if a flush is owed.
    fn sync_entry<V: ShadowVcpu<H>, G: GuestTables>(
        &self,
        vcpu: &mut V,
        guest: &G,
        entry: Entry<'l>,
        raw: u64,
    ) -> Result<bool, OutOfSync> {
        let format = self.format();
        let page = entry.page;
        let Some(leaf) = guest.leaf_4k(raw) else {
            return Ok(self.drop_leaf(entry));
        };
        let access = page.role().access() & leaf.access;
        let old = entry.spte();

        if old.is_mmio(format) {
            // Only what still is no memory. A slot may have come since: then the entry
            // has an old generation, and a new one would make it look right.
            if old.mmio_gfn(format) == leaf.gfn && vcpu.slot(self.host, leaf.gfn).is_none() {
                entry.store(Spte::mmio(format, leaf.gfn, access, vcpu.mmio_generation()));
            } else {
                entry.store(Spte::NONPRESENT);
            }
            return Ok(false);
        }
        let unmapped = access == 0 && format.present == Spte::NONPRESENT.raw();
        if unmapped || !old.is_present() || leaf.gfn != entry.gfn() {
            return Ok(self.drop_leaf(entry));
        }
        if page.access_of(entry.index) == access {
            return Ok(false);
        }
        let Some(slot) = vcpu.slot(self.host, leaf.gfn) else {
            return Ok(self.drop_leaf(entry));
        };
        let leaf = Leaf {
            gfn: leaf.gfn,
            pfn: old.pfn(format),
            access,
            write_fault: false,
            host_writable: old.is_host_writable(format),
            prefetch: false,
            memtype: old.memtype(format),
            is_host_mmio: format.me_value != 0 && old.raw() & format.me_value == 0,
        };
        let made = self.make_leaf_for(slot, page, &leaf, old, Purpose::Sync);
        let (new, _) = made.ok_or(OutOfSync)?;
        page.set_translation(entry.index, leaf.gfn, access);
        let flush = self.update(entry, new);
        if new.is_writable() && self.host.dirty_logged(slot) {
            self.host.mark_dirty(slot, leaf.gfn);
        }
        Ok(flush)
    }
}

/// Where the guest's entry is that an entry of `page`, of the last level, shadows.
pub(super) fn guest_entry_gpa<G: GuestTables>(page: &Page, index: usize) -> u64 {
    let first = if page.role().has_small_entries() {
        usize::from(page.role().quadrant()).wrapping_mul(ENTRIES)
    } else {
        0
    };
    let offset = (first.wrapping_add(index) as u64).wrapping_mul(G::ENTRY_BYTES);
    (page.gfn().0 << PAGE_SHIFT).wrapping_add(offset)
}
