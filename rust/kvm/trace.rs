// SPDX-License-Identifier: GPL-2.0

//! kvm.ko's tracepoints, emitted for VMs of ours under their own names and fields.
//!
//! An event costs a load and a compare while nobody listens: the tracepoint's key is kvm.ko's, and a module can not have a
//! patched branch on another module's key.

use crate::{
    kvm::{bindings, symbols, table, vcpu::Vcpu, vm::Kvm},
    mmu::{
        host::{Event, SplitOutcome},
        shadow::{guest::WalkEvent, Page, PageEvent},
        spte::Spte,
        sync::atomic::AtomicU64,
        table::Table,
        types::{Gfn, Hpa, Level, Pfn},
    },
};
use core::ptr::NonNull;
use kernel::{prelude::*, str::CString};

/// Looks the tracepoints up, and binds the calls of their iterators; kvm.ko is there.
pub fn bind() -> Result {
    /// Of `__traceiter_EVENT`.
    const PREFIX: usize = "__traceiter_".len();
    for (event, iterator) in (0u32..).zip(symbols::iterators()) {
        let name = symbols::name(iterator);
        let address = symbols::require_kvm(name)?;
        // SAFETY: kvm.ko stays while VMs of ours exist, and `abi::check()` compared the prototype.
        unsafe { symbols::bind(iterator, address) };
        let event_name = name.to_str()?.get(PREFIX..).ok_or(EINVAL)?;
        let tracepoint = CString::try_from_fmt(fmt!("__tracepoint_{}", event_name))?;
        let tracepoint = symbols::require_kvm(&tracepoint)? as *mut bindings::tracepoint;
        // SAFETY: a tracepoint of kvm.ko, whose layout was compared with BTF. Its key is only read while a VM of ours, and
        // so kvm.ko, lives.
        unsafe { bindings::rmmu_bind_event(event, tracepoint) };
    }
    Ok(())
}

/// Whether anybody listens to an event, one of `RMMU_EVENT_*`.
#[inline(always)]
fn on(event: u32) -> bool {
    // SAFETY: an array with a place for each event, written before any VM is ours.
    let key = unsafe { bindings::rmmu_event_keys[event as usize] };
    if key.is_null() {
        return false;
    }
    // SAFETY: the key of a tracepoint of kvm.ko, which stays while a VM is ours; `enabled` is an int that is switched
    // atomically.
    unsafe { (&raw const (*key).enabled.counter).read_volatile() != 0 }
}

/// Emits what the engine says.
#[inline(always)]
pub(super) fn emit(event: Event<'_>) {
    match event {
        Event::SpteChanged {
            cell,
            gfn,
            level,
            old,
            new,
        } => {
            if on(bindings::rmmu_event_RMMU_EVENT_kvm_tdp_mmu_spte_changed) {
                spte_changed(cell, gfn, level, old, new);
            }
        }
        Event::SpteSet { cell, gfn, level } => {
            if on(bindings::rmmu_event_RMMU_EVENT_kvm_mmu_set_spte) {
                // SAFETY: the entry lives; the event reads it once.
                unsafe { bindings::rmmu_trace_set_spte(level.get().into(), gfn.0, cell.as_ptr()) }
            }
        }
        Event::MmioSet { cell, gfn, spte } => {
            if on(bindings::rmmu_event_RMMU_EVENT_mark_mmio_spte) {
                // SAFETY: as above; the event keeps the address only.
                unsafe { bindings::rmmu_trace_mark_mmio_spte(cell.as_ptr(), gfn.0, spte.raw()) }
            }
        }
        Event::TableMade(table) => {
            if on(bindings::rmmu_event_RMMU_EVENT_kvm_mmu_get_page) {
                // SAFETY: no precondition.
                unsafe { bindings::rmmu_trace_get_page(&traced_table(table), true) }
            }
        }
        Event::TableRemoved(table) => {
            if on(bindings::rmmu_event_RMMU_EVENT_kvm_mmu_prepare_zap_page) {
                // SAFETY: no precondition.
                unsafe { bindings::rmmu_trace_prepare_zap_page(&traced_table(table)) }
            }
        }
        Event::HugeSplit {
            gfn,
            spte,
            level,
            outcome,
        } => {
            if on(bindings::rmmu_event_RMMU_EVENT_kvm_mmu_split_huge_page) {
                let error = match outcome {
                    SplitOutcome::Done => 0,
                    SplitOutcome::Raced => EBUSY.to_errno(),
                    SplitOutcome::NoMemory => ENOMEM.to_errno(),
                };
                // SAFETY: no precondition.
                unsafe {
                    bindings::rmmu_trace_split_huge_page(
                        gfn.0,
                        spte.raw(),
                        level.get().into(),
                        error,
                    )
                }
            }
        }
    }
}

/// What happens to pages of the shadow MMU.
#[inline(always)]
pub(super) fn page(event: PageEvent<'_>) {
    match event {
        PageEvent::Found(page) => got_page(page, false),
        PageEvent::Made(page) => got_page(page, true),
        PageEvent::Unsynced(page) => {
            if on(bindings::rmmu_event_RMMU_EVENT_kvm_mmu_unsync_page) {
                // SAFETY: no precondition.
                unsafe { bindings::rmmu_trace_unsync_page(&traced_page(page)) }
            }
        }
        PageEvent::Synced(page) => {
            if on(bindings::rmmu_event_RMMU_EVENT_kvm_mmu_sync_page) {
                // SAFETY: no precondition.
                unsafe { bindings::rmmu_trace_sync_page(&traced_page(page)) }
            }
        }
        PageEvent::Zapped(page) => {
            if on(bindings::rmmu_event_RMMU_EVENT_kvm_mmu_prepare_zap_page) {
                // SAFETY: no precondition.
                unsafe { bindings::rmmu_trace_prepare_zap_page(&traced_page(page)) }
            }
        }
    }
}

#[inline(always)]
fn got_page(page: &Page, made: bool) {
    if on(bindings::rmmu_event_RMMU_EVENT_kvm_mmu_get_page) {
        // SAFETY: no precondition.
        unsafe { bindings::rmmu_trace_get_page(&traced_page(page), made) }
    }
}

/// `kvm_tdp_mmu_spte_changed`, whose address space is that of the entry's table.
#[cold]
fn spte_changed(cell: &AtomicU64, gfn: Gfn, level: Level, old: Spte, new: Spte) {
    const PAGE_MASK: u64 = kernel::page::PAGE_SIZE as u64 - 1;
    let hpa = table::hpa_of(NonNull::from(cell).cast()).0 & !PAGE_MASK;
    // SAFETY: entries are in a page of a table, whose private word is the header. The caller is where it may use the entry,
    // so the header lives.
    let table = unsafe { &*table::header_at(Hpa(hpa)).cast::<Table>() };
    // SAFETY: no precondition.
    unsafe {
        bindings::rmmu_trace_spte_changed(
            table.is_smm().into(),
            gfn.0,
            level.get().into(),
            old.raw(),
            new.raw(),
        )
    }
}

fn traced_table(table: &Table) -> bindings::rmmu_traced_page {
    // The role is the root's; its four lowest bits are the level.
    let role = table.role().word;
    bindings::rmmu_traced_page {
        gfn: table.gfn().0,
        role,
        ..Default::default()
    }
}

fn traced_page(page: &Page) -> bindings::rmmu_traced_page {
    bindings::rmmu_traced_page {
        gfn: page.gfn().0,
        role: page.role().0,
        root_count: page.root_count(),
        generation: page.generation(),
        unsync: page.is_unsync(),
    }
}

/// What happens while the guest's tables are walked for a fault.
#[inline(always)]
pub(super) fn walk(event: WalkEvent) {
    match event {
        WalkEvent::Begins { address, kind } => {
            if on(bindings::rmmu_event_RMMU_EVENT_kvm_mmu_pagetable_walk) {
                // SAFETY: no precondition.
                unsafe { bindings::rmmu_trace_pagetable_walk(address, kind.bits() as u32) }
            }
        }
        WalkEvent::Entry { entry, level } => {
            if on(bindings::rmmu_event_RMMU_EVENT_kvm_mmu_paging_element) {
                // SAFETY: no precondition.
                unsafe { bindings::rmmu_trace_paging_element(entry, level.get().into()) }
            }
        }
        WalkEvent::SetsAccessed { table, offset } => {
            if on(bindings::rmmu_event_RMMU_EVENT_kvm_mmu_set_accessed_bit) {
                // SAFETY: no precondition.
                unsafe { bindings::rmmu_trace_set_accessed_bit(table.0, offset.into()) }
            }
        }
        WalkEvent::SetsDirty { table, offset } => {
            if on(bindings::rmmu_event_RMMU_EVENT_kvm_mmu_set_dirty_bit) {
                // SAFETY: no precondition.
                unsafe { bindings::rmmu_trace_set_dirty_bit(table.0, offset.into()) }
            }
        }
        WalkEvent::Faults(error_code) => {
            if on(bindings::rmmu_event_RMMU_EVENT_kvm_mmu_walker_error) {
                // SAFETY: no precondition.
                unsafe { bindings::rmmu_trace_walker_error(error_code.bits() as u32) }
            }
        }
    }
}

/// `fast_page_fault`: a fault that might have needed no lock, and how it ended, as a value of KVM's `RET_PF_*`.
#[inline]
pub fn fast_page_fault(
    vcpu: &Vcpu,
    gpa: u64,
    error_code: u64,
    cell: &AtomicU64,
    old: Spte,
    ret: i32,
) {
    if on(bindings::rmmu_event_RMMU_EVENT_fast_page_fault) {
        // SAFETY: the vCPU lives, and the entry, which the event reads once.
        unsafe {
            bindings::rmmu_trace_fast_page_fault(
                vcpu.as_ptr(),
                gpa,
                error_code,
                cell.as_ptr(),
                old.raw(),
                ret,
            )
        }
    }
}

/// `handle_mmio_page_fault`: an access to an address whose entry says MMIO. The address is a guest virtual one, which a
/// direct fault does not know: 0.
#[inline]
pub fn handle_mmio_page_fault(gva: u64, gfn: Gfn, access: u64) {
    if on(bindings::rmmu_event_RMMU_EVENT_handle_mmio_page_fault) {
        // SAFETY: no precondition.
        unsafe { bindings::rmmu_trace_handle_mmio_page_fault(gva, gfn.0, access as u32) }
    }
}

/// `check_mmio_spte`: an MMIO entry's generation was compared with that of the slots.
#[inline]
pub fn check_mmio_spte(spte: Spte, generation: u64) {
    if on(bindings::rmmu_event_RMMU_EVENT_check_mmio_spte) {
        let of_entry = spte.mmio_generation();
        // SAFETY: no precondition.
        unsafe {
            bindings::rmmu_trace_check_mmio_spte(spte.raw(), generation as u32, of_entry as u32)
        }
    }
}

/// `kvm_mmu_spte_requested`: a fault is about to map a frame.
#[inline]
pub fn spte_requested(gfn: Gfn, pfn: Pfn, goal_level: Level, access: u8) {
    if on(bindings::rmmu_event_RMMU_EVENT_kvm_mmu_spte_requested) {
        // SAFETY: no precondition.
        unsafe {
            bindings::rmmu_trace_spte_requested(gfn.0, pfn.0, goal_level.get().into(), access)
        }
    }
}

/// `kvm_mmu_zap_all_fast`: all roots are about to become obsolete.
#[inline]
pub fn zap_all_fast(kvm: &Kvm) {
    if on(bindings::rmmu_event_RMMU_EVENT_kvm_mmu_zap_all_fast) {
        // SAFETY: the VM lives.
        unsafe { bindings::rmmu_trace_zap_all_fast(kvm.as_ptr()) }
    }
}

/// `kvm_try_async_get_page`: a page takes I/O, and the guest may go on meanwhile.
#[inline]
pub fn try_async_get_page(gpa: u64, gfn: Gfn) {
    if on(bindings::rmmu_event_RMMU_EVENT_kvm_try_async_get_page) {
        // SAFETY: no precondition.
        unsafe { bindings::rmmu_trace_try_async_get_page(gpa, gfn.0) }
    }
}

/// `kvm_async_pf_repeated_fault`: the guest touched a page again that is on its way in.
#[inline]
pub fn async_pf_repeated_fault(gpa: u64, gfn: Gfn) {
    if on(bindings::rmmu_event_RMMU_EVENT_kvm_async_pf_repeated_fault) {
        // SAFETY: no precondition.
        unsafe { bindings::rmmu_trace_async_pf_repeated_fault(gpa, gfn.0) }
    }
}
