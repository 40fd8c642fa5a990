"""Which learning rule conditions as a model does: classical experiments on every rule and in the model's context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.analysis.conditioning.in_context import check_model, run_model, vocabulary
from workbench.analysis.conditioning.memories import RULES
from workbench.analysis.conditioning.schedules import Schedule, Trial, choose, run_rule
from workbench.analysis.statistics.correlation import pearson
from workbench.analysis.statistics.intervals import jackknife_t, means_t
from workbench.errors import FormatError, WorkbenchError, nearest
from workbench.storage.result import Result
from workbench.storage.typed import Keys

if TYPE_CHECKING:
    import pandas as pd

    from workbench.session.workbench import Workbench

MODEL = "model"
_SAME = 1 - 1e-9  # curves that correlate more are the same
_NONE = 0.02  # a contrast whose interval lies within this share of a full association counts as none
LIMITS = (
    "A rule's strength and a model's probability are different scales: what is compared is the direction of each "
    "contrast and the shape of the curves, not their size.",
    "In context, trials without an outcome end with a token of their own, which the cue may come to predict; and the "
    "cues of a compound stand one after the other, so that the last of them has the outcome beside it.",
    "Agreement with a rule says that the model behaves like it here, not that a head of it works so.",
)


@dataclass(frozen=True, repr=False)
class Conditioning(Result):
    """What `conditioning` measured.

    Attributes:
        experiments: names. subjects: the rules, then "model" where one was probed. tests: test cue of each experiment.
        what: what animals do in each. silent: where the linear theory has no answer, "" elsewhere.
        curves: experiment -> [subject, group, trial + 1] mean strength (rules) or probability (model) of the outcome
            after the test cue; group 0 is the experimental one, 1 the control. low, high: 95 % t intervals of the mean
            over choices of cues.
        phases: experiment -> (group, for each) words of the trials, such as "AB+".
        contrast, contrast_low, contrast_high: [experiment, subject], difference of the groups after the last trial,
            above 0 where the subject shows the effect; for acquisition the control never saw the cue.
        effect: [experiment, subject] +1, 0 or −1: the interval lies above zero, holds it (or is tiny), or lies below.
        agreement: rule -> share of experiments in which its effect is the model's; empty without a model. Only of those
            where the theory is not silent, here and in the correlation: elsewhere a rule's curve is no prediction.
        correlation: rule -> (r, low, high) of its mean curves with the model's, 95 % over choices of cues; empty
            without a model.
        limits: what the numbers do not say.
    """

    form = "workbench.conditioning"

    experiments: Annotated[tuple[str, ...], "experiment"]
    subjects: Annotated[tuple[str, ...], "subject"]
    tests: Annotated[tuple[str, ...], "experiment"]
    what: Annotated[tuple[str, ...], "experiment"]
    silent: Annotated[tuple[str, ...], "experiment"]
    curves: Annotated[dict[str, Float[Tensor, "subject 2 _"]], Keys("experiments")]
    low: Annotated[dict[str, Float[Tensor, "subject 2 _"]], Keys("experiments")]
    high: Annotated[dict[str, Float[Tensor, "subject 2 _"]], Keys("experiments")]
    phases: Annotated[dict[str, tuple[tuple[str, ...], tuple[str, ...]]], Keys("experiments")]
    contrast: Float[Tensor, "experiment subject"]
    contrast_low: Float[Tensor, "experiment subject"]
    contrast_high: Float[Tensor, "experiment subject"]
    effect: Int[Tensor, "experiment subject"]
    agreement: Annotated[dict[str, float], Keys("subjects", some=True)]
    correlation: Annotated[dict[str, tuple[float, float, float]], Keys("subjects", some=True)]
    limits: tuple[str, ...]
    provenance: dict[str, Any]

    def check_parts(self) -> None:
        """Raise a FormatError if the interval of a curve has other points than the curve."""
        for name, curve in self.curves.items():
            if not curve.shape == self.low[name].shape == self.high[name].shape:
                raise FormatError(f"the curve of {name} and its interval have other points", shape=curve.shape)

    @property
    def best(self) -> str | None:
        """The rule whose curves go best with the model's; None without a model, or where the theory is silent."""
        return max(self.correlation, key=lambda rule: self.correlation[rule][0]) if self.correlation else None

    @property
    def table(self) -> pd.DataFrame:
        """One row per experiment and subject."""
        import pandas as pd

        return pd.DataFrame(
            {
                "experiment": name, "subject": subject, "contrast": float(self.contrast[e, s]),
                "low": float(self.contrast_low[e, s]), "high": float(self.contrast_high[e, s]),
                "effect": int(self.effect[e, s]), "silent": self.silent[e],
            }
            for e, name in enumerate(self.experiments)
            for s, subject in enumerate(self.subjects)
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"Conditioning({', '.join(self.experiments)}; {', '.join(self.subjects)})"


def conditioning(
    wb: Workbench | None = None,
    *,
    experiments: str | Sequence[str] | None = None,
    rules: Sequence[str] = ("hebb", "decay", "delta", "gated_delta", "softmax"),
    trials: int = 8,
    cues: Sequence[int] | None = None,
    outcomes: Sequence[int] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    d: int = 64,
    repeats: int = 64,
    batch: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> Conditioning:
    """Run conditioning experiments on learning rules and, with a model, in its context (after arXiv 2508.08289).

    Args:
        wb: an attached causal language model; None for the rules alone.
        experiments: names from `schedules.SCHEDULES`; all if None.
        rules: names from `conditioning.RULES`. options: rule -> options of its memory.
        trials: in each phase of an experiment.
        cues, outcomes: token ids to draw from, such as the keys and values of `tasks.mqar`; all but the special ones if
            None.
        d: width of the random cues that the rules see.
        repeats: random choices of cues. batch: rows in one forward.

    Raises:
        WorkbenchError: unknown experiment or rule, or a rate outside its stable range (with the bound).
        CaptureError: too few tokens, a context that is too short, or a model that is no causal language model.

    >>> found = conditioning(experiments="blocking", rules=("hebb", "delta"), progress=False)
    >>> found.effect.tolist()
    [[0, 1]]
    """
    for rule in rules:
        if rule not in RULES:
            raise WorkbenchError(f'there is no learning rule "{rule}"', hint=nearest(str(rule), list(RULES)))
    if isinstance(rules, str) or not rules or repeats < 2 or batch < 1 or d < 1:
        raise WorkbenchError(
            f"rules={rules!r}, d={d}, repeats={repeats}, batch={batch}: rules are a list of at "
            "least one, repeats at least 2, the others at least 1"
        )
    chosen = choose(experiments, trials)
    if wb is not None and (cues is None or outcomes is None):
        known = vocabulary(wb)
        cues, outcomes = known if cues is None else cues, known if outcomes is None else outcomes
    if wb is not None and cues is not None:
        check_model(wb, cues)
    from tqdm.auto import tqdm

    samples: dict[str, Tensor] = {}  # [subject, group, repeat, trial + 1]
    for one in tqdm(chosen, desc="conditioning", disable=not progress):
        parts = []
        for rule in rules:
            given = (options or {}).get(rule)
            settings: dict[str, Any] = {"d": d, "repeats": repeats, "readings": one.readings, "seed": seed}
            groups = [run_rule(rule, t, one.test, options=given, **settings) for t in (one.experimental, one.control)]
            parts.append(_stack(groups))
        if wb is not None and cues is not None and outcomes is not None:
            groups = [
                run_model(wb, t, one.test, cues, outcomes, repeats=repeats, seed=seed, batch=batch)
                for t in (one.experimental, one.control)
            ]
            parts.append(_stack(groups))
        samples[one.name] = torch.stack(parts)
    subjects = (*rules, *((MODEL,) if wb is not None else ()))
    about = {"trials": trials, "d": d, "repeats": repeats, "seed": seed,
             "options": {rule: dict(given) for rule, given in (options or {}).items()}}  # fmt: skip
    if wb is not None:
        about = wb.provenance() | about
    return _summarise(chosen, subjects, samples, about)


def _stack(groups: list[Tensor]) -> Tensor:
    """[group, repeat, trial + 1]; a shorter group stays at its last strength."""
    longest = max(g.shape[-1] for g in groups)
    return torch.stack([torch.cat([g, g[:, -1:].expand(-1, longest - g.shape[-1])], dim=-1) for g in groups])


def _summarise(
    chosen: list[Schedule],
    subjects: tuple[str, ...],
    samples: dict[str, Tensor],
    provenance: dict[str, Any],
) -> Conditioning:
    signs = {one.name: one.sign for one in chosen}
    means = {name: x.mean(2) for name, x in samples.items()}
    apart = torch.stack([signs[name] * (x[:, 0, :, -1] - x[:, 1, :, -1]) for name, x in samples.items()])
    # The same cues are in both groups: differences in pairs. Strengths are bounded and saturate, so that few choices of
    # cues may make all the spread, and none can lie far off: their intervals are not checked for it.
    ends, (low, high) = apart.mean(-1), means_t(apart, checked=False).unbind(-1)
    tiny = (low > -_NONE) & (high < _NONE)
    effect = torch.where(tiny, 0, (low > 0).int() - (high < 0).int())
    correlation, agreement = {}, {}
    spoken = [e for e, one in enumerate(chosen) if not one.silent]
    if subjects[-1] == MODEL and spoken:
        flat = [samples[chosen[e].name].movedim(2, -1).flatten(1, 2) for e in spoken]
        points = torch.cat(flat, dim=1)  # [subject, all points, repeat]
        for s, rule in enumerate(subjects[:-1]):
            correlation[rule] = curves_alike(points[s], points[-1])
            agreement[rule] = float((effect[spoken, s] == effect[spoken, -1]).double().mean())
    bounds = {name: means_t(x.movedim(2, -1), checked=False) for name, x in samples.items()}
    return Conditioning(
        experiments=tuple(one.name for one in chosen),
        subjects=subjects,
        tests=tuple(one.test for one in chosen),
        what=tuple(one.what for one in chosen),
        silent=tuple(one.silent for one in chosen),
        curves=means,
        low={name: b[..., 0] for name, b in bounds.items()},
        high={name: b[..., 1] for name, b in bounds.items()},
        phases={one.name: (_words(one.experimental), _words(one.control)) for one in chosen},
        contrast=ends, contrast_low=low, contrast_high=high,
        effect=effect, agreement=agreement, correlation=correlation, limits=LIMITS, provenance=provenance,
    )  # fmt: skip


def curves_alike(one: Tensor, other: Tensor) -> tuple[float, float, float]:
    """Correlation of two mean curves from [point, repeat] each, and its interval over repeats, by Fisher's z.

    Noise of the means draws a correlation towards 0, the more the fewer the repeats; what leaving out each in turn adds
    to that is taken off (the jackknife's correction). 0 where a mean curve does not vary.
    """
    n = one.shape[-1]

    def z(a: Tensor, b: Tensor) -> Tensor:
        return pearson(a, b).nan_to_num(0.0).clamp(-_SAME, _SAME).atanh()

    without = [(each.sum(-1, keepdim=True) - each).T / (n - 1) for each in (one, other)]  # [repeat, point]
    less = z(*without)
    found = n * z(one.mean(-1), other.mean(-1)) - (n - 1) * less.mean()
    low, high = jackknife_t(found, less).tanh().tolist()
    return float(found.tanh()), low, high


def _words(trials: tuple[Trial, ...]) -> tuple[str, ...]:
    return tuple("".join(trial.cues) + trial.outcome for trial in trials)
