// SPDX-License-Identifier: GPL-2.0

//! A VM whose page tables are ours: state, ownership and policy.
//!
//! Ownership is decided once, when the VM is created, and kept until it is destroyed. A VM of ours holds a reference on
//! this module, which is the last thing it drops. The handlers of the entry points are methods of [`Vm`]:
//!
//! - `fault`: page faults, MMIO, pre-fault, async page faults;
//! - `backing`: what backs a frame;
//! - `tdp`: faults that the TDP MMU serves;
//! - `around`: which neighbours of a page that faulted are mapped with it;
//! - `shadow`: faults that the shadow MMU serves;
//! - `roots`: loading, dropping and invalidating roots;
//! - `shadow_roots`: roots of the shadow MMU, and keeping them in step with the guest's tables;
//! - `slots`: memory slots, the mmu notifier, zapping;
//! - `dirty`: dirty logging and huge pages;
//! - `audit`: whether everything that the MMUs keep fits together;
//! - `control`: what operators read and set;
//! - `debugfs`: what else the user can look at.

mod around;
mod audit;
mod backing;
mod control;
mod debugfs;
mod dirty;
mod fault;
mod roots;
mod shadow;
mod shadow_roots;
mod slots;
mod tdp;

use crate::{
    kvm::{
        bindings::{self, check_prototype},
        host::KvmHost,
        page, param,
        shadow::{free_buckets, ShadowStats},
        table, Kvm,
    },
    mmu::{
        shadow::Shadow,
        spte::SpteFormat,
        sync::atomic::{AtomicI64, AtomicU64, Ordering},
        tdp::Tdp,
    },
};
use kernel::{
    prelude::*,
    sync::atomic::{Acquire, Atomic, Full, Relaxed, Release},
};

pub use control::{device, Device};
pub use debugfs::{exit as debugfs_exit, init as debugfs_init};

/// What became of faults; every fault is counted once.
#[derive(Default)]
struct FaultCounters {
    fixed: AtomicU64,
    fast: AtomicU64,
    spurious: AtomicU64,
    retry: AtomicU64,
    mmio: AtomicU64,
    emulate: AtomicU64,
    guest: AtomicU64,
    error: AtomicU64,
}

impl FaultCounters {
    /// All of them, by name.
    fn each(&self) -> [(&'static str, u64); 8] {
        [
            ("fixed", &self.fixed),
            ("fast", &self.fast),
            ("spurious", &self.spurious),
            ("retry", &self.retry),
            ("mmio", &self.mmio),
            ("emulate", &self.emulate),
            ("guest", &self.guest),
            ("error", &self.error),
        ]
        .map(|(name, counter)| (name, counter.load(Ordering::Relaxed)))
    }
}

/// Our data of a VM, found through the owner mark in `struct kvm`.
pub struct Vm {
    kvm: &'static Kvm,
    /// Its name: the process that created it, and a number that tells the VMs of a process apart.
    id: (i32, u64),
    /// How entries look.
    format: SpteFormat,
    tdp: Tdp,
    shadow: Shadow,
    shadow_stats: ShadowStats,
    /// KVM uses nested paging.
    tdp_enabled: bool,
    /// Tables linked below roots, and shadow pages.
    tables: AtomicI64,
    faults: FaultCounters,
    around: around::Around,
    /// It matters whether a page is a device's.
    host_mmio_matters: bool,
    debugfs: debugfs::VmDir,
}

/// Counters of the module.
struct Stats {
    owned: AtomicU64,
    owned_total: AtomicU64,
    declined: AtomicU64,
    audits: AtomicU64,
    audited_entries: AtomicU64,
    audit_findings: AtomicU64,
}

static STATS: Stats = Stats {
    owned: AtomicU64::new(0),
    owned_total: AtomicU64::new(0),
    declined: AtomicU64::new(0),
    audits: AtomicU64::new(0),
    audited_entries: AtomicU64::new(0),
    audit_findings: AtomicU64::new(0),
};

/// Distinguishes VMs of one process.
static NEXT: Atomic<u64> = Atomic::new(0);

kernel::sync::global_lock! {
    /// Creation of owned VMs against switching the static key, which is fixed while one exists.
    // SAFETY: initialised in `init`. Hooks come later, and who sets a parameter looks at `READY` first.
    unsafe(uninit) static OWNERSHIP: Mutex<()> = ();
}

/// Whether `OWNERSHIP` can be locked. Parameters that are given when the module is loaded are set before it is initialised.
static READY: Atomic<bool> = Atomic::new(false);

/// Prepares what VMs share.
pub fn init() {
    // SAFETY: called once, before anything locks it.
    unsafe { OWNERSHIP.init() };
    control::init();
    READY.store(true, Release);
}

/// Waits until nothing of destroyed VMs is on its way to the freeing callbacks in this module.
pub fn wait_for_teardown() {
    table::wait_for_frees();
}

/// Decides whether the VM that is being created is ours, and takes it if so.
///
/// # Errors
///
/// `ENOMEM`: the VM cannot be created. What else is in the way leaves it to in-tree KVM.
///
/// # Safety
///
/// KVM is creating the VM in this thread, and has initialised its lists.
pub unsafe fn adopt(kvm: &Kvm) -> Result {
    if !param::own_new_vms() {
        return Ok(());
    }
    if let Some(reason) = reason_to_decline(kvm) {
        decline(fmt!("{}", reason));
        return Ok(());
    }
    // SAFETY: the caller's promise.
    match unsafe { take(kvm) } {
        Err(error) if error != ENOMEM => {
            decline(fmt!("its data could not be set up ({:?})", error));
            Ok(())
        }
        done => done,
    }
}

/// Counts the VM, and says why; not each time if it happens often, since everybody who may use KVM can make it happen.
fn decline(reason: core::fmt::Arguments<'_>) {
    STATS.declined.fetch_add(1, Ordering::Relaxed);
    if param::may_log() {
        pr_info!("VM declined, in-tree KVM serves it: {}\n", reason);
    }
}

/// A VM of ours was asked to become an encrypted one, by an interface for VMs of the default type. Nobody else can take it
/// over any more, so it stays what it is.
pub fn refuse_encryption(what: &str) {
    if param::may_log() {
        pr_info!(
            "{} refused: a VM of rmmu cannot become an encrypted one. Create it with own_new_vms=0\n",
            what
        );
    }
}

fn reason_to_decline(kvm: &Kvm) -> Option<&'static str> {
    if kvm.vm_type() != bindings::KVM_X86_DEFAULT_VM {
        return Some("VM types other than the default one (SEV, SNP, TDX, software-protected) are not supported");
    }
    None
}

/// A reference on this module, given back when the value drops.
pub struct ModuleReference(());

impl ModuleReference {
    fn get() -> Result<Self> {
        crate::kvm::vm::get_module()?;
        Ok(ModuleReference(()))
    }
}

impl Drop for ModuleReference {
    fn drop(&mut self) {
        crate::kvm::vm::put_module();
    }
}

/// Handlers that run for VMs of no owner yet, while the module is being unloaded.
static LATE_VISITS: Atomic<u64> = Atomic::new(0);

/// Keeps the module's text in place while a handler runs that may sleep and has no VM of ours to do that.
///
/// Taking the hooks out waits for tasks that are in a handler, unless they sleep. So the handler holds a reference on the
/// module; when the module is on its way out already, it is counted, and [`wait_for_visits`] waits for it.
pub struct Visit(Option<ModuleReference>);

impl Visit {
    /// The handler begins. It has not slept yet.
    pub fn begin() -> Visit {
        let reference = ModuleReference::get().ok();
        if reference.is_none() {
            LATE_VISITS.fetch_add(1, Full);
        }
        Visit(reference)
    }

    /// The module is on its way out, so that nothing may become ours any more.
    pub fn is_late(&self) -> bool {
        self.0.is_none()
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        if self.0.is_none() {
            LATE_VISITS.fetch_sub(1, Full);
        }
    }
}

/// Waits until no handler that began without a reference is in module text. The hooks are gone, so that none begins.
///
/// Who is counted no more still has to return out of the handler, and does not sleep on that way: a grace period of RCU
/// tasks sees it off.
pub fn wait_for_visits() {
    while LATE_VISITS.load(Acquire) != 0 {
        kernel::time::delay::fsleep(kernel::time::Delta::from_millis(1));
    }
    // SAFETY: process context, which may sleep.
    unsafe { bindings::rmmu_synchronize_rcu_tasks() }
}

/// Sets the static key to which MMU serves direct roots. It is fixed while VMs of ours exist, and so is what it depends on:
/// our parameter, and KVM's, which a vendor module that has VMs can not change.
fn choose_mmu() -> Result {
    let tdp_mmu = param::wants_tdp_mmu() && param::kvm_tdp_mmu();
    if tdp_mmu != param::tdp_mmu() {
        if STATS.owned.load(Ordering::Relaxed) != 0 {
            return Err(EBUSY);
        }
        param::switch_tdp_mmu(tdp_mmu);
    }
    Ok(())
}

/// # Safety
///
/// As for [`adopt`].
unsafe fn take(kvm: &Kvm) -> Result {
    let _ownership = OWNERSHIP.lock();
    choose_mmu()?;
    let host_mmio_matters = param::bind_vendor();
    let reference = ModuleReference::get()?;
    let vm = KBox::new(
        Vm {
            // SAFETY: kept by this data only.
            kvm: unsafe { kvm.for_lifetime_of_owner() },
            id: (param::current_pid(), NEXT.fetch_add(1, Relaxed)),
            format: param::spte_format(kvm),
            tdp: Tdp::new(),
            shadow: Shadow::new(kvm.max_mmu_pages()),
            shadow_stats: ShadowStats::default(),
            tdp_enabled: param::tdp_enabled(),
            tables: AtomicI64::new(0),
            faults: FaultCounters::default(),
            around: around::Around::new(),
            host_mmio_matters,
            debugfs: debugfs::VmDir::new(),
        },
        GFP_KERNEL,
    )?;
    control::add(&vm)?;
    vm.debugfs.create(&vm);
    // SAFETY: the VM is being created by this thread, as the caller promises.
    unsafe { kvm.give_to_owner(vm) };
    core::mem::forget(reference);
    STATS.owned.fetch_add(1, Ordering::Relaxed);
    STATS.owned_total.fetch_add(1, Ordering::Relaxed);
    Ok(())
}

/// The VM is destroyed: gives back everything, and the module reference for the caller to drop last, after [`released`].
///
/// # Safety
///
/// KVM is destroying the VM in this thread.
pub unsafe fn release(kvm: &Kvm) -> Option<ModuleReference> {
    // SAFETY: the VM is being destroyed by this thread, as the caller promises; `take` handed a `Vm` over.
    let vm = unsafe { kvm.take_from_owner::<Vm>() }?;
    control::remove(&vm);
    vm.debugfs.remove();
    {
        let mut lock = kvm.write_lock();
        vm.tdp.uninit(&vm.host(), lock.token());
        vm.shadow.uninit(&vm.host(), lock.token());
        if let Some(buckets) = vm.shadow.take_buckets(lock.token()) {
            // SAFETY: what `prepare_slots` allocated, and the shadow MMU has given back.
            unsafe { free_buckets(buckets) };
        }
    }
    let left = vm.tables.load(Ordering::Relaxed);
    if left != 0 || !vm.tdp.is_empty() {
        pr_err!("VM is gone, but {} of its page tables are not\n", left);
        kernel::warn_on!(true);
    }
    drop(vm);
    page::forget_answers(kvm);
    STATS.owned.fetch_sub(1, Ordering::Relaxed);
    Some(ModuleReference(()))
}

/// KVM has given back its part, too. The headers of tables are of a cache of kvm.ko, which may be unloaded when the last VM
/// is gone, so grace periods have to be over. If KVM uses its TDP MMU it has waited just now, and waiting takes long.
pub fn released() {
    if !param::kvm_tdp_mmu() {
        table::wait_for_frees();
    }
}

/// Switches the parameter `tdp_mmu`.
///
/// # Errors
///
/// `EBUSY` while VMs of ours exist.
pub fn set_tdp_mmu(on: bool) -> Result {
    if !READY.load(Acquire) {
        // No VM can be ours yet.
        param::set_wants_tdp_mmu(on);
        return Ok(());
    }
    let _ownership = OWNERSHIP.lock();
    if on == param::wants_tdp_mmu() {
        return Ok(());
    }
    if STATS.owned.load(Ordering::Relaxed) != 0 {
        pr_err!("tdp_mmu is fixed while VMs of rmmu exist; stop them first\n");
        return Err(EBUSY);
    }
    param::set_wants_tdp_mmu(on);
    Ok(())
}

/// Whether `fault_around_bytes` can have that value, for its setter in C.
///
/// # Safety
///
/// None is needed: C declares it, and what C declares is unsafe.
#[no_mangle]
unsafe extern "C" fn rmmu_valid_fault_around_bytes(bytes: u64) -> bool {
    around::valid_bytes(bytes)
}
check_prototype!(rmmu_valid_fault_around_bytes);

/// The parameter's setter, called by its C part.
///
/// # Safety
///
/// Process context.
#[no_mangle]
unsafe extern "C" fn rmmu_set_tdp_mmu(on: bool) -> kernel::ffi::c_int {
    match set_tdp_mmu(on) {
        Ok(()) => 0,
        Err(error) => error.to_errno(),
    }
}
check_prototype!(rmmu_set_tdp_mmu);

impl Vm {
    /// The VM as the engine sees it.
    fn host(&self) -> KvmHost<'_> {
        KvmHost {
            kvm: self.kvm,
            format: &self.format,
            tables: &self.tables,
            ahead: &self.around.stats,
            tdp: param::tdp_mmu().then_some(&self.tdp),
            shadow_stats: &self.shadow_stats,
            tdp_enabled: self.tdp_enabled,
        }
    }
}
