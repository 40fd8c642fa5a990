"""From a model's inputs to what is explained: one example is checked, its hypothesis decoded, the model measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from workbench.analysis.saliency.decoding import decode, special_ids, texts_of
from workbench.analysis.saliency.explained_input import ExplainedInput, embedding_of
from workbench.errors import WorkbenchError
from workbench.inputs import decoder_start

EXTRAS = ("audio", "sampling_rate", "seconds_per_frame", "name", "reference")
"""Entries of `inputs` that are not for the model: they are passed on to results and views."""
_MAIN = {
    "input_features": "spectrogram",
    "pixel_values": "image",
    "input_ids": "tokens",
    "input_values": "samples",
}
_TARGETS = ("labels", "decoder_input_ids", "decoder_attention_mask")
_QUIET = 1e-6


def prepare_input(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    hypothesis: Tensor | None = None,
    prompt: Tensor | list[int] | None = None,
    frames: int | None = None,
    time_axis: int | None = None,
    tokenizer: Any = None,
    **decoding: Any,
) -> ExplainedInput:
    """Read one example: its input, its hypothesis (decoded unless given), and the unperturbed model's probabilities.

    Args:
        inputs: one example as the model takes it, [1, ...]; `EXTRAS` are left aside. Its `decoder_input_ids` or
            `labels` are taken for the hypothesis.
        hypothesis: ids [n] behind the prompt.
        prompt: decoder ids that are given and not explained; the start token if None.
        frames: positions along time that are no padding; those of the attention mask if None, else all.
        time_axis: axis of time in a spectrogram [1, a, b], 1 or 2; found from the model's number of mel bins if None.
        tokenizer: of the model, or its processor: it knows which tokens of a hypothesis are no text.
        decoding: for `decode`.

    Raises:
        WorkbenchError: no encoder-decoder with cross-attention, no or several examples, an input that is too long or
            silent, a spectrogram that ends in padding of which nothing tells, or a hypothesis without a word.
    """
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        raise WorkbenchError(
            f"{type(model).__name__} is no encoder-decoder: it has no cross-attention from outputs to an input",
            hint="pass a speech-to-text, translation or captioning model",
        )
    given = {name: value for name, value in inputs.items() if name not in EXTRAS and name not in _TARGETS}
    name = next((known for known in _MAIN if given.get(known) is not None), None)
    if name is None:
        raise WorkbenchError(
            f"there is no input to explain among {', '.join(given) or 'nothing'}",
            hint=f"pass one of {', '.join(_MAIN)}, as the model's feature extractor or tokenizer makes them",
        )
    kind = _MAIN[name]
    if kind == "samples":
        raise WorkbenchError(
            "raw samples are not explained", hint="saliency of the encoder's input needs a spectrogram"
        )
    main = torch.as_tensor(given[name])
    rank = {"spectrogram": 3, "image": 4, "tokens": 2}[kind]
    if main.dim() == rank - 1:
        main = main[None]
    if main.dim() != rank or len(main) != 1:
        raise WorkbenchError(f"{name} should hold one example", shape=main.shape, hint="pass utterances one by one")
    parameter = next(model.parameters())
    main = main.to(parameter.device)
    mask = given.get("attention_mask")
    rest: dict[str, Tensor] = {}
    axis = 1
    if kind == "spectrogram":
        axis = _time_axis(config, main) if time_axis is None else time_axis
        limit = _longest(config)
        if limit is not None and main.shape[axis] > limit:
            raise WorkbenchError(
                f"the audio has {main.shape[axis]} frames, the model takes {limit}",
                shape=main.shape,
                hint="cut it into shorter utterances",
            )
        if limit is not None and main.shape[axis] < limit:
            raise WorkbenchError(
                f"the features have {main.shape[axis]} frames, the model wants {limit}, padding included",
                shape=main.shape,
                hint="let the model's feature extractor pad them, and pass its attention_mask",
            )
        main = main.to(parameter.dtype)
        extent = _extent(frames, mask, main.shape[axis])
        if frames is None and mask is None:
            _check_unpadded(main if axis == 1 else main.transpose(1, 2))
        cells = main[:, :extent] if axis == 1 else main[:, :, :extent]
        if float(cells.float().std(correction=0)) < _QUIET:
            raise WorkbenchError(
                "the audio is silent: its spectrogram is constant", shape=main.shape, hint="check the recording"
            )
        if mask is not None and getattr(config, "model_type", "") != "whisper":
            rest["attention_mask"] = torch.as_tensor(mask).to(main.device).view(1, -1)
    elif kind == "tokens":
        if main.shape[1] == 0:
            raise WorkbenchError("the input text is empty", shape=main.shape)
        rest["attention_mask"] = torch.ones_like(main) if mask is None else torch.as_tensor(mask).to(main).view(1, -1)
        extent = _extent(frames, rest["attention_mask"], main.shape[1])
    else:
        main, extent = main.to(parameter.dtype), main.shape[2]
    subject = ExplainedInput(model, name, kind, main, rest, axis, extent, _prompt(model, prompt, parameter.device))
    with torch.no_grad():
        if kind == "tokens":
            subject.main = embedding_of(model.get_encoder())(main)  # type: ignore[operator]
        subject.states = subject.encode(subject.main)
        targets = _given_targets(inputs, subject.prompt) if hypothesis is None else torch.as_tensor(hypothesis)
        if targets is None:
            targets = decode(subject, subject.states, **decoding)[0]
        subject.targets = targets.to(parameter.device).long().flatten()
        specials = special_ids(model, tokenizer)
        if not len(subject.targets) or all(int(i) in specials for i in subject.targets):
            what = " ".join(texts_of(tokenizer, subject.targets)) or "nothing"
            raise WorkbenchError(
                f"the hypothesis is empty: the model says {what[:80]}, which holds no word, about this input",
                hint="pass hypothesis= to explain a text of your own, or leave this input out",
            )
        subject.reference = subject.log_probs(subject.main)[0]
        if kind == "tokens":
            _check_embeddings(subject, main)
    if not subject.reference.isfinite().all():
        raise WorkbenchError("the model's probabilities for this input are not finite")
    return subject


def _time_axis(config: Any, main: Tensor) -> int:
    """Which axis of [1, a, b] is time: the one that is not the number of mel bins."""
    names = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim")
    owners = (config, getattr(config, "encoder", None))
    bins = next((getattr(o, n) for o in owners for n in names if isinstance(getattr(o, n, None), int)), None)
    fits = [axis for axis in (1, 2) if main.shape[3 - axis] == bins]
    if len(fits) == 2 and getattr(config, "model_type", "") == "whisper":
        return 2
    if len(fits) != 1:
        raise WorkbenchError(
            f"which axis of the features is time cannot be told ({bins} mel bins)",
            shape=main.shape,
            hint="pass time_axis=1 or time_axis=2",
        )
    return fits[0]


def _longest(config: Any) -> int | None:
    """Most input frames that the model takes; Whisper's convolutions halve them."""
    if getattr(config, "model_type", "") == "whisper":
        return 2 * int(config.max_source_positions)
    return None


def _extent(frames: int | None, mask: Any, length: int) -> int:
    extent = length
    if frames is not None:
        extent = frames
    elif mask is not None:
        extent = int(torch.as_tensor(mask).flatten().nonzero().max()) + 1 if torch.as_tensor(mask).any() else 0
    if not 1 <= extent <= length:
        raise WorkbenchError(f"{extent} of {length} positions cannot be explained", hint="check frames= and the mask")
    return extent


def _check_unpadded(spectrogram: Tensor) -> None:
    """Refuse a spectrogram [1, time, frequency] that ends in equal frames, as padding is, when no mask tells of it."""
    frames = spectrogram[0]
    other = (frames != frames[-1]).any(1).nonzero()
    sound = int(other.max()) + 1 if len(other) else 0
    padding = len(frames) - sound
    if sound and padding > 1:
        raise WorkbenchError(
            f"the last {padding:,} of {len(frames):,} frames are all the same, as padding is, and no mask tells which "
            "hold sound",
            shape=spectrogram.shape,
            hint="let the feature extractor return_attention_mask=True and pass it, or say frames=: "
            f"{sound} without them, {len(frames)} with them",
        )


def _prompt(model: nn.Module, prompt: Tensor | list[int] | None, device: torch.device) -> Tensor:
    if prompt is None:
        start = decoder_start(model)
        assert start is not None
        prompt = [start]
    found = torch.as_tensor(prompt, device=device).long().flatten()
    if not len(found):
        raise WorkbenchError("the prompt is empty", hint="give the decoder's start token at least")
    return found


def _given_targets(inputs: Mapping[str, Any], prompt: Tensor) -> Tensor | None:
    """Ids behind the prompt, from labels or decoder inputs."""
    if inputs.get("labels") is not None:
        labels = torch.as_tensor(inputs["labels"]).flatten()
        return labels[labels >= 0]
    if inputs.get("decoder_input_ids") is None:
        return None
    ids = torch.as_tensor(inputs["decoder_input_ids"]).flatten()
    n = len(prompt)
    return ids[n:] if torch.equal(ids[:n].cpu(), prompt.cpu()) else ids


def _check_embeddings(subject: ExplainedInput, ids: Tensor) -> None:
    direct = subject.model(input_ids=ids, **subject.rest, decoder_input_ids=subject.decoder_ids, use_cache=False).logits
    off = float((subject._scored(direct)[0] - subject.reference).abs().max())
    if off > 1e-3:
        raise WorkbenchError(
            f"embeddings passed by hand change the model's log-probabilities by {off:.1e}",
            hint="the encoder treats token ids in a way of its own; explain its output with method='encoder_output'",
        )
