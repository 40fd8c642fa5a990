"""What a capture costs: our statistics against the plain forward, eager attention and TransformerLens.

A random model of GPT-2 small's shape (12 layers, 12 heads of 64) on one sequence of N tokens. Every arm of every round
runs in a process of its own, so that its peak memory is its own; the arms are interleaved, in turning order. Only
ratios mean anything. Time and memory are measured in separate processes: for memory, glibc is told to give every block
of a megabyte or more back at once, since otherwise the peaks depend on how the heap happens to be cut up.
Writes its section of docs/benchmarks.md, or the part of it that was measured.

    python benchmarks/capture_overhead.py [--part time|memory] [--lengths 256 512 1024 2048] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from shared import peers
from shared.measuring import machine, section, table, write_section

ARMS = {
    "plain": "forward on SDPA",
    "default": "ours, default statistics (entropy, received)",
    "all": "ours, all row and column statistics",
    "eager": "Hugging Face eager, output_attentions=True",
    "lens": "TransformerLens run_with_cache, patterns only",
}
ALL = ("entropy", "received", "peak", "effective_keys", "distance", "distance_var", "sink", "current", "previous")
HEADING = "What a capture costs"


def run_arm(arm: str, length: int) -> dict[str, float]:
    """Seconds of the second forward in this process, and the process's peak memory in bytes."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    backend = "eager" if arm == "eager" else "sdpa"
    config = GPT2Config(n_positions=length, attn_implementation=backend)
    model = GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, config.vocab_size, (1, length))
    forward = _forward(arm, model, ids)
    with torch.no_grad():
        forward(ids)  # warms up
        start = time.perf_counter()
        forward(ids)
        seconds = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024
    return {"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def _forward(arm: str, model: Any, ids: Any) -> Callable[[Any], None]:
    """A function that does the arm's work on some ids and checks that it got what it asked for."""
    if arm == "lens":
        return _transformer_lens(model)
    if arm in ("default", "all"):
        import workbench

        wb = workbench.attach(model)
        names = ALL if arm == "all" else ("entropy", "received")

        def capture(ids: Any) -> None:
            with wb.capture(names) as cap:
                model(ids)
            if len(cap.sites) != 12:
                raise RuntimeError("a site is missing")

        return capture

    def plain(ids: Any) -> None:
        out = model(ids, output_attentions=arm == "eager")
        if arm == "eager" and len(out.attentions) != 12:
            raise RuntimeError("eager attention gave no patterns")

    return plain


def _transformer_lens(model: Any) -> Callable[[Any], None]:
    bridge = peers.bridge(model)

    def run(ids: Any) -> None:
        _, cache = bridge.run_with_cache(ids, names_filter=lambda name: name.endswith("hook_pattern"))
        if len([key for key in cache.keys() if key.endswith("hook_pattern")]) != 12:  # noqa: SIM118
            raise RuntimeError("TransformerLens gave no patterns")

    return run


def measure(part: str, lengths: list[int], rounds: int) -> dict[int, dict[str, float]]:
    """Median seconds or peak bytes of every arm: one process each per round, the order reversed every other round."""
    key, environment = ("seconds", {}) if part == "time" else ("peak", {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)})
    found: dict[int, dict[str, float]] = {}
    for length in lengths:
        runs: dict[str, list[float]] = {arm: [] for arm in ARMS}
        for turn in range(rounds):
            for arm in list(ARMS) if turn % 2 == 0 else list(ARMS)[::-1]:
                command = [sys.executable, __file__, "--arm", arm, "--lengths", str(length)]
                done = subprocess.run(
                    command, capture_output=True, text=True, check=False, env={**os.environ, **environment}
                )
                if done.returncode:
                    raise SystemExit(f"{arm} at N = {length} failed:\n{done.stderr}")
                runs[arm].append(json.loads(done.stdout.splitlines()[-1])[key])
                print(f"{part}, N = {length}, round {turn + 1}, {arm}: {runs[arm][-1]:.4g}", file=sys.stderr)
        found[length] = {arm: statistics.median(values) for arm, values in runs.items()}
    return found


def part_text(part: str, found: dict[int, dict[str, float]], rounds: int) -> str:
    """The text and table of one part."""
    rows = []
    for length, value in found.items():
        if part == "time":
            rows.append([str(length), *(f"{value[arm] / value['plain']:.2f}" for arm in ARMS)])
        else:
            extra = {arm: value[arm] - value["plain"] for arm in ARMS}
            rows.append([str(length), *(f"{extra[arm] / extra['eager']:.2f}" for arm in ARMS)])
    text = {
        "time": "Time, over the plain forward; the second forward of each process:",
        "memory": "Peak memory of the process above that of the plain forward, over the same for `eager`; with "
        "`MALLOC_MMAP_THRESHOLD_=1048576`,\nsince with glibc's default the peaks depend on how the heap is cut up:",
    }[part]
    about = machine("torch", "transformers", "transformer-lens")
    by_whom = f"Median of {rounds} processes per arm, interleaved in both orders. {about}"
    return f"### {part.capitalize()}\n\n{text}\n\n{table(['N', *ARMS], rows)}\n\n{by_whom}\n"


def whole_text(parts: dict[str, str]) -> str:
    """The section with these parts; those that were not measured now stay as they are."""
    old = section(HEADING)
    for part in ("time", "memory"):
        kept = re.search(rf"### {part.capitalize()}\n.*?(?=\n### |\Z)", old, re.DOTALL)
        if part not in parts and kept:
            parts[part] = kept.group().rstrip() + "\n"
    meaning = "\n".join(f"- `{arm}`: {text}" for arm, text in ARMS.items())
    joined = "\n".join(parts[part] for part in ("time", "memory") if part in parts)
    return f"""`python benchmarks/capture_overhead.py`: a random model of GPT-2 small's shape (12 layers, 12 heads of
64, float32) on one sequence of N tokens.

{meaning}

`eager` and `lens` keep every pattern whole; ours keeps queries and keys, from which any part of a map can be computed.

{joined}"""


def main() -> None:
    """Run one arm (used by the script itself), or all of them, and write the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--part", choices=["time", "memory"], help="both if not given")
    parser.add_argument("--arm", choices=ARMS)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(run_arm(options.arm, options.lengths[0])))
        return
    parts = [options.part] if options.part else ["time", "memory"]
    measured = {part: measure(part, options.lengths, options.rounds) for part in parts}
    write_section(
        HEADING, whole_text({part: part_text(part, found, options.rounds) for part, found in measured.items()})
    )


if __name__ == "__main__":
    main()
