// SPDX-License-Identifier: GPL-2.0
/*
 * Wrappers of inline functions and macros for the legacy MMU. See shadow_glue.h.
 */
#include <linux/uaccess.h>
#include "mmu/spte.h"
#include "calls.h"
#include "glue.h"
#include "shadow_glue.h"
#include "walk.h"

/*
 * The guest's paging. Members of a paging context are called through their pointers: that is how KVM calls them, too, so
 * they have an ENDBR.
 */

u64 rmmu_guest_pgd(struct kvm_vcpu *vcpu, struct kvm_mmu *mmu) { return rmmu_walk(mmu)->get_guest_pgd(vcpu); }
u64 rmmu_guest_pdptr(struct kvm_vcpu *vcpu, struct kvm_mmu *mmu, int index) { return rmmu_walk(mmu)->get_pdptr(vcpu, index); }

/* CR4.PAE. is_pae() refers to a symbol of kvm.ko, though it has no use for it: a guest never owns that bit. */
static_assert(!(KVM_POSSIBLE_CR4_GUEST_BITS & X86_CR4_PAE));
bool rmmu_guest_pae(struct kvm_vcpu *vcpu) { return vcpu->arch.cr4 & X86_CR4_PAE; }

bool rmmu_guest_ac(struct kvm_vcpu *vcpu) { return static_call(rmmu_call_kvm_get_rflags)(vcpu) & X86_EFLAGS_AC; }

void rmmu_inject_page_fault(struct kvm_vcpu *vcpu, u64 address, u64 error_code, bool nested, unsigned long qualification)
{
	struct x86_exception fault = {
		.vector = PF_VECTOR,
		.error_code_valid = true,
		.error_code = error_code,
		.nested_page_fault = nested,
		.address = address,
		.exit_qualification = qualification,
	};

	static_call(rmmu_call___kvm_inject_emulated_page_fault)(vcpu, &fault, true);
}

/* Whether a nested hypervisor's log of dirty pages took @gpa. */
bool rmmu_log_nested_dirty(struct kvm_vcpu *vcpu, gpa_t gpa)
{
	return !static_call(rmmu_x86_write_log_dirty)(vcpu, gpa);
}

/* The guest's memory */

/*
 * The address of a frame that the guest sees, 0 if there is none.
 *
 * @last is the slot that was found last, in the same section of SRCU: the guest's tables are near each other. Who changes
 * the slots waits for the section before it relies on what the new ones say, and a slot that is in use does not change.
 */
unsigned long rmmu_guest_page(struct kvm_vcpu *vcpu, const struct kvm_memory_slot **last, gfn_t gfn, bool *writable)
{
	const struct kvm_memory_slot *slot = *last;

	if (!slot || gfn < slot->base_gfn || gfn >= slot->base_gfn + slot->npages) {
		struct kvm_memory_slot *found = static_call(rmmu_call_kvm_vcpu_gfn_to_memslot)(vcpu, gfn);

		/* Such a slot is valid, too, so that it has an address. */
		if (!kvm_is_visible_memslot(found))
			return 0;
		*last = slot = found;
	}
	*writable = !(slot->flags & KVM_MEM_READONLY);
	return __gfn_to_hva_memslot(slot, gfn);
}

bool rmmu_read_entry(unsigned long hva, unsigned int bytes, u64 *entry)
{
	if (bytes == sizeof(u32)) {
		u32 small;

		if (get_user(small, (u32 __user *)hva))
			return false;
		*entry = small;
		return true;
	}
	return !get_user(*entry, (u64 __user *)hva);
}

/* The same without sleeping. An entry that is not in memory is not read. */
bool rmmu_read_entry_now(unsigned long hva, unsigned int bytes, u64 *entry)
{
	bool read;

	pagefault_disable();
	read = rmmu_read_entry(hva, bytes, entry);
	pagefault_enable();
	return read;
}

/* The same for entries side by side, each of which is read whole. */
bool rmmu_read_entries_now(unsigned long hva, unsigned int bytes, unsigned int count, u64 *entries)
{
	u32 __user *small = (u32 __user *)hva;
	u64 __user *from = (u64 __user *)hva;

	pagefault_disable();
	if (!user_read_access_begin(from, bytes * count))
		goto fault;
	for (unsigned int i = 0; i < count; i++) {
		u32 value;

		if (bytes == sizeof(u32)) {
			unsafe_get_user(value, &small[i], efault);
			entries[i] = value;
		} else {
			unsafe_get_user(entries[i], &from[i], efault);
		}
	}
	user_read_access_end();
	pagefault_enable();
	return true;
efault:
	user_read_access_end();
fault:
	pagefault_enable();
	return false;
}

/* 0 if exchanged, 1 if another value was there, else an error. */
int rmmu_cmpxchg_entry(unsigned long hva, unsigned int bytes, u64 old, u64 new)
{
	u32 old_small = old;

	if (bytes == sizeof(u32))
		return __try_cmpxchg_user((u32 __user *)hva, &old_small, (u32)new, fault32);
	return __try_cmpxchg_user((u64 __user *)hva, &old, new, fault64);
}

/* Faults */

unsigned long rmmu_rip(struct kvm_vcpu *vcpu)
{
	if (!kvm_register_is_available(vcpu, VCPU_REG_RIP))
		static_call(rmmu_x86_cache_reg)(vcpu, VCPU_REG_RIP);
	return vcpu->arch.rip;
}

bool rmmu_event_needs_reinjection(struct kvm_vcpu *vcpu) { return kvm_event_needs_reinjection(vcpu); }
void rmmu_mmio_forget_gva(struct kvm_vcpu *vcpu, u64 gva) { vcpu_clear_mmio_info(vcpu, gva); }
void rmmu_request_sync(struct kvm_vcpu *vcpu) { kvm_make_request(KVM_REQ_MMU_SYNC, vcpu); }
void rmmu_request_flush(struct kvm_vcpu *vcpu) { kvm_make_request(KVM_REQ_TLB_FLUSH_CURRENT, vcpu); }

void rmmu_request_free_obsolete_roots(struct kvm_vcpu *vcpu)
{
	kvm_make_request(KVM_REQ_MMU_FREE_OBSOLETE_ROOTS, vcpu);
}

bool rmmu_free_obsolete_roots_pending(struct kvm_vcpu *vcpu)
{
	return kvm_test_request(KVM_REQ_MMU_FREE_OBSOLETE_ROOTS, vcpu);
}

u64 rmmu_page_to_pfn(struct page *page) { return page_to_pfn(page); }

/* Roots that are no shadow pages */

u64 rmmu_dummy_root(void) { return kvm_mmu_get_dummy_root(); }
void *rmmu_zeroed_page(void) { return (void *)get_zeroed_page(GFP_KERNEL_ACCOUNT); }

/* Metadata of slots */

bool rmmu_shadow_root_allocated(struct kvm *kvm) { return kvm_shadow_root_allocated(kvm); }

void rmmu_set_shadow_root_allocated(struct kvm *kvm)
{
	/* Who sees the flag sees the metadata of all slots; pairs with kvm_shadow_root_allocated(). */
	smp_store_release(&kvm->arch.shadow_root_allocated, true);
}

void rmmu_slots_arch_lock(struct kvm *kvm) { mutex_lock(&kvm->slots_arch_lock); }
void rmmu_slots_arch_unlock(struct kvm *kvm) { mutex_unlock(&kvm->slots_arch_lock); }

/*
 * Reverse maps and counters of tracked writes for all slots that have none. What was allocated when it fails is used at the
 * next try, and freed with its slot.
 */
int rmmu_alloc_slot_metadata(struct kvm *kvm)
{
	struct kvm_memory_slot *slot;
	int as_id, bkt, ret;

	for (as_id = 0; as_id < kvm_arch_nr_memslot_as_ids(kvm); as_id++) {
		kvm_for_each_memslot(slot, bkt, __kvm_memslots(kvm, as_id)) {
			ret = static_call(rmmu_call_memslot_rmap_alloc)(slot, slot->npages);
			if (ret)
				return ret;
			ret = static_call(rmmu_call_kvm_page_track_write_tracking_alloc)(slot);
			if (ret)
				return ret;
		}
	}
	return 0;
}

const struct kvm_memory_slot *rmmu_find_slot(struct kvm *kvm, bool smm, gfn_t gfn)
{
	return __gfn_to_memslot(__kvm_memslots(kvm, smm), gfn);
}

/* The first slot with a frame in [start, end). */
const struct kvm_memory_slot *rmmu_next_slot(struct kvm *kvm, bool smm, gfn_t start, gfn_t end)
{
	struct kvm_memslot_iter iter;

	kvm_for_each_memslot_in_gfn_range(&iter, __kvm_memslots(kvm, smm), start, end)
		return iter.slot;
	return NULL;
}

void rmmu_slot_track_writes(const struct kvm_memory_slot *slot, gfn_t gfn, int count)
{
	unsigned short *counter;

	if (WARN_ON_ONCE(!slot->arch.gfn_write_track))
		return;
	counter = &slot->arch.gfn_write_track[gfn_to_index(gfn, slot->base_gfn, PG_LEVEL_4K)];
	if (WARN_ON_ONCE(*counter + count < 0 || *counter + count > USHRT_MAX))
		return;
	*counter += count;
}

void rmmu_slot_disallow_lpage(const struct kvm_memory_slot *slot, gfn_t gfn, int count)
{
	int level;

	for (level = PG_LEVEL_2M; level <= KVM_MAX_HUGEPAGE_LEVEL; level++)
		slot->arch.lpage_info[level - 2][gfn_to_index(gfn, slot->base_gfn, level)].disallow_lpage += count;
}

int rmmu_slot_lpage_count(const struct kvm_memory_slot *slot, gfn_t gfn, int level)
{
	return slot->arch.lpage_info[level - 2][gfn_to_index(gfn, slot->base_gfn, level)].disallow_lpage;
}

bool rmmu_others_track_writes(struct kvm *kvm)
{
#ifdef CONFIG_KVM_EXTERNAL_WRITE_TRACKING
	return READ_ONCE(kvm->arch.external_write_tracking_enabled);
#else
	return false;
#endif
}

bool rmmu_lpage_allowed(struct kvm *kvm, const struct kvm_memory_slot *slot, gfn_t gfn)
{
	const struct kvm_memory_slot *other;

	if (rmmu_slot_lpage_disallowed(slot, gfn, PG_LEVEL_2M))
		return false;
	if (kvm_arch_nr_memslot_as_ids(kvm) == 1)
		return true;
	other = __gfn_to_memslot(__kvm_memslots(kvm, slot->as_id ^ 1), gfn);
	return !other || !rmmu_slot_lpage_disallowed(other, gfn, PG_LEVEL_2M);
}

/* Locks and caches */

void rmmu_unsync_lock(struct kvm *kvm) { spin_lock(&kvm->arch.mmu_unsync_pages_lock); }
void rmmu_unsync_unlock(struct kvm *kvm) { spin_unlock(&kvm->arch.mmu_unsync_pages_lock); }

/*
 * Zeroed memory for the hash table: in-tree's own, which it leaves unused for a VM of ours, if there is one. Without it,
 * in-tree looks into an empty bucket.
 */
void *rmmu_take_page_hash(struct kvm *kvm, size_t bytes)
{
	void *hash = kvm->arch.mmu_page_hash;

	if (hash && bytes <= KVM_NUM_MMU_PAGES * sizeof(*kvm->arch.mmu_page_hash)) {
		WRITE_ONCE(kvm->arch.mmu_page_hash, NULL);
		return hash;
	}
	return kvzalloc(bytes, GFP_KERNEL_ACCOUNT);
}

void rmmu_free_page_hash(void *hash) { kvfree(hash); }
/* The VM's cache for eager splitting knows the slab cache of descriptors, which is static in kvm.ko. */
void rmmu_desc_free(struct kvm *kvm, void *desc) { kmem_cache_free(kvm->arch.split_desc_cache.kmem_cache, desc); }
