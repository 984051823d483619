// SPDX-License-Identifier: GPL-2.0

//! What the 64 bits of an entry mean.
//!
//! EPT and NPT put permissions into different bits, and without accessed and
//! dirty bits in hardware the software keeps its own. All of that is data: a
//! [`SpteFormat`], taken from KVM's masks once a VM. The layout is KVM's own, so
//! that everything else that looks at entries understands ours.
//!
//! The software bits:
//!
//! - bit 11: the entry is present to the MMU. An entry that caches "this is MMIO"
//!   may be present to hardware, never to the MMU.
//! - bits 60-61: how accesses are tracked (by hardware; by making the entry
//!   inaccessible; writes by protection only).
//! - bits 52, 54, 62: the permissions of an entry made inaccessible.
//! - bit 56: the page was mapped ahead of any access, next to one that faulted.
//!   Gone as soon as it is known whether that was of use.
//! - host-writable: the host maps the page writable. Fixed while the entry lives.
//! - MMU-writable: the entry may be made writable without asking anybody.
//!
//! Writable implies MMU-writable implies host-writable. Clearing MMU-writable
//! needs a TLB flush before `mmu_lock` drops, because a CPU may still have the
//! entry as writable although it is write-protected for the dirty log.

use crate::mmu::types::{Gfn, Hpa, Level, Pfn, ACC_EXEC, ACC_READ, ACC_USER, ACC_WRITE, ENTRIES};

pub(crate) const HW_PRESENT: u64 = 1 << 0;
pub(crate) const WRITABLE: u64 = 1 << 1;
pub(crate) const LARGE: u64 = 1 << 7;
pub(crate) const MMU_PRESENT: u64 = 1 << 11;
pub(crate) const SUPPRESS_VE: u64 = 1 << 63;

const AHEAD: u64 = 1 << 56;

pub(crate) const AD_MASK: u64 = 3 << 60;
pub(crate) const AD_DISABLED: u64 = 1 << 60;
pub(crate) const AD_WRITE_PROTECT_ONLY: u64 = 2 << 60;

/// EPT's read, execute and user-execute: what an inaccessible entry remembers.
pub(crate) const TRACK_SAVED: u64 = 1 << 0 | 1 << 2 | 1 << 10;
pub(crate) const TRACK_SHIFT: u32 = 52;

/// EPT's memory type, and "ignore PAT".
pub(crate) const EPT_MEMTYPE: u64 = 0xf << 3;

pub(crate) const EPT_EXECUTE: u64 = 1 << 2;
pub(crate) const EPT_USER_EXECUTE: u64 = 1 << 10;

/// An MMIO entry keeps bits 0-6 of the generation in bits 3-9, and 7-17 in 52-62.
pub(crate) const GEN_LOW_MASK: u64 = 0x7f << 3;
pub(crate) const GEN_LOW_SHIFT: u32 = 3;
pub(crate) const GEN_HIGH_MASK: u64 = 0x7ff << 52;
pub(crate) const GEN_HIGH_SHIFT: u32 = 45;

/// How far address bits that the L1TF mitigation occupies are moved up.
pub(crate) const NONPRESENT_GFN_SHIFT: u32 = 5;

/// The format of entries: hardware's bits, KVM's choice of software bits, and
/// what of it must be zero.
#[derive(Clone, Copy, Debug)]
pub struct SpteFormat {
    /// Set in every present entry (NPT: the present bit, EPT: suppress #VE).
    pub present: u64,
    /// The accessed bit.
    pub accessed: u64,
    /// The dirty bit.
    pub dirty: u64,
    /// The no-execute bit; 0 if the format has execute bits.
    pub nx: u64,
    /// The user bit; 0 with EPT.
    pub user: u64,
    /// The execute bit; 0 with NPT.
    pub xs: u64,
    /// The user-execute bit; 0 with NPT.
    pub xu: u64,
    /// The bits whose absence makes an entry inaccessible; 0 with NPT.
    pub acc_track: u64,
    /// Software bit: the host maps the page writable.
    pub host_writable: u64,
    /// Software bit: the entry may be made writable at any time.
    pub mmu_writable: u64,
    /// Memory-encryption bits of entries that map RAM.
    pub me_value: u64,
    /// All memory-encryption bits.
    pub me_mask: u64,
    /// What an MMIO entry has in `mmio_mask`.
    pub mmio_value: u64,
    /// The bits that identify an MMIO entry.
    pub mmio_mask: u64,
    /// The access bits an MMIO entry remembers.
    pub mmio_access_mask: u64,
    /// Address bits that non-present entries must set against L1TF.
    pub nonpresent_or_rsvd: u64,
    /// Address bits below those.
    pub nonpresent_or_rsvd_lower_gfn: u64,
    /// The address bits of an entry.
    pub base_addr_mask: u64,
    /// Bits that must be zero, by bit 7 of the entry and `level - 1`.
    pub rsvd: [[u64; 5]; 2],
    /// EPT: which combinations of bits 0-5 are invalid, one bit each; 0 with NPT.
    pub bad_mt_xwr: u64,
    /// Hardware sets accessed and dirty bits.
    pub ad_enabled: bool,
    /// MMIO entries are in use.
    pub mmio_caching: bool,
    /// The highest guest frame there can be.
    pub max_gfn: Gfn,
}

impl SpteFormat {
    /// The bits of `raw` that must be zero in an entry of `level`; for EPT any
    /// bit set can also stand for an invalid combination.
    #[inline]
    pub fn reserved(&self, raw: u64, level: Level) -> u64 {
        let large = (raw >> 7) & 1;
        let mask = self
            .rsvd
            .get(large as usize)
            .and_then(|by_level| by_level.get(level.slot()))
            .copied()
            .unwrap_or(u64::MAX);
        // User-execute counts as execute for the combination.
        let xwr = if self.bad_mt_xwr != 0 && raw & EPT_USER_EXECUTE != 0 {
            raw | EPT_EXECUTE
        } else {
            raw
        };
        let bad = (self.bad_mt_xwr >> (xwr & 0x3f)) & 1;
        (raw & mask) | bad
    }

    /// The first frame behind the guest's address space.
    #[inline]
    pub const fn gfn_end(&self) -> Gfn {
        Gfn(self.max_gfn.0.saturating_add(1))
    }

    #[inline]
    const fn executable_bits(&self) -> u64 {
        self.xs | self.xu | self.nx
    }
}

/// How the accesses of an entry are tracked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AdMode {
    /// By hardware's bits.
    Enabled,
    /// By making the entry inaccessible and write-protected.
    Disabled,
    /// Accesses by hardware's bit, writes by protection.
    WriteProtectOnly,
}

/// What a leaf entry is made from.
#[derive(Clone, Copy, Debug)]
pub struct LeafArgs {
    /// First guest frame.
    pub gfn: Gfn,
    /// First host frame.
    pub pfn: Pfn,
    /// The level of the table the entry is for.
    pub level: Level,
    /// What the entry may grant, as `ACC_` bits.
    pub access: u8,
    /// The host maps the page writable.
    pub host_writable: bool,
    /// Nobody has accessed the page yet.
    pub prefetch: bool,
    /// Writes to the page are tracked, so that they must fault.
    pub write_protect: bool,
    /// Huge pages must not be executable.
    pub nx_huge_page: bool,
    /// Memory type, as bits of the entry.
    pub memtype: u64,
    /// The page is MMIO of the host, which is never encrypted.
    pub is_host_mmio: bool,
    /// How accesses are tracked.
    pub ad: AdMode,
}

impl LeafArgs {
    /// The page would be writable, were it not write-protected.
    #[inline]
    pub const fn loses_write_access(&self) -> bool {
        self.write_protect && self.host_writable && self.access & ACC_WRITE != 0
    }
}

/// An entry would have had bits set that must be zero.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ReservedBits {
    /// The bits.
    pub bits: u64,
}

/// An entry.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(transparent)]
pub struct Spte(pub u64);

impl Spte {
    /// No translation. The bit keeps EPT from reflecting the fault to the guest.
    pub const NONPRESENT: Spte = Spte(SUPPRESS_VE);
    /// No translation, and nobody may install one: the table is being removed.
    pub const FROZEN: Spte = Spte(SUPPRESS_VE | 0x1a0);
    /// The part of a memslot generation that MMIO entries keep.
    pub const MMIO_GEN_MASK: u64 = 0x3_ffff;
    /// The writable bit.
    pub const WRITABLE_MASK: u64 = WRITABLE;

    /// The bits.
    #[inline]
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// See [`FROZEN`](Spte::FROZEN).
    #[inline]
    pub const fn is_frozen(self) -> bool {
        self.0 == Spte::FROZEN.0
    }

    /// The leaf was mapped ahead of any access, and nobody has looked since.
    #[inline]
    pub const fn is_ahead(self) -> bool {
        self.0 & (MMU_PRESENT | AHEAD) == MMU_PRESENT | AHEAD
    }

    /// The leaf as one that is mapped ahead: not accessed, and not dirty.
    ///
    /// Hardware sets both bits when the guest uses the page. This is for formats
    /// with accessed and dirty bits.
    #[inline]
    #[must_use]
    pub const fn mapped_ahead(self, format: &SpteFormat) -> Spte {
        Spte(self.0 & !(format.accessed | format.dirty) | AHEAD)
    }

    /// The leaf without the note that it was mapped ahead.
    #[inline]
    #[must_use]
    pub const fn looked_at(self) -> Spte {
        Spte(self.0 & !AHEAD)
    }

    /// The entry leads to memory or a table.
    #[inline]
    pub const fn is_present(self) -> bool {
        self.0 & MMU_PRESENT != 0
    }

    /// The entry, present and above the last level, maps memory.
    #[inline]
    pub const fn is_large(self) -> bool {
        self.0 & LARGE != 0
    }

    /// The entry maps memory.
    #[inline]
    pub const fn is_leaf(self, level: Level) -> bool {
        self.is_present() && (level.get() == 1 || self.is_large())
    }

    /// The entry points to a table.
    #[inline]
    pub const fn is_nonleaf(self, level: Level) -> bool {
        self.is_present() && level.get() != 1 && !self.is_large()
    }

    /// The frame the entry points to.
    #[inline]
    pub const fn pfn(self, format: &SpteFormat) -> Pfn {
        self.hpa(format).to_pfn()
    }

    /// The address the entry points to.
    #[inline]
    pub const fn hpa(self, format: &SpteFormat) -> Hpa {
        Hpa(self.0 & format.base_addr_mask & !format.me_mask)
    }

    /// The guest can write.
    #[inline]
    pub const fn is_writable(self) -> bool {
        self.0 & WRITABLE != 0
    }

    /// The guest may be allowed to write at any time.
    #[inline]
    pub const fn is_mmu_writable(self, format: &SpteFormat) -> bool {
        self.0 & format.mmu_writable != 0
    }

    /// The host maps the page writable.
    #[inline]
    pub const fn is_host_writable(self, format: &SpteFormat) -> bool {
        self.0 & format.host_writable != 0
    }

    /// The guest can execute, in one mode at least.
    #[inline]
    pub const fn is_executable(self, format: &SpteFormat) -> bool {
        self.0 & format.executable_bits() != format.nx
    }

    /// The accessed bit is set.
    #[inline]
    pub const fn is_accessed(self, format: &SpteFormat) -> bool {
        self.0 & format.accessed != 0
    }

    /// The dirty bit is set.
    #[inline]
    pub const fn is_dirty(self, format: &SpteFormat) -> bool {
        self.0 & format.dirty != 0
    }

    /// The memory type of a leaf, as bits of an entry.
    #[inline]
    pub const fn memtype(self, format: &SpteFormat) -> u64 {
        if format.xs != 0 {
            self.0 & EPT_MEMTYPE
        } else {
            0
        }
    }

    /// The writable bits are in one of their valid combinations.
    #[inline]
    pub const fn is_consistent(self, format: &SpteFormat) -> bool {
        if self.is_mmu_writable(format) {
            self.is_host_writable(format)
        } else {
            !self.is_writable()
        }
    }

    /// Hardware tracks accesses of the entry.
    #[inline]
    const fn uses_accessed_bit(self) -> bool {
        self.0 & AD_MASK != AD_DISABLED
    }

    /// The entry was made inaccessible to see the next access.
    #[inline]
    pub const fn is_access_tracked(self, format: &SpteFormat) -> bool {
        !self.uses_accessed_bit() && self.0 & format.acc_track == 0
    }

    /// What can change at any time: by the fault path without a lock, by aging,
    /// or by hardware setting a dirty bit. A plain store could lose that.
    ///
    /// Losing an accessed bit is tolerated: aging does not flush either. Unless it
    /// is to tell whether it was of use to map the page ahead.
    #[inline]
    pub const fn needs_atomic_update(self, format: &SpteFormat) -> bool {
        if !self.uses_accessed_bit() || self.is_ahead() {
            return true;
        }
        if self.is_writable() {
            !self.is_dirty(format)
        } else {
            self.is_mmu_writable(format)
        }
    }

    /// The present leaf allows the access, a read if it is neither other.
    #[inline]
    pub const fn access_allowed(self, format: &SpteFormat, write: bool, exec: bool) -> bool {
        if exec {
            self.is_executable(format)
        } else if write {
            self.is_writable()
        } else {
            self.0 & HW_PRESENT != 0
        }
    }

    /// The present leaf as it looks when the page is not young any more.
    #[inline]
    #[must_use]
    pub const fn mark_old(self, format: &SpteFormat) -> Spte {
        if self.uses_accessed_bit() {
            return Spte(self.0 & !format.accessed);
        }
        if self.is_access_tracked(format) {
            return self;
        }
        let saved = (self.0 & TRACK_SAVED) << TRACK_SHIFT;
        Spte((self.0 | saved) & !(format.acc_track | format.accessed))
    }

    /// The entry with the permissions it had before it was made inaccessible.
    /// The permission to write is not among them.
    #[inline]
    #[must_use]
    pub const fn restore_access(self, format: &SpteFormat) -> Spte {
        let saved = (self.0 >> TRACK_SHIFT) & TRACK_SAVED;
        let cleared = self.0 & !(format.acc_track | TRACK_SAVED << TRACK_SHIFT);
        Spte(cleared | saved)
    }

    /// The entry, made accessible again because it was just accessed.
    #[inline]
    #[must_use]
    pub const fn mark_young(self, format: &SpteFormat) -> Spte {
        Spte(self.restore_access(format).0 | format.accessed)
    }

    /// The entry with the writable bit.
    #[inline]
    #[must_use]
    pub const fn make_writable(self) -> Spte {
        Spte(self.0 | WRITABLE)
    }

    /// The entry without `bits`.
    #[inline]
    #[must_use]
    pub const fn without(self, bits: u64) -> Spte {
        Spte(self.0 & !bits)
    }

    /// Writes through the leaf are tracked by its dirty bit.
    #[inline]
    pub const fn tracks_dirty_by_bit(self) -> bool {
        self.0 & AD_MASK == 0
    }

    /// The bit whose clearing makes the next write seen.
    #[inline]
    pub const fn dirty_bit(format: &SpteFormat, by_protection: bool) -> u64 {
        if by_protection {
            WRITABLE
        } else {
            format.dirty
        }
    }

    /// A leaf.
    #[inline]
    pub fn leaf(format: &SpteFormat, args: &LeafArgs) -> Result<Spte, ReservedBits> {
        let mut access = args.access;
        let mut raw = MMU_PRESENT | format.present | args.memtype;

        raw |= match args.ad {
            AdMode::Enabled => 0,
            AdMode::Disabled => AD_DISABLED,
            AdMode::WriteProtectOnly => AD_WRITE_PROTECT_ONLY,
        };
        if !args.prefetch {
            raw |= format.accessed;
        }
        if args.level > Level::L4K {
            raw |= LARGE;
            if args.nx_huge_page {
                access &= !ACC_EXEC;
                if format.xu != 0 {
                    access &= !ACC_USER;
                }
            }
        }
        if access & ACC_READ != 0 {
            raw |= HW_PRESENT;
        }
        raw |= executable_bits(format, access);
        if format.nx != 0 && access & ACC_USER != 0 {
            raw |= format.user;
        }
        if !args.is_host_mmio {
            raw |= format.me_value;
        }
        raw |= args.pfn.to_hpa().0;
        if args.host_writable {
            raw |= format.host_writable;
            if access & ACC_WRITE != 0 && !args.write_protect {
                raw |= WRITABLE | format.mmu_writable | format.dirty;
            }
        }

        let mut spte = Spte(raw);
        if args.prefetch {
            spte = spte.mark_old(format);
        }
        match format.reserved(spte.0, args.level) {
            0 => Ok(spte),
            bits => Err(ReservedBits { bits }),
        }
    }

    /// An entry that points to the table at `table`.
    #[inline]
    pub const fn nonleaf(format: &SpteFormat, table: Hpa, ad_disabled: bool) -> Spte {
        let raw = MMU_PRESENT
            | table.0
            | format.present
            | WRITABLE
            | HW_PRESENT
            | format.user
            | format.xs
            | format.xu
            | format.me_value;
        Spte(if ad_disabled {
            raw | AD_DISABLED
        } else {
            raw | format.accessed
        })
    }

    /// The entry number `index` of the table of `level`, with `access`, that
    /// replaces the huge leaf `self`.
    ///
    /// A page that becomes 4 KiB is executable again if only the NX huge page
    /// mitigation had forbidden that.
    #[inline]
    #[must_use]
    pub fn small_from_huge(
        self,
        format: &SpteFormat,
        level: Level,
        access: u8,
        index: usize,
        nx_huge_page: bool,
    ) -> Spte {
        let offset = ((index & (ENTRIES - 1)) as u64) << level.shift();
        let small = Spte(self.0 | offset);
        if level != Level::L4K {
            return small;
        }
        let small = small.without(LARGE);
        if nx_huge_page {
            small.with_executable(format, access)
        } else {
            small
        }
    }

    /// The huge leaf of `level` around the leaf `self`.
    #[inline]
    #[must_use]
    pub fn huge_from_small(self, format: &SpteFormat, level: Level, nx_huge_page: bool) -> Spte {
        let offset = level.gfn_mask() << 12;
        let huge = Spte((self.0 | LARGE) & !offset).looked_at();
        if nx_huge_page {
            huge.with_executable(format, 0)
        } else {
            huge
        }
    }

    /// The leaf with the permissions to execute that `access` has, be it
    /// accessible or not.
    fn with_executable(self, format: &SpteFormat, access: u8) -> Spte {
        let tracked = self.is_access_tracked(format);
        let plain = if tracked {
            self.restore_access(format)
        } else {
            self
        };
        let set = executable_bits(format, access);
        let changed = Spte((plain.0 & !format.executable_bits()) | set);
        if tracked {
            changed.mark_old(format)
        } else {
            changed
        }
    }

    /// An entry that says that `gfn` is MMIO.
    #[inline]
    pub const fn mmio(format: &SpteFormat, gfn: Gfn, access: u8, generation: u64) -> Spte {
        let gpa = gfn.to_gpa();
        let generation = generation & Spte::MMIO_GEN_MASK;
        let raw = (generation << GEN_LOW_SHIFT) & GEN_LOW_MASK
            | (generation << GEN_HIGH_SHIFT) & GEN_HIGH_MASK
            | format.mmio_value
            | access as u64 & format.mmio_access_mask
            | gpa
            | format.nonpresent_or_rsvd
            | (gpa & format.nonpresent_or_rsvd) << NONPRESENT_GFN_SHIFT;
        Spte(raw)
    }

    /// The entry says that a frame is MMIO.
    #[inline]
    pub const fn is_mmio(self, format: &SpteFormat) -> bool {
        format.mmio_caching && self.0 & format.mmio_mask == format.mmio_value
    }

    /// The frame of an MMIO entry.
    #[inline]
    pub const fn mmio_gfn(self, format: &SpteFormat) -> Gfn {
        let low = self.0 & format.nonpresent_or_rsvd_lower_gfn;
        let high = (self.0 >> NONPRESENT_GFN_SHIFT) & format.nonpresent_or_rsvd;
        Gfn((low | high) >> 12)
    }

    /// The access bits of an MMIO entry.
    #[inline]
    pub const fn mmio_access(self, format: &SpteFormat) -> u64 {
        self.0 & format.mmio_access_mask
    }

    /// The generation of an MMIO entry.
    #[inline]
    pub const fn mmio_generation(self) -> u64 {
        (self.0 & GEN_LOW_MASK) >> GEN_LOW_SHIFT | (self.0 & GEN_HIGH_MASK) >> GEN_HIGH_SHIFT
    }
}

/// The execute bits that say `access`.
#[inline]
const fn executable_bits(format: &SpteFormat, access: u8) -> u64 {
    if format.nx != 0 {
        return if access & ACC_EXEC != 0 { 0 } else { format.nx };
    }
    let supervisor = if access & ACC_EXEC != 0 { format.xs } else { 0 };
    let user = if access & ACC_USER != 0 { format.xu } else { 0 };
    supervisor | user
}

/// Whether the change of a present leaf needs a TLB flush before `mmu_lock`
/// drops: see the module's text on MMU-writable.
#[inline]
pub const fn leaf_change_needs_flush(format: &SpteFormat, old: Spte, new: Spte) -> bool {
    old.is_mmu_writable(format) && !new.is_mmu_writable(format)
}
