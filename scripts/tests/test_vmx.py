# SPDX-License-Identifier: GPL-2.0
"""The machine with VMX, before it runs: memory, tables, and modules without signatures."""

import struct
import unittest

import bochs
import initramfs
import kernelimage
import suites
import testlist
import testvm


class Memory(unittest.TestCase):
    def test_all_of_a_mode_fits_into_what_bochs_takes(self):
        for name, mode in testvm.MODES.items():
            if not mode.model:
                continue
            with self.subTest(name):
                options = testvm.Config(mode=name)._vmx_options(_NoEnvironment())
                total = sum(size for _, size in options.ranges())
                self.assertEqual(total, (bochs.MOST_MIB - 1) * bochs.MIB)

    def test_the_far_memory_has_what_would_be_a_level_in_its_address(self):
        start, size = testvm.MODES["ept"].far_memory[0]
        self.assertEqual({address >> 32 & 0xf for address in range(start, start + size, bochs.MIB)}, {5})

    def test_boot_params_have_all_ranges(self):
        ranges = [(1 << 20, 1023 << 20), (20 << 30, 1 << 30)]
        page = kernelimage._params(bytes(0x1000), 0x1234, (0x5000000, 77), ranges)
        table = [struct.unpack_from("<QQI", page, 0x2D0 + 20 * index) for index in range(page[0x1E8])]
        self.assertEqual([part[:2] for part in table if part[2] == 1][1:], ranges)
        self.assertEqual(struct.unpack_from("<Q", page, kernelimage.ENTRY)[0], 0x1234)


class MultiProcessorTable(unittest.TestCase):
    def test_checksums_and_count(self):
        for cpus in (1, 2, 4):
            with self.subTest(cpus):
                data = kernelimage._mp_table(cpus)
                length, = struct.unpack_from("<H", data, 16 + 4)
                self.assertEqual(len(data), 16 + length)
                self.assertEqual(sum(data[:16]) % 256, 0)
                self.assertEqual(sum(data[16:]) % 256, 0)
                entries, = struct.unpack_from("<H", data, 16 + 34)
                self.assertEqual(16 + 44 + 20 * cpus + 8 * (entries - cpus), len(data))


class Modules(unittest.TestCase):
    def test_a_signature_goes_and_nothing_else(self):
        signature = b"s" * 300
        signed = b"module" + signature + struct.pack(">BBBBB3xI", 0, 0, 2, 0, 0, len(signature)) + initramfs._SIGNED
        self.assertEqual(initramfs._unsigned(signed), b"module")
        self.assertEqual(initramfs._unsigned(b"module"), b"module")


class Tests(unittest.TestCase):
    def test_a_mode_takes_results_of_modes_that_exist(self):
        for mode in testvm.MODES.values():
            self.assertLessEqual(set(mode.like), set(testvm.MODES))

    def test_the_nearest_column_counts(self):
        table = testlist.Expectations(["default", "ept"], {"a": {"default": "PASS", "ept": "SKIP"}})
        self.assertEqual(table.of("a", ["ept-noad", *testvm.MODES["ept-noad"].like, "default"])[0], {"SKIP"})

    def test_a_mode_that_nobody_asked_for_gets_tests_that_are_meant_for_it(self):
        for suite in suites.load():
            everything = suites.select(suite.tests, True, "normal", None, False, True)
            chosen = suites.select(suite.tests, True, "vmx", None, False, True)
            self.assertEqual(chosen, [test for test in everything if "vmx" in test.tags])
        own = {test.name for test in suites.select(suites.load()[0].tests, True, "vmx", None, False, True)}
        # What CI says of EPT rests on these.
        self.assertLessEqual({"smoke", "dirty_log", "nested", "notifier", "ept", "stats", "tracepoints", "interrupted_faults"},
                             own)


class _NoEnvironment:
    """Bochs is not needed to say what the machine is like."""

    @staticmethod
    def bochs():
        return None


if __name__ == "__main__":
    unittest.main()
