// SPDX-License-Identifier: GPL-2.0
/*
 * A guest that rewrites its page tables at random, and checks what its CPU makes of them.
 *
 *   paging [-n OPS] [-s SEED] [-m MODE] [-i PERCENT] [-r] [-v]
 *
 * OPS is the number of operations for each mode: 32-bit, pae, 4-level and 5-level; and if it is asked
 * for, nested, where the random tables are those of a hypervisor for its guest. PERCENT of the changes are followed
 * at once by the INVLPG that makes them count; until then the old translation may be used. With -r
 * a fault for a reserved bit has to say that the entry is present, which QEMU forgets.
 */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

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

static void run_mode(const struct mode *mode, struct features features, struct options options)
{
	const char *lacks = missing(mode, &features);
	struct machine machine;
	uint64_t violations;

	if (lacks) {
		skip(mode->name, lacks);
		return;
	}
	machine_create(&machine, mode, features);
	violations = random_run(&machine, &options);
	machine_destroy(&machine);
	ok(!violations, "%s: %" PRIu64 " operations, %" PRIu64 " violations, seed %" PRIu64, mode->name, options.ops,
	   violations, options.seed);
}

static bool is_wanted(const struct mode *mode, const char *only)
{
	return only ? !strcmp(only, mode->name) : mode->paging != NESTED;
}

int main(int argc, char **argv)
{
	struct options options = { .seed = 1, .ops = 20000, .invlpg_percent = 50 };
	struct features features;
	const char *only = NULL;
	int option, wanted = 0;

	while ((option = getopt(argc, argv, "n:s:m:i:rv")) != -1) {
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
		case 'v':
			options.verbose = true;
			break;
		default:
			bail("usage: %s [-n OPS] [-s SEED|time] [-m MODE] [-i PERCENT] [-r] [-v]", argv[0]);
		}
	}
	for (size_t i = 0; i < MODES; i++)
		wanted += is_wanted(&modes[i], only);
	if (!wanted)
		bail("there is no mode %s", only);
	plan(wanted);
	features = machine_features();
	for (size_t i = 0; i < MODES; i++)
		if (is_wanted(&modes[i], only))
			run_mode(&modes[i], features, options);
	return finish();
}
