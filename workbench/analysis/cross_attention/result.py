"""`CrossAttentionSaliency`: how far a decoder's cross-attention agrees with what its output depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypedDict

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from workbench.analysis.statistics.intervals import jackknife_t, means_t
from workbench.errors import WorkbenchError
from workbench.storage.result import Result
from workbench.storage.typed import Between
from workbench.tokens import utf8

if TYPE_CHECKING:
    import pandas as pd

SALIENCIES = ("input", "encoder_output")
MEASURES = ("pearson", "spearman")
CURVES = ("deletion", "insertion")
SCORES = ("log_probability", "probability", "wer")
ORDERS = ("attention", "input saliency", "pooled input saliency", "encoder-output saliency", "random")


class Drawn(TypedDict):
    """What views draw of one example; see `CrossAttentionSaliency.maps`."""

    name: str
    target_texts: Annotated[tuple[str, ...], "word"]
    special: Annotated[tuple[bool, ...], "word"]
    picture: Shaped[Tensor, "*picture"] | None
    kind: str
    grid: tuple[int, int] | None
    position_texts: Annotated[tuple[str, ...], "?position"]
    input_saliency: Float[Tensor, " word *cell"]
    input_error: Float[Tensor, " word *cell"]
    pooled_input_saliency: Float[Tensor, "word position"]
    encoder_saliency: Float[Tensor, "word position"]
    encoder_error: Float[Tensor, "word position"]
    attention: Float[Tensor, "depth head word position"]
    layers: Annotated[tuple[int, ...], "depth"]
    seconds_per_position: float | None
    seconds_per_input_position: float | None
    n_masks: tuple[int, int]
    audio: Float[Tensor, " sample"] | None
    sampling_rate: int | None


class Alignment(TypedDict):
    """Where output tokens lie; see `CrossAttentionSaliency.alignments`."""

    token: Annotated[tuple[int, ...], "word"]
    token_text: Annotated[tuple[str, ...], "word"]
    attention: Int[Tensor, "word 2"]
    saliency: Int[Tensor, "word 2"]
    disagreement: Float[Tensor, " word"]


@dataclass(frozen=True, repr=False)
class CrossAttentionSaliency(Result):
    """What `workbench.cross_attention_saliency` found over one or several utterances (or texts, or images).

    Attributes:
        aggregates, kinds: of each compared attention map, its name ("L3H1", "L3", "H1", "all", "alignment heads") and
            kind ("head", "layer", "head index", "all", "alignment heads"). layers, heads: their numbers, None for
            means.
        saliencies: what attention is compared with: "input" (saliency of the input, pooled to encoder positions) and
            "encoder_output".
        measures: names along the last axis of `correlations`: "pearson", "spearman".
        correlations: [utterance, aggregate, saliency, measure]; NaN only where `undefined` says why.
        pooled: [aggregate, saliency, measure] over the cells of all utterances together.
        between: [utterance, measure] correlation of the two saliencies with each other.
        undefined: sentences, one per correlation that does not exist because a map is constant.
        skipped: sentences, one per example that was given and could not be explained.
        pooling: how input saliency came to encoder positions. normalise: "token" or "all", over which cells maps were
            standardised. special_tokens: whether special output tokens count.
        method: of the saliency. utterances, hypotheses, references: names, what the model said, and what was said (None
            where not given).
        orders: by what cells were ranked for deletion and insertion; names from `ORDERS`. Empty without curves.
        fractions: [step] share of cells removed or kept. scores: names along the last axis of `curves`.
        curves: [utterance, order, 2, step, score]; the axis of 2 is (deletion, insertion). "log_probability" is the
            mean over the hypothesis's tokens, "probability" the mean probability, "wer" the word error rate of
            decoding again against the unperturbed hypothesis, in percent and at most 100; NaN where nothing was
            decoded again.
        reference_errors: [utterance, order, 2, step] words put in, left out or replaced between the reference and what
            is decoded; NaN without a reference. reference_words: [utterance] words of the reference, 0 without one.
        thresholds: [threshold]. sizes: [utterance, order, threshold] percent of cells, of the normalised maps of all
            output tokens together, whose value is at least the threshold.
        maps: of the first utterances, what views draw; each a dict with "name", "target_texts", "special", "picture"
            ([time, frequency] or None), "kind", "position_texts", "input_saliency" [token, position...], "input_error",
            "pooled_input_saliency" [token, encoder position], "encoder_saliency", "encoder_error",
            "attention" [layer, head, token, encoder position], "layers", "seconds_per_position" (encoder),
            "seconds_per_input_position", "alignment" (see `alignments`), "audio" (samples or None), "sampling_rate".
        alignments: per utterance a dict: "attention" and "saliency" [token, 2] first and last encoder position of each
            token by dynamic time warping, "disagreement" [token] distance of their middles in encoder positions, and
            "token" the rows they belong to.
        alignment_heads: (layer, head) pairs behind "alignment heads"; may be empty.
        seed: of masks and random order. level: of the intervals over utterances.
        provenance: of the model and the inputs.
    """

    form = "workbench.cross_attention_saliency"
    former: ClassVar = ("n_bootstrap",)
    filled: ClassVar = ("utterance",)

    aggregates: Annotated[tuple[str, ...], "aggregate"]
    kinds: Annotated[tuple[str, ...], "aggregate"]
    layers: Annotated[tuple[int | None, ...], "aggregate"]
    heads: Annotated[tuple[int | None, ...], "aggregate"]
    saliencies: Annotated[tuple[str, ...], "saliency"]
    measures: Annotated[tuple[str, ...], "measure"]
    correlations: Float[Tensor, "utterance aggregate saliency measure"]
    pooled: Float[Tensor, "aggregate saliency measure"]
    between: Float[Tensor, "utterance measure"]
    undefined: tuple[str, ...]
    skipped: tuple[str, ...]
    pooling: str
    normalise: str
    special_tokens: bool
    method: str
    utterances: Annotated[tuple[str, ...], "utterance"]
    hypotheses: Annotated[tuple[str, ...], "utterance"]
    references: Annotated[tuple[str | None, ...], "utterance"]
    orders: Annotated[tuple[str, ...], "order"]
    fractions: Float[Tensor, " step"]
    scores: Annotated[tuple[str, ...], "score"]
    curves: Float[Tensor, "utterance order 2 step score"]
    reference_errors: Float[Tensor, "utterance order 2 step"]
    reference_words: Int[Tensor, " utterance"]
    thresholds: Float[Tensor, " threshold"]
    sizes: Float[Tensor, "utterance order threshold"]
    maps: tuple[Annotated[dict[str, Any], Drawn], ...]
    alignments: Annotated[tuple[Annotated[dict[str, Any], Alignment], ...], "utterance"]
    alignment_heads: tuple[tuple[int, int], ...]
    seed: int
    level: Annotated[float, Between(0, 1)]
    provenance: dict[str, Any]

    @property
    def n_utterances(self) -> int:
        """How many utterances (or other inputs) were compared."""
        return len(self.utterances)

    def of(self, saliency: str = "input", measure: str = "pearson") -> Tensor:
        """[aggregate] mean correlation over the utterances where it is defined; NaN where it is in none."""
        return self.correlations[:, :, self._saliency(saliency), self._measure(measure)].nanmean(0)

    def interval(self, saliency: str = "input", measure: str = "pearson") -> Tensor:
        """[aggregate, 2] Student's t interval of `of` over utterances, as far as correlations go (-1 to 1).

        NaN where it is defined in fewer than two.
        """
        return self._interval(self.correlations[:, :, self._saliency(saliency), self._measure(measure)]).clamp(-1, 1)

    def by_head(self, saliency: str = "input", measure: str = "pearson") -> Tensor:
        """[layer, head] of `of`, in the order of the layers."""
        at = [i for i, kind in enumerate(self.kinds) if kind == "head"]
        rows = len({self.layers[i] for i in at})
        return self.of(saliency, measure)[at].view(rows, -1)

    @property
    def best(self) -> str:
        """The aggregate that correlates best with input saliency."""
        found = self.of("input")
        if found.isnan().all():
            raise WorkbenchError("no correlation is defined", hint="; ".join(self.undefined[:2]))
        return self.aggregates[int(found.nan_to_num(-2).argmax())]

    @property
    def coverage(self) -> pd.DataFrame:
        """Share of saliency covered: per aggregate, Pearson with either saliency and what encoder mixing takes away.

        Columns aggregate, kind, input, encoder_output (mean correlations), difference (encoder_output − input), share
        (input / encoder_output, where both are positive).
        """
        import pandas as pd

        own, theirs = self.of("input"), self.of("encoder_output")
        share = torch.where((own > 0) & (theirs > 0), own / theirs, torch.nan)
        return pd.DataFrame(
            {
                "aggregate": self.aggregates,
                "kind": self.kinds,
                "input": own.tolist(),
                "encoder_output": theirs.tolist(),
                "difference": (theirs - own).tolist(),
                "share": share.tolist(),
            }
        )

    @property
    def table(self) -> pd.DataFrame:
        """One row per aggregate, saliency and measure.

        Columns aggregate, kind, layer, head, alignment (whether the model names the head so), saliency, measure, mean
        (over utterances), low, high (of the mean), pooled, utterances (in which it is defined) and note.
        """
        import pandas as pd

        rows = []
        for s, saliency in enumerate(self.saliencies):
            for m, measure in enumerate(self.measures):
                mean, bounds = self.of(saliency, measure), self.interval(saliency, measure)
                for a, name in enumerate(self.aggregates):
                    defined = int((~self.correlations[:, a, s, m].isnan()).sum())
                    lacking = self.n_utterances - defined
                    rows.append(
                        {
                            "aggregate": name,
                            "kind": self.kinds[a],
                            "layer": self.layers[a],
                            "head": self.heads[a],
                            "alignment": (self.layers[a], self.heads[a]) in self.alignment_heads,
                            "saliency": saliency,
                            "measure": measure,
                            "mean": _known(mean[a]),
                            "low": _known(bounds[a, 0]),
                            "high": _known(bounds[a, 1]),
                            "pooled": _known(self.pooled[a, s, m]),
                            "utterances": defined,
                            "note": f"undefined in {lacking}: a map is constant" if lacking else "",
                        }
                    )
        return pd.DataFrame(rows)

    @property
    def areas(self) -> pd.DataFrame:
        """Area under each mean curve (trapezoid over the fractions), with t intervals over utterances.

        Columns curve, order, score, area, low, high. "wer" is the mean over utterances of the word error rate against
        the unperturbed hypothesis, in percent: what perturbing changes, and not the authors' quantity, which is in
        `corpus_areas`. Higher is more faithful in deletion; of probabilities lower is, and higher in insertion.
        """
        import pandas as pd

        area = torch.trapezoid(self.curves, self.fractions.to(self.curves), dim=3)  # utterance, order, curve, score
        rows = []
        for s, score in enumerate(self.scores):
            if self.curves.numel() == 0 or self.curves[..., s].isnan().all():
                continue
            for c, curve in enumerate(CURVES):
                bounds = self._interval(area[:, :, c, s])
                for o, order in enumerate(self.orders):
                    found = {
                        "area": float(area[:, o, c, s].mean()),
                        "low": float(bounds[o, 0]),
                        "high": float(bounds[o, 1]),
                    }
                    rows.append({"curve": curve, "order": order, "score": score, **found})
        return pd.DataFrame(rows, columns=["curve", "order", "score", "area", "low", "high"])

    @property
    def corpus_areas(self) -> pd.DataFrame:
        """Area under the corpus's word error rate against the references, as SPES and the study measure deletion.

        At each step of 5 % of the cells, 100 · Σ errors / Σ reference words over the utterances that have a reference,
        at most 100; the trapezoid over the share of cells, so that 100 is the most. Columns curve, order, area, low,
        high (of the area, by leaving out each utterance in turn), utterances and words. The authors put cells to zero
        and decode with 5 beams and no repeated 5-grams; which baseline and decoding these curves had, the arguments
        said. Words are compared in lower case without punctuation, where the study takes Whisper's normaliser.

        Raises:
            WorkbenchError: no curves, other steps, nothing decoded again, or no references.
        """
        import pandas as pd

        have = (self.reference_words > 0) & self.reference_errors.flatten(1).isfinite().all(1)
        steps = torch.linspace(0, 1, 21, dtype=torch.float64)
        in_fives = self.fractions.shape == steps.shape and torch.allclose(self.fractions, steps)
        lacks = ""
        if not self.orders:
            lacks = "there are no curves"
        elif not in_fives:
            lacks = "the curves have other steps than 5 %"
        elif not bool(have.any()):
            lacks = "no utterance has a reference that was compared with"
        if lacks:
            raise WorkbenchError(
                f"the corpus's word error rate is not known: {lacks}",
                hint='give each example its "reference", attach the model with its tokenizer, and leave fractions= and '
                "decode_again= as they are",
            )
        errors, words = self.reference_errors[have].double(), self.reference_words[have].double()
        n = len(words)
        whole, bounds = corpus_area(errors, words, steps, self.level)
        rows = [
            {
                "curve": curve,
                "order": order,
                "area": float(whole[o, c]),
                "low": float(bounds[o, c, 0]),
                "high": float(bounds[o, c, 1]),
                "utterances": n,
                "words": int(words.sum()),
            }
            for c, curve in enumerate(CURVES)
            for o, order in enumerate(self.orders)
        ]
        return pd.DataFrame(rows)

    @property
    def size_table(self) -> pd.DataFrame:
        """Compactness: area under the share of cells (percent) over thresholds, per order; lower is more compact.

        Cells are those of the normalised maps of all output tokens, as in SPES; a mean over utterances.
        """
        import pandas as pd

        area = torch.trapezoid(self.sizes, self.thresholds.to(self.sizes), dim=2)
        bounds = self._interval(area)
        return pd.DataFrame(
            {
                "order": self.orders,
                "size": area.mean(0).tolist(),
                "low": bounds[:, 0].tolist(),
                "high": bounds[:, 1].tolist(),
            }
        )

    @property
    def alignment_table(self) -> pd.DataFrame:
        """One row per utterance and token: its encoder positions by attention and by saliency, and how far apart."""
        import pandas as pd

        rows = []
        for name, found in zip(self.utterances, self.alignments, strict=True):
            for i, token in enumerate(found["token"]):
                (a, b), (c, d) = found["attention"][i].tolist(), found["saliency"][i].tolist()
                rows.append(
                    {
                        "utterance": name,
                        "token": token,
                        "token_text": utf8(found["token_text"][i]),
                        "attention_first": a,
                        "attention_last": b,
                        "saliency_first": c,
                        "saliency_last": d,
                        "disagreement": float(found["disagreement"][i]),
                    }
                )
        return pd.DataFrame(rows)

    def _saliency(self, name: str) -> int:
        if name not in self.saliencies:
            raise WorkbenchError(f"there is no saliency {name!r}", hint=f"there is {', '.join(self.saliencies)}")
        return self.saliencies.index(name)

    def _measure(self, name: str) -> int:
        if name not in self.measures:
            raise WorkbenchError(f"there is no measure {name!r}", hint=f"there is {', '.join(self.measures)}")
        return self.measures.index(name)

    def _interval(self, values: Tensor) -> Tensor:
        """[..., 2] t intervals of means from [utterance, ...], undefined ones left out."""
        return means_t(values.movedim(0, -1), self.level)

    def __repr__(self) -> str:
        less = f", {len(self.skipped)} left out" if self.skipped else ""
        return (
            f"CrossAttentionSaliency({self.n_utterances} utterances{less}, {len(self.aggregates)} attention maps "
            f"against {' and '.join(self.saliencies)} saliency)"
        )


def corpus_area(errors: Tensor, words: Tensor, steps: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """[order, curve] areas under the word error rate of all utterances together, and [order, curve, 2] their intervals.

    Args:
        errors: [utterance, order, curve, step] wrong words. words: [utterance] of the reference. steps: [step] shares.
    """
    n = len(words)
    every = torch.ones(1, n, dtype=torch.float64)
    found = _areas(every, errors, words, steps)[0]
    without = _areas(every - torch.eye(n, dtype=torch.float64), errors, words, steps) if n > 1 else found[None]
    return found, jackknife_t(found, without.movedim(0, -1), level).clamp(0, 100)


def _areas(weights: Tensor, errors: Tensor, words: Tensor, steps: Tensor) -> Tensor:
    """[draw, order, curve] areas of a corpus that holds utterances as often as `weights` [draw, utterance] say."""
    rates = torch.tensordot(weights, errors, 1) / (weights @ words)[:, None, None, None]
    return torch.trapezoid((100 * rates).clamp(max=100), steps, dim=3)


def _known(value: Tensor) -> float | None:
    """A number, or None where there is none."""
    return None if bool(value.isnan()) else float(value)
