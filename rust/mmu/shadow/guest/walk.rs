// SPDX-License-Identifier: GPL-2.0

//! The walk.

use super::{
    fault::{ept_violation, error_code},
    format::GuestFormat,
    tables::protect_clean,
    ErrorCode, Exchange, GuestContext, GuestFault, GuestMemory, WalkEvent,
};
use crate::mmu::types::{Gfn, Level, ACC_ALL, ACC_EXEC, ACC_USER, ACC_WRITE, PAGE_SHIFT};

/// How often the tables are read again because an entry changed under the walk. A
/// guest can make that happen for ever; its vCPU then faults again.
const TRIES: u32 = 8;

/// A table on the way of a walk, and the entry that was used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GuestTable {
    /// Where the entry is.
    pub entry_gpa: u64,
    /// The entry, with the accessed and dirty bits that the walk has set.
    pub entry: u64,
    /// What all entries above allow, as `ACC_` bits.
    pub access: u8,
}

impl GuestTable {
    /// No table.
    pub const NONE: GuestTable = GuestTable {
        entry_gpa: 0,
        entry: 0,
        access: 0,
    };

    /// The frame of the table.
    #[inline]
    pub const fn gfn(&self) -> Gfn {
        Gfn(self.entry_gpa >> PAGE_SHIFT)
    }
}

/// A translation, and the entries that it is made of.
#[derive(Clone, Copy, Debug)]
pub struct GuestWalk {
    /// The level of the first table: the root's, and two with PAE.
    pub top: Level,
    /// The level of the leaf.
    pub level: Level,
    /// The frame of the address; inside a large page, the one that is accessed.
    pub gfn: Gfn,
    /// What the guest allows, as `ACC_` bits. As long as the leaf is clean and the
    /// access is no write, writing is not in it.
    pub access: u8,
    /// By [`Level::slot`]; those from `level` up to `top` count.
    pub tables: [GuestTable; 5],
}

impl GuestWalk {
    /// Room for what a walk finds. It is large, so that a walk fills it in place.
    #[inline(always)]
    #[allow(clippy::new_without_default)]
    pub fn new() -> GuestWalk {
        GuestWalk {
            top: Level::L4K,
            level: Level::L4K,
            gfn: Gfn(0),
            access: 0,
            tables: [GuestTable::NONE; 5],
        }
    }

    /// The first table of the walk is the one at `gfn`.
    #[inline]
    pub(in crate::mmu::shadow) fn starts_at(&self, gfn: Gfn) -> bool {
        let top = self.tables.get(self.top.slot());
        top.is_some_and(|table| table.gfn() == gfn)
    }

    /// Lets the supervisor write to a read-only page of the guest, for a write that
    /// `CR0.WP`, being clear, allows.
    ///
    /// Shadow entries work with `CR0.WP` set. So the page becomes the supervisor's
    /// own and writable until somebody else accesses it. With SMEP, the user bit
    /// also kept the supervisor from executing the page: that must not be lost.
    pub fn write_without_wp(&mut self, smep: bool) {
        self.access = (self.access | ACC_WRITE) & !ACC_USER;
        if smep {
            self.access &= !ACC_EXEC;
        }
    }
}

/// Why there is no translation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stop {
    /// The guest gets a fault.
    Fault(GuestFault),
    /// The entries did not stay still: the guest may try again.
    Retry,
}

/// The pages of the tables on the way, by [`Level::slot`].
type Pages<P> = [Option<P>; 5];

/// A walk that did not reach a leaf.
struct Dead {
    cause: ErrorCode,
    /// What the entries allow together, down to the one that ended the walk.
    access: u8,
}

/// Why accessed and dirty bits were not set.
enum NotMarked {
    Changed,
    Unreachable,
}

/// Translates `address` for an access of this kind, as the guest's CPU would. If
/// that succeeds, `found` says how.
pub fn walk<F: GuestFormat, M: GuestMemory>(
    memory: &M,
    context: &GuestContext,
    address: u64,
    kind: ErrorCode,
    found: &mut GuestWalk,
) -> Result<(), Stop> {
    memory.trace(WalkEvent::Begins { address, kind });
    let fault = |dead| fault::<F, M>(memory, context, address, kind, dead);
    for _ in 0..TRIES {
        let mut pages: Pages<M::Page> = [None; 5];
        if let Err(dead) = descend::<F, M>(memory, context, address, found, &mut pages) {
            return Err(fault(dead));
        }
        let access = found.access;
        let forbidden = context.permission_fault(access, F::key(found.leaf()), kind);
        if let Some(cause) = forbidden {
            return Err(fault(Dead { cause, access }));
        }
        let write = kind.contains(ErrorCode::WRITE);
        match mark::<F, M>(memory, context, address, write, found, &pages) {
            Ok(()) => {
                found.translate::<F>(context, address, write);
                return Ok(());
            }
            Err(NotMarked::Changed) => {}
            Err(NotMarked::Unreachable) => {
                let cause = ErrorCode::NONE;
                return Err(fault(Dead { cause, access }));
            }
        }
    }
    Err(Stop::Retry)
}

/// Reads the entries from the root down to the leaf. `found.access` is what they
/// allow together.
#[inline]
fn descend<F: GuestFormat, M: GuestMemory>(
    memory: &M,
    context: &GuestContext,
    address: u64,
    found: &mut GuestWalk,
    pages: &mut Pages<M::Page>,
) -> Result<(), Dead> {
    let mut level = context.level;
    let mut pointer = context.root;
    let mut access = ACC_ALL;

    // With PAE the third level is no table but registers, which allow everything.
    if context.level == Level::L1G {
        let index = (address >> 30 & 3) as usize;
        pointer = context.pdptrs.get(index).copied().unwrap_or(0);
        memory.trace(WalkEvent::Entry {
            entry: pointer,
            level,
        });
        level = Level::L2M;
        if !F::is_present(context, pointer) {
            return Err(Dead::not_present(access));
        }
    }

    found.top = level;
    loop {
        let table = F::frame(pointer, level, false);
        let offset = F::offset(address, level);
        let page = memory.page(table).ok_or(Dead::not_present(access))?;
        let entry = memory
            .read(page, offset, F::WIDTH)
            .ok_or(Dead::not_present(access))?;
        memory.trace(WalkEvent::Entry { entry, level });
        let used = GuestTable {
            entry_gpa: table.to_gpa() | u64::from(offset),
            entry,
            access,
        };
        access &= F::access(entry);
        if !F::is_present(context, entry) {
            return Err(Dead::not_present(access));
        }
        if context.is_reserved::<F>(entry, level) {
            let cause = ErrorCode::PRESENT | ErrorCode::RSVD;
            return Err(Dead { cause, access });
        }
        if let (Some(to), Some(page_to)) = (
            found.tables.get_mut(level.slot()),
            pages.get_mut(level.slot()),
        ) {
            *to = used;
            *page_to = Some(page);
        }
        match level.child() {
            Some(child) if !F::is_leaf(context, entry, level) => level = child,
            _ => {
                found.level = level;
                found.access = access;
                return Ok(());
            }
        }
        pointer = entry;
    }
}

/// Sets the accessed bit of all entries of the path, and the dirty bit of the leaf
/// for a write.
#[inline]
fn mark<F: GuestFormat, M: GuestMemory>(
    memory: &M,
    context: &GuestContext,
    address: u64,
    write: bool,
    found: &mut GuestWalk,
    pages: &Pages<M::Page>,
) -> Result<(), NotMarked> {
    if !context.accessed_dirty {
        return Ok(());
    }
    let leaf = found.level;
    let mut next = Some(found.top);
    while let Some(level) = next.filter(|level| *level >= leaf) {
        next = level.child();
        let (Some(used), Some(Some(page))) =
            (found.tables.get_mut(level.slot()), pages.get(level.slot()))
        else {
            continue;
        };
        let offset = F::offset(address, level);
        let table = used.gfn();
        let mut new = used.entry | F::ACCESSED;
        if new != used.entry {
            memory.trace(WalkEvent::SetsAccessed { table, offset });
        }
        if level == leaf && write && new & F::DIRTY == 0 {
            memory.trace(WalkEvent::SetsDirty { table, offset });
            if F::EPT && !memory.log_dirty(address) {
                return Err(NotMarked::Unreachable);
            }
            new |= F::DIRTY;
        }
        // Tables in ROM work as they are.
        if new == used.entry || !memory.is_writable(*page) {
            continue;
        }
        match memory.compare_exchange(*page, offset, F::WIDTH, used.entry, new) {
            Exchange::Done => used.entry = new,
            Exchange::Changed => return Err(NotMarked::Changed),
            Exchange::Unreachable => return Err(NotMarked::Unreachable),
        }
    }
    Ok(())
}

fn fault<F: GuestFormat, M: GuestMemory>(
    memory: &M,
    context: &GuestContext,
    address: u64,
    kind: ErrorCode,
    dead: Dead,
) -> Stop {
    let mut code = error_code(context, kind, dead.cause);
    let exit_qualification = (F::EPT && !code.contains(ErrorCode::RSVD))
        .then(|| ept_violation(context, kind, dead.access));
    if context.nested && !F::EPT {
        code = code | kind.of(ErrorCode::GUEST_FINAL | ErrorCode::GUEST_PAGE);
    }
    memory.trace(WalkEvent::Faults(code));
    Stop::Fault(GuestFault {
        address,
        error_code: code,
        exit_qualification,
    })
}

impl Dead {
    fn not_present(access: u8) -> Dead {
        Dead {
            cause: ErrorCode::NONE,
            access,
        }
    }
}

impl GuestWalk {
    #[inline]
    fn leaf(&self) -> u64 {
        self.tables
            .get(self.level.slot())
            .map_or(0, |used| used.entry)
    }

    /// Says what the entries that were found come to for the address.
    #[inline]
    fn translate<F: GuestFormat>(&mut self, context: &GuestContext, address: u64, write: bool) {
        let leaf = self.leaf();
        let inside = (1u64 << F::shift(self.level)).wrapping_sub(1);
        let first = F::frame(leaf, self.level, true);
        self.gfn = first.add(address >> PAGE_SHIFT & inside);
        // After a write the leaf is dirty, or in ROM, where nothing makes it so.
        if !write {
            self.access = protect_clean::<F>(context, leaf, self.access);
        }
    }
}
