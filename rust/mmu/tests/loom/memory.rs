// SPDX-License-Identifier: GPL-2.0

//! The host's pages behind the guest's frames.

use loom::sync::atomic::{AtomicUsize, Ordering};
use rmmu_engine::mmu::{Gfn, GfnRange, Pfn};
use std::sync::Mutex;

/// Frames of the guest.
pub const FRAMES: u64 = 8;
const VERSIONS: u64 = 3;

pub struct Memory {
    pages: Vec<Page>,
    /// How often the page behind a frame was replaced.
    versions: Mutex<Vec<u64>>,
}

struct Page {
    /// Touched with each access: loom sees by it that the order matters.
    order: AtomicUsize,
    // No operation of loom happens while this is locked.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    given_back: bool,
    writes: u64,
    copied: u64,
}

impl Memory {
    pub fn new() -> Memory {
        let page = || Page {
            order: AtomicUsize::new(0),
            state: Mutex::default(),
        };
        Memory {
            pages: (0..FRAMES * VERSIONS).map(|_| page()).collect(),
            versions: Mutex::new(vec![0; FRAMES as usize]),
        }
    }

    /// The page behind a frame. Changes only under the lock for write.
    pub fn behind(&self, gfn: Gfn) -> Pfn {
        let version = self.versions.lock().unwrap()[gfn.0 as usize];
        Pfn(FRAMES * (version + 1) + gfn.0)
    }

    /// Other pages are behind the frames from now on. Returns the old ones.
    pub fn replace(&self, range: GfnRange) -> Vec<Pfn> {
        let frames = range.start.0..range.end.0;
        let old = frames.clone().map(|gfn| self.behind(Gfn(gfn))).collect();
        for gfn in frames {
            self.versions.lock().unwrap()[gfn as usize] += 1;
        }
        old
    }

    fn with<R>(&self, pfn: Pfn, f: impl FnOnce(&mut State) -> R) -> R {
        let page = usize::try_from(pfn.0 - FRAMES)
            .ok()
            .and_then(|at| self.pages.get(at));
        let page = page.unwrap_or_else(|| panic!("there is no page {pfn:x?}"));
        page.order.fetch_add(0, Ordering::Relaxed);
        f(&mut page.state.lock().unwrap())
    }

    /// The guest reads or writes a page.
    pub fn access(&self, pfn: Pfn, write: bool) {
        self.with(pfn, |page| {
            assert!(!page.given_back, "the guest reaches {pfn:?}, which is gone");
            page.writes += u64::from(write);
        });
    }

    /// The host uses the page for something else.
    pub fn give_back(&self, pfn: Pfn) {
        self.with(pfn, |page| page.given_back = true);
    }

    /// User space copies what is in a page.
    pub fn copy(&self, pfn: Pfn) {
        self.with(pfn, |page| page.copied = page.writes);
    }

    /// User space has what is in the page.
    pub fn is_copied(&self, pfn: Pfn) -> bool {
        self.with(pfn, |page| page.copied == page.writes)
    }
}
