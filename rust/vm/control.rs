// SPDX-License-Identifier: GPL-2.0

//! `/dev/rmmu`: what operators read and set. It works where lockdown forbids to write to debugfs.
//!
//! What is read is text, one `subject name value` a line, as it was when the file was opened; the subject is `module`, or a
//! VM. What is written is one such line, which sets that value. Names are never given another meaning. See
//! Documentation/control.rst.
//!
//! VMs are listed under a lock of its own, which a VM takes when it becomes ours and when it is destroyed. Whoever reads
//! holds it, and so no VM goes while something of it is looked at.

use super::{Vm, STATS};
use crate::{
    kvm::{device::OwnedMiscDevice, table},
    mmu::sync::atomic::{AtomicU64, Ordering},
};
use core::{fmt::Write, ptr::NonNull};
use kernel::{
    fs::{File, Kiocb},
    iov::{IovIterDest, IovIterSource},
    miscdevice::{MiscDevice, MiscDeviceRegistration},
    prelude::*,
};

/// What a line that is written may be long.
const LINE: usize = 128;
/// The version of the format: another one if a reader of this one would misunderstand it.
const FORMAT: u32 = 1;

struct Listed(NonNull<Vm>);

// SAFETY: a VM is shared by the threads that run it; the list's lock keeps it from going while another one looks at it.
unsafe impl Send for Listed {}

kernel::sync::global_lock! {
    /// The VMs that are ours.
    // SAFETY: initialised in `init`, before there can be a VM or a device.
    unsafe(uninit) static VMS: Mutex<KVec<Listed>> = KVec::new();
}

/// Prepares the list.
pub fn init() {
    // SAFETY: called once, before anything locks it.
    unsafe { VMS.init() };
}

/// Adds a VM that becomes ours.
///
/// # Errors
///
/// `ENOMEM`.
pub(super) fn add(vm: &Vm) -> Result {
    VMS.lock().push(Listed(NonNull::from(vm)), GFP_KERNEL)?;
    Ok(())
}

/// Takes a VM out of the list, and waits for whoever looks at it.
pub(super) fn remove(vm: &Vm) {
    VMS.lock()
        .retain(|listed| !core::ptr::eq(listed.0.as_ptr(), vm));
}

/// Calls `f` for each VM, the oldest first.
fn each(mut f: impl FnMut(&Vm) -> Result) -> Result {
    for listed in VMS.lock().iter() {
        // SAFETY: `remove` is called before a VM's data goes, and waits for the lock that is held here.
        f(unsafe { listed.0.as_ref() })?;
    }
    Ok(())
}

/// Text that grows.
struct Text(KVVec<u8>);

impl Write for Text {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        self.0
            .extend_from_slice(text.as_bytes(), GFP_KERNEL)
            .map_err(|_| core::fmt::Error)
    }
}

impl Text {
    fn line(&mut self, arguments: kernel::fmt::Arguments<'_>) -> Result {
        self.write_fmt(arguments).map_err(|_| ENOMEM)
    }
}

/// A counter that is read while others change it, and can be seen below zero for a moment.
fn count_of(counter: i64) -> u64 {
    u64::try_from(counter).unwrap_or(0)
}

/// Counters of the module, under the names that they have here and in debugfs.
pub(super) fn module_stats() -> [(&'static str, u64); 8] {
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    [
        ("vms_owned", count(&STATS.owned)),
        ("vms_owned_total", count(&STATS.owned_total)),
        ("vms_declined", count(&STATS.declined)),
        ("audits", count(&STATS.audits)),
        ("audited_entries", count(&STATS.audited_entries)),
        ("audit_findings", count(&STATS.audit_findings)),
        ("table_pages", count_of(table::live())),
        ("hooks_attached", crate::hook::attached().into()),
    ]
}

/// An open file: what was to be seen when it was opened.
pub struct Control {
    text: KVVec<u8>,
}

impl Control {
    fn look() -> Result<Control> {
        let mut text = Text(KVVec::new());
        text.line(fmt!("module format {}\n", FORMAT))?;
        for (name, value) in module_stats() {
            text.line(fmt!("module {} {}\n", name, value))?;
        }
        each(|vm| Self::look_at(&mut text, vm))?;
        Ok(Control { text: text.0 })
    }

    fn look_at(text: &mut Text, vm: &Vm) -> Result {
        let (pid, number) = vm.id;
        let mut line =
            |name: &str, value: u64| text.line(fmt!("{}-{} {} {}\n", pid, number, name, value));
        line("fault_around_bytes", vm.around.bytes())?;
        for (name, level) in [("pages_4K", 1), ("pages_2M", 2), ("pages_1G", 3)] {
            line(name, count_of(vm.kvm.pages(level)))?;
        }
        line("tables", count_of(vm.tables.load(Ordering::Relaxed)))?;
        for (name, value) in vm.faults.each() {
            text.line(fmt!("{}-{} faults_{} {}\n", pid, number, name, value))?;
        }
        let counters = vm.around.counters();
        for (name, value) in [
            ("around_windows", counters.windows),
            ("around_mapped_ahead", counters.mapped),
            ("around_used", counters.used),
            ("around_unused", counters.unused),
            ("shadow_pages", vm.shadow.pages()),
            (
                "shadow_prefetched",
                vm.shadow_stats.prefetched.load(Ordering::Relaxed),
            ),
        ] {
            text.line(fmt!("{}-{} {} {}\n", pid, number, name, value))?;
        }
        Ok(())
    }

    /// Does what a line says.
    fn set(line: &str) -> Result {
        let mut words = line.split_ascii_whitespace();
        let (Some(subject), Some(name), Some(value), None) =
            (words.next(), words.next(), words.next(), words.next())
        else {
            return Err(EINVAL);
        };
        let (pid, number) = subject.split_once('-').ok_or(EINVAL)?;
        let id = (
            pid.parse().map_err(|_| EINVAL)?,
            number.parse().map_err(|_| EINVAL)?,
        );
        let mut done = Err(ESRCH);
        each(|vm| {
            if vm.id == id {
                done = Self::set_of(vm, name, value);
            }
            Ok(())
        })?;
        done
    }

    fn set_of(vm: &Vm, name: &str, value: &str) -> Result {
        match name {
            "fault_around_bytes" => vm.around.set_bytes(value.parse().map_err(|_| EINVAL)?),
            _ => Err(EINVAL),
        }
    }
}

#[vtable]
impl MiscDevice for Control {
    type Ptr = KBox<Control>;

    fn open(_file: &File, _device: &MiscDeviceRegistration<Self>) -> Result<KBox<Control>> {
        Ok(KBox::new(Control::look()?, GFP_KERNEL)?)
    }

    fn read_iter(mut kiocb: Kiocb<'_, Self::Ptr>, iov: &mut IovIterDest<'_>) -> Result<usize> {
        let control = kiocb.file();
        iov.simple_read_from_buffer(kiocb.ki_pos_mut(), &control.text)
    }

    fn write_iter(_kiocb: Kiocb<'_, Self::Ptr>, iov: &mut IovIterSource<'_>) -> Result<usize> {
        let mut line = [0; LINE];
        let length = iov.len();
        let buffer = line.get_mut(..length).ok_or(EINVAL)?;
        if iov.copy_from_iter(buffer) != length {
            return Err(EFAULT);
        }
        Control::set(core::str::from_utf8(buffer).map_err(|_| EINVAL)?)?;
        Ok(length)
    }
}

/// The device, while the module is loaded.
pub type Device = Pin<KBox<OwnedMiscDevice<Control>>>;

/// Makes `/dev/rmmu`, which holds the module while it is open.
///
/// # Errors
///
/// As [`OwnedMiscDevice::register`].
pub fn device(module: &'static ThisModule) -> Result<Device> {
    OwnedMiscDevice::register(c"rmmu", module)
}
