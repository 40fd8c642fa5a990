"""Clips for a speech model: those that ship with it, and pairs that differ in one digit, for circuits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from workbench.errors import TaskError, WorkbenchError, nearest
from workbench.storage import disk
from workbench.tasks import InputTask, from_inputs
from workbench.tasks.spoken_digits import RATE, SECONDS, WORDS, Clip, pairs
from workbench.tasks.spoken_digits import clips as make_clips

N_CLIPS = 8
"""How many ship."""
_CLIPS = "clips.safetensors"
_FRAMES = 200  # of the encoder, in a clip


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

    held = load_file(_folder(name) / _CLIPS)
    return Speech(held["input_features"].float(), make_clips(len(held["input_features"]), seed=int(held["seed"])))


def digit_pairs(n: int, *, seed: int = 0, name: str = "demo-s2t") -> InputTask:
    """A task for circuits: which digit was said second, when the first one is written down.

    The twin says another digit there, in the same voice and at the same times. Positions, in the encoder: "word", the
    middle of what is said at that place; "before", that of the digit before; "end".

    Args:
        n: clips. seed: of voices and digits. name: a shipped speech model, whose features are made.

    Raises:
        WorkbenchError: no clips ship with a model of that name. TaskError: n below 1.

    >>> task = digit_pairs(2)
    >>> task, list(task.inputs["input_features"].shape)
    (InputTask digits: 2 examples, [2, 40, 400])
    """
    from transformers import AutoFeatureExtractor, AutoTokenizer

    folder = _folder(name)
    extractor, tokenizer = AutoFeatureExtractor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    if n < 1:
        raise TaskError(f"a task needs at least 1 example, not {n}", hint="such as 32")
    made = pairs(n, seed=seed)

    def features(which: int) -> Tensor:
        waveforms = [pair[which].waveform for pair in made]
        return extractor(waveforms, sampling_rate=RATE, return_tensors="pt")["input_features"]

    ids = [[tokenizer.convert_tokens_to_ids(WORDS[digit]) for digit in clip.digits] for pair in made for clip in pair]
    written = torch.tensor([[tokenizer.convert_tokens_to_ids("<start>"), row[0]] for row in ids[::2]])
    seconds = SECONDS / _FRAMES
    middles = [[int((start + end) / 2 / seconds) for start, end in clip.spans] for clip, _ in made]
    return from_inputs(
        {"input_features": features(0), "decoder_input_ids": written},
        {"input_features": features(1), "decoder_input_ids": written},
        [row[1] for row in ids[::2]], [row[1] for row in ids[1::2]], name="digits",
        positions={"before": [row[0] for row in middles], "word": [row[1] for row in middles]},
        source="workbench.tasks.spoken_digits.pairs",
    )  # fmt: skip


def _folder(name: str) -> Path:
    shipped = {path.parent.name: path.parent for path in (Path(__file__).parent / "shipped").glob(f"*/{_CLIPS}")}
    if name not in shipped:
        raise WorkbenchError(f"no clips ship with {name!r}", hint=nearest(name, sorted(shipped), "model"))
    return shipped[name]


def save_clips(folder: Path, made: Sequence[Clip], features: Tensor, seed: int) -> None:
    """Write features (half precision) and seed beside a model; `made` are the first clips of that seed."""
    from safetensors.torch import save

    if len(made) != len(features):
        raise WorkbenchError("one row of features for each clip is needed", shape=features.shape)
    disk.write(folder / _CLIPS, save({"input_features": features.half().contiguous(), "seed": torch.tensor(seed)}))
