"""`saliency`: what each output of a model depends on."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.analysis.saliency import gradients
from workbench.analysis.saliency.audio import with_features
from workbench.analysis.saliency.describing import describe_reading, hash_of, words_in
from workbench.analysis.saliency.encoder_decoder import EncoderDecoderInput
from workbench.analysis.saliency.estimate import Budget, noise, run
from workbench.analysis.saliency.explained_input import ExplainedInput, grid_of
from workbench.analysis.saliency.masks import MOST_ENUMERATED, Masks
from workbench.analysis.saliency.perturb import EncoderMasks, InputMasks
from workbench.analysis.saliency.preparing import against, prepare_input
from workbench.analysis.saliency.result import PrecisionError, Saliency
from workbench.analysis.saliency.scoring import score_for
from workbench.analysis.saliency.segments import GRANULARITIES, checked, each, patches, runs, sizes, superpixels
from workbench.analysis.saliency.sums import Sums
from workbench.errors import WorkbenchError, expect, nearest
from workbench.hooks.answering import answered
from workbench.hooks.split_models import check_unsplit
from workbench.hooks.together import check_as_far
from workbench.session.workbench import Workbench
from workbench.storage.resumable import file_of
from workbench.workers.engine import Engine, opened

METHODS = ("spes", "encoder_output", *gradients.METHODS)


@answered()
def saliency(
    wb: Workbench,
    inputs: Mapping[str, Any],
    method: str = "spes",
    *,
    at: str | None = None,
    hypothesis: str | int | Sequence[int] | Tensor | None = None,
    contrast: str | int | Sequence[int] | Tensor | None = None,
    prompt: Tensor | Sequence[int] | None = None,
    frames: int | None = None,
    time_axis: int | None = None,
    segments: str | Tensor | Sequence[Tensor] | Sequence[str] | None = None,
    granularities: Sequence[int] = GRANULARITIES,
    compactness: float = 0.1,
    sigma: float = 1.0,
    p: float = 0.5,
    p_tokens: float = 0.0,
    score: str | None = None,
    baseline: Any = "zero",
    n_masks: int = 2000,
    seconds: float | None = None,
    precision: float | None = None,
    exact: bool | None = None,
    batch_size: int = 8,
    resume: Saliency | str | Path | None = None,
    seed: int = 0,
    engine: str | Engine = "local",
    progress: bool = True,
    decoding: Mapping[str, Any] | None = None,
    **options: Any,
) -> Saliency:
    """How much each output token depends on each part of the input, or of the encoder's output.

    Outputs are the tokens of an encoder-decoder's hypothesis; those that a decoder writes behind its prompt, each of
    which depends on all tokens before it (`visible` says how many, and scores beyond are 0); or the class that a model
    with a classification head puts a text or an image into.

    "spes" (Fucci et al. 2024, arXiv 2411.01710): segments are masked at random, each with probability p. The score of
    mask m for token k is KL_k(m) = Σ_v P(v | y_<k, X) ln (P(v | y_<k, X) / P(v | y_<k, X_m)), all tokens from one
    forward by teacher forcing. A cell's saliency is the mean score of the masks that hide it,
    S_k = Σ_m Z_m KL_k(m) / Σ_m Z_m. Spectrograms are cut into superpixels at three granularities; tokens and image
    patches are segments themselves. As published it takes n_masks=20000 and
    `decoding={"num_beams": 5, "no_repeat_ngram_size": 5}`.

    "encoder_output" is the same estimator with whole positions of the encoder's output masked: the decoder alone runs.

    "integrated_gradients", "gradient_x_input", "occlusion", "feature_ablation", "kernel_shap" are captum's, of the
    log-probability of each token; with at="encoder" on the encoder's output. Integrated gradients say by what share
    they miss their sum (`completeness_gap` of `details`), and warn where it is large.

    With a contrast every score is that of one token rather than another, ln P(y) − ln P(y'), behind the same tokens
    (contrastive explanations, Yin & Neubig 2022, arXiv 2202.10419).

    The masking estimators keep running sums only. Inside `torch.autocast` all runs, the unperturbed one too, are in its
    precision. Mask number m depends on `seed` and m alone, so that neither batches nor
    interruptions change the estimate but for rounding. Ctrl-C returns what there is. With at most 12 segments all masks
    are enumerated and the map is exact.

    Args:
        inputs: one example as the model takes it: `input_features`, `input_ids` or `pixel_values`, an `attention_mask`
            where there is padding, and `decoder_input_ids` or `labels` for a given output of an encoder-decoder. A
            decoder's prompt is taken as it is, without its padding. Or "audio" [sample] and its
            "sampling_rate", of which the attached processor's feature extractor makes features. Entries
            "seconds_per_frame", "name" and "reference" are carried along.
        at: "input" or "encoder"; follows from the method if None.
        hypothesis: ids or text of the output to explain, behind the prompt, or the number of a class; what the model
            says if None.
        contrast: ids or text of as many tokens (or a class) that might have stood there instead.
        prompt: decoder ids before the hypothesis of an encoder-decoder; the model's start token if None.
        frames: input positions that are no padding. time_axis: of [1, a, b] features, where the model does not tell.
        segments: maps of segment numbers over the explained positions, one per granularity; "slic" for superpixels of
            an image; "words" for those of the text, or a list of words in their order; None for the method's own.
        granularities, compactness, sigma: of the superpixels.
        p: probability of masking a segment. p_tokens: of masking the embedding of a previous output token.
        score: "kl", "probability" or "log_probability" (drops of the token's own); "kl" if None, or "log_probability"
            with a contrast.
        baseline: what masked cells become: "zero", "mean", "min", a number or a tensor.
        n_masks, seconds: the budget; n_masks counts a resumed run's too. precision: stop when the root mean square of
            the standard errors of each token's map is at most this share of the map's standard deviation.
        exact: enumerate all masks; None for where it is possible.
        batch_size: masks per forward. resume: a partial result to go on from; or a file to go on from, if it is there,
            and to write to now and then.
        engine: "local", "ray", or a `workbench.RayWorkers`: who runs the masks of the masking estimators.
        options: for captum's methods: n_steps, window, strides, n_segments, repeats.

    Raises:
        PrecisionError: the budget ended before `precision` was reached; the error holds the result.
        WorkbenchError: a model that is none of these, several examples, silence, an input that is too long, an empty
            hypothesis, ids outside the vocabulary, a contrast that is the output itself, words that no boundary between
            tokens fits, an unknown name, or a `resume` of another run.

    >>> import torch, workbench
    >>> from transformers import BartConfig, BartForConditionalGeneration
    >>> sides = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    >>> config = BartConfig(vocab_size=20, d_model=8, encoder_attention_heads=2, decoder_attention_heads=2, **sides)
    >>> with workbench.attach(BartForConditionalGeneration(config).eval()) as wb:
    ...     found = workbench.saliency(wb, {"input_ids": torch.tensor([[5, 6, 7]])}, hypothesis=torch.tensor([8, 9]))
    >>> found
    Saliency(spes at input: 2 tokens, tokens 3, exact)
    """
    expect(Workbench, wb=wb)
    expect(Mapping, inputs=inputs)
    wb.check_open()
    check_unsplit()
    if method not in METHODS:
        raise WorkbenchError(f"there is no method {method!r}", hint=nearest(method, METHODS, "method"))
    where = at or ("encoder" if method == "encoder_output" else "input")
    if where not in ("input", "encoder") or (method == "encoder_output" and where == "input"):
        raise WorkbenchError(f'at is "input" or "encoder", not {at!r}')
    if wb.model.training:
        raise WorkbenchError("the model is in train mode and answers at random", hint="call model.eval()")
    if batch_size < 1:
        raise WorkbenchError(f"batch_size is at least 1, not {batch_size}")
    score = score_for(score, contrast is not None)
    inputs = with_features(wb.tokenizer, inputs)
    subject = prepare_input(
        wb.model, inputs, hypothesis=hypothesis, prompt=None if prompt is None else torch.as_tensor(prompt),
        frames=frames, time_axis=time_axis, tokenizer=wb.tokenizer, **dict(decoding or {}),
    )  # fmt: skip
    if where == "encoder" and not isinstance(subject, EncoderDecoderInput):
        raise WorkbenchError(
            f"{type(wb.model).__name__} has no encoder beside a decoder", hint='explain its input: at="input"'
        )
    if p_tokens and not isinstance(subject, EncoderDecoderInput):
        raise WorkbenchError(
            "p_tokens masks what a decoder beside an encoder has written",
            hint="elsewhere all tokens are positions of the input, and are masked with probability p",
        )
    against(subject, contrast, wb.tokenizer)
    cut = _in_words(wb, subject, segments)
    began = time.monotonic()
    facts = describe_reading(wb, subject, inputs, where)
    if method in gradients.METHODS:
        if resume is not None:
            raise WorkbenchError(f"{method} has no masks to go on from", hint="leave out resume=")
        if engine != "local":
            raise WorkbenchError(f"{method} has no masks for workers to share", hint="leave out engine=")
        found = gradients.attribute(
            subject, method, where, segments=cut, baseline=baseline, n_masks=n_masks, batch_size=batch_size,
            seed=seed, progress=progress, **options,
        )  # fmt: skip
        return Saliency(
            method=method, at=where, score="log_probability", baseline=_said(baseline), p=None, exact=False,
            partial=False, stopped="computed", token_scores=None, token_error=None, seed=seed,
            **found, **facts,
        )  # fmt: skip
    if options:
        raise WorkbenchError(f"{method} takes no {', '.join(options)}")

    shown, cells, kind = _segments(subject, where, cut, granularities, compactness, sigma)
    counts = sizes(cells)
    if exact is None:
        exact = max(counts) <= MOST_ENUMERATED and not p_tokens and 0 < p < 1
    masks = Masks(counts, p, seed, len(subject.targets), p_tokens, exact)
    n_masks = n_masks // len(counts) * len(counts)
    if not exact and n_masks < 2 * len(counts):
        raise WorkbenchError(f"{n_masks} masks are too few for a standard error", hint="ask for hundreds at least")
    identity = _identity(subject, where, cells, masks, score, baseline) | {
        "weights": facts["provenance"]["weights_sha256"] or wb.weights_identity()
    }
    file = None if isinstance(resume, Saliency) else file_of(resume)
    begins = resume is None or (file is not None and not file.exists())
    sums = Sums.empty(len(subject.targets), counts) if begins else _resumed(file or resume, identity)
    check_as_far(wb.model, sums.done)
    score_of: InputMasks | EncoderMasks
    with torch.inference_mode():
        if where == "input":
            score_of = InputMasks(subject, cells, subject.baseline_of(baseline), score)
        else:
            assert isinstance(subject, EncoderDecoderInput)
            score_of = EncoderMasks(subject, cells, baseline, score)

    def so_far(stopped: str) -> Saliency:
        mean, error = sums.maps(shown, exact=exact, visible=subject.visible)
        tokens = sums.token_maps() if p_tokens else (None, None)
        return Saliency(
            scores=mean.float(),
            standard_error=error.float(),
            n_masks=sums.done,
            method=method,
            at=where,
            kind=kind,
            score=score,
            baseline=_said(baseline),
            p=p,
            exact=exact,
            signed=score != "kl",
            partial=stopped in ("interrupted", "seconds") and sums.done < (masks.enumerated if exact else n_masks),
            stopped=stopped,
            segments=shown,
            token_scores=None if tokens[0] is None else tokens[0].float(),
            token_error=None if tokens[1] is None else tokens[1].float(),
            seed=seed,
            details={
                "segments": counts,
                "seconds": time.monotonic() - began,
                "cached": score_of.cached,
                "autocast": _autocast(subject),
            },
            state=sums.state() | {"identity": identity},
            **facts,
        )

    save = None if file is None else lambda: so_far("interrupted").save(file)
    budget = Budget(n_masks, seconds, precision)
    with opened(engine, wb) as workers:
        stopped = run(
            sums, masks, score_of, shown, budget, batch_size=batch_size, progress=progress, visible=subject.visible,
            save=save, wb=wb, workers=workers,
        )  # fmt: skip
    result = so_far(stopped)
    if file is not None:
        result.save(file)
    if precision is not None and not exact and stopped in ("budget", "seconds"):
        last = sums.maps(shown, exact=False, visible=subject.visible)
        reached = float(noise(*last, subject.visible).max())
        failed = PrecisionError(
            f"{sums.done:,} masks are too few for a precision of {precision:g}: {reached:.3g} was reached",
            hint="raise n_masks (the error falls with its root) and pass resume=error.result",
        )
        failed.result = result
        raise failed
    return result


def _segments(
    subject: ExplainedInput,
    where: str,
    segments: str | Tensor | Sequence[Tensor] | None,
    granularities: Sequence[int],
    compactness: float,
    sigma: float,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], str]:
    """Segments over the map's positions, segments over the cells that are masked, and what a position is."""
    if isinstance(subject, EncoderDecoderInput) and where == "encoder":
        n = subject.encoder_extent
        found = each(n) if segments is None else _own(segments, (n,))
        return found, found, "frames"
    if subject.kind == "tokens":
        found = each(subject.extent) if segments is None else _own(segments, (subject.extent,))
        return found, found, "tokens"
    picture = subject.picture()
    assert picture is not None
    if subject.kind == "image":
        if isinstance(segments, str) and segments == "slic":
            found = superpixels(picture, granularities, compactness=compactness, sigma=sigma, by_length=False)
            return found, found, "image"
        if segments is not None:
            found = _own(segments, tuple(picture.shape[1:]))
            return found, found, "image"
        rows, columns, _ = grid_of(subject)
        return each(rows * columns), patches(rows, columns, *picture.shape[1:]), "patches"
    if segments is None or (isinstance(segments, str) and segments == "slic"):
        found = superpixels(picture, granularities, compactness=compactness, sigma=sigma)
    elif isinstance(segments, str) and segments == "frames":
        found = (runs(len(picture), len(picture))[0][:, None].expand(picture.shape).contiguous(),)
    else:
        found = _own(segments, tuple(picture.shape))
    return found, found, "spectrogram"


def _in_words(wb: Workbench, subject: ExplainedInput, segments: Any) -> Any:
    """Segments as they are, or those of words where these were asked for."""
    given = isinstance(segments, (list, tuple)) and segments and all(isinstance(one, str) for one in segments)
    if not given and not (isinstance(segments, str) and segments == "words"):
        return segments
    return torch.tensor(words_in(wb, subject, segments if given else None))


def _own(segments: str | Tensor | Sequence[Tensor], shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    if isinstance(segments, str):
        raise WorkbenchError(f"there are no segments {segments!r} here", hint="pass integers over the positions")
    return checked(segments, shape)


def _identity(
    subject: ExplainedInput, where: str, cells: Sequence[Tensor], masks: Masks, score: str, baseline: Any
) -> dict[str, Any]:
    """What a run must share with the one that it goes on from."""
    return {
        "input": hash_of(subject.main),
        "targets": tuple(subject.targets.tolist()),
        "prompt": tuple(subject.prompt.tolist()),
        "contrast": () if subject.contrast is None else tuple(subject.contrast.tolist()),
        "at": where,
        "segments": hash_of(*cells),
        "p": float(masks.p),
        "p_tokens": float(masks.p_tokens),
        "seed": masks.seed,
        "exact": masks.exact,
        "score": score,
        "baseline": hash_of(baseline) if isinstance(baseline, Tensor) else _said(baseline),
        "autocast": _autocast(subject),
    }


def _autocast(subject: ExplainedInput) -> str | None:
    """The type that matrix products run in under the caller's `torch.autocast`, or None."""
    device = subject.main.device.type
    return str(torch.get_autocast_dtype(device)).removeprefix("torch.") if torch.is_autocast_enabled(device) else None


def _resumed(resume: Saliency | str | Path | None, identity: dict[str, Any]) -> Sums:
    before = resume if isinstance(resume, Saliency) else Saliency.load(str(resume))
    held = before.state.get("identity")
    if not isinstance(held, dict):
        raise WorkbenchError(f"a result of {before.method!r} cannot be resumed: it holds no running sums")
    other = [name for name, value in identity.items() if held.get(name) != value]
    if other:
        raise WorkbenchError(
            f"the result to resume is of another run: {', '.join(other)} differ", hint="pass the same arguments"
        )
    return Sums.of(before.state)


def _said(baseline: Any) -> str:
    return "given" if isinstance(baseline, Tensor) else str(baseline)
