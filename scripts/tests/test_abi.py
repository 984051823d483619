# SPDX-License-Identifier: GPL-2.0
"""What check-abi hides from rustc, so that a field which is used and not compared is an error."""

import importlib.machinery
import importlib.util
import unittest

import support

BINDINGS = """\
pub struct kvm {
    pub mm: *mut mm_struct,
    pub arch: kvm_arch,
    pub __bindgen_anon_1: kvm__bindgen_ty_1,
}
pub union kvm__bindgen_ty_1 {
    pub word: u32_,
    pub callback: ::core::option::Option<
        unsafe extern "C" fn(arg1: *mut kvm) -> ffi::c_int,
    >,
}
pub struct kvm_arch {
    pub vm_type: u8_,
    pub hidden: u8_,
}
pub struct role {
    pub word: u32_,
    pub __bindgen_anon_1: role_bits,
}
impl role_bits {
    pub fn level(&self) -> ffi::c_uint {
        0
    }
    pub fn set_level(&mut self, val: ffi::c_uint) {}
    pub fn access(&self) -> ffi::c_uint {
        0
    }
    pub unsafe fn access_raw(this: *const Self) -> ffi::c_uint {
        0
    }
}
pub struct rmmu_window {
    pub first: ffi::c_uint,
}
"""

LIST = """\
static LAYOUTS: &[Layout] = layouts! {
    kvm { mm, arch.vm_type, __bindgen_anon_1.word }
    role { word }
        [role_bits]: level by set_level;
};
"""


def script():
    loader = importlib.machinery.SourceFileLoader("check_abi", str(support.SCRIPTS / "check-abi"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("check_abi", loader))
    loader.exec_module(module)
    return module


class Hidden(unittest.TestCase):
    def setUp(self):
        self.script = script()
        self.bindings = self.script.Bindings(BINDINGS, self.script.layouts(LIST), self.script.bitfields(LIST))
        self.public = {line.strip().split("(")[0].split(":")[0] for line in self.bindings.hidden().splitlines()
                       if line.startswith("    pub ")}

    def test_what_is_listed_and_leads_to_it_stays_public(self):
        self.assertEqual(self.public, {
            "pub mm", "pub arch", "pub vm_type", "pub __bindgen_anon_1", "pub word", "pub fn level", "pub fn set_level",
            "pub first"})

    def test_a_pointer_to_a_function_is_hidden_whole(self):
        self.assertIn('    callback: ::core::option::Option<\n        unsafe extern "C" fn', self.bindings.hidden())

    def test_names_are_those_of_c(self):
        self.assertLessEqual({"kvm.mm", "kvm.arch", "kvm_arch.vm_type", "kvm.word", "role.word"}, self.bindings.named)
        self.assertNotIn("kvm_arch.hidden", self.bindings.named)

    def test_the_list_in_the_source_is_read(self):
        listed = self.script.layouts(self.script.LIST.read_text())
        self.assertIn(("vcpu_idx",), listed["kvm_vcpu"])
        self.assertIn("level", self.script.bitfields(self.script.LIST.read_text())["kvm_mmu_page_role__bindgen_ty_1"])


if __name__ == "__main__":
    unittest.main()
