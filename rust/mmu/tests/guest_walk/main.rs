// SPDX-License-Identifier: GPL-2.0

//! The walker of the guest's tables against a plain reading of the manuals.
//!
//! `manual.rs` is that reading. It knows neither the masks nor the bitmaps that KVM
//! makes of the guest's registers; `machine.rs` makes these, and random processors
//! and memory.

mod machine;
mod manual;

use machine::{context, error_code, random_access, random_cpu, Memory, Racer, Random};
use manual::{Access, Cpu, Mode, Refusal, Translation, Used, Why};
use rmmu_engine::mmu::{
    shadow::guest::{
        self, ErrorCode, Guest, GuestContext, GuestFormat, GuestMemory, GuestTables, GuestWalk,
        Paging32, Paging64, PagingEpt, Stop,
    },
    types::{ACC_ALL, ACC_EXEC, ACC_READ, ACC_USER, ACC_WRITE},
    Gfn, Level,
};
use std::collections::BTreeMap;

/// Cases a paging mode.
const CASES: u64 = 60_000;
/// Accesses to the same memory, so that bits set by one are seen by the next.
const ACCESSES: u64 = 6;

/// How often each kind of outcome was seen: a test that sees too little fails.
#[derive(Default, Debug)]
struct Seen(BTreeMap<String, u64>);

impl Seen {
    fn note(&mut self, what: impl Into<String>) {
        *self.0.entry(what.into()).or_default() += 1;
    }

    fn expect(&self, what: &str, least: u64) {
        let count = self.0.get(what).copied().unwrap_or(0);
        assert!(count >= least, "{what} was seen {count} times: {self:?}");
    }
}

/// What a walk finds, or why it ends without.
fn walk<F: GuestFormat, M: GuestMemory>(
    memory: &M,
    context: &GuestContext,
    address: u64,
    kind: ErrorCode,
) -> Result<GuestWalk, Stop> {
    let mut found = GuestWalk::new();
    guest::walk::<F, M>(memory, context, address, kind, &mut found).map(|()| found)
}

/// What an entry allows, bit by bit.
fn allowed_by(cpu: &Cpu, entry: u64) -> u8 {
    let set = |n: u32, right: u8| if entry >> n & 1 == 1 { right } else { 0 };
    if cpu.is_ept() {
        return set(0, ACC_READ) | set(1, ACC_WRITE) | set(2, ACC_EXEC) | set(10, ACC_USER);
    }
    let execute = if entry >> 63 == 0 { ACC_EXEC } else { 0 };
    set(0, ACC_READ) | set(1, ACC_WRITE) | set(2, ACC_USER) | execute
}

/// The writes to the tables that an access makes.
fn marks(cpu: &Cpu, memory: &Memory, access: Access, used: &[Used]) -> Vec<(u64, u64)> {
    let Some((accessed, dirty)) = cpu.accessed_dirty_bits() else {
        return Vec::new();
    };
    let mut marks = Vec::new();
    for (n, entry) in used.iter().enumerate() {
        let is_leaf = n + 1 == used.len();
        let mut set = 1u64 << accessed;
        if is_leaf && access.write {
            set |= 1 << dirty;
        }
        if !memory.is_read_only(entry.gpa >> 12) {
            marks.push((entry.gpa, set));
        }
    }
    marks
}

fn check_translation(
    cpu: &Cpu,
    memory: &Memory,
    access: Access,
    found: &GuestWalk,
    expected: &Translation,
) {
    assert_eq!(found.gfn.0, expected.address >> 12);
    assert_eq!(found.level.get(), expected.level);
    assert_eq!(found.top.get(), expected.used[0].level);
    let marks = marks(cpu, memory, access, &expected.used);
    let mut allowed = ACC_ALL;
    for used in &expected.used {
        let level = Level::new(used.level).unwrap();
        let table = found.tables[level.slot()];
        assert_eq!(table.gfn().0, used.gpa >> 12);
        assert_eq!(table.entry_gpa, used.gpa);
        assert_eq!(table.access, allowed, "what is above the table");
        // An entry can serve two levels; each sets its own bits.
        let own = marks.iter().filter(|(gpa, _)| *gpa == used.gpa);
        let set = own.fold(0, |set, (_, bits)| set | bits);
        assert_eq!((table.entry ^ used.value) & !set, 0);
        allowed &= allowed_by(cpu, used.value);
    }
    let leaf = expected.used.last().unwrap().value;
    let clean = cpu
        .accessed_dirty_bits()
        .is_some_and(|(_, dirty)| leaf >> dirty & 1 == 0);
    if clean && !access.write {
        allowed &= !ACC_WRITE;
    }
    assert_eq!(found.access, allowed);
}

fn check_fault(cpu: &Cpu, access: Access, address: u64, stop: &Stop, expected: &Refusal) {
    let Stop::Fault(fault) = stop else {
        panic!("{stop:?} where {expected:?} was expected");
    };
    assert_eq!(fault.address, address);
    let mut code = cpu.error_code(access, expected.why);
    if cpu.is_ept() {
        // The kind of access is told by the exit qualification; there is no error
        // code but KVM's mark of a misconfiguration.
        code = fault.error_code.bits();
        let misconfigured = expected.why == Why::Reserved;
        assert_eq!(fault.error_code.contains(ErrorCode::RSVD), misconfigured);
        assert_eq!(
            fault.exit_qualification,
            (!misconfigured).then(|| cpu.exit_qualification(access, &expected.used))
        );
    } else {
        assert_eq!(fault.exit_qualification, None);
    }
    assert_eq!(fault.error_code.bits(), code);
}

/// One access with nobody else around.
fn check_access<F: GuestFormat>(
    cpu: &Cpu,
    context: &GuestContext,
    memory: &Memory,
    access: Access,
    address: u64,
    seen: &mut Seen,
) {
    memory.expect(Racer::Idle);
    let expected = cpu.translate(access, address, &|gpa| memory.at_start(gpa));
    let before = memory.everything();
    let found = walk::<F, Memory>(memory, context, address, error_code(access));
    let mut after = before;
    match (&found, &expected) {
        (Ok(found), Ok(expected)) => {
            check_translation(cpu, memory, access, found, expected);
            for (gpa, set) in marks(cpu, memory, access, &expected.used) {
                let old = memory.at_start(gpa).unwrap() | after.get(&gpa).copied().unwrap_or(0);
                if old & set != set {
                    after.insert(gpa, old | set);
                    seen.note("marked");
                }
            }
            seen.note(format!("level {}", found.level.get()));
        }
        (Err(stop), Err(expected)) => {
            check_fault(cpu, access, address, stop, expected);
            seen.note(format!("{:?}", expected.why));
        }
        _ => panic!("{found:?} where {expected:?} was expected"),
    }
    for (gpa, value) in memory.everything() {
        let expected = after.get(&gpa).copied().or(memory.at_start(gpa));
        assert_eq!(Some(value), expected, "the entry at {gpa:#x}");
    }
    for (gpa, value) in after {
        assert_eq!(memory.now(gpa), value, "the entry at {gpa:#x}");
    }
}

/// An access while other CPUs write to the tables.
fn check_race<F: GuestFormat>(
    cpu: &Cpu,
    context: &GuestContext,
    memory: &Memory,
    access: Access,
    address: u64,
    racer: Racer,
    seen: &mut Seen,
) {
    memory.expect(racer);
    let found = walk::<F, Memory>(memory, context, address, error_code(access));
    // Whatever happened before, the last try is one walk of the memory of then.
    let expected = cpu.translate(access, address, &|gpa| memory.at_start(gpa));
    match (&found, &expected) {
        (Err(Stop::Retry), _) => {
            assert_eq!(memory.tries.get(), 8);
            seen.note("gave up");
        }
        (Ok(found), Ok(expected)) => check_translation(cpu, memory, access, found, expected),
        (Err(stop), Err(expected)) => check_fault(cpu, access, address, stop, expected),
        _ => panic!("{found:?} where {expected:?} was expected"),
    }
    if memory.tries.get() > 1 && found.is_ok() {
        seen.note("translated in another try");
    }
    if memory.tries.get() > 1 && matches!(found, Err(Stop::Fault(_))) {
        seen.note("faulted in another try");
    }
}

fn random_cases<F: GuestFormat>(mode: Mode) {
    let mut random = Random(mode as u64 + 1);
    let mut seen = Seen::default();
    for _ in 0..CASES / ACCESSES {
        let cpu = random_cpu(&mut random, mode);
        let context = context(&cpu);
        let memory = Memory::new(&mut random, &cpu);
        let mut address = random.next();
        for _ in 0..ACCESSES {
            if random.once_in(2) {
                address = random.next();
            }
            let access = random_access(&mut random, &cpu);
            if random.once_in(2) {
                let racer = match random.below(8) {
                    0 => Racer::Entry(100),
                    1..=2 => Racer::Other,
                    n => Racer::Entry(n as u32 - 2),
                };
                check_race::<F>(&cpu, &context, &memory, access, address, racer, &mut seen);
            } else {
                check_access::<F>(&cpu, &context, &memory, access, address, &mut seen);
            }
        }
    }
    let least = CASES / 2000;
    seen.expect("level 1", least);
    seen.expect("level 2", least);
    if !matches!(mode, Mode::Bits32 | Mode::Pae) {
        seen.expect("level 3", least);
    }
    seen.expect("marked", least);
    seen.expect("NotPresent", least);
    seen.expect("Reserved", least);
    seen.expect("Protection { key: false }", least);
    if matches!(mode, Mode::Level4 | Mode::Level5) {
        seen.expect("Protection { key: true }", least);
    }
    seen.expect("gave up", least);
    seen.expect("translated in another try", least);
    seen.expect("faulted in another try", least);
}

#[test]
fn random_32_bit_tables_read_as_the_manual_says() {
    random_cases::<Paging32>(Mode::Bits32);
}

#[test]
fn random_pae_tables_read_as_the_manual_says() {
    random_cases::<Paging64>(Mode::Pae);
}

#[test]
fn random_four_level_tables_read_as_the_manual_says() {
    random_cases::<Paging64>(Mode::Level4);
}

#[test]
fn random_five_level_tables_read_as_the_manual_says() {
    random_cases::<Paging64>(Mode::Level5);
}

#[test]
fn random_ept_tables_read_as_the_manual_says() {
    random_cases::<PagingEpt>(Mode::Ept4);
    random_cases::<PagingEpt>(Mode::Ept5);
}

/// Single last-level entries, as sync and prefetch look at them.
fn leaf_cases<F: GuestFormat>(mode: Mode) {
    let mut random = Random(mode as u64 + 100);
    let (mut some, mut none) = (0, 0);
    for _ in 0..CASES / 8 {
        let cpu = random_cpu(&mut random, mode);
        let context = context(&cpu);
        let memory = Memory::new(&mut random, &cpu);
        let guest = Guest::<F, Memory>::new(&context, &memory);
        let bytes = Guest::<F, Memory>::ENTRY_BYTES;
        let base = random.below(64 * 4096 / 64) * 8 * bytes;
        let mut group = [0; 8];
        let whole = guest.read_group(base, &mut group);
        for (n, entry) in group.iter().copied().enumerate() {
            let gpa = base + n as u64 * bytes;
            assert_eq!(guest.read_entry(gpa), whole.then_some(entry));
            if !whole {
                continue;
            }
            let shadowed = guest.leaf_4k(entry);
            let allowed = allowed_by(&cpu, entry);
            let (young, dirty) = match cpu.accessed_dirty_bits() {
                Some((a, d)) => (entry >> a & 1 == 1, entry >> d & 1 == 1),
                None => (true, true),
            };
            if young && is_valid_leaf(&cpu, entry) {
                let leaf = shadowed.expect("a leaf that the CPU could have cached");
                assert_eq!(leaf.gfn, Gfn((entry & address_bits(mode)) >> 12));
                let written = if dirty { ACC_ALL } else { ACC_ALL & !ACC_WRITE };
                assert_eq!(leaf.access, allowed & written);
                some += 1;
            } else {
                assert_eq!(shadowed, None, "entry {entry:#x}");
                none += 1;
            }
        }
    }
    assert!(some > CASES / 20 && none > CASES / 20, "{some}, {none}");
}

fn address_bits(mode: Mode) -> u64 {
    match mode {
        Mode::Bits32 => 0xffff_f000,
        _ => 0x000f_ffff_ffff_f000,
    }
}

/// Asks the manual about a table that consists of this entry at the last level, below
/// entries that allow everything.
fn is_valid_leaf(cpu: &Cpu, entry: u64) -> bool {
    let last = 0x3f_f000;
    let everything = if cpu.is_ept() { 0b111 | 1 << 10 } else { 0b111 };
    let mut cpu = cpu.clone();
    cpu.cr3 = 0x1000;
    cpu.pdpte = [0x2001; 4];
    let read = |gpa: u64| {
        // Each table is one page further than the one above it.
        Some(match (gpa >> 12, cpu.mode) {
            (1, Mode::Bits32) => last | everything,
            (4, Mode::Level5 | Mode::Ept5) | (3, Mode::Level4 | Mode::Ept4) => last | everything,
            (2, Mode::Pae) => last | everything,
            (page, _) if page << 12 == last => entry,
            (page, _) => (page + 1) << 12 | everything,
        })
    };
    let access = Access {
        write: false,
        fetch: false,
        user: false,
        implicit: false,
        paging_structure: false,
    };
    match cpu.translate(access, 0, &read) {
        Ok(_) => true,
        Err(refusal) => matches!(refusal.why, Why::Protection { .. }),
    }
}

#[test]
fn a_leaf_is_shadowed_if_the_cpu_could_have_cached_it() {
    leaf_cases::<Paging32>(Mode::Bits32);
    leaf_cases::<Paging64>(Mode::Pae);
    leaf_cases::<Paging64>(Mode::Level4);
    leaf_cases::<Paging64>(Mode::Level5);
    leaf_cases::<PagingEpt>(Mode::Ept4);
    leaf_cases::<PagingEpt>(Mode::Ept5);
}

#[test]
fn writing_without_wp_makes_the_page_the_supervisors() {
    let mut random = Random(7);
    let cpu = Cpu {
        physical_bits: 40,
        ..random_cpu(&mut random, Mode::Level4)
    };
    let (context, memory) = (context(&cpu), Memory::new(&mut random, &cpu));
    let mut found = loop {
        let address = random.next();
        if let Ok(found) = walk::<Paging64, _>(&memory, &context, address, ErrorCode::NONE) {
            break found;
        }
    };
    found.access = ACC_READ | ACC_USER | ACC_EXEC;
    found.write_without_wp(false);
    assert_eq!(found.access, ACC_READ | ACC_WRITE | ACC_EXEC);
    found.access = ACC_READ | ACC_USER | ACC_EXEC;
    found.write_without_wp(true);
    assert_eq!(found.access, ACC_READ | ACC_WRITE);
}

/// With dirty bits of EPT the guest hypervisor may log them. When its log is full the
/// entry must not become dirty: the hypervisor has to be told first.
#[test]
fn a_full_log_of_the_guest_hypervisor_leaves_the_leaf_clean() {
    let mut random = Random(11);
    let mut seen = Seen::default();
    for _ in 0..4000 {
        let mut cpu = random_cpu(&mut random, Mode::Ept4);
        cpu.ept_accessed_dirty = true;
        let context = context(&cpu);
        let memory = Memory::new(&mut random, &cpu);
        let address = random.next();
        memory.log_full.set(true);
        memory.expect(Racer::Idle);
        let write = Access {
            write: true,
            fetch: false,
            user: true,
            implicit: false,
            paging_structure: false,
        };
        let expected = cpu.translate(write, address, &|gpa| memory.at_start(gpa));
        let found = walk::<PagingEpt, _>(&memory, &context, address, error_code(write));
        let Ok(expected) = expected else {
            assert_eq!(memory.logged.get(), 0, "nothing is logged for a fault");
            continue;
        };
        let leaf = expected.used.last().unwrap();
        let was_dirty = leaf.value >> 9 & 1 == 1;
        assert_eq!(memory.logged.get(), u32::from(!was_dirty));
        assert_eq!(found.is_ok(), was_dirty);
        assert_eq!(memory.now(leaf.gpa) >> 9 & 1 == 1, was_dirty);
        seen.note(if was_dirty { "dirty" } else { "clean" });
    }
    seen.expect("dirty", 50);
    seen.expect("clean", 50);
}

/// Nested page tables of AMD are told which stage faulted.
#[test]
fn a_nested_fault_keeps_its_stage() {
    let mut random = Random(13);
    let mut faults = 0;
    for _ in 0..1000 {
        let cpu = random_cpu(&mut random, Mode::Level4);
        let mut context = context(&cpu);
        context.nested = true;
        let memory = Memory::new(&mut random, &cpu);
        for stage in [ErrorCode::GUEST_FINAL, ErrorCode::GUEST_PAGE] {
            let kind = stage | ErrorCode::USER | ErrorCode::WRITE;
            let found = walk::<Paging64, _>(&memory, &context, random.next(), kind);
            if let Err(Stop::Fault(fault)) = found {
                let stages = ErrorCode::GUEST_FINAL | ErrorCode::GUEST_PAGE;
                assert_eq!(fault.error_code.of(stages), stage);
                faults += 1;
            }
        }
    }
    assert!(faults > 100);
}

/// The CPU says of an access to a shadow stack that it was one, and a nested hypervisor is told. It has no part in what is
/// allowed: nobody shadows protection of shadow stacks.
#[test]
fn a_fault_of_a_shadow_stack_says_so() {
    let mut random = Random(29);
    let (mut faults, mut walks) = (0, 0);
    for _ in 0..1000 {
        let cpu = random_cpu(&mut random, Mode::Level4);
        let mut context = context(&cpu);
        context.nested = true;
        let memory = Memory::new(&mut random, &cpu);
        let address = random.next();
        let plain = ErrorCode::GUEST_FINAL | ErrorCode::USER | ErrorCode::WRITE;
        let of_stack = plain | ErrorCode::SHADOW_STACK;
        let usual = walk::<Paging64, _>(&memory, &context, address, plain);
        let found = walk::<Paging64, _>(&memory, &context, address, of_stack);
        match (usual, found) {
            (Err(Stop::Fault(usual)), Err(Stop::Fault(fault))) => {
                assert_eq!(fault.error_code, usual.error_code | ErrorCode::SHADOW_STACK);
                faults += 1;
            }
            (Ok(_), Ok(_)) => walks += 1,
            (usual, found) => assert_eq!(usual.is_ok(), found.is_ok()),
        }
    }
    assert!(faults > 100);
    assert!(walks > 10);
}
