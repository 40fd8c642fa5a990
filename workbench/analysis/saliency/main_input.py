"""The input of a model that is explained, out of all that it is given; and how far it reaches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from workbench.errors import WorkbenchError

EXTRAS = ("audio", "sampling_rate", "seconds_per_frame", "name", "reference")
"""Entries of `inputs` that are not for the model: they are passed on to results and views."""
_MAIN = {
    "input_features": "spectrogram",
    "pixel_values": "image",
    "input_ids": "tokens",
    "input_values": "samples",
}


def main_input(given: Mapping[str, Any]) -> tuple[str, str, Tensor]:
    """Name, kind and tensor [1, ...] of what is explained.

    Raises:
        WorkbenchError: there is none, raw samples, or no or several examples.
    """
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
        raise WorkbenchError(
            f"{name} should hold one example", shape=main.shape, hint="pass utterances, texts or images one by one"
        )
    if kind == "tokens" and main.shape[1] == 0:
        raise WorkbenchError("the input text is empty", shape=main.shape)
    return name, kind, main


def time_axis_of(config: Any, main: Tensor) -> int:
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


def longest(config: Any) -> int | None:
    """Most input frames that the model takes; Whisper's convolutions halve them."""
    if getattr(config, "model_type", "") == "whisper":
        return 2 * int(config.max_source_positions)
    return None


def extent_of(frames: int | None, mask: Any, length: int) -> int:
    extent = length
    if frames is not None:
        extent = frames
    elif mask is not None:
        extent = int(torch.as_tensor(mask).flatten().nonzero().max()) + 1 if torch.as_tensor(mask).any() else 0
    if not 1 <= extent <= length:
        raise WorkbenchError(f"{extent} of {length} positions cannot be explained", hint="check frames= and the mask")
    return extent


def check_unpadded(spectrogram: Tensor) -> None:
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
