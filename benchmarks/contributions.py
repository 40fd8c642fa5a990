"""What attention rollout costs in memory and time: ours, row by row, against whole [query, key] matrices of each layer.

A random model of GPT-2's kind on one prompt of N tokens; the shares of its tokens in the last position. The naive arm
is how the papers' code does it: an eager model gives every map, and the matrices are multiplied. All arms of a length
run in turn in a process of its own, with an allocator that gives large blocks back, so that peaks can be compared.
Writes its section of docs/benchmarks.md.

    python benchmarks/contributions.py [--lengths 512 1024 2048] [--longest 4096] [--rounds 5] [--quick]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from shared.measuring import exponent, interleaved, machine, peak_above, say, table, write_section

HEADING = "What attention rollout costs"
METHODS = ("attention", "norm", "alti")
LAYERS, HEADS, WIDTH, VOCABULARY = 4, 4, 256, 1000
LONGEST_NAIVE = 2048
THRESHOLD = 1 << 20  # bytes above which freed memory goes back to the system at once


def arms(length: int, quick: bool) -> dict[str, Callable[[], Any]]:
    """What is measured at a length, by name."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    import workbench

    layers, width = (2, 64) if quick else (LAYERS, WIDTH)

    def model(backend: str) -> GPT2LMHeadModel:
        torch.manual_seed(0)
        shape = {"n_layer": layers, "n_head": HEADS, "n_embd": width, "vocab_size": VOCABULARY, "n_positions": length}
        return GPT2LMHeadModel(GPT2Config(attn_implementation=backend, bos_token_id=0, eos_token_id=0, **shape)).eval()

    eager, wb = model("eager"), workbench.attach(model("sdpa"))
    ids = torch.randint(0, 100, (1, length))
    eye = torch.eye(length)

    def forward() -> Any:
        with torch.no_grad():
            return wb.model(ids, use_cache=False)

    def naive() -> Any:
        with torch.no_grad():
            maps = eager(ids, use_cache=False, output_attentions=True).attentions
            shares = eye
            for a in maps:
                shares = (0.5 * a[0].mean(0) + 0.5 * eye) @ shares
        return shares[-1]

    def ours(method: Any) -> Callable[[], Any]:
        return lambda: workbench.attention_rollout(wb, {"input_ids": ids}, method=method)

    rollout = ours("attention")
    if length <= LONGEST_NAIVE:
        off = float((rollout().rollout[0] - naive()).abs().max())
        if off > 1e-4:
            raise SystemExit(f"the shares of {length} tokens differ by {off}")
    for method in METHODS:  # what is loaded and made once is no memory of a rollout
        workbench.attention_rollout(wb, {"input_ids": ids[:, :64]}, method=method)
    made = {"forward": forward, "attention": rollout, "norm": ours("norm"), "alti": ours("alti")}
    return {**made, "naive": naive} if length <= LONGEST_NAIVE else made


def run_length(length: int, rounds: int, quick: bool) -> dict[str, dict[str, float]]:
    """Median seconds (without rounds none), and peak bytes above what was held before, of each arm."""
    made = arms(length, quick)
    seconds = interleaved(made, rounds) if rounds else dict.fromkeys(made, math.nan)
    return {name: {"seconds": seconds[name], "peak": peak_above(made[name])[0]} for name in made}


def measure(options: argparse.Namespace) -> dict[int, dict[str, dict[str, float]]]:
    """By length and arm: one process for each length."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(THRESHOLD)}
    found = {}
    for length in (*options.lengths, options.longest):
        rounds = 0 if length == options.longest else options.rounds
        command = [sys.executable, __file__, "--only", str(length), "--rounds", str(rounds)]
        command += ["--quick"] if options.quick else []
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise SystemExit(f"N = {length} failed:\n{done.stderr}")
        found[length] = json.loads(done.stdout.splitlines()[-1])
        say(f"N = {length}: {found[length]}")
    return found


def text_of(found: dict[int, dict[str, dict[str, float]]], options: argparse.Namespace) -> str:
    """The section of the page."""
    rows = []
    above: dict[str, dict[int, float]] = {arm: {} for arm in (*METHODS, "naive")}
    for length, arms_of in found.items():
        plain = arms_of["forward"]
        for arm, values in above.items():
            if arm in arms_of:
                values[length] = max(1.0, arms_of[arm]["peak"] - plain["peak"])
        times = [f"{arms_of[arm]['seconds'] / plain['seconds']:.1f}" if length in options.lengths else "–"
                 for arm in above]  # fmt: skip
        rows.append([str(length), *times, *(f"{values[length] / 2**20:.0f}" if length in values else "–"
                                            for values in above.values())])  # fmt: skip
    powers = ", ".join(f"`{arm}` N^{exponent(values):.2f}" for arm, values in above.items())
    header = ["N", *(f"{arm}, time" for arm in above), *(f"{arm}, MiB" for arm in above)]
    return f"""`python benchmarks/contributions.py`: a random model of GPT-2's kind ({LAYERS} layers, {HEADS} heads
of {WIDTH // HEADS}, float32) on one prompt of N tokens; the shares of its tokens in the last position, by
`attention_rollout` with `method="attention"`, `"norm"` and `"alti"`. `naive` is eager attention and whole matrices, for
the same as `attention`, from which it is checked to differ by roundings.

Time is over the plain forward's on SDPA, memory above its peak; `naive` ends at {LONGEST_NAIVE:,} tokens.

{table(header, rows)}

The memory above the forward's grows as {powers}. Median of {options.rounds} rounds, interleaved in both orders;
memory of one run more, with `MALLOC_MMAP_THRESHOLD_={THRESHOLD}`. {machine("torch", "transformers")}
"""


def main() -> None:
    """Run one length (used by the script itself), or all of them, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--longest", type=int, default=4096, help="for memory alone")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", type=int, help="one length in this process, used by the script itself")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round; nothing is written")
    options = parser.parse_args()
    if options.quick:
        options.lengths, options.longest, options.rounds = [256, 512], 1024, 1
    if options.only:
        print(json.dumps(run_length(options.only, options.rounds, options.quick)))
        return
    text = text_of(measure(options), options)
    if options.quick:
        print(text)
    else:
        write_section(HEADING, text)


if __name__ == "__main__":
    main()
