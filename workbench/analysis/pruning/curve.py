"""What is left of a model when its heads are pruned one after another, and how fast it then is."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from workbench.analysis.pruning.prune import prune_heads
from workbench.errors import InterventionError, WorkbenchError
from workbench.metrics import Metric, as_metrics
from workbench.session.workbench import Workbench
from workbench.storage.result import Result
from workbench.storage.typed import Between, Keys, Places
from workbench.sweep.inputs import check_batches
from workbench.sweep.run import run_sweep
from workbench.sweep.variants import Variant

if TYPE_CHECKING:
    import pandas as pd

GREEDY, RANDOM = "greedy", "random"


class Ranking(Protocol):
    """Scored heads, as `HeadImportance` has them."""

    @property
    def heads(self) -> tuple[str, ...]:
        """Labels of the heads, such as "L3H1"."""

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of what scored them."""

    def ranking(self, method: str | None = None, measure: str | None = None) -> list[str]:
        """Labels, the most important first."""

    def key(self, label: str) -> tuple[str, int]:
        """The head of a label, as interventions take it."""


@dataclass(frozen=True, repr=False)
class PruningCurve(Result):
    """Measures and speed of a model against how many heads it has lost.

    Attributes:
        counts: how many heads are pruned, ascending from 0. n_heads: of the whole model.
        orders: name -> labels, the first pruned first: the scored order, and "random 1" and so on.
        measures: names. higher_is_better: for each, whether a better model has more of it.
        values: order -> [count, measure, example].
        seconds: [count, round] of one forward of the really pruned model on the first batch; NaN where not measured.
        seconds_full: [count, round] of the whole model, measured in turn with it.
        parameters: [count] of the pruned model; NaN where not pruned.
        largest_difference: of the measures of the pruned models on the first batch from those of the ablated ones.
        reason: why there are no seconds; "" if there are.
    """

    form = "workbench.pruning_curve"
    filled: ClassVar = ("orders", "count", "round")

    counts: Annotated[tuple[int, ...], "count", Places("head", end=True)]
    n_heads: Annotated[int, "head", Between(1)]
    orders: dict[str, tuple[str, ...]]
    measures: Annotated[tuple[str, ...], "measure"]
    higher_is_better: Annotated[dict[str, bool], Keys("measures")]
    values: Annotated[dict[str, Float[Tensor, "count measure example"]], Keys("orders")]
    seconds: Float[Tensor, "count round"]
    seconds_full: Float[Tensor, "count round"]
    parameters: Float[Tensor, " count"]
    largest_difference: float
    reason: str
    provenance: dict[str, Any]

    def check_parts(self) -> None:
        """Orders hold as many heads as are pruned, or more: "greedy" ends with the last count."""
        for name, order in self.orders.items():
            if not max(self.counts) <= len(set(order)) == len(order) <= self.n_heads:
                raise WorkbenchError(
                    f"the order {name!r} has {len(order)} heads, {max(self.counts)} of {self.n_heads} go"
                )

    @property
    def by(self) -> str:
        """Name of the order that is not random."""
        return next(iter(self.orders))

    @property
    def speedup(self) -> Tensor:
        """[count] time of the whole model over that of the pruned one, medians over rounds; NaN where not measured."""
        return self.seconds_full.median(1).values / self.seconds.median(1).values

    @property
    def table(self) -> pd.DataFrame:
        """One row per order, count and measure, with the speed-up and the share of parameters of the scored order."""
        import pandas as pd

        speedup, share = self.speedup, self.parameters / self.parameters[0]
        rows = [
            {
                "order": name,
                "pruned": count,
                "share_pruned": count / self.n_heads,
                "measure": measure,
                "value": float(values[i, j].mean()),
                "std": float(values[i, j].std(correction=0)),
                "last_pruned": self.orders[name][count - 1] if count else "",
                "speedup": float(speedup[i]) if name == self.by else float("nan"),
                "share_parameters": float(share[i]) if name == self.by else float("nan"),
            }
            for name, values in self.values.items()
            for i, count in enumerate(self.counts)
            for j, measure in enumerate(self.measures)
        ]
        return pd.DataFrame(rows)

    def mean(self, order: str | None = None, measure: str | None = None) -> Tensor:
        """[count] mean over examples; of "random", over all random orders too."""
        j = self.measures.index(measure or self.measures[0])
        name = order or self.by
        found = [values for own, values in self.values.items() if own == name or own.startswith(f"{name} ")]
        if not found:
            raise WorkbenchError(f'there is no order "{name}"', hint=f"there is {', '.join(self.orders)}")
        return torch.stack([values[:, j].mean(1) for values in found]).mean(0)

    def __repr__(self) -> str:
        lines = [f"PruningCurve: {self.n_heads} heads, by {self.by}"]
        for measure in self.measures:
            names = [self.by, *([RANDOM] if any(name.startswith(f"{RANDOM} ") for name in self.orders) else [])]
            for name in names:
                shown = ", ".join(
                    f"{count}: {float(mean):.3g}"
                    for count, mean in zip(self.counts, self.mean(name, measure), strict=True)
                )
                lines.append(f"  {measure}, {name}: {shown}")
        if self.reason:
            lines.append(f"  speed: none; {self.reason}")
        else:
            shown = ", ".join(f"{count}: {float(x):.2f}x" for count, x in zip(self.counts, self.speedup, strict=True))
            lines.append(f"  speed: {shown}")
        return "\n".join(lines)


def prune_curve(
    scores: Ranking,
    wb: Workbench,
    batches: Iterable[Mapping[str, Any]],
    by: str | Sequence[str] | None = None,
    *,
    metric: Any = None,
    score_measure: str | None = None,
    counts: Sequence[int] | None = None,
    greedy_step: int = 1,
    n_random: int = 3,
    seed: int = 0,
    speed: bool = True,
    rounds: int = 5,
    progress: bool = True,
    **sweep: Any,
) -> PruningCurve:
    """Prune heads one after another and measure the model at each count.

    Measures are those of the zero-ablated model, which `prune_heads` gives too; where models of the kind can really be
    pruned, speed and the measures on the first batch are taken from smaller copies.

    Args:
        scores: whose heads are pruned.
        by: a method of `scores`, the least important first; "greedy", which scores all heads left by zero ablation
            after each step; or labels in the order in which they go.
        metric: as in `head_importance`. "greedy" goes by the first. By default the loss.
        score_measure: which measure of `scores` orders the heads; the method's first by default.
        counts: how many heads are pruned at the points of the curve; about ten, evenly, by default.
        greedy_step: heads that go before "greedy" scores again.
        n_random: random orders to compare with. seed: of them.
        speed: whether to prune copies and time them on the first batch, `rounds` times in turn with the whole model.
        progress, **sweep: as in `workbench.run_sweep`.

    Raises:
        WorkbenchError: an unknown method or measure, counts that are out of range, bad batches or metrics.
    """
    measures = as_metrics("loss" if metric is None else metric)
    several = check_batches(wb.model, batches)
    points = _points(counts, len(scores.heads))
    name, order = _order(scores, by, score_measure)
    if name == GREEDY:
        order = _greedy(scores, wb, several, next(iter(measures.values())), points[-1], greedy_step, progress, sweep)
    orders = {name: order}
    generator = torch.Generator().manual_seed(seed)
    for i in range(n_random):
        shuffled = torch.randperm(len(scores.heads), generator=generator).tolist()
        orders[f"{RANDOM} {i + 1}"] = tuple(scores.heads[j] for j in shuffled)
    variants = [
        Variant([scores.key(label) for label in own[:count]], label=f"{each} {count}")
        for each, own in orders.items()
        for count in points
        if count
    ]
    swept = run_sweep(wb, variants, several, measures, progress=progress, **sweep)
    found = dict(zip(swept.variants, swept.values, strict=True))
    clean = swept.clean.clone()
    for j, measure in enumerate(measures.values()):
        if measure.against_clean:
            clean[j] = 0.0
    values = {each: torch.stack([found[f"{each} {count}"] if count else clean for count in points]) for each in orders}
    timing = _Timing(points, rounds)
    if speed:
        timing.run(scores, wb, several[0], order, measures, values[name], progress)
    return PruningCurve(
        counts=tuple(points),
        n_heads=len(scores.heads),
        orders=orders,
        measures=tuple(measures),
        higher_is_better={each: measure.higher_is_better for each, measure in measures.items()},
        values=values,
        seconds=timing.seconds,
        seconds_full=timing.seconds_full,
        parameters=timing.parameters,
        largest_difference=timing.largest_difference,
        reason=timing.reason if speed else "it was not asked for",
        provenance=wb.provenance() | {"seed": seed},
    )


def _points(counts: Sequence[int] | None, n_heads: int) -> list[int]:
    if counts is None:
        steps = min(n_heads, 10)
        return sorted({round(i * n_heads / steps) for i in range(steps + 1)})
    found = sorted({0, *counts})
    if len(found) < 2 or found[0] < 0 or found[-1] > n_heads:
        raise WorkbenchError(f"counts are numbers of heads from 0 to {n_heads}, not {list(counts)}")
    return found


def _order(scores: Ranking, by: Any, measure: str | None) -> tuple[str, tuple[str, ...]]:
    """The name of an order, and its labels, the first to go first."""
    if by == GREEDY:
        return GREEDY, ()
    if by is None or isinstance(by, str):
        name = scores.methods[0] if by is None else by
        return name, tuple(reversed(scores.ranking(by, measure)))
    given = tuple(by)
    if sorted(given) != sorted(scores.heads):
        raise WorkbenchError(
            f"an order names each of the {len(scores.heads)} heads once",
            hint=f"such as {', '.join(scores.heads[:3])}, …",
        )
    return "given", given


def _greedy(
    scores: Ranking,
    wb: Workbench,
    batches: Sequence[Mapping[str, Any]],
    measure: Metric,
    enough: int,
    step: int,
    progress: bool,
    sweep: dict[str, Any],
) -> tuple[str, ...]:
    """Heads in the order in which they go when each step takes those that harm least, scored on what is left."""
    if step < 1:
        raise WorkbenchError(f"a greedy step takes at least 1 head, not {step}")
    left = list(scores.heads)
    gone: list[str] = []
    with tqdm(total=enough, desc="greedy", disable=not progress) as bar:
        while left and len(gone) < enough:
            base = Variant([scores.key(label) for label in gone], label="gone") if gone else None
            variants = [Variant(scores.key(label), label=label) for label in left]
            swept = run_sweep(wb, variants, batches, {"measure": measure}, base=base, progress=False, **sweep)
            harm = measure.harm(swept.values[:, 0], swept.clean[0]).mean(1)
            taken = [left[i] for i in harm.sort(stable=True).indices[:step].tolist()]
            gone += taken
            left = [label for label in left if label not in taken]
            bar.update(len(taken))
    return (*gone, *left)


class _Timing:
    """Pruned copies, timed in turn with the whole model."""

    def __init__(self, counts: Sequence[int], rounds: int) -> None:
        self.counts = counts
        self.rounds = rounds
        self.seconds = torch.full((len(counts), rounds), torch.nan, dtype=torch.float64)
        self.seconds_full = torch.full((len(counts), rounds), torch.nan, dtype=torch.float64)
        self.parameters = torch.full((len(counts),), torch.nan, dtype=torch.float64)
        self.largest_difference = float("nan")
        self.reason = ""

    def run(
        self,
        scores: Ranking,
        wb: Workbench,
        batch: Mapping[str, Any],
        order: Sequence[str],
        measures: Mapping[str, Metric],
        ablated: Tensor,
        progress: bool,
    ) -> None:
        """Time and measure the copies that can be made; `ablated` is [count, measure, example] of the same order."""
        differences = []
        with torch.no_grad():
            clean = wb.model(**batch)
            for i, count in enumerate(tqdm(self.counts, desc="speed", disable=not progress)):
                try:
                    keys = [scores.key(label) for label in order[:count]]
                    smaller = prune_heads(wb.model, keys) if count else wb.model
                except InterventionError as error:
                    self.reason = self.reason or f"with {count} heads pruned, {error.message}"
                    continue
                self.parameters[i] = sum(p.numel() for p in smaller.parameters())
                output = smaller(**batch)
                for j, measure in enumerate(measures.values()):
                    value = measure(output, batch, clean).double().cpu()
                    differences.append(float((value - ablated[i, j, : len(value)]).abs().max()))
                for turn in range(self.rounds):
                    pair = [(self.seconds, smaller), (self.seconds_full, wb.model)]
                    for held, model in pair if turn % 2 else pair[::-1]:
                        held[i, turn] = _seconds(model, batch)
        self.largest_difference = max(differences, default=float("nan"))
        if not bool(self.seconds[1:].isnan().all()):
            self.reason = ""


def _seconds(model: nn.Module, batch: Mapping[str, Any]) -> float:
    on_gpu = any(isinstance(t, Tensor) and t.is_cuda for t in batch.values())
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    model(**batch)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start
