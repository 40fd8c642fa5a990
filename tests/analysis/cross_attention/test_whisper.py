"""Whisper base on a real voice: what it hears, where attention and saliency put the words, and what deletion does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import workbench
from support.unavailable import unavailable
from workbench.analysis.cross_attention.faithfulness import curves
from workbench.analysis.saliency.preparing import prepare_input

PROMPT = [50258, 50259, 50359, 50363]
HEADS = ((3, 1), (4, 2), (4, 3), (4, 7), (5, 1), (5, 2), (5, 4), (5, 6))
VOICE = Path("/usr/share/sounds/alsa/Front_Center.wav")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def heard(whisper_base: Path) -> Iterator[tuple[workbench.Workbench, dict[str, Any]]]:
    """Whisper base attached, and the inputs of a voice that says “front center”."""
    if not VOICE.exists():
        unavailable(f"{VOICE} is not there: install Debian's alsa-utils")
    import soundfile
    from scipy.signal import resample_poly

    samples, rate = soundfile.read(VOICE, dtype="float32")
    extractor = hf.WhisperFeatureExtractor.from_pretrained(whisper_base)
    found = extractor(
        resample_poly(samples, 16_000, rate), sampling_rate=16_000, return_tensors="pt", return_attention_mask=True
    )
    model, tokenizer = workbench.models.load(whisper_base)
    with workbench.attach(model, tokenizer) as wb:
        yield wb, {**found, "name": "front center"}


def middle(maps: Tensor) -> Tensor:
    """[token] the mean position under what each map has above its median."""
    above = (maps - maps.median(-1, keepdim=True).values).clamp(min=0)
    return (above * torch.arange(maps.shape[-1])).sum(-1) / above.sum(-1)


def test_attention_and_saliency_put_the_words_in_their_order(heard: tuple[workbench.Workbench, Any]) -> None:
    wb, inputs = heard
    attention = workbench.cross_attention(wb, inputs, prompt=PROMPT, alignment_heads=HEADS)
    said = "".join(attention.target_texts).lower()
    assert "front" in said
    assert "center" in said
    assert attention.special[-1]
    assert attention.maps.shape[:2] == (6, 8)
    assert attention.maps.shape[3] == 72  # 143 frames of audio, not the 30 s they are padded to
    found = workbench.saliency(
        wb, inputs, "encoder_output", prompt=PROMPT, n_masks=150, batch_size=16, precision=None, progress=False
    )
    assert found.details["cached"]
    front, center = (next(i for i, t in enumerate(found.target_texts) if w in t.lower()) for w in ("front", "center"))
    for maps in (attention.aggregate("alignment heads"), found.scores):
        where = middle(maps)
        assert where[front] + 5 < where[center]  # 0.1 s


def test_silence_in_place_of_the_voice_changes_what_is_heard(heard: tuple[workbench.Workbench, Any]) -> None:
    wb, inputs = heard
    with torch.no_grad():
        subject = prepare_input(wb.model, inputs, prompt=torch.tensor(PROMPT))
    frames = torch.arange(143.0)[:, None].expand(143, 80)
    found = curves(subject, frames, (0, 1), baseline="min", tokenizer=wb.tokenizer)
    assert float(found[0, 0, 2]) == 0
    assert float(found[0, 1, 2]) == 100
    assert float(found[0, 0, 1]) > float(found[0, 1, 1])
