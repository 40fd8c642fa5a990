"""What is claimed of mechanisms, and the rule by which each claim holds or does not: written down before any figure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any, Literal, Protocol

from scipy.stats import spearmanr, t

from trained.plan import BEHIND, HYBRIDS, PLAIN, WINDOWS, Model
from trained.runs import LOSSES, Difference, Runs

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
class Compared:
    """Each of the models is worse than another by less than the margin, or by more.

    Attributes:
        models: they are. than: the other; of a model of another work it is the same one there.
        by: "less" where the models are said to be as good, "more" where the other is said to be better.
        score: which is compared; by work where they are of several.
        needs: what the other has to reach, so that there is something to lose.
        also: scores of the other's work that are told and do not count. beside: likewise, models of that work.
        sizes: whether parameters are told.
        note: what else is to be known.
        further: more such models, which count where their runs are there.
    """

    mechanism: str
    says: str
    models: tuple[Model, ...]
    than: Model
    by: Literal["less", "more"]
    score: str | Mapping[str, str] = "text"
    margin: float = MARGIN
    needs: float | None = None
    also: tuple[str, ...] = ()
    beside: tuple[Model, ...] = ()
    sizes: bool = False
    note: str = ""
    further: tuple[Model, ...] = ()

    def examine(self, runs: Runs) -> Found | None:
        every = (*self.models, *self.further)
        worse = {each: runs.worse(each, replace(self.than, work=each.work), self._score(each)) for each in every}
        if any(worse[each] is None for each in self.models):
            return None
        found = [each for each in worse.values() if each is not None]
        below, above = ([each.high < self.margin for each in found], [each.low > self.margin for each in found])
        holding, failing = (below, above) if self.by == "less" else (above, below)
        outcome = "holds" if all(holding) else "does not hold" if any(failing) else "undecided"
        if self.needs is not None and found[0].b < self.needs:
            outcome = "undecided"
        return Found(self._how(found), self._found(runs, found), outcome)

    def _score(self, model: Model) -> str:
        return self.score if isinstance(self.score, str) else self.score[model.work]

    def _how(self, found: Sequence[Difference]) -> str:
        told = list(dict.fromkeys(self._unit(each.model) for each in found))
        told += [f"is it worse by {self.by} than {self.margin:g}?", self.note]
        if self.needs is not None:
            told.append(f"undecided where {named(self.than)} is below {self.needs:g}")
        seeds = " and ".join(f"{a} against {b}" for a, b in sorted({(each.n_a, each.n_b) for each in found}))
        freedom = " and ".join(str(df) for df in dict.fromkeys(each.df for each in found))
        told += [f"seeds: {seeds}", f"intervals over seeds, their spread pooled over models, df {freedom}", BY]
        return "; ".join(filter(None, told))

    def _unit(self, model: Model) -> str:
        score = self._score(model)
        unit = "held-out nats a byte" if score in LOSSES else "share of right answers"
        return f"{score} ({model.work}): {unit}" if model.work not in score else f"{score}: {unit}"

    def _found(self, runs: Runs, found: Sequence[Difference]) -> str:
        told, works = [], dict.fromkeys(each.model.work for each in found)
        scores = [self._score(next(each.model for each in found if each.model.work == work)) for work in works]
        for work, score in zip(works, scores, strict=True):
            of_work = [each for each in found if each.model.work == work]
            where = f"{score}{f' ({work})' if scores.count(score) > 1 and score != work else ''}: "
            where = where if len(works) > 1 else ""
            told.append(f"{where}{named(of_work[0].than)} {of_work[0].b:.3f}")
            for each in of_work:
                ends = between(each.low, each.high)
                told.append(f"{named(each.model)} {each.a:.3f}, {put(each.mean)} (95 %: {ends})")
        told += [f"{named(each)} {runs.mean(each, self._score(each)):.3f}" for each in self.beside if runs.of(each)]
        models = [self.than, *(each for each in self.models if each.work == self.than.work)]
        for score in self.also:
            told.append(f"{score}: " + ", ".join(f"{named(each)} {runs.mean(each, score):.2f}" for each in models))
        if self.sizes:
            sizes = ", ".join(f"{named(each)} {runs.of(each)[0]['parameters']:,}" for each in models)
            told.append(f"parameters: {sizes}")
        return "; ".join(told)


def put(worse: float) -> str:
    """A difference in words.

    >>> put(0.0321), put(-0.0026), put(-0.0001)
    ('worse by 0.032', 'better by 0.003', 'equal')
    """
    size = f"{abs(worse):.3f}"
    return "equal" if size == "0.000" else f"{'worse' if worse > 0 else 'better'} by {size}"


def between(low: float, high: float) -> str:
    """The ends of an interval in words.

    >>> between(0.01, 0.02), between(-0.02, -0.01), between(-0.02, 0.01)
    ('worse by 0.010 to 0.020', 'better by 0.010 to 0.020', 'better by 0.020 to worse by 0.010')
    """
    if high < 0:
        low, high = high, low
    return f"{put(low)} to {put(high)}" if low * high <= 0 else f"{put(low)} to {abs(high):.3f}"


def named(model: Model) -> str:
    """A model in words."""
    return "plain attention" if model == Model(model.work, PLAIN) else str(model)


@dataclass(frozen=True)
class Likes:
    """Over the routed heads of a run, the mean gate goes with what the loss gains when the head is switched off.

    Heads of a run are not independent: what counts is how its rank correlation differs from run to run.
    """

    mechanism: str
    says: str
    models: tuple[Model, ...]

    def examine(self, runs: Runs) -> Found | None:
        ranked = []
        for run in (run for each in self.models for run in runs.of(each)):
            gates, costs = ([head[what] for head in run["heads"]] for what in ("gate", "cost"))
            ranked.append(float(spearmanr(gates, costs).statistic))
        if len(ranked) < 2:
            return None
        turned = [math.atanh(min(max(rho, -0.99), 0.99)) for rho in ranked]  # Fisher's z
        wide = float(t.ppf(0.975, len(ranked) - 1)) * stdev(turned) / len(ranked) ** 0.5
        rho, low, high = (math.tanh(fmean(turned) + part) for part in (0.0, -wide, wide))
        outcome = "holds" if low > 0 else "does not hold" if high < 0 else "undecided"
        heads = len(runs.of(self.models[0])[0]["heads"])
        how = (
            f"Spearman's ρ of mean gate and cost in text loss of zero ablation over the {heads} routed heads of each "
            f"model, mean and Student's t of Fisher's z over models; models: {len(ranked)}, of two sizes of the mixture"
            f" and several seeds; {BY}"
        )
        each = ", ".join(f"{one:+.2f}" for one in sorted(ranked))
        return Found(how, f"ρ = {rho:+.2f} (95 %: {low:+.2f} to {high:+.2f}); one by one {each}", outcome)


def _text(name: str) -> Model:
    return Model("text", name)


def _images(name: str, mlp: bool = True) -> Model:
    return Model("images", name, mlp=mlp)


def _as_good(mechanism: str, says: str, *models: Model, than: Model | None = None, **more: Any) -> Compared:
    return Compared(mechanism, says, models, than or Model(models[0].work, PLAIN), "less", **more)


def _better(mechanism: str, says: str, model: Model, *others: Model, margin: float = 0.0, **more: Any) -> Compared:
    return Compared(mechanism, says, others, model, "more", margin=margin, **more)


def _channels(behind: str) -> Model:
    return Model("images", "davit-channels", BEHIND + behind)


_NO_MLP = _images("reduced:original", mlp=False)
RULES: tuple[Rule, ...] = (
    _better(
        "sqa", "At equal parameters the loss is a little above that of grouped-query attention.",
        _text("sqa:gqa"), _text("sqa"), also=("copy", "recall 26"),
        note="with 4 heads GQA has one of keys and values, as MQA does; how little is not asked",
    ),
    _as_good(
        "moh", "With 50 to 90 % of its heads active it is as good as attention with all heads.",
        _text("moh"), _text("moh:half"), further=(Model("heads", "moh:most"),), also=("copy", "recall 26"),
        note="75 and 50 % of 4 heads; in the work “heads” 88 % of 8",
    ),
    Likes(
        "moh", "Heads that the router likes are those whose ablation costs most.", (_text("moh"), _text("moh:half"))
    ),
    _as_good(
        "aaren", "It is as good as a transformer of equal size on sequence tasks.",
        _text("aaren"), Model("mqar", "aaren"), Model("induction", "aaren"),
        score={"text": "text", "mqar": "8 pairs", "induction": "copy"}, sizes=True,
    ),
    _as_good(
        "s2", "Models with it reach the loss of models with dense attention.", _text("s2"), also=("copy", "recall 26")
    ),
    _as_good(
        "s2", "A few dense heads find a needle over the whole length.", Model("mqar", "s2:one dense head"),
        score="far", margin=0.05, needs=0.5, beside=(Model("mqar", "s2"),),
        note="8 pairs, asked for in the last quarter",
    ),
    _better(
        "rcmha", "It is more accurate than relative attention without filters.",
        _text("rcmha"), _text("rcmha:relative"), also=("copy", "recall 26"),
    ),
    _as_good(
        "long_lora", "Models trained with shifted groups reach about the loss of training with full attention.",
        _text("long_lora"), score="text, all seen", also=("text",),
        note="trained from scratch in groups, and every token sees all before it in the test",
    ),
    _better(
        "long_lora", "Without the shift information does not pass between groups, and the loss is higher.",
        _text("long_lora"), _text("long_lora:unshifted"), also=("needle far",),
    ),
    _better(
        "sink_lora", "It is nearer to full attention than LongLoRA's shifted groups.",
        _text("sink_lora"), _text("long_lora"), also=("needle far",),
    ),
    _better(
        "routing", "Clusters chosen by content beat windows of the same cost on text.",
        _text("routing"), _text("routing:local alone"), also=("recall 26",),
        note="which tokens a cluster holds depends on later ones too",
    ),
    _better(
        "deconstructed", "Mixing tokens is indispensable: with an MLP in every layer a model learns little.",
        _text(PLAIN), _text("deconstructed:mlp"), margin=0.1, also=("copy", "recall 26"),
    ),
    _as_good(
        "deconstructed", "Where some layers stay standard, all other variants come near to standard attention.",
        *HYBRIDS, margin=0.05,
    ),
    _better(
        "deconstructed",
        "Alone, the polynomial is nearest to it; fixed queries and keys, or one score a key, are worse.",
        _text("deconstructed"), *(_text(f"deconstructed:{form}") for form in ("keys", "random", "embedding", "text")),
    ),
    _as_good("agent", "It is as good as softmax attention on images.", _images("agent"), score="3 digits", sizes=True,
             also=("1 digit",)),
    _better(
        "halo", "A halo lets blocks pass information on, and is better than windows without one.",
        _images("halo"), _images("halo:window"), score="3 digits", also=("1 digit",),
    ),
    _better(
        "ninformer", "It is better than ViT, MLP-Mixer and Local-ViT on small images.",
        _images("ninformer"), _images(PLAIN), score="3 digits", also=("1 digit",), note="against plain attention alone",
    ),
    _better(
        "davit-channels", "Channels that attend to each other give windows the view of the whole image that they lack.",
        _channels(WINDOWS), _images(WINDOWS), score="3 digits", also=("1 digit",),
        note="windows of 4 × 4 patches in both layers, against channels in the second",
    ),
    _as_good(
        "davit-windows", "With channel attention between them windows need neither shifts nor position biases.",
        _channels(WINDOWS), than=_channels("halo"), score="3 digits", also=("1 digit",), needs=0.5,
        note="channels behind windows of 4 × 4 patches, and behind blocks with a halo and position biases",
    ),
    _better(
        "s2aformer", "It is more accurate than attention with fewer keys alone.",
        _images("s2aformer"), _images("s2aformer:fewer keys"), score="3 digits", also=("1 digit",),
        note="strips without the convolution beside them, against heads of whole width",
    ),
    _better(
        "s2aformer", "Convolutions make better squares than pooling does.",
        _images("s2aformer"), _images("s2aformer:means"), score="3 digits", also=("1 digit",),
    ),
    _better(
        "van", "Long reach and adaptation to the input make it better than convolutions of the same cost.",
        _images("van"), _images("van:convolutions"), _images("van:undilated"), score="3 digits", also=("1 digit",),
        sizes=True, note="the same convolutions that do not multiply, and a short kernel of 7 × 7 that does",
    ),
    _as_good(
        "van", "The three parts do as well as a dense kernel of 21 × 21 at a small part of its parameters.",
        _images("van"), than=_images("van:dense"), score="3 digits", also=("1 digit",), sizes=True,
        note="a depth-wise kernel; on 8 × 8 patches at most 15 × 15 of it are ever used",
    ),
    _better(
        "a2mamba", "It classifies better than attention or scan alone at equal cost.",
        _images("a2mamba"), _images("a2mamba:scan alone"), _images("a2mamba:attention alone"), score="3 digits",
        also=("1 digit",), sizes=True, note="of as many parameters; time is not the same",
    ),
    _as_good(
        "reduced", "Without its MLP a model of a third of the parameters generalises about as well on digits.",
        _NO_MLP, score="1 digit", also=("3 digits",), sizes=True,
    ),
    _as_good(
        "reduced", "A symmetric similarity costs little accuracy, and saves a quarter of attention's parameters.",
        _images("reduced:shared", mlp=False), than=_NO_MLP, score="1 digit", also=("3 digits",), sizes=True,
    ),
    _better(
        "reduced", "With one matrix for similarity and none for values it is a little worse.",
        _NO_MLP, _images("reduced:minimal", mlp=False), score="1 digit", also=("3 digits",), sizes=True,
        note="how little is not asked",
    ),
)  # fmt: skip


def examined(runs: Runs) -> Iterator[tuple[Rule, Found]]:
    """What was found of each claim whose runs are there."""
    for rule in RULES:
        found = rule.examine(runs)
        if found is not None:
            yield rule, found
