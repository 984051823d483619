// SPDX-License-Identifier: GPL-2.0
/*
 * The interfaces that turn a VM of the default type into an encrypted one (SEV) after it was created: for a VM of rmmu's they
 * are refused before they reach the vendor module, for a VM of in-tree KVM's they do reach it. The machine need not have SEV
 * for that: what the vendor module has for it is always called.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/klog.h>
#include <unistd.h>

#include "events.h"
#include "host.h"
#include "vm.h"

#define TRACING	"/sys/kernel/tracing/"

static const struct way {
	const char *name, *function;
	int cap;	/* 0: KVM_MEMORY_ENCRYPT_OP */
	uint32_t command;
	int refused;	/* errno */
} ways[] = {
	{ "KVM_SEV_INIT", "sev_mem_enc_ioctl", 0, KVM_SEV_INIT, ENOTTY },
	{ "KVM_SEV_ES_INIT", "sev_mem_enc_ioctl", 0, KVM_SEV_ES_INIT, ENOTTY },
	{ "KVM_CAP_VM_COPY_ENC_CONTEXT_FROM", "sev_vm_copy_enc_context_from", KVM_CAP_VM_COPY_ENC_CONTEXT_FROM, 0, EINVAL },
	{ "KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM", "sev_vm_move_enc_context_from", KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM, 0, EINVAL },
};
#define WAYS (sizeof(ways) / sizeof(ways[0]))

static bool append(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_APPEND);
	bool done = fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text);

	close(fd);
	return done;
}

static void probe(const char *function)
{
	char line[128];

	snprintf(line, sizeof(line), "p:rmmu_test/%s %s", function, function);
	if (!append(TRACING "kprobe_events", line) && errno != EEXIST)
		skip_all("this kernel's kvm_amd has no %s: %m", function);
}

static unsigned long calls(const char *function)
{
	FILE *profile = fopen(TRACING "kprobe_profile", "r");
	unsigned long hits, found = 0;
	char line[256], name[128];

	if (!profile)
		bail("kprobe_profile: %m");
	while (fgets(line, sizeof(line), profile))
		if (sscanf(line, " %127s %lu", name, &hits) == 2 && !strcmp(name, function))
			found = hits;
	fclose(profile);
	return found;
}

static int try_it(struct vm *vm, const struct way *way, int source)
{
	struct kvm_sev_cmd command = { .id = way->command, .sev_fd = -1 };
	struct kvm_enable_cap cap = { .cap = way->cap, .args = { source } };
	int ret = way->cap ? ioctl(vm->fd, KVM_ENABLE_CAP, &cap) : ioctl(vm->fd, KVM_MEMORY_ENCRYPT_OP, &command);

	return ret ? errno : 0;
}

int main(void)
{
	static struct vm own, in_tree;

	events_require();
	for (unsigned long i = 0; i < WAYS; i++)
		probe(ways[i].function);
	must(write_file(TRACING "events/rmmu_test/enable", "1") ? 0 : -1);
	plan(3 * WAYS + 3);
	own_new_vms(false);
	vm_create(&in_tree);
	own_new_vms(true);
	vm_create(&own);
	for (unsigned long i = 0; i < WAYS; i++) {
		unsigned long before = calls(ways[i].function);

		int error = try_it(&own, &ways[i], in_tree.fd);

		ok(error == ways[i].refused, "%s is refused for a VM of rmmu's (errno %d)", ways[i].name, error);
		ok(calls(ways[i].function) == before, "and does not reach the vendor module");
		before = calls(ways[i].function);
		try_it(&in_tree, &ways[i], own.fd);
		ok(calls(ways[i].function) == before + 1, "for a VM of in-tree KVM's it does");
	}
	unsigned long before = calls("sev_mem_enc_ioctl");
	int of_own = ioctl(own.fd, KVM_MEMORY_ENCRYPT_OP, 0), of_in_tree = ioctl(in_tree.fd, KVM_MEMORY_ENCRYPT_OP, 0);

	ok(of_own == of_in_tree && calls("sev_mem_enc_ioctl") == before + 2, "the question for it is answered for both");
	ok(vm_cap(&own, KVM_CAP_USER_MEMORY) == vm_cap(&in_tree, KVM_CAP_USER_MEMORY), "other questions are, too");

	static char log[1 << 20];

	log[must(klogctl(3, log, sizeof(log) - 1))] = 0;
	ok(strstr(log, "KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM refused") != NULL, "the log says what was refused");
	vm_destroy(&own);
	vm_destroy(&in_tree);
	write_file(TRACING "events/rmmu_test/enable", "0");
	write_file(TRACING "kprobe_events", "");
	return finish();
}
