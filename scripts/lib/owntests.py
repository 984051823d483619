# SPDX-License-Identifier: GPL-2.0
"""Our own selftests: C programs and shell scripts under selftests/, built static and cached."""

from pathlib import Path

import buildroot

SOURCE = buildroot.PROJECT / "selftests"
IN_GUEST = "/selftests"


def files(env):
    """What to put into the test VM: [(guest path, host path)]."""
    return []
