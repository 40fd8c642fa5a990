"""Audio comes in at the right rate, whole and audible, or not at all."""

from __future__ import annotations

import builtins
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

from support.unavailable import unavailable
from workbench.errors import TaskError
from workbench.tasks import speech

soundfile = pytest.importorskip("soundfile", reason="audio files need soundfile")
ALSA = Path("/usr/share/sounds/alsa")


def tone(seconds: float = 1.0, rate: int = 16_000, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


@pytest.fixture(scope="module")
def extractor() -> Any:
    return WhisperFeatureExtractor(feature_size=40, chunk_length=2)


def test_a_file_comes_at_its_own_rate_as_it_is(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(), 16_000, subtype="FLOAT")
    np.testing.assert_array_equal(speech.load_audio(tmp_path / "a.wav").numpy(), tone())


def test_channels_are_averaged(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.stack([tone(), 0 * tone()], 1), 16_000, subtype="FLOAT")
    np.testing.assert_allclose(speech.load_audio(tmp_path / "a.wav").numpy(), tone() / 2, atol=1e-7)


def test_another_rate_is_resampled_or_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(rate=48_000), 48_000, subtype="FLOAT")
    wave = speech.load_audio(tmp_path / "a.wav").numpy()
    assert wave.shape == (16_000,)
    np.testing.assert_allclose(wave[500:-500], tone()[500:-500], atol=2e-3)
    with pytest.raises(TaskError, match="48,000 samples per second, not 16,000"):
        speech.load_audio(tmp_path / "a.wav", resample=False)


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        (np.zeros(8000), "silent"),
        (np.zeros(0), "no samples"),
        (tone(0.01), "too short"),
        (np.full(8000, np.nan), "finite"),
    ],
)
def test_what_is_no_speech_is_refused(samples: np.ndarray, said: str, tmp_path: Path, extractor: Any) -> None:
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    with pytest.raises(TaskError, match=said):
        speech.load_audio(tmp_path / "a.wav")
    with pytest.raises(TaskError, match=said):
        speech.utterance(samples, extractor)


def test_missing_and_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="there is no file"):
        speech.load_audio(tmp_path / "none.wav")
    (tmp_path / "text.wav").write_text("no audio")
    with pytest.raises(TaskError, match="no audio that soundfile reads"):
        speech.load_audio(tmp_path / "text.wav")


def test_without_soundfile_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name == "soundfile":
            raise ModuleNotFoundError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(TaskError, match="pip install soundfile"):
        speech.load_audio("a.wav")


def test_inputs_hold_features_and_what_views_need(extractor: Any) -> None:
    found = speech.utterance(tone(), extractor, name="a tone", reference="la")
    assert found["input_features"].shape == (1, 40, 200)
    assert int(found["attention_mask"].sum()) == 100
    assert found["seconds_per_frame"] == 0.01
    assert torch.equal(found["audio"], torch.from_numpy(tone()))
    assert (found["name"], found["reference"], found["sampling_rate"]) == ("a tone", "la", 16_000)


def test_too_long_and_wrong_rate_are_refused_not_cut(extractor: Any) -> None:
    with pytest.raises(TaskError, match=r"lasts 2\.5 s, the model takes 2 s"):
        speech.utterance(tone(2.5), extractor)
    with pytest.raises(TaskError, match="8,000 samples per second"):
        speech.utterance(tone(), extractor, rate=8_000)


def test_features_that_are_there_already() -> None:
    found = speech.from_features(torch.zeros(40, 400), seconds=4.0, audio=np.zeros(64_000), reference="one")
    assert found["input_features"].shape == (1, 40, 400)
    assert found["seconds_per_frame"] == 0.01
    assert found["audio"].shape == (64_000,)
    with pytest.raises(TaskError, match="one utterance"):
        speech.from_features(torch.zeros(2, 40, 400), seconds=4.0)
    with pytest.raises(TaskError, match="no duration"):
        speech.from_features(torch.zeros(40, 400), seconds=0.0)


def test_spans_stand_beside_the_tokens_they_belong_to() -> None:
    found = speech.spans_of([(0.0, 1.0), (2.0, 3.0)], [False, False, True])
    assert found is not None
    np.testing.assert_array_equal(found, [[0, 1], [2, 3], [np.nan, np.nan]])
    assert speech.spans_of([(0.0, 1.0)], [False, False]) is None


@pytest.mark.slow
@torch.no_grad()
def test_whisper_base_reads_a_voice_of_alsa_utils(whisper_base: Path) -> None:
    from workbench.models import load

    file = ALSA / "Front_Center.wav"
    if not file.is_file():
        unavailable(f"{file} is not there: install Debian's alsa-utils")
    model, tokenizer = load(whisper_base)
    inputs = speech.utterance(speech.load_audio(file), WhisperFeatureExtractor.from_pretrained(whisper_base))
    ids = model.generate(inputs["input_features"], decoder_input_ids=torch.tensor([[50258, 50259, 50359, 50363]]))
    assert "front center" in tokenizer.decode(ids[0], skip_special_tokens=True).lower()


def _wav(rate: int = 16_000, n: int = 2000, channels: int = 1, declared: int | None = None) -> bytes:
    data = (np.sin(np.arange(n * channels) / 9) * 9000).astype("<i2").tobytes()
    width = 2 * channels
    head = struct.pack("<IHHIIHH", 16, 1, channels, rate, rate * width & 0xFFFFFFFF, width & 0xFFFF, 16)
    size = struct.pack("<I", len(data) if declared is None else declared)
    return b"RIFF" + struct.pack("<I", 36 + len(data)) + b"WAVEfmt " + head + b"data" + size + data


@pytest.mark.parametrize("rate", [1, 7, 999, 384_001, 10**7 + 19, 2**31 - 1])
def test_rates_that_no_recording_has_are_refused(rate: int, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(_wav(rate))
    with pytest.raises(TaskError, match="samples per second, recordings have"):
        speech.load_audio(tmp_path / "a.wav")
    with pytest.raises(TaskError, match="samples per second, recordings have"):
        speech.resampled(np.ones(100), rate, 16_000)


def test_a_length_that_a_header_promises_is_not_taken_on_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.wav").write_bytes(_wav(declared=2**32 - 1))
    assert speech.load_audio(tmp_path / "a.wav").shape == (2000,)
    monkeypatch.setattr(speech, "_MOST_SAMPLES", 1000)
    with pytest.raises(TaskError, match="2,000 samples, the limit is 1,000"):
        speech.load_audio(tmp_path / "a.wav")
    with pytest.raises(TaskError, match="become more than 1,000"):
        speech.resampled(np.ones(900), 8_000, 16_000)


def test_channels_are_averaged_a_few_samples_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.wav").write_bytes(_wav(channels=3))
    whole = speech.load_audio(tmp_path / "a.wav")
    monkeypatch.setattr(speech, "_AT_ONCE", 100)
    assert whole.equal(speech.load_audio(tmp_path / "a.wav"))


def test_samples_far_beyond_full_scale_are_refused() -> None:
    with pytest.raises(TaskError, match="goes far beyond ±1"):
        speech._check(torch.full((2000,), 9000.0), 16_000, "a")
