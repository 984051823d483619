# SPDX-License-Identifier: GPL-2.0
"""The functions of in-tree KVM's MMU, taken from its source."""

import re
from pathlib import Path

# The tree's own layout. paging_tmpl.h is compiled once for each kind of guest paging.
SOURCES = ("mmu.c", "tdp_mmu.c", "tdp_iter.c", "spte.c", "page_track.c")
TEMPLATE = "paging_tmpl.h"
PREFIXES = ("paging32_", "paging64_", "ept_")

# A definition starts in the first column and its brace stands alone on a line.
_DEFINITION = re.compile(r"^(?!#|typedef|struct \w+ \{)[a-z][^;{}#=]*?\b(\w+)\(((?:[^;{}])*?)\)\n\{", re.MULTILINE)
_TEMPLATE_NAME = re.compile(r"^(?!#)[a-z][^;{}#=]*?\bFNAME\((\w+)\)\([^;{}]*?\)\n\{", re.MULTILINE)


def functions(tree):
    """Names of all functions, static ones included, sorted."""
    directory = Path(tree) / "arch/x86/kvm/mmu"
    names = set()
    for source in SOURCES:
        names |= {match.group(1) for match in _DEFINITION.finditer((directory / source).read_text())}
    template = (directory / TEMPLATE).read_text()
    for match in _TEMPLATE_NAME.finditer(template):
        names |= {prefix + match.group(1) for prefix in PREFIXES}
    return sorted(names)
