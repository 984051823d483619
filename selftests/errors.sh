#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# What must be refused is refused with a message that says why, and what comes in an unusual
# order works: loading before kvm, a reload of kvm, unloading under a VM, ftrace switched off,
# somebody else on one of our functions.

. /selftests/lib/tap.sh
. /selftests/lib/rmmu.sh

# served COMMAND...: it succeeds, and rmmu owned a VM of it.
served() {
	before=$(rmmu_stat vms_owned_total)
	"$@" > /tmp/served.log 2>&1 || { note "$(tail -n 3 /tmp/served.log)"; return 1; }
	[ "$(rmmu_stat vms_owned_total)" -gt "$before" ]
}

fails() {
	! "$@" 2> /tmp/error
}

# rmmu printed a line with this text since the mark; it is shown.
said() {
	messages | grep "$1" | sed 's/^/# message: /' | grep .
}

before_kvm() {
	rmmu_unload && kvm_unload || return 1
	rmmu_load && kvm_load && served /selftests/smoke
}

kvm_reload() {
	kvm_unload || { note "rmmu pins kvm.ko: $(cat /sys/module/kvm/refcnt)"; return 1; }
	kvm_load && served /selftests/smoke
}

# After a failed check: kvm and rmmu loaded, whatever is there now.
recover() {
	rmmu_loaded && [ -e /dev/kvm ] && return
	rmmu_loaded && rmmu_unload
	kvm_load
	rmmu_load || bail "rmmu does not load any more"
}

hold_vm() {
	mkfifo /tmp/hold
	/selftests/hold_vm < /tmp/hold > /tmp/held &
	holder=$!
	exec 9> /tmp/hold
	until grep -q ready /tmp/held; do
		kill -0 $holder || return 1
		usleep 50000
	done
}

# A BPF program on a function that rmmu hooks, until fentry_gone.
fentry_user() {
	rm -f /tmp/fentry /tmp/fentry.log
	mkfifo /tmp/fentry
	/selftests/fentry_user kvm_mmu_load < /tmp/fentry > /tmp/fentry.log 2>&1 &
	fentry=$!
	exec 8> /tmp/fentry
	until grep -q ready /tmp/fentry.log; do
		kill -0 $fentry 2> /dev/null || { cat /tmp/fentry.log >&2; return 1; }
		usleep 50000
	done
}

fentry_gone() {
	exec 8>&-
	wait $fentry
}

release_vm() {
	exec 9>&-
	wait $holder && grep -q works /tmp/held
	released=$?
	rm /tmp/hold
	return $released
}

# Where TEXT is in FILE, in bytes.
offset_of() {
	strings -t d -n 8 "$2" | awk -v text="$1" 'index($0, text) { at = $1; sub(/^ *[0-9]+ /, ""); print at + index($0, text) - 1; exit }'
}

# A module that believes that struct kvm has its memslots where the kernel has mmu_lock: as if the layout had changed.
skewed_module() {
	at=$(offset_of mmu_lock. "$RMMU") && [ -n "$at" ] || return 1
	cp "$RMMU" /tmp/skewed.ko && printf memslots | dd of=/tmp/skewed.ko bs=1 seek="$at" conv=notrunc 2> /dev/null
}

beside_bpf() {
	rmmu_unload || bail "rmmu does not unload"
	mark_messages
	fentry_user || bail "the BPF program does not load"
	theirs=$(diverted_functions)
	check "with a BPF program on one function, loading fails" fails rmmu_load
	note "insmod says: $(cat /tmp/error)"
	check "with a message that names the function and the other user" said 'kvm_mmu_load .* bpf_trampoline_'
	check "and nothing but the BPF program's function is diverted" [ "$(diverted_functions)" = "$theirs" ]
	fentry_gone
	check "when the BPF program is gone it loads and serves" eval 'rmmu_load && served /selftests/smoke'
	check "a BPF program is refused on a function of ours now" fails fentry_user
	note "it says: $(cat /tmp/error)"
	check "and the VMs of rmmu do not notice" served /selftests/smoke
}

plan 33
rmmu_loaded || rmmu_load || bail "kvm_rmmu.ko does not load"
baseline=$(diverted_functions)

mark_messages
check "loaded before kvm, rmmu serves as soon as kvm comes" before_kvm
recover
check "kvm can be unloaded and loaded again under rmmu, and is served again" kvm_reload
recover

mark_messages
check "a VM of rmmu's is running" hold_vm
check "unloading rmmu under it is refused" fails rmmu_unload
note "rmmod says: $(cat /tmp/error)"
check "rmmu still owns it" [ "$(rmmu_stat vms_owned)" = 1 ]
check "switching ftrace off is refused" fails sh -c 'echo 0 > /proc/sys/kernel/ftrace_enabled'
note "the shell says: $(cat /tmp/error)"
check "ftrace is still on" [ "$(cat /proc/sys/kernel/ftrace_enabled)" = 1 ]
echo 1 > /proc/sys/kernel/ftrace_enabled
check "switching the TDP MMU off is refused" fails sh -c "echo 0 > $RMMU_SYS/parameters/tdp_mmu"
check "the VM works to its end" release_vm
check "then nothing of it is left" rmmu_idle
check "now the TDP MMU can be switched off" sh -c "echo 0 > $RMMU_SYS/parameters/tdp_mmu"
check "and a VM is rmmu's all the same" served /selftests/smoke
check "and on again" sh -c "echo 1 > $RMMU_SYS/parameters/tdp_mmu"
check "and rmmu unloads" rmmu_unload
check "no function is diverted then" [ -z "$(diverted_functions)" ]

mark_messages
check "a module for another layout of struct kvm can be made" skewed_module
check "it is refused" fails insmod /tmp/skewed.ko
note "insmod says: $(cat /tmp/error)"
check "with a message that names the struct and the member" said memslots
check "and nothing is diverted" [ -z "$(diverted_functions)" ]

mark_messages
insmod /selftests/modules/direct_user.ko function=kvm_mmu_page_fault || bail "the other user does not load"
theirs=$(diverted_functions)
check "with another user on one function, loading fails" fails rmmu_load
note "insmod says: $(cat /tmp/error)"
check "with a message that names the function and the other user" said 'kvm_mmu_page_fault .*\[direct_user\]'
check "and nothing but the other user's function is diverted" [ "$(diverted_functions)" = "$theirs" ]
rmmod direct_user
check "when the other user is gone it loads and serves" eval 'rmmu_load && served /selftests/smoke'
check "all functions are diverted again" [ "$(diverted_functions)" = "$baseline" ]
check "the other user is refused now" fails insmod /selftests/modules/direct_user.ko function=kvm_mmu_page_fault

# The debug kernel has no BPF programs on functions.
if grep -q ' bpf_jit_charge_modmem$' /proc/kallsyms; then
	beside_bpf
else
	skip 6 "the kernel compiles no BPF programs"
fi

check "a value other than 0 and 1 for own_new_vms is refused" fails sh -c "echo 7 > $RMMU_SYS/parameters/own_new_vms"
own_new_vms 0
owned=$(rmmu_stat vms_owned_total)
check "with own_new_vms=0 a VM stays with in-tree KVM" eval \
	'/selftests/smoke > /dev/null && [ "$(rmmu_stat vms_owned_total)" = "$owned" ]'
own_new_vms 1
finish
