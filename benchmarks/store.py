"""What a store costs: writing forwards to it against capturing them, and what is read of it for one head; what
`watch_rows` adds to `generate()`.

A random BERT of MiniLM's size (6 layers, 12 heads of 32) on batches of texts, and a random GPT-2 of that size that
writes. Only ratios mean anything. Writes its section of docs/benchmarks.md.

    python benchmarks/store.py [--length 256] [--batch 8] [--forwards 4] [--steps 24] [--rounds 8]
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from shared.measuring import machine, table, timed, write_section
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

import workbench
from workbench.analysis.statistics.intervals import mean_t

HEADING = "What a store costs"
KEEPS: dict[str, dict[str, Any]] = {
    "statistics alone": {"queries_keys": False},
    "statistics, queries and keys": {},
    "z and values too": {"z": True, "values": True},
}
WATCHED = {"one head": {(3, 5)}, "a head in every layer": {(layer, 5) for layer in range(6)}}
Arms = dict[str, Callable[[], None]]


def captures(wb: workbench.Workbench, batches: list[torch.Tensor], folder: Path, keep: dict[str, Any]) -> Arms:
    """A capture of all batches in memory, forward by forward, and one that goes to a store."""

    def in_memory() -> None:
        for batch in batches:  # each alone, so that both hold one forward at a time
            with torch.no_grad(), wb.capture(limit=None, **keep):
                wb.model(batch)

    def to_store() -> None:
        shutil.rmtree(folder / "a.zarr", ignore_errors=True)
        with torch.no_grad(), wb.capture(limit=None, store=folder / "a.zarr", **keep):
            for batch in batches:
                wb.model(batch)

    return {"memory": in_memory, "store": to_store}


def generations(wb: workbench.Workbench, prompt: torch.Tensor, steps: int) -> Arms:
    """`generate()` alone, and with some heads watched."""
    how = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False, "pad_token_id": 0}

    def alone() -> None:
        wb.model.generate(prompt, **how)

    def watching(heads: set[tuple[int, int]]) -> Callable[[], None]:
        def run() -> None:
            with wb.watch_rows(heads, lambda step: None):
                wb.model.generate(prompt, **how)

        return run

    return {"alone": alone} | {name: watching(heads) for name, heads in WATCHED.items()}


def above(seconds: dict[str, list[float]], arm: str, base: str) -> str:
    """By how much an arm takes longer than another, round by round: the mean and its 95 % t interval."""
    ratios = torch.tensor(seconds[arm], dtype=torch.float64) / torch.tensor(seconds[base], dtype=torch.float64) - 1
    low, high = mean_t(ratios)
    return f"{float(ratios.mean()):+.1%} ({float(low):+.1%} to {float(high):+.1%})".replace("-", "−")


def share_read(path: Path, n_forwards: int) -> float:
    """Which share of the store's bytes is read for the entropy of one head of one site, in all forwards."""
    whole, read, plain = sum(one.stat().st_size for one in path.rglob("*") if one.is_file()), [0], os.pread

    def counted(file: int, n: int, at: int) -> bytes:
        found = plain(file, n, at)
        read[0] += len(found)
        return found

    cap = workbench.load_capture(path)
    os.pread = counted  # type: ignore[assignment]
    try:
        means = [float(call[3].entropy[:, 5].mean()) for call in cap.calls]
    finally:
        os.pread = plain
    assert len(means) == n_forwards
    return (read[0] + (path / "forwards.jsonl").stat().st_size) / whole


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("length", 256), ("batch", 8), ("forwards", 4), ("steps", 24), ("rounds", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=6, num_attention_heads=12, hidden_size=384, intermediate_size=1536)
    wb = workbench.attach(BertModel(config).eval())
    size = (options.batch, options.length)
    batches = [torch.randint(1000, config.vocab_size, size) for _ in range(options.forwards)]
    stored = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, keep in KEEPS.items():
            seconds = timed(captures(wb, batches, Path(scratch), keep), options.rounds)
            read = share_read(Path(scratch) / "a.zarr", options.forwards)
            stored.append([name, above(seconds, "store", "memory"), f"{read:.2%}"])
    writer = workbench.attach(GPT2LMHeadModel(GPT2Config(n_layer=6, n_head=12, n_embd=384)).eval())
    prompt = torch.randint(1000, 50_000, (1, options.length))
    seconds = timed(generations(writer, prompt, options.steps), options.rounds)
    watched = [[name, above(seconds, name, "alone")] for name in WATCHED]
    write_section(
        HEADING,
        f"""`python benchmarks/store.py`: a random BERT of MiniLM's size on {options.forwards} batches of
{options.batch} × {options.length} tokens. `store=` beside the same captures in memory, one forward at a time; and the
bytes that are read for the entropy of one head of one site in all forwards, the journal among them.

{table(["kept", "time of the store", "bytes read for a head"], stored)}

`watch_rows` with a callback that does nothing, in `generate()` of {options.steps} tokens after a prompt of
{options.length}, by a random GPT-2 of that size:

{table(["watched", "time added"], watched)}

Means of {options.rounds} rounds with 95 % t intervals, arms interleaved in both orders; files go to the page cache, as
stores are not flushed to the disk. {machine("torch", "transformers")}""",
    )


if __name__ == "__main__":
    main()
