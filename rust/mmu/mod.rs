// SPDX-License-Identifier: GPL-2.0

//! The MMU engine: SPTEs, page tables and what is done with them.
//!
//! Nothing here knows the kernel. What the engine needs from outside (table
//! pages, TLB flushes, accounting, locks to yield) comes through [`Host`], and
//! is compiled in with the host's type, so that the fault path has no indirect
//! call. Which locks a caller holds is shown by tokens ([`MmuRead`],
//! [`MmuWrite`]) that are arguments of everything that needs them.
//!
//! - [`types`]: frame numbers, levels, ranges
//! - [`spte`]: what the 64 bits of an entry mean, for EPT and NPT
//! - [`role`], [`table`]: a table page and its header
//! - [`sync`], [`host`]: locks, deferred flushes, the outside world
//! - [`tdp`]: the two-dimensional-paging MMU
//! - [`shadow`]: the legacy MMU
//! - [`audit`]: whether everything that both keep fits together

pub mod audit;
pub mod host;
pub mod role;
pub mod shadow;
pub mod spte;
pub mod sync;
pub mod table;
pub mod tdp;
pub mod types;

// What tests and models begin with; the module names things by the file they are in.
#[cfg(not(MODULE))]
mod names {
    pub use super::{
        host::{Host, TableSource},
        role::Role,
        spte::{AdMode, LeafArgs, ReservedBits, Spte, SpteFormat},
        sync::{Flush, MmuLocked, MmuRead, MmuWrite, RcuRead},
        table::{Entries, Table, TablePtr, ENTRIES},
        tdp::{Around, FastOutcome, Fault, Neighbour, NoMemory, Outcome, Tdp},
        types::{Gfn, GfnRange, Hpa, Level, Pfn},
    };
}
#[cfg(not(MODULE))]
pub use names::*;
