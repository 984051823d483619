// SPDX-License-Identifier: GPL-2.0

//! The role of a table: which paging mode, address space and level it serves.

use crate::mmu::{host::Host, spte::AdMode, types::Level};

/// What a tree of tables, or one table of it, is for.
///
/// All tables below a root share the root's role, apart from the level.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Role {
    /// KVM's own word for the role, of which only the level and [`Role::INVALID`] mean
    /// anything here: two vCPUs share a root when their words are equal. In the role of
    /// a table that is about to be made, the level in the word is still the parent's.
    pub word: u32,
    /// The level of the table.
    pub level: Level,
    /// The tree maps the SMM address space.
    pub smm: bool,
    /// The tree runs a nested guest.
    pub guest_mode: bool,
    /// The tree does without accessed and dirty bits.
    pub ad_disabled: bool,
    /// The most an entry may grant, as `ACC_` bits.
    pub access: u8,
}

impl Role {
    /// The bit of the word that says that a root must not be used any more.
    pub const INVALID: u32 = 1 << 12;
    /// The bits of the word that are the level.
    pub(crate) const LEVEL: u32 = 0xf;

    /// The role of a table of this level in the same tree.
    #[inline]
    #[must_use]
    pub const fn with_level(self, level: Level) -> Role {
        Role { level, ..self }
    }

    /// The role of a table that an entry of this one points to; none below the
    /// last level.
    #[inline]
    pub fn child(self) -> Option<Role> {
        Some(self.with_level(self.level.child()?))
    }

    /// This role as the header of its table has it: the level is in the word, too.
    #[inline]
    #[must_use]
    pub(super) const fn complete(self) -> Role {
        Role {
            word: self.word & !Self::LEVEL | self.level.get() as u32,
            ..self
        }
    }

    /// How accesses and writes are tracked below this role.
    ///
    /// Page-modification logging would log the nested guest's addresses, so that
    /// a nested tree is tracked by write protection when it is in use.
    #[inline]
    pub fn ad_mode<H: Host>(self, host: &H) -> AdMode {
        if self.ad_disabled {
            AdMode::Disabled
        } else if self.guest_mode && host.pml() {
            AdMode::WriteProtectOnly
        } else {
            AdMode::Enabled
        }
    }

    /// Whether writes are tracked by write protection, not by dirty bits.
    #[inline]
    pub fn tracks_writes_by_protection<H: Host>(self, host: &H) -> bool {
        (self.guest_mode && host.pml()) || !host.format().ad_enabled
    }
}
