"""Spoken digits: the same for a seed, within bounds, where they say they are, and told apart by their spectra."""

from __future__ import annotations

import numpy as np
import pytest

from workbench.errors import TaskError
from workbench.tasks.spoken_digits import MOST, RATE, SECONDS, WORDS, Voice, clips, pairs, say, word

VOICE = Voice(pitch=120, tract=1.0, speed=1.0, breath=0.02)


def test_clips_repeat_and_differ() -> None:
    one, two, other = clips(3, seed=1), clips(3, seed=1), clips(3, seed=2)
    for a, b in zip(one, two, strict=True):
        assert a.digits == b.digits
        assert np.array_equal(a.waveform, b.waveform)
    assert [c.digits for c in one] != [c.digits for c in other]
    assert clips(1, seed=1)[0].digits == one[0].digits  # a clip does not depend on how many are made


def test_a_clip_is_as_long_as_it_says_and_within_bounds() -> None:
    for clip in clips(10, seed=3, least=1):
        assert clip.waveform.shape == (int(SECONDS * RATE),)
        assert clip.waveform.dtype == np.float32
        assert np.abs(clip.waveform).max() <= 1
        assert 1 <= len(clip.digits) <= MOST
        assert clip.text.split() == [WORDS[digit] for digit in clip.digits]
        ends = [0.0]
        for start, end in clip.spans:
            assert ends[-1] <= start < end <= SECONDS
            ends.append(end)


def test_words_are_louder_than_what_is_between_them() -> None:
    for clip in clips(5, seed=4):
        spoken = np.zeros(len(clip.waveform), bool)
        for start, end in clip.spans:
            spoken[int(start * RATE) : int(end * RATE)] = True
        power = clip.waveform.astype(float) ** 2
        assert power[spoken].mean() > 20 * power[~spoken].mean()


def test_a_word_holds_its_pitch_and_its_formants() -> None:
    vowel = word(3, VOICE, np.random.default_rng(0))[-int(0.12 * RATE) :]  # the iy of three
    spectrum = np.abs(np.fft.rfft(vowel * np.hanning(len(vowel)), 1 << 14))
    hertz = np.fft.rfftfreq(1 << 14, 1 / RATE)
    low = hertz[np.argmax(spectrum * ((hertz > 160) & (hertz < 800)))]  # above the pitch itself
    assert 190 < low < 420  # F1 of iy
    high = hertz[np.argmax(spectrum * ((hertz > 1500) & (hertz < 2700)))]
    assert 2000 < high < 2500  # F2


def test_noise_is_where_the_fricatives_are() -> None:
    six = word(6, VOICE, np.random.default_rng(0))
    first = np.abs(np.fft.rfft(six[: int(0.08 * RATE)])) ** 2
    hertz = np.fft.rfftfreq(int(0.08 * RATE), 1 / RATE)
    assert first[hertz > 3500].sum() > 5 * first[hertz < 3500].sum()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: word(10, VOICE, np.random.default_rng(0)), "10 is not a digit"),
        (lambda: say([], VOICE, np.random.default_rng(0)), "0 digits"),
        (lambda: say([1] * 7, VOICE, np.random.default_rng(0)), "7 digits"),
        (lambda: clips(1, least=4, most=3), "4 to 3 digits"),
    ],
)
def test_bad_input_is_named(call: object, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        call()  # type: ignore[operator]


def test_pairs_differ_in_one_word_only() -> None:
    for clip, twin in pairs(4, seed=7):
        assert [a == b for a, b in zip(clip.digits, twin.digits, strict=True)] == [True, False, True]
        assert clip.spans == twin.spans
        start, end = (int(second * RATE) for second in clip.spans[1])
        same = clip.waveform == twin.waveform
        assert same[:start].all()
        assert same[end + 1 :].all()
        assert not same[start:end].all()
    with pytest.raises(TaskError, match="place 3"):
        pairs(1, place=3)
