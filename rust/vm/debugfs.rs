// SPDX-License-Identifier: GPL-2.0

//! `/sys/kernel/debug/rmmu/`: hooks, counters, and for each VM of ours its owner, pages, tables, faults and page table.

// C structs without members (locks without lockdep) are only ever pointed at.
#![allow(improper_ctypes_definitions)]

use super::{control::module_stats, Vm};
use crate::{
    kvm::{
        bindings::{self, check_prototype},
        root::{RootHpa, RootKind},
        symbols,
    },
    mmu::{
        role::Role,
        shadow::Root,
        spte::Spte,
        sync::atomic::Ordering,
        table::TablePtr,
        types::{Gfn, Level},
    },
};
use kernel::{
    ffi::{c_int, c_void},
    prelude::*,
    seq_file::SeqFile,
    seq_print,
    str::CString,
    sync::atomic::{Atomic, Relaxed},
};

/// Leaves looked at in one RCU section.
const BATCH: usize = 512;
/// Leaves of a shadow root that are shown.
const MAX_SHADOW_LEAVES: u32 = 4096;

/// A VM's directory.
pub(super) struct VmDir(Atomic<*mut bindings::dentry>);

impl VmDir {
    pub(super) const fn new() -> Self {
        VmDir(Atomic::new(core::ptr::null_mut()))
    }

    /// Makes the directory; without it the VM works as well.
    pub(super) fn create(&self, vm: &Vm) {
        let (pid, number) = vm.id;
        let Ok(name) = CString::try_from_fmt(fmt!("{}-{}", pid, number)) else {
            return;
        };
        // SAFETY: `remove` waits for readers before `vm` goes.
        let dir = unsafe {
            bindings::rmmu_debugfs_add_vm(
                name.as_char_ptr().cast(),
                core::ptr::from_ref(vm).cast_mut().cast(),
            )
        };
        self.0.store(dir, Relaxed);
    }

    /// Removes it and waits for whoever reads in it.
    pub(super) fn remove(&self) {
        let dir = self.0.xchg(core::ptr::null_mut(), Relaxed);
        if !dir.is_null() {
            // SAFETY: made by `create`.
            unsafe { bindings::rmmu_debugfs_del_vm(dir) }
        }
    }
}

/// Makes the top directory.
pub fn init() {
    // SAFETY: called once.
    unsafe { bindings::rmmu_debugfs_init() };
}

/// Removes everything.
pub fn exit() {
    // SAFETY: made by `init`.
    unsafe { bindings::rmmu_debugfs_exit() }
}

/// # Safety
///
/// `m` is the `struct seq_file` of a read in progress.
unsafe fn seq<'a>(m: *mut bindings::seq_file) -> &'a SeqFile {
    // SAFETY: the caller's promise.
    unsafe { SeqFile::from_raw(m.cast()) }
}

/// # Safety
///
/// `vm` is what `VmDir::create` gave.
unsafe fn vm<'a>(vm: *mut c_void) -> &'a Vm {
    // SAFETY: the directory is removed, and readers are waited for, before the VM's data goes.
    unsafe { &*vm.cast() }
}

/// The file `hooks`.
///
/// # Safety
///
/// Called by debugfs, with the file's data.
#[no_mangle]
unsafe extern "C" fn rmmu_show_hooks(m: *mut bindings::seq_file) {
    // SAFETY: called by debugfs.
    let m = unsafe { seq(m) };
    for function in symbols::entries() {
        seq_print!(m, "{}\n", symbols::name(function));
    }
}
check_prototype!(rmmu_show_hooks);

/// The file `stats`.
///
/// # Safety
///
/// Called by debugfs, with the file's data.
#[no_mangle]
unsafe extern "C" fn rmmu_show_stats(m: *mut bindings::seq_file) {
    // SAFETY: called by debugfs.
    let m = unsafe { seq(m) };
    for (name, value) in module_stats() {
        seq_print!(m, "{} {}\n", name, value);
    }
}
check_prototype!(rmmu_show_stats);

/// The file `owner`.
///
/// # Safety
///
/// Called by debugfs, with the file's data.
#[no_mangle]
unsafe extern "C" fn rmmu_show_owner(m: *mut bindings::seq_file, _vm: *mut c_void) {
    // SAFETY: called by debugfs.
    let m = unsafe { seq(m) };
    seq_print!(m, "rmmu\n");
}
check_prototype!(rmmu_show_owner);

/// The file `audit`. Reading it audits the VM.
///
/// # Safety
///
/// Called by debugfs, with the file's data.
#[no_mangle]
unsafe extern "C" fn rmmu_show_audit(m: *mut bindings::seq_file, data: *mut c_void) {
    // SAFETY: called by debugfs.
    let (m, vm) = unsafe { (seq(m), vm(data)) };
    let report = vm.audit();
    let looked = &report.looked;
    for (name, value) in [
        ("roots", looked.roots),
        ("entries", looked.entries),
        ("shadow_pages", looked.pages),
        ("shadow_entries", looked.shadow_entries),
        ("rmap_entries", looked.rmap_entries),
        ("frames", looked.frames),
        ("accounting_compared", report.compared.into()),
        ("broken", report.broken),
    ] {
        seq_print!(m, "{} {}\n", name, value);
    }
    for finding in report.findings() {
        seq_print!(
            m,
            "# {} gfn {:#x} level {} entry {:#018x}\n",
            finding.what.name(),
            finding.gfn.0,
            finding.level.get(),
            finding.spte.raw()
        );
    }
}
check_prototype!(rmmu_show_audit);

/// The file `pages`.
///
/// # Safety
///
/// Called by debugfs, with the file's data.
#[no_mangle]
unsafe extern "C" fn rmmu_show_pages(m: *mut bindings::seq_file, data: *mut c_void) {
    // SAFETY: called by debugfs.
    let (m, vm) = unsafe { (seq(m), vm(data)) };
    for (name, level) in [("4K", 1), ("2M", 2), ("1G", 3)] {
        seq_print!(m, "{} {}\n", name, vm.kvm.pages(level));
    }
}
check_prototype!(rmmu_show_pages);

/// The file `tables`.
///
/// # Safety
///
/// Called by debugfs, with the file's data.
#[no_mangle]
unsafe extern "C" fn rmmu_show_tables(m: *mut bindings::seq_file, data: *mut c_void) {
    // SAFETY: called by debugfs.
    let (m, vm) = unsafe { (seq(m), vm(data)) };
    let mut roots = 0u32;
    let mut lock = vm.kvm.read_lock();
    vm.tdp.visit_roots(&vm.host(), lock.token(), |_, _, _| {
        roots = roots.wrapping_add(1)
    });
    drop(lock);
    seq_print!(m, "tables {}\n", vm.tables.load(Ordering::Relaxed));
    seq_print!(m, "roots {}\n", roots);
}
check_prototype!(rmmu_show_tables);

/// The file `faults`.
///
/// # Safety
///
/// Called by debugfs, with the file's data.
#[no_mangle]
unsafe extern "C" fn rmmu_show_faults(m: *mut bindings::seq_file, data: *mut c_void) {
    // SAFETY: called by debugfs.
    let (m, vm) = unsafe { (seq(m), vm(data)) };
    for (name, value) in vm.faults.each() {
        seq_print!(m, "{} {}\n", name, value);
    }
}
check_prototype!(rmmu_show_faults);

/// The file `shadow`.
///
/// # Safety
///
/// Called by debugfs, with the file's data.
#[no_mangle]
unsafe extern "C" fn rmmu_show_shadow(m: *mut bindings::seq_file, data: *mut c_void) {
    // SAFETY: called by debugfs.
    let (m, vm) = unsafe { (seq(m), vm(data)) };
    let stats = &vm.shadow_stats;
    for (name, value) in [
        ("pages", vm.shadow.pages()),
        ("max_pages", vm.shadow.max_pages()),
        ("indirect", vm.shadow.indirect_pages()),
        ("synced", stats.synced.load(Ordering::Relaxed)),
        ("prefetched", stats.prefetched.load(Ordering::Relaxed)),
        ("nested_splits", stats.nested_splits.load(Ordering::Relaxed)),
    ] {
        seq_print!(m, "{} {}\n", name, value);
    }
}
check_prototype!(rmmu_show_shadow);

/// The file `fault_around_bytes`, when it is read.
///
/// # Safety
///
/// Called by debugfs, with the file's data.
#[no_mangle]
unsafe extern "C" fn rmmu_get_fault_around_bytes(data: *mut c_void) -> u64 {
    // SAFETY: called by debugfs.
    unsafe { vm(data) }.around.bytes()
}
check_prototype!(rmmu_get_fault_around_bytes);

/// The file `fault_around_bytes`, when it is written.
///
/// # Safety
///
/// Called by debugfs, with the file's data.
#[no_mangle]
unsafe extern "C" fn rmmu_set_fault_around_bytes(data: *mut c_void, bytes: u64) -> c_int {
    // SAFETY: called by debugfs.
    match unsafe { vm(data) }.around.set_bytes(bytes) {
        Ok(()) => 0,
        Err(error) => error.to_errno(),
    }
}
check_prototype!(rmmu_set_fault_around_bytes);

/// The file `fault_around`.
///
/// # Safety
///
/// Called by debugfs, with the file's data.
#[no_mangle]
unsafe extern "C" fn rmmu_show_fault_around(m: *mut bindings::seq_file, data: *mut c_void) {
    // SAFETY: called by debugfs.
    let (m, vm) = unsafe { (seq(m), vm(data)) };
    let (mut used, mut idle) = (0u64, 0u64);
    with_roots(vm, |root, _| {
        visit_all(vm, root, |_, _, spte| {
            if spte.is_ahead() {
                let counter = if spte.is_accessed(&vm.format) {
                    &mut used
                } else {
                    &mut idle
                };
                *counter = counter.wrapping_add(1);
            }
        });
    });
    let counters = vm.around.counters();
    seq_print!(m, "windows {}\n", counters.windows);
    seq_print!(m, "mapped_ahead {}\n", counters.mapped);
    seq_print!(m, "used {}\n", counters.used.wrapping_add(used));
    seq_print!(m, "unused {}\n", counters.unused);
    seq_print!(m, "idle {}\n", idle);
    seq_print!(m, "vcpu_window_pages");
    for pages in vm.around.learnt() {
        seq_print!(m, " {}", pages);
    }
    seq_print!(m, "\n");
}
check_prototype!(rmmu_show_fault_around);

/// Neighbouring leaves of one level and one set of permissions.
struct Run {
    start: Gfn,
    end: Gfn,
    level: Level,
    permissions: [char; 5],
}

fn permissions(vm: &Vm, spte: Spte) -> [char; 5] {
    let format = &vm.format;
    let flag = |on: bool, name: char| if on { name } else { '-' };
    [
        'r',
        flag(spte.is_writable(), 'w'),
        flag(spte.is_executable(format), 'x'),
        flag(spte.is_accessed(format), 'A'),
        flag(spte.is_dirty(format), 'D'),
    ]
}

fn print_run(m: &SeqFile, run: &Run) {
    let name = match run.level.get() {
        1 => "4K",
        2 => "2M",
        _ => "1G",
    };
    seq_print!(
        m,
        "{:#014x}-{:#014x} {:>8}K {} ",
        run.start.to_gpa(),
        run.end.to_gpa(),
        run.end.0.wrapping_sub(run.start.0) << 2,
        name
    );
    for flag in run.permissions {
        seq_print!(m, "{}", flag);
    }
    seq_print!(m, "\n");
}

/// Prints leaves, in the order of their addresses, as runs.
struct Runs<'a> {
    m: &'a SeqFile,
    vm: &'a Vm,
    run: Option<Run>,
}

impl Runs<'_> {
    fn leaf(&mut self, gfn: Gfn, level: Level, spte: Spte) {
        let permissions = permissions(self.vm, spte);
        let end = gfn.add(level.pages());
        match &mut self.run {
            Some(run) if run.end == gfn && run.level == level && run.permissions == permissions => {
                run.end = end
            }
            _ => {
                self.end();
                self.run = Some(Run {
                    start: gfn,
                    end,
                    level,
                    permissions,
                });
            }
        }
    }

    fn end(&mut self) {
        if let Some(run) = self.run.take() {
            print_run(self.m, &run);
        }
    }
}

/// Visits all leaves below a root on which the caller holds a reference, in bounded RCU sections.
fn visit_all(vm: &Vm, root: TablePtr, mut visit: impl FnMut(Gfn, Level, Spte)) {
    let mut from = Some(Gfn(0));
    while let Some(gfn) = from {
        from = vm
            .tdp
            .visit_leaves(&vm.host(), root, gfn, BATCH, &mut visit);
    }
}

fn print_root(m: &SeqFile, vm: &Vm, root: TablePtr) {
    let mut runs = Runs { m, vm, run: None };
    visit_all(vm, root, |gfn, level, spte| runs.leaf(gfn, level, spte));
    runs.end();
}

/// Prints roots of the shadow MMU. The lock is held meanwhile, so not all of everything is shown.
fn print_shadow_roots(m: &SeqFile, vm: &Vm) {
    let mut lock = vm.kvm.write_lock();
    let lock = lock.token();
    let mut roots = [None; 8];
    let mut free = roots.iter_mut();
    vm.shadow.visit_pages(lock, |page| {
        if page.roots == 0 {
            return;
        }
        if let Some(place) = free.next() {
            *place = Some((page.hpa, page.gfn, page.role));
        }
    });
    for (hpa, gfn, role) in roots.into_iter().flatten() {
        // SAFETY: the address of a page that is in use as a root, and stays so while the lock is held.
        let RootKind::Shadow(root) = unsafe { RootHpa::new(hpa) }.kind() else {
            continue;
        };
        let word = |on: bool, word: &'static str| if on { word } else { "" };
        seq_print!(
            m,
            "# shadow root level {}{}{}{}, table {:#x}\n",
            role.level().get(),
            word(role.is_smm(), " smm"),
            word(role.is_guest_mode(), " guest-mode"),
            word(role.is_direct(), " direct"),
            gfn.to_gpa()
        );
        let mut runs = Runs { m, vm, run: None };
        let mut left = MAX_SHADOW_LEAVES;
        vm.shadow.visit_leaves(
            &vm.host(),
            lock,
            Root::Page(root),
            |address, _, level, spte| {
                runs.leaf(address, level, spte);
                left = left.saturating_sub(1);
                left != 0
            },
        );
        runs.end();
        if left == 0 {
            seq_print!(m, "# and more\n");
        }
    }
}

/// Calls `f` with every valid root and its role, without a lock. Returns how many roots were left out.
fn with_roots(vm: &Vm, mut f: impl FnMut(TablePtr, Role)) -> u32 {
    // References, so that the lock need not be held meanwhile.
    let mut roots = [None; 8];
    let mut left_out = 0u32;
    {
        let mut lock = vm.kvm.read_lock();
        let mut free = roots.iter_mut();
        vm.tdp
            .visit_roots(&vm.host(), lock.token(), |root, role, invalid| {
                if !invalid && vm.tdp.get_root(root) {
                    match free.next() {
                        Some(place) => *place = Some((root, role)),
                        None => {
                            left_out = left_out.wrapping_add(1);
                            vm.tdp.put_root(&vm.host(), root);
                        }
                    }
                }
            });
    }
    for (root, role) in roots.into_iter().flatten() {
        f(root, role);
        let _lock = vm.kvm.read_lock();
        vm.tdp.put_root(&vm.host(), root);
    }
    left_out
}

/// The file `page_table`.
///
/// # Safety
///
/// Called by debugfs, with the file's data.
#[no_mangle]
unsafe extern "C" fn rmmu_show_page_table(m: *mut bindings::seq_file, data: *mut c_void) {
    // SAFETY: called by debugfs.
    let (m, vm) = unsafe { (seq(m), vm(data)) };
    let left_out = with_roots(vm, |root, role| {
        seq_print!(
            m,
            "# root level {}{}{}\n",
            role.level.get(),
            if role.smm { " smm" } else { "" },
            if role.guest_mode { " guest-mode" } else { "" }
        );
        print_root(m, vm, root);
    });
    if left_out != 0 {
        seq_print!(m, "# {} more roots\n", left_out);
    }
    print_shadow_roots(m, vm);
}
check_prototype!(rmmu_show_page_table);
