# SPDX-License-Identifier: GPL-2.0
"""Bochs, which emulates a CPU with VMX, for the modes in which KVM is kvm_intel.

It is built from Debian's source, with what the test VM uses and nothing else, and with small edits: see FAULTS. It runs
from the command line, has no display, and its firmware is ours (scripts/vmx/firmware.S).
"""

import shutil

import buildroot
import cache
import emulator
import ui
from emulator import Fault

PACKAGE = "bochs"
# The version whose source the edits are for.
VERSION = "3.0+dfsg-1"
NAME = "bochs"
FIRMWARE = "firmware.bin"
FIRMWARE_SOURCE = buildroot.PROJECT / "scripts/vmx/firmware.S"
RETAINED_SOURCE = buildroot.PROJECT / "scripts/vmx/retained.h"
# With this variable Bochs keeps translations over VM exits, see RETAINED_SOURCE.
KEEP_TRANSLATIONS = "RMMU_KEEP_TRANSLATIONS"
GIGABYTES = 2

FAULTS = [
    Fault(
        "A RAM image is read to consecutive addresses of the host, and only its first block becomes memory of the "
        "machine.",
        "memory/misc_mem.cc",
        "    ret = read(fd, (bx_ptr_t) BX_MEM_THIS get_vector(offset), size);\n",
        "    unsigned long room = BX_MEM_THIS block_size - offset % BX_MEM_THIS block_size;\n"
        "    ret = read(fd, (bx_ptr_t) BX_MEM_THIS get_vector(offset), size < room ? size : room);\n",
    ),
    Fault(
        "A byte on the serial line takes its time. The console's text alone would take seconds of each boot.",
        "iodev/serial.cc",
        "        BX_SER_THIS s[port].databyte_usec = (Bit32u)(1000000.0 / BX_SER_THIS s[port].baudrate *\n"
        "                                                     (BX_SER_THIS s[port].line_cntl.wordlen_sel + 7));\n",
        "        BX_SER_THIS s[port].databyte_usec = 2;\n",
    ),
    Fault(
        "With that a port without input would be asked for some each 2 us.",
        "iodev/serial.cc",
        "      if (!BX_SER_THIS s[port].fifo_cntl.enable) {\n"
        "        db_usec = 100000; // Poll frequency is 100ms\n"
        "      }\n",
        "      db_usec = BX_SER_THIS s[port].line_status.rxdata_ready ? 100 : 1000;\n",
    ),
    Fault(
        "VM entry decides which events are masked while the CPU is not in the guest yet. In a guest that has interrupts "
        "off, external interrupts do not exit then.",
        "cpu/vmx.cc",
        "  BX_CPU_THIS_PTR in_vmx_guest = true;\n",
        "  BX_CPU_THIS_PTR in_vmx_guest = true;\n  handleInterruptMaskChange();\n",
    ),
    Fault(
        "With accessed and dirty bits of EPT off, the CPU sets those in a guest's entry where EPT allows no write. "
        "Here: which entries of the guest are walked.",
        "cpu/paging.cc",
        "        entry_addr[leaf] = translate_guest_physical(entry_addr[leaf], laddr, true",
        "        walked_address = laddr, walked_entry[leaf] = entry_addr[leaf],\n"
        "        entry_addr[leaf] = translate_guest_physical(entry_addr[leaf], laddr, true",
        count=3,
    ),
    Fault(
        "The same: where they are remembered, and the write.",
        "cpu/paging.cc",
        "void BX_CPU_C::TLB_flush(void)\n",
        "static bx_address walked_address;\n"
        "static bx_phy_address walked_entry[5];\n"
        "#define MAY_WRITE_ENTRY(level) \\\n"
        "  if (BX_CPU_THIS_PTR in_vmx_guest && BX_CPU_THIS_PTR vmcs.vmexec_ctrls2.EPT_ENABLE() && \\\n"
        "      !(BX_CPU_THIS_PTR vmcs.eptptr & 0x40)) \\\n"
        "    translate_guest_physical(walked_entry[level], walked_address, true, true, 0, 0, 0, BX_WRITE)\n\n"
        "void BX_CPU_C::TLB_flush(void)\n",
    ),
    Fault(
        "The same: entries that lead to tables.",
        "cpu/paging.cc",
        "    if (!(entry[level] & 0x20)) {\n      entry[level] |= 0x20;\n",
        "    if (!(entry[level] & 0x20)) {\n      MAY_WRITE_ENTRY(level);\n      entry[level] |= 0x20;\n",
    ),
    Fault(
        "The same: entries that lead to tables of 32-bit paging.",
        "cpu/paging.cc",
        "    if (!(entry[BX_LEVEL_PDE] & 0x20)) {\n",
        "    if (!(entry[BX_LEVEL_PDE] & 0x20)) {\n      MAY_WRITE_ENTRY(BX_LEVEL_PDE);\n",
    ),
    Fault(
        "The same: entries that lead to pages.",
        "cpu/paging.cc",
        "  if (!(entry[leaf] & 0x20) || set_dirty) {\n",
        "  if (!(entry[leaf] & 0x20) || set_dirty) {\n    MAY_WRITE_ENTRY(leaf);\n",
        count=2,
    ),
    Fault(
        "VM entry refuses a posted-interrupt descriptor that is not at the beginning of a page; it only has to be aligned "
        "to 64 bytes. With that no guest enters whose APIC is in the kernel.",
        "cpu/vmx.cc",
        "      if (! IsValidPageAlignedPhyAddr(vm->pid_addr)) {\n",
        "      if (! IsValidPhyAddr(vm->pid_addr) || (vm->pid_addr & 0x3f)) {\n",
    ),
    Fault(
        "With several CPUs nobody notes where a CPU goes on when it has delivered an exception. If the guest exits before "
        "the handler's first instruction, it is back at the instruction that caused the exception, with the handler's "
        "rights and stack.",
        "cpu/cpu.cc",
        "void BX_CPU_C::cpu_run_trace(void)\n{\n",
        "void BX_CPU_C::cpu_run_trace(void)\n{\n  BX_CPU_THIS_PTR prev_rip = RIP;\n\n",
    ),
]

# Not a fault, but what Bochs is too kind to do: see RETAINED_SOURCE.
_KEEP = "Translations are kept over VM exits: "
KEEPING = [
    Fault(_KEEP + "the caches.", "cpu/paging.cc", '#include "cpustats.h"\n', '#include "cpustats.h"\n#include "retained.h"\n'),
    Fault(
        _KEEP + "what a guest does to its TLB.",
        "cpu/paging.cc",
        "  INC_TLBFLUSH_STAT(tlbGlobalFlushes);\n",
        "  if (retaining() && RETAINED_VPID) retained_drop_linear(BX_CPU_ID, RETAINED_VPID, false, NULL, true);\n",
    ),
    Fault(
        _KEEP + "the same without global pages.",
        "cpu/paging.cc",
        "  INC_TLBFLUSH_STAT(tlbNonGlobalFlushes);\n",
        "  if (retaining() && RETAINED_VPID) retained_drop_linear(BX_CPU_ID, RETAINED_VPID, false, NULL, false);\n",
    ),
    Fault(
        _KEEP + "one address.",
        "cpu/paging.cc",
        '  BX_DEBUG(("TLB_invlpg(0x" FMT_ADDRX "): invalidate TLB entry", laddr));\n',
        "  if (retaining() && RETAINED_VPID) retained_drop_linear(BX_CPU_ID, RETAINED_VPID, false, &laddr, true);\n",
    ),
    Fault(
        _KEEP + "a page fault drops what there is of its address.",
        "cpu/paging.cc",
        "  Bit32u error_code = fault | (user << 2) | (isWrite << 1);\n",
        "  if (retaining() && RETAINED_VPID) retained_drop_linear(BX_CPU_ID, RETAINED_VPID, false, &laddr, true);\n\n"
        "  Bit32u error_code = fault | (user << 2) | (isWrite << 1);\n",
    ),
    Fault(
        _KEEP + "an access that finds a combined mapping does not walk.",
        "cpu/paging.cc",
        "  if(BX_CPU_THIS_PTR cr0.get_PG())\n  {\n    BX_DEBUG((\"page walk for%s",
        "  const CombinedMapping *kept = NULL;\n"
        "  if (retaining() && RETAINED_VPID && !(rw & 4)) {\n"
        "    kept = retained_combined(BX_CPU_ID, RETAINED_VPID, RETAINED_GUEST_ROOT, RETAINED_MODE, laddr);\n"
        "    // What depends on more than the entry is left to the walk.\n"
        "    if (kept && (!(kept->done & retained_kind(user, rw)) ||\n"
        "        (!isExecute && !user && BX_CPU_THIS_PTR cr4.get_SMAP() && (kept->access & RETAINED_USER)) ||\n"
        "        (!isExecute && !((1 << ((isWrite << 1) | user)) &\n"
        "          (isWrite ? BX_CPU_THIS_PTR wr_pkey[kept->pkey] : BX_CPU_THIS_PTR rd_pkey[kept->pkey])))))\n"
        "      kept = NULL;\n"
        "  }\n"
        "  if (kept) {\n"
        "    paddress = kept->frame | poffset;\n"
        "    lpf_mask = Bit32u(kept->mask);\n"
        "    combined_access = kept->access;\n"
        "    pkey = kept->pkey;\n"
        "    if (lpf_mask > 0xfff) {\n"
        "      if (isExecute)\n"
        "        BX_CPU_THIS_PTR ITLB.split_large = true;\n"
        "      else\n"
        "        BX_CPU_THIS_PTR DTLB.split_large = true;\n"
        "    }\n"
        "  }\n"
        "  else\n"
        "  if(BX_CPU_THIS_PTR cr0.get_PG())\n  {\n    BX_DEBUG((\"page walk for%s",
    ),
    Fault(
        _KEEP + "nor does it walk EPT's tables.",
        "cpu/paging.cc",
        "  bool spp_page = false;\n  if (BX_CPU_THIS_PTR in_vmx_guest) {\n",
        "  bool spp_page = false;\n  if (BX_CPU_THIS_PTR in_vmx_guest && !kept) {\n",
    ),
    Fault(
        _KEEP + "what a walk has found is kept.",
        "cpu/paging.cc",
        "  ppf = PPFOf(paddress);\n\n  // direct memory access is NOT allowed by default\n",
        "  ppf = PPFOf(paddress);\n"
        "  if (retaining() && RETAINED_VPID && !kept && !(rw & 4) && !spp_page) {\n"
        "    CombinedMapping found = CombinedMapping();\n"
        "    found.frame = ppf;\n"
        "    found.mask = lpf_mask;\n"
        "    found.access = combined_access;\n"
        "    found.pkey = pkey;\n"
        "    found.done = retained_kind(user, rw);\n"
        "    retain_combined(BX_CPU_ID, RETAINED_VPID, RETAINED_GUEST_ROOT, RETAINED_MODE, laddr, found);\n"
        "  }\n\n"
        "  // direct memory access is NOT allowed by default\n",
    ),
    Fault(
        _KEEP + "a walk of EPT's tables finds a page, or begins with the last table.",
        "cpu/paging.cc",
        "  Bit32u vmexit_reason = 0;\n\n  for (leaf = BX_LEVEL_PML4;; --leaf) {\n",
        "  Bit32u vmexit_reason = 0, table_access = 0;\n"
        "  bool keeps = retaining() && !vm->vmexec_ctrls2.MBE_CTRL() && !supervisor_shadow_stack;\n"
        "  Bit64u kept_root = RETAINED_ROOT(vm->eptptr);\n"
        "  leaf = BX_LEVEL_PML4;\n"
        "  if (keeps) {\n"
        "    const FrameMapping *frame = retained_frame(BX_CPU_ID, kept_root, guest_paddr);\n"
        "    if (frame && (frame->done & access_mask) == access_mask)\n"
        "      return frame->frame | PAGE_OFFSET(guest_paddr);\n"
        "    const TableMapping *table = retained_table(BX_CPU_ID, kept_root, guest_paddr);\n"
        "    if (table) {\n"
        "      ppf = table->table;\n"
        "      combined_access = table_access = table->access;\n"
        "      offset_mask >>= 27;\n"
        "      // The entries above it have their accessed bits.\n"
        "      for (; leaf > BX_LEVEL_PTE; --leaf) {\n"
        "        entry_addr[leaf] = 0;\n"
        "        entry[leaf] = 0x100;\n"
        "      }\n"
        "    }\n"
        "  }\n\n"
        "  for (;; --leaf) {\n",
    ),
    Fault(
        _KEEP + "which table is the last.",
        "cpu/paging.cc",
        "    combined_access &= curr_access_mask;\n  }\n",
        "    combined_access &= curr_access_mask;\n    table_access = combined_access;\n  }\n",
    ),
    Fault(
        _KEEP + "a violation drops what there is of its address.",
        "cpu/paging.cc",
        '  if (vmexit_reason) {\n    BX_ERROR(("VMEXIT: EPT %s',
        "  if (vmexit_reason && retaining()) {\n"
        "    retained_drop_gpa(BX_CPU_ID, kept_root, guest_paddr);\n"
        "    if (guest_laddr_valid && RETAINED_VPID)\n"
        "      retained_drop_linear(BX_CPU_ID, RETAINED_VPID, false, &guest_laddr, true);\n"
        "  }\n"
        '  if (vmexit_reason) {\n    BX_ERROR(("VMEXIT: EPT %s',
    ),
    Fault(
        _KEEP + "what a walk of EPT's tables has found is kept.",
        "cpu/paging.cc",
        "  if (BX_VMX_EPT_ACCESS_DIRTY_ENABLED) {\n    // write access and Dirty-bit is not set in the leaf entry\n",
        "  if (keeps && !(spp_page && *spp_page)) {\n"
        "    retain_frame(BX_CPU_ID, kept_root, guest_paddr, PPFOf(ppf), access_mask);\n"
        "    if (leaf == BX_LEVEL_PTE)\n"
        "      retain_table(BX_CPU_ID, kept_root, guest_paddr, LPFOf(entry_addr[leaf]), table_access);\n"
        "  }\n\n"
        "  if (BX_VMX_EPT_ACCESS_DIRTY_ENABLED) {\n    // write access and Dirty-bit is not set in the leaf entry\n",
    ),
    Fault(
        _KEEP + "INVEPT of a root.",
        "cpu/vmx.cc",
        "     TLB_flush(); // Invalidate mappings associated with EPTP[51:12]\n",
        "     TLB_flush(); // Invalidate mappings associated with EPTP[51:12]\n"
        "     retained_invept(BX_CPU_ID, inv_eptp.xmm64u(0));\n",
    ),
    Fault(
        _KEEP + "INVEPT of all roots.",
        "cpu/vmx.cc",
        "     TLB_flush(); // Invalidate mappings associated with all EPTPs\n",
        "     TLB_flush(); // Invalidate mappings associated with all EPTPs\n     retained_invept(BX_CPU_ID, 0);\n",
    ),
    Fault(
        _KEEP + "INVVPID of an address.",
        "cpu/vmx.cc",
        "    TLB_flush(); // invalidate all mappings for address LADDR tagged with VPID\n",
        "    TLB_flush(); // invalidate all mappings for address LADDR tagged with VPID\n"
        "    kept_address = invvpid_desc.xmm64u(1);\n"
        "    retained_invvpid(BX_CPU_ID, vpid, false, &kept_address, true);\n",
    ),
    Fault(
        _KEEP + "INVVPID of a VPID.",
        "cpu/vmx.cc",
        "    TLB_flush(); // invalidate all mappings tagged with VPID\n",
        "    TLB_flush(); // invalidate all mappings tagged with VPID\n"
        "    retained_invvpid(BX_CPU_ID, vpid, false, NULL, true);\n",
    ),
    Fault(
        _KEEP + "INVVPID of all.",
        "cpu/vmx.cc",
        "    TLB_flush(); // invalidate all mappings tagged with VPID <> 0\n",
        "    TLB_flush(); // invalidate all mappings tagged with VPID <> 0\n"
        "    retained_invvpid(BX_CPU_ID, 0, true, NULL, true);\n",
    ),
    Fault(
        _KEEP + "INVVPID of a VPID without global pages.",
        "cpu/vmx.cc",
        "    TLB_flushNonGlobal(); // invalidate all mappings tagged with VPID except globals\n",
        "    TLB_flushNonGlobal(); // invalidate all mappings tagged with VPID except globals\n"
        "    retained_invvpid(BX_CPU_ID, vpid, false, NULL, false);\n",
    ),
    Fault(
        _KEEP + "declarations for these.",
        "cpu/vmx.cc",
        "  Bit16u vpid = invvpid_desc.xmm16u(0);\n",
        "  bx_address kept_address;\n  Bit16u vpid = invvpid_desc.xmm16u(0);\n",
    ),
    Fault(
        _KEEP + "and for those before.",
        "cpu/vmx.cc",
        "void BX_CPP_AttrRegparmN(1) BX_CPU_C::INVEPT(bxInstruction_c *i)\n",
        "void retained_invept(unsigned cpu, Bit64u eptp);\n"
        "void retained_invvpid(unsigned cpu, Bit32u vpid, bool all, const bx_address *laddr, bool global);\n\n"
        "void BX_CPP_AttrRegparmN(1) BX_CPU_C::INVEPT(bxInstruction_c *i)\n",
    ),
]

BUILD_PACKAGES = ["bzip2", "g++", "gcc", "libc6-dev", "make", "xz-utils"]

# Its 128-bit division reads through pointers of another type than what they point to. The compiler may take it that
# nobody does so, and divides wrongly.
FLAGS = "-O2 -fno-strict-aliasing"
CONFIGURE = ["--with-nogui", "--enable-smp", "--enable-x86-64", "--enable-vmx=2", "--enable-protection-keys",
             "--enable-avx", "--enable-evex", "--enable-all-optimizations", "--enable-large-ramfile",
             "--enable-long-phy-address", "--disable-logging", "--disable-debugger", "--disable-docbook",
             "--disable-xpm", "--disable-plugins", "--disable-cdrom", f"CFLAGS={FLAGS}", f"CXXFLAGS={FLAGS}"]


def ensure(root):
    """The directory with NAME and FIRMWARE, made if need be; it runs with the libraries of the build root."""
    recipe = [[fault.file, fault.old, fault.new, fault.count] for fault in FAULTS + KEEPING]
    return cache.keyed("bochs", VERSION, recipe, CONFIGURE, cache.file_key(FIRMWARE_SOURCE, RETAINED_SOURCE), root.is_host,
                       build=_build)


def _build(directory):
    cache.require_space(GIGABYTES, "building Bochs")
    source = directory / "source"
    with ui.step("Bochs: fetching Debian's source", log=cache.log_path("bochs")) as step:
        found = emulator.unpack_source(PACKAGE, VERSION, directory / "archive", source, step)
    root = buildroot.make_for(BUILD_PACKAGES, directory / "rootfs", "Bochs's build", cache.log_path("bochs-root"))
    emulator.mend(f"Bochs {found}", FAULTS + KEEPING, source, __file__)
    shutil.copy2(RETAINED_SOURCE, source / "cpu" / RETAINED_SOURCE.name)
    with ui.step("Bochs: building it, for modes with VMX (3 to 10 minutes)", log=cache.log_path("bochs-build")) as step:
        root.run(["./configure", *CONFIGURE], cwd=source, log=step)
        root.run(["make", "-j", ui.jobs(), NAME], cwd=source, log=step)
        root.run(["strip", source / NAME], log=step)
        root.run(["gcc", "-c", "-o", directory / "firmware.o", FIRMWARE_SOURCE], log=step)
        root.run(["objcopy", "-O", "binary", "-j", ".text", directory / "firmware.o", directory / FIRMWARE], log=step)
    shutil.copy2(source / NAME, directory / NAME)
    (directory / "version").write_text(f"{found}\n")
    for path in (source, directory / "archive", directory / "rootfs", directory / "firmware.o"):
        cache.remove_tree(path)
