// SPDX-License-Identifier: GPL-2.0
#include <glob.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "audit.h"
#include "tap.h"

/* What a file says, line by line; whether it says that nothing is broken. */
static bool is_clean(const char *path, const char *when)
{
	FILE *file = fopen(path, "r");
	bool clean = false;
	char line[256];

	if (!file)
		bail("cannot audit: %s: %m", path);
	while (fgets(line, sizeof(line), file)) {
		if (!strcmp(line, "broken 0\n"))
			clean = true;
		else if (!strncmp(line, "broken ", 7) || line[0] == '#')
			note("audit, %s: %.*s", when, (int)strcspn(line, "\n"), line);
	}
	fclose(file);
	return clean;
}

void audit(const char *when)
{
	char pattern[80];
	bool clean = true;
	glob_t found;

	snprintf(pattern, sizeof(pattern), "/sys/kernel/debug/rmmu/vms/%d-*/audit", getpid());
	if (glob(pattern, 0, NULL, &found))
		return;
	for (size_t i = 0; i < found.gl_pathc; i++)
		clean &= is_clean(found.gl_pathv[i], when);
	globfree(&found);
	if (!clean)
		bail("the audit found the page tables broken, %s", when);
}
