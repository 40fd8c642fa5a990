"""What `head_importance` finds: a score for each head, by each method and measure, on each example."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.analysis.pruning.curve import PruningCurve, prune_curve
from workbench.analysis.statistics.correlation import spearman
from workbench.analysis.statistics.intervals import effective_examples, means_t, medians, without_interval
from workbench.errors import WorkbenchError, nearest
from workbench.session.workbench import Workbench
from workbench.storage.result import Result
from workbench.storage.typed import Between, Keys

if TYPE_CHECKING:
    import pandas as pd

GRADIENTS = ("gradient", "gradient_magnitude", "attention_gradient")


@dataclass(frozen=True, repr=False)
class HeadImportance(Result):
    """How much a model needs each of its heads.

    Scores are signed and in the measure's unit: positive where the model is worse without the head (or, for the
    gradients, would be to first order), negative where it is better.

    Attributes:
        heads: their labels, in the order of sites and heads. sites: for each, the alias of its site.
        layers, numbers, kinds: for each, its layer, its number in its site, and its site's kind.
        methods: "zero", "mean", "resample", "keep_only", "gradient", "gradient_magnitude", "attention_gradient", and
            the names of parts.
        measures: names of what the model was measured with.
        scores: (method, measure) -> [head, example], float64.
        clean: measure -> [example], of the unedited model; zeros for a divergence.
        skipped: (method, measure) -> why there is no such score.
        higher_is_better: measure -> whether a better model has more of it.
        normalised: whether each layer's scores of the gradient methods are divided by their Euclidean length.
        grid: rows and columns of patches, or None. seed: of resampling. level: of the intervals.
        mode: how the sweep ran, "resumed" or "full"; "" if there was none.
    """

    form = "workbench.head_importance"
    filled: ClassVar = ("measure", "example")

    heads: Annotated[tuple[str, ...], "head"]
    sites: Annotated[tuple[str, ...], "head"]
    layers: Annotated[tuple[int, ...], "head"]
    numbers: Annotated[tuple[int, ...], "head"]
    kinds: Annotated[tuple[str, ...], "head"]
    methods: tuple[str, ...]
    measures: Annotated[tuple[str, ...], "measure"]
    scores: Annotated[dict[tuple[str, str], Float[Tensor, "head example"]], Keys("methods measures", some=True)]
    clean: Annotated[dict[str, Float[Tensor, " example"]], Keys("measures")]
    skipped: Annotated[dict[tuple[str, str], str], Keys("methods measures", some=True)]
    higher_is_better: Annotated[dict[str, bool], Keys("measures")]
    normalised: bool
    grid: tuple[int, int] | None
    seed: int
    level: Annotated[float, Between(0, 1)]
    mode: str
    provenance: dict[str, Any]

    @property
    def n_examples(self) -> int:
        """How many examples were measured."""
        return len(next(iter(self.clean.values())))

    def examples(self, method: str | None = None, measure: str | None = None) -> Tensor:
        """[head, example] scores, of the first method and measure unless named.

        Raises:
            WorkbenchError: there are none, and why.
        """
        method, measure = self._key(method, measure)
        found = self.scores[method, measure].double()
        if not self.normalised or method not in GRADIENTS:
            return found
        means, scaled = found.mean(1), found.clone()
        for site in dict.fromkeys(self.sites):
            rows = torch.tensor([own == site for own in self.sites])
            length = means[rows].norm()
            scaled[rows] = found[rows] / length if float(length) > 0 else 0.0
        return scaled

    def score(self, method: str | None = None, measure: str | None = None) -> Tensor:
        """[head] mean score over the examples."""
        return self.examples(method, measure).mean(1)

    def interval(self, method: str | None = None, measure: str | None = None) -> Tensor:
        """[head, 2] Student's t interval of the mean score over examples, at `level`.

        It is of the mean over prompts like these. NaN with one example; and where few of eight examples or more carry
        the mean (`workbench.analysis.statistics.intervals.carried_by_few`), as of a loss that is nearly 0 on most:
        there no interval of a mean holds what it promises. Go by `median`, by a measure that no example dominates, such
        as "logit_diff", or take more examples. The lengths of layers count as known where scores are normalised.
        """
        return means_t(self.examples(method, measure), self.level)

    def effective(self, method: str | None = None, measure: str | None = None) -> Tensor:
        """[head] how many examples carry the mean score: (Σ|e|)² / Σe²."""
        return effective_examples(self.examples(method, measure))

    def median(self, method: str | None = None, measure: str | None = None) -> Tensor:
        """[head, 3] the median score over examples, and the ends of its interval at `level`, by order statistics."""
        return medians(self.examples(method, measure), self.level)

    def ranking(self, method: str | None = None, measure: str | None = None, *, absolute: bool = False) -> list[str]:
        """Labels of the heads, the most important first; `absolute`: whether it helps or hurts."""
        score = self.score(method, measure)
        order = (score.abs() if absolute else score).sort(descending=True, stable=True).indices
        return [self.heads[i] for i in order.tolist()]

    def key(self, label: str) -> tuple[str, int]:
        """The head of a label as interventions take it: (site alias, number).

        Raises:
            WorkbenchError: there is no such head.
        """
        if label not in self.heads:
            raise WorkbenchError(f'there is no head "{label}"', hint=nearest(label, self.heads, "head"))
        i = self.heads.index(label)
        return self.sites[i], self.numbers[i]

    @property
    def table(self) -> pd.DataFrame:
        """One row per head, method and measure: mean score with its interval, standard deviation, and rank; median
        with its interval; how many examples carry the mean, and the share of the one that carries most of it, by its
        number."""
        import pandas as pd

        frames = []
        for method, measure in self.scores:
            found, ends = self.examples(method, measure), self.interval(method, measure)
            score, middle, largest = found.mean(1), self.median(method, measure), found.abs().max(1)
            frame = pd.DataFrame(
                {
                    "head": self.heads,
                    "site": self.sites,
                    "kind": self.kinds,
                    "layer": self.layers,
                    "number": self.numbers,
                    "method": method,
                    "measure": measure,
                    "score": score.numpy(),
                    "low": ends[:, 0].numpy(),
                    "high": ends[:, 1].numpy(),
                    "std": found.std(1, correction=0).numpy(),
                    "rank": (-score).argsort(stable=True).argsort(stable=True).numpy() + 1,
                    "median": middle[:, 0].numpy(),
                    "median_low": middle[:, 1].numpy(),
                    "median_high": middle[:, 2].numpy(),
                    "effective_examples": self.effective(method, measure).numpy(),
                    "largest_share": (largest.values / found.abs().sum(1).clamp_min(1e-300)).numpy(),
                    "largest_example": largest.indices.numpy(),
                }
            )
            frames.append(frame)
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    @property
    def correlations(self) -> pd.DataFrame:
        """Spearman's rank correlation between the scores of all methods and measures; ties share their mean rank."""
        import pandas as pd

        names = [f"{method}, {measure}" for method, measure in self.scores]
        scores = torch.stack([self.score(method, measure) for method, measure in self.scores])
        return pd.DataFrame(spearman(scores[:, None], scores[None]).numpy(), index=names, columns=names)

    def curve(
        self, wb: Workbench, batches: Iterable[Mapping[str, Any]], by: str | None = None, **options: Any
    ) -> PruningCurve:
        """Prune heads one after another, the least important first; see `workbench.analysis.importance.prune_curve`.

        Args:
            by: the method whose order is taken; "greedy" to score anew after each step; the first method by default.
        """
        return prune_curve(self, wb, batches, by, **options)

    def _key(self, method: str | None, measure: str | None) -> tuple[str, str]:
        method = self.methods[0] if method is None else "zero" if method == "ablation" else method
        if method not in self.methods:
            raise WorkbenchError(f'there is no method "{method}"', hint=nearest(method, self.methods, "method"))
        if measure is None:
            measure = next((name for name in self.measures if (method, name) in self.scores), self.measures[0])
        if measure not in self.measures:
            raise WorkbenchError(f'there is no measure "{measure}"', hint=nearest(measure, self.measures, "measure"))
        if (method, measure) not in self.scores:
            raise WorkbenchError(f'"{method}" has no score of "{measure}": {self.skipped[method, measure]}')
        return method, measure

    def __repr__(self) -> str:
        lines = [f"HeadImportance: {len(self.heads)} heads, {self.n_examples} examples"]
        for method, measure in self.scores:
            score, ends = self.score(method, measure), self.interval(method, measure)
            best = [self.heads.index(label) for label in self.ranking(method, measure)[:3]]
            spans = [
                f" [{float(low):.3g}, {float(high):.3g}]" if bool(low.isfinite()) else "" for low, high in ends[best]
            ]
            shown = ", ".join(
                f"{self.heads[i]} {float(score[i]):.3g}{span}" for i, span in zip(best, spans, strict=True)
            )
            said = without_interval(ends, self.n_examples)
            said = f"{said}: see median, or take more" if said else ""
            said = "; no interval from one example" if self.n_examples == 1 else said
            lines.append(f"  {method}, {measure}: {shown}{said}")
        lines += [f"  {method}, {measure}: none; {why}" for (method, measure), why in self.skipped.items()]
        return "\n".join(lines)
