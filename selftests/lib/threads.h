/* SPDX-License-Identifier: GPL-2.0 */
/* The vCPUs of a VM on threads of their own, for one VM at a time. */
#ifndef RMMU_THREADS_H
#define RMMU_THREADS_H

#include "vm.h"

/*
 * What to do about an exit, or about an error of KVM_RUN (an errno, else 0), on the vCPU's
 * thread; whether to go on. EINTR never comes here.
 */
typedef bool (*exit_handler)(struct vcpu *vcpu, int error);

/* The first `count` of them. */
void vcpus_start(struct vm *vm, int count, exit_handler handler);
/* How many have not ended yet. */
int vcpus_left(void);
/* Wait until all have ended. */
void vcpus_join(void);
/* Until vcpus_release() no vCPU is in KVM_RUN, nor in its handler. */
void vcpus_hold(void);
void vcpus_release(void);
/* Let every vCPU leave the guest once. */
void vcpus_kick(void);

#endif
