// SPDX-License-Identifier: GPL-2.0
/*
 * fentry_user FUNCTION: puts a BPF program on the entry of a function of kvm.ko, as tracing tools
 * do, says "ready", and takes it away when standard input ends. Exit code 1, with the reason,
 * when the kernel refuses.
 */
#include <errno.h>
#include <linux/bpf.h>
#include <linux/btf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define BTF_DIR "/sys/kernel/btf/"

static int fail(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	return 1;
}

static long bpf(int command, union bpf_attr *attr)
{
	return syscall(SYS_bpf, command, attr, sizeof(*attr));
}

static struct btf_header *read_btf(const char *path)
{
	size_t size = 0, room = 16 << 20, got;
	char *blob = malloc(room);
	FILE *file = fopen(path, "r");

	while (file && size < room && (got = fread(blob + size, 1, room - size, file)) > 0)
		size += got;
	if (!size) {
		fprintf(stderr, "%s: %s\n", path, strerror(errno));
		exit(1);
	}
	fclose(file);
	return (struct btf_header *)blob;
}

/* What follows a type's record. */
static size_t trailer(const struct btf_type *type)
{
	uint32_t members = BTF_INFO_VLEN(type->info);

	switch (BTF_INFO_KIND(type->info)) {
	case BTF_KIND_INT:
	case BTF_KIND_VAR:
	case BTF_KIND_DECL_TAG:
		return 4;
	case BTF_KIND_ARRAY:
	case BTF_KIND_STRUCT:
	case BTF_KIND_UNION:
	case BTF_KIND_ENUM64:
	case BTF_KIND_DATASEC:
		return 12 * (BTF_INFO_KIND(type->info) == BTF_KIND_ARRAY ? 1 : members);
	case BTF_KIND_ENUM:
	case BTF_KIND_FUNC_PROTO:
		return 8 * members;
	default:
		return 0;
	}
}

/* The number of types; or with a name, the position of the function of that name, from 1. */
static uint32_t types(const struct btf_header *btf, uint32_t first_string, const char *function)
{
	const char *base = (const char *)btf + btf->hdr_len;
	const char *at = base + btf->type_off, *end = at + btf->type_len;
	uint32_t count = 0;

	while (at < end) {
		const struct btf_type *type = (const void *)at;

		count++;
		if (function && BTF_INFO_KIND(type->info) == BTF_KIND_FUNC && type->name_off >= first_string &&
		    !strcmp(base + btf->str_off + type->name_off - first_string, function))
			return count;
		at += sizeof(*type) + trailer(type);
	}
	return function ? 0 : count;
}

/* A file descriptor of kvm.ko's BTF. */
static int kvm_btf(void)
{
	union bpf_attr attr = { 0 };

	while (!bpf(BPF_BTF_GET_NEXT_ID, &attr)) {
		union bpf_attr open = { .btf_id = attr.next_id }, ask = { 0 };
		char name[64] = "";
		struct bpf_btf_info info = { .name = (uintptr_t)name, .name_len = sizeof(name) };
		int fd = bpf(BPF_BTF_GET_FD_BY_ID, &open);

		if (fd < 0)
			return -1;
		ask.info.bpf_fd = fd;
		ask.info.info = (uintptr_t)&info;
		ask.info.info_len = sizeof(info);
		if (bpf(BPF_OBJ_GET_INFO_BY_FD, &ask))
			return -1;
		if (!strcmp(name, "kvm"))
			return fd;
		close(fd);
		attr.start_id = open.btf_id;
	}
	return -1;
}

int main(int argc, char **argv)
{
	/* r0 = 0; exit */
	struct bpf_insn program[] = { { .code = BPF_ALU64 | BPF_MOV | BPF_K }, { .code = BPF_JMP | BPF_EXIT } };
	static char log[65536];
	union bpf_attr load = { .prog_type = BPF_PROG_TYPE_TRACING }, attach = { 0 };
	struct btf_header *vmlinux, *kvm;
	uint32_t position;
	int fd;

	if (argc != 2) {
		fprintf(stderr, "usage: fentry_user FUNCTION\n");
		return 2;
	}
	vmlinux = read_btf(BTF_DIR "vmlinux");
	kvm = read_btf(BTF_DIR "kvm");
	position = types(kvm, vmlinux->str_len, argv[1]);
	if (!position) {
		fprintf(stderr, "kvm.ko's BTF has no function %s\n", argv[1]);
		return 1;
	}
	load.insns = (uintptr_t)program;
	load.insn_cnt = 2;
	load.license = (uintptr_t)"GPL";
	load.expected_attach_type = BPF_TRACE_FENTRY;
	/* A module's types go on where the kernel's end; type 0 is in neither. */
	load.attach_btf_id = types(vmlinux, 0, NULL) + position;
	load.log_buf = (uintptr_t)log;
	load.log_size = sizeof(log);
	load.log_level = 1;
	fd = kvm_btf();
	if (fd < 0)
		return fail("the BTF of kvm.ko");
	load.attach_btf_obj_fd = fd;
	fd = bpf(BPF_PROG_LOAD, &load);
	if (fd < 0) {
		fprintf(stderr, "%s", log);
		return fail("loading the program");
	}
	attach.raw_tracepoint.prog_fd = fd;
	fd = bpf(BPF_RAW_TRACEPOINT_OPEN, &attach);
	if (fd < 0)
		return fail("attaching the program");
	puts("ready");
	fflush(stdout);
	while (getchar() != EOF)
		;
	return 0;
}
