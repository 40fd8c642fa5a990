"""`cross_attention_saliency`: attention against saliency, over one or several examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.analysis.cross_attention.alignment import align, disagreement
from workbench.analysis.cross_attention.correlate import prepared
from workbench.analysis.cross_attention.faithfulness import curves, size, words
from workbench.analysis.cross_attention.maps import maps_of
from workbench.analysis.cross_attention.maps_result import CrossAttention
from workbench.analysis.cross_attention.result import MEASURES, ORDERS, SCORES, CrossAttentionSaliency
from workbench.analysis.saliency.audio import with_features
from workbench.analysis.saliency.explain import METHODS
from workbench.analysis.saliency.explain import saliency as explain
from workbench.analysis.saliency.explained_input import ExplainedInput
from workbench.analysis.saliency.normalising import paired_min_max, pool, spread_out, standardised
from workbench.analysis.saliency.preparing import prepare_input
from workbench.analysis.saliency.result import Saliency
from workbench.analysis.statistics.correlation import correlation
from workbench.errors import WorkbenchError, nearest
from workbench.session.workbench import Workbench

_FRACTIONS = tuple(i / 10 for i in range(11))
_SALIENCIES = ("input", "encoder_output")


def cross_attention_saliency(
    wb: Workbench,
    inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    saliency: str | Sequence[tuple[Saliency, Saliency]] = "spes",
    *,
    weighting: str = "raw",
    rollout: bool = False,
    renormalise: bool = False,
    pooling: str = "max",
    normalise: str = "token",
    special_tokens: bool = False,
    alignment_heads: Sequence[tuple[int, int]] | None = None,
    n_masks: int = 2000,
    encoder_masks: int | None = None,
    orders: Sequence[str] = ORDERS,
    fractions: Sequence[float] = _FRACTIONS,
    decode_again: bool = True,
    keep: int = 4,
    seed: int = 0,
    n_bootstrap: int = 1000,
    level: float = 0.95,
    progress: bool = True,
    prompt: Tensor | Sequence[int] | None = None,
    time_axis: int | None = None,
    decoding: Mapping[str, Any] | None = None,
    baseline: Any = "zero",
    encoder_baseline: Any = "zero",
    batch_size: int = 8,
    **options: Any,
) -> CrossAttentionSaliency:
    """Compare what a decoder attends to with what its output depends on, head by head.

    After Papi et al. 2025 (arXiv 2509.18010).

    Attention maps are those of single heads, of the heads of a layer, of a head index over layers, of all, and of the
    alignment heads, averaged in this order. Each is compared with the saliency of the input, pooled to the encoder's
    positions, and with that of the encoder's output, whose gap shows what mixing in the encoder hides. Rows of special
    output tokens are left out unless asked for; padding, and the class token of an image, always are.

    Deletion and insertion curves rank the cells of the input by the mean map over tokens: attention averaged over all
    heads and repeated over the cells of each encoder position, saliency, saliency pooled and repeated likewise, and at
    random.

    Args:
        inputs: one example or several, each as in `workbench.saliency`.
        saliency: a method of `workbench.saliency`; the encoder's output is explained with the same one. Or pairs that
            have been computed, one (input, encoder output) per example.
        weighting, rollout, renormalise, alignment_heads: of the attention; see `workbench.cross_attention`.
        pooling: of input saliency: "max" (the paper's choice), "mean", "max_time" or "max_frequency".
        normalise: standardise maps per "token", or over "all" cells, before they are flattened.
        special_tokens: count rows of special output tokens.
        n_masks, encoder_masks: of the two saliencies; the second is the first if None.
        orders: curves to draw, of "attention", "input saliency", "pooled input saliency", "encoder-output saliency" and
            "random"; () for none.
        fractions: of cells removed or kept. decode_again: decode each perturbed input, for word error rates.
        keep: of how many examples the maps stay in the result.
        baseline, encoder_baseline: what masked cells and masked encoder positions become.
        seed, n_bootstrap, level: of masks and random order, and of the intervals over examples.
        options: for `workbench.saliency`, such as granularities, precision, p.

    Raises:
        WorkbenchError: what `workbench.saliency` and `workbench.cross_attention` refuse, T' that does not divide T, or
            an unknown name.
    """
    several = [with_features(wb.tokenizer, one) for one in ([inputs] if isinstance(inputs, Mapping) else inputs)]
    if not several:
        raise WorkbenchError("there is no utterance")
    unknown = [order for order in orders if order not in ORDERS]
    if unknown:
        raise WorkbenchError(f"there is no order {unknown[0]!r}", hint=nearest(unknown[0], ORDERS, "order"))
    if isinstance(saliency, str):
        if saliency not in METHODS or saliency == "encoder_output":
            raise WorkbenchError(f"there is no method {saliency!r}", hint=nearest(saliency, METHODS, "method"))
    elif len(saliency) != len(several):
        raise WorkbenchError(f"there are {len(saliency)} pairs of saliency for {len(several)} utterances")
    if not 0 < level < 1 or n_bootstrap < 1:
        raise WorkbenchError("level lies between 0 and 1, n_bootstrap is at least 1")
    common = {"prompt": prompt, "time_axis": time_axis}
    masks = {"baseline": baseline, "batch_size": batch_size, "seed": seed, "progress": progress, **options}
    study = _Comparison(pooling, normalise, special_tokens)
    drawn, rows_of_curves, rows_of_sizes = [], [], []
    thresholds = torch.linspace(0, 1, 21, dtype=torch.float64)
    texts: list[tuple[str, str, str | None]] = []
    for i, one in enumerate(several):
        subject = prepare_input(
            wb.model, one, prompt=None if prompt is None else torch.as_tensor(prompt), frames=options.get("frames"),
            time_axis=time_axis, **dict(decoding or {}),
        )  # fmt: skip
        name = str(one.get("name") or f"utterance {i}")
        if isinstance(saliency, str):
            theirs = {"n_masks": encoder_masks or n_masks, "baseline": encoder_baseline}
            pair = _both(wb, one, subject, saliency, masks | common | {"n_masks": n_masks}, theirs)
        else:
            pair = saliency[i]
        attention = maps_of(
            wb, subject, one, weighting=weighting, rollout=rollout, renormalise=renormalise,
            alignment_heads=alignment_heads, special_positions=subject.kind != "image",
        )  # fmt: skip
        found = study.add(name, subject, attention, pair)
        tokenizer = getattr(wb.tokenizer, "tokenizer", None) or wb.tokenizer
        texts.append((name, words(subject, subject.targets, tokenizer), _text(one.get("reference"))))
        rankings = _rankings(subject, found, seed + i)
        rows_of_sizes.append(torch.stack([size(rankings[order], thresholds) for order in orders]) if orders else None)
        if orders:
            rows_of_curves.append(
                torch.stack(
                    [
                        curves(
                            subject, rankings[order], fractions, baseline=baseline, decode_again=decode_again,
                            decoding=dict(decoding or {}), tokenizer=tokenizer, batch_size=batch_size,
                        )
                        for order in orders
                    ]
                )
            )  # fmt: skip
        if i < keep:
            drawn.append(_drawn(name, one, attention, pair, found))
    names = study.names
    shape = (len(several), len(orders))
    return CrossAttentionSaliency(
        aggregates=tuple(names),
        kinds=tuple(kind for kind, _, _ in names.values()),
        layers=tuple(layer for _, layer, _ in names.values()),
        heads=tuple(head for _, _, head in names.values()),
        saliencies=_SALIENCIES,
        measures=MEASURES,
        correlations=torch.stack(study.correlations),
        pooled=study.pooled(),
        between=torch.stack(study.between),
        undefined=tuple(study.undefined),
        pooling=pooling,
        normalise=normalise,
        special_tokens=special_tokens,
        method=saliency if isinstance(saliency, str) else saliency[0][0].method,
        utterances=tuple(text[0] for text in texts),
        hypotheses=tuple(text[1] for text in texts),
        references=tuple(text[2] for text in texts),
        orders=tuple(orders),
        fractions=torch.tensor(list(fractions), dtype=torch.float64),
        scores=SCORES,
        curves=torch.stack(rows_of_curves) if orders else torch.zeros(*shape, 2, len(fractions), len(SCORES)),
        thresholds=thresholds,
        sizes=torch.stack([row for row in rows_of_sizes if row is not None]) if orders else torch.zeros(*shape, 21),
        maps=tuple(drawn),
        alignments=tuple(study.alignments),
        alignment_heads=study.alignment_heads,
        seed=seed,
        n_bootstrap=n_bootstrap,
        level=level,
        provenance=wb.provenance() | {"weighting": weighting, "rollout": rollout, "n_masks": n_masks},
    )


class _Comparison:
    """Collects the correlations of one example after the other."""

    def __init__(self, pooling: str, normalise: str, special_tokens: bool) -> None:
        self.pooling, self.normalise, self.special_tokens = pooling, normalise, special_tokens
        self.names: dict[str, tuple[str, int | None, int | None]] = {}
        self.correlations: list[Tensor] = []
        self.between: list[Tensor] = []
        self.undefined: list[str] = []
        self.alignments: list[dict[str, Any]] = []
        self.alignment_heads: tuple[tuple[int, int], ...] = ()
        self._cells: list[tuple[list[Tensor | None], list[Tensor | None]]] = []

    def add(
        self, name: str, subject: ExplainedInput, attention: CrossAttention, pair: tuple[Saliency, Saliency]
    ) -> dict[str, Tensor]:
        """Compare one example; gives the maps that were compared, all output tokens of them."""
        own, theirs = at_encoder(subject, attention, pair[0], self.pooling), _encoder_map(attention, pair[1])
        rows = [i for i, odd in enumerate(attention.special) if self.special_tokens or not odd]
        self.names, self.alignment_heads = attention.aggregates(), attention.alignment_heads
        maps = {aggregate: attention.aggregate(aggregate) for aggregate in self.names}
        left = [prepared(one[rows], self.normalise) for one in maps.values()]
        right = [prepared(one[rows], self.normalise) for one in (own, theirs)]
        self._cells.append((left, right))
        found = torch.full((len(left), 2, len(MEASURES)), torch.nan, dtype=torch.float64)
        for s, y in enumerate(right):
            if y is None:
                self.undefined.append(f"{name}: {_SALIENCIES[s]} saliency is constant, so that no correlation exists")
                continue
            for a, x in enumerate(left):
                if x is not None:
                    found[a, s] = torch.tensor([correlation(x, y, measure) for measure in MEASURES])
        for aggregate, x in zip(maps, left, strict=True):
            if x is None:
                self.undefined.append(f"{name}: the attention map {aggregate} is constant")
        self.correlations.append(found)
        x, y = right
        both = [torch.nan, torch.nan] if x is None or y is None else [correlation(x, y, m) for m in MEASURES]
        self.between.append(torch.tensor(both, dtype=torch.float64))
        guide = maps["alignment heads" if attention.alignment_heads else "all"]
        by_attention, by_saliency = align(guide[rows]), align(own[rows])
        self.alignments.append(
            {
                "token": tuple(rows),
                "token_text": tuple(attention.target_texts[i] for i in rows),
                "attention": by_attention,
                "saliency": by_saliency,
                "disagreement": disagreement(by_attention, by_saliency),
            }
        )
        return {"attention": maps["all"], "own": own, "theirs": theirs, "full": _magnitude(pair[0])}

    def pooled(self) -> Tensor:
        """[aggregate, saliency, measure] over the cells of all examples where both maps vary."""
        found = torch.full((len(self.names), 2, len(MEASURES)), torch.nan, dtype=torch.float64)
        for a in range(len(self.names)):
            for s in range(2):
                pairs = [(x[a], y[s]) for x, y in self._cells]
                both = [(x, y) for x, y in pairs if x is not None and y is not None]
                if both:
                    x, y = (torch.cat(parts) for parts in zip(*both, strict=True))
                    found[a, s] = torch.tensor([correlation(x, y, measure) for measure in MEASURES])
        return found


def at_encoder(subject: ExplainedInput, attention: CrossAttention, found: Saliency, pooling: str) -> Tensor:
    """Input saliency [token, encoder position] at the positions that the attention map holds.

    Raises:
        WorkbenchError: T' does not divide T, or the map has other positions.
    """
    scores, positions = _magnitude(found), len(attention.kept_positions)
    if found.kind == "spectrogram":
        return pool(scores, positions, length=subject.length, out_length=subject.states.shape[1], how=pooling)
    if found.kind == "tokens" and scores.shape[1] > max(attention.kept_positions):
        scores = scores[:, list(attention.kept_positions)]
    if scores.dim() != 2 or scores.shape[1] != positions:
        raise WorkbenchError(
            f"{found.kind} of {list(scores.shape[1:])} do not stand for {positions} encoder positions",
            shape=scores.shape,
            hint="of images, explain patches",
        )
    return scores


def _encoder_map(attention: CrossAttention, found: Saliency) -> Tensor:
    if found.at != "encoder" or found.scores.shape[1] <= max(attention.kept_positions):
        raise WorkbenchError("the second saliency of a pair is that of the encoder's output", shape=found.scores.shape)
    return _magnitude(found)[:, list(attention.kept_positions)]


def _magnitude(found: Saliency) -> Tensor:
    """Signed scores count by their size."""
    return found.scores.abs() if found.signed else found.scores


def _both(
    wb: Workbench,
    one: Mapping[str, Any],
    subject: ExplainedInput,
    method: str,
    options: dict[str, Any],
    own: dict[str, Any],
) -> tuple[Saliency, Saliency]:
    """Saliency of the input and of the encoder's output, for which `own` options hold."""
    ids = subject.targets.cpu()
    only_input = ("segments", "granularities", "compactness", "sigma", "window", "strides")
    theirs = {name: value for name, value in options.items() if name not in only_input} | own
    second = "encoder_output" if method == "spes" else method
    return (
        explain(wb, one, method, hypothesis=ids, **options),
        explain(wb, one, second, at="encoder", hypothesis=ids, **theirs),
    )


def _rankings(subject: ExplainedInput, found: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """What cells of the input are ranked by: means over tokens of standardised maps."""
    full = found["full"]
    positions = tuple(full.shape[1:])
    step = subject.length // subject.states.shape[1] if subject.kind == "spectrogram" else 1

    def of(maps: Tensor) -> Tensor:
        return _sentence(maps if subject.kind != "spectrogram" else spread_out(maps, positions, step))

    random = torch.rand(positions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if found["own"].shape[1:] != full.shape[1:] and subject.kind == "tokens":
        full = found["own"]
        random = random[: full.shape[1]]
    return {
        "attention": of(found["attention"]),
        "input saliency": _sentence(full),
        "pooled input saliency": of(found["own"]),
        "encoder-output saliency": of(found["theirs"]),
        "random": random,
    }


def _sentence(maps: Tensor) -> Tensor:
    """Mean over tokens of maps standardised and scaled to 0 … 1 each, as in SPES."""
    return paired_min_max(standardised(maps), None)[0].double().mean(0)


def _drawn(
    name: str,
    one: Mapping[str, Any],
    attention: CrossAttention,
    pair: tuple[Saliency, Saliency],
    found: dict[str, Tensor],
) -> dict[str, Any]:
    """What views draw of one example."""
    audio = one.get("audio")
    return {
        "name": name,
        "target_texts": attention.target_texts,
        "special": attention.special,
        "picture": pair[0].picture,
        "kind": pair[0].kind,
        "grid": pair[0].grid,
        "position_texts": attention.position_texts,
        "input_saliency": pair[0].scores,
        "input_error": pair[0].standard_error,
        "pooled_input_saliency": found["own"],
        "encoder_saliency": found["theirs"],
        "encoder_error": pair[1].standard_error[:, list(attention.kept_positions)],
        "attention": attention.maps,
        "layers": attention.layers,
        "seconds_per_position": attention.seconds_per_position,
        "seconds_per_input_position": pair[0].seconds_per_position,
        "n_masks": (pair[0].n_masks, pair[1].n_masks),
        "audio": None if audio is None else torch.as_tensor(audio).float().flatten(),
        "sampling_rate": None if one.get("sampling_rate") is None else int(one["sampling_rate"]),
    }


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
