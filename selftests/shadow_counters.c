// SPDX-License-Identifier: GPL-2.0
/*
 * What the shadow MMU has besides walks and entries does happen, and the counters tell: entries installed in advance, pages
 * that become unsync and are brought up to date, tables that are given up after too many writes, pages recycled for the
 * quota, huge pages of nested guests split when the dirty log begins. For a guest whose own tables are shadowed, or that is
 * mapped directly, and for a nested guest, whose hypervisor's tables are.
 */
#include <glob.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "host.h"
#include "nested.h"

#define PREFETCH	"/sys/module/kvm_rmmu/parameters/shadow_prefetch"

/* Mapped by one table of the last level; by the directory above it, in 2 MiB; and the same, of huge pages of the host. */
#define SMALL_GPA	GIB
#define SMALL_PAGES	512UL
#define WIDE_GPA	(2 * GIB)
#define WIDE_PAGES	128UL
#define WIDE_SIZE	(WIDE_PAGES * HUGE_SIZE)
#define HUGE_GPA	(3 * GIB)
#define HUGE_PAGES	2UL

#define TABLE		(VM_SCRATCH_GPA + 0x0000)
#define TABLES		(VM_SCRATCH_GPA + 0x1000)	/* NESTED_TABLES */
#define NESTED		(VM_SCRATCH_GPA + 0x8000)	/* NESTED_SIZE */
#define INNER_STACK	(VM_SCRATCH_GPA + 0xc000)
/* Accessed and dirty already, else nothing would be installed in advance. */
#define ENTRY		0x67UL
#define LARGE		0x80UL
/* The smallest quota that KVM takes. */
#define QUOTA		64

enum kind { TOUCH, STORE, FLUSH };

/* In the shared page. */
struct command {
	uint64_t kind, address, count, step;
	uint64_t value, value_step;	/* to be stored */
	uint64_t loaded;		/* by the last load */
	uint64_t nested, inner;		/* there is a nested guest, and where its code is */
};

struct scene {
	const char *who;
	bool nested, shadowed;		/* a table that the guest, or the hypervisor, makes is shadowed */
	struct vm vm;
	struct vcpu *vcpu;
	struct command *command;
	uint8_t *small, *wide, *huge;
	char shadow[256];		/* rmmu's counters */
};

guest_code void touch(uint64_t shared)
{
	volatile struct command *command = (void *)shared;

	for (uint64_t i = 0; i < command->count; i++)
		command->loaded = load(command->address + i * command->step);
}

guest_code void inner(uint64_t shared)
{
	touch(shared);
	for (;;)
		nested_hypercall(NESTED);
}

guest_code void play(uint64_t shared)
{
	volatile struct command *command = (void *)shared;

	for (;;) {
		uint64_t wrong = 0;

		switch (command->kind) {
		case TOUCH:
			if (command->nested)
				wrong = nested_run(NESTED, INNER_STACK, command->inner, shared) - NESTED_HYPERCALL;
			else
				touch(shared);
			break;
		case STORE:
			for (uint64_t i = 0; i < command->count; i++)
				store(command->address + i * command->step,
				      command->value + i * command->value_step);
			break;
		default:
			if (command->nested)
				nested_flush(NESTED);
			else
				guest_flush();
			break;
		}
		guest_sync(wrong ? wrong : 1);
	}
}

static void run(struct scene *scene, struct command command)
{
	uint32_t said;

	command.nested = scene->nested;
	command.inner = scene->command->inner;
	*scene->command = command;
	said = vcpu_run_to_sync(scene->vcpu);
	if (said != 1)
		bail("%s: the nested guest ended with 0x%x more than its call", scene->who, said);
}

/* Load a word every `step` bytes; returns the last one. */
static uint64_t load_all(struct scene *scene, uint64_t address, uint64_t count, uint64_t step)
{
	run(scene, (struct command) { .kind = TOUCH, .address = address, .count = count, .step = step });
	return scene->command->loaded;
}

/* Write `count` entries that map one frame after the other. */
static void store_entries(struct scene *scene, uint64_t at, uint64_t count, uint64_t entry, uint64_t size)
{
	run(scene, (struct command) {
		.kind = STORE, .address = at, .count = count, .step = 8, .value = entry, .value_step = size,
	});
}

static uint64_t *entries(struct scene *scene, uint64_t gpa)
{
	return (uint64_t *)(scene->vm.low + gpa);
}

/* What an entry of the table has besides an address. */
static uint64_t entry(struct scene *scene, bool leads_to_table)
{
	return scene->nested ? nested_entry(leads_to_table) : ENTRY;
}

/* The directory that maps a GiB: the guest's own, or the hypervisor's. */
static uint64_t directory(struct scene *scene, uint64_t gib)
{
	uint64_t *pointers = entries(scene, TABLES + PAGE_SIZE);
	struct kvm_sregs sregs;

	if (!scene->nested) {
		must(ioctl(scene->vcpu->fd, KVM_GET_SREGS, &sregs));
		pointers = entries(scene, entries(scene, sregs.cr3)[0] & ~0xfffUL);
	}
	return pointers[gib] & ~0xfffUL;
}

static void *filled(uint64_t pages, uint64_t step, bool huge)
{
	uint8_t *hva = memory(pages * step, huge);

	for (uint64_t i = 0; i < pages; i++)
		*(uint64_t *)(hva + i * step) = i;
	return hva;
}

static void find_counters(struct scene *scene)
{
	char pattern[64];
	glob_t found;

	snprintf(pattern, sizeof(pattern), "/sys/kernel/debug/rmmu/vms/%d-*/shadow", getpid());
	if (glob(pattern, 0, NULL, &found) || found.gl_pathc != 1)
		bail("%s: rmmu has not just one VM of this process", pattern);
	snprintf(scene->shadow, sizeof(scene->shadow), "%s", found.gl_pathv[0]);
	globfree(&found);
}

static void begin(struct scene *scene, bool prefetch)
{
	if (!write_file(PREFETCH, prefetch ? "1" : "0"))
		bail(PREFETCH ": %m");
	vm_create(&scene->vm);
	scene->command = scene->vm.shared;
	scene->small = filled(SMALL_PAGES, PAGE_SIZE, false);
	scene->wide = filled(WIDE_PAGES, HUGE_SIZE, false);
	scene->huge = filled(HUGE_PAGES, HUGE_SIZE, true);
	must(vm_slot(&scene->vm, 1, SMALL_GPA, SMALL_PAGES * PAGE_SIZE, scene->small, 0));
	must(vm_slot(&scene->vm, 2, WIDE_GPA, WIDE_SIZE, scene->wide, 0));
	must(vm_slot(&scene->vm, 3, HUGE_GPA, HUGE_PAGES * HUGE_SIZE, scene->huge, 0));
	scene->vcpu = vm_vcpu(&scene->vm, play, VM_SHARED_GPA);
	if (scene->nested)
		nested_prepare(scene->vcpu, NESTED, TABLES);
	scene->command->inner = vm_code(inner);
	for (uint64_t i = 0; i < SMALL_PAGES; i++)
		entries(scene, TABLE)[i] = (SMALL_GPA + i * PAGE_SIZE) | entry(scene, false);
	entries(scene, directory(scene, SMALL_GPA / GIB))[0] = TABLE | entry(scene, true);
	find_counters(scene);
}

static void end(struct scene *scene)
{
	vm_destroy(&scene->vm);
	munmap(scene->small, SMALL_PAGES * PAGE_SIZE);
	munmap(scene->wide, WIDE_SIZE);
	munmap(scene->huge, HUGE_PAGES * HUGE_SIZE);
}

static uint64_t stat(struct scene *scene, const char *name)
{
	return kvm_stat(scene->vm.fd, name);
}

static uint64_t rmmu_stat(struct scene *scene, const char *name)
{
	uint64_t value = read_field(scene->shadow, name, ~0UL);

	if (value == ~0UL)
		bail("%s has no %s", scene->shadow, name);
	return value;
}

/* The faults that it takes to load a word of each small page but the first, which is for all that is not counted. */
static uint64_t faults(struct scene *scene, uint64_t *prefetched)
{
	uint64_t before, in_advance;

	load_all(scene, SMALL_GPA, 1, PAGE_SIZE);
	before = kvm_stat(scene->vcpu->fd, "pf_taken");
	in_advance = rmmu_stat(scene, "prefetched");
	if (load_all(scene, SMALL_GPA + PAGE_SIZE, SMALL_PAGES - 1, PAGE_SIZE) != SMALL_PAGES - 1)
		bail("%s: the last page has not the right data", scene->who);
	*prefetched = rmmu_stat(scene, "prefetched") - in_advance;
	return kvm_stat(scene->vcpu->fd, "pf_taken") - before;
}

static void prefetch(struct scene *scene)
{
	uint64_t with, without, prefetched, none;

	begin(scene, false);
	without = faults(scene, &none);
	end(scene);
	begin(scene, true);
	with = faults(scene, &prefetched);
	/* Not where a page that is mapped ahead of its use faults again when it is used. */
	if (kvm_tracks_use_by_faults()) {
		ok(!prefetched && !none, "%s: nothing in advance without accessed bits", scene->who);
		ok(with == without && with >= SMALL_PAGES - 1, "%s: %lu faults for %lu pages, and %lu", scene->who, with,
		   SMALL_PAGES - 1, without);
		return;
	}
	ok(prefetched >= SMALL_PAGES * 3 / 4 && !none, "%s: %lu entries in advance, %lu when that is off", scene->who,
	   prefetched, none);
	ok(without >= 5 * with && without >= SMALL_PAGES - 1, "%s: %lu faults for %lu pages; %lu with nothing in advance",
	   scene->who, with, SMALL_PAGES - 1, without);
}

static void unsync(struct scene *scene)
{
	uint64_t synced, unsynced, still, loaded;

	load_all(scene, SMALL_GPA + 40 * PAGE_SIZE, 1, PAGE_SIZE);
	store_entries(scene, TABLE + 40 * 8, 1, (SMALL_GPA + 41 * PAGE_SIZE) | entry(scene, false), 0);
	unsynced = stat(scene, "mmu_unsync");
	synced = rmmu_stat(scene, "synced");
	run(scene, (struct command) { .kind = FLUSH });
	loaded = load_all(scene, SMALL_GPA + 40 * PAGE_SIZE, 1, PAGE_SIZE);
	still = stat(scene, "mmu_unsync");
	ok(unsynced >= 1, "%s: %lu pages are unsync after a write to a table", scene->who, unsynced);
	ok(rmmu_stat(scene, "synced") > synced && !still && loaded == 41,
	   "%s: %lu were synced after a flush, %lu are unsync still, page %lu is mapped", scene->who,
	   rmmu_stat(scene, "synced") - synced, still, loaded);
}

static void flood(struct scene *scene)
{
	uint64_t writes = stat(scene, "mmu_pte_write"), flooded = stat(scene, "mmu_flooded");
	uint64_t zapped = stat(scene, "mmu_shadow_zapped");
	uint64_t at = directory(scene, SMALL_GPA / GIB) + 100 * 8;

	store_entries(scene, at, 8, (SMALL_GPA + 100 * HUGE_SIZE) | entry(scene, false) | LARGE,
		      HUGE_SIZE);
	writes = stat(scene, "mmu_pte_write") - writes;
	flooded = stat(scene, "mmu_flooded") - flooded;
	zapped = stat(scene, "mmu_shadow_zapped") - zapped;
	ok(writes >= 3 && writes < 8 && flooded && zapped,
	   "%s: of 8 writes to a directory %lu were emulated, %lu floods, %lu pages zapped", scene->who, writes, flooded,
	   zapped);
	ok(load_all(scene, SMALL_GPA + 50 * PAGE_SIZE, 1, PAGE_SIZE) == 50, "%s: what it maps is mapped again", scene->who);
}

static void recycle(struct scene *scene)
{
	uint64_t before = stat(scene, "mmu_recycled"), loaded;

	must(ioctl(scene->vm.fd, KVM_SET_NR_MMU_PAGES, QUOTA));
	loaded = load_all(scene, WIDE_GPA, WIDE_PAGES, HUGE_SIZE);
	ok(stat(scene, "mmu_recycled") >= before + WIDE_PAGES - QUOTA && loaded == WIDE_PAGES - 1,
	   "%s: %lu pages recycled under a quota of %d", scene->who, stat(scene, "mmu_recycled") - before, QUOTA);
	ok(rmmu_stat(scene, "pages") <= QUOTA + 4, "%s: %lu pages are in use", scene->who, rmmu_stat(scene, "pages"));
	must(ioctl(scene->vm.fd, KVM_SET_NR_MMU_PAGES, 1000));
}

static void split(struct scene *scene)
{
	uint64_t before, splits;

	load_all(scene, HUGE_GPA, HUGE_PAGES, HUGE_SIZE);
	before = rmmu_stat(scene, "nested_splits");
	must(vm_slot(&scene->vm, 3, HUGE_GPA, HUGE_PAGES * HUGE_SIZE, scene->huge, KVM_MEM_LOG_DIRTY_PAGES));
	splits = rmmu_stat(scene, "nested_splits") - before;
	ok(splits == HUGE_PAGES && load_all(scene, HUGE_GPA, HUGE_PAGES, HUGE_SIZE) == HUGE_PAGES - 1,
	   "%s: %lu huge pages split when the dirty log begins", scene->who, splits);
}

int main(void)
{
	bool shadow = kvm_paging() == SHADOW, tdp = kvm_paging() == TDP_MMU;
	struct scene guest = { .who = shadow ? "guest with shadowed tables" : "direct guest", .shadowed = shadow };
	struct scene nested = { .who = "nested guest", .nested = true, .shadowed = true };
	struct scene *scenes[] = { tdp ? NULL : &guest, shadow ? NULL : &nested };

	if (access(PREFETCH, W_OK))
		skip_all("kvm_rmmu is not loaded");
	if (!shadow && !nested_offered())
		skip_all("there are no nested guests");
	plan(shadow ? 8 : tdp ? 9 : 12);
	for (int i = 0; i < 2; i++) {
		struct scene *scene = scenes[i];

		if (!scene)
			continue;
		prefetch(scene);
		if (scene->shadowed) {
			unsync(scene);
			flood(scene);
		}
		recycle(scene);
		/* In-tree KVM splits for nested guests only where its TDP MMU is in use. */
		if (scene->nested && tdp)
			split(scene);
		end(scene);
	}
	return finish();
}
