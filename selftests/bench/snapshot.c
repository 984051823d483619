// SPDX-License-Identifier: GPL-2.0
/*
 * Rows of a restored snapshot. The guest's memory is a file in the page cache, mapped private by the monitor, or comes
 * through userfaultfd from a handler that copies 64K at a time. The guest reads a working set, then writes it.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <poll.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "bench.h"

#define SIZE		(64 * MIB)
#define PAGES		(SIZE / PAGE_SIZE)
#define CHUNK		(64UL << 10)

struct handler {
	int fd, stop[2];
	uint8_t *base, *source;
	pthread_t thread;
};

static void copy_chunk(struct handler *handler, uint64_t address)
{
	uint64_t chunk = address & ~(CHUNK - 1), offset = chunk - (uintptr_t)handler->base, done = 0;

	while (done < CHUNK) {
		struct uffdio_copy copy = {
			.dst = chunk + done, .src = (uintptr_t)handler->source + offset + done, .len = CHUNK - done,
		};

		if (!ioctl(handler->fd, UFFDIO_COPY, &copy) || errno == EEXIST)
			/* What is there already is skipped, a page at a time. */
			done += copy.copy > 0 ? (uint64_t)copy.copy : PAGE_SIZE;
		else if (errno != EAGAIN)
			bail("UFFDIO_COPY: %m");
	}
}

static void *serve(void *argument)
{
	struct handler *handler = argument;
	struct pollfd polls[] = { { .fd = handler->fd, .events = POLLIN }, { .fd = handler->stop[0], .events = POLLIN } };
	struct uffd_msg message;

	for (;;) {
		must(poll(polls, 2, -1));
		if (polls[1].revents)
			return NULL;
		if (read(handler->fd, &message, sizeof(message)) == sizeof(message) && message.event == UFFD_EVENT_PAGEFAULT)
			copy_chunk(handler, message.arg.pagefault.address);
	}
}

static void start_handler(struct handler *handler, uint8_t *base)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register range = { .range = { (uintptr_t)base, SIZE }, .mode = UFFDIO_REGISTER_MODE_MISSING };

	handler->base = base;
	handler->source = backing_map(ANON, SIZE, true);
	handler->fd = must(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK));
	must(ioctl(handler->fd, UFFDIO_API, &api));
	must(ioctl(handler->fd, UFFDIO_REGISTER, &range));
	must(pipe2(handler->stop, O_CLOEXEC));
	if (pthread_create(&handler->thread, NULL, serve, handler))
		bail("pthread_create failed");
}

static void stop_handler(struct handler *handler)
{
	must(write(handler->stop[1], "", 1));
	pthread_join(handler->thread, NULL);
	close(handler->stop[0]);
	close(handler->stop[1]);
	close(handler->fd);
	backing_unmap(handler->source, SIZE);
}

static void phase(const struct row *row, struct vcpu *vcpu, struct touch order, const char *name, const char *faults_name)
{
	uint64_t faults = kvm_stat(vcpu->fd, "pf_taken");

	report(row, name, "time", touch(vcpu, order));
	report(row, faults_name, "count", kvm_stat(vcpu->fd, "pf_taken") - faults);
}

/* arg: pattern, one page in so many, userfaultfd. */
static void restore(const struct row *row)
{
	struct touch order = {
		.base = VM_TEST_GPA, .pages = PAGES, .count = PAGES / row->arg[1], .pattern = row->arg[0], .stride = row->arg[1],
	};
	bool uffd = row->arg[2];
	struct handler handler;
	struct vcpu *vcpu;
	uint8_t *base;
	struct vm vm;

	bench_vm(&vm);
	base = backing_map(uffd ? ANON : FILE_PRIVATE, SIZE, false);
	if (uffd)
		start_handler(&handler, base);
	must(vm_slot(&vm, 0, VM_TEST_GPA, SIZE, base, 0));
	vcpu = touch_vcpu(&vm);
	phase(row, vcpu, order, "reads", "faults of reads");
	/* What userfaultfd has filled in is mapped writable: writes to it do not fault. */
	order.write = 1;
	if (!uffd)
		phase(row, vcpu, order, "writes", "faults of writes");
	vm_destroy(&vm);
	if (uffd)
		stop_handler(&handler);
	backing_unmap(base, SIZE);
}

const struct row snapshot_rows[] = {
	{ "snapshot, sequential", AROUND_DEFAULT, restore, { SEQUENTIAL, 1, 0 } },
	{ "snapshot, every 4th page", AROUND_DEFAULT, restore, { STRIDED, 4, 0 } },
	{ "snapshot, 1/4 at random", AROUND_DEFAULT, restore, { RANDOM, 4, 0 } },
	{ "snapshot by userfaultfd, sequential", AROUND_DEFAULT, restore, { SEQUENTIAL, 1, 1 } },
	{ "snapshot by userfaultfd, every 4th page", AROUND_DEFAULT, restore, { STRIDED, 4, 1 } },
	{ "snapshot by userfaultfd, 1/4 at random", AROUND_DEFAULT, restore, { RANDOM, 4, 1 } },
	{ 0 },
};
