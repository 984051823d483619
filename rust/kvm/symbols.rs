// SPDX-License-Identifier: GPL-2.0

//! Addresses of functions and variables of the kernel and of kvm.ko, and the static calls bound to them.
//!
//! KVM's exports are limited to its vendor modules, so linking to them is refused. `kallsyms_lookup_name()` is not
//! exported either, but a kprobe on it tells its address; it then resolves everything else.

use crate::kvm::{bindings, calls::core_kernel};
use kernel::{error::to_result, ffi::c_void, prelude::*, str::CStr, str::CString};

/// A function that is reached through a static call.
pub type Function = bindings::rmmu_function;

/// Functions of the core kernel that are not exported.
pub fn core_functions() -> &'static [Function] {
    // SAFETY: a constant C array with its length beside it.
    unsafe {
        core::slice::from_raw_parts(
            (&raw const bindings::rmmu_core).cast(),
            bindings::rmmu_core_len,
        )
    }
}

/// The hook table.
pub fn entries() -> &'static [Function] {
    // SAFETY: as above.
    unsafe {
        core::slice::from_raw_parts(
            (&raw const bindings::rmmu_entries).cast(),
            bindings::rmmu_entries_len,
        )
    }
}

/// Functions of kvm.ko that rmmu calls.
pub fn callees() -> &'static [Function] {
    // SAFETY: as above.
    unsafe {
        core::slice::from_raw_parts(
            (&raw const bindings::rmmu_callees).cast(),
            bindings::rmmu_callees_len,
        )
    }
}

/// The iterators of kvm.ko's tracepoints that rmmu emits.
pub fn iterators() -> &'static [Function] {
    // SAFETY: as above.
    unsafe {
        core::slice::from_raw_parts(
            (&raw const bindings::rmmu_iterators).cast(),
            bindings::rmmu_iterators_len,
        )
    }
}

/// The function's name.
pub fn name(function: &Function) -> &'static CStr {
    // SAFETY: the tables hold string literals.
    unsafe { CStr::from_char_ptr(function.name.cast()) }
}

/// The function's prototype in BTF's words.
pub fn prototype(function: &Function) -> &'static CStr {
    // SAFETY: the tables hold string literals.
    unsafe { CStr::from_char_ptr(function.prototype.cast()) }
}

/// Points the function's static call to `address`.
///
/// # Safety
///
/// There is that function, of the prototype that the table has for it, or the rest of it past its patched entry. It stays as
/// long as it is called.
pub unsafe fn bind(function: &Function, address: usize) {
    // SAFETY: key and trampoline belong together, and what is at the address has the type of the call, as the caller promises.
    unsafe { bindings::__static_call_update(function.key, function.tramp, address as *mut c_void) }
}

/// Address of a symbol of the core kernel.
pub fn lookup(name: &CStr) -> Option<usize> {
    // SAFETY: bound in `init`; a NULL static call returns what was in %rax otherwise, hence `init` comes first.
    let address = unsafe { core_kernel::kallsyms_lookup_name(name.as_char_ptr()) };
    (address != 0).then_some(address)
}

/// Address of a symbol of kvm.ko.
pub fn lookup_kvm(name: &CStr) -> Result<Option<usize>> {
    let qualified = CString::try_from_fmt(fmt!("kvm:{}", name))?;
    Ok(lookup(&qualified))
}

/// The same, or an error that names the symbol.
pub fn require_kvm(name: &CStr) -> Result<usize> {
    lookup_kvm(name)?.ok_or_else(|| {
        pr_err!(
            "this kernel's kvm.ko has no symbol {}: not a kernel this module was built for\n",
            name
        );
        ENOENT
    })
}

/// Finds `kallsyms_lookup_name()` and with it every core function we need.
pub fn init() -> Result {
    // SAFETY: all zeroes is a kprobe that asks for nothing.
    let mut probe: KBox<bindings::kprobe> = KBox::new(unsafe { core::mem::zeroed() }, GFP_KERNEL)?;
    probe.symbol_name = c"kallsyms_lookup_name".as_char_ptr().cast();
    // SAFETY: the probe has no handler and stays in place until it is taken out below.
    to_result(unsafe { bindings::register_kprobe(&mut *probe) }).inspect_err(|error| {
        pr_err!("a kprobe on kallsyms_lookup_name is refused ({:?}): kprobes must not be disabled or locked down\n", error);
    })?;
    let address = probe.addr as usize;
    // SAFETY: registered above.
    unsafe { bindings::unregister_kprobe(&mut *probe) };

    let (first, rest) = core_functions().split_first().ok_or(EINVAL)?;
    // SAFETY: its address, by the kprobe; its prototype is compared before anything but this is called.
    unsafe { bind(first, address) };
    for function in rest {
        let address = lookup(name(function)).ok_or_else(|| {
            pr_err!(
                "this kernel has no function {}: ftrace with direct calls is needed\n",
                name(function)
            );
            ENOENT
        })?;
        // SAFETY: kallsyms knows it by its name. Of the kernel itself, so it stays.
        unsafe { bind(function, address) };
    }
    Ok(())
}
