"""A verification as lines to read, a table, and what it means for the limits of a report."""

from __future__ import annotations

import math
from typing import Any

from workbench.counting import count
from workbench.report.sections import Table
from workbench.tokens import visible, visible_text


def verdict(found: Any) -> dict[str, Any]:
    """The verdict: `ok` (None: not verified), a word, and (whether it is fine, line) pairs.

    Args:
        found: what `wb.verify` returned, or None.
    """
    if found is None:
        line = "This capture came without a verification; wb.verify(**inputs) makes one."
        return {"ok": None, "word": "Not verified", "lines": [(None, line)]}
    checks = list(found.checks)
    fired = [check for check in checks if check.get("fired")]
    if len(fired) == len(checks) > 0:
        lines: list[tuple[bool | None, str]] = [
            (True, f"All {count(len({check['site'] for check in checks}), 'site')} fired")
        ]
    else:
        lines = [(False, f"{len(fired)} of {count(len(checks), 'check')} saw their site fire")]
    same = getattr(found, "identical", None)
    if same is not None:
        with_or_without = "Output identical to the bit with and without the capture"
        lines.append((bool(same), with_or_without if same else "The capture changed the model’s output"))
    for key, meaning in (("row_sum_error", "Rows sum to 1"), ("output_error", "A·V equals the kernel’s output")):
        errors = [(float(check[key]), check) for check in fired if check.get(key) is not None]
        if key == "row_sum_error":  # NaN where rows need not sum to 1
            errors = [pair for pair in errors if not math.isnan(pair[0])]
        if errors:
            # NaN compares with nothing, and it is the worst there is.
            worst, check = max(errors, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0])
            fine = all(error <= each.get("tolerance", math.inf) for error, each in errors)
            lines.append((fine, f"{meaning}: largest error {worst:.2g}, at {visible(str(check['site']))}"))
    tried = [check for check in fired if check.get("editable") is not None]
    if tried:
        changes = sum(bool(check["editable"]) for check in tried)
        idle = [visible(str(check["site"])) for check in tried if check.get("idle")]
        text = f"{changes} of {count(len(tried), 'site')} change the output when switched off"
        text += f"; {', '.join(idle)} reaches it, and adds nothing on these inputs" if idle else ""
        lines.append((changes + len(idle) == len(tried), text))
    return {"ok": bool(found.ok), "word": "Verified" if found.ok else "Verification failed", "lines": lines}


def table(found: Any) -> Table:
    """One row per check."""
    rows = [
        [
            visible(str(check["site"])),
            _yes(check.get("ok")),
            _yes(check.get("fired")),
            _error(check.get("row_sum_error")),
            _error(check.get("output_error")),
            _error(check.get("tolerance")),
            visible_text(str(check.get("kernel") or "none")),
        ]
        for check in found.checks
    ]
    columns = ["Site", "Passed", "Fired", "Row sum error", "A·V error", "Tolerance", "Kernel"]
    numeric = [name in ("Row sum error", "A·V error", "Tolerance") for name in columns]
    return Table("Verification, site by site", columns, rows, len(rows), numeric)


def limits(found: Any) -> list[str]:
    """What the verification leaves open."""
    if found is None:
        return ["not verified: whether the recorded patterns are those of the model was not checked"]
    if found.ok:
        return []
    bad = [visible(str(check["site"])) for check in found.checks if not check.get("ok")]
    where = f" at {', '.join(bad[:5])}{' and others' if len(bad) > 5 else ''}" if bad else ""
    return [f"the verification failed{where}: its numbers may not be those of the model"]


def _yes(value: bool | None) -> str:
    return "not checked" if value is None else "yes" if value else "no"


def _error(value: float | None) -> str:
    return "not checked" if value is None or math.isnan(value) else f"{float(value):.2g}"
