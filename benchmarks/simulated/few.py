"""Means that few examples carry: how often a t interval holds them, how often none is given, how often one is wrong."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import workbench
from workbench.analysis.statistics.intervals import carried_by_few, means_t

from .intervals import normal, uniform

SIZES = (8, 24, 64, 256)
LIGHT = ("normal", "uniform", "square of uniform: mass, entropy", "Student's t, 5 degrees")
HEADS = ["of", "n", "t interval holds the mean", "none is given", "one is given and wrong"]
_PROMPTS = 512  # of demo-lm, from which samples are drawn


def drawn(samples: int, n: int) -> Iterator[tuple[str, Tensor, float]]:
    """What is drawn, [sample, example], and its mean."""
    z, u = normal(samples, n, seed=n), uniform(samples, n, seed=n + 1)
    chi = torch.stack([normal(samples, n, seed=n + 2 + i) for i in range(5)]).square().mean(0)
    light = (z, u, u.square(), z / chi.sqrt())
    yield from zip(LIGHT, light, (0.0, 0.5, 1 / 3, 0.0), strict=True)
    yield "exponential", -u.log(), 1.0
    for sigma in (0.5, 1.0, 1.5, 2.0, 3.0):
        yield f"log-normal, σ = {sigma:g}", (sigma * z).exp(), float(torch.tensor(sigma**2 / 2).double().exp())
    for share in (0.2, 0.1, 0.05):
        yield f"normal, {share:.0%} of them 20 σ larger", z + 20 * (u < share), 20 * share


def row(of: str, values: Tensor, truth: float | Tensor) -> list[str]:
    """A line of the table, from [..., sample, example] and the mean [...]."""
    ends, few = means_t(values, checked=False), carried_by_few(values)
    truth = torch.as_tensor(truth, dtype=torch.float64)[..., None]
    held = (ends[..., 0] <= truth) & (truth <= ends[..., 1])
    shares = (held, few, ~held & ~few)
    return [of, str(values.shape[-1]), *(f"{float(each.double().mean()):.3f}" for each in shares)]


def measured(samples: int) -> list[list[str]]:
    """demo-lm on sentences with indirect objects: samples of prompts, of which all have the mean."""
    model, tokenizer = workbench.models.load("demo-lm")
    with workbench.attach(model, tokenizer) as wb:
        batches = list(workbench.tasks.ioi(_PROMPTS, seed=0).batches(tokenizer))
        metrics = ("loss", "logit_diff")
        found = workbench.head_importance(wb, batches, metrics, "zero", progress=False)
    rows = []
    for metric in metrics:
        values = found.examples("zero", metric)
        for n in (16, 32, 64):
            generator = torch.Generator().manual_seed(n)
            chosen = torch.randint(values.shape[1], (samples, n), generator=generator)
            rows.append(row(f"demo-lm without a head, by {metric}", values[:, chosen], values.mean(1)))
    return rows


def few_rows(samples: int) -> list[list[str]]:
    """The whole table."""
    simulated = [row(of, values, truth) for n in SIZES for of, values, truth in drawn(5 * samples, n)]
    return simulated + measured(samples)
