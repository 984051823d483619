// SPDX-License-Identifier: GPL-2.0

//! RCU, as treacherous as it may be: a table is handed back as soon as no section
//! is left that was entered before the table was given up.
//!
//! It orders no more than RCU promises. What was done in a section happens before
//! the end of a grace period that waits for it. What was done before a table was
//! given up happens before a section for which its grace period does not wait. Two
//! sections are not ordered by each other.
//!
//! Who leaves the last section that a grace period waits for ends it, and so learns
//! of more than it would from an interrupt. That is so only after it left.

use crate::machine::Gone;
use loom::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Mutex;

pub struct Rcu {
    /// A place a CPU, which it touches when it enters and leaves: loom sees by it
    /// that the order matters in which this and a grace period happen.
    places: Vec<AtomicUsize>,
    handover: AtomicUsize,
    // No operation of loom happens while this is locked.
    state: Mutex<State>,
}

struct State {
    inside: Vec<bool>,
    dying: Vec<Dying>,
}

struct Dying {
    table: Gone,
    /// CPUs, one bit each, whose section was entered before.
    waits_for: u32,
    /// All CPUs have been looked at.
    complete: bool,
}

impl Rcu {
    pub fn new(cpus: usize) -> Rcu {
        Rcu {
            places: (0..cpus).map(|_| AtomicUsize::new(0)).collect(),
            handover: AtomicUsize::new(0),
            state: Mutex::new(State {
                inside: vec![false; cpus],
                dying: Vec::new(),
            }),
        }
    }

    pub fn enter(&self, cpu: usize) {
        self.places[cpu].fetch_add(0, Ordering::Acquire);
        self.state.lock().unwrap().inside[cpu] = true;
    }

    /// Returns what nobody needs any more.
    pub fn leave(&self, cpu: usize) -> Vec<Gone> {
        self.places[cpu].fetch_add(0, Ordering::Release);
        let mut state = self.state.lock().unwrap();
        state.inside[cpu] = false;
        for dying in &mut state.dying {
            dying.waits_for &= !(1 << cpu);
        }
        state.unneeded()
    }

    /// Gives up a table; as `leave`.
    pub fn give_up(&self, table: Gone) -> Vec<Gone> {
        self.handover.fetch_add(0, Ordering::Release);
        self.state.lock().unwrap().dying.push(Dying {
            table,
            waits_for: 0,
            complete: false,
        });
        for (cpu, place) in self.places.iter().enumerate() {
            place.fetch_add(0, Ordering::Release);
            let mut state = self.state.lock().unwrap();
            if state.inside[cpu] {
                state.dying(table).waits_for |= 1 << cpu;
            }
        }
        let mut state = self.state.lock().unwrap();
        state.dying(table).complete = true;
        state.unneeded()
    }

    /// Orders the end of a grace period.
    pub fn end_grace_period(&self) {
        self.handover.fetch_add(0, Ordering::Acquire);
        for place in &self.places {
            place.fetch_add(0, Ordering::Acquire);
        }
    }
}

impl State {
    fn dying(&mut self, table: Gone) -> &mut Dying {
        let found = self.dying.iter_mut().find(|dying| dying.table == table);
        found.expect("a table vanished before its grace period was complete")
    }

    fn unneeded(&mut self) -> Vec<Gone> {
        let over = |dying: &mut Dying| dying.complete && dying.waits_for == 0;
        self.dying
            .extract_if(.., over)
            .map(|dying| dying.table)
            .collect()
    }
}
