/* SPDX-License-Identifier: GPL-2.0 */
#include <linux/linkage.h>
#include <linux/objtool.h>
#include <asm/nospec-branch.h>

/* ftrace calls this at the entry of the function; it goes on where it was called. */
	.text
SYM_FUNC_START(direct_user_stub)
	ANNOTATE_NOENDBR
	RET
SYM_FUNC_END(direct_user_stub)
