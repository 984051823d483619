// SPDX-License-Identifier: GPL-2.0

//! The role of a shadow page: KVM's own word for it.
//!
//! A shadow page is found by the guest frame of what it shadows and by this word,
//! so everything that makes a difference to its entries is in the word. A root's
//! word comes from KVM; roles of pages below are derived from it here.

use crate::mmu::{
    host::Host,
    spte::AdMode,
    types::{Level, ACC_ALL},
};

pub(crate) const LEVEL: u32 = 0xf;
pub(crate) const SMALL_ENTRIES: u32 = 1 << 4;
const QUADRANT_SHIFT: u32 = 5;
pub(crate) const QUADRANT: u32 = 3 << QUADRANT_SHIFT;
pub(crate) const DIRECT: u32 = 1 << 7;
const ACCESS_SHIFT: u32 = 8;
pub(crate) const ACCESS: u32 = (ACC_ALL as u32) << ACCESS_SHIFT;
pub(crate) const INVALID: u32 = 1 << 12;
pub(crate) const AD_DISABLED: u32 = 1 << 16;
pub(crate) const GUEST_MODE: u32 = 1 << 17;
pub(crate) const PASSTHROUGH: u32 = 1 << 18;
pub(crate) const SMM_SHIFT: u32 = 24;

/// KVM's `union kvm_mmu_page_role`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageRole(pub u32);

impl PageRole {
    /// The level of the page. Every page is given a role with a level that exists.
    #[inline]
    pub const fn level(self) -> Level {
        match Level::new((self.0 & LEVEL) as u8) {
            Some(level) => level,
            None => Level::L4K,
        }
    }

    /// The guest's entries have four bytes, so that a guest table is shadowed by
    /// several pages.
    #[inline]
    pub const fn has_small_entries(self) -> bool {
        self.0 & SMALL_ENTRIES != 0
    }

    /// Which part of a table of four-byte entries the page shadows.
    #[inline]
    pub const fn quadrant(self) -> u8 {
        ((self.0 & QUADRANT) >> QUADRANT_SHIFT) as u8
    }

    /// The page maps consecutive frames and shadows no guest table.
    #[inline]
    pub const fn is_direct(self) -> bool {
        self.0 & DIRECT != 0
    }

    /// The most that entries may grant, as `ACC_` bits.
    #[inline]
    pub const fn access(self) -> u8 {
        ((self.0 & ACCESS) >> ACCESS_SHIFT) as u8
    }

    /// The page was zapped and must not be used any more.
    #[inline]
    pub const fn is_invalid(self) -> bool {
        self.0 & INVALID != 0
    }

    /// Entries do without accessed and dirty bits.
    #[inline]
    pub const fn is_ad_disabled(self) -> bool {
        self.0 & AD_DISABLED != 0
    }

    /// The page runs a nested guest.
    #[inline]
    pub const fn is_guest_mode(self) -> bool {
        self.0 & GUEST_MODE != 0
    }

    /// The page stands for a level that the guest's tables do not have.
    #[inline]
    pub const fn is_passthrough(self) -> bool {
        self.0 & PASSTHROUGH != 0
    }

    /// The page maps the SMM address space.
    #[inline]
    pub const fn is_smm(self) -> bool {
        self.0 >> SMM_SHIFT != 0
    }

    /// The page shadows entries of the guest.
    #[inline]
    pub const fn has_guest_entries(self) -> bool {
        self.0 & (DIRECT | PASSTHROUGH) == 0
    }

    /// The role with this level.
    #[inline]
    #[must_use]
    pub const fn with_level(self, level: Level) -> PageRole {
        PageRole(self.0 & !LEVEL | level.get() as u32)
    }

    /// The role with this quadrant.
    #[inline]
    #[must_use]
    pub const fn with_quadrant(self, quadrant: u8) -> PageRole {
        PageRole(self.0 & !QUADRANT | ((quadrant as u32) << QUADRANT_SHIFT) & QUADRANT)
    }

    /// The role with this access.
    #[inline]
    #[must_use]
    pub const fn with_access(self, access: u8) -> PageRole {
        PageRole(self.0 & !ACCESS | ((access as u32) << ACCESS_SHIFT) & ACCESS)
    }

    /// The role, direct or not.
    #[inline]
    #[must_use]
    pub const fn with_direct(self, direct: bool) -> PageRole {
        PageRole(if direct {
            self.0 | DIRECT
        } else {
            self.0 & !DIRECT
        })
    }

    /// The role of a zapped page.
    #[inline]
    #[must_use]
    pub(super) const fn invalidated(self) -> PageRole {
        PageRole(self.0 | INVALID)
    }

    /// The role of the page that entry number `index` of a page of this role
    /// points to; none below the last level.
    ///
    /// A table of four-byte entries covers twice what a page of the same level
    /// does. The entry's lowest index bit says which half the page below is for.
    #[inline]
    pub(super) fn child(self, index: usize, direct: bool, access: u8) -> Option<PageRole> {
        let child = self
            .with_level(self.level().child()?)
            .with_access(access)
            .with_direct(direct);
        let child = PageRole(child.0 & !(PASSTHROUGH | INVALID));
        Some(if child.has_small_entries() {
            child.with_quadrant((index & 1) as u8)
        } else {
            child
        })
    }

    /// Whether a page of this role can be brought up to date by a vCPU whose root
    /// has the role `root`.
    #[inline]
    pub(super) const fn syncs_with(self, root: PageRole) -> bool {
        let differs = (self.0 ^ root.0) & !(LEVEL | ACCESS | QUADRANT | PASSTHROUGH);
        !self.is_direct() && differs == 0
    }

    /// How entries of the page track accesses and writes.
    ///
    /// Page-modification logging would log the nested guest's addresses.
    #[inline]
    pub(super) fn ad_mode<H: Host>(self, host: &H) -> AdMode {
        if self.is_ad_disabled() {
            AdMode::Disabled
        } else if self.is_guest_mode() && host.pml() {
            AdMode::WriteProtectOnly
        } else {
            AdMode::Enabled
        }
    }
}
