// SPDX-License-Identifier: GPL-2.0

//! kvm_rmmu: serves the page tables of KVM's virtual machines with an MMU in Rust.
//!
//! The way of a page fault, top to bottom: `hook::entry` (the stub's handler), `vm::fault` (policy and locks),
//! `mmu::tdp` (the page tables). See Documentation/architecture.rst.

// In a crate of one binary, `pub` says what is the interface of a module.
#![allow(unreachable_pub)]
#![deny(
    missing_docs,
    unsafe_op_in_unsafe_fn,
    clippy::undocumented_unsafe_blocks
)]

mod hook;
mod kvm;
mod mmu;
mod vm;

use kernel::prelude::*;

module! {
    type: Rmmu,
    name: "kvm_rmmu",
    authors: ["rmmu developers"],
    description: "Page tables of KVM virtual machines, in Rust",
    license: "GPL v2",
}

/// The loaded module.
pub struct Rmmu {
    /// Goes first: no file of it is open any more, and none is opened.
    device: Option<vm::Device>,
}

impl kernel::Module for Rmmu {
    fn init(module: &'static ThisModule) -> Result<Self> {
        kvm::log_review();
        hook::prepare();
        vm::init();
        vm::debugfs_init();
        if let Err(error) = hook::init() {
            vm::debugfs_exit();
            return Err(error);
        }
        match vm::device(module) {
            Ok(device) => Ok(Rmmu {
                device: Some(device),
            }),
            Err(error) => {
                hook::exit();
                vm::debugfs_exit();
                Err(error)
            }
        }
    }
}

impl Drop for Rmmu {
    fn drop(&mut self) {
        self.device = None;
        hook::exit();
        vm::debugfs_exit();
    }
}
