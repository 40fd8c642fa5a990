"""What looking at a gated-delta layer costs, against its own chunked forward, and that against `transformers`'.

Random inputs, batch 1, 16 heads of 64, float32, one thread. Time: all arms of every round interleaved, at each length
in turn; figures are ratios of medians in the same run, and exponents p in time ∝ N^p. Memory: one process per arm and
length, the peak above what it held before, over the size of q, k and v. Writes its two sections of docs/benchmarks.md.

    python benchmarks/recurrent.py [--part time|memory] [--lengths 1024 ... 8192] [--heads 16] [--rounds 5] [--dry]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from shared.measuring import exponent, interleaved, machine, peak_above, say, table, write_section

WIDTH = 64
ARMS = {
    "forward": "our chunked forward, A·V with the chunks made anew",
    "transformers": "`torch_chunk_gated_delta_rule` of Qwen3-Next in transformers",
    "states": "the state after every 64th position",
    "entropy": "entropy of every row of |A|",
    "two": "entropy and received",
}
LINEAR = ("forward", "transformers", "states")  # the others are of N² numbers
HEADING = "Recurrent layers"
Found = dict[str, dict[int, float]]


def inputs(length: int, heads: int) -> dict[str, Any]:
    """q, k, v [1, head, position, d], log decays and steps [1, head, position], as a layer makes them."""
    import torch
    from torch.nn.functional import normalize, softplus

    made = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, length, WIDTH, generator=made) for _ in range(3))
    gates = torch.randn(2, 1, heads, length, generator=made)
    return {
        "q": normalize(q, dim=-1), "k": normalize(k, dim=-1), "v": v,
        "log_decay": -0.1 * softplus(gates[0]), "beta": gates[1].sigmoid(),
    }  # fmt: skip


def call(arm: str) -> Callable[[dict[str, Any]], object]:
    """A function that does the arm's work on some inputs."""
    import torch
    from transformers.models.qwen3_next import modeling_qwen3_next

    from workbench.kernels.recurrent import RecurrentPattern

    def run(given: dict[str, Any]) -> object:
        if arm == "transformers":
            q, k, v = (given[name].transpose(1, 2) for name in "qkv")
            g, beta = (given[name].transpose(1, 2) for name in ("log_decay", "beta"))
            reference: Any = modeling_qwen3_next.torch_chunk_gated_delta_rule
            return reference(q, k, v, g=g, beta=beta)
        pattern = RecurrentPattern(given["q"], given["k"], given["log_decay"], given["beta"])
        if arm == "forward":
            return pattern.apply(given["v"])
        if arm == "states":
            return pattern.states(given["v"], every=64)
        return pattern.statistics(["entropy"] if arm == "entropy" else ["entropy", "received"])

    def without_gradients(given: dict[str, Any]) -> object:
        with torch.no_grad():
            return run(given)

    return without_gradients


def measure_time(lengths: list[int], heads: int, rounds: int) -> Found:
    """Median seconds by arm and length."""
    import torch

    torch.set_num_threads(1)
    found: Found = {arm: {} for arm in ARMS}
    for n in lengths:
        given = inputs(n, heads)
        work = {arm: partial(call(arm), given) for arm in ARMS}
        for arm, seconds in interleaved(work, rounds).items():
            found[arm][n] = seconds
        say(f"N = {n}: " + ", ".join(f"{arm} {found[arm][n]:.4g} s" for arm in ARMS))
    return found


def peak(arm: str, length: int, heads: int) -> float:
    """Peak bytes of this process during one call, above those it held before; Linux only."""
    import torch

    torch.set_num_threads(1)
    run, given = call(arm), inputs(length, heads)
    run(inputs(256, heads))
    return peak_above(lambda: run(given))[0]


def measure_memory(lengths: list[int], heads: int, rounds: int) -> Found:
    """Median peak bytes by arm and length, a process for each; glibc gives every block of 64 KiB or more back."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    found: Found = {}
    for arm in ARMS:
        found[arm] = {}
        for n in lengths:
            runs = []
            command = [sys.executable, __file__, "--arm", arm, "--lengths", str(n), "--heads", str(heads)]
            for _ in range(rounds):
                done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
                if done.returncode:
                    raise SystemExit(f"{arm} at N = {n} failed:\n{done.stderr}")
                runs.append(float(json.loads(done.stdout.splitlines()[-1])))
            found[arm][n] = statistics.median(runs)
            say(f"memory, {arm}, N = {n}: {found[arm][n]:.4g}")
    return found


def time_text(found: Found, heads: int, rounds: int) -> str:
    """The section on time."""
    meaning = "\n".join(f"- `{arm}`: {text}" for arm, text in ARMS.items())
    ratios = {arm: {n: v / found["forward"][n] for n, v in values.items()} for arm, values in found.items()}
    return f"""`python benchmarks/recurrent.py`: a gated delta rule at N positions, batch 1, {heads} heads of {WIDTH},
float32, one thread.

{meaning}

Time over that of our chunked forward at the same N; the last row is p in the arm's own time ∝ N^p:

{_table(ratios, {arm: exponent(values) for arm, values in found.items()})}

Median of {rounds} interleaved rounds. {machine("torch", "transformers")}"""


def memory_text(found: Found, heads: int, rounds: int) -> str:
    """The section on memory."""
    size = 3 * heads * WIDTH * 4
    ratios = {arm: {n: v / (size * n) for n, v in values.items()} for arm, values in found.items()}
    return f"""The same calls. Peak memory above that before the call, over the size of q, k and v; where it is level,
memory grows as N. The last row is p in memory ∝ N^p:

{_table(ratios, {arm: exponent(values) for arm, values in found.items()})}

Median of {rounds} processes. {machine("torch", "transformers")}"""


def _table(found: Found, last: dict[str, float]) -> str:
    lengths = sorted({n for values in found.values() for n in values})
    rows = [[str(n), *(f"{found[arm][n]:.2f}" for arm in ARMS)] for n in lengths]
    return table(["N", *ARMS], [*rows, ["p", *(f"{last[arm]:.2f}" for arm in ARMS)]])


def main() -> None:
    """Run one arm for its memory (used by the script itself), or all of them, and write the sections."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024 << i for i in range(4)])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--part", choices=["time", "memory"], help="both if not given")
    parser.add_argument("--dry", action="store_true", help="print the sections, and write none")
    parser.add_argument("--arm", choices=ARMS)
    options = parser.parse_args()
    heads, rounds = options.heads, options.rounds
    if options.arm:
        print(json.dumps(peak(options.arm, options.lengths[0], heads)))
        return
    put = (lambda heading, text: print(f"## {heading}\n\n{text}\n")) if options.dry else write_section
    if options.part != "memory":
        put(f"{HEADING}: time", time_text(measure_time(options.lengths, heads, rounds), heads, rounds))
    if options.part != "time":
        put(f"{HEADING}: memory", memory_text(measure_memory(options.lengths, heads, rounds), heads, rounds))


if __name__ == "__main__":
    main()
