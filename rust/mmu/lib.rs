// SPDX-License-Identifier: GPL-2.0

//! The engine as a Cargo library, so that it can be tested on the host.
//!
//! The kernel module includes the same files as its own module `mmu`; both ways
//! the path of everything starts with `crate::mmu`.

#![no_std]

#[path = "mod.rs"]
pub mod mmu;
