# SPDX-License-Identifier: GPL-2.0
"""Lists of mistakes to be made on purpose: a text in a file, what it is replaced by, and what has to notice.

A list is a TOML file of [[mutation]] tables with name, file, find, replace, and either caught_by, a list of tests, or
harmless, the reason why nothing can notice.
"""

import shutil
import tomllib

import ui


class Mutations:
    """A list, for files below `source`, that are broken in a copy of it."""

    def __init__(self, path, source, copy):
        self.path, self.source, self.copy = path, source, copy

    def load(self, patterns=()):
        """Those whose name contains one of the patterns, checked against the source."""
        found = tomllib.loads(self.path.read_text())["mutation"]
        for mutation in found:
            if ("caught_by" in mutation) == ("harmless" in mutation):
                raise ui.Error(f"{self.path}: '{mutation['name']}' needs either caught_by or harmless.")
            times = (self.source / mutation["file"]).read_text().count(mutation["find"])
            if times != 1:
                raise ui.Error(f"{self.path}: the text that '{mutation['name']}' replaces is {times} times in "
                               f"{mutation['file']}. Adapt the mutation to the source.")
        chosen = [m for m in found if not patterns or any(pattern in m["name"] for pattern in patterns)]
        if not chosen:
            raise ui.Error(f"no mutation has a name like that; they are in {self.path}.")
        return chosen

    def apply(self, mutation):
        source = (self.source / mutation["file"]).read_text()
        (self.copy / mutation["file"]).write_text(source.replace(mutation["find"], mutation["replace"]))

    def revert(self, mutation):
        shutil.copy(self.source / mutation["file"], self.copy / mutation["file"])


def check_each(mutations, chosen, check):
    """Makes one mistake after the other; returns the exit code. check(mutation) tells whether it was noticed."""
    wrong = 0
    for mutation in chosen:
        ui.line(mutation["name"])
        mutations.apply(mutation)
        try:
            good = check(mutation)
        except ui.Error as error:
            ui.note(f"ERROR: {error}")
            good = False
        mutations.revert(mutation)
        wrong += not good
    ui.line(f"{len(chosen)} mutations, {wrong} not noticed as expected")
    return 1 if wrong else 0
