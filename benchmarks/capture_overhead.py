"""What a capture costs: our statistics against the plain forward, eager attention and TransformerLens.

A random model of GPT-2 small's shape (12 layers, 12 heads of 64) on one sequence of N tokens. Every arm of every round
runs in a process of its own, so that its peak memory is its own; the arms are interleaved, in turning order. Only
ratios mean anything. Writes docs/benchmarks.md.

    python benchmarks/capture_overhead.py [--lengths 256 512 1024 2048] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ARMS = {
    "plain": "forward on SDPA",
    "default": "ours, default statistics (entropy, received)",
    "all": "ours, all row and column statistics",
    "eager": "Hugging Face eager, output_attentions=True",
    "lens": "TransformerLens run_with_cache, patterns only",
}
ALL = ("entropy", "received", "peak", "effective_keys", "distance", "distance_var", "sink", "current", "previous")
DOCUMENT = Path(__file__).parent.parent / "docs" / "benchmarks.md"


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
    from tokenizers import Tokenizer, models
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = tempfile.TemporaryDirectory()  # the bridge wants a tokenizer that came from a folder, and reads it again
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    special = {"unk_token": "a", "bos_token": "b", "eos_token": "b", "pad_token": "b"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder.name)
    tokenizer = AutoTokenizer.from_pretrained(folder.name)
    bridge = TransformerBridge.boot_transformers("gpt2", hf_model=model, tokenizer=tokenizer, device="cpu")

    def run(ids: Any) -> None:
        _, cache = bridge.run_with_cache(ids, names_filter=lambda name: name.endswith("hook_pattern"))
        if len([key for key in cache.keys() if key.endswith("hook_pattern")]) != 12:  # noqa: SIM118
            raise RuntimeError(f"TransformerLens gave no patterns ({folder.name})")

    return run


def measure(lengths: list[int], rounds: int) -> dict[int, dict[str, list[dict[str, float]]]]:
    """All arms, interleaved: one process each per round, the order reversed every other round."""
    found: dict[int, dict[str, list[dict[str, float]]]] = {n: {arm: [] for arm in ARMS} for n in lengths}
    for length in lengths:
        for turn in range(rounds):
            for arm in list(ARMS) if turn % 2 == 0 else list(ARMS)[::-1]:
                command = [sys.executable, __file__, "--arm", arm, "--lengths", str(length)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(f"{arm} at N = {length} failed:\n{done.stderr}")
                found[length][arm].append(json.loads(done.stdout.splitlines()[-1]))
                print(
                    f"N = {length}, round {turn + 1}, {arm}: {found[length][arm][-1]['seconds']:.2f} s", file=sys.stderr
                )
    return found


def report(found: dict[int, dict[str, list[dict[str, float]]]], rounds: int) -> str:
    """The section of docs/benchmarks.md."""
    time_rows, memory_rows = [], []
    for length, arms in found.items():
        seconds = {arm: statistics.median(run["seconds"] for run in runs) for arm, runs in arms.items()}
        peak = {arm: statistics.median(run["peak"] for run in runs) for arm, runs in arms.items()}
        extra = {arm: peak[arm] - peak["plain"] for arm in ARMS}
        time_rows.append([str(length), *(f"{seconds[arm] / seconds['plain']:.2f}" for arm in ARMS)])
        memory_rows.append([str(length), *(f"{extra[arm] / extra['eager']:.2f}" for arm in ARMS)])
    header = ["N", *ARMS]
    meaning = "\n".join(f"- `{arm}`: {text}" for arm, text in ARMS.items())
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "transformers", "transformer-lens"))
    return f"""# Benchmarks

Every figure here is a ratio from one run of a script in `benchmarks/` that anyone can repeat; `make bench` runs them all.

## What a capture costs

`python benchmarks/capture_overhead.py`: a random model of GPT-2 small's shape (12 layers, 12 heads of 64, float32) on one
sequence of N tokens. Median of {rounds} processes per arm, interleaved in both orders; the second forward of each counts.
{platform.machine()}, {_cores()} CPU cores, {packages}.

{meaning}

Time, over the plain forward:

{_table(header, time_rows)}

Peak memory of the process above that of the plain forward, over the same for `eager`:

{_table(header, memory_rows)}

`eager`, `lens` and ours give the same information about the statistics; `eager` and `lens` keep every pattern whole,
ours keeps queries and keys, from which any part of a pattern can be had. No GPU was used.
"""


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---:"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Run one arm (used by the script itself), or all of them, and write the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--arm", choices=ARMS)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(run_arm(options.arm, options.lengths[0])))
        return
    text = report(measure(options.lengths, options.rounds), options.rounds)
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
