// SPDX-License-Identifier: GPL-2.0
/*
 * A guest that rewrites its page tables at random, and checks what its CPU makes of them.
 *
 *   paging [-n OPS] [-s SEED] [-m MODE] [-i PERCENT] [-r] [-f] [-e] [-x] [-v]
 *
 * OPS is the number of operations for each mode: 32-bit, pae, 4-level and 5-level; and if it is asked
 * for, nested, where the random tables are those of a hypervisor for its guest. PERCENT of the changes are followed
 * at once by the INVLPG that makes them count; until then the old translation may be used. With -r
 * a fault for a reserved bit has to say that the entry is present, which QEMU forgets. With -f a fault for
 * the lack of a permission has to make the CPU forget the page, as processors do and QEMU does not. Under
 * shadow paging, where KVM delivers the guest's faults, it has to in any case. With -e each mode runs on
 * in-tree KVM and then on rmmu, and the events of KVM's MMU must be the same, in the same order; if nobody says
 * otherwise, the modes whose tables are shadowed: nested, or with shadow paging the other four. With -x the host
 * meddles with the VM between batches (slots, quota, dirty log, protection, registers), frames share pages of the host, tables
 * lead to themselves, and where KVM walks the tables the guest has another number of physical address bits.
 */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "events.h"
#include "host.h"
#include "paging/paging.h"

static const struct mode modes[] = {
	{ "32-bit", BITS32, 2, 4, false, true },
	{ "pae", PAE, 2, 8, false, false },
	{ "4-level", LEVEL4, 4, 8, true, true },
	{ "5-level", LEVEL5, 5, 8, true, false },
	{ "nested", NESTED, 4, 8, true, false },
};

#define MODES (sizeof(modes) / sizeof(modes[0]))

static const char *missing(const struct mode *mode, const struct features *features)
{
	if (mode->paging == LEVEL5 && !features->la57)
		return "the CPU has no five-level paging";
	if (mode->paging == NESTED && !features->svm)
		return "KVM offers no nested SVM with nested paging";
	return NULL;
}

/*
 * Not kvm_mmu_set_spte: whether a fault finds an entry as it is to be depends on the accessed bit, and whether the CPU has
 * set that already, on when interrupts came. The same run on the same KVM differs in it now and then.
 */
static const char * const events[] = {
	"kvm_mmu_pagetable_walk", "kvm_mmu_paging_element", "kvm_mmu_walker_error", "kvm_mmu_set_accessed_bit",
	"kvm_mmu_set_dirty_bit", "kvm_mmu_get_page", "kvm_mmu_unsync_page", "kvm_mmu_sync_page",
	"kvm_mmu_prepare_zap_page", "kvm_mmu_spte_requested", NULL
};

/* The number of violations. */
static uint64_t run_machine(const struct mode *mode, struct features features, const struct options *options)
{
	struct machine machine;
	uint64_t violations;

	machine_create(&machine, mode, features);
	violations = random_run(&machine, options);
	machine_destroy(&machine);
	return violations;
}

static uint64_t run_recorded(const struct mode *mode, struct features features, const struct options *options, bool own,
			     struct events *seen)
{
	uint64_t violations;

	own_new_vms(own);
	events_start(events);
	violations = run_machine(mode, features, options);
	events_stop(events, seen);
	return violations;
}

static bool is_event(const char *line, const char *name)
{
	return !strncmp(line, name, strlen(name));
}

/*
 * A fault that the TDP MMU serves makes tables, and pages of the nested hypervisor's tables unsync, in this order on in-tree
 * KVM and in the other on rmmu. It makes no difference, since the lock is held all the while.
 */
static void tables_first(struct events *events)
{
	for (size_t i = 1; i < events->count; i++) {
		char *line = events->lines[i];
		size_t to = i;

		if (!is_event(line, "kvm_mmu_get_page:"))
			continue;
		for (; to && is_event(events->lines[to - 1], "kvm_mmu_unsync_page:"); to--)
			events->lines[to] = events->lines[to - 1];
		events->lines[to] = line;
	}
}

static void compare_events(const struct mode *mode, struct features features, const struct options *options)
{
	struct events in_tree = { 0 }, rmmu = { 0 };
	bool equal = false, all = true;
	uint64_t violations = 0;

	/*
	 * A fault begins anew when the scheduler wants the CPU while pages are synced. That does not happen often, nor
	 * in the same places again; what the two do in another way does.
	 */
	for (int attempt = 0; attempt < 3 && !equal && !violations; attempt++) {
		events_free(&in_tree);
		events_free(&rmmu);
		violations = run_recorded(mode, features, options, false, &in_tree) +
			     run_recorded(mode, features, options, true, &rmmu);
		if (kvm_paging() == TDP_MMU) {
			tables_first(&in_tree);
			tables_first(&rmmu);
		}
		equal = events_equal(&in_tree, &rmmu);
	}
	for (int i = 0; events[i]; i++) {
		note("%s: %zu on in-tree KVM, %zu on rmmu", events[i], events_of(&in_tree, events[i]),
		     events_of(&rmmu, events[i]));
		all = all && events_of(&in_tree, events[i]);
	}
	ok(!violations && equal && all, "%s: the same events on in-tree KVM and rmmu, %zu of all kinds, seed %" PRIu64,
	   mode->name, in_tree.count, options->seed);
	events_free(&in_tree);
	events_free(&rmmu);
}

static void run_mode(const struct mode *mode, struct features features, const struct options *options)
{
	const char *lacks = missing(mode, &features);
	uint64_t violations;

	if (lacks) {
		skip(mode->name, lacks);
	} else if (options->compare_events) {
		compare_events(mode, features, options);
	} else {
		violations = run_machine(mode, features, options);
		ok(!violations, "%s: %" PRIu64 " operations, %" PRIu64 " violations, seed %" PRIu64, mode->name,
		   options->ops, violations, options->seed);
	}
}

static bool is_wanted(const struct mode *mode, const char *only, const struct options *options)
{
	bool nested = options->compare_events && kvm_paging() != SHADOW;

	return only ? !strcmp(only, mode->name) : (mode->paging == NESTED) == nested;
}

int main(int argc, char **argv)
{
	struct options options = { .seed = 1, .ops = 20000, .invlpg_percent = 50 };
	struct features features;
	const char *only = NULL, *lacks = NULL;
	int option, wanted = 0, lacking = 0;

	while ((option = getopt(argc, argv, "n:s:m:i:rfexv")) != -1) {
		switch (option) {
		case 'n':
			options.ops = strtoull(optarg, NULL, 0);
			break;
		case 's':
			options.seed = strcmp(optarg, "time") ? strtoull(optarg, NULL, 0) : (uint64_t)time(NULL);
			break;
		case 'm':
			only = optarg;
			break;
		case 'i':
			options.invlpg_percent = atoi(optarg);
			break;
		case 'r':
			options.reserved_is_present = true;
			break;
		case 'f':
			options.fault_forgets = true;
			break;
		case 'e':
			events_require();
			options.compare_events = true;
			break;
		case 'x':
			options.meddle = true;
			break;
		case 'v':
			options.verbose = true;
			break;
		default:
			bail("usage: %s [-n OPS] [-s SEED|time] [-m MODE] [-i PERCENT] [-r] [-f] [-e] [-x] [-v]", argv[0]);
		}
	}
	features = machine_features();
	for (size_t i = 0; i < MODES; i++) {
		if (!is_wanted(&modes[i], only, &options))
			continue;
		wanted++;
		if (missing(&modes[i], &features)) {
			lacking++;
			lacks = missing(&modes[i], &features);
		}
	}
	if (!wanted)
		bail("there is no mode %s", only);
	if (lacking == wanted)
		skip_all("%s", lacks);
	plan(wanted);
	options.fault_forgets |= kvm_paging() == SHADOW;
	for (size_t i = 0; i < MODES; i++)
		if (is_wanted(&modes[i], only, &options))
			run_mode(&modes[i], features, &options);
	return finish();
}
