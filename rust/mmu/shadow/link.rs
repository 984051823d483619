// SPDX-License-Identifier: GPL-2.0

//! Links between pages.
//!
//! A page knows the entries that point to it. A link that goes leaves marks about
//! unsync pages in the parent behind; the next walk clears them.

use super::{
    host::{PageSource, ShadowHost},
    page::{Entry, Page},
    rmap::NoDesc,
    Op,
};
use crate::mmu::spte::Spte;

impl<'l, H: ShadowHost> Op<'l, H> {
    /// Makes `entry` point to `child`, in place of whatever is there.
    pub(super) fn link<S: PageSource>(
        &self,
        source: &mut S,
        entry: Entry<'l>,
        child: &'l Page,
    ) -> Result<(), NoDesc> {
        if entry.spte().is_present() {
            self.zap_entry(entry, true);
            self.owe_flush(true);
        }
        self.link_unmapped(source, entry, child)
    }

    /// Makes `entry`, which is not present, point to `child`.
    pub(super) fn link_unmapped<S: PageSource>(
        &self,
        source: &mut S,
        entry: Entry<'l>,
        child: &'l Page,
    ) -> Result<(), NoDesc> {
        child.parents().add(entry.as_ptr(), source, self.lock)?;
        let ad_disabled = child.role().is_ad_disabled();
        entry.store(Spte::nonleaf(self.format(), child.hpa(), ad_disabled));
        // A page of the last level may be unsync when it is linked: it was brought
        // up to date, but its table can be written to.
        if child.is_unsync() || child.has_unsync_children() {
            self.mark_unsync(entry);
        }
        Ok(())
    }

    /// Takes the link to `child` away.
    pub(super) fn unlink(&self, entry: Entry<'l>, child: &Page) {
        if !child.parents().remove(self.host, entry.as_ptr(), self.lock) {
            self.host.bug("rmmu: a page does not know its parent");
        }
        entry.store(Spte::NONPRESENT);
    }

    /// Takes away all links to a page.
    pub(super) fn unlink_parents(&self, page: &Page) {
        while let Some(pointer) = page.parents().pop(self.host, self.lock) {
            pointer.entry(self.host, self.lock).store(Spte::NONPRESENT);
        }
    }

    /// Removes what is at `entry`, be it a leaf, a link or a note about MMIO.
    pub(super) fn unlink_or_drop(&self, entry: Entry<'l>) {
        match self.child_of(entry) {
            Some(child) => self.unlink(entry, child),
            None => {
                self.drop_leaf(entry);
            }
        }
    }

    /// As [`unlink_or_drop`](Op::unlink_or_drop). If `recurse`, a nested guest's
    /// page that nothing points to afterwards is zapped: it is not likely to be
    /// used again. Returns how many pages were zapped.
    pub(super) fn zap_entry(&self, entry: Entry<'l>, recurse: bool) -> u64 {
        let child = self.child_of(entry);
        self.unlink_or_drop(entry);
        match child {
            Some(child)
                if recurse
                    && self.host.recursive_nested_zap()
                    && child.role().is_guest_mode()
                    && child.roots.get() == 0
                    && child.parents().is_empty() =>
            {
                self.prepare_zap(child).pages
            }
            _ => 0,
        }
    }
}
