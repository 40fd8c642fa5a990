"""Spoken digits from a formula: strings of digits as a synthetic voice says them, with the time of every word.

A voice is a pulse train through three formants, with bands of noise for what is not voiced. It sounds like a machine,
and the words can be told apart by their spectra. Nothing is recorded, so every clip can be made again from its seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

from workbench.errors import TaskError

RATE = 16_000
"""Samples per second."""
SECONDS = 4.0
"""Length of every clip."""
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MOST = 6
"""Digits in a clip at most."""

_STEP = 0.005  # seconds between two points of the formant tracks
_EDGE = 0.012  # seconds in which one sound gives way to the next
_VOICE_TOP = 4500.0  # Hz; voiced sounds have little above
_BANDWIDTHS = (80.0, 110.0, 160.0)  # Hz, of the three formants


class _Sound(NamedTuple):
    """One speech sound: loudness of its voice and noise, its formants, the band of the noise (Hz), its length (s)."""

    voice: float
    noise: float
    formants: tuple[float, float, float]
    band: tuple[float, float]
    seconds: float


_OPEN = (500.0, 1500.0, 2500.0)
_SOUNDS = {
    "z": _Sound(0.25, 0.20, (250, 1700, 2500), (3500, 7500), 0.080),
    "s": _Sound(0.0, 0.35, _OPEN, (3800, 7600), 0.110),
    "f": _Sound(0.0, 0.10, (350, 1100, 2300), (1500, 7500), 0.090),
    "th": _Sound(0.0, 0.10, (350, 1400, 2500), (1500, 6500), 0.080),
    "v": _Sound(0.35, 0.05, (280, 1100, 2300), (1500, 7000), 0.060),
    "closure": _Sound(0.0, 0.0, _OPEN, (0, 0), 0.050),
    "t": _Sound(0.0, 0.30, (350, 1800, 2600), (2500, 7000), 0.025),
    "k": _Sound(0.0, 0.30, (350, 1900, 2400), (1300, 3000), 0.025),
    "w": _Sound(0.55, 0.0, (300, 650, 2200), (0, 0), 0.070),
    "r": _Sound(0.60, 0.0, (350, 1150, 1600), (0, 0), 0.070),
    "n": _Sound(0.35, 0.0, (250, 1400, 2400), (0, 0), 0.080),
    "ih": _Sound(1.0, 0.0, (400, 1950, 2550), (0, 0), 0.080),
    "iy": _Sound(1.0, 0.0, (290, 2250, 2900), (0, 0), 0.160),
    "eh": _Sound(1.0, 0.0, (550, 1800, 2550), (0, 0), 0.090),
    "ah": _Sound(1.0, 0.0, (650, 1200, 2450), (0, 0), 0.100),
    "uh": _Sound(0.8, 0.0, (500, 1350, 2450), (0, 0), 0.050),
    "a": _Sound(1.0, 0.0, (740, 1150, 2450), (0, 0), 0.100),
    "ao": _Sound(1.0, 0.0, (580, 880, 2450), (0, 0), 0.120),
    "o": _Sound(1.0, 0.0, (500, 900, 2400), (0, 0), 0.090),
    "u": _Sound(1.0, 0.0, (340, 850, 2250), (0, 0), 0.110),
}
_SPELLING = (
    ("z", "ih", "r", "o", "u"), ("w", "ah", "n"), ("closure", "t", "u", "u"), ("th", "r", "iy"), ("f", "ao", "r"),
    ("f", "a", "ih", "v"), ("s", "ih", "closure", "k", "s"), ("s", "eh", "v", "uh", "n"),
    ("eh", "iy", "closure", "t"), ("n", "a", "ih", "n"),
)  # fmt: skip


@dataclass(frozen=True)
class Voice:
    """Who speaks.

    Attributes:
        pitch: Hz. tract: factor on the formants; above 1 for a shorter vocal tract.
        speed: factor on the lengths of the sounds. breath: noise beside the voice, as a share of it.
    """

    pitch: float
    tract: float
    speed: float
    breath: float

    @classmethod
    def draw(cls, random: Generator) -> Voice:
        """A voice at random: 90 to 240 Hz, tracts from 0.9 to 1.18."""
        high = random.random()
        return cls(
            pitch=90 * (240 / 90) ** high,
            tract=0.9 + 0.2 * high + 0.08 * random.random(),
            speed=random.uniform(0.85, 1.2),
            breath=random.uniform(0.01, 0.06),
        )


@dataclass(frozen=True)
class Clip:
    """A string of spoken digits.

    Attributes:
        digits: what is said. waveform: [sample] float32 within ±1, at `RATE` samples per second.
        spans: first and last second of every digit, as it was put there.
    """

    digits: tuple[int, ...]
    waveform: np.ndarray
    spans: tuple[tuple[float, float], ...]

    @property
    def text(self) -> str:
        """The words, with spaces between."""
        return " ".join(WORDS[digit] for digit in self.digits)

    def __repr__(self) -> str:
        return f"Clip({self.text!r}, {len(self.waveform) / RATE:.1f} s)"


def word(digit: int, voice: Voice, random: Generator) -> np.ndarray:
    """One digit as this voice says it this time: [sample] float32, its loudest sample 1.

    Raises:
        TaskError: not a digit.

    >>> word(3, Voice(120, 1, 1, 0.02), np.random.default_rng(0)).dtype
    dtype('float32')
    """
    if digit not in range(10):
        raise TaskError(f"{digit!r} is not a digit")
    sounds = [_SOUNDS[name] for name in _SPELLING[digit]]
    lengths = np.array([s.seconds for s in sounds]) * voice.speed * random.uniform(0.85, 1.15, len(sounds))
    ends = np.cumsum(lengths)
    starts = ends - lengths
    n = int(ends[-1] * RATE)
    spoken = _voiced(sounds, starts, ends, n, voice, random)
    for sound, start, end in zip(sounds, starts, ends, strict=True):
        if sound.noise:
            first, last = int(start * RATE), min(n, int(end * RATE))
            spoken[first:last] += sound.noise * _hiss(last - first, sound.band, random)
    return (spoken / np.abs(spoken).max()).astype(np.float32)


def say(digits: Sequence[int], voice: Voice, random: Generator, *, words: dict[int, np.ndarray] | None = None) -> Clip:
    """A clip of `SECONDS`: the digits with pauses at random places, one loudness, and a little noise behind.

    Args:
        words: the waveform of each digit, if it is not to be made anew.

    Raises:
        TaskError: no digits, or more than `MOST`.

    >>> say([4, 2], Voice.draw(np.random.default_rng(0)), np.random.default_rng(1))
    Clip('four two', 4.0 s)
    """
    if not 1 <= len(digits) <= MOST:
        raise TaskError(f"{len(digits)} digits, 1 to {MOST} fit into a clip")
    made = [word(digit, voice, random) if words is None else words[digit] for digit in digits]
    total = int(SECONDS * RATE)
    free = total - sum(map(len, made))
    shares = random.dirichlet(np.ones(len(made) + 1)) * (0.3 + 0.7 * random.random())
    pauses = (shares * max(0, free)).astype(int)
    clip: np.ndarray = np.zeros(total, np.float32)
    place, spans = 0, []
    for pause, spoken in zip(pauses, made, strict=False):
        place += int(pause)
        end = min(total, place + len(spoken))
        clip[place:end] += spoken[: end - place] * np.float32(random.uniform(0.7, 1.0))
        spans.append((place / RATE, end / RATE))
        place = end
    loudness = random.uniform(0.25, 0.8)
    noise = 10 ** (-random.uniform(25, 45) / 20)
    clip = clip * loudness + noise * loudness * random.standard_normal(total)
    return Clip(tuple(int(d) for d in digits), np.clip(clip, -1, 1).astype(np.float32), tuple(spans))


def clips(n: int, *, seed: int = 0, least: int = 3, most: int = MOST) -> list[Clip]:
    """Clips of `least` to `most` digits, each of a voice of its own, the same for the same seed.

    Raises:
        TaskError: lengths that do not fit.

    >>> clips(2, seed=5)
    [Clip('eight zero eight four five', 4.0 s), Clip('seven seven four', 4.0 s)]
    """
    if not 1 <= least <= most <= MOST:
        raise TaskError(f"{least} to {most} digits, 1 to {MOST} fit into a clip")
    made = []
    for number in range(n):
        random = np.random.default_rng([seed, number])
        digits = random.integers(0, 10, random.integers(least, most + 1))
        made.append(say(digits.tolist(), Voice.draw(random), random))
    return made


def pairs(n: int, *, seed: int = 0, place: int = 1, digits: int = 3) -> list[tuple[Clip, Clip]]:
    """Clips with twins in which another digit is said at one place, by the same voice, at the same times.

    Both words at the place are made as long as the longer one, by silence, so that everything else is equal to the
    sample, the noise included.

    Args:
        place: which digit differs, from 0. digits: how many different ones are said.

    Raises:
        TaskError: a place that is none, or digits that do not fit.

    >>> pairs(1, seed=5)
    [(Clip('four zero eight', 4.0 s), Clip('four six eight', 4.0 s))]
    """
    if not 0 <= place < digits <= MOST:
        raise TaskError(f"place {place} of {digits} digits; there are 1 to {MOST} in a clip")
    made = []
    for number in range(n):
        random = np.random.default_rng([seed, number])
        *said, other = random.choice(10, digits + 1, replace=False).tolist()
        voice = Voice.draw(random)
        words = {digit: word(digit, voice, random) for digit in (*said, other)}
        longest = max(len(words[said[place]]), len(words[other]))
        for digit in (said[place], other):
            words[digit] = np.pad(words[digit], (0, longest - len(words[digit])))
        twin = [*said[:place], other, *said[place + 1 :]]
        clip, counterpart = (
            say(one, voice, np.random.default_rng([seed, number, 1]), words=words) for one in (said, twin)
        )
        made.append((clip, counterpart))
    return made


def _voiced(
    sounds: list[_Sound], starts: np.ndarray, ends: np.ndarray, n: int, voice: Voice, random: Generator
) -> np.ndarray:
    """[sample] float64: harmonics of the pitch, each as loud as the formants let it through."""
    time = np.arange(0, ends[-1] + _STEP, _STEP)
    middles = (starts + ends) / 2
    knots = np.stack([np.minimum(starts + _EDGE, middles), np.maximum(ends - _EDGE, middles)], 1).ravel()
    loud = np.interp(time, knots, np.repeat([s.voice for s in sounds], 2), left=0, right=0)
    wobble = random.normal(1, 0.04, (len(sounds), 3))
    tracks = [
        np.interp(time, middles, [s.formants[i] * w for s, w in zip(sounds, wobble[:, i], strict=True)]) * voice.tract
        for i in range(3)
    ]
    begin, end = random.uniform(1.0, 1.1), random.uniform(0.82, 0.98)
    pitch = voice.pitch * np.interp(time, [0, time[-1]], [begin, end])
    numbers = np.arange(1, int(_VOICE_TOP / pitch.min()) + 1)
    hertz = pitch[:, None] * numbers
    gains = loud[:, None] / numbers * (hertz < _VOICE_TOP)
    for track, width in zip(tracks, _BANDWIDTHS, strict=True):
        middle = track[:, None] ** 2
        gains = gains * middle / np.sqrt((middle - hertz**2) ** 2 + (width * hertz) ** 2)
    sample = np.arange(n) / RATE
    phase = 2 * np.pi * np.cumsum(np.interp(sample, time, pitch)) / RATE
    place = sample / _STEP
    left = np.minimum(place.astype(int), len(time) - 2)
    weight = (place - left)[:, None]
    level = gains[left] * (1 - weight) + gains[left + 1] * weight
    spoken: np.ndarray = (level * np.sin(phase[:, None] * numbers)).sum(1)
    breath = voice.breath * np.interp(sample, time, loud) * random.standard_normal(n)
    return spoken / max(1e-9, np.abs(spoken).max()) + breath


def _hiss(n: int, band: tuple[float, float], random: Generator) -> np.ndarray:
    """[sample] noise of one band, faded in and out."""
    spectrum = np.fft.rfft(random.standard_normal(n))
    hertz = np.fft.rfftfreq(n, 1 / RATE)
    spectrum[(hertz < band[0]) | (hertz > band[1])] = 0
    noise = np.fft.irfft(spectrum, n)
    fade = np.clip(np.minimum(np.arange(n), np.arange(n)[::-1]) / max(1, int(0.25 * n)), 0, 1)
    return noise / max(1e-9, np.abs(noise).max()) * fade
