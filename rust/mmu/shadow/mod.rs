// SPDX-License-Identifier: GPL-2.0

//! The legacy MMU.
//!
//! - [`guest`]: the guest's own page tables

pub mod guest;
