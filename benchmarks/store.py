"""What a store costs: writing forwards to it against capturing them, and against plain files of as many bytes, and
what is read of it for one head; what `watch_rows` adds to `generate()`.

A random BERT of MiniLM's size (6 layers, 12 heads of 32) on batches of texts; random GPT-2s that write, of the real
one's size and of MiniLM's. Only ratios mean anything. Writes its section of docs/benchmarks.md; takes some 5 minutes.

    python benchmarks/store.py [--length 256] [--batch 8] [--forwards 4] [--steps 32] [--prompt 512] [--rounds 8]
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
WRITERS = {
    "GPT-2's size (12 layers, 768 wide)": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "MiniLM's size (6 layers, 384 wide)": {"n_layer": 6, "n_head": 12, "n_embd": 384},
}
TOUCHED = 1 << 28  # bytes
Arms = dict[str, Callable[[], None]]


def captures(wb: workbench.Workbench, batches: list[torch.Tensor], folder: Path, keep: dict[str, Any]) -> Arms:
    """A capture of all batches in memory, forward by forward; one that goes to a store; and one in memory, beside which
    as many bytes go to plain files.
    """

    def in_memory(then: Callable[[int], object] = lambda i: None) -> None:
        for i, batch in enumerate(batches):  # each alone, so that all hold one forward at a time
            with torch.no_grad(), wb.capture(limit=None, **keep):
                wb.model(batch)
            then(i)

    def to_store() -> None:
        with torch.no_grad(), wb.capture(limit=None, store=folder / "a.zarr", **keep):
            for batch in batches:
                wb.model(batch)

    with torch.no_grad(), wb.capture(limit=None, **keep) as cap:
        wb.model(batches[0])
    held = [part.contiguous().numpy() for site in cap for part in _parts(site)]

    def to_files() -> None:
        def write(i: int) -> None:
            for number, part in enumerate(held):
                part.tofile(folder / f"{i}-{number}.bin")

        in_memory(write)

    return {"memory": in_memory, "store": to_store, "files": to_files}


def _parts(site: Any) -> list[torch.Tensor]:
    """The tensors that a store keeps of a site."""
    found = list(site.statistics.values())
    if site.lazy is not None:
        found += [site.lazy.q, site.lazy.k, site.lazy.lse]
        found += [] if site.lazy.values is None else [site.lazy.values]
    return [*found, *([] if site.z is None else [site.z])]


def fresh(folder: Path) -> None:
    """Nothing is written yet, and some memory has been used a moment ago.

    Where a virtual machine gives what it does not use back to its host, the first touch of memory takes longer than
    anything that is measured here, whoever writes.
    """
    shutil.rmtree(folder)
    folder.mkdir()
    torch.ones(TOUCHED, dtype=torch.uint8)


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

    each = {(layer, 5) for layer in range(wb.model.config.n_layer)}
    return {"alone": alone, "one": watching({(3, 5)}), "each": watching(each)}


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
    defaults = {"length": 256, "batch": 8, "forwards": 4, "steps": 32, "prompt": 512, "rounds": 8}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=6, num_attention_heads=12, hidden_size=384, intermediate_size=1536)
    wb = workbench.attach(BertModel(config).eval())
    size = (options.batch, options.length)
    batches = [torch.randint(1000, config.vocab_size, size) for _ in range(options.forwards)]
    stored = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "written"
        folder.mkdir()
        for name, keep in KEEPS.items():
            arms = captures(wb, batches, folder, keep)
            seconds = timed(arms, options.rounds, before=lambda: fresh(folder))
            fresh(folder)
            arms["store"]()
            read = share_read(folder / "a.zarr", options.forwards)
            stored.append([name, *(above(seconds, arm, "memory") for arm in ("store", "files")), f"{read:.2%}"])
    wb.detach()
    watched = []
    for name, sizes in WRITERS.items():
        writer = workbench.attach(GPT2LMHeadModel(GPT2Config(**sizes)).eval())
        prompt = torch.randint(1000, 50_000, (1, options.prompt))
        seconds = timed(generations(writer, prompt, options.steps), options.rounds)
        watched.append([name, *(above(seconds, arm, "alone") for arm in ("one", "each"))])
        writer.detach()
    write_section(
        HEADING,
        f"""`python benchmarks/store.py`: a random BERT of MiniLM's size on {options.forwards} batches of
{options.batch} × {options.length} tokens. Beside the same captures in memory, one forward at a time: the time that
`store=` adds; what as many bytes in plain files add; and the share of a store's bytes that is read for the entropy of
one head of one site in all forwards, the journal among them.

{table(["kept", "added by the store", "by plain files", "bytes read for a head"], stored)}

`watch_rows` with a callback that does nothing, in `generate()` of {options.steps} tokens after a prompt of
{options.prompt}, by random GPT-2s:

{table(["model", "added by one head", "by a head in every layer"], watched)}

What is added to a step hardly depends on the model, so that of smaller ones it is a larger part.

Means of {options.rounds} rounds with 95 % t intervals, arms interleaved in both orders; files go to the page cache, as
stores are not flushed to the disk, and into memory that was used before: where a virtual machine has given it back to
its host, fetching it takes longer than all else, for whoever writes. {machine("torch", "transformers")}""",
    )


if __name__ == "__main__":
    main()
