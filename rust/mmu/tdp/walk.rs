// SPDX-License-Identifier: GPL-2.0

//! The walk: every entry that covers a range, parents before children.
//!
//! A [`Cursor`] walks within one RCU section. It reads an entry again before it
//! steps down, so that a visitor that links or removes a table at the entry is
//! followed, and a subtree removed meanwhile is not entered.
//!
//! [`walk`] is the cursor with everything a long operation needs: when somebody
//! waits for the lock, it does the flush that is owed, leaves RCU, lets go of the
//! lock and goes on from the root. It yields only after it made progress.

use crate::mmu::{
    host::{Event, Host},
    spte::Spte,
    sync::{
        atomic::{AtomicU64, Ordering},
        Flush, MmuLocked, RcuRead,
    },
    table::{Entries, Table},
    types::{Gfn, GfnRange, Level, ENTRIES},
};

const LEVELS: usize = 5;

/// An entry, found by a walk.
pub(super) struct Entry<'r> {
    /// Where it is.
    pub(super) cell: &'r AtomicU64,
    /// The first frame it covers.
    pub(super) gfn: Gfn,
    /// The level of its table.
    pub(super) level: Level,
    /// What it was when last looked at.
    pub(super) spte: Spte,
}

impl<'r> Entry<'r> {
    /// The entry of `table` that covers `gfn`.
    #[inline]
    pub(super) fn at(table: &'r Entries, gfn: Gfn, level: Level) -> Entry<'r> {
        let cell = &table[gfn.index(level) & (ENTRIES - 1)];
        Entry {
            cell,
            gfn: gfn.round_down(level),
            level,
            spte: load(cell),
        }
    }

    /// Says that the entry, of which this has the copy of before, is `new` now.
    #[inline]
    pub(super) fn trace_change<H: Host>(&self, host: &H, new: Spte) {
        if new != self.spte {
            host.trace(Event::SpteChanged {
                cell: self.cell,
                gfn: self.gfn,
                level: self.level,
                old: self.spte,
                new,
            });
        }
    }

    /// Looks again.
    #[inline]
    pub(super) fn reload(&mut self) {
        self.spte = load(self.cell);
    }

    #[inline]
    pub(super) fn is_leaf(&self) -> bool {
        self.spte.is_leaf(self.level)
    }

    #[inline]
    pub(super) fn is_nonleaf(&self) -> bool {
        self.spte.is_nonleaf(self.level)
    }

    /// The frames the entry covers.
    #[inline]
    pub(super) fn range(&self) -> GfnRange {
        GfnRange::of(self.gfn, self.level)
    }
}

#[inline]
fn load(cell: &AtomicU64) -> Spte {
    // Acquire pairs with the release that links a table: its entries are seen.
    Spte(cell.load(Ordering::Acquire))
}

/// The entries of the table that `spte`, present and no leaf, points to.
#[inline]
pub(super) fn child_entries<'r, H: Host, R: RcuRead>(
    host: &H,
    spte: Spte,
    _rcu: &'r R,
) -> &'r Entries {
    let entries = host.entries_of(spte.hpa(host.format()));
    // SAFETY: The entry was read in the RCU section `'r`; tables are freed a
    // grace period after the entry that points to them is gone.
    unsafe { entries.as_ref() }
}

/// The header of the table that `spte`, present and no leaf, points to.
#[inline]
pub(super) fn child_table<'r, H: Host, R: RcuRead>(host: &H, spte: Spte, _rcu: &'r R) -> &'r Table {
    let table = host.table_of(spte.hpa(host.format()));
    // SAFETY: As in `child_entries`.
    unsafe { table.as_ref() }
}

/// The table of the last level that translates `gfn`, if there is one.
#[inline]
pub(super) fn lowest_table<'r, H: Host, R: RcuRead>(
    host: &H,
    root: &'r Table,
    gfn: Gfn,
    rcu: &'r R,
) -> Option<&'r Entries> {
    let (mut table, mut level) = (root.entries(), root.level());
    if gfn >= level.root_end() {
        return None;
    }
    while let Some(below) = level.child() {
        let entry = Entry::at(table, gfn, level);
        if !entry.is_nonleaf() {
            return None;
        }
        table = child_entries(host, entry.spte, rcu);
        level = below;
    }
    Some(table)
}

enum State {
    Fresh,
    Walking,
    Done,
}

/// A walk in one RCU section.
pub(super) struct Cursor<'r, H: Host, R: RcuRead> {
    host: &'r H,
    rcu: &'r R,
    path: [Option<&'r Entries>; LEVELS],
    end: Gfn,
    /// The frame the walk is heading for: all before it is done.
    goal: Gfn,
    gfn: Gfn,
    level: Level,
    root_level: Level,
    min_level: Level,
    state: State,
}

impl<'r, H: Host, R: RcuRead> Cursor<'r, H, R> {
    /// Walks `range` below `root`, down to tables of `min_level`.
    #[inline]
    pub(super) fn new(
        host: &'r H,
        rcu: &'r R,
        root: &'r Table,
        range: GfnRange,
        min_level: Level,
    ) -> Self {
        Cursor::below(host, rcu, root.entries(), root.level(), range, min_level)
    }

    /// Walks `range` below the table of `level` with these entries, in which the
    /// range must be.
    #[inline]
    pub(super) fn below(
        host: &'r H,
        rcu: &'r R,
        entries: &'r Entries,
        level: Level,
        range: GfnRange,
        min_level: Level,
    ) -> Self {
        let mut path = [None; LEVELS];
        if let Some(place) = path.get_mut(level.slot()) {
            *place = Some(entries);
        }
        Cursor {
            host,
            rcu,
            path,
            end: range.end,
            goal: range.start,
            gfn: range.start.round_down(level),
            level,
            root_level: level,
            min_level,
            state: State::Fresh,
        }
    }

    /// The frame from which a new walk would go on with the current entry.
    #[inline]
    pub(super) fn goal(&self) -> Gfn {
        self.goal
    }

    /// The next entry.
    #[inline]
    pub(super) fn next(&mut self) -> Option<Entry<'r>> {
        match self.state {
            State::Fresh => self.state = State::Walking,
            State::Walking => self.advance(),
            State::Done => {}
        }
        if matches!(self.state, State::Done) || self.gfn >= self.end {
            self.state = State::Done;
            return None;
        }
        self.entry()
    }

    #[inline]
    fn entry(&self) -> Option<Entry<'r>> {
        let table = (*self.path.get(self.level.slot())?)?;
        Some(Entry::at(table, self.gfn, self.level))
    }

    #[inline]
    fn advance(&mut self) {
        if self.step_down() {
            return;
        }
        while !self.step_aside() {
            if !self.step_up() {
                self.state = State::Done;
                return;
            }
        }
    }

    fn step_down(&mut self) -> bool {
        if self.level <= self.min_level {
            return false;
        }
        let Some(entry) = self.entry() else {
            return false;
        };
        let (true, Some(level)) = (entry.is_nonleaf(), self.level.child()) else {
            return false;
        };
        let table = child_entries(self.host, entry.spte, self.rcu);
        let Some(place) = self.path.get_mut(level.slot()) else {
            return false;
        };
        *place = Some(table);
        self.level = level;
        self.gfn = self.goal.round_down(level);
        true
    }

    fn step_aside(&mut self) -> bool {
        if self.gfn.index(self.level) == ENTRIES - 1 {
            return false;
        }
        self.gfn = self.gfn.add(self.level.pages());
        self.goal = self.gfn;
        true
    }

    fn step_up(&mut self) -> bool {
        let (true, Some(level)) = (self.level < self.root_level, self.level.parent()) else {
            return false;
        };
        self.level = level;
        self.gfn = self.gfn.round_down(level);
        true
    }
}

/// What a visitor wants next.
pub(super) enum Step {
    /// The next entry.
    Next,
    /// The same entry again, because it changed under the visitor's hands.
    Again,
    /// No more.
    Stop,
}

/// Where and how to walk.
#[derive(Clone, Copy)]
pub(super) struct Plan {
    pub(super) range: GfnRange,
    pub(super) min_level: Level,
    /// Let go of the lock when somebody waits for it.
    pub(super) may_yield: bool,
    /// What is owed at the end is owed for tables: it is done within RCU.
    pub(super) unlinks_tables: bool,
}

/// How a walk ended.
pub(super) struct Walked {
    /// What is owed now. None of it is for a table.
    pub(super) flush: Flush,
    /// Where to go on, if the visitor stopped the walk.
    pub(super) stopped_at: Option<Gfn>,
}

/// The part of `range` that entries below `root` can map.
pub(super) fn mapped_by<H: Host>(host: &H, root: &Table, range: GfnRange) -> GfnRange {
    range.intersect(GfnRange::new(
        Gfn(0),
        root.level().root_end().min(host.format().gfn_end()),
    ))
}

/// Visits the entries of a plan's range below `root`, to which the caller holds a
/// reference.
///
/// `visit` gets what is owed so far and says what is owed after it.
pub(super) fn walk<H: Host, L: MmuLocked>(
    host: &H,
    lock: &mut L,
    root: &Table,
    plan: Plan,
    mut flush: Flush,
    mut visit: impl FnMut(&mut Entry<'_>, &H::Rcu<'_>, &mut Flush) -> Step,
) -> Walked {
    let range = mapped_by(host, root, plan.range);
    let mut from = range.start;

    if range.is_empty() {
        return Walked {
            flush,
            stopped_at: None,
        };
    }
    'section: loop {
        let rcu = host.rcu_read();
        let mut cursor = Cursor::new(
            host,
            &rcu,
            root,
            GfnRange::new(from, range.end),
            plan.min_level,
        );
        let mut stopped_at = None;
        'walk: while let Some(mut entry) = cursor.next() {
            loop {
                if plan.may_yield && cursor.goal() != from && host.need_break() {
                    from = cursor.goal();
                    if flush.needed() {
                        host.flush_all();
                    }
                    flush = Flush::none();
                    drop(rcu);
                    lock.relax(host);
                    continue 'section;
                }
                match visit(&mut entry, &rcu, &mut flush) {
                    Step::Next => break,
                    Step::Again => entry.reload(),
                    Step::Stop => {
                        stopped_at = Some(cursor.goal());
                        break 'walk;
                    }
                }
            }
        }
        if plan.unlinks_tables {
            host.spend(flush, lock);
            flush = Flush::none();
        }
        return Walked { flush, stopped_at };
    }
}
