// SPDX-License-Identifier: GPL-2.0

//! Models of the engine's protocols: a few threads that use the engine at the same
//! entries, on a machine whose hardware, RCU and locks are modelled too. loom tries
//! all orders of what the threads do, and all values that the memory model lets a
//! load return. What is tried is the engine's own code, with loom's atomics in
//! place of the processor's and tables of two entries.
//!
//! A model fails when one of its assertions does, and when
//!
//! - anybody, hardware included, gets at a table or a page that was freed,
//! - a table is used without having been published by a release,
//! - a table is freed twice, or leaks, or a count is wrong in the end,
//! - the engine reports a broken invariant, or a vCPU makes no progress.

mod cpu;
mod explore;
mod guest;
mod hardware;
mod machine;
mod memory;
mod paging;
mod rcu;
mod vm;

#[path = "../common/format.rs"]
#[allow(dead_code)]
mod format;

mod bits;
mod dirty;
mod huge;
mod install;
mod nx;
mod roots;
mod unsync;
mod zap;
