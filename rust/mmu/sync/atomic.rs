// SPDX-License-Identifier: GPL-2.0

//! Atomics and barriers, of the memory model of whoever compiles the engine.
//!
//! Tests on the host have those of `core`, and models those of loom. In the module
//! barriers are the kernel's: they pair with KVM's, as `smp_rmb()` in a fault does
//! with the `smp_wmb()` of an invalidation that ends.
//!
//! # An exception
//!
//! The module's atomics are not those of `kernel::sync::atomic`, which are calls of
//! functions in C, a load or a store each. Only kernels that are built by clang can
//! inline them (`CONFIG_RUST_INLINE_HELPERS`), and a fault makes too many of them
//! for calls. There is no `fetch_and()`, `fetch_or()` or `fetch_xor()` either.
//!
//! So they are those of `core`, here and nowhere else. They fit in with the kernel's
//! memory model, because on x86-64 they become what its macros become: loads and
//! stores are plain moves, of the width of the type and made once, like those of
//! `READ_ONCE()`, `WRITE_ONCE()`, `smp_load_acquire()` and `smp_store_release()`; all
//! that read and write are locked instructions, which order everything, as
//! `cmpxchg()` does. And the kernel's barriers are calls that the compiler moves no
//! access of memory across. What is not in the way of a fault uses
//! `kernel::sync::atomic`.

#[cfg(not(feature = "loom"))]
use core::sync::atomic as model;
#[cfg(feature = "loom")]
use loom::sync::atomic as model;

pub use model::{AtomicBool, AtomicPtr, AtomicU16, AtomicU32, AtomicU64, AtomicU8, Ordering};
#[cfg(MODULE)]
pub use {
    barrier::{smp_mb, smp_rmb, smp_wmb},
    core::sync::atomic::{AtomicI64, AtomicUsize},
};

#[cfg(all(MODULE, not(rmmu_has_typed_barriers)))]
use kernel::sync::barrier;

/// Kernels whose crate has one function, and a type for what it orders.
#[cfg(all(MODULE, rmmu_has_typed_barriers))]
mod barrier {
    use kernel::sync::barrier::{self, Full, Read, Write};

    #[inline(always)]
    pub fn smp_mb() {
        barrier::smp_mb(Full);
    }

    #[inline(always)]
    pub fn smp_rmb() {
        barrier::smp_mb(Read);
    }

    #[inline(always)]
    pub fn smp_wmb() {
        barrier::smp_mb(Write);
    }
}

/// Orders all accesses of memory before it with all after it.
#[cfg(not(MODULE))]
#[inline]
pub fn smp_mb() {
    model::fence(Ordering::SeqCst);
}

/// Orders loads before it with loads after it.
#[cfg(not(MODULE))]
#[inline]
pub fn smp_rmb() {
    model::fence(Ordering::Acquire);
}

/// Orders stores before it with stores after it.
#[cfg(not(MODULE))]
#[inline]
pub fn smp_wmb() {
    model::fence(Ordering::Release);
}
