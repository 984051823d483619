// SPDX-License-Identifier: GPL-2.0
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "tap.h"

static int planned, made, failed;

static void print(const char *text, va_list args)
{
	vprintf(text, args);
	putchar('\n');
	fflush(stdout);
}

void plan(int checks)
{
	planned = checks;
	printf("TAP version 13\n1..%d\n", checks);
	fflush(stdout);
}

bool ok(bool held, const char *name, ...)
{
	va_list args;

	failed += !held;
	printf("%sok %d - ", held ? "" : "not ", ++made);
	va_start(args, name);
	print(name, args);
	va_end(args);
	return held;
}

void skip(const char *name, const char *why)
{
	printf("ok %d - %s # SKIP %s\n", ++made, name, why);
}

void skip_all(const char *why, ...)
{
	va_list args;

	printf("1..0 # SKIP ");
	va_start(args, why);
	print(why, args);
	va_end(args);
	exit(TAP_SKIP_EXIT);
}

void bail(const char *why, ...)
{
	va_list args;

	printf("Bail out! ");
	va_start(args, why);
	print(why, args);
	va_end(args);
	exit(1);
}

void note(const char *text, ...)
{
	va_list args;

	printf("# ");
	va_start(args, text);
	print(text, args);
	va_end(args);
}

int finish(void)
{
	if (made != planned)
		bail("%d checks were planned, %d made", planned, made);
	return failed ? 1 : 0;
}
