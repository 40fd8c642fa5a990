"""From a model's inputs to what is explained: one example is checked, its outputs decoded, the model measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from workbench.analysis.saliency.classifier import read_classifier
from workbench.analysis.saliency.decoder_only import read_decoder
from workbench.analysis.saliency.decoding import decode
from workbench.analysis.saliency.encoder_decoder import EncoderDecoderInput
from workbench.analysis.saliency.explained_input import ExplainedInput, check_embeddings, check_finite, embedded
from workbench.analysis.saliency.main_input import (
    EXTRAS,
    check_unpadded,
    extent_of,
    longest,
    main_input,
    time_axis_of,
)
from workbench.analysis.saliency.token_names import check_vocabulary, ids_of, special_ids, texts_of
from workbench.errors import WorkbenchError
from workbench.inputs import decoder_start, device_for_inputs
from workbench.tokens import visible

_TARGETS = ("labels", "decoder_input_ids", "decoder_attention_mask")
_QUIET = 1e-6


def prepare_input(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    hypothesis: str | int | Sequence[int] | Tensor | None = None,
    prompt: Tensor | list[int] | None = None,
    frames: int | None = None,
    time_axis: int | None = None,
    tokenizer: Any = None,
    **decoding: Any,
) -> ExplainedInput:
    """Read one example: its input, its outputs (decoded unless given), and the unperturbed model's probabilities.

    An encoder-decoder is explained by its hypothesis, a decoder by what it writes behind its prompt, and a model that
    classifies by a class.

    Args:
        inputs: one example as the model takes it, [1, ...]; `EXTRAS` are left aside.
        hypothesis: ids, or text, of the outputs; the number of a class.
        prompt, frames, time_axis: of encoder-decoders, see `prepare_encoder_decoder`.
        tokenizer: of the model, or its processor.
        decoding: for `decode` or `continuation`.

    Raises:
        WorkbenchError: what the model is, or what it was given, cannot be explained; or what these refuse.
    """
    given = None if hypothesis is None else ids_of(tokenizer, hypothesis, "the hypothesis")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return prepare_encoder_decoder(
            model, inputs, hypothesis=given, prompt=prompt, frames=frames, time_axis=time_axis, tokenizer=tokenizer,
            **decoding,
        )  # fmt: skip
    unused = {"prompt": prompt, "frames": frames, "time_axis": time_axis}
    for name, value in unused.items():
        if value is not None:
            raise WorkbenchError(
                f"{name}= is of encoder-decoders, and {type(model).__name__} is none",
                hint="the input itself is the prompt, and its attention_mask says what is padding",
            )
    plain = {name: value for name, value in inputs.items() if name not in EXTRAS}
    found = read_classifier(model, plain, given, decoding)
    return read_decoder(model, plain, given, decoding) if found is None else found


def prepare_encoder_decoder(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    hypothesis: Tensor | None = None,
    prompt: Tensor | list[int] | None = None,
    frames: int | None = None,
    time_axis: int | None = None,
    tokenizer: Any = None,
    **decoding: Any,
) -> EncoderDecoderInput:
    """Read one example of an encoder-decoder.

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
    name, kind, main = main_input(given)
    device, dtype = device_for_inputs(model), next(model.parameters()).dtype
    main = main.to(device)
    mask = given.get("attention_mask")
    rest: dict[str, Tensor] = {}
    axis = 1
    if kind == "spectrogram":
        axis = time_axis_of(config, main) if time_axis is None else time_axis
        limit = longest(config)
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
        main = main.to(dtype)
        extent = extent_of(frames, mask, main.shape[axis])
        if frames is None and mask is None:
            check_unpadded(main if axis == 1 else main.transpose(1, 2))
        cells = main[:, :extent] if axis == 1 else main[:, :, :extent]
        if float(cells.float().std(correction=0)) < _QUIET:
            raise WorkbenchError(
                "the audio is silent: its spectrogram is constant", shape=main.shape, hint="check the recording"
            )
        if mask is not None and getattr(config, "model_type", "") != "whisper":
            rest["attention_mask"] = torch.as_tensor(mask).to(main.device).view(1, -1)
    elif kind == "tokens":
        rest["attention_mask"] = torch.ones_like(main) if mask is None else torch.as_tensor(mask).to(main).view(1, -1)
        extent = extent_of(frames, rest["attention_mask"], main.shape[1])
    else:
        main, extent = main.to(dtype), main.shape[2]
    subject = EncoderDecoderInput(model, name, kind, main, rest, axis, extent, prompt=_prompt(model, prompt, device))
    with torch.no_grad():
        if kind == "tokens":
            subject.ids = main[0]
            check_vocabulary("the input", subject.ids, int(getattr(subject.embedding(), "num_embeddings", 1 << 62)))
            subject.main = embedded(subject.embedding(), main)
        subject.states = subject.encode(subject.main)
        targets = _given_targets(inputs, subject.prompt) if hypothesis is None else torch.as_tensor(hypothesis)
        if targets is None:
            targets = decode(subject, subject.states, **decoding)[0]
        subject.targets = targets.to(device).long().flatten()
        size = getattr(getattr(config, "decoder", None), "vocab_size", None) or getattr(config, "vocab_size", None)
        if isinstance(size, int):
            check_vocabulary("the hypothesis", subject.targets, size)
        specials = special_ids(model, tokenizer)
        if not len(subject.targets) or all(int(i) in specials for i in subject.targets):
            what = " ".join(texts_of(tokenizer, subject.targets)) or "nothing"
            raise WorkbenchError(
                f"the hypothesis is empty: the model says {what[:80]}, which holds no word, about this input",
                hint="pass hypothesis= to explain a text of your own, or leave this input out",
            )
        subject.reference = check_finite(subject.log_probs(subject.main)[0])
        if kind == "tokens":
            given_ids = {"input_ids": main, **subject.rest, "decoder_input_ids": subject.decoder_ids}
            direct = subject.scored(model(**given_ids, use_cache=False).logits)[0]
            check_embeddings(direct, subject.reference, "explain the encoder's output with method='encoder_output'")
    return subject


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


def against(subject: ExplainedInput, contrast: Any, tokenizer: Any) -> None:
    """Hold the outputs of an example against others: as many ids, or a text of as many tokens; None for none.

    Raises:
        WorkbenchError: another number of ids, one outside the vocabulary, or one that is the output itself.
    """
    if contrast is None:
        return
    ids = ids_of(tokenizer, contrast, "the contrast").to(subject.targets.device)
    if len(ids) != len(subject.targets):
        raise WorkbenchError(
            f"the contrast has {len(ids)} tokens, what it is held against {len(subject.targets)}",
            hint="pass as many; decoding={'max_new_tokens': 1} lets a decoder write one token",
        )
    check_vocabulary("the contrast", ids, subject.reference.shape[1])
    same = (ids == subject.targets).nonzero()[:, 0]
    if len(same):
        k = int(same[0])
        name = subject.own_texts(ids[k : k + 1], tokenizer)[0]
        raise WorkbenchError(
            f"contrast and output {k} are the same, {visible(name)!r} ({int(ids[k])})",
            hint="put what both share into the prompt, and contrast where they differ",
        )
    subject.contrast = ids
