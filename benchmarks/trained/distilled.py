"""What is claimed of models whose attention is replaced by Mamba-2 layers, and the rules by which the claims hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean, median
from typing import Any

import torch
from shared.measuring import exponent

from trained.claims import Found
from workbench.analysis.statistics.intervals import mean_t

BY = "benchmarks/matvlm.py"
MECHANISM = "matvlm"
NEARLY, BEGINS, FASTER = (
    "With a quarter of its layers replaced a model is nearly as good as before.",
    "Layers that begin as the attention that they replace end nearer to it than layers drawn anew.",
    "Models with such layers are faster than with attention alone, the more so on long inputs.",
)
MARGIN = 0.05  # of the share of right answers: what is nearly as good
LAYERS = 6  # of the teacher
Run = Mapping[str, Any]


def claims(data: Mapping[str, Any]) -> dict[str, dict[str, dict[str, str]]]:
    """By mechanism and claim, as cards read it; only what there are figures of."""
    runs, times = data.get("runs", []), data.get("times", {})
    judged = {NEARLY: nearly(runs), BEGINS: begins(runs), FASTER: faster(times)}
    return {MECHANISM: {says: asdict(found) for says, found in judged.items() if found is not None}}


def of(runs: Sequence[Run], replaced: int, seeded: bool = True) -> list[Run]:
    """The students with so many layers replaced, in the order of their seeds."""
    return sorted((r for r in runs if (r["replaced"], r["seeded"]) == (replaced, seeded)), key=lambda r: r["seed"])


def nearly(runs: Sequence[Run]) -> Found | None:
    """A quarter of six lies between one layer and two: it holds where two lose little, and does not where one loses
    more.
    """
    teachers, told, ends = of(runs, 0), [], []
    if not teachers:
        return None
    whole = _right(teachers[0])
    for n in (1, 2):
        students = of(runs, n)
        if len(students) < 3:
            return None
        low, high = _interval([whole - _right(each) for each in students])
        ends.append((low, high))
        nats, right = (fmean(each) for each in ([_nats(s) for s in students], [_right(s) for s in students]))
        told.append(
            f"{n} of {LAYERS} replaced {right:.3f}, less by {whole - right:.3f} (95 %: {low:.3f} to {high:.3f}), "
            f"logits {nats:.2f} nats away"
        )
    outcome = "holds" if ends[1][1] < MARGIN else "does not hold" if ends[0][0] > MARGIN else "undecided"
    how = (
        f"right answers to held-out prompts, mean of four tasks; less by under {MARGIN:g} with two layers, or by more "
        f"with one? demo-lm, new layers alone trained; seeds: {len(of(runs, 1))}; Student's t over seeds; {BY}"
    )
    return Found(how, f"{whole:.3f} before; {'; '.join(told)}", outcome)


def begins(runs: Sequence[Run]) -> Found | None:
    """Students that begin as attention against those drawn at random, seed by seed."""
    pairs = list(zip(of(runs, 2), of(runs, 2, seeded=False), strict=False))
    if len(pairs) < 3:
        return None
    low, high = _interval([_nats(drawn) - _nats(seeded) for seeded, drawn in pairs])
    seeded, drawn = (fmean(_nats(pair[at]) for pair in pairs) for at in (0, 1))
    outcome = "holds" if low > 0 else "does not hold" if high < 0 else "undecided"
    how = (
        f"KL of the logits after as many steps, nats a token, 2 of {LAYERS} layers of demo-lm replaced; seeds: "
        f"{len(pairs)}, paired; Student's t; {BY}"
    )
    found = f"{seeded:.2f} begun as attention, {drawn:.2f} drawn anew, nearer by {drawn - seeded:.2f}"
    return Found(how, f"{found} (95 %: {low:.2f} to {high:.2f})", outcome)


def faster(times: Mapping[str, Mapping[str, Sequence[float]]]) -> Found | None:
    """One layer of each kind: below the time of attention where inputs are long, and less of it than where short."""
    if not times:
        return None
    over = ratios(times)
    short, long = min(over), max(over)
    outcome = "undecided"
    if max(over[long]) < min(1.0, *over[short]):
        outcome = "holds"
    elif min(over[long]) > 1:
        outcome = "does not hold"
    ends = [f"{median(over[n]):.2f} ({min(over[n]):.2f} to {max(over[n]):.2f}) at {n:,}" for n in (short, long)]
    grows = " and ".join(f"{slopes(times)[name]:.2f}" for name in ("mamba-2", "attention"))
    how = (
        "time of one layer over that of causal attention, forward, 8 heads of 16, with projections; below 1 on the "
        f"longest input, and less than on the shortest? Median and ends of all rounds; {BY}"
    )
    return Found(how, f"{' and '.join(ends)} tokens; growing with exponents {grows}", outcome)


def ratios(times: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[int, list[float]]:
    """By length: time of the Mamba-2 layer over that of attention in each round."""
    own, plain = times["mamba-2"], times["attention"]
    return {int(n): [a / b for a, b in zip(own[n], plain[n], strict=True)] for n in own}


def slopes(times: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """Exponents of the medians over the three longest."""
    found = {}
    for name, of_layer in times.items():
        longest = sorted(of_layer, key=int)[-3:]
        found[name] = exponent({int(n): median(of_layer[n]) for n in longest})
    return found


def _right(run: Run) -> float:
    return fmean(run["right"].values())


def _nats(run: Run) -> float:
    return fmean(run["nats"])


def _interval(values: Sequence[float]) -> tuple[float, float]:
    low, high = mean_t(torch.tensor(values, dtype=torch.float64))
    return float(low), float(high)
