// SPDX-License-Identifier: GPL-2.0
/* Ops at random: chosen with the model at hand, carried out by the guest, and then checked. */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "audit.h"
#include "paging.h"

#define ROOTS	3

/* What is expected of an op. */
struct expected {
	struct outcomes outcomes;
	bool is_access;		/* through the random tables; else it can not fail */
	bool is_load;		/* of this value */
	uint64_t value;
};

struct counts {
	uint64_t accesses, fine, absent, reserved, forbidden, several, fresh, wrong;
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

static uint64_t random_entry(struct run *run, int level, uint64_t gpa)
{
	const struct mode *mode = run->mode;
	bool leaf = level == 1 || (level == 2 && percent(run, 25)) ||
		    (level == 3 && run->machine->features.gigabyte && percent(run, 10));
	bool in_root = gpa >= ZONE_B && gpa < ZONE_B + ROOTS * PAGE_SIZE;
	uint64_t entry = 0;

	if (percent(run, 95))
		entry |= PTE_P;
	if (percent(run, 82))
		entry |= PTE_W;
	if (percent(run, 78))
		entry |= PTE_U;
	entry |= next(run) & PTE_AD;
	if (mode->entry_bytes == 8 && run->machine->features.nx && percent(run, 8))
		entry |= PTE_NX;
	/* In a root of four levels the bit is reserved, on some CPUs. */
	if (mode->global && leaf && percent(run, 15) && !(mode->levels > 3 && in_root))
		entry |= PTE_G;
	if (!leaf) {
		entry |= random_table(run, level - 1);
	} else if (level == 1) {
		entry |= random_frame(run);
	} else {
		entry |= PTE_PS;
		if (level == 2)
			entry |= mode->entry_bytes == 8 && percent(run, 50) ? ZONE_C : ZONE_B;
		if (percent(run, 4))
			entry |= mode->entry_bytes == 8 ? 1UL << 13 : 1UL << 21;
	}
	if (mode->entry_bytes == 8 && percent(run, 3))
		entry |= run->machine->features.physical_bits < 52 ? 1UL << 51 : 0;
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

static void invalidate(struct run *run, uint64_t va)
{
	if (run->mode->paging == NESTED) {
		issue(run, KIND_FLUSH, 0, 0, 0);
		model_flush(&run->model);
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

	if (!gpa)
		gpa = random_table(run, level) + va_index(run->mode, va, level) * run->mode->entry_bytes;
	store_fixed(run, gpa, random_entry(run, level, gpa));
	if (percent(run, run->options->invlpg_percent))
		invalidate(run, va);
}

static void load_root(struct run *run)
{
	uint64_t number = below(run, ROOTS);
	uint64_t root = run->mode->paging == PAE ? PDPT_GPA + 32 * number : ZONE_B + number * PAGE_SIZE;

	if (run->mode->paging == NESTED) {
		issue(run, KIND_NCR3, 0, 0, root);
		model_set_root(&run->model, root);
		model_flush(&run->model);
		return;
	}
	issue(run, KIND_CR3, 0, 0, root);
	run->expected[run->count - 1].is_load = true;
	run->expected[run->count - 1].value = root;
	model_set_root(&run->model, root);
}

static void change_pointer(struct run *run)
{
	uint64_t gpa = PDPT_GPA + 32 * below(run, ROOTS) + 8 * (1 + below(run, 3));

	store_fixed(run, gpa, percent(run, 90) ? random_table(run, 2) | PTE_P : 0);
	if (percent(run, 60))
		load_root(run);
}

static void change_registers(struct run *run)
{
	struct machine *machine = run->machine;
	uint64_t cr4 = machine->cr4;

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
		value = outcomes.count > 1 ? token(run) : data_to_store(run);
	issue(run, kind, flags, va, value);
	run->expected[run->count - 1].is_access = true;
	run->expected[run->count - 1].outcomes = outcomes;
	run->counts.several += outcomes.count > 1;
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
		"end", "read", "write", "exec", "invlpg", "cr3", "cr0", "cr4", "ncr3", "flush",
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

static bool batch(struct run *run)
{
	run->count = 0;
	run->unclear = false;
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

uint64_t random_run(struct machine *machine, const struct options *options)
{
	struct run run = { .machine = machine, .mode = machine->mode, .options = options, .state = options->seed };
	struct counts *counts = &run.counts;

	run.expected = calloc(MAX_OPS, sizeof(*run.expected));
	if (!run.expected)
		bail("out of memory");
	populate(&run);
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
	model_destroy(&run.model);
	free(run.expected);
	return counts->wrong;
}
