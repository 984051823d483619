// SPDX-License-Identifier: GPL-2.0

//! The audit of a VM: does everything that its two MMUs keep fit together?
//!
//! The engine does the looking ([`crate::mmu::audit`]). What is added here is the slots, the statistics, and who is told.
//! `mmu_lock` is held for write in each step and let go between the steps, so that a large VM goes on meanwhile.

use super::{Vm, STATS};
use crate::mmu::{
    audit::{Audit, Finding, Looked},
    shadow::ShadowedFrames,
    sync::atomic::{AtomicU64, Ordering},
    types::{Gfn, GfnRange},
};
use kernel::prelude::*;

/// Findings that are kept; there may be more.
const KEPT: usize = 16;

/// What an audit came to.
pub(super) struct Report {
    /// How much it looked at.
    pub(super) looked: Looked,
    /// How many invariants it found broken.
    pub(super) broken: u64,
    /// Nothing changed meanwhile, so that the statistics could be compared with what there is.
    pub(super) compared: bool,
    findings: [Option<Finding>; KEPT],
}

impl Report {
    /// The first findings.
    pub(super) fn findings(&self) -> impl Iterator<Item = &Finding> {
        self.findings.iter().flatten()
    }
}

impl Vm {
    /// Audits the VM. Sleeps.
    pub(super) fn audit(&self) -> Report {
        let mut findings = [None; KEPT];
        let mut kept: usize = 0;
        let mut audit = Audit::new(|finding| {
            if let Some(place) = findings.get_mut(kept) {
                *place = Some(finding);
                kept = kept.wrapping_add(1);
            }
        });
        let before = self.state();
        let host = self.host();
        let frames = ShadowedFrames {
            host: &host,
            shadow: &self.shadow,
        };
        let compared = self.kvm.with_srcu(|| {
            let mut lock = self.kvm.write_lock();
            let token = lock.token();
            self.tdp.audit(&host, token, &frames, &mut audit);
            self.shadow.audit(&host, token, &mut audit);
            self.kvm
                .for_each_slot(GfnRange::new(Gfn(0), Gfn(u64::MAX)), |slot| {
                    self.shadow.audit_slot(&host, token, slot, &mut audit);
                });
            // Since the last step the lock is held, so that nothing has changed after this either.
            let compared = self.state() == before;
            if compared {
                audit.compare_leaves(|level| self.kvm.pages(level.get()));
            }
            compared
        });
        let (looked, broken) = (audit.looked, audit.broken);
        let report = Report {
            looked,
            broken,
            compared,
            findings,
        };
        self.note(&report);
        report
    }

    /// What changes whenever mappings do.
    fn state(&self) -> [u64; 8] {
        let faults = &self.faults;
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let served = load(&faults.fixed)
            .wrapping_add(load(&faults.fast))
            .wrapping_add(load(&faults.retry))
            .wrapping_add(load(&faults.emulate));
        [
            self.kvm.pages(1) as u64,
            self.kvm.pages(2) as u64,
            self.kvm.pages(3) as u64,
            self.kvm.invalidate_seq() as u64,
            self.shadow.pages(),
            self.tables.load(Ordering::Relaxed) as u64,
            served,
            load(&faults.mmio),
        ]
    }

    fn note(&self, report: &Report) {
        let looked = &report.looked;
        let entries = looked
            .entries
            .wrapping_add(looked.shadow_entries)
            .wrapping_add(looked.rmap_entries);
        STATS.audits.fetch_add(1, Ordering::Relaxed);
        STATS.audited_entries.fetch_add(entries, Ordering::Relaxed);
        STATS
            .audit_findings
            .fetch_add(report.broken, Ordering::Relaxed);
        if let Some(first) = report.findings().next() {
            pr_err!(
                "an audit of a VM found {} broken invariants, the first: {}, gfn {:#x}, level {}, entry {:#x}\n",
                report.broken,
                first.what.name(),
                first.gfn.0,
                first.level.get(),
                first.spte.raw()
            );
        }
    }
}
