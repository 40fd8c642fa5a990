"""How our linear kernels grow with the sequence: lightning attention and scan attention against causal SDPA.

One call on random inputs (batch 1, 4 heads of 64, float32), on one thread: on a busy machine threads wait for each
other, which is not what is measured. Time: every arm of every round times each length in turn, arms interleaved, and
only ratios to an arm's own shortest length are told. Memory: one process per arm and length, the peak above what it
held before the call, over the size of q, k and v. Writes its two sections of docs/benchmarks.md.

    python benchmarks/linear.py [--part time|memory] [--lengths 1024 2048 ... 65536] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from shared.measuring import exponent, machine, peak_above, table, write_section

ARMS = {
    "lightning": "lightning attention, forward",
    "lightning grad": "lightning attention, forward and backward",
    "scan": "scan attention, forward",
    "scan grad": "scan attention, forward and backward",
    "SDPA": "causal `scaled_dot_product_attention`, forward",
}
SDPA_LIMIT = 16384
HEADS, WIDTH = 4, 64
Found = dict[str, dict[int, float]]
HEADING = "Linear kernels"


def inputs(arm: str, length: int) -> list[Any]:
    """q, k and v, [1, head, position, d]; scan attention has one query per head."""
    import torch

    torch.manual_seed(0)
    rows = 1 if arm.startswith("scan") else length
    shapes = [(1, HEADS, n, WIDTH) for n in (rows, length, length)]
    return [torch.randn(shape, requires_grad=arm.endswith("grad")) for shape in shapes]


def call(arm: str) -> Callable[[list[Any]], None]:
    """A function that does the arm's work on some inputs."""
    import torch

    from workbench.kernels.lightning import lightning_attention
    from workbench.kernels.scan import scan_attention

    def run(tensors: list[Any]) -> None:
        if arm == "SDPA":
            torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=True)
            return
        out = (lightning_attention if arm.startswith("lightning") else scan_attention)(*tensors)
        if arm.endswith("grad"):
            torch.autograd.grad(out, tensors, torch.ones_like(out))

    return run


def lengths_of(arm: str, lengths: list[int]) -> list[int]:
    """The lengths that an arm runs at: SDPA stops early."""
    return [n for n in lengths if arm != "SDPA" or n <= SDPA_LIMIT]


def measure_time(lengths: list[int], rounds: int) -> Found:
    """Median seconds by arm and length, arms and lengths interleaved, in turning order."""
    import torch

    torch.set_num_threads(1)
    runs: dict[tuple[str, int], list[float]] = {(arm, n): [] for arm in ARMS for n in lengths_of(arm, lengths)}
    for arm in ARMS:
        call(arm)(inputs(arm, min(lengths)))  # warms up
    for turn in range(rounds):
        for arm, n in list(runs) if turn % 2 == 0 else list(runs)[::-1]:
            tensors, run = inputs(arm, n), call(arm)
            repeats = max(1, 8192 // n)  # short calls are timed several at a time
            start = time.perf_counter()
            for _ in range(repeats):
                run(tensors)
            runs[arm, n].append((time.perf_counter() - start) / repeats)
            print(f"time, round {turn + 1}, {arm}, N = {n}: {runs[arm, n][-1]:.4g}", file=sys.stderr)
    return {arm: {n: statistics.median(runs[arm, n]) for n in lengths_of(arm, lengths)} for arm in ARMS}


def peak(arm: str, length: int) -> float:
    """Peak bytes of this process during one call, above those it held before; Linux only."""
    import torch

    torch.set_num_threads(1)
    run, tensors = call(arm), inputs(arm, length)
    run(inputs(arm, 256))
    return peak_above(lambda: run(tensors))[0]


def measure_memory(lengths: list[int], rounds: int) -> Found:
    """Median peak bytes by arm and length, a process for each; glibc gives every block of 64 KiB or more back."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    found: Found = {}
    for arm in ARMS:
        found[arm] = {}
        for n in lengths_of(arm, lengths):
            command = [sys.executable, __file__, "--arm", arm, "--lengths", str(n)]
            runs = []
            for _ in range(rounds):
                done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
                if done.returncode:
                    raise SystemExit(f"{arm} at N = {n} failed:\n{done.stderr}")
                runs.append(float(json.loads(done.stdout.splitlines()[-1])))
            found[arm][n] = statistics.median(runs)
            print(f"memory, {arm}, N = {n}: {found[arm][n]:.4g}", file=sys.stderr)
    return found


def time_text(found: Found, rounds: int) -> str:
    """The section on time."""
    meaning = "\n".join(f"- `{arm}`: {text}" for arm, text in ARMS.items())
    shortest = min(n for values in found.values() for n in values)
    ratios = {arm: {n: v / values[shortest] for n, v in values.items()} for arm, values in found.items()}
    return f"""`python benchmarks/linear.py`: one call at N positions, batch 1, {HEADS} heads of {WIDTH}, float32, one
thread.

{meaning}

Time over that of the same arm at N = {shortest}; the last row is p in time ∝ N^p, fitted over all lengths of the arm:

{_table(ratios, {arm: exponent(values) for arm, values in found.items()})}

Median of {rounds} interleaved rounds. {machine("torch")}"""


def memory_text(found: Found, rounds: int) -> str:
    """The section on memory."""
    sizes = {arm: (2 if arm.startswith("scan") else 3) * HEADS * WIDTH * 4 for arm in ARMS}
    ratios = {arm: {n: v / (sizes[arm] * n) for n, v in values.items()} for arm, values in found.items()}
    return f"""The same calls. Peak memory above that before the call, over the size of q, k and v; where it is level,
memory grows as N. The last row is p in memory ∝ N^p:

{_table(ratios, {arm: exponent(values) for arm, values in found.items()})}

Median of {rounds} processes. {machine("torch")}"""


def _table(found: Found, last: dict[str, float]) -> str:
    lengths = sorted({n for values in found.values() for n in values})
    rows = [[str(n), *(f"{found[arm][n]:.2f}" if n in found[arm] else "" for arm in ARMS)] for n in lengths]
    return table(["N", *ARMS], [*rows, ["p", *(f"{last[arm]:.2f}" for arm in ARMS)]])


def main() -> None:
    """Run one arm for its memory (used by the script itself), or all of them, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024 << i for i in range(7)])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--part", choices=["time", "memory"], help="both if not given")
    parser.add_argument("--arm", choices=ARMS)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(peak(options.arm, options.lengths[0])))
        return
    if options.part != "memory":
        write_section(f"{HEADING}: time", time_text(measure_time(options.lengths, options.rounds), options.rounds))
    if options.part != "time":
        write_section(
            f"{HEADING}: memory", memory_text(measure_memory(options.lengths, options.rounds), options.rounds)
        )


if __name__ == "__main__":
    main()
