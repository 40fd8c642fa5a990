"""Utterances: audio from files, and inputs for `workbench.saliency` by the model's own feature extractor."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import FormatError, TaskError
from workbench.inputs import check_recording
from workbench.storage.disk import readable

RATE = 16_000
"""Samples per second that speech models are trained on."""
_LOWEST, _HIGHEST = 1_000, 384_000  # samples per second
_MOST_SAMPLES = 1 << 27  # of one channel: 512 MB, 47 minutes at 48 kHz
_AT_ONCE = 1 << 20  # numbers read at once


def load_audio(path: str | Path, *, rate: int = RATE, resample: bool = True) -> Float[Tensor, " sample"]:
    """The samples of an audio file within ±1, several channels averaged, at `rate` samples per second.

    Args:
        rate: asked for. resample: change the rate where the file has another.

    Raises:
        TaskError: no such file, not audio, another rate with resample=False, a rate or length beyond all recordings, no
            samples, silence, samples that are not within a scale of ±1, or soundfile is not installed.
    """
    try:
        import soundfile
    except ModuleNotFoundError as error:
        raise TaskError("reading audio needs soundfile", hint="pip install soundfile") from error
    try:
        file = readable(path)
    except FormatError as error:
        raise TaskError(error.message, hint=error.hint) from None
    try:
        if not file.is_file():
            raise TaskError(f"there is no file {file}")
        with soundfile.SoundFile(file) as sound:
            mono, found = _mono(sound, file.name), sound.samplerate
    except (soundfile.SoundFileError, OSError, ValueError, RuntimeError) as error:
        raise TaskError(f"{file.name} is no audio that soundfile reads: {error}") from error
    if found != rate:
        if not resample:
            raise TaskError(
                f"{file.name} has {found:,} samples per second, not {rate:,}", hint="pass resample=True, or its rate"
            )
        mono = resampled(mono, found, rate)
    wave = torch.from_numpy(np.ascontiguousarray(mono, dtype=np.float32))
    _check(wave, rate, file.name)
    return wave


def _mono(sound: Any, name: str) -> np.ndarray:
    """The samples of an open file, its channels averaged; a few at a time, since a header may promise anything."""
    _check_rate(sound.samplerate, name)
    if sound.frames > _MOST_SAMPLES:
        raise TaskError(f"{name} has {sound.frames:,} samples, the limit is {_MOST_SAMPLES:,}",
                        hint="cut it into shorter recordings")  # fmt: skip
    parts, left = [], _MOST_SAMPLES
    while len(block := sound.read(max(1, _AT_ONCE // sound.channels), dtype="float32", always_2d=True)):
        parts.append(block.mean(1))
        left -= len(block)
        if left < 0:
            raise TaskError(f"{name} has more than {_MOST_SAMPLES:,} samples", hint="cut it into shorter recordings")
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)


def _check_rate(rate: int, name: str) -> None:
    if not _LOWEST <= rate <= _HIGHEST:
        raise TaskError(f"{name} has {rate:,} samples per second, recordings have {_LOWEST:,} to {_HIGHEST:,}",
                        hint="check the header of the file, or the rate that was asked for")  # fmt: skip


def resampled(samples: np.ndarray, old: int, new: int) -> np.ndarray:
    """Samples at another rate, through a polyphase filter.

    Raises:
        TaskError: a rate that no recording has, or more samples than one may have.

    >>> resampled(np.ones(4800), 48_000, 16_000).shape
    (1600,)
    """
    for rate in (old, new):
        _check_rate(rate, "a recording")
    if len(samples) * new > _MOST_SAMPLES * old:
        raise TaskError(f"{len(samples):,} samples become more than {_MOST_SAMPLES:,} at {new:,} per second")
    from scipy.signal import resample_poly

    common = gcd(old, new)
    found: np.ndarray = resample_poly(samples, new // common, old // common)
    return found


def utterance(
    audio: Float[Tensor, " sample"] | np.ndarray,
    extractor: Any,
    *,
    rate: int = RATE,
    name: str = "utterance",
    reference: str | None = None,
) -> dict[str, Any]:
    """The inputs of one utterance, by the model's feature extractor; padding is masked.

    Args:
        audio: samples within ±1. extractor: such as transformers' `WhisperFeatureExtractor`.
        rate: of the samples. name: for tables and views. reference: what is said.

    Returns:
        input_features, attention_mask, name, audio, sampling_rate, seconds_per_frame, and reference where given.

    Raises:
        TaskError: another rate than the extractor's, several channels, silence, samples that are not finite or not on
            the scale of ±1, or longer than the extractor takes (it would cut the rest off).
    """
    wave = torch.as_tensor(audio)
    wanted = getattr(extractor, "sampling_rate", rate)
    if rate != wanted:
        raise TaskError(
            f"{name} has {rate:,} samples per second, the model's features need {wanted:,}",
            hint="load_audio(path, rate=...) changes the rate",
        )
    _check(wave, rate, name)
    wave = wave.float()
    longest = getattr(extractor, "n_samples", None)
    if isinstance(longest, int) and len(wave) > longest:
        raise TaskError(
            f"{name} lasts {len(wave) / rate:.1f} s, the model takes {longest / rate:g} s", shape=wave.shape,
            hint="cut it into shorter utterances",
        )  # fmt: skip
    found = extractor(wave.numpy(), sampling_rate=rate, return_tensors="pt", return_attention_mask=True)
    inputs = {
        "input_features": found.input_features,
        "attention_mask": found.attention_mask,
        "name": name,
        "audio": wave,
        "sampling_rate": rate,
        "seconds_per_frame": extractor.hop_length / rate,
    }
    return inputs if reference is None else inputs | {"reference": reference}


def from_features(
    features: Float[Tensor, "*batch frequency time"],
    *,
    seconds: float,
    audio: Any = None,
    rate: int = RATE,
    name: str = "utterance",
    reference: str | None = None,
) -> dict[str, Any]:
    """The inputs of one utterance whose features are there already, such as a clip that ships with a model.

    Args:
        features: as the model takes them, [frequency, time] or [1, frequency, time]. seconds: how long they last.
        audio: samples to listen to. rate: of the samples.

    Raises:
        TaskError: features of several utterances, or of no duration.
    """
    one = features if features.dim() == 3 else features[None]
    if one.dim() != 3 or len(one) != 1:
        raise TaskError("the features should be those of one utterance", shape=features.shape)
    if seconds <= 0:
        raise TaskError(f"{seconds} seconds are no duration")
    inputs: dict[str, Any] = {"input_features": one, "name": name, "seconds_per_frame": seconds / one.shape[-1]}
    if audio is not None:
        inputs |= {"audio": torch.as_tensor(audio).float().flatten(), "sampling_rate": rate}
    return inputs if reference is None else inputs | {"reference": reference}


def spans_of(spans: Sequence[tuple[float, float]], special: Sequence[bool]) -> np.ndarray | None:
    """[token, 2] seconds in which each output token was said, NaN for special ones; None where their numbers differ.

    Args:
        spans: begin and end of each word. special: [token], as a result has it.

    >>> spans_of([(0.5, 1.0)], [False, True]).tolist()
    [[0.5, 1.0], [nan, nan]]
    """
    words = [i for i, odd in enumerate(special) if not odd]
    if len(words) != len(spans):
        return None
    found = np.full((len(special), 2), np.nan)
    if words:
        found[words] = np.asarray(spans, dtype=float)
    return found


def _check(wave: Tensor, rate: int, name: str) -> None:
    check_recording(wave, name, TaskError)
    if len(wave) < rate // 50:
        raise TaskError(f"{name} lasts {1000 * len(wave) / rate:.0f} ms, too short for speech", shape=wave.shape)


__all__ = ["RATE", "from_features", "load_audio", "resampled", "spans_of", "utterance"]
