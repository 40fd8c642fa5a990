"""What a result says of the example that was explained: its tokens, words, lengths, and where it comes from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from workbench.analysis.saliency.encoder_decoder import EncoderDecoderInput
from workbench.analysis.saliency.explained_input import ExplainedInput, grid_of
from workbench.analysis.saliency.token_names import special_ids, texts_of
from workbench.analysis.saliency.words import words_of
from workbench.errors import WorkbenchError
from workbench.session.workbench import Workbench


def describe_reading(wb: Workbench, subject: ExplainedInput, inputs: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of a result that say what was explained."""
    length, per_frame = subject.length, seconds_per_frame(wb.tokenizer, inputs)
    if isinstance(subject, EncoderDecoderInput) and where == "encoder":
        length = subject.states.shape[1]
        per_frame = None if per_frame is None else per_frame * subject.length / length
    grid = None
    if subject.kind == "image":
        try:
            grid = grid_of(subject)[:2]
        except WorkbenchError:
            grid = None
    texts: tuple[str, ...] = ()
    words: tuple[int, ...] = ()
    if subject.kind == "tokens":
        texts = texts_of(wb.tokenizer, subject.ids[: subject.extent])
        with suppress(WorkbenchError):  # without a tokenizer, or with tokens that hold parts of two words
            words = words_in(wb, subject) if where == "input" else ()
    contrast = torch.zeros(0, dtype=torch.long) if subject.contrast is None else subject.contrast
    known = {name: inputs[name] for name in ("name", "reference") if isinstance(inputs.get(name), str)}
    return {
        "target_ids": tuple(subject.targets.tolist()),
        "target_texts": subject.own_texts(subject.targets, wb.tokenizer),
        "special": subject.special(wb.tokenizer),
        "contrast_ids": tuple(contrast.tolist()),
        "contrast_texts": subject.own_texts(contrast, wb.tokenizer),
        "visible": subject.visible,
        "prompt_ids": tuple(subject.prompt.tolist()),
        "picture": subject.picture(),
        "position_texts": texts,
        "position_words": words,
        "grid": grid,
        "length": length,
        "seconds_per_position": per_frame,
        "provenance": wb.provenance() | {"input_sha256": hash_of(subject.main)} | known,
    }


def seconds_per_frame(processor: Any, inputs: Mapping[str, Any]) -> float | None:
    """Duration of a spectrogram's frame, from the inputs or the processor's feature extractor."""
    if inputs.get("seconds_per_frame") is not None:
        return float(inputs["seconds_per_frame"])
    extractor = getattr(processor, "feature_extractor", processor)
    hop, rate = getattr(extractor, "hop_length", None), getattr(extractor, "sampling_rate", None)
    return hop / rate if isinstance(hop, int) and isinstance(rate, int) and rate else None


def words_in(wb: Workbench, subject: ExplainedInput, words: Sequence[str] | None = None) -> tuple[int, ...]:
    """[position] the number of each explained token's word; see `words_of`.

    Raises:
        WorkbenchError: no tokens, no tokenizer, or words that fit no boundaries between tokens.
    """
    if subject.kind != "tokens":
        raise WorkbenchError(f"words are made of tokens, and this input is of kind {subject.kind!r}")
    return words_of(wb.tokenizer, subject.ids[: subject.extent], special_ids(wb.model, wb.tokenizer), words)


def hash_of(*tensors: Tensor) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(str((tuple(tensor.shape), str(tensor.dtype))).encode())
        found.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
