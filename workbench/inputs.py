"""Checks on what a user feeds a model, recordings among it, and the token ids found in it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import CaptureError, WorkbenchError
from workbench.hooks.configs import read
from workbench.hooks.packing import Segment, of_inputs

_SILENT = 1e-4  # of full scale; below it a recording holds nothing but the noise of a converter
_LOUDEST = 16.0  # times full scale; above it samples are on another scale
_SHORT = 8  # tokens that are enough to find a model's parts


def token_ids(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Integer ids [batch, position] by stream: "input" and, for encoder-decoders, "decoder"."""
    found = {"input": kwargs.get("input_ids"), "decoder": kwargs.get("decoder_input_ids")}
    if found["input"] is None and args and isinstance(args[0], Tensor):
        found["input"] = args[0]
    return {
        name: ids.detach()
        for name, ids in found.items()
        if isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point()
    }


def packed_sequences(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Segment, ...]:
    """The sequences that the rows of a model's inputs hold; () where each row is one."""
    named = dict(kwargs)
    if len(args) > 1:
        names = list(inspect.signature(model.forward).parameters)
        named = {**dict(zip(names, args, strict=False)), **named}
    first = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim() > 1), None)
    return of_inputs(named, 1 if first is None else first.shape[0])


def check_numbers(inputs: Iterable[Any]) -> None:
    """Raise a CaptureError if one of the inputs is on the "meta" device."""
    if (empty := next((t for t in inputs if isinstance(t, Tensor) and t.is_meta), None)) is not None:
        raise CaptureError(
            'an input is on the "meta" device, where tensors have sizes and no numbers',
            shape=empty.shape,
            hint="load the model's weights onto a device; wb.estimate tells without them what a capture would keep",
        )


def check_inputs(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    packed: Sequence[Segment] = (),
    context: Callable[[], int | None] | None = None,
) -> None:
    """Refuse inputs that would fail deep inside the model, or give an empty result.

    Args:
        packed: the sequences that rows hold: no row as a whole has to fit into the model's context.
        context: gives the context's length, where that is known already.

    Raises:
        CaptureError: tensors without numbers, or on another device than the model, an empty prompt, one longer than the
            context, or ids or labels that the model's vocabulary does not have.
    """
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    first = next(model.parameters(), None)
    if first is not None and first.device.type != "meta" and not hasattr(model, "hf_device_map"):
        for tensor in tensors:
            if tensor.device != first.device:
                raise CaptureError(
                    f"an input is on {tensor.device}, the model on {first.device}",
                    shape=tensor.shape,
                    hint=f'move the inputs with .to("{first.device}")',
                )
    check_numbers(tensors)
    limit = context_length(model) if context is None else context()
    for name, ids in token_ids(args, kwargs).items():
        if ids.numel() == 0:
            raise CaptureError(f"the {name} prompt is empty", shape=ids.shape, hint="give at least one token")
        longest = max((one.stop - one.start for one in packed), default=ids.shape[1])
        if limit is not None and longest > limit:
            raise CaptureError(
                f"the {name} prompt has {longest} tokens, the model's context {limit}",
                shape=ids.shape,
                hint=f"shorten it to {limit} tokens",
            )
    if context is None or all(tensor.device.type == "cpu" for tensor in tensors):  # else a device would be waited for
        _check_vocabulary(model, args, kwargs)


def _check_vocabulary(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse ids and labels that there are not. Beside images and sounds ids may stand for something else."""
    given = kwargs.get("input_ids")
    if isinstance(given, Tensor) and given.is_floating_point():
        raise CaptureError(f"input_ids are {given.dtype}, expected whole numbers", hint="inputs_embeds takes vectors")
    if any(isinstance(t, Tensor) and t.is_floating_point() and t.dim() > 2 for t in (*args, *kwargs.values())):
        return
    ids, labels = token_ids(args, kwargs).get("input"), kwargs.get("labels")
    if ids is not None and (size := _rows_of(model, "get_input_embeddings")) is not None:
        _check_ids(ids, size, "id")
    if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.dtype not in (torch.int32, torch.int64):
        return
    if (size := _rows_of(model, "get_output_embeddings")) is not None:
        _check_ids(labels[labels != IGNORED], size, "label")


IGNORED = -100
"""The label of positions that do not count, as PyTorch has it."""


def _rows_of(model: nn.Module, getter: str) -> int | None:
    try:
        table = getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None
    weight = table.weight if isinstance(table, (nn.Embedding, nn.Linear)) else None
    return len(weight) if isinstance(weight, Tensor) and weight.dim() == 2 and len(weight) else None


def _check_ids(ids: Tensor, size: int, what: str) -> None:
    bad = ids[(ids < 0) | (ids >= size)]
    if bad.numel():
        raise CaptureError(
            f"there is no {what} {int(bad[0])}: the model knows 0 to {size - 1}",
            shape=ids.shape,
            hint=f"are the {what}s another tokenizer's?"
            + (f" {IGNORED} marks positions that do not count" if what == "label" else ""),
        )


def check_text(text: Any) -> str:
    """The text, if a tokenizer can take it.

    Raises:
        CaptureError: no text, or one that holds half of a character (a lone surrogate), as of bytes that are no UTF-8.
    """
    if not isinstance(text, str):
        raise CaptureError(f"a text is a str, not {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CaptureError(
            f"the text holds half of a character, U+{ord(text[error.start]):04X} at {error.start:,}",
            hint='replace it: text.encode(errors="replace").decode()',
        ) from None
    return text


def decoder_start(model: nn.Module) -> int | None:
    """The id that the decoder of an encoder-decoder begins with; None for a model that is none.

    Raises:
        CaptureError: an encoder-decoder that does not tell.
    """
    config = read(model, "config")
    if not read(config, "is_encoder_decoder", False):
        return None
    owners = (config, read(config, "decoder"))
    names = ("decoder_start_token_id", "bos_token_id")
    found = [read(owner, name) for name in names for owner in owners]
    start = next((one for one in found if one is not None), None)
    if start is None:
        raise CaptureError("the model tells of no start token", hint="set model.config.decoder_start_token_id")
    return int(start)


def device_for_inputs(model: nn.Module) -> torch.device:
    """Where a model wants its inputs: with its first parameter, or where it runs if that is offloaded."""
    first = next(model.parameters(), None)
    if first is None:
        return torch.device("cpu")
    if first.device.type != "meta":
        return first.device
    hook = read(model, "_hf_hook")
    for each in (hook, *read(hook, "hooks", ())):
        if (runs_on := read(each, "execution_device")) is not None:
            return torch.device(runs_on)
    return torch.device("cpu")


def context_length(model: nn.Module) -> int | None:
    """How many positions of tokens a model has learned, or None when it has no table of them (rotary, relative).

    Tables that stand beside no table of the vocabulary are those of images or sounds, and limit no prompt.
    """
    config = read(model, "config")
    stated = read(config, "max_position_embeddings") or read(config, "n_positions")
    if not isinstance(stated, int):
        return None
    vocabulary = read(config, "vocab_size")
    limits = []
    for parent in model.modules():
        tables = [
            (name, each.num_embeddings) for name, each in parent.named_children() if isinstance(each, nn.Embedding)
        ]
        positions = [size for name, size in tables if "position" in name or name == "wpe"]
        words = [size for name, size in tables if not ("position" in name or name == "wpe")]
        if positions and words and (not isinstance(vocabulary, int) or max(words) >= vocabulary):
            limits.append(max(positions))  # smaller ones beside it are those of coordinates
    if not limits:
        return None
    return min(stated, *limits)  # some tables are longer than the context by an offset


def dropout_in_training(model: nn.Module) -> list[str]:
    """Names of modules that drop out at present."""
    return [
        name or type(module).__name__
        for name, module in model.named_modules()
        if module.training and isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
    ]


def without_cache(model: nn.Module) -> dict[str, Any]:
    """What to tell a model so that it keeps no keys and values."""
    takes = "use_cache" in inspect.signature(model.forward).parameters
    return {"use_cache": False} if takes and read(read(model, "config"), "use_cache", False) else {}


def check_recording(wave: Tensor, name: str, error: type[WorkbenchError] = WorkbenchError) -> None:
    """Refuse samples that are no recording of one channel within ±1; `error` is the class that is raised.

    Raises:
        WorkbenchError: several channels, no samples, integers, samples that are not finite or far beyond ±1, silence.
    """
    if wave.dim() != 1:
        raise error(f"{name} is not one channel of samples", shape=wave.shape, hint="average the channels")
    if not len(wave):
        raise error(f"{name} holds no samples")
    if not wave.is_floating_point():
        what = str(wave.dtype).removeprefix("torch.")
        raise error(
            f"{name} has samples of type {what}, where floats within ±1 are taken",
            shape=wave.shape,
            hint="divide them by full scale, such as 32,768 for samples of 16 bits",
        )
    if not bool(wave.isfinite().all()):
        raise error(f"{name} holds samples that are not finite", shape=wave.shape)
    peak = float(wave.abs().max())
    if peak > _LOUDEST:
        raise error(
            f"{name} goes far beyond ±1: its loudest sample is {peak:.3g}",
            shape=wave.shape,
            hint="divide by full scale, such as 32,768 for samples of 16 bits",
        )
    if peak < _SILENT:
        raise error(
            f"{name} is silent: its loudest sample is {peak:.1e}",
            shape=wave.shape,
            hint="check the recording and its scale",
        )


def to_ids(tokens: Any) -> Tensor:
    """Token ids given by a user as a tensor or nested list, as [batch, position].

    >>> to_ids([3, 1, 2]).tolist()
    [[3, 1, 2]]
    """
    ids = torch.as_tensor(tokens)
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2 or ids.is_floating_point():
        raise CaptureError("tokens are integer ids [batch, position]", shape=ids.shape)
    return ids


def own_positions(mask: Tensor) -> Tensor:
    """[batch, position] what each token's number is in its own prompt, whichever side is padded; 0 before it.

    >>> own_positions(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])).tolist()
    [[0, 0, 0, 1], [0, 1, 2, 2]]
    """
    return (mask.long().cumsum(1) - 1).clamp_min(0)


def with_own_positions(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs, with `position_ids` where prompts are padded on the left and the model takes them.

    Without them most decoders count from the first column, where the padding is.
    """
    mask = inputs.get("attention_mask")
    if mask is None or mask.dim() != 2 or mask.numel() == 0 or bool(mask[:, 0].all()) or "position_ids" in inputs:
        return inputs
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return inputs
    return {**inputs, "position_ids": own_positions(mask)}


def own_columns(real: Tensor, position: int) -> Tensor:
    """[batch] column of a position in each prompt, counted over its own tokens; negative ones from the end.

    Args:
        real: [batch, column] bool, where there is no padding, which may stand on either side.

    Raises:
        CaptureError: a prompt has no such position.

    >>> own_columns(torch.tensor([[False, True, True], [True, True, False]]), -1)
    tensor([2, 1])
    """
    lengths = real.sum(1)
    number = lengths + position if position < 0 else torch.full_like(lengths, position)
    bad = ((number < 0) | (number >= lengths)).nonzero()[:, 0].tolist()
    if bad:
        raise CaptureError(
            f"position {position} lies beyond prompt {bad[0]}, which has {int(lengths[bad[0]])} tokens",
            hint="positions count from 0, or from -1 at the end",
        )
    return ((real.cumsum(1) - 1 == number[:, None]) & real).int().argmax(1)


def shortened(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The first example, cut to the first few tokens that are no padding."""
    found = {name: value[:1] if isinstance(value, Tensor) and value.dim() else value for name, value in batch.items()}
    for prefix in ("", "decoder_"):
        ids, mask = found.get(f"{prefix}input_ids"), found.get(f"{prefix}attention_mask")
        if not isinstance(ids, Tensor):
            continue
        real = torch.ones_like(ids[0]) if mask is None or mask.dim() != 2 else mask[0]
        kept = real.nonzero()[:_SHORT, 0]
        if len(kept) < 2:  # one token alone shows too little
            kept = kept[:1].expand(_SHORT)
        found[f"{prefix}input_ids"] = ids[:, kept]
        for name in (f"{prefix}attention_mask", f"{prefix}token_type_ids", f"{prefix}position_ids"):
            if isinstance(found.get(name), Tensor) and found[name].shape == ids.shape:
                found[name] = found[name][:, kept]
    return found
