// SPDX-License-Identifier: GPL-2.0

//! Accesses and faults, as error codes.

use super::GuestContext;
use crate::mmu::types::{ACC_EXEC, ACC_READ, ACC_USER, ACC_WRITE};

/// The error code of a page fault, in KVM's extended form. It also says what kind
/// of access is made: then [`PRESENT`](ErrorCode::PRESENT) and [`RSVD`](ErrorCode::RSVD)
/// mean nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ErrorCode(pub u64);

impl ErrorCode {
    /// A read by the supervisor; no cause.
    pub const NONE: ErrorCode = ErrorCode(0);
    /// All entries were present.
    pub const PRESENT: ErrorCode = ErrorCode(1 << 0);
    /// A write.
    pub const WRITE: ErrorCode = ErrorCode(1 << 1);
    /// By user mode.
    pub const USER: ErrorCode = ErrorCode(1 << 2);
    /// A reserved bit was set.
    pub const RSVD: ErrorCode = ErrorCode(1 << 3);
    /// An instruction fetch.
    pub const FETCH: ErrorCode = ErrorCode(1 << 4);
    /// A protection key forbids it.
    pub const PK: ErrorCode = ErrorCode(1 << 5);
    /// An access to a shadow stack.
    pub const SHADOW_STACK: ErrorCode = ErrorCode(1 << 6);
    /// Nested: the access itself.
    pub const GUEST_FINAL: ErrorCode = ErrorCode(1 << 32);
    /// Nested: the nested guest's CPU reads its own page tables.
    pub const GUEST_PAGE: ErrorCode = ErrorCode(1 << 33);
    /// The CPU's own access to a structure of the supervisor, while in user mode.
    pub const IMPLICIT: ErrorCode = ErrorCode(1 << 48);

    /// The bits.
    #[inline]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Whether all bits of `other` are set.
    #[inline]
    pub const fn contains(self, other: ErrorCode) -> bool {
        self.0 & other.0 == other.0
    }

    /// The bits that are also in `other`.
    #[inline]
    pub const fn of(self, other: ErrorCode) -> ErrorCode {
        ErrorCode(self.0 & other.0)
    }
}

impl core::ops::BitOr for ErrorCode {
    type Output = ErrorCode;

    #[inline]
    fn bitor(self, other: ErrorCode) -> ErrorCode {
        ErrorCode(self.0 | other.0)
    }
}

/// The fault that the guest gets instead of a translation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GuestFault {
    /// The address that was accessed.
    pub address: u64,
    /// For the guest's exception, or for its hypervisor's exit. With EPT,
    /// [`ErrorCode::RSVD`] says that the exit is a misconfiguration.
    pub error_code: ErrorCode,
    /// The low bits of an EPT violation's exit qualification. Nothing for other
    /// formats and for a misconfiguration.
    pub exit_qualification: Option<u64>,
}

/// Bits of the exit qualification of an EPT violation.
mod qualification {
    pub(super) const READ: u64 = 1 << 0;
    pub(super) const WRITE: u64 = 1 << 1;
    pub(super) const FETCH: u64 = 1 << 2;
    pub(super) const MAY_READ: u64 = 1 << 3;
    pub(super) const MAY_WRITE: u64 = 1 << 4;
    pub(super) const MAY_EXECUTE: u64 = 1 << 5;
    pub(super) const MAY_EXECUTE_USER: u64 = 1 << 6;
    pub(super) const LINEAR_VALID: u64 = 1 << 7;
    pub(super) const TRANSLATED: u64 = 1 << 8;
}

/// The error code for an access that failed because of `cause`.
pub(super) fn error_code(context: &GuestContext, kind: ErrorCode, cause: ErrorCode) -> ErrorCode {
    let mut code = cause | kind.of(ErrorCode::WRITE | ErrorCode::USER | ErrorCode::SHADOW_STACK);
    if context.reports_fetch {
        code = code | kind.of(ErrorCode::FETCH);
    }
    code
}

/// What a CPU would say of an EPT violation: the access, and what the entries down
/// to the one that ended the walk allow.
pub(super) fn ept_violation(context: &GuestContext, kind: ErrorCode, access: u8) -> u64 {
    use qualification::*;

    let mut value = if kind.contains(ErrorCode::WRITE) {
        WRITE
    } else if kind.contains(ErrorCode::FETCH) {
        FETCH
    } else {
        READ
    };
    // A nested guest's table is read even when it is also written, for its
    // accessed bits. Every other access has a linear address behind it.
    value |= LINEAR_VALID;
    value |= if kind.contains(ErrorCode::GUEST_PAGE) {
        READ
    } else {
        TRANSLATED
    };
    for (right, bit) in [
        (ACC_READ, MAY_READ),
        (ACC_WRITE, MAY_WRITE),
        (ACC_EXEC, MAY_EXECUTE),
    ] {
        if access & right != 0 {
            value |= bit;
        }
    }
    if context.mbec && access & ACC_USER != 0 {
        value |= MAY_EXECUTE_USER;
    }
    value
}
