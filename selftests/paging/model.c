// SPDX-License-Identifier: GPL-2.0
/*
 * What the guest's CPU may do with an address.
 *
 * A CPU may keep what it read from the tables until it is told to forget it. So for every entry
 * the model knows all values since the beginning, with the times at which they were stored; and
 * for every page of the random part of the address space, when it was invalidated last. A way
 * through the tables is allowed if every entry on it has one of the values that it had since then.
 * That allows more than any CPU does, as it mixes what was never there at the same time. An entry
 * that is not present, or has a reserved bit set, is never kept: it counts only while it is there.
 *
 * Accessed and dirty bits are left out of the values, because the CPU sets them. They are
 * followed apart: after an access to a page that the CPU can not know yet they have to be set, and
 * no entry may become dirty if no write could go through it.
 */
#include <stdlib.h>
#include <string.h>

#include "paging.h"

#define WORDS		1024	/* of a frame; 512 are used with entries of 8 bytes */
#define POINTERS	12	/* of PAE: three roots */
#define LOG		40

/* A place in memory that may be an entry. */
struct word {
	uint64_t values[LOG];
	uint32_t since[LOG];	/* ascending */
	uint32_t stored;	/* the last store, even of the same value */
	uint8_t count;
	bool was_dirty;		/* as stored */
	bool may_dirty;		/* a write could go this way since */
	bool must_access, must_dirty;
	bool full;		/* the oldest values got lost */
};

/* One search for what an access may come to. */
struct search {
	struct model *model;
	struct outcomes *outcomes;
	struct word *roots;
	uint64_t va;
	uint32_t kind, flags, since;
	bool global;		/* only leaves that are global count */
	struct word *path[LEVELS];
	uint64_t entries[LEVELS];
	int steps, top;
};

static int words_of_frame(const struct mode *mode)
{
	return PAGE_SIZE / mode->entry_bytes;
}

static struct word *word_at(struct model *model, uint64_t gpa)
{
	int frame = gpa_frame(gpa);

	if (gpa >= PDPT_GPA && gpa < PDPT_GPA + POINTERS * 8)
		return &model->pointers[(gpa - PDPT_GPA) / 8];
	if (frame < 0)
		bail("the model reaches gpa 0x%lx", gpa);
	return &model->words[frame * WORDS + (gpa & (PAGE_SIZE - 1)) / model->mode->entry_bytes];
}

static uint64_t current(const struct word *word)
{
	return word->values[word->count - 1];
}

static void put(struct model *model, struct word *word, uint64_t raw)
{
	uint64_t value = raw & ~PTE_AD;

	if (word >= model->words && word < model->words + FRAMES * WORDS)
		model->current[word - model->words] = value;
	word->stored = model->now;
	word->was_dirty = raw & PTE_D;
	word->may_dirty = word->must_access = word->must_dirty = false;
	if (word->count && current(word) == value)
		return;
	/* Every word is in the list at most once. */
	if (word->count == 1)
		model->changed[model->changed_count++] = word;
	if (word->count == LOG) {
		memmove(word->values, word->values + 1, (LOG - 1) * sizeof(word->values[0]));
		memmove(word->since, word->since + 1, (LOG - 1) * sizeof(word->since[0]));
		word->count--;
		word->full = true;
	}
	word->values[word->count] = value;
	word->since[word->count++] = model->now;
	model->is_full |= word->count > LOG / 2;
}

/* The oldest value that counts at a time. */
static int oldest(const struct word *word, uint32_t since)
{
	int i = word->count - 1;

	while (i > 0 && word->since[i] > since)
		i--;
	return i;
}

/* Forget values that nobody may have any more. */
static void trim(struct word *word, uint32_t since)
{
	int gone = oldest(word, since);

	memmove(word->values, word->values + gone, (word->count - gone) * sizeof(word->values[0]));
	memmove(word->since, word->since + gone, (word->count - gone) * sizeof(word->since[0]));
	word->count -= gone;
	word->full = false;
}

void model_create(struct model *model, const struct machine *machine)
{
	const struct mode *mode = machine->mode;
	size_t frame_words = words_of_frame(mode);

	*model = (struct model) {
		.mode = mode, .features = machine->features, .cr0 = machine->cr0, .cr4 = machine->cr4, .now = 1,
	};
	model->words = calloc(FRAMES * WORDS, sizeof(struct word));
	model->current = calloc(FRAMES * WORDS, sizeof(model->current[0]));
	model->watched = calloc(FRAMES * WORDS, sizeof(model->watched[0]));
	model->changed = calloc(FRAMES * WORDS + POINTERS + SPACES, sizeof(model->changed[0]));
	model->pointers = calloc(POINTERS, sizeof(struct word));
	model->roots = calloc(SPACES, sizeof(struct word));
	model->global_pages = calloc((1 + SPACES) * va_pages(mode), sizeof(model->global_pages[0]));
	if (!model->words || !model->current || !model->watched || !model->changed || !model->pointers || !model->roots ||
	    !model->global_pages)
		bail("out of memory");
	for (int frame = 0; frame < FRAMES; frame++) {
		void *memory = machine_memory((struct machine *)machine, frame_gpa(frame));

		for (size_t i = 0; i < frame_words; i++)
			put(model, &model->words[frame * WORDS + i],
			    mode->entry_bytes == 4 ? ((uint32_t *)memory)[i] : ((uint64_t *)memory)[i]);
	}
	for (int i = 0; i < POINTERS; i++)
		put(model, &model->pointers[i], ((uint64_t *)machine_memory((struct machine *)machine, PDPT_GPA))[i]);
	for (int i = 0; i < SPACES; i++) {
		model->spaces[i].roots = &model->roots[i];
		model->spaces[i].pages = model->global_pages + (1 + i) * va_pages(mode);
	}
	model->space = &model->spaces[0];
}

void model_destroy(struct model *model)
{
	free(model->words);
	free(model->current);
	free(model->watched);
	free(model->changed);
	free(model->pointers);
	free(model->roots);
	free(model->global_pages);
}

void model_store(struct model *model, uint64_t gpa, uint64_t value, int bytes)
{
	struct word *word = word_at(model, gpa);
	uint64_t upper = ~0UL << 32;

	if (bytes == 4 && model->mode->entry_bytes == 8) {
		value = (current(word) & upper) | (uint32_t)value;
	} else if (bytes == 8 && !model->mode->long_mode) {
		/* The upper half goes first. Accessed and dirty bits of the lower one are not known. */
		put(model, word, (current(word) & ~upper) | (value & upper));
	}
	put(model, word, value);
}

uint64_t model_load(struct model *model, uint64_t gpa)
{
	return current(word_at(model, gpa));
}

static uint32_t later(uint32_t a, uint32_t b)
{
	return a > b ? a : b;
}

static int page_of(const struct model *model, uint64_t va)
{
	va &= ~(PAGE_SIZE - 1);
	for (int page = 0; page < va_pages(model->mode); page++)
		if (va_of_page(model->mode, page) == va)
			return page;
	bail("0x%lx is no random address", va);
}

void model_invlpg(struct model *model, uint64_t va)
{
	int page = page_of(model, va);

	model->space->pages[page] = model->global_pages[page] = model->now;
}

void model_set_root(struct model *model, uint64_t root, int space, bool keep)
{
	model->space = &model->spaces[space];
	/* Of a space that never had a root the CPU knows nothing. */
	if (!keep || !model->space->roots->count)
		model->space->not_global = model->now;
	/* Two bits of a value are not kept; those of a root are not among its lowest four. */
	put(model, model->space->roots, root << 4);
	model->root = root;
	model->pointers_loaded = model->now;
}

static void forget_spaces(struct model *model)
{
	for (int i = 0; i < SPACES; i++)
		model->spaces[i].not_global = model->now;
}

void model_invpcid(struct model *model, enum invpcid type, int space, uint64_t va)
{
	switch (type) {
	case INVPCID_ADDRESS:
		model->spaces[space].pages[page_of(model, va)] = model->now;
		break;
	case INVPCID_SPACE:
		model->spaces[space].not_global = model->now;
		break;
	case INVPCID_ALL:
		model_flush(model);
		break;
	default:
		forget_spaces(model);
		break;
	}
}

void model_flush(struct model *model)
{
	int kept = 0;

	model->all = model->now;
	forget_spaces(model);
	for (int i = 0; i < model->changed_count; i++) {
		struct word *word = model->changed[i];
		bool is_pointer = word >= model->pointers && word < model->pointers + POINTERS;

		trim(word, is_pointer ? model->pointers_loaded : model->now);
		if (word->count > 1)
			model->changed[kept++] = word;
	}
	model->changed_count = kept;
	model->is_full = false;
}

void model_set_cr4(struct model *model, uint64_t cr4)
{
	bool flush = (model->cr4 ^ cr4) & CR4_PGE;

	model->cr4 = cr4;
	if (flush)
		model_flush(model);
}

static bool has_large(const struct model *model, int level)
{
	return level == 2 || (level == 3 && model->features.gigabyte);
}

static bool is_leaf(const struct model *model, uint64_t entry, int level)
{
	return level == 1 || (entry & PTE_PS && has_large(model, level));
}

static int level_shift(const struct mode *mode, int level)
{
	return 12 + (level - 1) * (mode->entry_bytes == 4 ? 10 : 9);
}

/* Bits `high` down to `low`. */
static uint64_t bits(int high, int low)
{
	return high < low ? 0 : ~0UL >> (63 - high) & ~0UL << low;
}

static bool is_reserved(const struct model *model, uint64_t entry, int level)
{
	const struct mode *mode = model->mode;
	uint64_t reserved;

	if (mode->entry_bytes == 4)
		/* Bits 20:13 are more of the address, where they are implemented. They stay clear here. */
		return level == 2 && entry & PTE_PS && entry & bits(21, 21);
	reserved = bits(mode->paging == PAE ? 62 : 51, model->features.physical_bits);
	if (!model->features.nx)
		reserved |= PTE_NX;
	if (level > 2 && !has_large(model, level))
		reserved |= PTE_PS;
	if (level > 1 && is_leaf(model, entry, level))
		reserved |= bits(level_shift(mode, level) - 1, 13);
	return entry & reserved;
}

static void add(struct outcomes *outcomes, uint32_t error, uint64_t gpa, uint64_t value)
{
	for (int i = 0; i < outcomes->count; i++)
		if (outcomes->list[i].error == error && outcomes->list[i].gpa == gpa)
			return;
	if (outcomes->count == MAX_OUTCOMES) {
		outcomes->too_many = true;
		return;
	}
	outcomes->list[outcomes->count++] = (struct outcome) { error, gpa, value };
}

static void add_fault(struct search *search, uint32_t cause)
{
	struct model *model = search->model;
	bool nested = model->mode->paging == NESTED;
	bool reports_fetch = (model->features.nx && model->mode->entry_bytes == 8) ||
			     model->cr4 & CR4_SMEP;
	uint32_t error = cause;

	if (search->kind == KIND_WRITE)
		error |= PF_W;
	if (search->flags & FLAG_USER || nested)
		error |= PF_U;
	if (search->kind == KIND_EXEC && reports_fetch)
		error |= PF_I;
	add(search->outcomes, error, 0, 0);
}

static bool is_allowed(struct search *search, uint64_t together, bool nx)
{
	struct model *model = search->model;
	bool nested = model->mode->paging == NESTED;
	bool by_user = search->flags & FLAG_USER || nested;
	bool user_page = together & PTE_U;

	if (by_user && !user_page)
		return false;
	switch (search->kind) {
	case KIND_EXEC:
		return !nx && (by_user || !user_page || !(model->cr4 & CR4_SMEP));
	case KIND_WRITE:
		if (!(together & PTE_W) && (by_user || model->cr0 & CR0_WP))
			return false;
		break;
	}
	return by_user || !user_page || !(model->cr4 & CR4_SMAP) || search->flags & FLAG_AC;
}

static void end_of_path(struct search *search, int level, uint64_t together, bool nx)
{
	struct model *model = search->model;
	uint64_t inside = (1UL << level_shift(model->mode, level)) - 1;
	uint64_t leaf = search->entries[level];
	struct outcomes *outcomes = search->outcomes;
	uint64_t gpa;

	if (search->global && !(leaf & PTE_G))
		return;
	outcomes->paths++;
	if (!is_allowed(search, together, nx)) {
		add_fault(search, PF_P);
		return;
	}
	gpa = (leaf & bits(51, 12) & ~inside) | (search->va & inside);
	add(outcomes, NO_FAULT, gpa, current(word_at(model, gpa)));
	if (search->kind == KIND_WRITE)
		search->path[level]->may_dirty = true;
	outcomes->fresh = true;
	for (int i = level; i <= search->top; i++)
		if (search->path[i]->stored > search->since || search->path[i]->full)
			outcomes->fresh = false;
}

static void step(struct search *search, int level, uint64_t table, uint64_t together, bool nx)
{
	struct model *model = search->model;
	struct word *word;

	if (++search->steps > 4000) {
		search->outcomes->too_many = true;
		return;
	}
	word = word_at(model, table + va_index(model->mode, search->va, level) * model->mode->entry_bytes);
	search->path[level] = word;
	for (int i = oldest(word, search->since); i < word->count; i++) {
		uint64_t entry = word->values[i];
		bool stale = i != word->count - 1;

		if (!(entry & PTE_P) || is_reserved(model, entry, level)) {
			if (!stale && !search->global) {
				search->outcomes->paths++;
				add_fault(search, entry & PTE_P ? PF_P | PF_RSVD : 0);
			}
			continue;
		}
		search->entries[level] = entry;
		if (is_leaf(model, entry, level))
			end_of_path(search, level, together & entry, nx || entry & PTE_NX);
		else
			step(search, level - 1, entry & bits(51, 12), together & entry, nx || entry & PTE_NX);
		search->path[level] = word;
	}
}

/* From every root that may still be in use. */
static void from_roots(struct search *search)
{
	struct model *model = search->model;
	const struct mode *mode = model->mode;
	struct word *roots = search->roots;

	search->top = mode->levels;
	for (int i = oldest(roots, search->since); i < roots->count; i++) {
		uint64_t root = roots->values[i] >> 4;
		struct word *pointer;
		uint32_t since;

		if (mode->paging != PAE) {
			step(search, mode->levels, root, PTE_W | PTE_U, false);
			continue;
		}
		/* The CPU may have the pointers since it loaded them, whatever was invalidated since. */
		pointer = word_at(model, root + (search->va >> 30 & 3) * 8);
		since = search->since < model->pointers_loaded ? search->since : model->pointers_loaded;
		for (int j = oldest(pointer, since); j < pointer->count; j++) {
			if (pointer->values[j] & PTE_P) {
				step(search, 2, pointer->values[j] & bits(51, 12), PTE_W | PTE_U, false);
			} else if (!search->global) {
				search->outcomes->paths++;
				add_fault(search, 0);
			}
		}
	}
}

void model_access(struct model *model, uint64_t va, uint32_t kind, uint32_t flags, struct outcomes *outcomes)
{
	int page = page_of(model, va);
	struct search search = {
		.model = model, .outcomes = outcomes, .va = va, .kind = kind, .flags = flags,
		.since = later(model->space->pages[page], model->space->not_global), .roots = model->space->roots,
	};

	memset(outcomes, 0, sizeof(*outcomes));
	from_roots(&search);
	outcomes->fresh = outcomes->fresh && outcomes->paths == 1;
	if (model->cr4 & CR4_PGE) {
		uint32_t global = later(model->global_pages[page], model->all);
		uint32_t since = search.since;
		int paths = outcomes->paths;

		/* What is global may have been met in any space. */
		search.global = true;
		search.since = global;
		for (int i = 0; i < SPACES; i++) {
			search.roots = model->spaces[i].roots;
			if (search.roots->count && (search.roots != model->space->roots || global < since))
				from_roots(&search);
		}
		outcomes->fresh = outcomes->fresh && outcomes->paths == paths;
	}
}

void model_used(struct model *model, uint64_t va, uint32_t kind, uint32_t flags, const struct outcomes *outcomes)
{
	(void)flags;
	if (!outcomes->fresh)
		return;
	/* The CPU could know nothing of the page, so it has walked the tables now. */
	for (int level = model->mode->levels; level > 0; level--) {
		uint64_t gpa = model_entry_gpa(model, va, level);
		struct word *word = gpa ? word_at(model, gpa) : NULL;

		if (!word)
			return;
		word->must_access = true;
		model->watched[word - model->words] = true;
		if (is_leaf(model, current(word), level)) {
			word->must_dirty |= kind == KIND_WRITE;
			return;
		}
	}
}

uint64_t model_entry_gpa(struct model *model, uint64_t va, int level)
{
	const struct mode *mode = model->mode;
	uint64_t table = model->root;

	if (mode->paging == PAE) {
		table = current(word_at(model, table + (va >> 30 & 3) * 8));
		if (!(table & PTE_P))
			return 0;
		table &= bits(51, 12);
	}
	for (int at = mode->levels;; at--) {
		uint64_t gpa = table + va_index(mode, va, at) * mode->entry_bytes;
		uint64_t entry;

		if (at == level)
			return gpa;
		entry = current(word_at(model, gpa));
		if (!(entry & PTE_P) || is_reserved(model, entry, at) || is_leaf(model, entry, at))
			return 0;
		table = entry & bits(51, 12);
	}
}

static const char *compare_word(struct word *word, uint64_t memory)
{
	if ((memory & ~PTE_AD) != current(word))
		return "has another value";
	if (word->must_access && !(memory & PTE_A))
		return "was used and is not marked accessed";
	if (word->must_dirty && !(memory & PTE_D))
		return "was written through and is not marked dirty";
	if (current(word) & PTE_P && memory & PTE_D && !word->was_dirty && !word->may_dirty)
		return "is marked dirty and was not written through";
	return NULL;
}

int model_compare(struct model *model, struct machine *machine)
{
	const struct mode *mode = model->mode;
	int differences = 0;

	for (int frame = 0; frame < FRAMES; frame++) {
		void *memory = machine_memory(machine, frame_gpa(frame));

		for (int i = 0; i < words_of_frame(mode); i++) {
			struct word *word = &model->words[frame * WORDS + i];
			uint64_t value = mode->entry_bytes == 4 ? ((uint32_t *)memory)[i] : ((uint64_t *)memory)[i];
			const char *wrong;

			if (value == model->current[frame * WORDS + i] && !model->watched[frame * WORDS + i])
				continue;
			model->watched[frame * WORDS + i] = false;
			wrong = compare_word(word, value);
			if (wrong && differences++ < 5)
				note("the word at gpa 0x%lx %s: 0x%lx is there, 0x%lx was stored",
				     frame_gpa(frame) + i * mode->entry_bytes, wrong, value, current(word));
			/* What the CPU has set stays set. */
			if (value & PTE_D)
				word->was_dirty = true;
		}
	}
	return differences;
}

/*
 * The random part of the address space. In every table a few entries lead to it; with the last two
 * indices frames of the zones B and C are reached whatever the size of the page. Index 0 is never
 * used: in roots it belongs to what is fixed.
 */
#define LOW_PAGES	(ZONE_FRAMES - 2)

int va_pages(const struct mode *mode)
{
	switch (mode->paging) {
	case BITS32:
		return 4 * 2 * LOW_PAGES;
	case PAE:
		return 3 * 2 * LOW_PAGES;
	case LEVEL4:
		return 2 * 2 * 2 * LOW_PAGES;
	case LEVEL5:
		return 2 * 2 * 2 * 2 * LOW_PAGES;
	default:
		return 3 * 2 * LOW_PAGES;
	}
}

uint64_t va_of_page(const struct mode *mode, int page)
{
	uint64_t low = 2 + page % LOW_PAGES, high;

	page /= LOW_PAGES;
	high = page % 2;
	page /= 2;
	switch (mode->paging) {
	case BITS32:
		return (uint64_t)(2 + page) << 22 | (high * 512 + low) << 12;
	case PAE:
		return (uint64_t)(1 + page) << 30 | (2 + high) << 21 | low << 12;
	case LEVEL4:
		return (uint64_t)(1 + page / 2) << 39 | (uint64_t)(1 + page % 2) << 30 | (2 + high) << 21 | low << 12;
	case LEVEL5:
		return (uint64_t)(1 + page / 4) << 48 | (uint64_t)(1 + page / 2 % 2) << 39 |
		       (uint64_t)(1 + page % 2) << 30 | (2 + high) << 21 | low << 12;
	default:
		/* The nested guest reaches 1 TiB of physical addresses: one entry of the root. */
		return 1UL << 39 | (uint64_t)(1 + page) << 30 | (2 + high) << 21 | low << 12;
	}
}

int va_index(const struct mode *mode, uint64_t va, int level)
{
	return va >> level_shift(mode, level) & (mode->entry_bytes == 4 ? 1023 : 511);
}
