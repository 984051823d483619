// SPDX-License-Identifier: GPL-2.0

//! What bindgen makes of KVM's headers. The types are distinct from those of `kernel::bindings`.

#![allow(
    clippy::all,
    clippy::cast_lossless,
    clippy::ptr_as_ptr,
    clippy::ref_as_ptr,
    clippy::undocumented_unsafe_blocks,
    clippy::as_underscore,
    dead_code,
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    improper_ctypes,
    unreachable_pub,
    unsafe_op_in_unsafe_fn,
    // rustc 1.85 does not know all of these.
    unknown_lints,
    unused_imports,
    unnecessary_transmutes,
    unused_unsafe
)]

use kernel::ffi;
use pin_init::{MaybeZeroable, Zeroable};

type __kernel_size_t = usize;
type __kernel_ssize_t = isize;
type __kernel_ptrdiff_t = isize;

include!(concat!(env!("RMMU_OBJ"), "/rust/kvm/bindings_generated.rs"));

/// Compares the type of a function that C calls with C's declaration of it, as `#[export]` does for the kernel's own: a
/// function of another type does not compile. Each `#[no_mangle]` is followed by one of these.
macro_rules! check_prototype {
    ($name:ident) => {
        const _: () = {
            if true {
                $crate::kvm::bindings::$name
            } else {
                $name
            };
        };
    };
}
pub(crate) use check_prototype;
