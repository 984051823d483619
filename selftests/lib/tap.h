/* SPDX-License-Identifier: GPL-2.0 */
/*
 * TAP for one test program: plan(), then as many ok() or skip() as planned, then finish().
 * What keeps the rest from making sense is bail().
 */
#ifndef RMMU_TAP_H
#define RMMU_TAP_H

#include <stdbool.h>

#define TAP_SKIP_EXIT 4

void plan(int checks);
/* One check. Returns whether it held. */
bool ok(bool held, const char *name, ...) __attribute__((format(printf, 2, 3)));
void skip(const char *name, const char *why);
/* The whole test cannot run here. */
_Noreturn void skip_all(const char *why, ...) __attribute__((format(printf, 1, 2)));
_Noreturn void bail(const char *why, ...) __attribute__((format(printf, 1, 2)));
/* Something worth knowing in the log. */
void note(const char *text, ...) __attribute__((format(printf, 1, 2)));
int finish(void);

/* For system calls whose failure ends the test. */
#define must(call)								\
({										\
	long must_ret = (long)(call);						\
										\
	if (must_ret < 0)							\
		bail("%s:%d: %s: %m", __FILE__, __LINE__, #call);		\
	must_ret;								\
})

#endif
