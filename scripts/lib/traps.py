# SPDX-License-Identifier: GPL-2.0
"""Whether the debug kernel notices mistakes, and the harness the kernel: each kind is made on purpose, in one boot."""

import kmemleak
import kmsg
import owntests
import testvm

MODULE = "/selftests/modules/debug_traps.ko"
# What the kernel's report has in it. Lockdep is quiet once it has reported a lock, and once KASAN has reported.
TRAPS = {
    "sleep_in_atomic": "sleeping function called from invalid context",
    "delete_twice": "list_del corruption",
    "dereference_without_rcu": "suspicious RCU usage",
    "lock_in_two_orders": "possible circular locking",
    "use_after_free": "KASAN",
}


def check(environment, tally, logs):
    """Results go into the tally."""
    config = testvm.Config(files=owntests.files(environment))
    logs.mkdir(parents=True, exist_ok=True)
    try:
        with testvm.TestVm(environment, config, logs / "console-traps.log") as vm:
            _check(vm, tally)
    except testvm.Crashed as crash:
        tally.add("the debug kernel notices mistakes", "FAIL", testvm.describe_crash(crash))


def _check(vm, tally):
    quiet = vm.run(f"insmod {MODULE} trap=none", 30)
    _add(tally, "without a mistake nothing is reported", not kmsg.problems(quiet.kernel) and "cancel" in quiet.output,
         quiet)
    for trap, words in TRAPS.items():
        done = vm.run(f"insmod {MODULE} trap={trap}", 30)
        noticed = any(words in line for line in kmsg.problems(done.kernel))
        _add(tally, f"{trap.replace('_', ' ')} is noticed", noticed, done)
    done = vm.run(f"insmod {MODULE} trap=leak", 30)
    leaks = kmemleak.scan(vm)
    _add(tally, "a leak is noticed", any("rmmu leaks this" in leak for leak in leaks.others), done, leaks.failed)


def _add(tally, name, held, done, more=""):
    tally.add(f"the debug kernel: {name}", "PASS" if held else "FAIL", f"{more} {done.output} {done.kernel[-2000:]}")
