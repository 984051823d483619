// SPDX-License-Identifier: GPL-2.0

//! A misc device whose open files keep the module loaded.
//!
//! The kernel crate's registration leaves the file operations without an owner, so a module whose device is open could be
//! unloaded under its users. This registers the same device, with the same operations, and with the module as their owner.

use core::marker::PhantomData;
use kernel::{
    bindings,
    error::to_result,
    miscdevice::{MiscDevice, MiscDeviceOptions},
    prelude::*,
    sync::atomic::{Atomic, Relaxed},
    types::Opaque,
};

/// A registered device, of which each open file has a `T`.
///
/// # Invariants
///
/// `misc` is registered if `registered` says so; its operations are `operations`, which stay where they are until then.
#[pin_data(PinnedDrop)]
pub struct OwnedMiscDevice<T> {
    #[pin]
    misc: Opaque<bindings::miscdevice>,
    #[pin]
    operations: Opaque<bindings::file_operations>,
    registered: Atomic<bool>,
    of: PhantomData<T>,
}

// SAFETY: a registration may be ended by another thread than the one that made it.
unsafe impl<T> Send for OwnedMiscDevice<T> {}
// SAFETY: nothing can be done with a shared reference.
unsafe impl<T> Sync for OwnedMiscDevice<T> {}

impl<T: MiscDevice> OwnedMiscDevice<T> {
    /// Registers the device `/dev/name`, which root alone may open. `module` has the code of its files, which hold it.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, `EBUSY` if no number is left, and `EEXIST` if there is such a device.
    pub fn register(name: &'static CStr, module: &'static ThisModule) -> Result<Pin<KBox<Self>>> {
        let device = KBox::pin_init(
            pin_init!(Self {
                misc <- Opaque::zeroed(),
                operations <- Opaque::zeroed(),
                registered: Atomic::new(false),
                of: PhantomData,
            }),
            GFP_KERNEL,
        )?;
        let mut raw = MiscDeviceOptions { name }.into_raw::<T>();
        raw.mode = 0o600;
        let (misc, operations) = (device.misc.get(), device.operations.get());
        // SAFETY: both are ours alone until the device is registered; the kernel crate's operations are a static.
        // `misc_open()` hands `open` the device, as the kernel crate's `MiscDeviceRegistration`, which is transparent.
        let done = unsafe {
            operations.write(*raw.fops);
            (*operations).owner = module.as_ptr();
            raw.fops = operations;
            misc.write(raw);
            to_result(bindings::misc_register(misc))
        };
        done?;
        device.registered.store(true, Relaxed);
        Ok(device)
    }
}

#[pinned_drop]
impl<T> PinnedDrop for OwnedMiscDevice<T> {
    fn drop(self: Pin<&mut Self>) {
        if self.registered.load(Relaxed) {
            // SAFETY: registered, by the type's invariant. No file is open, because each holds the module.
            unsafe { bindings::misc_deregister(self.misc.get()) }
        }
    }
}
