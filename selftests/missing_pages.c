// SPDX-License-Identifier: GPL-2.0
/*
 * Memory that the host cannot give at once. Userfaultfd keeps pages away until the test brings them:
 *
 * - A guest that takes interrupts, with KVM's interrupt controller, is halted while a worker of KVM waits for the page
 *   (asynchronous page fault), and finds it mapped.
 * - For any other guest the vCPU's own thread waits, and a signal ends the wait.
 *
 * A page whose memory failed never comes: the thread gets SIGBUS.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "host.h"
#include "vm.h"

#define PAGES	16UL
#define SIZE	(PAGES * PAGE_SIZE)
/* A page holds its number and this. */
#define NUMBER	0x5a5a0000UL

/* The guest: loads from each page in turn. */
guest_inline void load_pages(uint64_t result)
{
	for (uint64_t page = 0; page < PAGES; page++) {
		store(result, load(VM_TEST_GPA + page * PAGE_SIZE));
		guest_sync(page);
	}
}

static guest_code void load_all(uint64_t shared)
{
	load_pages(shared);
}

static guest_code void load_all_with_interrupts(uint64_t shared)
{
	__asm__ volatile("sti");
	load_pages(shared);
}

/* What waits for pages, and who waited for them. */
static struct {
	int uffd;
	uint8_t *base;
	pthread_t thread, vcpu_thread;
	pid_t vcpu_tid;
	/* Send a signal to whom waits, in place of this many pages. */
	int signals;
	unsigned int by_vcpu, by_others;
} keeper;

static void bring(uint64_t page)
{
	static uint64_t contents[PAGE_SIZE / 8];
	struct uffdio_copy copy = {
		.dst = (uintptr_t)keeper.base + page * PAGE_SIZE, .src = (uintptr_t)contents, .len = PAGE_SIZE,
	};

	contents[0] = NUMBER + page;
	if (ioctl(keeper.uffd, UFFDIO_COPY, &copy) && errno != EEXIST)
		bail("UFFDIO_COPY: %m");
}

static void *keep(void *unused)
{
	struct uffd_msg message;

	(void)unused;
	while (read(keeper.uffd, &message, sizeof(message)) == sizeof(message)) {
		uint64_t page = (message.arg.pagefault.address - (uintptr_t)keeper.base) / PAGE_SIZE;

		if (message.event != UFFD_EVENT_PAGEFAULT)
			break;
		if ((pid_t)message.arg.pagefault.feat.ptid == keeper.vcpu_tid)
			keeper.by_vcpu++;
		else
			keeper.by_others++;
		if (keeper.signals) {
			keeper.signals--;
			pthread_kill(keeper.vcpu_thread, SIGUSR1);
		} else {
			bring(page);
		}
	}
	return NULL;
}

static void keep_pages_away(void)
{
	struct uffdio_api api = { .api = UFFD_API, .features = UFFD_FEATURE_THREAD_ID };
	struct uffdio_register range;

	memset(&keeper, 0, sizeof(keeper));
	keeper.base = memory(SIZE, false);
	keeper.uffd = syscall(SYS_userfaultfd, O_CLOEXEC);
	if (keeper.uffd < 0 && errno == ENOSYS)
		skip_all("the kernel has no userfaultfd");
	must(keeper.uffd);
	must(ioctl(keeper.uffd, UFFDIO_API, &api));
	range = (struct uffdio_register){
		.range = { (uintptr_t)keeper.base, SIZE }, .mode = UFFDIO_REGISTER_MODE_MISSING,
	};
	must(ioctl(keeper.uffd, UFFDIO_REGISTER, &range));
	keeper.vcpu_thread = pthread_self();
	keeper.vcpu_tid = gettid();
	if (pthread_create(&keeper.thread, NULL, keep, NULL))
		bail("pthread_create failed");
}

static void stop_keeping(void)
{
	pthread_cancel(keeper.thread);
	pthread_join(keeper.thread, NULL);
	close(keeper.uffd);
	munmap(keeper.base, SIZE);
}

/* Pages that read as they must. */
static unsigned int right_pages(struct vm *vm, struct vcpu *vcpu)
{
	unsigned int right = 0;

	for (uint64_t page = 0; page < PAGES; page++)
		if (vcpu_run_to_sync(vcpu) == page)
			right += *(uint64_t *)vm->shared == NUMBER + page;
	return right;
}

static void asynchronous(void)
{
	uint64_t taken, fixed, faults = kvm_tracks_use_by_faults() ? 2 : 1;
	struct vcpu *vcpu;
	struct vm vm;

	keep_pages_away();
	vm_create(&vm);
	must(ioctl(vm.fd, KVM_CREATE_IRQCHIP, 0));
	must(vm_slot(&vm, 1, VM_TEST_GPA, SIZE, keeper.base, 0));
	vcpu = vm_vcpu(&vm, load_all_with_interrupts, VM_SHARED_GPA);
	/* The first page is loaded along with the guest's code and tables. */
	if (vcpu_run_to_sync(vcpu) != 0)
		bail("the guest did not begin");
	ok(*(uint64_t *)vm.shared == NUMBER, "a page that comes later is what the guest reads");
	taken = kvm_stat(vcpu->fd, "pf_taken");
	fixed = kvm_stat(vcpu->fd, "pf_fixed");
	for (uint64_t page = 1; page < PAGES; page++)
		if (vcpu_run_to_sync(vcpu) != page || *(uint64_t *)vm.shared != NUMBER + page)
			bail("page %lu is not what was brought", page);
	ok(keeper.by_others == PAGES, "a worker of KVM waited for each page, and not the vCPU (%u, %u)",
	   keeper.by_others, keeper.by_vcpu);
	taken = kvm_stat(vcpu->fd, "pf_taken") - taken;
	fixed = kvm_stat(vcpu->fd, "pf_fixed") - fixed;
	ok(taken == faults * (PAGES - 1) && fixed == faults * (PAGES - 1),
	   "it was mapped when the guest went on: %lu faults for each page (%lu, %lu fixed)", faults, taken, fixed);
	vm_destroy(&vm);
	stop_keeping();
}

static void on_signal(int number)
{
	(void)number;
}

static void waiting(void)
{
	struct sigaction action = { .sa_handler = on_signal };
	struct vcpu *vcpu;
	struct vm vm;

	must(sigaction(SIGUSR1, &action, NULL));
	keep_pages_away();
	keeper.signals = 1;
	vm_create(&vm);
	must(vm_slot(&vm, 1, VM_TEST_GPA, SIZE, keeper.base, 0));
	vcpu = vm_vcpu(&vm, load_all, VM_SHARED_GPA);
	ok(ioctl(vcpu->fd, KVM_RUN, 0) == -1 && errno == EINTR && vcpu->run->exit_reason == KVM_EXIT_INTR,
	   "a signal ends KVM_RUN while it waits for a page: EINTR");
	ok(keeper.by_vcpu == 1 && !keeper.by_others, "the vCPU's own thread had waited");
	bring(0);
	ok(right_pages(&vm, vcpu) == PAGES, "the guest goes on, and waits for all other pages");
	ok(!keeper.by_others, "no worker of KVM did");
	vm_destroy(&vm);
	stop_keeping();
}

static struct vcpu *failing;
static volatile int failures;
static siginfo_t failure;

static void on_failure(int number, siginfo_t *info, void *context)
{
	(void)number, (void)context;
	failure = *info;
	failures++;
	failing->run->immediate_exit = 1;
}

static void lost(void)
{
	struct sigaction action = { .sa_sigaction = on_failure, .sa_flags = SA_SIGINFO };
	uint8_t *base = memory(SIZE, false);
	struct vm vm;

	memset(base, 0, SIZE);
	for (uint64_t page = 0; page < PAGES; page++)
		*(uint64_t *)(base + page * PAGE_SIZE) = NUMBER + page;
	vm_create(&vm);
	must(vm_slot(&vm, 1, VM_TEST_GPA, SIZE, base, 0));
	failing = vm_vcpu(&vm, load_all, VM_SHARED_GPA);
	for (uint64_t page = 0; page < 3; page++)
		vcpu_run_to_sync(failing);
	must(sigaction(SIGBUS, &action, NULL));
	if (madvise(base + 3 * PAGE_SIZE, PAGE_SIZE, MADV_HWPOISON)) {
		if (errno != EINVAL && errno != EPERM)
			bail("MADV_HWPOISON: %m");
		skip("a page whose memory failed", "the kernel cannot make memory fail");
		skip("its address", "the kernel cannot make memory fail");
		skip("the other pages", "the kernel cannot make memory fail");
	} else {
		/* Who makes it fail is told as well. */
		failures = 0;
		failing->run->immediate_exit = 0;
		ok(ioctl(failing->fd, KVM_RUN, 0) == -1 && errno == EINTR && failures == 1,
		   "a load from memory that failed: SIGBUS, and KVM_RUN ends");
		ok(failure.si_code == BUS_MCEERR_AR && (uint8_t *)failure.si_addr == base + 3 * PAGE_SIZE &&
		   failure.si_addr_lsb == 12, "which names the page (code %d, %p, 2^%d bytes)", failure.si_code,
		   failure.si_addr, failure.si_addr_lsb);
		/* As a monitor would, new memory in its place. */
		if (mmap(base + 3 * PAGE_SIZE, PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1,
			 0) == MAP_FAILED)
			bail("mmap: %m");
		*(uint64_t *)(base + 3 * PAGE_SIZE) = NUMBER + 3;
		failing->run->immediate_exit = 0;
		ok(vcpu_run_to_sync(failing) == 3 && *(uint64_t *)vm.shared == NUMBER + 3 && vcpu_run_to_sync(failing) == 4,
		   "with other memory in its place the guest goes on");
	}
	vm_destroy(&vm);
	munmap(base, SIZE);
}

int main(void)
{
	plan(10);
	asynchronous();
	waiting();
	lost();
	return finish();
}
