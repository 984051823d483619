// SPDX-License-Identifier: GPL-2.0

//! The guest's own paging: its context, which KVM computes, and its memory, where its page tables are.

use crate::{
    kvm::{bindings, calls, trace, vcpu::Mmu, vcpu::Vcpu, walk::Format},
    mmu::{
        shadow::guest::{
            Exchange, GuestContext, GuestFault, GuestMemory, WalkEvent, Width,
            GROUP as GROUP_ENTRIES,
        },
        types::{Gfn, Level, PAGE_SHIFT},
    },
};
use core::cell::Cell;
use kernel::ffi::c_void;

/// The format of a guest's page tables.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GuestPaging {
    /// Entries of four bytes.
    Small,
    /// Entries of eight bytes; NPT included.
    Long,
    /// Extended page tables.
    Ept,
}

impl Mmu {
    /// The levels of the guest's tables, 3 for PAE; none without paging.
    pub fn guest_level(&self) -> Option<Level> {
        Level::new(self.cpu_role().level() as u8)
    }

    /// `CR0.WP` of the guest.
    pub fn write_protects_supervisor(&self) -> bool {
        self.cpu_role().cr0_wp() != 0
    }

    /// `CR4.SMEP` of the guest.
    pub fn smep(&self) -> bool {
        self.cpu_role().cr4_smep() != 0
    }

    fn cpu_role(&self) -> bindings::kvm_mmu_page_role__bindgen_ty_1 {
        // SAFETY: the context lives; the unions are words of bits.
        unsafe {
            (*self.walk())
                .cpu_role
                .__bindgen_anon_1
                .base
                .__bindgen_anon_1
        }
    }

    fn extended_role(&self) -> bindings::kvm_mmu_extended_role__bindgen_ty_1 {
        // SAFETY: as above.
        unsafe {
            (*self.walk())
                .cpu_role
                .__bindgen_anon_1
                .ext
                .__bindgen_anon_1
        }
    }
}

impl Vcpu {
    /// The format of the tables that the current context shadows.
    pub fn guest_paging(&self, ept: bool) -> GuestPaging {
        let mmu = self.mmu();
        if mmu.cpu_role().has_4_byte_gpte() != 0 {
            GuestPaging::Small
        } else if ept && self.is_guest_mmu(mmu) {
            GuestPaging::Ept
        } else {
            GuestPaging::Long
        }
    }

    /// What the current context's root register holds. May read registers.
    pub fn guest_root(&self) -> u64 {
        // SAFETY: the vCPU is loaded by this thread, and the context is its own.
        unsafe { bindings::rmmu_guest_pgd(self.as_ptr(), self.mmu().as_ptr()) }
    }

    /// The four page-directory pointers of PAE paging. May sleep.
    pub fn guest_pdptrs(&self) -> [u64; 4] {
        let mut pdptrs = [0; 4];
        for (index, pdptr) in (0..).zip(pdptrs.iter_mut()) {
            // SAFETY: as above, and the index is one of the four.
            *pdptr =
                unsafe { bindings::rmmu_guest_pdptr(self.as_ptr(), self.mmu().as_ptr(), index) };
        }
        pdptrs
    }

    /// How the guest pages now. May sleep. Inline: what it returns is large, and is to be made where it is used.
    #[inline(always)]
    pub fn guest_context(&self, paging: GuestPaging) -> Option<GuestContext> {
        let mmu = self.mmu();
        let (base, ext) = (mmu.cpu_role(), mmu.extended_role());
        let level = mmu.guest_level()?;
        let pdptrs = if level == Level::L1G {
            self.guest_pdptrs()
        } else {
            [0; 4]
        };
        let root = self.guest_root();
        let Format {
            rsvd,
            bad_mt_xwr,
            permissions,
            pkru_mask,
        } = mmu.format();
        // SAFETY: the vCPU lives and is this thread's.
        let pkru = unsafe { (*self.as_ptr()).arch.pkru };
        // SAFETY: the vCPU is loaded by this thread.
        let ac = ext.cr4_smap() != 0 && unsafe { bindings::rmmu_guest_ac(self.as_ptr()) };
        let ept = paging == GuestPaging::Ept;
        Some(GuestContext {
            level,
            root,
            pdptrs,
            pse: ext.cr4_pse() != 0,
            accessed_dirty: !ept || base.ad_disabled() == 0,
            mbec: ept && base.cr4_smep() != 0,
            reports_fetch: ext.has_pferr_fetch() != 0,
            nested: self.mmu_is_not_walked(),
            rsvd,
            bad_mt_xwr,
            permissions,
            pkru_mask,
            pkru,
            ac,
        })
    }

    /// Gives the guest, or the nested hypervisor, the fault that its tables are the reason of.
    pub fn inject_page_fault(&self, fault: &GuestFault) {
        // SAFETY: the vCPU is loaded by this thread, which holds no lock.
        unsafe {
            bindings::rmmu_inject_page_fault(
                self.as_ptr(),
                fault.address,
                fault.error_code.bits(),
                self.mmu_is_not_walked(),
                fault.exit_qualification.unwrap_or(0) as usize,
            )
        }
    }

    /// The guest physical address of a guest virtual one that is written to.
    pub fn translate_write(&self, address: u64) -> Option<u64> {
        // SAFETY: the vCPU is loaded by this thread; nobody wants to know the exception.
        let gpa = unsafe {
            calls::kvm_mmu_gva_to_gpa_write(self.as_ptr(), address as usize, core::ptr::null_mut())
        };
        (gpa != u64::MAX).then_some(gpa)
    }

    /// Whether the guest sees memory at `gfn`.
    pub fn sees(&self, gfn: Gfn) -> bool {
        // SAFETY: the vCPU lives, and its thread is in an SRCU section.
        unsafe { calls::kvm_vcpu_is_visible_gfn(self.as_ptr(), gfn.0) }
    }

    /// Reads guest memory without sleeping. False if it is not there.
    pub fn read_now(&self, gpa: u64, to: &mut [u8]) -> bool {
        // SAFETY: `to` has room for that many bytes.
        let error = unsafe {
            calls::kvm_vcpu_read_guest_atomic(
                self.as_ptr(),
                gpa,
                to.as_mut_ptr().cast::<c_void>(),
                to.len(),
            )
        };
        error == 0
    }

    /// The guest pages with entries of eight bytes.
    pub fn guest_pae(&self) -> bool {
        // SAFETY: the vCPU lives and is this thread's.
        unsafe { bindings::rmmu_guest_pae(self.as_ptr()) }
    }
}

/// The guest's memory, for walks of its tables, as long as the vCPU's thread stays in a section of SRCU.
pub struct VcpuMemory<'a> {
    vcpu: &'a Vcpu,
    /// The slot that was found last. The section keeps it.
    last: Cell<*const bindings::kvm_memory_slot>,
}

impl<'a> VcpuMemory<'a> {
    /// The memory that the vCPU sees.
    pub fn new(vcpu: &'a Vcpu) -> Self {
        VcpuMemory {
            vcpu,
            last: Cell::new(core::ptr::null()),
        }
    }

    /// The address of a guest physical address that an entry is at.
    #[inline]
    fn entry_at(&self, gpa: u64) -> Option<usize> {
        let page = self.page(Gfn(gpa >> PAGE_SHIFT))?;
        Some(page.hva | (gpa & ((1 << PAGE_SHIFT) - 1)) as usize)
    }
}

/// A page of guest memory, mapped into the process.
#[derive(Clone, Copy)]
pub struct GuestPage {
    hva: usize,
    gfn: Gfn,
    writable: bool,
}

impl GuestMemory for VcpuMemory<'_> {
    type Page = GuestPage;

    fn page(&self, table: Gfn) -> Option<GuestPage> {
        let mut writable = false;
        // SAFETY: the vCPU's thread is in an SRCU section; the out-pointer is ours.
        let hva = unsafe {
            bindings::rmmu_guest_page(
                self.vcpu.as_ptr(),
                self.last.as_ptr(),
                table.0,
                &mut writable,
            )
        };
        (hva != 0).then_some(GuestPage {
            hva: hva as usize,
            gfn: table,
            writable,
        })
    }

    fn is_writable(&self, page: GuestPage) -> bool {
        page.writable
    }

    fn read(&self, page: GuestPage, offset: u16, width: Width) -> Option<u64> {
        let mut entry = 0;
        // SAFETY: an access to user memory that is checked, by the process whose memory it is.
        let read = unsafe {
            bindings::rmmu_read_entry(
                page.hva.wrapping_add(offset.into()),
                width.bytes().into(),
                &mut entry,
            )
        };
        read.then_some(entry)
    }

    fn compare_exchange(
        &self,
        page: GuestPage,
        offset: u16,
        width: Width,
        old: u64,
        new: u64,
    ) -> Exchange {
        // SAFETY: as for `read`.
        let result = unsafe {
            bindings::rmmu_cmpxchg_entry(
                page.hva.wrapping_add(offset.into()),
                width.bytes().into(),
                old,
                new,
            )
        };
        match result {
            0 => {
                // SAFETY: the vCPU's thread is in an SRCU section.
                unsafe { calls::kvm_vcpu_mark_page_dirty(self.vcpu.as_ptr(), page.gfn.0) };
                Exchange::Done
            }
            1 => Exchange::Changed,
            _ => Exchange::Unreachable,
        }
    }

    fn read_now(&self, gpa: u64, width: Width) -> Option<u64> {
        let hva = self.entry_at(gpa)?;
        let mut entry = 0;
        // SAFETY: an access to user memory that is checked and does not sleep.
        let read = unsafe { bindings::rmmu_read_entry_now(hva, width.bytes().into(), &mut entry) };
        read.then_some(entry)
    }

    fn read_group_now(&self, gpa: u64, width: Width, group: &mut [u64; GROUP_ENTRIES]) -> bool {
        let Some(hva) = self.entry_at(gpa) else {
            return false;
        };
        // SAFETY: as for `read_now`; the group has room for that many entries.
        unsafe {
            bindings::rmmu_read_entries_now(
                hva,
                width.bytes().into(),
                GROUP_ENTRIES as u32,
                group.as_mut_ptr(),
            )
        }
    }

    fn log_dirty(&self, address: u64) -> bool {
        // SAFETY: the vCPU is loaded by this thread.
        unsafe { bindings::rmmu_log_nested_dirty(self.vcpu.as_ptr(), address) }
    }

    #[inline(always)]
    fn trace(&self, event: WalkEvent) {
        trace::walk(event);
    }
}

/// The entry of the guest's that an emulated write changed, after the write: its place, its size, and what is there.
pub struct WrittenEntry {
    /// Where it is.
    pub gpa: u64,
    /// Its size.
    pub bytes: usize,
    /// It is not zero.
    pub nonzero: bool,
}

impl WrittenEntry {
    /// Reads the entry that a write of `bytes` bytes at `gpa` changed.
    pub fn read(vcpu: &Vcpu, gpa: u64, bytes: usize) -> WrittenEntry {
        let mut written = WrittenEntry {
            gpa,
            bytes,
            nonzero: false,
        };
        // A guest with entries of eight bytes may write their halves.
        if bytes == 4 && vcpu.guest_pae() {
            written.gpa = gpa & !7;
            written.bytes = 8;
        }
        let mut entry = [0; 8];
        if matches!(written.bytes, 4 | 8) {
            if let Some(entry) = entry.get_mut(..written.bytes) {
                written.nonzero =
                    vcpu.read_now(written.gpa, entry) && entry.iter().any(|byte| *byte != 0);
            }
        }
        written
    }
}

/// The frame a root register, or a page-directory pointer, points to.
pub fn table_gfn(pointer: u64) -> Gfn {
    const ADDRESS: u64 = (1 << 52) - 1;
    Gfn((pointer & ADDRESS) >> PAGE_SHIFT)
}
