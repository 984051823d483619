// SPDX-License-Identifier: GPL-2.0

//! Safe wrappers over KVM's and mm's C interface.
//!
//! Every `unsafe` that touches a C struct is here, and every difference between kernel versions. Nothing here
//! knows what a page table means; the lock tokens of [`lock`] are the engine's types, made where the lock is taken.

pub mod abi;
pub mod audit;
pub mod bindings;
pub mod btf;
pub mod calls;
mod constants;
pub mod device;
pub mod host;
pub mod lock;
pub mod page;
pub mod paging;
pub mod param;
pub mod root;
pub mod shadow;
pub mod slot;
pub mod symbols;
pub mod table;
pub mod trace;
pub mod vcpu;
pub mod vm;
pub mod walk;

pub use slot::Slot;
pub use vcpu::{Mmu, RootSet, Vcpu};
pub use vm::Kvm;

/// Says in the log if the module was built for a kernel whose MMU nobody has compared with ours.
pub fn log_review() {
    // SAFETY: prints a string of the module.
    unsafe { bindings::rmmu_log_review() }
}

/// `EOPNOTSUPP`, which the kernel crate does not name.
pub fn not_supported() -> kernel::error::Error {
    kernel::error::Error::from_errno(-(kernel::bindings::EOPNOTSUPP as i32))
}
