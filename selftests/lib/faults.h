/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Makes allocations of the calling thread fail, on a kernel with fault injection (Documentation/fault-injection).
 */
#ifndef RMMU_FAULTS_H
#define RMMU_FAULTS_H

#include <stdbool.h>

/* Instead of a number: every allocation. */
#define FAULTS_ALL 0

bool faults_possible(void);
void faults_set_up(void);
/* From now on only those with a function between these addresses on the stack. */
void faults_below(unsigned long start, unsigned long end);
/* The n-th allocation from now on fails. */
void faults_arm(unsigned int number);
/* None fails any more. Returns whether the n-th was reached. */
bool faults_disarm(unsigned int number);

/* The number behind `name` in a file; -1 if there is none. */
long number_after(const char *path, const char *name);

#endif
