"""`cross_attention_saliency`: attention against saliency, over one or several examples."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workbench.analysis.cross_attention.correlate import NORMALISE
from workbench.analysis.cross_attention.faithfulness import check_curves, curves, plain_text, size, words
from workbench.analysis.cross_attention.maps import maps_of
from workbench.analysis.cross_attention.maps_result import WEIGHTINGS
from workbench.analysis.cross_attention.progress import ComparisonInterrupted, Kept
from workbench.analysis.cross_attention.result import MEASURES, ORDERS, SALIENCIES, SCORES, CrossAttentionSaliency
from workbench.analysis.cross_attention.study import Pair, compare, drawn, normalised_maps, pooled
from workbench.analysis.saliency.audio import with_features
from workbench.analysis.saliency.explain import METHODS
from workbench.analysis.saliency.explain import saliency as explain
from workbench.analysis.saliency.gradients import METHODS as WITHOUT_MASKS
from workbench.analysis.saliency.normalising import POOLINGS
from workbench.analysis.saliency.preparing import prepare_encoder_decoder
from workbench.errors import WorkbenchError, expect, nearest
from workbench.session.workbench import Workbench
from workbench.storage.resumable import file_of, kept_when_stopped
from workbench.sweep.inputs import digest, plain

_FRACTIONS = tuple(i / 20 for i in range(21))
_THRESHOLDS = torch.linspace(0, 1, 21, dtype=torch.float64)


def cross_attention_saliency(
    wb: Workbench,
    inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    saliency: str | Sequence[Pair] = "spes",
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
    level: float = 0.95,
    progress: bool = True,
    prompt: Tensor | Sequence[int] | None = None,
    time_axis: int | None = None,
    decoding: Mapping[str, Any] | None = None,
    baseline: Any = "zero",
    encoder_baseline: Any = "zero",
    batch_size: int = 8,
    resume: str | Path | None = None,
    **options: Any,
) -> CrossAttentionSaliency:
    """Compare what a decoder attends to with what its output depends on, head by head.

    After Papi et al. 2025 (arXiv 2509.18010).

    Attention maps are those of single heads, of the heads of a layer, of a head index over layers, of all, and of the
    alignment heads, averaged in this order. Each is compared with the saliency of the input, pooled to the encoder's
    positions, and with that of the encoder's output, whose gap shows what mixing in the encoder hides. Rows of special
    output tokens are left out unless asked for; padding, and the class token of an image, always are.

    An example that cannot be explained, such as a clip in which the model hears no word, is found before any mask runs
    and left out, with a warning; the result's `skipped` says why.

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
        fractions: of cells removed or kept; the authors' areas need steps of 5 %. decode_again: decode each perturbed
            input, for word error rates: against the unperturbed hypothesis and, where an example has a "reference",
            against that.
        keep: of how many examples the maps stay in the result.
        baseline, encoder_baseline: what masked cells and masked encoder positions become.
        seed, level: of masks and random order, and of the t intervals over examples.
        resume: a file to go on from, if it is there, and to write to. Examples that are done are kept in it; masks of
            the one under way in files beside it.
        options: for `workbench.saliency`, such as granularities, precision, p.

    Raises:
        WorkbenchError: what `workbench.saliency` and `workbench.cross_attention` refuse, T' that does not divide T, an
            unknown name, or no example is left.
        FormatError: the file is of another comparison.
        ComparisonInterrupted: on Ctrl-C, with the result of the examples that are done.

    Warns:
        UserWarning: some examples cannot be explained.
    """
    expect(Workbench, wb=wb)
    expect(Iterable, inputs=inputs)
    given = [inputs] if isinstance(inputs, Mapping) else list(inputs)
    if not given:
        raise WorkbenchError("there is no utterance")
    for what, value, known in (
        ("pooling", pooling, POOLINGS), ("normalise", normalise, NORMALISE), ("weighting", weighting, WEIGHTINGS),
        *(("order", order, ORDERS) for order in orders),
    ):  # fmt: skip
        if value not in known:
            raise WorkbenchError(f"there is no {what} {value!r}", hint=nearest(str(value), known, what))
    if isinstance(saliency, str):
        if saliency not in METHODS or saliency == "encoder_output":
            raise WorkbenchError(f"there is no method {saliency!r}", hint=nearest(saliency, METHODS, "method"))
    elif len(saliency) != len(given):
        raise WorkbenchError(f"there are {len(saliency)} pairs of saliency for {len(given)} utterances")
    if own := [name for name in ("at", "hypothesis", "contrast") if name in options]:
        raise WorkbenchError(
            f"{own[0]} is no option of a comparison of several examples", hint='put the output into "labels" of each'
        )
    if not 0 < level < 1:
        raise WorkbenchError(f"level lies between 0 and 1, and is not {level}")
    if orders:
        check_curves(fractions, decode_again)
    reading = _Reading(wb, prompt, time_axis, options.get("frames"), dict(decoding or {}))
    pairs = None if isinstance(saliency, str) else saliency
    heard, skipped = _hear(reading, given, pairs)
    attention_options: dict[str, Any] = {"weighting": weighting, "rollout": rollout, "renormalise": renormalise}
    masks = {
        "prompt": prompt,
        "time_axis": time_axis,
        "n_masks": n_masks,
        "baseline": baseline,
        "seed": seed,
        **options,
    }
    theirs = {"n_masks": encoder_masks or n_masks, "baseline": encoder_baseline}
    settings = {
        "attention": {**attention_options, "alignment_heads": str(alignment_heads)},
        "saliency": plain(masks | {"theirs": theirs, "method": saliency if pairs is None else "given"}),
        "comparison": [pooling, normalise, special_tokens], "orders": list(orders), "fractions": list(fractions),
        "decoding": [decode_again, str(decoding)], "keep": keep,
    }  # fmt: skip
    identity = {
        "model class": f"{type(wb.model).__module__}.{type(wb.model).__qualname__}",
        "model weights": wb.weights_hash(),
        "utterances": digest([_told(one) for one in heard]),
        "number of utterances": len(heard),
        "saliency given": digest([plain({"scores": one.scores}) for pair in pairs or () for one in pair]),
    } | {name: digest(value) for name, value in settings.items()}
    kept = Kept(file_of(resume), identity, wb.provenance())

    def result() -> CrossAttentionSaliency:
        done = kept.examples
        names = done[0]["aggregates"]
        return CrossAttentionSaliency(
            aggregates=tuple(names),
            kinds=tuple(kind for kind, _, _ in names.values()),
            layers=tuple(layer for _, layer, _ in names.values()),
            heads=tuple(head for _, _, head in names.values()),
            saliencies=SALIENCIES,
            measures=MEASURES,
            correlations=torch.stack([one["correlations"] for one in done]),
            pooled=pooled(done),
            between=torch.stack([one["between"] for one in done]),
            undefined=tuple(sentence for one in done for sentence in one["undefined"]),
            skipped=skipped,
            pooling=pooling,
            normalise=normalise,
            special_tokens=special_tokens,
            method=saliency if isinstance(saliency, str) else saliency[0][0].method,
            utterances=tuple(one["name"] for one in done),
            hypotheses=tuple(one["hypothesis"] for one in done),
            references=tuple(one["reference"] for one in done),
            orders=tuple(orders),
            fractions=torch.tensor(list(fractions), dtype=torch.float64),
            scores=SCORES,
            curves=torch.stack([one["curves"][..., : len(SCORES)] for one in done]),
            reference_errors=torch.stack([one["curves"][..., len(SCORES)] for one in done]),
            reference_words=torch.tensor([one["reference_words"] for one in done]),
            thresholds=_THRESHOLDS,
            sizes=torch.stack([one["sizes"] for one in done]),
            maps=tuple(one["drawn"] for one in done if one["drawn"] is not None),
            alignments=tuple(one["alignment"] for one in done),
            alignment_heads=done[0]["alignment_heads"],
            seed=seed,
            level=level,
            provenance=wb.provenance() | {"weighting": weighting, "rollout": rollout, "n_masks": n_masks},
        )

    def one_example(i: int, one: _Heard) -> dict[str, Any]:
        name, example = one.name, with_features(wb.tokenizer, one.given)
        if pairs is None:
            files = tuple(None if saliency in WITHOUT_MASKS else kept.masks_file(i, where) for where in _WHERE)
            common = masks | {"batch_size": batch_size, "progress": progress}
            pair = _both(wb, example, one.targets, str(saliency), common, theirs, files)
        else:
            pair = pairs[one.at]
        subject = reading.of(example, one.targets)
        attention = maps_of(
            wb, subject, example, alignment_heads=alignment_heads, special_positions=subject.kind != "image",
            **attention_options,
        )  # fmt: skip
        compared, found = compare(name, subject, attention, pair, pooling, normalise, special_tokens)
        maps = normalised_maps(subject, compared, seed + one.at)
        reference = one.given.get("reference")
        reference = reference if isinstance(reference, str) else None
        drawing = [
            curves(
                subject, maps[order][0].double().mean(0), fractions, baseline=baseline, decode_again=decode_again,
                decoding=dict(decoding or {}), tokenizer=wb.tokenizer, batch_size=batch_size, reference=reference,
                progress=progress, label=f"{name}: {order}",
            )
            for order in orders
        ]  # fmt: skip
        nothing = torch.zeros(0, 2, len(fractions), len(SCORES) + 1, dtype=torch.float64)
        sizes = [size(maps[order][0], _THRESHOLDS, maps[order][1]) for order in orders]
        return found | {
            "name": name,
            "hypothesis": words(subject, subject.targets, wb.tokenizer),
            "reference": reference,
            "reference_words": 0 if reference is None else len(plain_text(reference).split()),
            "curves": torch.stack(drawing) if orders else nothing,
            "sizes": torch.stack(sizes) if orders else torch.zeros(0, len(_THRESHOLDS), dtype=torch.float64),
            "drawn": drawn(name, example, attention, pair, compared) if i < keep else None,
        }

    def interrupted(_: None, path: Path | None) -> ComparisonInterrupted:
        return ComparisonInterrupted(result() if kept.examples else None, len(heard), path)

    with kept_when_stopped(kept.path, kept.save, interrupted):
        for i, one in enumerate(heard):
            if i >= len(kept.examples):
                kept.add(one_example(i, one), last=i == len(heard) - 1)
    return result()


_WHERE = ("input", "encoder")


@dataclass(frozen=True)
class _Reading:
    """How examples are read."""

    wb: Workbench
    prompt: Tensor | Sequence[int] | None
    time_axis: int | None
    frames: int | None
    decoding: dict[str, Any]

    def of(self, example: Mapping[str, Any], hypothesis: Tensor | None = None) -> Any:
        """An example, with its features, ready to be explained."""
        return prepare_encoder_decoder(
            self.wb.model, example, prompt=None if self.prompt is None else torch.as_tensor(self.prompt),
            frames=self.frames, time_axis=self.time_axis, tokenizer=self.wb.tokenizer, hypothesis=hypothesis,
            **self.decoding,
        )  # fmt: skip


@dataclass(frozen=True)
class _Heard:
    """An example, its place among those that were given, and what the model says about it."""

    name: str
    at: int
    given: Mapping[str, Any]
    targets: Tensor


def _told(one: _Heard) -> str:
    """A text that differs where examples, or what is heard in them, differ."""
    arrays = {key: torch.as_tensor(v) if isinstance(v, np.ndarray) else v for key, v in one.given.items()}
    return f"{plain(arrays)} {one.targets.tolist()}"


def _hear(
    reading: _Reading, given: Sequence[Mapping[str, Any]], pairs: Sequence[Pair] | None
) -> tuple[list[_Heard], tuple[str, ...]]:
    """The examples that can be explained, with their hypotheses, and why the others cannot.

    Of each only the hypothesis is kept: encoder outputs and probabilities of all would take much memory.
    """
    found, skipped = [], []
    first: WorkbenchError | None = None
    for at, one in enumerate(given):
        expect(Mapping, inputs=one)
        name = str(one.get("name") or f"utterance {at}")
        try:
            targets = reading.of(with_features(reading.wb.tokenizer, one)).targets.cpu()
        except WorkbenchError as error:
            first = first or error
            skipped.append(f"{name}: {error.message}")
            continue
        if pairs is not None and any(one.target_ids != tuple(targets.tolist()) for one in pairs[at]):
            raise WorkbenchError(
                f"the saliency given for {name} explains {pairs[at][0].target_texts}, and the model says "
                f"{tuple(targets.tolist())}",
                hint='give the same "labels" or decoding to both',
            )
        found.append(_Heard(name, at, one, targets))
    if first is not None and not found:
        raise first
    if skipped:
        warnings.warn(
            f"{len(skipped)} of {len(given)} utterances are left out: {'; '.join(skipped[:3])}"
            f"{' …' if len(skipped) > 3 else ''}",
            UserWarning,
            stacklevel=3,
        )
    return found, tuple(skipped)


def _both(
    wb: Workbench,
    example: Mapping[str, Any],
    ids: Tensor,
    method: str,
    options: dict[str, Any],
    own: dict[str, Any],
    files: Sequence[Path | None],
) -> Pair:
    """Saliency of the input and of the encoder's output, for which `own` options hold; the files keep their masks.

    Raises:
        KeyboardInterrupt: one of them was interrupted.
    """
    only_input = ("segments", "granularities", "compactness", "sigma", "window", "strides")
    theirs = {name: value for name, value in options.items() if name not in only_input} | own
    second = "encoder_output" if method == "spes" else method
    first = explain(wb, example, method, hypothesis=ids, resume=files[0], **options)
    if first.stopped == "interrupted":
        raise KeyboardInterrupt
    other = explain(wb, example, second, at="encoder", hypothesis=ids, resume=files[1], **theirs)
    if other.stopped == "interrupted":
        raise KeyboardInterrupt
    return first, other
