"""Real and synthetic utterances for the benchmarks on Whisper base: Debian's alsa-utils and espeak-ng."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

PROMPT = [50258, 50259, 50359, 50363]
"""Whisper's start, English, transcribe, no time stamps."""
ALIGNMENT_HEADS = ((3, 1), (4, 2), (4, 3), (4, 7), (5, 1), (5, 2), (5, 4), (5, 6))
"""(layer, head) that OpenAI publishes for Whisper base."""
_RATE = 16_000
_ALSA = Path("/usr/share/sounds/alsa")
_VOICES = (("Front_Center", "Front center"), ("Rear_Left", "Rear left"), ("Side_Right", "Side right"))
_SENTENCES = (
    ("en-us", "The quick brown fox jumps over the lazy dog."),
    ("en-gb", "She will meet us at seven in the evening."),
    ("en-us", "The weather was cold, but the sun was shining."),
    ("en-gb", "Please put the red book on the table."),
)


def whisper(window: int = 30) -> tuple[Any, Any, Any]:
    """Whisper base, its tokenizer and its feature extractor.

    Args:
        window: seconds that the encoder sees. Whisper pads every recording to 30; with fewer the rest of its table of
            positions is cut off, and everything runs as much faster.
    """
    from transformers import WhisperFeatureExtractor

    import workbench
    from support import whisper_base
    from support.folders import model_folder

    folder = model_folder(whisper_base)
    model, tokenizer = workbench.models.load(folder)
    encoder = model.model.encoder
    positions = 50 * window
    encoder.embed_positions = torch.nn.Embedding.from_pretrained(encoder.embed_positions.weight[:positions].detach())
    model.config.max_source_positions = encoder.max_source_positions = positions
    return model, tokenizer, WhisperFeatureExtractor(feature_size=80, chunk_length=window)


def utterances(extractor: Any) -> Iterator[dict[str, Any]]:
    """Inputs of one utterance after the other, as `workbench.saliency` takes them."""
    for name, text in _VOICES:
        yield _inputs(extractor, name, text, *_read(_ALSA / f"{name}.wav"))
    for voice, text in _SENTENCES:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "said.wav"
            subprocess.run(["espeak-ng", "-v", voice, "-s", "150", "-w", str(file), text], check=True)
            yield _inputs(extractor, f"espeak {voice}: {text}", text, *_read(file))


def _read(file: Path) -> tuple[np.ndarray, int]:
    import soundfile
    from scipy.signal import resample_poly

    samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
    return resample_poly(samples.mean(1), _RATE, rate).astype("float32"), _RATE


def _inputs(extractor: Any, name: str, text: str, samples: np.ndarray, rate: int) -> dict[str, Any]:
    found = extractor(samples, sampling_rate=rate, return_tensors="pt", return_attention_mask=True)
    return {
        "input_features": found.input_features,
        "attention_mask": found.attention_mask,
        "name": name,
        "reference": text,
        "seconds_per_frame": extractor.hop_length / rate,
        "audio": torch.from_numpy(samples),
        "sampling_rate": rate,
    }
