"""What a capture of a compiled model costs, against the compiled forward without one.

A random GPT-2 without its head (12 layers, 12 heads of 64, float32), its blocks compiled by inductor, on one
sequence of N tokens. Arms are interleaved in one process, on one thread, and its processor time is taken; only ratios
mean anything. Outputs are compared to the bit, and compilations are counted. Writes its section of docs/benchmarks.md.

    python benchmarks/compiled.py [--lengths 1024 2048] [--rounds 5] [--layers 12] [--print]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from shared.measuring import machine, say, table, timed, write_section
from torch._dynamo.utils import counters
from transformers import GPT2Config, GPT2Model

import workbench

HEADING = "What a capture of a compiled model costs"
ARMS = {
    "compiled": "the compiled forward, the measure",
    "default": "with a capture of entropy and received",
    "all": "with a capture of all eleven row and column statistics",
    "eager": "the forward uncompiled",
}
DEFAULT = ("entropy", "received")
ALL = (*DEFAULT, "peak", "peak_key", "effective_keys", "distance", "distance_var", "sink", "current", "previous")
ALL = (*ALL, "received_mean")


def graphs() -> int:
    """How many graphs this process has compiled."""
    return int(counters["stats"]["unique_graphs"])


def measure(length: int, rounds: int, layers: int) -> tuple[dict[str, list[float]], tuple[int, int, int]]:
    """Seconds of each arm in each round; graphs that the model, its first capture and all later ones compiled."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = GPT2Model(GPT2Config(n_layer=layers, n_positions=length)).eval()
    ids = torch.randint(0, model.config.vocab_size, (1, length))
    eager = GPT2Model(model.config).eval()
    eager.load_state_dict(model.state_dict())
    for block in model.h:
        block.compile(dynamic=False)
    started = graphs()
    bare = model(ids, use_cache=False).last_hidden_state
    own, wb = graphs(), workbench.attach(model)
    say(f"N = {length}: compiled")

    def capture(names: tuple[str, ...]) -> torch.Tensor:
        with wb.capture(names) as cap:
            output = model(ids, use_cache=False).last_hidden_state
        if len(cap.sites) != layers or "to the bit" not in cap.provenance["compiled"]:
            raise RuntimeError("a site is missing, or its graph was changed")
        return output

    if not torch.equal(capture(DEFAULT), bare):
        raise RuntimeError("the capture changed the output")
    first = graphs()
    seconds = timed(
        {
            "compiled": lambda: model(ids, use_cache=False),
            "default": lambda: capture(DEFAULT),
            "all": lambda: capture(ALL),
            "eager": lambda: eager(ids, use_cache=False),
        },
        rounds,
        time.process_time,
    )
    counts = (own - started, first - own, graphs() - first)
    wb.detach()
    if not torch.equal(model(ids, use_cache=False).last_hidden_state, bare):
        raise RuntimeError("something was left behind")
    return seconds, counts


def ratio(seconds: list[float], measure: list[float]) -> str:
    """Median over the rounds of the time over the measure's in the same round, and the least and greatest."""
    found = [a / b for a, b in zip(seconds, measure, strict=True)]
    return f"{statistics.median(found):.2f} ({min(found):.2f}–{max(found):.2f})"


def main() -> None:
    """Measure, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--print", action="store_true", help="write no section")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, counts = [], set()
    with torch.no_grad():
        for length in options.lengths:
            seconds, counted = measure(length, options.rounds, options.layers)
            counts.add(counted)
            rows.append([str(length), *(ratio(seconds[arm], seconds["compiled"]) for arm in ARMS)])
    own, first, later = max(counts)
    meaning = "\n".join(f"- `{arm}`: {text}" for arm, text in ARMS.items())
    shape = f"{options.layers} layers, 12 heads of 64, float32"
    text = f"""`python benchmarks/compiled.py`: a random GPT-2 without its head ({shape}),
its blocks compiled by inductor, on one sequence of N tokens, on one thread. Processor time over that of the compiled
forward:

{meaning}

{table(["N", *ARMS], rows)}

Graphs compiled: {own} by the model, {first} by its first capture, {later} by all later ones and afterwards. Outputs are
those of the compiled forward, to the bit. Median (least–greatest) of {options.rounds} rounds, interleaved in both
orders. {machine("torch", "transformers")}"""
    if options.print:
        print(text)
    else:
        write_section(HEADING, text)


if __name__ == "__main__":
    main()
