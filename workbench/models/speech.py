"""Clips that ship with a speech model: features as it takes them, waveforms and the time of every word."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from workbench.errors import WorkbenchError, nearest
from workbench.tasks.spoken_digits import Clip
from workbench.tasks.spoken_digits import clips as make_clips

N_CLIPS = 8
"""How many ship."""
_CLIPS = "clips.safetensors"


class Speech(NamedTuple):
    """Held-out clips of a speech model.

    Attributes:
        input_features: [clip, band, frame] float32 log-mel features, as the model takes them.
        clips: what is said, waveforms and the time of every word.
    """

    input_features: Tensor
    clips: list[Clip]


def clips(name: str = "demo-s2t") -> Speech:
    """The clips that ship with a model, of voices that it was not trained on.

    The features are stored; the waveforms, for listening, are made again from their seed.

    Raises:
        WorkbenchError: no clips ship with a model of that name.

    >>> features, spoken = clips("demo-s2t")
    >>> list(features.shape), spoken[0].text
    ([8, 40, 400], 'six three three zero six four')
    """
    from safetensors.torch import load_file

    shipped = {path.parent.name: path for path in (Path(__file__).parent / "shipped").glob(f"*/{_CLIPS}")}
    if name not in shipped:
        raise WorkbenchError(f"no clips ship with {name!r}", hint=nearest(name, sorted(shipped), "model"))
    held = load_file(shipped[name])
    return Speech(held["input_features"].float(), make_clips(len(held["input_features"]), seed=int(held["seed"])))


def save_clips(folder: Path, made: Sequence[Clip], features: Tensor, seed: int) -> None:
    """Write features (half precision) and seed beside a model; `made` are the first clips of that seed."""
    from safetensors.torch import save_file

    if len(made) != len(features):
        raise WorkbenchError("one row of features for each clip is needed", shape=features.shape)
    save_file({"input_features": features.half().contiguous(), "seed": torch.tensor(seed)}, folder / _CLIPS)
