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


def excerpt(text, lines=60):
    """A log from its first problem on; its end when there is none."""
    every = text.splitlines()
    for number, line in enumerate(every):
        if not _VM_MARK.search(line) and _REPORTS.search(line):
            return "\n".join(every[max(0, number - 2):number + lines])
    return "\n".join(every[-lines:])
