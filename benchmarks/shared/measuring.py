"""What the benchmarks share: interleaved timing, tables, and the page that their figures go to."""

from __future__ import annotations

import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "benchmarks.md"
_HEAD = """# Benchmarks

Every figure here is a ratio from a run of a script in `benchmarks/` that anyone can repeat; `make bench` runs them all.
No GPU was used.
"""


def interleaved(arms: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each arm over `rounds` rounds after one to warm up; the order turns round every time."""
    return {name: statistics.median(found) for name, found in timed(arms, rounds).items()}


def timed(
    arms: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    before: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each arm in each round, as in `interleaved`; by `time.process_time` those of the processor.

    Args:
        before: is done before each, and not measured.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name in list(arms) if turn % 2 == 0 else list(arms)[::-1]:
            before()
            start = clock()
            arms[name]()
            if turn:
                seconds[name].append(clock() - start)
    return seconds


def peak_above(work: Callable[[], object]) -> tuple[int, object]:
    """Peak bytes of this process while it works, above what it held before, and what the work gave.

    Linux only, from its own account of the process: getrusage would count what a parent held before the process began.
    """
    from workbench.capture import arena

    arena.give_back()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    before = _status("VmRSS")
    given = work()
    return _status("VmHWM") - before, given


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def exponent(values: Mapping[int, float]) -> float:
    """p of the best fit values ∝ N^p: the slope of the line through the logarithms."""
    x, y = [math.log(n) for n in values], [math.log(v) for v in values.values()]
    return statistics.linear_regression(x, y).slope if len(x) > 1 else math.nan


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table, numbers to the right."""
    lines = [header, ["---:"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine(*packages: str) -> str:
    """The processor's kind, the number of cores, and versions."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    named = ", ".join(f"{package} {version(package)}" for package in packages)
    return f"{platform.machine()}, {cores} CPU cores, {named}."


def section(heading: str) -> str:
    """The text of a section of the page, without its heading; empty where there is none."""
    found = _find(heading, _page())
    return "" if found is None else found.group().split("\n", 1)[1].strip()


def write_section(heading: str, text: str) -> None:
    """Put a section into docs/benchmarks.md, in place of the one with its heading or at the end, and print it."""
    page, new = _page(), f"## {heading}\n\n{text.strip()}\n"
    found = _find(heading, page)
    if found is None:
        page = page.rstrip() + "\n\n" + new
    else:
        page = page[: found.start()] + new + ("\n" if found.end() < len(page) else "") + page[found.end() :]
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(page, encoding="utf-8")
    print(new)


def say(text: str) -> None:
    """Progress, apart from the result."""
    print(text, file=sys.stderr, flush=True)


def _page() -> str:
    return DOCUMENT.read_text(encoding="utf-8") if DOCUMENT.exists() else _HEAD


def _find(heading: str, page: str) -> re.Match[str] | None:
    return re.search(rf"^## {re.escape(heading)}\n.*?(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
