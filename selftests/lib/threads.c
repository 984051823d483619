// SPDX-License-Identifier: GPL-2.0
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <sys/ioctl.h>

#include "threads.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
/* Under the lock. */
static bool held;
static int busy, left;

static struct vm *vm;
static int count;
static exit_handler handle;
static pthread_t threads[VM_MAX_VCPUS];

static void enter(void)
{
	pthread_mutex_lock(&lock);
	while (held)
		pthread_cond_wait(&changed, &lock);
	busy++;
	pthread_mutex_unlock(&lock);
}

static void leave(bool for_good)
{
	pthread_mutex_lock(&lock);
	busy--;
	left -= for_good;
	pthread_cond_broadcast(&changed);
	pthread_mutex_unlock(&lock);
}

static void *run(void *argument)
{
	struct vcpu *vcpu = argument;
	bool more = true;

	while (more) {
		int error;

		enter();
		error = ioctl(vcpu->fd, KVM_RUN, 0) < 0 ? errno : 0;
		/* Cleared before the next look at `held`: who wants to hold sets it again for whoever does not wait. */
		if (error == EINTR)
			vcpu->run->immediate_exit = 0;
		else
			more = handle(vcpu, error);
		leave(!more);
	}
	return NULL;
}

static void nothing(int signal)
{
	(void)signal;
}

void vcpus_start(struct vm *of, int how_many, exit_handler handler)
{
	struct sigaction action = { .sa_handler = nothing };

	/* No SA_RESTART: the signal's only purpose is to interrupt. */
	sigaction(SIGUSR1, &action, NULL);
	vm = of;
	handle = handler;
	left = count = how_many;
	for (int i = 0; i < count; i++)
		if (pthread_create(&threads[i], NULL, run, &vm->vcpus[i]))
			bail("pthread_create failed");
}

int vcpus_left(void)
{
	int now;

	pthread_mutex_lock(&lock);
	now = left;
	pthread_mutex_unlock(&lock);
	return now;
}

void vcpus_join(void)
{
	for (int i = 0; i < count; i++)
		pthread_join(threads[i], NULL);
}

void vcpus_kick(void)
{
	for (int i = 0; i < count; i++) {
		/* Before it enters the guest this flag stops it, and inside the signal does. */
		vm->vcpus[i].run->immediate_exit = 1;
		pthread_kill(threads[i], SIGUSR1);
	}
}

void vcpus_hold(void)
{
	pthread_mutex_lock(&lock);
	held = true;
	vcpus_kick();
	while (busy)
		pthread_cond_wait(&changed, &lock);
	pthread_mutex_unlock(&lock);
}

void vcpus_release(void)
{
	pthread_mutex_lock(&lock);
	held = false;
	pthread_cond_broadcast(&changed);
	pthread_mutex_unlock(&lock);
}
