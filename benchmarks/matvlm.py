"""MaTVLM at our scale: what is lost as attention is replaced by Mamba-2 layers that begin as it, and what they cost.

The teacher is the shipped demo-lm (6 layers, 8 heads). Students have a share of its layers replaced, evenly spaced, and
are distilled on the formats that it was trained on, new layers alone; held-out tasks and the KL of the logits tell what
is left, beside students whose new layers begin at random. Cost: one layer of each kind at growing length. Writes its
sections of docs/benchmarks.md.

    python benchmarks/matvlm.py [--steps 300] [--prompts 200] [--part quality|cost] [--quick] [--dry]
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from shared.measuring import exponent, interleaved, machine, say, table, write_section
from torch import Tensor, nn

import workbench
from workbench.analysis.statistics.intervals import mean_t, proportions
from workbench.mechanisms.matvlm import Mamba2, distil, evenly_spaced, hybrid_maps, losses, student
from workbench.metrics import METRICS
from workbench.models.training.formats import FORMATS, held_out, to_tensors

SHARES = (0.0, 1 / 6, 1 / 3, 0.5, 1.0)
ROWS, RATE = 8, 3e-3
LENGTHS = tuple(256 << i for i in range(6))
HEADING = "Attention replaced by Mamba-2"


def batches(n: int, seed: int, tokenizer: Any) -> Iterator[dict[str, Tensor]]:
    """Rows of the formats that the teacher was trained on, one format at a time."""
    ids = tokenizer.get_vocab()
    words = sorted(word for word in ids if word not in set(tokenizer.all_special_tokens))
    names = list(FORMATS)
    for i in range(n):
        rng = random.Random(f"{seed}/{i}")
        yield {"input_ids": to_tensors(FORMATS[names[i % len(names)]](ROWS, rng, words), ids)[0]}


def right(model: nn.Module, task: Any, tokenizer: Any) -> Tensor:
    """[example] whether each prompt is answered right."""
    with torch.no_grad():
        return torch.cat([METRICS["accuracy"](model(**batch), batch) for batch in task.batches(tokenizer, 100)])


def quality(steps: int, prompts: int) -> str:
    """The section on what is lost."""
    model, tokenizer = workbench.models.load("demo-lm")
    wb = workbench.attach(model.float().eval(), tokenizer)
    n_layers, tasks = len(wb.sites), held_out(prompts, 77)
    fresh = list(batches(14, 1, tokenizer))
    rows, unmatched = [], []
    for share, seeded in [*((s, True) for s in SHARES), *((s, False) for s in SHARES[2:])]:
        made = student(wb, evenly_spaced(n_layers, share), seeded=seeded)
        if made.replaced:
            distil(wb, made, batches(steps, 0, tokenizer), rate=RATE, progress=False)
        made.eval()
        with torch.no_grad():
            away = torch.tensor([float(losses(wb.model, made, one)[0].logits) for one in fresh], dtype=torch.float64)
        low, high = mean_t(away)
        cells = [f"{float(away.mean()):.3f} ({max(low, 0):.3f} to {high:.3f})"]
        for task in tasks.values():
            found = right(made.model, task, tokenizer)
            ends = proportions(found.double())
            cells.append(f"{float(found.float().mean()):.2f} ({float(ends[0]):.2f} to {float(ends[1]):.2f})")
        rows.append([f"{len(made.replaced)} of {n_layers}", "attention" if seeded else "random", *cells])
        say(" | ".join(rows[-1]))
        if share == 0.5 and seeded:
            maps = hybrid_maps(wb, made, [{"input_ids": one["input_ids"][:1]} for one in fresh])
            unmatched = [f"{len(maps.unmatched)} of {len(maps.numbers)}", f"{float(maps.alike.mean()):.2f}"]
    heads = ["replaced", "begins as", "KL, nats a token", *(name.replace("_", " ") for name in tasks)]
    return f"""`python benchmarks/matvlm.py`: demo-lm (6 layers, 8 heads) as the teacher; students with Mamba-2 layers
seeded from its attention (MaTVLM, arXiv 2503.13440) or drawn at random, {steps} steps of {ROWS} rows, new layers alone
trained. At our scale: not the paper's model, data or length of training.

{table(heads, rows)}

Accuracy on {prompts} held-out prompts of each task with Clopper and Pearson's 95 % intervals; KL over {len(fresh)}
batches with its t interval. With half of the layers replaced, {unmatched[0]} heads were not surely more like their own
teacher's map than like those of the layer's other heads; the mean cosine was {unmatched[1]}.
{machine("torch", "transformers")}"""


class Attention(nn.Module):
    """One layer of causal attention of the teacher's sizes."""

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads, self.qkv, self.out = n_heads, nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(z.transpose(1, 2).flatten(2))


def cost(lengths: tuple[int, ...], rounds: int) -> str:
    """The section on what a layer costs."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = {"attention": Attention(128, 8), "mamba-2": Mamba2(128, 8, 16)}
    found: dict[str, dict[int, float]] = {name: {} for name in layers}
    with torch.no_grad():
        for n in lengths:
            x = torch.randn(1, n, 128)
            for name, seconds in interleaved(
                {name: partial(layer, x) for name, layer in layers.items()}, rounds
            ).items():
                found[name][n] = seconds
            say(f"{n}: " + ", ".join(f"{name} {found[name][n]:.4g} s" for name in layers))
    rows = [[str(n), f"{found['mamba-2'][n] / found['attention'][n]:.2f}"] for n in lengths]
    p = {name: exponent(dict(list(values.items())[-3:])) for name, values in found.items()}
    return f"""One layer of the teacher's sizes (d_model 128, 8 heads), batch 1, float32, one thread, forward: time of
the Mamba-2 layer over that of causal SDPA attention with its projections.

{table(["N", "Mamba-2 / attention"], rows)}

Over the three longest, time grows as N^{p["mamba-2"]:.2f} and N^{p["attention"]:.2f}. Median of {rounds} interleaved
rounds. {machine("torch")}"""


def main() -> None:
    """Measure, and write the sections."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--part", choices=["quality", "cost"], help="both if not given")
    parser.add_argument("--quick", action="store_true", help="few steps and prompts, and nothing is written")
    parser.add_argument("--dry", action="store_true", help="print the sections, and write none")
    options = parser.parse_args()
    quiet = options.quick or options.dry
    put = (lambda heading, text: print(f"## {heading}\n\n{text}\n")) if quiet else write_section
    steps, prompts, rounds = (4, 20, 1) if options.quick else (options.steps, options.prompts, options.rounds)
    if options.part != "cost":
        put(f"{HEADING}: quality", quality(steps, prompts))
    if options.part != "quality":
        put(f"{HEADING}: cost", cost(LENGTHS[:3] if options.quick else LENGTHS, rounds))


if __name__ == "__main__":
    main()
