// SPDX-License-Identifier: GPL-2.0

//! A table of the page tables, and its header.
//!
//! The header lives in an object of KVM's own cache for `struct kvm_mmu_page`,
//! which vCPUs keep filled already. Code of KVM outside its MMU reads some fields of a
//! root's header, the role above all, by which kvm_intel tells the CPU how many levels
//! there are to walk. These fields are where KVM has them and hold what KVM would hold
//! ([`offset`]); the last 16 bytes of the object belong to the host, for RCU.
//!
//! A header is written in two steps before the table is reachable: by the host
//! (where the entries are), by the engine (what the table is for). From then on
//! those fields never change, and all others are atomics.

use crate::mmu::{
    role::Role,
    spte::Spte,
    sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering},
    types::{Gfn, Hpa, Level},
};
use core::{ptr, ptr::NonNull};

pub use crate::mmu::types::ENTRIES;

/// The entries of a table.
pub type Entries = [AtomicU64; ENTRIES];

/// What of a header the engine may use.
#[cfg(not(feature = "loom"))]
#[allow(dead_code)] // rustc 1.85 overlooks what `const _` uses.
pub(super) const HEADER_SIZE: usize = 168;
/// Where both kinds of header have what they have in common with KVM's. The module
/// checks these numbers against KVM's own header.
#[allow(dead_code)] // As above.
pub mod offset {
    /// `tdp_mmu_page`: the header is of a table of the TDP MMU ([`KIND_TDP`]), or of a
    /// shadow page.
    ///
    /// [`KIND_TDP`]: super::KIND_TDP
    pub const KIND: usize = 32;
    /// `role`, KVM's word of it, the bit for an invalid root included.
    pub const ROLE: usize = 36;
    /// `gfn`.
    pub const GFN: usize = 40;
    /// `spt`, the address of the entries.
    pub const ENTRIES: usize = 48;
    /// `root_count`, or `tdp_mmu_root_count`.
    pub const ROOT_COUNT: usize = 64;
    /// `has_mapped_host_mmio`.
    pub const HOST_MMIO: usize = 68;
}
/// The header is of a table of the TDP MMU.
pub const KIND_TDP: u8 = 1;

/// The header of a table.
#[repr(C)]
#[derive(Debug)]
pub struct Table {
    /// The next root of the VM; roots only.
    pub(super) next_root: AtomicPtr<Table>,
    /// Neighbours in the list of NX candidates; changed under the pages lock.
    pub(super) nx_next: AtomicPtr<Table>,
    pub(super) nx_prev: AtomicPtr<Table>,
    hpa: u64,
    /// [`KIND_TDP`].
    kind: u8,
    /// The table is in the list of NX candidates.
    pub(super) nx_listed: AtomicBool,
    /// The MMU's own reference is to be dropped after a zap.
    pub(super) zap_scheduled: AtomicBool,
    /// There is no huge page here because of the NX mitigation.
    pub(super) nx_disallowed: AtomicBool,
    /// KVM's word. It changes once, when a root becomes invalid.
    role: AtomicU32,
    gfn: u64,
    entries: *mut Entries,
    /// What the word says, in the form in which it is asked for.
    level: u8,
    access: u8,
    smm: bool,
    guest_mode: bool,
    ad_disabled: bool,
    /// References to a root.
    pub(super) refs: AtomicU32,
    /// Host MMIO is mapped below this root.
    host_mmio: AtomicBool,
}

// The atomics of loom have another layout.
#[cfg(not(feature = "loom"))]
const _: () = {
    use core::mem;
    assert!(mem::size_of::<Table>() <= HEADER_SIZE);
    assert!(mem::offset_of!(Table, kind) == offset::KIND);
    assert!(mem::offset_of!(Table, role) == offset::ROLE);
    assert!(mem::offset_of!(Table, gfn) == offset::GFN);
    assert!(mem::offset_of!(Table, entries) == offset::ENTRIES);
    assert!(mem::offset_of!(Table, refs) == offset::ROOT_COUNT);
    assert!(mem::offset_of!(Table, host_mmio) == offset::HOST_MMIO);
    assert!(mem::size_of::<AtomicBool>() == 1);
};

impl Table {
    /// A header for these entries, still without a purpose.
    #[inline]
    fn new(entries: NonNull<Entries>, hpa: Hpa) -> Table {
        Table {
            next_root: AtomicPtr::new(ptr::null_mut()),
            nx_next: AtomicPtr::new(ptr::null_mut()),
            nx_prev: AtomicPtr::new(ptr::null_mut()),
            hpa: hpa.0,
            kind: KIND_TDP,
            nx_listed: AtomicBool::new(false),
            zap_scheduled: AtomicBool::new(false),
            nx_disallowed: AtomicBool::new(false),
            role: AtomicU32::new(0),
            gfn: 0,
            entries: entries.as_ptr(),
            level: 0,
            access: 0,
            smm: false,
            guest_mode: false,
            ad_disabled: false,
            refs: AtomicU32::new(0),
            host_mmio: AtomicBool::new(false),
        }
    }

    /// The level of the table.
    #[inline]
    pub fn level(&self) -> Level {
        // `prepare` wrote a level, so the alternative is never taken.
        Level::new(self.level).unwrap_or(Level::L4K)
    }

    /// The role of the table.
    #[inline]
    pub fn role(&self) -> Role {
        Role {
            word: self.role.load(Ordering::Relaxed) & !Role::INVALID,
            level: self.level(),
            smm: self.smm,
            guest_mode: self.guest_mode,
            ad_disabled: self.ad_disabled,
            access: self.access,
        }
    }

    /// The first frame the table translates.
    #[inline]
    pub fn gfn(&self) -> Gfn {
        Gfn(self.gfn)
    }

    /// The address of the entries.
    #[inline]
    pub fn hpa(&self) -> Hpa {
        Hpa(self.hpa)
    }

    /// The tree maps the SMM address space.
    #[inline]
    pub fn is_smm(&self) -> bool {
        self.smm
    }

    /// Nobody may map below this root any more.
    #[inline]
    pub fn is_invalid(&self) -> bool {
        self.role.load(Ordering::Acquire) & Role::INVALID != 0
    }

    /// Nobody may map below this root from now on.
    #[inline]
    pub(super) fn invalidate(&self) {
        self.role.fetch_or(Role::INVALID, Ordering::Release);
    }

    /// Host MMIO is mapped below this root.
    #[inline]
    pub fn has_host_mmio(&self) -> bool {
        self.host_mmio.load(Ordering::Relaxed)
    }

    /// Notes that host MMIO is mapped below this root; true the first time.
    #[inline]
    pub(super) fn note_host_mmio(&self) -> bool {
        !self.has_host_mmio() && !self.host_mmio.swap(true, Ordering::AcqRel)
    }

    /// The entries.
    #[inline]
    pub fn entries(&self) -> &Entries {
        // SAFETY: `adopt` stored a valid pointer, and entries live as long as
        // their header, by its contract.
        unsafe { &*self.entries }
    }
}

/// A pointer to a table's header.
///
/// # Invariants
///
/// Points to a table that [`adopt`](TablePtr::adopt) set up. Every copy is used
/// only while the table is alive: because it is not linked yet, the user holds a
/// reference to the root, or is in the RCU section in which it found the table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
pub struct TablePtr(NonNull<Table>);

// SAFETY: A table is shared by all CPUs; what is not atomic does not change once
// it is reachable.
unsafe impl Send for TablePtr {}
// SAFETY: As above.
unsafe impl Sync for TablePtr {}

impl TablePtr {
    /// Takes in a new table.
    ///
    /// # Safety
    ///
    /// `header` points to memory for a [`Table`] and `entries`, whose physical
    /// address is `hpa`, to a page. Nobody else uses either. Both live until the
    /// table is freed by [`Host`](crate::mmu::Host)'s functions, and no copy of
    /// the result is used after that.
    #[inline]
    pub unsafe fn adopt(header: NonNull<Table>, entries: NonNull<Entries>, hpa: Hpa) -> TablePtr {
        // SAFETY: The header is ours alone.
        unsafe { header.as_ptr().write(Table::new(entries, hpa)) };
        // INVARIANT: By the contract of this function.
        TablePtr(header)
    }

    /// The table with this header.
    ///
    /// # Safety
    ///
    /// `header` comes from [`as_ptr`](TablePtr::as_ptr), and the type's
    /// invariants hold for every copy of the result.
    #[inline]
    pub unsafe fn from_raw(header: NonNull<Table>) -> TablePtr {
        // INVARIANT: By the contract of this function.
        TablePtr(header)
    }

    /// The header.
    #[inline]
    pub fn as_ptr(self) -> NonNull<Table> {
        self.0
    }

    /// The address of the entries.
    #[inline]
    pub fn hpa(self) -> Hpa {
        // SAFETY: The table is alive by the type's invariants, and the address
        // does not change after `adopt`.
        Hpa(unsafe { ptr::addr_of!((*self.0.as_ptr()).hpa).read() })
    }

    /// The entries.
    #[inline]
    pub fn entries(self) -> NonNull<Entries> {
        // SAFETY: As for `hpa`; `adopt` stored a pointer that is not null.
        unsafe { NonNull::new_unchecked(ptr::addr_of!((*self.0.as_ptr()).entries).read()) }
    }

    /// The header by reference.
    ///
    /// # Safety
    ///
    /// The table is alive as long as `'a`, and nobody prepares it any more.
    #[inline]
    pub unsafe fn as_ref<'a>(self) -> &'a Table {
        // SAFETY: By the contract of this function.
        unsafe { self.0.as_ref() }
    }

    /// Says what a table is for, before it is linked or becomes a root.
    ///
    /// # Safety
    ///
    /// The table is not reachable for anybody else.
    #[inline]
    pub(super) unsafe fn prepare(self, role: Role, gfn: Gfn) {
        let raw = self.0.as_ptr();
        // SAFETY: The table is alive by the invariants and ours alone by the
        // contract of this function.
        unsafe {
            ptr::addr_of_mut!((*raw).role).write(AtomicU32::new(role.complete().word));
            ptr::addr_of_mut!((*raw).level).write(role.level.get());
            ptr::addr_of_mut!((*raw).access).write(role.access);
            ptr::addr_of_mut!((*raw).smm).write(role.smm);
            ptr::addr_of_mut!((*raw).guest_mode).write(role.guest_mode);
            ptr::addr_of_mut!((*raw).ad_disabled).write(role.ad_disabled);
            ptr::addr_of_mut!((*raw).gfn).write(gfn.0);
        }
    }

    /// Fills the entries of a table that is not linked yet.
    ///
    /// # Safety
    ///
    /// The table is not reachable for anybody else.
    #[inline]
    pub(super) unsafe fn fill(self, mut entry: impl FnMut(usize) -> Spte) {
        let first = self.entries().as_ptr().cast::<AtomicU64>();
        for i in 0..ENTRIES {
            // SAFETY: `i` is within the page, which is ours alone by the contract
            // of this function.
            unsafe { first.add(i).write(AtomicU64::new(entry(i).0)) };
        }
    }
}
