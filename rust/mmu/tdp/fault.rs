// SPDX-License-Identifier: GPL-2.0

//! The page fault: builds the path to a frame and maps it.
//!
//! By the time this runs the host has found the page, under the read lock, and
//! checked that no notifier invalidated it meanwhile. The walk goes down from the
//! root to the level at which the frame is to be mapped. Missing tables are linked
//! on the way, huge pages in the way are split. Whoever loses a compare-exchange,
//! or meets a frozen entry, has its vCPU fault again: by then another vCPU has
//! done the work.

use super::{
    around::{Around, Nothing},
    change::Conflict,
    walk::{child_entries, child_table, Entry},
    Tdp,
};
use crate::mmu::{
    host::{Event, Host, TableSource},
    role::Role,
    spte::{leaf_change_needs_flush, LeafArgs, Spte},
    sync::{atomic::Ordering, MmuRead, RcuRead},
    table::{Entries, Table, TablePtr},
    types::{Gfn, Level, Pfn},
};

/// A page fault to be served.
#[derive(Debug)]
pub struct Fault<'s, S: ?Sized> {
    /// The frame.
    pub gfn: Gfn,
    /// The access is a write.
    pub write: bool,
    /// The access is an instruction fetch.
    pub exec: bool,
    /// There is no access: the page is mapped in advance.
    pub prefetch: bool,
    /// The level that host and slot allow.
    pub req_level: Level,
    /// The level to map at. Lowered if tables that the NX mitigation needs are in
    /// the way.
    pub goal_level: Level,
    /// The level that the fault's address and cause allow.
    pub max_level: Level,
    /// A huge page is not allowed because of the NX mitigation.
    pub huge_page_disallowed: bool,
    /// The NX mitigation is in use.
    pub nx_workaround: bool,
    /// The host's frame for the start of the mapping of `goal_level`.
    pub pfn: Pfn,
    /// The slot; none if the frame is MMIO.
    pub slot: Option<&'s S>,
    /// The host maps the page writable.
    pub map_writable: bool,
    /// Writes to the frame are tracked: do not make it writable.
    pub write_tracked: bool,
    /// The slot logs dirty pages.
    pub dirty_track: bool,
    /// The generation of the memslots, for MMIO.
    pub mmio_generation: u64,
    /// Memory type, as bits of an entry.
    pub memtype: u64,
    /// The page is MMIO of the host.
    pub is_host_mmio: bool,
}

/// How a page fault ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// The frame is mapped now.
    Fixed,
    /// It was mapped already.
    Spurious,
    /// Fault again.
    Retry,
    /// The access must be emulated: the frame is MMIO, or out of reach.
    Emulate,
    /// The frame is mapped, but the write that faulted is not allowed.
    WriteProtected,
    /// The source of tables was empty.
    OutOfMemory,
}

impl Tdp {
    /// Serves a fault below `root`, to which the caller holds a reference.
    #[inline]
    pub fn map<H: Host, S: TableSource>(
        &self,
        host: &H,
        lock: &MmuRead<'_>,
        root: TablePtr,
        fault: &mut Fault<'_, H::Slot>,
        source: &mut S,
    ) -> Outcome {
        self.map_around(host, lock, root, fault, source, &mut Nothing)
    }

    /// As [`map`](Tdp::map); and when that maps one 4 KiB page, maps also what is
    /// around it, in the same walk.
    pub fn map_around<H: Host, S: TableSource, A: Around>(
        &self,
        host: &H,
        _lock: &MmuRead<'_>,
        root: TablePtr,
        fault: &mut Fault<'_, H::Slot>,
        source: &mut S,
        around: &mut A,
    ) -> Outcome {
        // SAFETY: The caller's reference keeps the root alive.
        let root = unsafe { root.as_ref() };
        let mut role = root.role();
        if root.is_invalid() {
            return Outcome::Retry;
        }
        if fault.gfn >= role.level.root_end() {
            return Outcome::Emulate;
        }

        let rcu = host.rcu_read();
        let mut table = root.entries();
        loop {
            let mut entry = Entry::at(table, fault.gfn, role.level);
            if fault.nx_workaround {
                avoid_disallowed_huge_page(host, fault, &entry, &rcu);
            }
            if entry.spte.is_frozen() {
                return Outcome::Retry;
            }
            if role.level == fault.goal_level {
                let outcome = self.map_leaf(host, root, fault, &mut entry);
                if outcome == Outcome::Fixed && role.level == Level::L4K {
                    self.fill_around(host, table, &root.role(), fault, around);
                }
                return outcome;
            }
            let Some(child) = role.child() else {
                host.bug("rmmu: a fault has no level to be mapped at");
                return Outcome::Retry;
            };
            table = if entry.is_nonleaf() {
                child_entries(host, entry.spte, &rcu)
            } else {
                match self.add_table(host, fault, &mut entry, child, &rcu, source) {
                    Ok(table) => table,
                    Err(outcome) => return outcome,
                }
            };
            role = child;
        }
    }

    /// Links a new table at an entry that is not present or a huge leaf.
    #[inline(never)]
    fn add_table<'r, H: Host, S: TableSource, R: RcuRead>(
        &self,
        host: &H,
        fault: &Fault<'_, H::Slot>,
        entry: &mut Entry<'_>,
        role: Role,
        rcu: &'r R,
        source: &mut S,
    ) -> Result<&'r Entries, Outcome> {
        let table = source.take().ok_or(Outcome::OutOfMemory)?;
        // SAFETY: The source gave the table to us alone.
        unsafe { table.prepare(role, entry.gfn) };
        // SAFETY: Nobody frees it before it is linked.
        host.trace(Event::TableMade(unsafe { table.as_ref() }));

        let linked = if entry.spte.is_present() {
            mark_disallowed(table, fault.huge_page_disallowed);
            self.split_leaf(host, true, entry, table, role)
        } else {
            if !S::PREFILLED {
                // SAFETY: As above.
                unsafe { table.fill(|_| Spte::NONPRESENT) };
            }
            mark_disallowed(table, fault.huge_page_disallowed);
            self.link_table(host, true, entry, table)
        };
        if let Err(Conflict::Raced | Conflict::Refused) = linked {
            host.free_table_now(table);
            return Err(Outcome::Retry);
        }
        if fault.huge_page_disallowed && fault.req_level >= entry.level {
            self.note_nx_candidate(host, table);
        }
        Ok(linked_entries(table, rcu))
    }

    /// Maps the frame, or notes that it is MMIO, at an entry of the goal level.
    #[inline]
    fn map_leaf<H: Host>(
        &self,
        host: &H,
        root: &Table,
        fault: &Fault<'_, H::Slot>,
        entry: &mut Entry<'_>,
    ) -> Outcome {
        let format = host.format();
        let Some(slot) = fault.slot else {
            return self.map_mmio(host, root, fault, entry);
        };

        if entry.is_leaf()
            && (fault.prefetch || entry.spte.access_allowed(format, fault.write, fault.exec))
        {
            return Outcome::Spurious;
        }

        let role = root.role();
        let args = LeafArgs {
            gfn: entry.gfn,
            pfn: fault.pfn,
            level: entry.level,
            access: role.access,
            host_writable: fault.map_writable,
            prefetch: fault.prefetch,
            write_protect: fault.write_tracked,
            nx_huge_page: fault.nx_workaround,
            memtype: fault.memtype,
            is_host_mmio: fault.is_host_mmio,
            ad: role.ad_mode(host),
        };
        let Ok(new) = Spte::leaf(format, &args) else {
            host.bug("rmmu: an entry would have reserved bits set");
            return Outcome::Retry;
        };
        if fault.is_host_mmio && root.note_host_mmio() {
            host.host_mmio_mapped();
        }

        let outcome = if args.loses_write_access() && fault.write {
            Outcome::WriteProtected
        } else if new == entry.spte {
            Outcome::Spurious
        } else {
            Outcome::Fixed
        };
        if new != entry.spte {
            let range = entry.range();
            let old = entry.spte;
            if self.try_change(host, true, entry, new).is_err() {
                return Outcome::Retry;
            }
            // A table was replaced, or a leaf lost a right it had.
            if old.is_nonleaf(entry.level)
                || old.is_leaf(entry.level) && leaf_change_needs_flush(format, old, new)
            {
                host.flush_range(range);
            }
        }
        host.trace(Event::SpteSet {
            cell: entry.cell,
            gfn: entry.gfn,
            level: entry.level,
        });
        // The log is harvested under the write lock, so it can not miss the page
        // between the change above and this.
        if new.is_writable() && fault.dirty_track {
            host.mark_dirty(slot, fault.gfn);
        }
        outcome
    }

    #[cold]
    fn map_mmio<H: Host>(
        &self,
        host: &H,
        root: &Table,
        fault: &Fault<'_, H::Slot>,
        entry: &mut Entry<'_>,
    ) -> Outcome {
        let format = host.format();
        if !format.mmio_caching {
            return Outcome::Emulate;
        }
        if entry.spte.is_present() {
            // A slot was created after this fault looked, and another vCPU saw it.
            return Outcome::Retry;
        }
        let new = Spte::mmio(format, entry.gfn, root.role().access, fault.mmio_generation);
        if new != entry.spte && self.try_change(host, true, entry, new).is_err() {
            return Outcome::Retry;
        }
        host.trace(Event::MmioSet {
            cell: entry.cell,
            gfn: entry.gfn,
            spte: new,
        });
        Outcome::Emulate
    }
}

#[inline]
fn mark_disallowed(table: TablePtr, disallowed: bool) {
    if disallowed {
        // SAFETY: The table is prepared and not linked yet.
        let header = unsafe { table.as_ref() };
        header.nx_disallowed.store(true, Ordering::Relaxed);
    }
}

/// The entries of a table that was linked in the RCU section `'r`.
#[inline]
fn linked_entries<R: RcuRead>(table: TablePtr, _rcu: &R) -> &Entries {
    // SAFETY: Should the table be removed again already, it is not freed before
    // the RCU section ends.
    unsafe { table.entries().as_ref() }
}

/// Goes one level down if there is a table that exists because of the NX
/// mitigation: the huge page in its place would only be split again.
#[inline]
fn avoid_disallowed_huge_page<H: Host, R: RcuRead>(
    host: &H,
    fault: &mut Fault<'_, H::Slot>,
    entry: &Entry<'_>,
    rcu: &R,
) {
    if entry.level != fault.goal_level || !entry.is_nonleaf() {
        return;
    }
    let Some(below) = entry.level.child() else {
        return;
    };
    if child_table(host, entry.spte, rcu)
        .nx_disallowed
        .load(Ordering::Relaxed)
    {
        let index_bits = entry.level.pages().wrapping_sub(below.pages());
        fault.pfn = Pfn(fault.pfn.0 | fault.gfn.0 & index_bits);
        fault.goal_level = below;
    }
}
