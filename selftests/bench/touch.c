// SPDX-License-Identifier: GPL-2.0
/*
 * The guest that touches pages, and the memory it touches.
 */
#include <fcntl.h>
#include <linux/memfd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "bench.h"

guest_inline uint64_t cycles(void)
{
	uint32_t low, high;

	/* What comes before is done, what comes after has not begun. */
	__asm__ volatile("lfence; rdtsc; lfence" : "=a"(low), "=d"(high) : : "memory");
	return (uint64_t)high << 32 | low;
}

guest_code void touch_pages(uint64_t shared)
{
	volatile struct touch *order = (void *)shared;

	for (;;) {
		uint64_t base = order->base, mask = order->pages - 1, count = order->count;
		uint64_t pattern = order->pattern, stride = order->stride, write = order->write;
		uint64_t samples = order->samples, state = 1, start = 0;

		for (uint64_t i = 0; i < count; i++) {
			uint64_t page, address;

			if (pattern == SEQUENTIAL)
				page = i;
			else if (pattern == STRIDED)
				/* Once around, then the next page of each stride. */
				page = (i * stride & mask) + i * stride / (mask + 1);
			else {
				/* A full period over the region: no page twice. */
				state = (state * 0x5851f42d4c957f2dUL + 0x14057b7ef767814fUL) & mask;
				page = state;
			}
			address = base + page * PAGE_SIZE;
			if (samples)
				start = cycles();
			if (write)
				store(address, i);
			else
				load(address);
			if (samples)
				store(samples + i * 8, cycles() - start);
		}
		guest_sync(1);
	}
}

struct vcpu *touch_vcpu(struct vm *vm)
{
	struct vcpu *vcpu = vm_vcpu(vm, touch_pages, VM_SHARED_GPA);
	struct touch warm_up = { .base = SAMPLES_GPA, .pages = MAX_SAMPLES * 8 / PAGE_SIZE, .write = 1 };

	/* The guest's own code, tables, stack and samples are mapped before anything is measured. */
	warm_up.count = warm_up.pages;
	touch(vcpu, warm_up);
	return vcpu;
}

uint64_t touch(struct vcpu *vcpu, struct touch order)
{
	uint64_t start;

	if (order.samples && order.count > MAX_SAMPLES)
		bail("too many samples");
	memcpy(vcpu->vm->shared, &order, sizeof(order));
	start = now_ns();
	if (vcpu_run_to_sync(vcpu) != 1)
		bail("the guest did not finish");
	return now_ns() - start;
}

static int by_value(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return (x > y) - (x < y);
}

double samples_median(struct vm *vm, uint64_t count)
{
	uint64_t *samples = (void *)(vm->low + SAMPLES_GPA);

	qsort(samples, count, sizeof(*samples), by_value);
	return (samples[(count - 1) / 2] + samples[count / 2]) / 2.0;
}

double cycles_to_ns(struct vcpu *vcpu, double cycles)
{
	return cycles * 1e6 / must(ioctl(vcpu->fd, KVM_GET_TSC_KHZ, 0));
}

static int memory_file(enum backing kind, uint64_t size)
{
	char path[256], *block;
	int fd;

	if (kind == SHMEM) {
		fd = must(memfd_create("bench", MFD_CLOEXEC));
		must(ftruncate(fd, size));
		return fd;
	}
	snprintf(path, sizeof(path), "%s/memory-file", bench_file_dir);
	fd = must(open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600));
	if (lseek(fd, 0, SEEK_END) < (off_t)size) {
		block = malloc(MIB);
		memset(block, 0x5a, MIB);
		for (uint64_t at = 0; at < size; at += MIB)
			if (pwrite(fd, block, MIB, at) != MIB)
				bail("%s: %m", path);
		free(block);
		must(fsync(fd));
	}
	return fd;
}

/* Read every page, so that it is in the page cache, and if it is to be resident, in our page tables. */
static void read_pages(const uint8_t *base, uint64_t size)
{
	for (uint64_t at = 0; at < size; at += PAGE_SIZE)
		(void)*(const volatile uint8_t *)(base + at);
}

uint8_t *backing_map(enum backing kind, uint64_t size, bool resident)
{
	uint8_t *base = memory(size, kind == HUGE);
	int fd;

	if (kind == ANON || kind == HUGE) {
		if (resident)
			memset(base, 0x5a, size);
		return base;
	}
	fd = memory_file(kind, size);
	if (mmap(base, size, PROT_READ | PROT_WRITE, MAP_FIXED | (kind == SHMEM ? MAP_SHARED : MAP_PRIVATE), fd, 0) != base)
		bail("mmap of a memory file: %m");
	close(fd);
	must(madvise(base, size, MADV_NOHUGEPAGE));
	if (kind == SHMEM && resident)
		memset(base, 0x5a, size);
	else if (kind == FILE_PRIVATE) {
		read_pages(base, size);
		if (!resident) {
			/* In the page cache, but not in our page tables: as a snapshot is when it is restored. */
			must(madvise(base, size, MADV_DONTNEED));
		}
	}
	return base;
}

void backing_unmap(uint8_t *base, uint64_t size)
{
	must(munmap(base, size));
}
