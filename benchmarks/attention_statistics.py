"""What exact statistics of a causal attention call cost, against the forward of scaled_dot_product_attention itself.

One call of 12 heads of 64, float32, the log-sum-exp given by the kernel. Peers in the same run: eager softmax with the
same statistics on whole patterns, compiled FlexAttention with positions appended to the values, and the same trick with
SDPA, whose backward gives the column sums. Also the memory that our statistics take above inputs and outputs.
Only ratios mean anything. Writes its section of docs/benchmarks.md.

    python benchmarks/attention_statistics.py [--lengths 1024 2048 4096 8192] [--rounds 7] [--memory 32768]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from unittest import mock

import torch
from shared.measuring import interleaved, machine, peak_above, say, table, write_section
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from workbench.kernels.masks import causal
from workbench.kernels.native import NativeEngine
from workbench.kernels.softmax import SoftmaxPattern
from workbench.kernels.statistics import Options

HEADING = "What statistics cost"
ROWS = ("entropy", "peak", "peak_key", "effective_keys", "distance", "distance_var", "sink", "current", "previous")
ALL = (*ROWS, "received", "received_mean")
EVERYTHING = (*ALL, "top_keys", "pooled_mean", "pooled_max")
ARMS = {
    "sdpa": "forward of SDPA, the measure",
    "default": "ours, entropy and received",
    "all": "ours, all eleven row and column statistics",
    "everything": "ours, those and top_keys (8), pooled_mean and pooled_max (blocks of 16)",
    "no lse": "ours, all, where no kernel gave the log-sum-exp: two passes",
    "torch default": "ours without a compiler, entropy and received",
    "torch all": "ours without a compiler, all",
    "tricks": "SDPA with positions for values, and its backward: distance, its variance, sink and received only",
    "flex": "compiled FlexAttention with positions for values: distance, its variance and sink only",
    "eager": "softmax written out, all statistics on the whole pattern, head by head",
}
EAGER_LIMIT = 4096  # longer patterns take gigabytes


def arms(n: int) -> dict[str, object]:
    """One function per arm on the same random queries, keys and values."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 12, n, 64, generator=generator) for _ in range(3))
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    lse = forward(q, k, v, 0.0, True)[1]
    j = torch.arange(n).float()
    positions = torch.zeros(1, 12, n, 64)
    positions[..., 0], positions[..., 1], positions[..., 2] = j, j * j, (j == 0).float()
    block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, n, n, device="cpu")
    compiled = torch.compile(flex_attention)

    def ours(names: tuple[str, ...], known: bool = True, engine: str = "native") -> dict[str, Tensor]:
        pattern = SoftmaxPattern(q, k, causal(n), lse=lse if known else None)
        without = mock.patch.object(NativeEngine, "refusal", return_value="switched off")
        with without if engine == "torch" else nullcontext():
            if pattern.engines(names, Options()) != {engine}:
                raise SystemExit(f"the {engine} engine is not there")
            return pattern.statistics(names)

    def tricks() -> None:
        forward(q, k, positions, 0.0, True)
        values = v.clone().requires_grad_()
        with torch.enable_grad():
            out = forward(q, k, values, 0.0, True)[0]
        torch.autograd.grad(out, values, torch.ones_like(out))

    found = {
        "sdpa": lambda: forward(q, k, v, 0.0, True),
        "default": lambda: ours(("entropy", "received")),
        "all": lambda: ours(ALL),
        "everything": lambda: ours(EVERYTHING),
        "no lse": lambda: ours(ALL, known=False),
        "torch default": lambda: ours(("entropy", "received"), engine="torch"),
        "torch all": lambda: ours(ALL, engine="torch"),
        "tricks": tricks,
        "flex": lambda: compiled(q, k, positions, block_mask=block_mask),
    }
    if n <= EAGER_LIMIT:
        found["eager"] = lambda: eager(q, k)
    return found


def eager(q: Tensor, k: Tensor) -> list[Tensor]:
    """All statistics from whole patterns, one head at a time, as a straightforward script would have it."""
    n = q.shape[2]
    i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
    hidden, away = j > i, (i - j).abs().float()
    found = []
    for head in range(q.shape[1]):
        scores = (q[0, head] @ k[0, head].T / q.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf)
        p = scores.softmax(-1)
        mean = (p * away).sum(-1)
        received = p.sum(0)
        found += [
            -torch.xlogy(p, p).sum(-1), *p.max(-1), 1 / p.square().sum(-1), mean, (p * away.square()).sum(-1) - mean**2,
            p[:, 0], p.diagonal(), p.diagonal(-1), received, received / (n - torch.arange(n)),
        ]  # fmt: skip
    return found


def memory(n: int) -> float:
    """MiB above inputs and outputs that all statistics take at their peak, in a process of its own."""
    command = [sys.executable, __file__, "--measure-memory", str(n)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def measure_memory(n: int) -> float:
    """In a process that has loaded everything already: the peak, less what was held before and what was given."""
    small = SoftmaxPattern(torch.randn(1, 12, 128, 64), torch.randn(1, 12, 128, 64), causal(128))
    small.statistics(ALL)
    q, k = torch.randn(1, 12, n, 64), torch.randn(1, 12, n, 64)
    pattern = SoftmaxPattern(q, k, causal(n), lse=torch.full((1, 12, n), 11.0))  # any number costs the same
    above, got = peak_above(lambda: pattern.statistics(ALL))
    return (above - sum(t.nbytes for t in got.values())) / 2**20


def main() -> None:
    """Measure, print, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", type=int, default=32768)
    parser.add_argument("--measure-memory", type=int)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    if options.measure_memory:
        print(json.dumps(measure_memory(options.measure_memory)))
        return
    rows = []
    for n in options.lengths:
        seconds = interleaved(arms(n), options.rounds)
        rows.append([str(n), *(f"{seconds[a] / seconds['sdpa']:.2f}" if a in seconds else "–" for a in ARMS)])
        say(" ".join(rows[-1]))
    meaning = "\n".join(f"- `{arm}`: {text}" for arm, text in ARMS.items())
    extra = f"{memory(options.memory):.0f} MiB" if sys.platform == "linux" else "measured on Linux only"
    write_section(
        HEADING,
        f"""`python benchmarks/attention_statistics.py`: one causal call of 12 heads of 64, float32; time over that of
SDPA's forward.

{meaning}

{table(["N", *ARMS], rows)}

Median of {options.rounds}, interleaved in both orders. {machine("torch")} Patterns longer than {EAGER_LIMIT} were not
written out. Memory above inputs and outputs for `all` at N = {options.memory} and 12 heads: {extra}.""",
    )


if __name__ == "__main__":
    main()
