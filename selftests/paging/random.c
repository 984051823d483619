// SPDX-License-Identifier: GPL-2.0
/* Ops at random: chosen with the model at hand, carried out by the guest, and then checked. */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include "audit.h"
#include "host.h"
#include "paging.h"

#define ROOTS	3

/* What is expected of an op. */
struct expected {
	struct outcomes outcomes;
	bool is_access;		/* through the random tables; else it can not fail */
	bool is_load;		/* of this value */
	uint64_t value;
};

/* What the host does between batches. */
enum meddling { QUOTA, SLOTS, LOG, PROTECT, COLLAPSE, REGISTERS, MEDDLINGS };

static const char *const meddlings[] = {
	"quota", "slots renewed", "dirty log", "protected", "collapsed", "registers set",
};

struct counts {
	uint64_t accesses, fine, absent, reserved, forbidden, several, fresh, wrong;
	uint64_t shared, swapped, recursive;
	uint64_t kept, invpcid[INVPCID_TYPES];
	uint64_t meddled[MEDDLINGS];
};

struct run {
	struct machine *machine;
	const struct mode *mode;
	const struct options *options;
	struct model model;
	struct expected *expected;
	struct counts counts;
	uint64_t state, tokens, done;
	uint64_t recent[16];
	int count;		/* ops in the batch */
	bool unclear;		/* what the last op stored has to be found out */
	unsigned int meddlings;
	bool small_quota, log, has_nx, changes_nx;
};

static uint64_t next(struct run *run)
{
	uint64_t z = run->state += 0x9e3779b97f4a7c15;

	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
	z = (z ^ z >> 27) * 0x94d049bb133111eb;
	return z ^ z >> 31;
}

static uint64_t below(struct run *run, uint64_t end)
{
	return next(run) % end;
}

static bool percent(struct run *run, unsigned int n)
{
	return below(run, 100) < n;
}

/* Data that no entry looks like: it is not present. */
static uint64_t token(struct run *run)
{
	return (++run->tokens & 0x7fffff) << 8 | 1UL << 31;
}

static uint64_t random_frame(struct run *run)
{
	return frame_gpa(ZONE_FRAMES + below(run, 2 * ZONE_FRAMES));
}

/* A table for the level; now and then just any frame, which may hold data or another level. */
static uint64_t random_table(struct run *run, int level)
{
	if (percent(run, 12))
		return random_frame(run);
	if (level == run->mode->levels && run->mode->paging != PAE)
		return ZONE_B + below(run, ROOTS) * PAGE_SIZE;
	switch (level) {
	case 1:
		return ZONE_C + (2 + below(run, 6)) * PAGE_SIZE;
	case 2:
		return ZONE_B + (3 + below(run, 4)) * PAGE_SIZE;
	case 3:
		return ZONE_B + (7 + below(run, 3)) * PAGE_SIZE;
	default:
		return ZONE_B + (10 + below(run, 3)) * PAGE_SIZE;
	}
}

/* A frame of data that has another address as well. */
static uint64_t shared_frame(struct run *run)
{
	return (percent(run, 50) ? ZONE_D : ZONE_E) + (2 + below(run, ZONE_FRAMES - 2)) * PAGE_SIZE;
}

/* Where a leaf of 4K leads. If it leads to a frame that has another address, mostly to that one. */
static uint64_t random_leaf(struct run *run, uint64_t gpa)
{
	uint64_t old;

	if (!run->options->meddle)
		return random_frame(run);
	old = model_load(&run->model, gpa) & 0xfffff000;
	if (old >= ZONE_D && old < ZONE_E + ZONE_FRAMES * PAGE_SIZE && percent(run, 60)) {
		run->counts.swapped++;
		return old ^ ZONE_D ^ ZONE_E;
	}
	return percent(run, 40) ? shared_frame(run) : random_frame(run);
}

/* The table itself, now and then. */
static uint64_t random_child(struct run *run, int level, uint64_t gpa)
{
	if (!run->options->meddle || gpa < ZONE_B || !percent(run, 6))
		return random_table(run, level);
	run->counts.recursive++;
	return gpa & ~(PAGE_SIZE - 1);
}

static uint64_t random_entry(struct run *run, int level, uint64_t gpa)
{
	const struct mode *mode = run->mode;
	bool leaf = level == 1 || (level == 2 && percent(run, 25)) ||
		    (level == 3 && run->machine->features.gigabyte && percent(run, 10));
	bool in_root = gpa >= ZONE_B && gpa < ZONE_B + ROOTS * PAGE_SIZE;
	int bits = run->machine->features.physical_bits;
	uint64_t entry = 0;

	if (percent(run, 95))
		entry |= PTE_P;
	if (percent(run, 82))
		entry |= PTE_W;
	if (percent(run, 78))
		entry |= PTE_U;
	entry |= next(run) & PTE_AD;
	if (mode->entry_bytes == 8 && run->has_nx && percent(run, 8))
		entry |= PTE_NX;
	/* In a root of four levels the bit is reserved, on some CPUs. */
	if (mode->global && leaf && percent(run, 15) && !(mode->levels > 3 && in_root))
		entry |= PTE_G;
	if (!leaf) {
		entry |= random_child(run, level - 1, gpa);
	} else if (level == 1) {
		entry |= random_leaf(run, gpa);
	} else {
		entry |= PTE_PS;
		if (level == 2)
			entry |= mode->entry_bytes == 8 && percent(run, 50) ? ZONE_C : ZONE_B;
		if (percent(run, 4))
			entry |= mode->entry_bytes == 8 ? 1UL << 13 : 1UL << 21;
	}
	if (mode->entry_bytes == 8 && percent(run, 3) && bits < 52)
		entry |= 1UL << (run->options->meddle && percent(run, 50) ? bits : 51);
	return entry;
}

static uint64_t random_page(struct run *run)
{
	uint64_t *recent = &run->recent[below(run, 16)];

	if (!*recent || percent(run, 25))
		*recent = va_of_page(run->mode, below(run, va_pages(run->mode)));
	return *recent;
}

/* A word of a frame that may be an entry, or is just data. Never one of the first two. */
static int random_word(struct run *run)
{
	int word = percent(run, 70) ? 2 + below(run, 14) : 100 + below(run, 4);

	return run->mode->entry_bytes == 4 && percent(run, 50) ? 512 + word : word;
}

static void issue(struct run *run, uint32_t kind, uint32_t flags, uint64_t addr, uint64_t value)
{
	memset(&run->expected[run->count], 0, sizeof(run->expected[0]));
	run->machine->ops[run->count++] = (struct op) {
		.kind = kind, .flags = flags, .addr = addr, .value = value, .error = NO_FAULT,
	};
}

/* Through the fixed mapping. */
static void store_fixed(struct run *run, uint64_t gpa, uint64_t value)
{
	bool wide = run->mode->entry_bytes == 8;

	issue(run, KIND_WRITE, wide ? FLAG_WIDE : 0, gpa, value);
	model_store(&run->model, gpa, value, run->mode->entry_bytes);
}

static void load_fixed(struct run *run)
{
	uint64_t gpa = random_frame(run) + random_word(run) * run->mode->entry_bytes;

	issue(run, KIND_READ, 0, gpa, 0);
	run->expected[run->count - 1].is_load = true;
	run->expected[run->count - 1].value = model_load(&run->model, gpa);
}

/* In the whole range that there is. */
static const uint64_t pcids[SPACES] = { 0, 5, 0xfff };

static void invpcid(struct run *run, uint64_t va)
{
	uint64_t type = below(run, INVPCID_TYPES);
	/* Mostly of the space that is in use. */
	int space = percent(run, 60) ? run->model.space - run->model.spaces : (int)below(run, SPACES);

	run->counts.invpcid[type]++;
	issue(run, KIND_INVPCID, 0, va, pcids[space] | type << INVPCID_TYPE_SHIFT);
	model_invpcid(&run->model, type, space, va);
}

static void invalidate(struct run *run, uint64_t va)
{
	if (run->mode->paging == NESTED) {
		issue(run, KIND_FLUSH, 0, 0, 0);
		model_flush(&run->model);
	} else if (run->machine->features.invpcid && percent(run, 40)) {
		invpcid(run, va);
	} else {
		issue(run, KIND_INVLPG, 0, va, 0);
		model_invlpg(&run->model, va);
	}
}

static void change_entry(struct run *run)
{
	uint64_t va = random_page(run);
	int level = percent(run, 50) ? 1 : 1 + below(run, run->mode->levels);
	uint64_t gpa = percent(run, 85) ? model_entry_gpa(&run->model, va, level) : 0;

	/* A frame that has two addresses is no table, even where an entry of another level leads to it. */
	if (!gpa || gpa >= ZONE_D)
		gpa = random_table(run, level) + va_index(run->mode, va, level) * run->mode->entry_bytes;
	store_fixed(run, gpa, random_entry(run, level, gpa));
	if (percent(run, run->options->invlpg_percent))
		invalidate(run, va);
}

static void load_root(struct run *run)
{
	uint64_t number = below(run, ROOTS);
	bool keep = false;
	int space = 0;
	uint64_t root = run->mode->paging == PAE ? PDPT_GPA + 32 * number : ZONE_B + number * PAGE_SIZE;

	if (run->mode->paging == NESTED) {
		issue(run, KIND_NCR3, 0, 0, root);
		model_set_root(&run->model, root, 0, false);
		model_flush(&run->model);
		return;
	}
	if (run->machine->features.pcid) {
		space = below(run, SPACES);
		keep = percent(run, 60);
		run->counts.kept += keep;
	}
	issue(run, KIND_CR3, 0, 0, root | pcids[space] | (keep ? CR3_KEEP : 0));
	run->expected[run->count - 1].is_load = true;
	run->expected[run->count - 1].value = root | pcids[space];
	model_set_root(&run->model, root, space, keep);
}

static void change_pointer(struct run *run)
{
	uint64_t gpa = PDPT_GPA + 32 * below(run, ROOTS) + 8 * (1 + below(run, 3));

	store_fixed(run, gpa, percent(run, 90) ? random_table(run, 2) | PTE_P : 0);
	if (percent(run, 60))
		load_root(run);
}

/* Everything is forgotten. */
static void flush(struct run *run)
{
	if (run->mode->paging == NESTED) {
		invalidate(run, 0);
		return;
	}
	load_root(run);
	if (!run->mode->global) {
		model_flush(&run->model);
		return;
	}
	run->machine->cr4 ^= CR4_PGE;
	issue(run, KIND_CR4, 0, 0, run->machine->cr4);
	model_set_cr4(&run->model, run->machine->cr4);
}

static void flip_nx(struct run *run)
{
	run->machine->efer ^= EFER_NX;
	run->model.features.nx = run->machine->efer & EFER_NX;
}

static void change_registers(struct run *run)
{
	struct machine *machine = run->machine;
	uint64_t cr4 = machine->cr4;

	if (run->changes_nx && percent(run, 10)) {
		flip_nx(run);
		issue(run, KIND_EFER, 0, 0, machine->efer);
		/* No manual says what becomes of translations made by the other rule. */
		flush(run);
		return;
	}
	if (percent(run, 40)) {
		machine->cr0 ^= CR0_WP;
		issue(run, KIND_CR0, 0, 0, machine->cr0);
		run->model.cr0 = machine->cr0;
		return;
	}
	/* Changing SMEP or PGE makes the CPU load the pointers of PAE. QEMU has marked them as accessed, which KVM
	 * takes for a reserved bit. */
	if (machine->features.smep && run->mode->paging != PAE && percent(run, 40))
		cr4 ^= CR4_SMEP;
	else if (machine->features.smap && percent(run, 60))
		cr4 ^= CR4_SMAP;
	else if (run->mode->global)
		cr4 ^= CR4_PGE;
	machine->cr4 = cr4;
	issue(run, KIND_CR4, 0, 0, cr4);
	model_set_cr4(&run->model, cr4);
}

/* What KVM does not see as a table under one address must not become one under the other. */
static bool may_be_shared(const struct outcomes *outcomes)
{
	for (int i = 0; i < outcomes->count; i++)
		if (outcomes->list[i].error == NO_FAULT && outcomes->list[i].gpa >= ZONE_D)
			return true;
	return false;
}

static uint64_t data_to_store(struct run *run)
{
	if (percent(run, 70))
		return token(run);
	/* Neither global nor large: it may land in any table. */
	return random_frame(run) | PTE_P | (next(run) & (PTE_W | PTE_U | PTE_AD));
}

static void access_page(struct run *run)
{
	uint32_t kind = percent(run, 50) ? KIND_READ : percent(run, 60) ? KIND_WRITE : KIND_EXEC;
	uint64_t va = random_page(run), value = 0;
	struct outcomes outcomes;
	uint32_t flags = 0;
	bool permission = true;

	if (run->mode->paging == NESTED)
		flags = FLAG_INNER;
	else if (percent(run, 50))
		flags = FLAG_USER;
	/*
	 * With CR0.WP clear, KVM's shadow MMU makes a read-only user page that the supervisor writes to the
	 * supervisor's own, and SMAP does not protect that: a write with AC set lets later ones without it pass.
	 */
	else if (percent(run, 25) && (kind != KIND_WRITE || run->model.cr0 & CR0_WP))
		flags = FLAG_AC;
	if (kind == KIND_EXEC)
		va += PAGE_SIZE - 8;
	else
		va += random_word(run) * run->mode->entry_bytes;
	model_access(&run->model, va, kind, flags, &outcomes);
	if (!outcomes.count)
		bail("the model has no outcome for va 0x%" PRIx64, va);
	if (outcomes.too_many) {
		flush(run);
		return;
	}
	if (kind == KIND_WRITE)
		value = outcomes.count > 1 || may_be_shared(&outcomes) ? token(run) : data_to_store(run);
	issue(run, kind, flags, va, value);
	run->expected[run->count - 1].is_access = true;
	run->expected[run->count - 1].outcomes = outcomes;
	run->counts.several += outcomes.count > 1;
	run->counts.shared += may_be_shared(&outcomes);
	run->counts.fresh += outcomes.fresh;
	if (outcomes.count == 1 && outcomes.list[0].error == NO_FAULT) {
		model_used(&run->model, va, kind, flags, &outcomes);
		if (kind == KIND_WRITE)
			model_store(&run->model, outcomes.list[0].gpa, value, run->mode->long_mode ? 8 : 4);
	}
	run->unclear = kind == KIND_WRITE && outcomes.count > 1;
	for (int i = 0; i < outcomes.count; i++)
		permission &= outcomes.list[i].error != NO_FAULT &&
			      (outcomes.list[i].error & (PF_P | PF_RSVD)) == PF_P;
	/* A fault for the lack of a permission makes the CPU forget the page, and KVM's shadow MMU too. QEMU does not. */
	if (permission && run->options->fault_forgets && run->mode->paging != NESTED)
		model_invlpg(&run->model, va);
}

static void choose(struct run *run)
{
	unsigned int dice = below(run, 100);

	run->model.now++;
	if (dice < 46)
		access_page(run);
	else if (dice < 72)
		change_entry(run);
	else if (dice < 80)
		invalidate(run, random_page(run));
	else if (dice < 84)
		load_root(run);
	else if (dice < 88)
		change_registers(run);
	else if (dice < 92)
		load_fixed(run);
	else if (dice < 97 || run->mode->paging != PAE)
		store_fixed(run, random_frame(run) + random_word(run) * run->mode->entry_bytes, token(run));
	else
		change_pointer(run);
}

static void describe(struct run *run, int i)
{
	static const char *const kinds[] = {
		"end", "read", "write", "exec", "invlpg", "cr3", "cr0", "cr4", "efer", "invpcid", "ncr3", "flush",
	};
	struct op *op = &run->machine->ops[i];

	note("op %d: %s flags %x addr 0x%" PRIx64 " value 0x%" PRIx64 " -> result 0x%" PRIx64 " error 0x%x", i,
	     kinds[op->kind], op->flags, op->addr, op->value, op->result, op->error);
}

/* The way as it is after the batch. */
static void describe_path(struct run *run, uint64_t va)
{
	for (int level = run->mode->levels; level > 0; level--) {
		uint64_t gpa = model_entry_gpa(&run->model, va, level), memory = 0;

		if (!gpa)
			return;
		memcpy(&memory, machine_memory(run->machine, gpa), run->mode->entry_bytes);
		note("level %d: the entry at gpa 0x%" PRIx64 " is 0x%" PRIx64 ", stored as 0x%" PRIx64, level, gpa,
		     memory, model_load(&run->model, gpa));
	}
}

static void report(struct run *run, int i)
{
	struct expected *expected = &run->expected[i];

	run->counts.wrong++;
	for (int j = i < 40 || run->options->verbose ? 0 : i - 40; j <= i; j++)
		describe(run, j);
	if (!expected->is_access)
		note("expected 0x%" PRIx64, expected->value);
	else
		describe_path(run, run->machine->ops[i].addr);
	for (int j = 0; j < expected->outcomes.count; j++) {
		struct outcome *outcome = &expected->outcomes.list[j];

		note("allowed: error 0x%x gpa 0x%" PRIx64 " value 0x%" PRIx64, outcome->error, outcome->gpa,
		     outcome->value);
	}
}

static bool is_outcome(struct run *run, const struct op *op, const struct outcome *outcome)
{
	uint64_t mask = run->mode->long_mode ? ~PTE_AD : (uint32_t)~PTE_AD;
	uint32_t error = op->error;

	/* QEMU forgets the present bit. */
	if (error != NO_FAULT && error & PF_RSVD && !run->options->reserved_is_present)
		error |= PF_P;
	if (error != outcome->error)
		return false;
	if (error != NO_FAULT)
		return op->result == op->addr;
	switch (op->kind) {
	case KIND_READ:
		return (op->result & mask) == (outcome->value & mask);
	case KIND_EXEC:
		return (uint32_t)op->result == frame_stub(outcome->gpa);
	default:
		return true;
	}
}

static void count_outcome(struct counts *counts, uint32_t error)
{
	counts->accesses++;
	if (error == NO_FAULT)
		counts->fine++;
	else if (error & PF_RSVD)
		counts->reserved++;
	else if (error & PF_P)
		counts->forbidden++;
	else
		counts->absent++;
}

static bool is_expected(struct run *run, int i)
{
	struct expected *expected = &run->expected[i];
	struct op *op = &run->machine->ops[i];
	uint64_t mask = run->mode->long_mode ? ~PTE_AD : (uint32_t)~PTE_AD;

	if (!expected->is_access)
		return op->error == NO_FAULT &&
		       (!expected->is_load || (op->result & mask) == (expected->value & mask));
	count_outcome(&run->counts, op->error);
	for (int j = 0; j < expected->outcomes.count; j++)
		if (is_outcome(run, op, &expected->outcomes.list[j]))
			return true;
	return false;
}

/* The last op stored something, and there was a choice of where: look. */
static bool find_store(struct run *run)
{
	struct expected *expected = &run->expected[run->count - 1];
	struct op *op = &run->machine->ops[run->count - 1];

	if (op->error != NO_FAULT)
		return true;
	for (int i = 0; i < expected->outcomes.count; i++) {
		struct outcome *outcome = &expected->outcomes.list[i];

		if (outcome->error != NO_FAULT ||
		    *(uint32_t *)machine_memory(run->machine, outcome->gpa) != (uint32_t)op->value)
			continue;
		model_store(&run->model, outcome->gpa, op->value, run->mode->long_mode ? 8 : 4);
		return true;
	}
	note("what was stored is in none of the places where it may be");
	return false;
}

/* EFER.NX, CR0.WP and bits of CR4. KVM lets the guest's CPU forget everything. */
static void set_registers(struct run *run)
{
	struct machine *machine = run->machine;
	struct model *model = &run->model;

	if (run->changes_nx && percent(run, 50))
		flip_nx(run);
	/* Of those that guests change only what the nested guest's tables do not care about is left. */
	if (run->mode->paging != NESTED) {
		machine->cr0 ^= percent(run, 50) ? CR0_WP : 0;
		machine->cr4 ^= machine->features.smep && percent(run, 30) ? CR4_SMEP : 0;
		machine->cr4 ^= machine->features.smap && percent(run, 30) ? CR4_SMAP : 0;
		machine->cr4 ^= run->mode->global && percent(run, 30) ? CR4_PGE : 0;
	}
	machine_set_registers(machine);
	model->cr0 = machine->cr0;
	model->cr4 = machine->cr4;
	if (run->mode->paging == NESTED)
		invalidate(run, 0);
	else
		model_flush(model);
}

/* While the guest does not run. It must not notice anything but the registers. */
static void meddle(struct run *run)
{
	/* Each comes up once at first. */
	enum meddling what = run->meddlings < MEDDLINGS ? run->meddlings : below(run, MEDDLINGS);
	struct machine *machine = run->machine;

	run->meddlings++;

	/* Processors load the pointers of PAE with them, in which QEMU has set bits that KVM takes for reserved ones. */
	if (what == REGISTERS && run->mode->paging == PAE)
		return;
	run->counts.meddled[what]++;
	switch (what) {
	case QUOTA:
		/* The smallest that there is. */
		run->small_quota = !run->small_quota;
		must(ioctl(machine->vm.fd, KVM_SET_NR_MMU_PAGES, run->small_quota ? 64 : 1000));
		break;
	case LOG:
		run->log = !run->log;
		/* fall through */
	case SLOTS:
		machine_renew_slots(machine, run->log);
		break;
	case PROTECT:
		must(mprotect(machine->zones, HUGE_SIZE, PROT_READ));
		must(mprotect(machine->shared[1], PAGE_SIZE * ZONE_FRAMES, PROT_READ));
		must(mprotect(machine->shared[1], PAGE_SIZE * ZONE_FRAMES, PROT_READ | PROT_WRITE));
		must(mprotect(machine->zones, HUGE_SIZE, PROT_READ | PROT_WRITE));
		break;
	case COLLAPSE:
		/* Into a huge page again, if it is none; or into small ones. */
		if (percent(run, 50))
			madvise(machine->zones, 2 * HUGE_SIZE, MADV_COLLAPSE);
		else
			madvise(machine->zones + HUGE_SIZE - PAGE_SIZE, PAGE_SIZE, MADV_PAGEOUT);
		break;
	default:
		set_registers(run);
		break;
	}
}

static bool batch(struct run *run)
{
	run->count = 0;
	run->unclear = false;
	if (run->options->meddle)
		meddle(run);
	if (run->model.is_full)
		flush(run);
	/* Some of these make three ops. */
	while (run->count < MAX_OPS - 8 && !run->unclear)
		choose(run);
	if (!machine_run(run->machine, run->count)) {
		report(run, run->count - 1);
		return false;
	}
	run->done += run->count;
	for (int i = 0; i < run->count; i++) {
		if (is_expected(run, i))
			continue;
		report(run, i);
		return false;
	}
	if (run->unclear && !find_store(run)) {
		report(run, run->count - 1);
		return false;
	}
	if (model_compare(&run->model, run->machine)) {
		report(run, run->count - 1);
		return false;
	}
	audit("after a batch");
	return true;
}

/* Tables to begin with. */
static void populate(struct run *run)
{
	const struct mode *mode = run->mode;

	for (int n = 0; n < 400; n++) {
		int level = 1 + below(run, mode->levels);
		uint64_t va = random_page(run);
		uint64_t gpa = random_table(run, level) + va_index(mode, va, level) * mode->entry_bytes;
		uint64_t entry = random_entry(run, level, gpa);

		memcpy(machine_memory(run->machine, gpa), &entry, mode->entry_bytes);
	}
	for (int n = 0; mode->paging == PAE && n < 4 * ROOTS; n++)
		if (n % 4)
			((uint64_t *)machine_memory(run->machine, PDPT_GPA))[n] = random_table(run, 2) | PTE_P;
}

/* KVM walks the random tables, and not the processor. */
static bool mode_is_shadowed(const struct mode *mode)
{
	return mode->paging == NESTED || kvm_paging() == SHADOW;
}

/* Each thing that a run with the host's hand in it is for has to have happened. */
static bool has_meddled(const struct run *run)
{
	const struct counts *counts = &run->counts;
	bool all = counts->shared && counts->swapped && counts->recursive;

	note("%s: %" PRIu64 " accesses to frames that may share a page, %" PRIu64 " entries changed to the other frame, %"
	     PRIu64 " tables that lead to themselves", run->mode->name, counts->shared, counts->swapped, counts->recursive);
	for (int i = 0; i < MEDDLINGS; i++) {
		note("%s: %s %" PRIu64 " times", run->mode->name, meddlings[i], counts->meddled[i]);
		all = all && (counts->meddled[i] || (i == REGISTERS && run->mode->paging == PAE));
	}
	note("%s: %" PRIu64 " pages recycled", run->mode->name, kvm_stat(run->machine->vm.fd, "mmu_recycled"));
	return all;
}

uint64_t random_run(struct machine *machine, const struct options *options)
{
	struct run run = { .machine = machine, .mode = machine->mode, .options = options, .state = options->seed };
	struct counts *counts = &run.counts;

	run.expected = calloc(MAX_OPS, sizeof(*run.expected));
	if (!run.expected)
		bail("out of memory");
	run.has_nx = machine->features.nx;
	/* The same pages shadow the guest's tables with EFER.NX and without: what it made reserved by that may stay in use. */
	run.changes_nx = run.has_nx && kvm_paging() != SHADOW;
	if (options->meddle && mode_is_shadowed(machine->mode)) {
		/* A nested guest has memory above 512 GiB. */
		static const int bits[] = { 36, 39, 40, 44, 52 };
		int fewest = machine->mode->paging == NESTED ? 2 : 0;

		machine_set_physical_bits(machine, bits[fewest + below(&run, 5 - fewest)]);
		note("%s: %d bits of physical address", run.mode->name, machine->features.physical_bits);
	}
	/* The tables to begin with are made with a model at hand, too. */
	model_create(&run.model, machine);
	populate(&run);
	model_destroy(&run.model);
	model_create(&run.model, machine);
	run.count = 0;
	load_root(&run);
	if (!machine_run(machine, run.count))
		bail("the guest does not start");
	while (run.done < options->ops && batch(&run))
		;
	note("%s: %" PRIu64 " ops; accesses: %" PRIu64 " fine, %" PRIu64 " not present, %" PRIu64 " forbidden, %"
	     PRIu64 " reserved; %" PRIu64 " had a choice, %" PRIu64 " had to walk the tables", run.mode->name, run.done,
	     counts->fine, counts->absent, counts->forbidden, counts->reserved, counts->several, counts->fresh);
	if (!counts->wrong && run.done >= 5000 && !(counts->fine && counts->absent && counts->forbidden &&
						    counts->reserved && counts->several && counts->fresh)) {
		note("some kind of outcome never came: the test has not done its work");
		counts->wrong++;
	}
	if (machine->features.pcid)
		note("%s: %" PRIu64 " roots loaded that keep what the CPU knows, INVPCID by type: %" PRIu64 " %" PRIu64 " %" PRIu64
		     " %" PRIu64, run.mode->name, counts->kept, counts->invpcid[0], counts->invpcid[1], counts->invpcid[2],
		     counts->invpcid[3]);
	if (options->meddle && !counts->wrong && run.done >= 5000 && !has_meddled(&run)) {
		note("the host has not done all that it was to do");
		counts->wrong++;
	}
	model_destroy(&run.model);
	free(run.expected);
	return counts->wrong;
}
