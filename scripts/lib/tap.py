# SPDX-License-Identifier: GPL-2.0
"""Judge what a test printed (TAP, as kselftests print it) together with its exit code."""

import re

KSFT_SKIP = 4
TIMED_OUT = 124

_PLAN = re.compile(r"^(?:TAP version \d+\n)?1\.\.(\d+)(.*)$", re.MULTILINE)
_RESULT = re.compile(r"^(not )?ok\b[ ]*(\d*)(.*)$", re.MULTILINE)
_DIRECTIVE = re.compile(r"#\s*(SKIP|TODO|XFAIL)\b", re.IGNORECASE)


def verdict(code, output, strict=False):
    """(PASS, FAIL, SKIP or TIMEOUT; why). `strict` demands a TAP plan that was kept."""
    if code == TIMED_OUT:
        return "TIMEOUT", "the time limit struck"
    if code == KSFT_SKIP:
        return "SKIP", _last_words(output)
    plan = _PLAN.search(output)
    if plan and plan.group(1) == "0":
        return "SKIP", plan.group(2).strip(" #")
    failed = [f"{number}{text}" for bad, number, text in _RESULT.findall(output)
              if bad and not _DIRECTIVE.search(text)]
    if failed:
        return "FAIL", "not ok " + "; ".join(failed)
    if code != 0:
        return "FAIL", f"exit code {code}"
    count = len(_RESULT.findall(output))
    if strict and not plan:
        return "FAIL", "it printed no TAP plan"
    if strict and int(plan.group(1)) != count:
        return "FAIL", f"it planned {plan.group(1)} checks and made {count}"
    return "PASS", ""


def skipped_checks(output):
    """Checks that a passing test skipped."""
    return [text.strip() for _, _, text in _RESULT.findall(output) if re.search(r"#\s*SKIP\b", text, re.IGNORECASE)]


def _last_words(output):
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else ""
