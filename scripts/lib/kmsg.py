# SPDX-License-Identifier: GPL-2.0
"""Judge what the kernel said: which lines of a kernel log mean that something is broken."""

import re

# Reports which an undisturbed kernel never makes.
_REPORTS = re.compile(
    r"WARNING: (?!See http)|\bBUG:|\bBUG\b at |Oops|general protection fault|Kernel panic"
    r"|INFO: task .* blocked for more than|self-detected stall|detected stalls|rcu:.*stall"
    r"|soft lockup|hard LOCKUP|possible circular locking|possible recursive locking"
    r"|inconsistent lock state|suspicious RCU usage|scheduling while atomic"
    r"|sleeping function called from invalid context|Unable to handle|refcount_t:"
    r"|unchecked MSR access error|Call Trace:|Bad page state|bad page map|list_(add|del) corruption"
    r"|Objects remaining|INFO: trying to register non-static key|ODEBUG: |kmemleak: .*disabled"
)

# What the kernel says of an allocation that failed: a report with a trace, and no fault of anybody's.
_NO_MEMORY = re.compile(r"page allocation failure|vmalloc error: ")

# Of in-tree KVM, by lockdep: the timer of Xen's interface takes in its interrupt a lock that may sleep on PREEMPT_RT. What
# the report begins with, and who is among its first lines.
_IN_TREE = ("BUG: Invalid wait context", "kvm_xen_set_evtchn_fast")

_LEVEL = re.compile(r"^<(\d+)>")
_RMMU = re.compile(r"\b(kvm_)?rmmu: ")
_VM_MARK = re.compile(r"rmmu-vm: (begin|end) ")

KERN_ERR = 3


def problems(text, allow_rmmu_errors=False, allow_no_memory=False):
    """The lines of a log that fail a test. Levels, as `dmesg -r` gives them, are optional."""
    found = []
    excused = False
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if allow_no_memory and _NO_MEMORY.search(line):
            excused = True
        elif _IN_TREE[0] in line and any(_IN_TREE[1] in near for near in lines[number:number + 8]):
            excused = True
            continue
        elif excused and "Call Trace:" in line:
            excused = False
            continue
        if _VM_MARK.search(line):
            continue
        level = _LEVEL.match(line)
        severity = int(level.group(1)) & 7 if level else 7
        is_ours = severity <= KERN_ERR and _RMMU.search(line)
        if _REPORTS.search(line) or (is_ours and not allow_rmmu_errors):
            found.append(line)
    return found


# A trap on an instruction for debuggers, in the kernel. What it prints after that until it stops the machine.
_INT3 = re.compile(r"Oops: int3: 0000 \[#1\]")
_AFTER_INT3 = re.compile(r"Call Trace:|Kernel panic - not syncing: Fatal exception( in interrupt)?$|Oops: int3: 0000 \[#[2-9]\]")
# An INT3 that is there, in any dump of code: the trap leaves the CPU behind it.
_INT3_IS_THERE = re.compile(r"\bCode: (?:[0-9a-f]{2} )*cc <")
# The first lines about registers are those of the trap; others, of other CPUs and of user space, follow.
_TRAP = re.compile(r"RIP: 0010:(\w[\w.]*\+0x[0-9a-f]+/0x[0-9a-f]+)\n.*\bCode: ((?:[0-9a-f]{2} )+)<([0-9a-f]{2})>((?: [0-9a-f]{2})*)")
# What the kernel writes over other instructions while they may be executed: NOPs of five and two bytes, jumps, calls.
_POKED = (("0f", "1f", "44", "00", "00"), ("66", "90"), ("e9",), ("eb",), ("e8",))
_STACK_OF_RMMU = re.compile(r"\[kvm_rmmu\b")


def emulator_fault(text):
    """Where the emulator lost its race with the kernel's poking of its own text, if that is all the log reports; or None.

    The kernel changes an instruction that others may be executing by way of an INT3, and knows where that is. The emulator
    can run what it translated from the INT3 when the kernel is done, and has forgotten it. So can its other CPUs, until the
    first one has stopped them. The signature is exact: the only reports are of INT3s, the first of them in the kernel proper;
    the dumped code shows that none is there, but one of the instructions that the kernel writes that way; and no function of
    rmmu is on a stack.
    """
    reports = problems(text)
    if not reports or not _INT3.search(reports[0]) or not all(_AFTER_INT3.search(line) for line in reports[1:]):
        return None
    oops = text[text.index(reports[0]):]
    trap = _TRAP.match(oops, oops.find("RIP: "))
    if not trap or _STACK_OF_RMMU.search(oops) or _INT3_IS_THERE.search(oops):
        return None
    # The trap leaves the CPU behind the one byte of the INT3: the instruction that is there now begins before the mark.
    now = (trap[2].split()[-1], trap[3], *trap[4].split())
    return trap[1] if any(now[:len(poked)] == poked for poked in _POKED) else None


def excerpt(text, lines=60):
    """A log from its first problem on; its end when there is none."""
    every = text.splitlines()
    for number, line in enumerate(every):
        if not _VM_MARK.search(line) and _REPORTS.search(line):
            return "\n".join(every[max(0, number - 2):number + lines])
    return "\n".join(every[-lines:])
