"""What is claimed of mechanisms, and the rule by which each claim holds or does not: written down before any figure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from trained.plan import HYBRIDS, PLAIN, Model
from trained.runs import LOSSES, Difference, Runs
from workbench.analysis.statistics.intervals import rank_correlation

BY = "benchmarks/rooms.py"
MARGIN = 0.02  # nats a byte, or a share of the images: what is as good


@dataclass(frozen=True)
class Found:
    """What a card says of a claim: see `Claim`."""

    how: str
    found: str
    outcome: str


class Rule(Protocol):
    """How a claim is examined; None where the runs that it needs are missing."""

    mechanism: str
    says: str

    def examine(self, runs: Runs) -> Found | None: ...


@dataclass(frozen=True)
class AsGood:
    """Each of the models is worse than the baseline by less than the margin.

    Attributes:
        baseline: plain attention of the same work if None.
        needs: what the baseline has to reach, so that there is something to lose.
        also: scores that are told and do not count.
        sizes: whether the models' parameters are told.
    """

    mechanism: str
    says: str
    models: tuple[Model, ...]
    score: str = "text"
    margin: float = MARGIN
    baseline: Model | None = None
    needs: float | None = None
    also: tuple[str, ...] = ()
    sizes: bool = False

    def examine(self, runs: Runs) -> Found | None:
        baseline = self.baseline or Model(self.models[0].work, PLAIN)
        found = _differences(runs, [(each, baseline) for each in self.models], self.score)
        if not found:
            return None
        if all(each.high < self.margin for each in found):
            outcome = "holds"
        else:
            outcome = "does not hold" if any(each.low > self.margin for each in found) else "undecided"
        how = f"margin {self.margin:g}"
        if self.needs is not None:
            how += f", undecided where {named(baseline)} is below {self.needs:g}"
            outcome = outcome if found[0].b >= self.needs else "undecided"
        return _told(runs, found, outcome, self.score, how, self.also, self.sizes)


@dataclass(frozen=True)
class Better:
    """The first model is better than each of the others, by more than the margin."""

    mechanism: str
    says: str
    model: Model
    others: tuple[Model, ...]
    score: str = "text"
    margin: float = 0.0
    also: tuple[str, ...] = ()
    sizes: bool = False

    def examine(self, runs: Runs) -> Found | None:
        found = _differences(runs, [(each, self.model) for each in self.others], self.score)
        if not found:
            return None
        if all(each.low > self.margin for each in found):
            outcome = "holds"
        else:
            outcome = "does not hold" if any(each.high < self.margin for each in found) else "undecided"
        how = f"margin {self.margin:g}" if self.margin else ""
        return _told(runs, found, outcome, self.score, how, self.also, self.sizes)


@dataclass(frozen=True)
class Likes:
    """Over the routed heads of all runs, the mean gate goes with what the loss gains when the head is switched off."""

    mechanism: str
    says: str
    models: tuple[Model, ...]

    def examine(self, runs: Runs) -> Found | None:
        from scipy.stats import rankdata, spearmanr

        gates, costs, n_runs = [], [], 0
        for run in (run for each in self.models for run in runs.of(each)):
            routed = run["heads"]
            gates += list(rankdata([head["gate"] for head in routed]))
            costs += list(rankdata([head["cost"] for head in routed]))
            n_runs += 1
        if not n_runs:
            return None
        rho = float(spearmanr(gates, costs).statistic)
        low, high = rank_correlation(rho, len(gates))
        outcome = "holds" if low > 0 else "does not hold" if high < 0 else "undecided"
        how = (
            f"Spearman's ρ of mean gate and cost in text loss of zero ablation, ranked within each model, of "
            f"{len(gates)} routed heads of {n_runs} models as if they were independent, {BY}"
        )
        return Found(how, f"ρ = {rho:+.2f} (95 %: {low:+.2f} to {high:+.2f})", outcome)


def _differences(runs: Runs, pairs: Sequence[tuple[Model, Model]], score: str) -> list[Difference]:
    """How much worse the first of each pair is; none where one of them cannot be said."""
    found = [runs.worse(a, b, score) for a, b in pairs]
    return [each for each in found if each is not None] if all(found) else []


def _told(
    runs: Runs, found: Sequence[Difference], outcome: str, score: str, how: str, also: Sequence[str], sizes: bool
) -> Found:
    than = found[0].than
    parts = [f"{named(than)} {found[0].b:.3f}"]
    for each in found:
        parts.append(f"{named(each.model)} {each.a:.3f}, worse by {each.mean:+.3f} {interval(each)}")
    models = [than, *(each.model for each in found)]
    for other in also:
        parts.append(f"{other}: " + ", ".join(f"{named(each)} {runs.mean(each, other):.2f}" for each in models))
    if sizes:
        counted = ", ".join(f"{named(each)} {runs.of(each)[0]['parameters']:,}" for each in models)
        parts.append(f"parameters: {counted}")
    counts = " and ".join(f"{a} against {b}" for a, b in sorted({(each.n_a, each.n_b) for each in found}))
    unit = "held-out nats a byte" if score in LOSSES else "share of right answers"
    told = [
        f"{score}: {unit}", how, f"seeds: {counts}", f"spread of seeds pooled over models, df {found[0].df}", BY
    ]  # fmt: skip
    return Found("; ".join(filter(None, told)), "; ".join(parts), outcome)


def named(model: Model) -> str:
    """A model in words."""
    return "plain attention" if model == Model(model.work, PLAIN) else str(model)


def interval(found: Difference) -> str:
    """The interval of a difference, in words."""
    return f"(95 %: {found.low:+.3f} to {found.high:+.3f})"


def _text(name: str) -> Model:
    return Model("text", name)


def _images(name: str, mlp: bool = True) -> Model:
    return Model("images", name, mlp=mlp)


RULES: tuple[Rule, ...] = (
    Better(
        "sqa", "At equal parameters the loss is a little above that of grouped-query attention.",
        _text("sqa:gqa"), (_text("sqa"),), also=("copy", "recall 26"),
    ),
    AsGood(
        "moh", "With 50 to 90 % of its heads active it is as good as attention with all heads.",
        (_text("moh"), _text("moh:half")), also=("copy", "recall 26"),
    ),
    Likes(
        "moh", "Heads that the router likes are those whose ablation costs most.", (_text("moh"), _text("moh:half"))
    ),
    AsGood(
        "aaren", "It is as good as a transformer of equal size on sequence tasks.",
        (_text("aaren"),), also=("copy", "recall 8"),
    ),
    AsGood(
        "s2", "Models with it reach the loss of models with dense attention.", (_text("s2"),),
        also=("copy", "recall 26"),
    ),
    AsGood(
        "s2", "A few dense heads find a needle over the whole length.", (_text("s2:one dense head"),),
        score="needle far", margin=0.05, needs=0.5,
    ),
    Better(
        "rcmha", "It is more accurate than relative attention without filters.",
        _text("rcmha"), (_text("rcmha:relative"),), also=("copy", "recall 26"),
    ),
    AsGood(
        "long_lora", "Models trained with shifted groups reach about the loss of training with full attention.",
        (_text("long_lora"),), score="text, all seen",
    ),
    Better(
        "long_lora", "Without the shift information does not pass between groups, and the loss is higher.",
        _text("long_lora"), (_text("long_lora:unshifted"),), also=("needle far",),
    ),
    Better(
        "sink_lora", "It is nearer to full attention than LongLoRA's shifted groups.",
        _text("sink_lora"), (_text("long_lora"),), also=("needle far",),
    ),
    Better(
        "routing", "Clusters chosen by content beat windows of the same cost on text.",
        _text("routing"), (_text("routing:local alone"),), also=("recall 26",),
    ),
    Better(
        "deconstructed", "Mixing tokens is indispensable: with an MLP in every layer a model learns little.",
        _text(PLAIN), (_text("deconstructed:mlp"),), margin=0.1, also=("copy", "recall 26"),
    ),
    AsGood(
        "deconstructed", "Where some layers stay standard, all other variants come near to standard attention.",
        tuple(HYBRIDS), margin=0.05,
    ),
    Better(
        "deconstructed",
        "Alone, the polynomial is nearest to it; fixed queries and keys, or one score a key, are worse.",
        _text("deconstructed"),
        tuple(_text(f"deconstructed:{form}") for form in ("keys", "random", "embedding", "text")),
    ),
    AsGood(
        "agent", "It is as good as softmax attention on images.", (_images("agent"),), score="3 digits",
        also=("1 digit",),
    ),
    Better(
        "halo", "A halo lets blocks pass information on, and is better than windows without one.",
        _images("halo"), (_images("halo:window"),), score="3 digits", also=("1 digit",),
    ),
    AsGood(
        "reduced", "Without its MLP a model of a third of the parameters generalises about as well on digits.",
        (_images("reduced:original", mlp=False),), score="1 digit", also=("3 digits",), sizes=True,
    ),
    AsGood(
        "reduced", "A symmetric similarity costs little accuracy, and saves a quarter of attention's parameters.",
        (_images("reduced:shared", mlp=False),), baseline=_images("reduced:original", mlp=False), score="1 digit",
        also=("3 digits",), sizes=True,
    ),
    Better(
        "reduced", "With one matrix for similarity and none for values it is a little worse.",
        _images("reduced:original", mlp=False), (_images("reduced:minimal", mlp=False),), score="1 digit",
        also=("3 digits",), sizes=True,
    ),
)  # fmt: skip


def examined(runs: Runs) -> Iterator[tuple[Rule, Found]]:
    """What was found of each claim whose runs are there."""
    for rule in RULES:
        found = rule.examine(runs)
        if found is not None:
            yield rule, found
