// SPDX-License-Identifier: GPL-2.0
/*
 * A look at the host's own page table: the level at which it maps a page, and pages that are mapped there already.
 *
 * Under mmu_lock, with no invalidation of the frames in progress, what the host's table maps stays mapped: whoever is about
 * to take a page away, or to make it read-only, first tells the mmu notifier, which needs the lock for write. So neither a
 * reference on the page is needed nor a count of invalidations, and the page can be mapped to the guest before the lock
 * drops. Interrupts are off meanwhile, so that the host's tables are not freed under the walk, as in get_user_pages_fast().
 *
 * get_user_pages_fast() has no lock to rely on, so it takes a reference and then reads the entry again. The other tests it
 * makes are made here, too:
 *
 * - NUMA hinting, PROT_NONE, keys: the access must be permitted. An entry that is there for a hint is not permitted.
 * - userfaultfd, clean pages of a shared file, soft-dirty: these write-protect, which makes the page read-only here.
 *   Pages that are missing, poisoned, migrated or swapped have no present entry.
 * - memory without a struct page, of a device (DAX), reserved, or secret: pte_special() and its like at each level, and
 *   rmmu_ordinary_page().
 * - gup_must_unshare() is for pins.
 *
 * KVM takes nothing but pages that are to be writable from get_user_pages_fast(). All others come from get_user_pages(), which
 * asks the VMA first, and x86's entries do not tell all that it says: none is write-only, or, without keys, execute-only. So
 * for a page that will be read-only the VMA is asked here, too (struct rmmu_readable). Documentation/locking.rst has it case
 * by case.
 *
 * What is refused here is not wrong, but somebody else's business: get_user_pages() finds it or fails.
 */
#include <linux/kvm_host.h>
#include <linux/mm.h>
#include <linux/mmap_lock.h>
#include <linux/pagemap.h>
#include <linux/pgtable.h>
#include "glue.h"

/* Pages whose owners let nobody else have them, and what is no ordinary memory. */
static __always_inline bool rmmu_ordinary_page(struct page *page)
{
	struct folio *folio = page_folio(page);
	struct address_space *mapping;

	if (unlikely(folio_test_reserved(folio) || folio_is_zone_device(folio)))
		return false;
	/* Secret memory is in single pages of mappings that cannot be evicted. */
	if (folio_test_large(folio))
		return true;
	mapping = READ_ONCE(folio->mapping);
	if (!mapping)
		return false;
	if ((unsigned long)mapping & FOLIO_MAPPING_FLAGS)
		return (unsigned long)mapping & FOLIO_MAPPING_ANON;
	return !mapping_unevictable(mapping) && !mapping_inaccessible(mapping);
}

/*
 * The addresses of which the VMA lets everything be read that its page table maps. Nothing is known at first; @wanted is set
 * where that was in the way. @slot: the slot is read-only, so that pages the host may write are read-only here.
 */
struct rmmu_readable {
	struct kvm *kvm;
	unsigned long start, end;
	bool slot, wanted;
};

/*
 * What a VMA said when it was asked last on this CPU. Good as long as nobody has taken the mmap_lock for write since, which is
 * what its sequence count tells: no VMA changes without that. A VM that ends is taken out, lest another be taken for it.
 */
struct rmmu_answer {
	struct kvm *kvm;
	unsigned int seq;
	unsigned long start, end;
};

static DEFINE_PER_CPU(struct rmmu_answer, rmmu_answer);

/* The VM ends: nobody asks for it any more. */
void rmmu_forget_answers(struct kvm *kvm)
{
	int cpu;

	for_each_possible_cpu(cpu)
		cmpxchg(&per_cpu(rmmu_answer, cpu).kvm, kvm, NULL);
}

/* Takes up the last answer, if it is good and about @hva. Interrupts are off. */
static noinline bool rmmu_recall_answer(struct rmmu_readable *readable, unsigned long hva)
{
	const struct rmmu_answer *answer = this_cpu_ptr(&rmmu_answer);
	unsigned int seq;

	if (READ_ONCE(answer->kvm) != readable->kvm || hva < answer->start || hva >= answer->end ||
	    !mmap_lock_speculate_try_begin(readable->kvm->mm, &seq) || seq != answer->seq)
		return false;
	readable->start = answer->start;
	readable->end = answer->end;
	return true;
}

static __always_inline bool rmmu_is_readable(struct rmmu_readable *readable, unsigned long hva)
{
	if (likely(hva >= readable->start && hva < readable->end))
		return true;
	if (rmmu_recall_answer(readable, hva))
		return true;
	readable->wanted = true;
	return false;
}

/*
 * Asks the VMA at @hva. What it says stays true for what the page table maps while mmu_lock is held: who changes a VMA's
 * protection does that before the page table, and in between tells the mmu notifier. False if it says no, or is being changed.
 */
static noinline bool rmmu_ask_vma(struct rmmu_readable *readable, unsigned long hva)
{
	struct rmmu_answer answer = { .kvm = readable->kvm };
	struct mm_struct *mm = readable->kvm->mm;
	struct vm_area_struct *vma;
	unsigned long flags;
	bool can_read, same;

	same = mmap_lock_speculate_try_begin(mm, &answer.seq);
	vma = lock_vma_under_rcu(mm, hva);
	if (!vma)
		return false;
	can_read = (vma->vm_flags & (VM_READ | VM_IO | VM_PFNMAP)) == VM_READ;
	answer.start = vma->vm_start;
	answer.end = vma->vm_end;
	vma_end_read(vma);
	if (!can_read)
		return false;
	readable->start = answer.start;
	readable->end = answer.end;
	if (same && !mmap_lock_speculate_retry(mm, answer.seq)) {
		local_irq_save(flags);
		*this_cpu_ptr(&rmmu_answer) = answer;
		local_irq_restore(flags);
	}
	return true;
}

/*
 * A page that the host may write is given to the guest as writable only if the host's entry is dirty already: the guest's
 * writes go past that entry, and a page that nobody has marked dirty could be dropped with them. Clean ones, and what the
 * process has no access to, are left to get_user_pages(), which marks them.
 */
static __always_inline u64 rmmu_host_page(u64 pfn, bool can_read, bool can_write, bool dirty, bool special,
					  unsigned long hva, struct rmmu_readable *readable)
{
	if (!can_read || special || (can_write && !dirty) || !rmmu_ordinary_page(pfn_to_page(pfn)))
		return 0;
	if ((!can_write || readable->slot) && !rmmu_is_readable(readable, hva))
		return 0;
	return pfn << PAGE_SHIFT | RMMU_HOST_PRESENT | (can_write ? RMMU_HOST_WRITABLE : 0);
}

static __always_inline u64 rmmu_host_pte(pte_t *ptep, unsigned long hva, struct rmmu_readable *readable)
{
	/* Read once: it may change between a test and a use. */
	pte_t pte = ptep_get_lockless(ptep);
	bool can_write;

	if (!pte_present(pte))
		return 0;
	/* Who may write may read, keys included: ask once about most pages. */
	can_write = pte_access_permitted(pte, true);
	return rmmu_host_page(pte_pfn(pte), can_write || pte_access_permitted(pte, false), can_write, pte_dirty(pte),
			      pte_special(pte), hva, readable);
}

/* Outwards from @at, up to the first page that is not there, and not past the table. */
static void rmmu_host_neighbours(pte_t *ptep, unsigned long hva, unsigned int at, unsigned int pages,
				 struct rmmu_host_window *window, struct rmmu_readable *readable)
{
	unsigned int index = pte_index(hva), first = at, end = at + 1;
	unsigned int lowest = at > index ? at - index : 0;
	unsigned int limit = min(pages, at + PTRS_PER_PTE - index);

	while (first > lowest) {
		unsigned int back = at - first + 1;
		u64 page = rmmu_host_pte(ptep - back, hva - back * PAGE_SIZE, readable);

		if (!page)
			break;
		window->pages[--first] = page;
	}
	while (end < limit) {
		u64 page = rmmu_host_pte(ptep + (end - at), hva + (end - at) * PAGE_SIZE, readable);

		if (!page)
			break;
		window->pages[end++] = page;
	}
	window->first = first;
	window->end = end;
}

/*
 * Goes down to where the host maps @hva: returns the level, with the entry in @pud or @pmd, or in the table that @pmd leads to.
 * 0 if there is no such table; there may be no page in it. Interrupts are off.
 */
static __always_inline int rmmu_host_walk(struct kvm *kvm, unsigned long hva, pud_t *pud, pmd_t *pmd)
{
	/* Each entry is read once: it may change between a test and a use. */
	pgd_t pgd = READ_ONCE(*pgd_offset(kvm->mm, hva));
	p4d_t p4d;

	if (pgd_none(pgd))
		return PG_LEVEL_NONE;
	p4d = READ_ONCE(*p4d_offset(&pgd, hva));
	if (p4d_none(p4d) || !p4d_present(p4d))
		return PG_LEVEL_NONE;
	*pud = READ_ONCE(*pud_offset(&p4d, hva));
	if (pud_none(*pud) || !pud_present(*pud))
		return PG_LEVEL_NONE;
	if (pud_leaf(*pud))
		return PG_LEVEL_1G;
	*pmd = READ_ONCE(*pmd_offset(pud, hva));
	if (pmd_none(*pmd) || !pmd_present(*pmd))
		return PG_LEVEL_NONE;
	return pmd_leaf(*pmd) ? PG_LEVEL_2M : PG_LEVEL_4K;
}

/*
 * The level at which the host maps @gfn now; 4K if it does not. The answer can be stale as soon as it is given: the caller
 * holds mmu_lock and checks for an invalidation.
 */
int rmmu_host_mapping_level(struct kvm *kvm, const struct kvm_memory_slot *slot, gfn_t gfn)
{
	unsigned long flags;
	int level;
	pud_t pud;
	pmd_t pmd;

	local_irq_save(flags);
	level = rmmu_host_walk(kvm, __gfn_to_hva_memslot(slot, gfn), &pud, &pmd);
	local_irq_restore(flags);
	return max_t(int, level, PG_LEVEL_4K);
}

static __always_inline int rmmu_look(struct kvm *kvm, unsigned long hva, unsigned int at, unsigned int pages, bool write,
				     struct rmmu_host_window *window, struct rmmu_readable *readable)
{
	unsigned long flags;
	u64 page = 0;
	pte_t *ptep;
	pud_t pud;
	pmd_t pmd;
	int level;

	window->first = at;
	window->end = at + 1;
	local_irq_save(flags);
	level = rmmu_host_walk(kvm, hva, &pud, &pmd);
	switch (level) {
	case PG_LEVEL_1G:
		page = rmmu_host_page(pud_pfn(pud) + ((hva & ~PUD_MASK) >> PAGE_SHIFT), pud_access_permitted(pud, false),
				      pud_access_permitted(pud, true), pud_dirty(pud), pud_special(pud), hva, readable);
		break;
	case PG_LEVEL_2M:
		page = rmmu_host_page(pmd_pfn(pmd) + ((hva & ~PMD_MASK) >> PAGE_SHIFT), pmd_access_permitted(pmd, false),
				      pmd_access_permitted(pmd, true), pmd_dirty(pmd), pmd_special(pmd), hva, readable);
		break;
	case PG_LEVEL_4K:
		ptep = pte_offset_kernel(&pmd, hva);
		page = rmmu_host_pte(ptep, hva, readable);
		if (pages > 1 && page && (!write || page & RMMU_HOST_WRITABLE))
			rmmu_host_neighbours(ptep, hva, at, pages, window, readable);
		break;
	}
	local_irq_restore(flags);
	window->pages[at] = page;
	return page && (!write || page & RMMU_HOST_WRITABLE) ? level : PG_LEVEL_NONE;
}

/*
 * Looks up the page of @gfn, which is number @at of @pages, for a read or a @write, and its neighbours if the host maps it
 * by 4K. Returns the level at which the host maps it, 0 if it is not there or does not allow that.
 *
 * The caller holds mmu_lock and has seen that no invalidation of any of the frames is in progress. Its process is the VM's.
 *
 * Pages that are to be writable, which are nearly all, cost no look at a VMA. The VMA of others is asked once for many faults.
 */
int rmmu_host_window(struct kvm *kvm, const struct kvm_memory_slot *slot, gfn_t gfn, unsigned int at, unsigned int pages,
		     bool write, struct rmmu_host_window *window)
{
	struct rmmu_readable readable = { .kvm = kvm, .slot = slot->flags & KVM_MEM_READONLY };
	unsigned long hva = __gfn_to_hva_memslot(slot, gfn);
	int level = rmmu_look(kvm, hva, at, pages, write, window, &readable);

	if (unlikely(readable.wanted) && !write && rmmu_ask_vma(&readable, hva))
		level = rmmu_look(kvm, hva, at, pages, write, window, &readable);
	return level;
}
