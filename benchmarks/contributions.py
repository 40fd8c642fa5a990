"""What attention rollout costs in memory and time: ours, row by row, against whole [query, key] matrices of each layer.

A random model of GPT-2 small's shape on one prompt of N tokens; the shares of its tokens in the last position. The
naive arm is how the papers' code does it: an eager model gives every map, and the matrices are multiplied. Peak memory
is that of a process of its own above the plain forward's. Writes its section of docs/benchmarks.md.

    python benchmarks/contributions.py [--lengths 512 1024 2048 4096] [--rounds 3] [--quick]
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

from shared.measuring import exponent, machine, peak_above, say, table, write_section

HEADING = "What attention rollout costs"
ARMS = {
    "forward": "the plain forward on SDPA",
    "attention": 'ours, method="attention"',
    "norm": 'ours, method="norm"',
    "alti": 'ours, method="alti"',
    "naive": "eager attention and whole matrices, for the same as `attention`",
}
LONGEST_NAIVE = 2048  # 12 layers of 12 heads of 4,096² numbers are 9.7 GB


def run_arm(arm: str, length: int, quick: bool) -> dict[str, float]:
    """Seconds, and peak bytes above what was held before, of one run in this process."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    small = {"n_layer": 2, "n_head": 2, "n_embd": 64, "vocab_size": 100} if quick else {}
    backend = "eager" if arm == "naive" else "sdpa"
    config = GPT2Config(n_positions=length, attn_implementation=backend, bos_token_id=0, eos_token_id=0, **small)
    model = GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, 100, (1, length))
    work = _work(arm, model, ids)
    start = time.perf_counter()
    peak, _ = peak_above(work)
    return {"seconds": time.perf_counter() - start, "peak": peak}


def _work(arm: str, model: Any, ids: Any) -> Callable[[], Any]:
    import torch

    def forward() -> Any:
        with torch.no_grad():
            return model(ids, use_cache=False)

    def naive() -> Any:
        with torch.no_grad():
            maps = model(ids, use_cache=False, output_attentions=True).attentions
            shares = torch.eye(ids.shape[1])
            for a in maps:
                shares = (0.5 * a[0].mean(0) + 0.5 * torch.eye(ids.shape[1])) @ shares
        return shares[-1]

    if arm in ("forward", "naive"):
        return {"forward": forward, "naive": naive}[arm]
    import workbench

    wb = workbench.attach(model)
    method: Any = arm
    return lambda: workbench.attention_rollout(wb, {"input_ids": ids}, method=method)


def measure(options: argparse.Namespace) -> dict[str, dict[int, dict[str, float]]]:
    """Medians by arm and length: one process for each run, the order turned every round."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    found: dict[str, dict[int, dict[str, float]]] = {arm: {} for arm in ARMS}
    for length in options.lengths:
        arms = [arm for arm in ARMS if arm != "naive" or length <= LONGEST_NAIVE]
        runs: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
        for turn in range(options.rounds):
            for arm in arms if turn % 2 == 0 else arms[::-1]:
                command = [sys.executable, __file__, "--arm", arm, "--lengths", str(length)]
                command += ["--quick"] if options.quick else []
                done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
                if done.returncode:
                    raise SystemExit(f"{arm} at N = {length} failed:\n{done.stderr}")
                runs[arm].append(json.loads(done.stdout.splitlines()[-1]))
                say(f"N = {length}, round {turn + 1}, {arm}: {runs[arm][-1]}")
        for arm, several in runs.items():
            found[arm][length] = {key: statistics.median(one[key] for one in several) for key in several[0]}
    return found


def text_of(found: dict[str, dict[int, dict[str, float]]], options: argparse.Namespace) -> str:
    """The section of the page."""
    rows = []
    for length in options.lengths:
        plain = found["forward"][length]
        ours = [found[arm][length] for arm in ("attention", "norm", "alti")]
        naive = found["naive"].get(length)
        times = [f"{one['seconds'] / plain['seconds']:.1f}" for one in ours]
        extra = [one["peak"] - plain["peak"] for one in ours]
        left = None if naive is None else naive["peak"] - plain["peak"]
        sizes = ["–" if left is None else f"{one / left:.2f}" for one in extra]
        rows.append([str(length), *times, *sizes])
    powers = []
    for arm in ("attention", "norm", "alti"):
        above = {n: max(1.0, found[arm][n]["peak"] - found["forward"][n]["peak"]) for n in options.lengths}
        powers.append(f"{arm} N^{exponent(above):.2f}")
    meaning = "\n".join(f"- `{arm}`: {text}" for arm, text in ARMS.items())
    header = ["N", "attention, time", "norm, time", "alti, time", "attention, memory", "norm, memory", "alti, memory"]
    return f"""`python benchmarks/contributions.py`: a random model of GPT-2 small's shape on one prompt of N tokens;
the shares of its tokens in the last position.

{meaning}

Time is over the plain forward's, memory above the plain forward's over that of `naive`, which ends at
{LONGEST_NAIVE:,} tokens.

{table(header, rows)}

The memory above the forward's grows as {", ".join(powers)} over these lengths. Median of {options.rounds}
processes per arm, interleaved in both orders. {machine("torch", "transformers")}
"""


def main() -> None:
    """Run one arm (used by the script itself), or all of them, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arm", choices=ARMS)
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round; nothing is written")
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(run_arm(options.arm, options.lengths[0], options.quick)))
        return
    if options.quick:
        options.lengths, options.rounds = [256, 512], 1
    text = text_of(measure(options), options)
    if options.quick:
        print(text)
    else:
        write_section(HEADING, text)


if __name__ == "__main__":
    main()
