// SPDX-License-Identifier: GPL-2.0
/*
 * Translations that a CPU keeps when it leaves its guest, as processors do. Bochs forgets all of them at each VM entry and
 * VM exit, which hides every flush that KVM leaves out. Included by Bochs's paging.cc, and in use when the variable
 * RMMU_KEEP_TRANSLATIONS is set.
 *
 * There are three caches for each CPU, all of which a guest's access looks at after Bochs's own TLB, and all of which hold
 * only what a walk has found and done, so that an access which would set another accessed or dirty bit walks again:
 *
 * - combined: a linear address to a host's page, by VPID and by the root of EPT (0 without EPT);
 * - frames: a guest's page to a host's page, by the root of EPT;
 * - tables: 2 MiB of a guest to the EPT table that maps them, by the root of EPT.
 *
 * What drops them is what the Software Developer's Manual says does, volume 3, "Invalidating Cached Translation
 * Information": INVEPT, INVVPID, a fault or violation of that address, and what the guest does itself to its TLB.
 */

struct CombinedMapping {
  bx_address page, mask;
  Bit64u root, mode;
  bx_phy_address frame;
  Bit32u vpid, access, pkey;
  Bit32u done;	/* the accesses that a walk has done; none in an empty entry */
};

struct FrameMapping {
  bx_phy_address page, frame;
  Bit64u root;
  Bit32u done;
};

struct TableMapping {
  bx_phy_address region, table;
  Bit64u root;
  Bit32u access;
  bool valid;
};

enum { RETAINED = 4096, RETAINED_TABLES = 512, RETAINED_CPUS = 8 };

static CombinedMapping combined_mappings[RETAINED_CPUS][RETAINED];
static FrameMapping frame_mappings[RETAINED_CPUS][RETAINED];
static TableMapping table_mappings[RETAINED_CPUS][RETAINED_TABLES];

static bool retaining(void)
{
  static const bool on = getenv("RMMU_KEEP_TRANSLATIONS") != NULL;
  return on;
}

#define RETAINED_ROOT(eptp) ((eptp) & BX_CONST64(0x000ffffffffff000))

static unsigned retained_slot(Bit64u number, Bit64u root, Bit32u vpid)
{
  return unsigned((number ^ (root >> 12) * 31 ^ vpid * 97) % RETAINED);
}

/* Combined mappings */

/* The kind of an access as a bit of `done`. */
static Bit32u retained_kind(unsigned user, unsigned rw)
{
  return (rw == BX_EXECUTE ? 0x10 : (rw & 1) ? 0x4 : 0x1) << user;
}

#define RETAINED_VPID \
  (BX_CPU_THIS_PTR in_vmx_guest && BX_CPU_THIS_PTR vmcs.vmexec_ctrls2.VPID_ENABLE() ? BX_CPU_THIS_PTR vmcs.vpid : 0)
#define RETAINED_GUEST_ROOT \
  (BX_CPU_THIS_PTR vmcs.vmexec_ctrls2.EPT_ENABLE() ? RETAINED_ROOT(BX_CPU_THIS_PTR vmcs.eptptr) : 0)
/* What else decides how an entry is understood: registers that KVM may change between exit and entry, and the PCID. */
#define RETAINED_MODE \
  (Bit64u(BX_CPU_THIS_PTR cr4.get32()) << 32 | (BX_CPU_THIS_PTR cr0.get32() & 0x80010001) | \
   (BX_CPU_THIS_PTR efer.get32() & 0xd00) | \
   (BX_CPU_THIS_PTR cr4.get_PCIDE() ? Bit32u(BX_CPU_THIS_PTR cr3 & 0xfff) << 17 : 0))

/* Bits of the page walk's result, see IS_USER_PAGE() in Bochs. */
enum { RETAINED_USER = 0x4, RETAINED_GLOBAL = 0x100 };

static CombinedMapping *retained_combined(unsigned cpu, Bit32u vpid, Bit64u root, Bit64u mode, bx_address laddr)
{
  CombinedMapping *entry = &combined_mappings[cpu][retained_slot(laddr >> 12, root, vpid)];

  return entry->done && entry->page == (laddr >> 12) && entry->root == root && entry->vpid == vpid &&
         entry->mode == mode ? entry : NULL;
}

static void retain_combined(unsigned cpu, Bit32u vpid, Bit64u root, Bit64u mode, bx_address laddr, const CombinedMapping &found)
{
  CombinedMapping *entry = &combined_mappings[cpu][retained_slot(laddr >> 12, root, vpid)];
  Bit32u done = found.done;

  if (retained_combined(cpu, vpid, root, mode, laddr) && entry->frame == found.frame && entry->access == found.access &&
      entry->mask == found.mask && entry->pkey == found.pkey)
    done |= entry->done;
  *entry = found;
  entry->page = laddr >> 12;
  entry->root = root;
  entry->vpid = vpid;
  entry->mode = mode;
  entry->done = done;
}

/* Of a VPID (all but 0 without one), of an address if there is one. */
static void retained_drop_linear(unsigned cpu, Bit32u vpid, bool any_vpid, const bx_address *laddr, bool global)
{
  for (unsigned i = 0; i < RETAINED; i++) {
    CombinedMapping *entry = &combined_mappings[cpu][i];

    if ((any_vpid || entry->vpid == vpid) && (global || !(entry->access & RETAINED_GLOBAL)) &&
        (!laddr || ((*laddr ^ entry->page << 12) & ~entry->mask) == 0))
      entry->done = 0;
  }
}

/* Guest-physical mappings */

static FrameMapping *retained_frame(unsigned cpu, Bit64u root, bx_phy_address gpa)
{
  FrameMapping *entry = &frame_mappings[cpu][retained_slot(gpa >> 12, root, 0)];

  return entry->done && entry->page == gpa >> 12 && entry->root == root ? entry : NULL;
}

static void retain_frame(unsigned cpu, Bit64u root, bx_phy_address gpa, bx_phy_address frame, Bit32u done)
{
  FrameMapping *entry = &frame_mappings[cpu][retained_slot(gpa >> 12, root, 0)];

  if (retained_frame(cpu, root, gpa) && entry->frame == frame)
    done |= entry->done;
  entry->page = gpa >> 12;
  entry->root = root;
  entry->frame = frame;
  entry->done = done;
}

static TableMapping *retained_table_slot(unsigned cpu, Bit64u root, bx_phy_address gpa)
{
  return &table_mappings[cpu][((gpa >> 21) ^ (root >> 12) * 31) % RETAINED_TABLES];
}

static TableMapping *retained_table(unsigned cpu, Bit64u root, bx_phy_address gpa)
{
  TableMapping *entry = retained_table_slot(cpu, root, gpa);

  return entry->valid && entry->region == gpa >> 21 && entry->root == root ? entry : NULL;
}

static void retain_table(unsigned cpu, Bit64u root, bx_phy_address gpa, bx_phy_address table, Bit32u access)
{
  TableMapping *entry = retained_table_slot(cpu, root, gpa);

  entry->region = gpa >> 21;
  entry->root = root;
  entry->table = table;
  entry->access = access;
  entry->valid = true;
}

/* After a violation: what would translate that address. */
static void retained_drop_gpa(unsigned cpu, Bit64u root, bx_phy_address gpa)
{
  FrameMapping *frame = retained_frame(cpu, root, gpa);
  TableMapping *table = retained_table(cpu, root, gpa);

  if (frame)
    frame->done = 0;
  if (table)
    table->valid = false;
}

/* For Bochs's INVEPT and INVVPID. A root of 0 means all. */

void retained_invept(unsigned cpu, Bit64u eptp)
{
  Bit64u root = RETAINED_ROOT(eptp);

  for (unsigned i = 0; i < RETAINED; i++) {
    if (combined_mappings[cpu][i].root && (!root || combined_mappings[cpu][i].root == root))
      combined_mappings[cpu][i].done = 0;
    if (!root || frame_mappings[cpu][i].root == root)
      frame_mappings[cpu][i].done = 0;
  }
  for (unsigned i = 0; i < RETAINED_TABLES; i++)
    if (!root || table_mappings[cpu][i].root == root)
      table_mappings[cpu][i].valid = false;
}

void retained_invvpid(unsigned cpu, Bit32u vpid, bool all, const bx_address *laddr, bool global)
{
  retained_drop_linear(cpu, vpid, all, laddr, global);
}
