"""Time and memory of rooms at growing length."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.measuring import exponent, peak_above, say, timed

from costs.arms import arm, base, place_of, room_of, stands

WHOLE, CAUSAL = "SDPA of all tokens", "causal SDPA"
Measured = dict[str, dict[int, list[float]]]
Peaks = dict[str, dict[int, float]]


def base_of(name: str) -> str:
    """Which plain attention a room is compared with."""
    return CAUSAL if place_of(room_of(name)[0], 16).causal else WHOLE


@dataclass(frozen=True)
class Limits:
    """GiB and seconds of a call above which a room is left out, as far as what it took before lets expect.

    What is expected grows with the square of the length.
    """

    gib: float
    seconds: float


def peaks_of(names: Sequence[str], lengths: Sequence[int], limits: Limits) -> tuple[Peaks, dict[str, str]]:
    """MiB of each room by length, above what it was given, and why some are not measured at some lengths.

    In a process of its own; see `_apart`.
    """
    rooms = ["--only-memory", "--rooms", *names, "--lengths", *map(str, lengths)]
    peaks, left_out = _apart(*rooms, "--gib", str(limits.gib), "--seconds", str(limits.seconds))
    return {name: {int(n): mib for n, mib in each.items()} for name, each in peaks.items()}, left_out


def peaks_of_forms(
    room: str, length: int, forms: Mapping[str, Mapping[str, Any]], rounds: int
) -> dict[str, list[float]]:
    """MiB of each form of a room in every round, in a process of its own.

    Args:
        forms: options of the room, by the name of the form.
    """
    asked = {"room": room, "length": length, "forms": forms, "rounds": rounds}
    found: dict[str, list[float]] = _apart("--only-forms", json.dumps(asked))
    return found


def _apart(*options: str) -> Any:
    """What `mechanisms.py` prints with these options.

    In a process whose allocator gives every block of 64 KiB or more back: elsewhere a call takes what an earlier one
    has left, and its peak shows nothing. Linux only.
    """
    script = Path(__file__).parent.parent / "mechanisms.py"
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    command = [sys.executable, str(script), *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def print_peaks_of_forms(asked: str) -> None:
    """What `peaks_of_forms` reads, from its own process."""
    told = json.loads(asked)
    calls = {name: arm(told["room"], told["length"], **options) for name, options in told["forms"].items()}
    print(json.dumps({name: [mib_of(call) for _ in range(told["rounds"])] for name, call in calls.items()}))


def print_peaks(names: Sequence[str], lengths: Sequence[int], limits: Limits) -> None:
    """What `peaks_of` reads, from its own process."""
    peaks: Peaks = {name: {} for name in (CAUSAL, WHOLE, *names)}
    took: Peaks = {name: {} for name in names}
    left_out: dict[str, str] = {}
    bases = {base_of(name): name for name in names}
    for length in sorted(lengths):
        made = {told: base(name, length) for told, name in bases.items()}
        for told, call in made.items():
            peaks[told][length] = mib_of(call)
        for name in names:
            if name in left_out:
                continue
            if why := stands(name, length):
                left_out[name] = f"from {length} tokens on: {why}"
            elif (expected := _expected(peaks[name], length)) > limits.gib * 1024:
                left_out[name] = f"from {length} tokens on, where it would take up to {expected / 1024:.0f} GiB"
            elif (expected := _expected(took[name], length)) > limits.seconds:
                left_out[name] = f"from {length} tokens on, where it would take up to {expected:.2g} s"
            else:
                call = arm(name, length)
                peaks[name][length] = mib_of(call)
                took[name][length] = timed({name: call}, 1)[name][0]
                say(f"memory, {name}, N = {length}: {peaks[name][length]:.1f} MiB")
    print(json.dumps([peaks, left_out]))


def mib_of(call: Callable[[], object]) -> float:
    """Peak MiB of this process during a call, above what it held before it."""
    call()
    return peak_above(call)[0] / 2**20


def _expected(peaks: Mapping[int, float], length: int) -> float:
    before = max(peaks, default=0)
    return peaks[before] * (length / before) ** 2 if before else 0.0


def times_of(peaks: Peaks, lengths: Sequence[int], rounds: int) -> Measured:
    """Seconds of every round by room and length; at each length all rooms take turns."""
    found: Measured = {name: {} for name in peaks}
    for length in sorted(lengths):
        names = [name for name in peaks if length in peaks[name] and name not in (CAUSAL, WHOLE)]
        bases = {base_of(name): name for name in names}
        arms: dict[str, Callable[[], object]] = {told: base(name, length) for told, name in bases.items()}
        arms |= {name: arm(name, length) for name in names}
        for name, seconds in timed(arms, rounds).items():
            found[name][length] = seconds
            say(f"time, {name}, N = {length}: {statistics.median(seconds) * 1e3:.2f} ms")
    return found


def costs(times: Measured, peaks: Peaks) -> dict[str, Any]:
    """For each room its points by length, and exponents of time and memory: medians, and the ends of all rounds."""
    found: dict[str, Any] = {}
    for name, by_length in times.items():
        if not by_length:
            continue
        plain = times[name if name in (CAUSAL, WHOLE) else base_of(name)]
        points = []
        for length, seconds in by_length.items():
            ratios = [ours / theirs for ours, theirs in zip(seconds, plain[length], strict=True)]
            points.append(
                {
                    "length": length,
                    "seconds": statistics.median(seconds),
                    "seconds_over_sdpa": statistics.median(ratios),
                    "low": min(ratios),
                    "high": max(ratios),
                    "mib": peaks[name][length],
                }
            )
        rounds = range(len(next(iter(by_length.values()))))
        exponents = [exponent({n: seconds[turn] for n, seconds in by_length.items()}) for turn in rounds]
        found[name] = {
            "points": points,
            "exponent": statistics.median(exponents),
            "exponent_low": min(exponents),
            "exponent_high": max(exponents),
            "memory_exponent": exponent({n: max(mib, 1e-3) for n, mib in peaks[name].items()}),
        }
    return found
