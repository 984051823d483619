// SPDX-License-Identifier: GPL-2.0

//! Runs a model.

use loom::model::Builder;
use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    sync::{
        atomic::{AtomicU64, Ordering},
        Arc,
    },
    time::Instant,
};

/// All executions there are.
pub const UNBOUNDED: Option<usize> = None;
/// All with at most so many preemptions, for models that would take minutes.
pub const BOUNDED: Option<usize> = Some(4);
/// More than any execution of a model needs.
const MAX_BRANCHES: usize = 20_000;

thread_local! {
    // All threads of a model are coroutines of the thread that explores it.
    static SEEN: RefCell<BTreeMap<String, u64>> = const { RefCell::new(BTreeMap::new()) };
    static RACING: Cell<bool> = const { Cell::new(false) };
}

/// Notes that something happened in an execution, after the preparations.
pub fn saw(what: impl Into<String>) {
    if RACING.get() {
        SEEN.with_borrow_mut(|seen| *seen.entry(what.into()).or_default() += 1);
    }
}

/// The preparations are over.
pub fn race() {
    RACING.set(true);
}

/// Tries all executions of `model`; if there is a bound, those that take a running
/// thread's CPU away at most so many times. Each of `expected` has to happen in some
/// execution, so that a model does not pass because its threads never meet.
pub fn explore(preemptions: Option<usize>, expected: &[&str], model: fn()) {
    let mut builder = Builder::new();
    builder.max_branches = MAX_BRANCHES;
    builder.preemption_bound = builder.preemption_bound.or(preemptions);
    // With either of them loom stops early and calls that a success.
    assert!(builder.max_permutations.is_none() && builder.max_duration.is_none());
    SEEN.with_borrow_mut(BTreeMap::clear);
    let started = Instant::now();
    let bound = builder.preemption_bound;
    let executions = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&executions);
    builder.check(move || {
        counted.fetch_add(1, Ordering::Relaxed);
        RACING.set(false);
        model();
    });
    let (seen, time) = (SEEN.take(), started.elapsed());
    let executions = executions.load(Ordering::Relaxed);
    println!("{executions} executions, {time:.1?}, bound {bound:?}: {seen:?}");
    for what in expected {
        assert!(seen.contains_key(*what), "it never happened: {what}");
    }
}
