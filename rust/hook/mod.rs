// SPDX-License-Identifier: GPL-2.0

//! Patching the entry points of KVM's MMU.
//!
//! The table is `entry_points.h`. Each function gets an ftrace direct call in the JMP form to its stub (`stubs.S`), all of
//! them with one `ftrace_ops` and one call: ftrace takes all or nothing, and one grace period ends them all. The ops are
//! PERMANENT, so that `ftrace_enabled=0` is refused instead of silently taking the hooks away from running VMs.
//!
//! # Lifetime
//!
//! kvm.ko may come and go. A module notifier attaches when it comes and detaches when it goes: a module that is unloaded
//! while ftrace has its functions patched would wreck ftrace for the rest of the boot. A VM of ours pins this module, and
//! its file pins kvm.ko, so neither goes while handlers can run.

pub mod entry;

use crate::{
    kvm::{abi, bindings, calls::core_kernel, param, symbols, trace},
    vm,
};
use core::{cell::UnsafeCell, mem::MaybeUninit, ptr};
use kernel::{
    error::to_result,
    ffi::{c_int, c_void},
    pr_err_once,
    prelude::*,
    str::{CStr, CString},
    sync::atomic::{Acquire, Atomic, Release},
};

/// Size of the patched instruction at a function's entry.
const PATCH_SIZE: usize = bindings::MCOUNT_INSN_SIZE as usize;
/// ftrace's mark of an address that is to be jumped to, not called.
const FTRACE_JMP: usize = 1;
/// 2^6 buckets for some forty functions.
const HASH_BITS: c_int = 6;

/// The one `ftrace_ops`, at a fixed address for as long as the module lives.
struct Ops(UnsafeCell<MaybeUninit<bindings::ftrace_ops>>);

// SAFETY: reached with `STATE` locked only; what ftrace itself does with it, it locks.
unsafe impl Sync for Ops {}

static OPS: Ops = Ops(UnsafeCell::new(MaybeUninit::zeroed()));

/// A set of functions and their stubs, as ftrace wants it.
struct Hash(*mut bindings::ftrace_hash);

impl Hash {
    fn new() -> Result<Hash> {
        // SAFETY: process context; bound by `symbols::init`.
        let hash = unsafe { core_kernel::alloc_ftrace_hash(HASH_BITS) };
        if hash.is_null() {
            return Err(ENOMEM);
        }
        Ok(Hash(hash))
    }

    fn add(&mut self, patch: &Patch) -> Result {
        // SAFETY: the hash is ours; `ip` is a patch site and the stub never returns to it.
        let entry = unsafe {
            core_kernel::add_ftrace_hash_entry_direct(self.0, patch.site, patch.stub | FTRACE_JMP)
        };
        if entry.is_null() {
            return Err(ENOMEM);
        }
        Ok(())
    }
}

impl Drop for Hash {
    fn drop(&mut self) {
        // SAFETY: ours; ftrace copies what it keeps.
        unsafe { core_kernel::free_ftrace_hash(self.0) }
    }
}

/// Where one entry point is patched.
struct Patch {
    name: &'static CStr,
    site: usize,
    stub: usize,
}

/// All hooks are in place. While they are put in and taken out, some are there and others not: no VM becomes ours then.
static COMPLETE: Atomic<bool> = Atomic::new(false);

/// Whether a VM may become ours.
pub fn complete() -> bool {
    COMPLETE.load(Acquire)
}

/// What is attached.
struct State {
    patches: Option<KVec<Patch>>,
}

kernel::sync::global_lock! {
    // SAFETY: initialised in `prepare` before anything locks it.
    unsafe(uninit) static STATE: Mutex<State> = State { patches: None };
}

/// The notifier block, at a fixed address.
struct Notifier(UnsafeCell<MaybeUninit<bindings::notifier_block>>);

// SAFETY: written before it is registered; the kernel's own afterwards.
unsafe impl Sync for Notifier {}

static NOTIFIER: Notifier = Notifier(UnsafeCell::new(MaybeUninit::zeroed()));

const NOTIFY_OK: c_int = bindings::NOTIFY_OK as c_int;
const KVM_MODULE: &CStr = c"kvm";

/// Finds an entry's patch site and points its static call past it.
fn resolve(function: &symbols::Function) -> Result<Patch> {
    let name = symbols::name(function);
    let address = symbols::require_kvm(name)?;
    // SAFETY: any address may be asked for.
    let site = unsafe { core_kernel::ftrace_location(address) };
    if site == 0 {
        pr_err!(
            "{} is not traceable in this kernel, so it cannot be hooked\n",
            name
        );
        return Err(ENOENT);
    }
    let stub = function.stub.map_or(0, |stub| stub as usize);
    // SAFETY: past the patched entry of the function, whose prototype was compared. kvm.ko stays while the hooks are in.
    unsafe { symbols::bind(function, site.wrapping_add(PATCH_SIZE)) };
    Ok(Patch { name, site, stub })
}

fn update(patches: &[Patch], add: bool) -> Result {
    let mut hash = Hash::new()?;
    for patch in patches {
        hash.add(patch)?;
    }
    let ops = OPS.0.get().cast();
    // SAFETY: ops and hash are ours and live long enough; the stubs are module text.
    to_result(unsafe {
        if add {
            core_kernel::update_ftrace_direct_add(ops, hash.0)
        } else {
            core_kernel::update_ftrace_direct_del(ops, hash.0)
        }
    })
}

/// The first wait for another try to take hooks out, in milliseconds. It doubles up to the last.
const FIRST_WAIT: i64 = 1;
const LAST_WAIT: i64 = 1000;

/// Takes hooks out.
///
/// Whoever calls frees this module's text or kvm.ko's next, and cannot be refused; with hooks in place that would be the end
/// of the machine. So there is no way out of here but success: whatever ftrace says, it is asked again, and the module that
/// is on its way out stays as long as that takes. Hooks that are in place work meanwhile.
fn remove(patches: &[Patch]) {
    let mut wait = FIRST_WAIT;
    while let Err(error) = update(patches, false) {
        // ftrace copies its tables for that, so ENOMEM is likely to pass, and is nothing to speak of.
        if error != ENOMEM && wait == LAST_WAIT {
            pr_err_once!(
                "hooks cannot be taken out: {:?}. The module that is being unloaded stays until they can\n",
                error
            );
        }
        kernel::time::delay::fsleep(kernel::time::Delta::from_millis(wait));
        wait = wait.saturating_mul(2).min(LAST_WAIT);
    }
}

/// The symbol that another direct user has diverted a patch site to.
fn diverted_to(site: usize) -> Option<CString> {
    const MAX_SYMBOL: usize = bindings::RMMU_SYMBOL_LEN as usize;
    // SAFETY: any address may be asked for; ftrace's lock is not needed for an answer that is only printed.
    let target = unsafe { core_kernel::ftrace_find_rec_direct(site) } & !FTRACE_JMP;
    if target == 0 {
        return None;
    }
    let mut text = KVec::from_elem(0u8, MAX_SYMBOL, GFP_KERNEL).ok()?;
    // SAFETY: the buffer has the size that the kernel asks for.
    unsafe { bindings::sprint_symbol(text.as_mut_ptr().cast(), target) };
    let text = CStr::from_bytes_until_nul(&text).ok()?;
    CString::try_from(text).ok()
}

/// The one function whose handler may sleep while no VM of ours pins this module.
const SLEEPS: &CStr = c"kvm_mmu_init_vm";

/// Says which function could not be hooked, by trying them one at a time.
fn explain(patches: &[Patch], error: Error) {
    for patch in patches {
        // Who is in its handler would not be waited for when the module is refused for the error.
        if patch.name.to_bytes() == SLEEPS.to_bytes() && diverted_to(patch.site).is_none() {
            continue;
        }
        let one = core::slice::from_ref(patch);
        reset_ops();
        match update(one, true) {
            Ok(()) => remove(one),
            Err(error) => {
                match diverted_to(patch.site) {
                    Some(user) => pr_err!(
                        "{} cannot be hooked ({:?}): it is diverted to {} already (that of a BPF program is called \
                         bpf_trampoline_NUMBER). Remove that and load again\n",
                        patch.name,
                        error,
                        &*user
                    ),
                    None => pr_err!(
                        "{} cannot be hooked ({:?}): a livepatch or another user of ftrace is on it. Remove that and \
                         load again; see /sys/kernel/tracing/enabled_functions\n",
                        patch.name,
                        error
                    ),
                }
                return;
            }
        }
    }
    pr_err!("ftrace refuses the hooks: {:?}\n", error);
}

fn reset_ops() {
    let ops = OPS.0.get().cast::<bindings::ftrace_ops>();
    // SAFETY: not registered now; `STATE` is locked, or the module is being loaded.
    unsafe {
        ptr::write_bytes(ops, 0, 1);
        (*ops).flags = bindings::FTRACE_OPS_FL_PERMANENT as usize;
    }
}

/// Checks kvm.ko, resolves everything and patches. All or nothing.
fn attach() -> Result {
    let mut state = STATE.lock();
    if state.patches.is_some() {
        return Ok(());
    }
    abi::check()?;
    for function in symbols::callees() {
        let address = symbols::require_kvm(symbols::name(function))?;
        // SAFETY: the prototype was compared above, and kvm.ko stays while VMs of ours exist.
        unsafe { symbols::bind(function, address) };
    }
    param::bind()?;
    trace::bind()?;
    let mut patches = KVec::with_capacity(symbols::entries().len(), GFP_KERNEL)?;
    for function in symbols::entries() {
        patches.push(resolve(function)?, GFP_KERNEL)?;
    }
    reset_ops();
    if let Err(error) = update(&patches, true) {
        if error == ENOMEM {
            pr_err!("no memory to hook kvm.ko\n");
            return Err(error);
        }
        explain(&patches, error);
        // ftrace says EINVAL for a function that is taken.
        return Err(EBUSY);
    }
    pr_info!("hooked {} entry points of kvm.ko\n", patches.len());
    state.patches = Some(patches);
    COMPLETE.store(true, Release);
    Ok(())
}

/// Takes every hook out. On return no CPU is in a stub.
fn detach() {
    let mut state = STATE.lock();
    let Some(patches) = state.patches.take() else {
        return;
    };
    COMPLETE.store(false, Release);
    remove(&patches);
    pr_info!("unhooked kvm.ko\n");
}

/// Whether the hooks are in place.
pub fn attached() -> bool {
    STATE.lock().patches.is_some()
}

/// kvm.ko comes or goes.
///
/// # Safety
///
/// Called by the kernel's module notifier only.
unsafe extern "C" fn module_event(
    _: *mut bindings::notifier_block,
    event: usize,
    module: *mut c_void,
) -> c_int {
    // SAFETY: the notifier's data is the module that changes state.
    let name =
        unsafe { CStr::from_char_ptr((*module.cast::<bindings::module>()).name.as_ptr().cast()) };
    if name.to_bytes() != KVM_MODULE.to_bytes() {
        return NOTIFY_OK;
    }
    if event == bindings::module_state_MODULE_STATE_COMING as usize {
        // An error was printed; kvm.ko then runs without us.
        if attach().is_err() {
            pr_err!("kvm.ko is loaded without rmmu: it owns no VM\n");
        }
    } else if event == bindings::module_state_MODULE_STATE_GOING as usize {
        detach();
    }
    NOTIFY_OK
}

/// Prepares what [`attached`] asks: comes before anything by which a user could ask.
pub fn prepare() {
    // SAFETY: called once, before anything locks it.
    unsafe { STATE.init() };
}

/// Hooks kvm.ko now, or as soon as it is loaded.
pub fn init() -> Result {
    symbols::init()?;
    let notifier = NOTIFIER.0.get().cast::<bindings::notifier_block>();
    // SAFETY: not registered yet.
    unsafe { (*notifier).notifier_call = Some(module_event) };
    // SAFETY: lives until `exit` takes it out.
    to_result(unsafe { bindings::register_module_notifier(notifier) })?;
    let attach_now = || match symbols::lookup_kvm(c"kvm_mmu_page_fault")? {
        Some(_) => attach(),
        None => {
            pr_info!("kvm.ko is not loaded; hooks follow when it is\n");
            Ok(())
        }
    };
    attach_now().or_else(|error| {
        // SAFETY: registered above.
        unsafe { bindings::unregister_module_notifier(notifier) };
        if !attached() {
            return Err(error);
        }
        // kvm.ko came just then, and was hooked. There may be VMs of ours already, so there is no way back, and no need.
        // SAFETY: lives until `exit` takes it out.
        to_result(unsafe { bindings::register_module_notifier(notifier) })
    })
}

/// Unhooks. No VM of ours exists: each holds a reference on the module.
///
/// Taking the hooks out comes with a grace period of RCU tasks, which ends when each task that was in module text has left
/// it, or sleeps. The one handler that may sleep without a VM of ours has counted itself before it does ([`vm::Visit`]); so
/// with the hooks gone nobody is added to those any more, and their end can be waited for.
pub fn exit() {
    // SAFETY: registered by `init`.
    unsafe { bindings::unregister_module_notifier(NOTIFIER.0.get().cast()) };
    detach();
    vm::wait_for_visits();
    vm::wait_for_teardown();
}
