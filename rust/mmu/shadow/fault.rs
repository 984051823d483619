// SPDX-License-Identifier: GPL-2.0

//! The page fault: direct maps, and shadows of a guest's tables.
//!
//! The vCPU found out all about the fault without the lock: what the guest's tables
//! say, the slot, the host's page. Under the lock, a notifier may have made the
//! page stale, which the caller checks; and the guest may have changed its tables,
//! which is checked here: each entry of the guest is read again when its table is
//! protected from writes, or known to be unsync.

use super::{
    find::{Child, Context, Indirect, NeverUnsync},
    guest::{GuestTables, GuestWalk, GROUP},
    host::{ShadowHost, ShadowVcpu},
    leaf::Leaf,
    page::{Entry, Nx},
    roots::Root,
    sync::Interrupted,
    Op, Shadow,
};
use crate::mmu::{
    host::Event,
    spte::Spte,
    sync::MmuWrite,
    tdp::{Fault, Outcome},
    types::{Level, Pfn},
};

/// The root is not that of the tables that were walked: the guest's top table was no
/// memory yet when a PAE entry was loaded, or the entry has changed since. It has to
/// be loaded again before the fault can be served.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WrongRoot;

/// The guest's entries around the one of the last level that a walk used.
pub(super) type Group = [u64; GROUP];

impl Shadow {
    /// Serves a fault in a space that is mapped directly.
    ///
    /// The caller made room ([`make_available`](Shadow::make_available)), and
    /// checked under this hold of the lock that nothing is stale.
    pub fn map_direct<H: ShadowHost, V: ShadowVcpu<H>>(
        &self,
        host: &H,
        lock: &mut MmuWrite<'_>,
        vcpu: &mut V,
        root: Root<'_>,
        fault: &mut Fault<'_, H::Slot>,
    ) -> Outcome {
        self.run(host, lock, |op| {
            let addr = fault.gfn.to_gpa();
            let Some(first) = op.first_entry(root, addr) else {
                return Outcome::Retry;
            };
            let access = first.page.role().access();
            let entry = match op.walk_direct(&mut NeverUnsync(vcpu), first, addr, access, fault) {
                Ok(entry) => entry,
                Err(outcome) => return outcome,
            };
            let outcome = op.finish_fault(vcpu, root, entry, access, fault);
            if may_go_on(outcome) {
                op.prefetch_direct(vcpu, entry);
            }
            outcome
        })
    }

    /// Serves a fault at `addr` in a guest with tables of its own, which `walk`
    /// translated. The flag says that the guest wrote to a table that this very
    /// write used. Nothing is mapped if the walk did not begin at the root's table.
    ///
    /// `adjust` sets the fault's levels from what host and slot allow; it is called
    /// when the tables on the path are accounted for.
    #[allow(clippy::too_many_arguments)]
    pub fn map_guest<H: ShadowHost, V: ShadowVcpu<H>, G: GuestTables>(
        &self,
        host: &H,
        lock: &mut MmuWrite<'_>,
        vcpu: &mut V,
        guest: &G,
        root: Root<'_>,
        addr: u64,
        walk: &GuestWalk,
        fault: &mut Fault<'_, H::Slot>,
        adjust: impl FnOnce(&mut Fault<'_, H::Slot>),
    ) -> Result<(Outcome, bool), WrongRoot> {
        self.run(host, lock, |op| {
            let first = op.first_entry(root, addr);
            let first = first.filter(|entry| walk.starts_at(entry.page.gfn()));
            let first = first.ok_or(WrongRoot)?;
            let mut path = GuestPath {
                guest,
                walk,
                addr,
                group: [0; GROUP],
                wrote_own_table: false,
            };
            let outcome = op.map_guest(vcpu, &mut path, root, first, fault, adjust);
            Ok((outcome, path.wrote_own_table))
        })
    }
}

/// A walk of the guest's tables that is followed.
struct GuestPath<'a, G> {
    guest: &'a G,
    walk: &'a GuestWalk,
    addr: u64,
    group: Group,
    wrote_own_table: bool,
}

impl<G: GuestTables> GuestPath<'_, G> {
    /// The guest's entry of a level is not what it was when the guest's tables were
    /// walked.
    fn has_changed(&mut self, level: Level) -> bool {
        let Some(table) = self.walk.tables.get(level.slot()) else {
            return true;
        };
        let now = if level == Level::L4K {
            let bytes = G::ENTRY_BYTES.wrapping_mul(GROUP as u64);
            let start = table.entry_gpa & !bytes.wrapping_sub(1);
            let index =
                (table.entry_gpa.wrapping_sub(start) >> G::ENTRY_BYTES.trailing_zeros()) as usize;
            if self.guest.read_group(start, &mut self.group) {
                self.group.get(index).copied()
            } else {
                None
            }
        } else {
            self.guest.read_entry(table.entry_gpa)
        };
        now != Some(table.entry)
    }
}

impl<'l, H: ShadowHost> Op<'l, H> {
    fn map_guest<V: ShadowVcpu<H>, G: GuestTables>(
        &self,
        vcpu: &mut V,
        path: &mut GuestPath<'_, G>,
        root: Root<'_>,
        first: Entry<'l>,
        fault: &mut Fault<'_, H::Slot>,
        adjust: impl FnOnce(&mut Fault<'_, H::Slot>),
    ) -> Outcome {
        let access = path.walk.access;
        // The table of the root is protected from writes, or the root is invalid
        // and it does not matter.
        if path.has_changed(path.walk.top) {
            return Outcome::Retry;
        }
        let entry = match self.walk_guest(vcpu, path, first, fault.write) {
            Ok(entry) => entry,
            Err(outcome) => return outcome,
        };
        // A table that is shadowed is not mapped by a huge page, so that the level
        // is known only now.
        adjust(fault);
        let guest = path.guest;
        let mut cx = Indirect::new(vcpu, guest);
        let entry = match self.walk_direct(&mut cx, entry, path.addr, access, fault) {
            Ok(entry) => entry,
            Err(outcome) => return outcome,
        };
        let outcome = self.finish_fault(vcpu, root, entry, access, fault);
        if may_go_on(outcome) {
            if entry.page.role().is_direct() {
                self.prefetch_direct(vcpu, entry);
            } else {
                self.prefetch_guest(vcpu, guest, entry, &path.group);
            }
        }
        outcome
    }

    /// Goes down to the level of the guest's leaf, and links what is missing.
    fn walk_guest<V: ShadowVcpu<H>, G: GuestTables>(
        &self,
        vcpu: &mut V,
        path: &mut GuestPath<'_, G>,
        first: Entry<'l>,
        write: bool,
    ) -> Result<Entry<'l>, Outcome> {
        let mut entry = first;
        loop {
            entry.page.clear_writes();
            let level = match entry.level().child() {
                Some(level) if entry.level() > path.walk.level => level,
                _ => return Ok(entry),
            };
            let Some(table) = path.walk.tables.get(level.slot()).copied() else {
                return Err(Outcome::Retry);
            };
            let guest = path.guest;
            let mut cx = Indirect::new(vcpu, guest);
            let child = self
                .get_child(&mut cx, entry, table.gfn(), false, table.access)
                .ok_or(Outcome::OutOfMemory)?;
            if let Child::Found(page) = child {
                // A CPU keeps no entry that is not present, so the guest need not
                // flush when it links a table: what is linked is up to date first.
                // A page of the last level was when it was found.
                if page.has_unsync_children() {
                    if let Err(Interrupted) = self.sync_children(vcpu, guest, page) {
                        vcpu.request_sync();
                        return Err(Outcome::Retry);
                    }
                }
            }
            // Also if the page was linked already: what the walk found may be older
            // than what the page was made from.
            if path.has_changed(level) {
                return Err(Outcome::Retry);
            }
            let page = match child {
                Child::Linked(page) => page,
                Child::Found(page) => {
                    self.link(vcpu, entry, page)
                        .map_err(|_| Outcome::OutOfMemory)?;
                    page
                }
            };
            if write && table.gfn() == path.walk.gfn {
                path.wrote_own_table = true;
            }
            entry = Entry::at(page, path.addr);
        }
    }

    /// Goes down to the fault's goal level through direct pages.
    fn walk_direct<C: Context<H>>(
        &self,
        cx: &mut C,
        first: Entry<'l>,
        addr: u64,
        access: u8,
        fault: &mut Fault<'_, H::Slot>,
    ) -> Result<Entry<'l>, Outcome> {
        let mut entry = first;
        loop {
            if fault.nx_workaround {
                self.avoid_disallowed_huge_page(entry, fault);
            }
            let level = entry.level();
            if level == fault.goal_level {
                return Ok(entry);
            }
            if level < fault.goal_level || level == Level::L4K {
                self.host.bug("rmmu: a fault has no level to be mapped at");
                return Err(Outcome::Retry);
            }
            self.check_direct_child(entry, access);
            let gfn = fault.gfn.round_down(level);
            let child = self
                .get_child(cx, entry, gfn, true, access)
                .ok_or(Outcome::OutOfMemory)?;
            let page = match child {
                Child::Linked(page) => page,
                Child::Found(page) => {
                    self.link(cx, entry, page)
                        .map_err(|_| Outcome::OutOfMemory)?;
                    if fault.huge_page_disallowed {
                        self.note_nx_candidate(page, fault.req_level >= level);
                    }
                    page
                }
            };
            entry = Entry::at(page, addr);
        }
    }

    /// A direct page below a large page of the guest grants what that did when it
    /// was linked. If the guest's page became dirty, that is not enough any more.
    fn check_direct_child(&self, entry: Entry<'l>, access: u8) {
        if let Some(child) = self.child_of(entry) {
            if child.role().access() != access {
                self.unlink(entry, child);
                self.owe_flush(true);
            }
        }
    }

    /// Goes one level down if there is a page that exists because of the NX
    /// mitigation: the huge page in its place would only be split again.
    fn avoid_disallowed_huge_page(&self, entry: Entry<'l>, fault: &mut Fault<'_, H::Slot>) {
        if entry.level() != fault.goal_level {
            return;
        }
        let (Some(child), Some(below)) = (self.child_of(entry), entry.level().child()) else {
            return;
        };
        if child.nx.get() != Nx::Free {
            let index_bits = entry.level().pages().wrapping_sub(below.pages());
            fault.pfn = Pfn(fault.pfn.0 | fault.gfn.0 & index_bits);
            fault.goal_level = below;
        }
    }

    /// Maps what the fault is about, at an entry of the goal level.
    fn finish_fault<V: ShadowVcpu<H>>(
        &self,
        vcpu: &mut V,
        root: Root<'_>,
        entry: Entry<'l>,
        access: u8,
        fault: &Fault<'_, H::Slot>,
    ) -> Outcome {
        let format = self.format();
        let gfn = fault.gfn.round_down(entry.level());
        let Some(slot) = fault.slot else {
            if entry.spte().is_present() {
                self.unlink_or_drop(entry);
                self.owe_flush(true);
            }
            if format.mmio_caching {
                let spte = Spte::mmio(format, gfn, access, fault.mmio_generation);
                entry.store(spte);
                self.host.trace(Event::MmioSet {
                    cell: entry.cell(),
                    gfn,
                    spte,
                });
            }
            return Outcome::Emulate;
        };
        if fault.is_host_mmio {
            match root {
                Root::Page(root) if root.page(self.lock).note_host_mmio() => {
                    self.host.host_mmio_mapped();
                }
                Root::Page(_) => {}
                Root::Pae(_) => self.host.host_mmio_mapped_without_root(),
            }
        }
        let leaf = Leaf {
            gfn,
            pfn: fault.pfn,
            access,
            write_fault: fault.write,
            host_writable: fault.map_writable,
            prefetch: fault.prefetch,
            memtype: fault.memtype,
            is_host_mmio: fault.is_host_mmio,
        };
        self.set_leaf(vcpu, slot, entry, &leaf)
    }
}

/// The fault was served, so that neighbours may be mapped in advance.
fn may_go_on(outcome: Outcome) -> bool {
    matches!(outcome, Outcome::Fixed | Outcome::WriteProtected)
}
