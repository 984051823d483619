/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The events of KVM's MMU (group kvmmmu), as a VM of this thread causes them: the same on in-tree KVM and on rmmu.
 *
 * Of an event everything is kept but addresses of the host, the encoding of a frozen entry, and the VM's generations.
 */
#ifndef RMMU_EVENTS_H
#define RMMU_EVENTS_H

#include <stdbool.h>
#include <stddef.h>

#define MAX_EVENTS 400000

struct events {
	char **lines;
	size_t count;
};

/* Whether VMs to be created are rmmu's. */
void own_new_vms(bool own);
/* Skips the test when rmmu is not loaded or there are no events. */
void events_require(void);
/*
 * Record these events, NULL at the end, from now on. Until events_stop() rmmu maps nothing around a fault. The thread stays on its
 * CPU, so that the order is known.
 */
void events_start(const char * const *names);
/* Those since then. */
void events_stop(const char * const *names, struct events *events);
void events_free(struct events *events);
/* How many there are of one kind. */
size_t events_of(const struct events *events, const char *name);
/* Whether both are the same, in the same order. If not, where they part is noted. */
bool events_equal(const struct events *in_tree, const struct events *rmmu);

#endif
