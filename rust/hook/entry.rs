// SPDX-License-Identifier: GPL-2.0

//! The Rust handler of each entry point, under the name its stub jumps to: `rmmu_` and the function's name.
//!
//! A handler turns KVM's raw pointers into references and calls the VM's MMU; it decides nothing. The stub has seen the
//! owner mark, so the VM is ours (except in `rmmu_kvm_mmu_init_vm`, where that is decided).

// C structs without members (locks without lockdep) are only ever pointed at.
#![allow(improper_ctypes_definitions)]
// The handlers' macros take every result type, `()` included.
#![allow(clippy::unused_unit)]

use crate::{
    kvm::{bindings::*, calls::orig, vcpu::Instruction, walk::Walk, Kvm, Mmu, RootSet, Slot, Vcpu},
    mmu::types::{Gfn, GfnRange, Level},
    vm::{self, Vm},
};
use kernel::{
    error::code::{EINVAL, ENOTTY},
    ffi::{c_char, c_int, c_long, c_uint, c_ulong, c_void},
};

/// The VM and our data of it.
///
/// # Safety
///
/// `kvm` is a live VM that the stub has found to be ours.
unsafe fn owned<'a>(kvm: *mut kvm) -> (&'a Kvm, Option<&'a Vm>) {
    // SAFETY: the caller's promise.
    let kvm = unsafe { Kvm::from_raw(kvm) };
    // SAFETY: the stub has seen the mark, and our data lives from creation of the VM until its last entry point,
    // kvm_mmu_uninit_vm(), is done.
    let vm = unsafe { kvm.data_of_owned().cast::<Vm>().as_ref() };
    if vm.is_none() {
        no_data(kvm);
    }
    (kvm, vm)
}

#[cold]
#[inline(never)]
fn no_data(kvm: &Kvm) {
    kvm.bug(c"a VM of ours has no data");
}

/// Defines handlers of functions whose first argument is a VM.
macro_rules! vm_handlers {
    ($($(#[$meta:meta])* fn $name:ident($kvm:ident, $vm:ident $(, $arg:ident: $ty:ty)*) -> $ret:ty = $default:expr, $body:block)*) => {$(
        $(#[$meta])*
        ///
        /// # Safety
        ///
        /// Called by its stub only.
        #[no_mangle]
        unsafe extern "C" fn $name(kvm: *mut kvm $(, $arg: $ty)*) -> $ret {
            // SAFETY: the stub checked the owner, and KVM's callers hold the VM.
            let found = unsafe { owned(kvm) };
            let ($kvm, Some($vm)) = found else { return $default };
            let _ = &$kvm;
            $body
        }
        check_prototype!($name);
    )*};
}

/// Defines handlers of functions whose first argument is a vCPU.
macro_rules! vcpu_handlers {
    ($($(#[$meta:meta])* fn $name:ident($vcpu:ident, $vm:ident $(, $arg:ident: $ty:ty)*) -> $ret:ty = $default:expr, $body:block)*) => {$(
        $(#[$meta])*
        ///
        /// # Safety
        ///
        /// Called by its stub only.
        #[no_mangle]
        unsafe extern "C" fn $name(vcpu: *mut kvm_vcpu $(, $arg: $ty)*) -> $ret {
            // SAFETY: KVM calls with a vCPU that this thread holds.
            let $vcpu = unsafe { Vcpu::from_raw(vcpu) };
            // SAFETY: the stub checked the owner.
            let found = unsafe { owned($vcpu.kvm().as_ptr()) };
            let (_, Some($vm)) = found else { return $default };
            $body
        }
        check_prototype!($name);
    )*};
}

/// A slot that KVM passes.
///
/// # Safety
///
/// `slot` is null or a slot that lives while the handler runs.
unsafe fn slot_of<'a>(slot: *const kvm_memory_slot) -> Option<&'a Slot> {
    // SAFETY: the caller's promise.
    unsafe { Slot::from_raw(slot) }
}

/// Decides who owns the VM.
///
/// # Safety
///
/// Called by its stub only.
#[no_mangle]
unsafe extern "C" fn rmmu_kvm_mmu_init_vm(kvm: *mut kvm) -> c_int {
    let visit = vm::Visit::begin();
    // SAFETY: the function itself, with the argument it was called with.
    let ret = unsafe { orig::kvm_mmu_init_vm(kvm) };
    if ret != 0 || visit.is_late() || !super::complete() {
        return ret;
    }
    // SAFETY: the VM is being created by this thread, and the function has initialised its lists.
    match unsafe { vm::adopt(Kvm::from_raw(kvm)) } {
        Ok(()) => 0,
        Err(error) => {
            // SAFETY: undoes what the function did above; KVM does not do it for a VM that has no MMU.
            unsafe { orig::kvm_mmu_uninit_vm(kvm) };
            error.to_errno()
        }
    }
}
check_prototype!(rmmu_kvm_mmu_init_vm);

/// The end of a VM: no vCPU, no notifier and no file refers to it any more.
///
/// # Safety
///
/// Called by its stub only.
#[no_mangle]
unsafe extern "C" fn rmmu_kvm_mmu_uninit_vm(kvm: *mut kvm) {
    // SAFETY: the VM is being destroyed by this thread.
    let module_reference = unsafe { vm::release(Kvm::from_raw(kvm)) };
    // SAFETY: the function itself; the lists are plain and empty again.
    unsafe { orig::kvm_mmu_uninit_vm(kvm) };
    vm::released();
    // The last act: rmmod may go on from here.
    drop(module_reference);
}
check_prototype!(rmmu_kvm_mmu_uninit_vm);

/// An ioctl of a VM that KVM's x86 part serves. The one that can make a VM of the default type an encrypted one is refused, as
/// a machine without encryption refuses it.
///
/// Its commands are not told from each other: what they are is in memory that another thread can change until KVM reads it.
/// Those other than the ones that are meant need an encrypted VM. Without an argument it is a question, and KVM answers.
///
/// # Safety
///
/// Called by its stub only.
#[no_mangle]
unsafe extern "C" fn rmmu_kvm_arch_vm_ioctl(
    file: *mut file,
    ioctl: c_uint,
    argument: c_ulong,
) -> c_int {
    // SAFETY: no precondition.
    if ioctl == unsafe { rmmu_memory_encrypt_op() } && argument != 0 {
        vm::refuse_encryption("KVM_MEMORY_ENCRYPT_OP");
        return ENOTTY.to_errno();
    }
    // SAFETY: the function itself, with the arguments it was called with. The file holds the VM, which holds this module.
    unsafe { orig::kvm_arch_vm_ioctl(file, ioctl, argument) }
}
check_prototype!(rmmu_kvm_arch_vm_ioctl);

/// A capability is enabled. Those that give a VM of the default type what an encrypted one has are refused with what KVM says
/// of a VM that cannot take it.
///
/// # Safety
///
/// Called by its stub only.
#[no_mangle]
unsafe extern "C" fn rmmu_kvm_vm_ioctl_enable_cap(
    kvm: *mut kvm,
    cap: *mut kvm_enable_cap,
) -> c_int {
    // SAFETY: KVM's own copy of what userspace gave, which lives during the call.
    match unsafe { (*cap).cap } {
        KVM_CAP_VM_COPY_ENC_CONTEXT_FROM => {
            vm::refuse_encryption("KVM_CAP_VM_COPY_ENC_CONTEXT_FROM")
        }
        KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM => {
            vm::refuse_encryption("KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM")
        }
        // SAFETY: the function itself, with the arguments it was called with; the caller holds the VM.
        _ => return unsafe { orig::kvm_vm_ioctl_enable_cap(kvm, cap) },
    }
    EINVAL.to_errno()
}
check_prototype!(rmmu_kvm_vm_ioctl_enable_cap);

vcpu_handlers! {
    /// Gives the vCPU a root.
    fn rmmu_kvm_mmu_load(vcpu, vm) -> c_int = 0, { vm.load(vcpu) }

    /// Takes all roots from the vCPU.
    fn rmmu_kvm_mmu_unload(vcpu, vm) -> () = (), { vm.unload(vcpu) }

    /// Drops our roots; KVM computes the paging context anew and finds none to drop.
    fn rmmu_kvm_mmu_reset_context(vcpu, vm) -> () = (), {
        vm.unload(vcpu);
        // SAFETY: the function itself, with its own argument.
        unsafe { orig::kvm_mmu_reset_context(vcpu.as_ptr()) }
    }

    /// The same after a change of CPUID.
    fn rmmu_kvm_mmu_after_set_cpuid(vcpu, vm) -> () = (), {
        vm.unload(vcpu);
        // SAFETY: the function itself, with its own argument.
        unsafe { orig::kvm_mmu_after_set_cpuid(vcpu.as_ptr()) }
    }

    /// Drops our roots; KVM frees the vCPU's caches.
    fn rmmu_kvm_mmu_destroy(vcpu, vm) -> () = (), {
        vm.unload(vcpu);
        // SAFETY: the function itself, with its own argument.
        unsafe { orig::kvm_mmu_destroy(vcpu.as_ptr()) }
    }

    /// The guest loads CR3, or the context changes.
    fn rmmu_kvm_mmu_new_pgd(vcpu, vm, new_pgd: u64) -> () = (), { vm.new_pgd(vcpu, new_pgd) }

    /// Drops roots that were invalidated.
    fn rmmu_kvm_mmu_free_obsolete_roots(vcpu, vm) -> () = (), { vm.free_obsolete_roots(vcpu) }

    /// The guest flushes its TLB: what it wrote to its tables counts from now on.
    fn rmmu_kvm_mmu_sync_roots(vcpu, vm) -> () = (), { vm.sync_roots(vcpu) }

    /// The same for the roots used before.
    fn rmmu_kvm_mmu_sync_prev_roots(vcpu, vm) -> () = (), { vm.sync_previous_roots(vcpu) }

    /// A stage-2 fault.
    fn rmmu_kvm_mmu_page_fault(vcpu, vm, gpa: u64, error_code: u64, insn: *mut c_void, len: c_int) -> c_int = 0, {
        // SAFETY: what KVM gave with the fault.
        vm.page_fault(vcpu, gpa, error_code, unsafe { Instruction::new(insn, len) })
    }

    /// A page that was on its way in is there.
    fn rmmu_kvm_arch_async_page_ready(vcpu, vm, work: *mut kvm_async_pf) -> () = (), {
        // SAFETY: KVM passes a work item that is complete, and keeps it while we look at it.
        let (address, arch, wakeup_all) = unsafe {
            ((*work).cr2_or_gpa, (*work).arch, (*work).wakeup_all)
        };
        if wakeup_all {
            return;
        }
        if arch.direct_map {
            vm.async_page_ready(vcpu, address, arch.error_code);
        } else {
            vm.guest_page_ready(vcpu, address, arch.error_code, arch.cr3 as u64);
        }
    }

    /// Userspace maps memory before the guest asks for it.
    fn rmmu_kvm_arch_vcpu_pre_fault_memory(vcpu, vm, range: *mut kvm_pre_fault_memory) -> c_long = 0, {
        // SAFETY: KVM's own copy of the ioctl's argument.
        let (gpa, size) = unsafe { ((*range).gpa, (*range).size) };
        vm.pre_fault(vcpu, gpa, size) as c_long
    }

    /// An instruction that wrote to the guest's memory was emulated.
    fn rmmu_kvm_mmu_track_write(vcpu, vm, gpa: u64, _new: *const u8, bytes: c_int) -> () = (), {
        vm.track_write(vcpu, gpa, usize::try_from(bytes).unwrap_or(0))
    }

    /// A write fault on a table may be avoided by no longer shadowing it.
    fn rmmu___kvm_mmu_unprotect_gfn_and_retry(vcpu, vm, address: u64, always_retry: bool) -> bool = false, {
        vm.unprotect_and_retry(vcpu, address, always_retry)
    }

    /// The guest invalidates translations of an address.
    fn rmmu_kvm_mmu_invalidate_addr(vcpu, vm, walk: *mut Walk, addr: u64, roots: c_ulong) -> () = (), {
        // SAFETY: the function itself, which without roots flushes the TLB and looks at no table.
        unsafe { orig::kvm_mmu_invalidate_addr(vcpu.as_ptr(), walk, addr, 0) };
        vm.invalidate_addr(vcpu, vcpu.mmu_of_walk(walk), addr, RootSet(roots as u64))
    }

    /// KVM prints the entries of an address it cannot make sense of.
    fn rmmu_kvm_mmu_print_sptes(vcpu, vm, gpa: u64, _msg: *const c_char) -> () = (), { vm.print_sptes(vcpu, gpa) }
}

/// The frames and slot of a notifier's range.
///
/// # Safety
///
/// `range` is what KVM passes to a notifier's handler.
unsafe fn notifier_range<'a>(range: *mut kvm_gfn_range) -> Option<(GfnRange, &'a Slot, bool)> {
    // SAFETY: the caller's promise.
    let (start, end, slot, may_block) = unsafe {
        (
            (*range).start,
            (*range).end,
            (*range).slot,
            (*range).may_block,
        )
    };
    // SAFETY: KVM holds SRCU or slots_lock.
    Some((
        GfnRange::new(Gfn(start), Gfn(end)),
        unsafe { slot_of(slot) }?,
        may_block,
    ))
}

vm_handlers! {
    /// Takes roots from a vCPU.
    fn rmmu_kvm_mmu_free_roots(kvm, vm, mmu: *mut kvm_mmu, roots: c_ulong) -> () = (), {
        // SAFETY: a context of a vCPU that this thread holds.
        vm.free_roots(kvm, unsafe { Mmu::from_raw(mmu) }, RootSet(roots as u64))
    }

    /// Takes roots of a nested guest from a vCPU.
    fn rmmu_kvm_mmu_free_guest_mode_roots(kvm, vm, mmu: *mut kvm_mmu) -> () = (), {
        // SAFETY: a context of a vCPU that this thread holds.
        vm.free_guest_mode_roots(kvm, unsafe { Mmu::from_raw(mmu) })
    }

    /// The host unmaps pages. KVM holds `mmu_lock` for write.
    fn rmmu_kvm_unmap_gfn_range(kvm, vm, range: *mut kvm_gfn_range) -> bool = false, {
        // SAFETY: as KVM passes it.
        let Some((range, slot, may_block)) = (unsafe { notifier_range(range) }) else { return false };
        // SAFETY: KVM took the lock before it called, and drops it after we return.
        let mut lock = unsafe { crate::kvm::lock::held_for_write(kvm) };
        vm.unmap(kvm, &mut lock, range, slot, may_block)
    }

    /// The host asks whether pages were used, and takes them as unused from now on.
    fn rmmu_kvm_age_gfn(kvm, vm, range: *mut kvm_gfn_range) -> bool = false, {
        // SAFETY: as KVM passes it.
        let Some((range, slot, _)) = (unsafe { notifier_range(range) }) else { return false };
        vm.age(kvm, range, slot, false)
    }

    /// The host asks whether pages were used.
    fn rmmu_kvm_test_age_gfn(kvm, vm, range: *mut kvm_gfn_range) -> bool = false, {
        // SAFETY: as KVM passes it.
        let Some((range, slot, _)) = (unsafe { notifier_range(range) }) else { return false };
        vm.age(kvm, range, slot, true)
    }

    /// The process's memory goes away: drop every mapping.
    fn rmmu_kvm_arch_flush_shadow_all(kvm, vm) -> () = (), { vm.zap_all(kvm) }

    /// A slot is deleted or moved.
    fn rmmu_kvm_arch_flush_shadow_memslot(kvm, vm, slot: *mut kvm_memory_slot) -> () = (), {
        // SAFETY: KVM holds slots_lock.
        if let Some(slot) = unsafe { slot_of(slot) } {
            vm.flush_slot(kvm, slot);
        }
    }

    /// The slots change: MMIO entries of older generations are stale.
    fn rmmu_kvm_mmu_invalidate_mmio_sptes(kvm, vm, generation: u64) -> () = (), { vm.new_generation(kvm, generation) }

    /// Zaps a range, e.g. because its memory type changed.
    fn rmmu_kvm_zap_gfn_range(kvm, vm, start: u64, end: u64) -> () = (), {
        vm.zap_range(kvm, GfnRange::new(Gfn(start), Gfn(end)))
    }

    /// First half of a fast zap of everything. KVM holds slots_lock, and `mmu_lock` for write.
    fn rmmu___kvm_mmu_zap_all_fast_front_half(kvm, vm) -> () = (), {
        // SAFETY: KVM took the lock before it called.
        let mut lock = unsafe { crate::kvm::lock::held_for_write(kvm) };
        vm.invalidate_roots(kvm, &mut lock)
    }

    /// Second half of it.
    fn rmmu_kvm_tdp_mmu_zap_invalidated_roots(kvm, vm, _shared: bool) -> () = (), { vm.zap_invalidated_roots(kvm) }

    /// The quota of shadow pages changes.
    fn rmmu_kvm_mmu_change_mmu_pages(kvm, vm, pages: c_ulong) -> () = (), { vm.set_max_pages(kvm, pages as u64) }

    /// Write-protects a slot for dirty logging.
    fn rmmu_kvm_mmu_slot_remove_write_access(kvm, vm, slot: *const kvm_memory_slot, level: c_int) -> () = (), {
        // SAFETY: KVM holds slots_lock.
        if let (Some(slot), Some(level)) = (unsafe { slot_of(slot) }, Level::new(level as u8)) {
            vm.write_protect_slot(kvm, slot, level);
        }
    }

    /// Write-protects a frame. KVM holds `mmu_lock` for write.
    fn rmmu_kvm_mmu_slot_gfn_write_protect(kvm, vm, slot: *mut kvm_memory_slot, gfn: u64, level: c_int) -> bool = false, {
        // SAFETY: KVM took the lock before it called, and holds slots_lock or SRCU.
        let (lock, slot) = unsafe { (crate::kvm::lock::held_for_write(kvm), slot_of(slot)) };
        match (slot, Level::new(level as u8)) {
            (Some(slot), Some(level)) => vm.write_protect_gfn(kvm, &lock, slot, Gfn(gfn), level),
            _ => false,
        }
    }

    /// Makes frames that userspace has harvested clean again. KVM holds `mmu_lock` for write.
    fn rmmu_kvm_arch_mmu_enable_log_dirty_pt_masked(kvm, vm, slot: *mut kvm_memory_slot, offset: u64, mask: c_ulong) -> () = (), {
        // SAFETY: KVM took the lock before it called, and holds slots_lock.
        let (mut lock, slot) = unsafe { (crate::kvm::lock::held_for_write(kvm), slot_of(slot)) };
        if let Some(slot) = slot {
            vm.log_dirty_masked(kvm, &mut lock, slot, offset, mask as u64);
        }
    }

    /// Clears the dirty state of a slot.
    fn rmmu_kvm_mmu_slot_leaf_clear_dirty(kvm, vm, slot: *const kvm_memory_slot) -> () = (), {
        // SAFETY: KVM holds slots_lock.
        if let Some(slot) = unsafe { slot_of(slot) } {
            vm.clear_dirty_slot(kvm, slot);
        }
    }

    /// Splits huge pages of a range. KVM holds `mmu_lock` for write.
    fn rmmu_kvm_mmu_try_split_huge_pages(kvm, vm, slot: *const kvm_memory_slot, start: u64, end: u64, level: c_int) -> () = (), {
        // SAFETY: KVM took the lock before it called, and holds slots_lock.
        let (mut lock, slot) = unsafe { (crate::kvm::lock::held_for_write(kvm), slot_of(slot)) };
        if let (Some(slot), Some(level)) = (slot, Level::new(level as u8)) {
            vm.split_locked(kvm, &mut lock, slot, GfnRange::new(Gfn(start), Gfn(end)), level);
        }
    }

    /// Splits huge pages of a slot.
    fn rmmu_kvm_mmu_slot_try_split_huge_pages(kvm, vm, slot: *const kvm_memory_slot, level: c_int) -> () = (), {
        // SAFETY: KVM holds slots_lock.
        if let (Some(slot), Some(level)) = (unsafe { slot_of(slot) }, Level::new(level as u8)) {
            vm.split_slot(kvm, slot, level);
        }
    }

    /// Dirty logging is over: map huge pages again.
    fn rmmu_kvm_mmu_recover_huge_pages(kvm, vm, slot: *const kvm_memory_slot) -> () = (), {
        // SAFETY: KVM holds slots_lock.
        if let Some(slot) = unsafe { slot_of(slot) } {
            vm.recover_huge(kvm, slot);
        }
    }
}

/// A turn of the task that recovers NX huge pages. Its data is the VM.
///
/// # Safety
///
/// Called by its stub only.
#[no_mangle]
unsafe extern "C" fn rmmu_kvm_nx_huge_page_recovery_worker(data: *mut c_void) -> bool {
    // SAFETY: the stub checked the owner, and KVM ends the task before the VM goes.
    let (kvm, vm) = unsafe { owned(data.cast()) };
    vm.is_some_and(|vm| vm.nx_recovery_turn(kvm))
}
check_prototype!(rmmu_kvm_nx_huge_page_recovery_worker);
