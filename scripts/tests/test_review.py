# SPDX-License-Identifier: GPL-2.0
"""Is a change of KVM's MMU noticed, and named? On small trees that are made up, with clang's lexer of the build root."""

import shutil
import unittest

import buildroot
import support

WATCHED = """
# all of it
arch/x86/kvm/mmu/*.[ch]
virt/kvm/kvm_main.c: watched_one record
"""
MMU = """\
#include <linux/nothing-that-is-here.h>

static bool __read_mostly enabled = true;
module_param_named(enabled, enabled, bool, 0444);

#define for_each(item, list) \\
	for (item = (list);  \\
	     item; item = item->next)

struct walker {
	u64 addr;	/* a comment */
	int level[3];
};

BUILD_ACCESSOR(cr0, wp, X86_CR0_WP);

#ifdef CONFIG_ONE
static inline int variant(struct kvm *kvm) { return 1; }
#else
static inline int variant(struct kvm *kvm) { return 2; }
#endif

static const struct kernel_param_ops ops = {
	.set = set_it,
};

static int FNAME(walk)(struct walker *w, u64 addr)
{
	if (unlikely(w->addr == addr)) {
#ifdef CONFIG_TWO
		return -1;
#endif
		return '}';
	}
	return w->level[0];
}

__printf(1, 2) static void say(const char *text, ...)
	__acquires(lock)
{
	puts("{ not a brace");
}

int kvm_mmu_load(struct kvm_vcpu *vcpu)
{
	struct { int a; } local = { .a = 1 };

	/* Takes the lock. */
	for_each(item, list)
		walk(item);
	return local.a;
}
EXPORT_SYMBOL_FOR_KVM_INTERNAL(kvm_mmu_load);
"""
MAIN = """\
struct record { int a; };
int watched_one(void) { return 1; }
int other(void) { return 1; }
"""


class Review(support.Checkout):
    def setUp(self):
        super().setUp()
        self.root = buildroot.ensure(any_kernel=True)
        directory = self.project / "rust" / "kvm" / "reviewed"
        directory.mkdir(parents=True)
        (directory / "watched.list").write_text(WATCHED)
        self.tree = self.make_tree("old", 12)

    def make_tree(self, name, sublevel, mmu=MMU, main=MAIN):
        tree = self.scratch / name
        for path, text in (("arch/x86/kvm/mmu/mmu.c", mmu), ("virt/kvm/kvm_main.c", main),
                           ("Makefile", f"VERSION = 7\nPATCHLEVEL = 2\nSUBLEVEL = {sublevel}\nEXTRAVERSION =\n")):
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_text(text)
        return tree

    def review(self, *arguments, code=0):
        done = self.root.run([self.project / "scripts" / "review", *arguments], cwd=self.project, check=False,
                             stdin=None, log=self.scratch / "log")
        text = (self.scratch / "log").read_text()
        (self.scratch / "log").unlink()
        self.assertNotIn("Traceback", text)
        self.assertEqual(done.returncode, code, text)
        return text

    def changed(self, before, after, source=MMU, name="new"):
        """What check names when a text of the source is replaced."""
        self.assertEqual(source.count(before), 1, before)
        text = source.replace(before, after)
        tree = self.make_tree(name, 13, **{"mmu" if source is MMU else "main": text})
        lines = self.review("check", tree, code=1).splitlines()
        return [line.strip().partition(": ")[2] for line in lines if line.startswith("  arch") or line.startswith("  virt")]

    def test_a_reviewed_tree_is_unchanged(self):
        self.review("accept", self.tree)
        self.assertIn("unchanged since reviewed (7.2.12)", self.review("check", self.tree))

    def test_comments_and_white_space_are_no_change(self):
        self.review("accept", self.tree)
        text = MMU.replace("/* Takes the lock. */", "// Something else").replace("\treturn local.a;", "\n\n   return  local . a ;")
        text = text.replace("(list);  \\\n\t     item;", "(list); item; \\\n\t")
        found = self.review("check", self.make_tree("new", 13, text))
        self.assertIn("unchanged since reviewed (7.2.12), in 7.2.13", found)

    def test_the_piece_that_changed_is_named(self):
        self.review("accept", self.tree)
        for before, after, name in (
                ("return local.a;", "return local.a + 1;", "kvm_mmu_load"),
                ("return w->level[0];", "return w->level[1];", "FNAME(walk)"),
                ("\t\treturn -1;", "\t\treturn -2;", "FNAME(walk)"),
                ("{ return 1; }", "{ return 3; }", "variant"),
                ("{ return 2; }", "{ return 3; }", "variant"),
                ("int level[3];", "int level[4];", "struct walker"),
                ("item = item->next", "item = next(item)", "#define for_each"),
                (".set = set_it", ".set = set_other", "ops"),
                ("enabled = true", "enabled = false", "enabled"),
                ("BUILD_ACCESSOR(cr0, wp, X86_CR0_WP)", "BUILD_ACCESSOR(cr0, wp, X86_CR0_PG)", "BUILD_ACCESSOR(cr0, wp)"),
                ("#ifdef CONFIG_ONE", "#ifdef CONFIG_THREE", "(conditions and includes)"),
                ("{ not a brace", "} not a brace", "say"),
                ("EXPORT_SYMBOL_FOR_KVM_INTERNAL(kvm_mmu_load)", "EXPORT_SYMBOL_GPL(kvm_mmu_load)",
                 "EXPORT_SYMBOL_FOR_KVM_INTERNAL(kvm_mmu_load) (gone), EXPORT_SYMBOL_GPL(kvm_mmu_load)")):
            with self.subTest(name):
                self.assertEqual(self.changed(before, after), [name])

    def test_of_a_file_with_names_only_those_count(self):
        self.review("accept", self.tree)
        self.assertEqual(self.changed("int watched_one(void) { return 1; }", "int watched_one(void) { return 2; }", MAIN),
                         ["watched_one"])
        self.assertEqual(self.changed("int a;", "int a, b;", MAIN), ["struct record"])
        other = self.make_tree("other", 13, main=MAIN.replace("int other(void)", "int another(int x)"))
        self.review("check", other)

    def test_the_nearest_kernel_of_the_series_is_compared_with(self):
        self.review("accept", self.tree)
        second = self.make_tree("second", 13, MMU.replace("return local.a;", "return 0;"))
        self.review("accept", second)
        self.assertIn("unchanged since reviewed (7.2.13)", self.review("check", second))
        self.assertIn("unchanged since reviewed (7.2.12)", self.review("check", self.tree))
        # The second is kept as what differs from the first.
        self.assertEqual((self.project / "rust/kvm/reviewed/7.2.13").read_text().count("\tarch"), 1)
        third = self.make_tree("third", 14, MMU.replace("return local.a;", "return 0;").replace("int level[3]", "int level[2]"))
        text = self.review("check", third, code=1)
        self.assertIn("1 pieces of 7.2.14 are not as they were reviewed (7.2.13)", text)

    def test_what_is_not_reviewed_is_refused_with_what_to_do(self):
        self.review("accept", self.tree)
        new = self.make_tree("new", 13, MMU.replace("return local.a;", "return 0;"))
        header = self.scratch / "reviewed.h"
        self.assertIn("make REVIEWED=no", self.review("check", "--header", header, new, code=1))
        self.assertFalse(header.exists())
        self.review("check", "--header", header, "--unreviewed", new)
        self.assertIn("#define RMMU_REVIEWED 0\n", header.read_text())
        self.assertIn("7.2.13, not reviewed: 1 pieces of KVM's MMU differ from 7.2.12: kvm_mmu_load", header.read_text())
        self.review("check", "--header", header, self.tree)
        self.assertIn("#define RMMU_REVIEWED 1\n", header.read_text())

    def test_diff_shows_the_pieces_of_both_trees(self):
        new = self.make_tree("new", 13, MMU.replace("return local.a;", "return 0;").replace("int level[3]", "int level[2]"))
        text = self.review("diff", self.tree, new, code=1)
        self.assertIn("# 7.2.12 to 7.2.13: 2 pieces differ", text)
        for line in ("-\treturn local.a;", "+\treturn 0;", "-\tint level[3];", "+\tint level[2];"):
            self.assertIn(line, text.splitlines())
        self.assertIn("0 pieces differ", self.review("diff", self.tree, self.tree))

    def test_what_cannot_be_cut_is_an_error(self):
        self.review("accept", self.tree)
        for name, text in (("open", MMU + "int f(void) {\n"), ("close", MMU + "}\n")):
            with self.subTest(name):
                tree = self.make_tree(name, 13, text)
                self.assertIn("bracket", self.review("check", "--unreviewed", tree, code=1))

    def test_a_tree_without_the_mmu_is_an_error(self):
        self.review("accept", self.tree)
        shutil.rmtree(self.tree / "arch")
        self.assertIn("has no arch/x86/kvm/mmu/*.[ch]", self.review("check", "--unreviewed", self.tree, code=1))


class OfTheProject(unittest.TestCase):
    def test_each_name_that_is_watched_is_in_a_reviewed_kernel(self):
        directory = support.SCRIPTS.parent / "rust" / "kvm" / "reviewed"
        known = {line.split("\t")[2].split()[-1] for path in directory.iterdir() if path.name[0].isdigit()
                 for line in path.read_text().splitlines() if "\t" in line}
        rows = [line.partition("#")[0].partition(":")[2].split() for line in (directory / "watched.list").read_text().splitlines()]
        names = {name for row in rows for name in row}
        self.assertTrue(names)
        self.assertEqual(names - known, set())
