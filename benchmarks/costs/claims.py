"""What the figures say of the claims of cost: the words and the outcome of each follow from the numbers alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

SCRIPT = "benchmarks/mechanisms.py"
LINEAR, ROOT = 1.2, 1.6
"""Up to which exponent a cost counts as linear, and as no more than n^1.5."""
SAME = 0.05
"""Shares that differ by less are the same."""

Found = tuple[str, str]
Judge = Callable[[dict[str, Any]], Found]


def claims(data: dict[str, Any]) -> dict[str, dict[str, dict[str, str]]]:
    """How each claim was examined, what was found and how it came out, by mechanism and claim; {} where unmeasured."""
    made: dict[str, dict[str, dict[str, str]]] = {}
    for (room, says), (how, judge) in JUDGES.items():
        try:
            found, outcome = judge(data)
        except (KeyError, IndexError):  # a run of some rooms alone
            continue
        made.setdefault(room, {})[says] = {"how": f"{how}; {SCRIPT}", "found": found, "outcome": outcome}
    return made


def _agent(data: dict[str, Any]) -> Found:
    each = data["rooms"]["agent"]
    last, first = each["points"][-1], each["points"][0]
    words = (
        f"exponent {_range(each['exponent'], each['exponent_low'], each['exponent_high'])} from {first['length']:,} to "
        f"{last['length']:,} patches, {_plain(data, 'SDPA of all tokens')}; {_ratio(first)} of its time at "
        f"{first['length']:,} patches and {_ratio(last)} at {last['length']:,}"
    )
    return words, _below(each["exponent_low"], each["exponent_high"], LINEAR)


def _routing(data: dict[str, Any]) -> Found:
    each = data["rooms"]["routing"]
    low, high = each["exponent_low"], each["exponent_high"]
    words = (
        f"exponent {_range(each['exponent'], low, high)} for √n clusters, {_plain(data, 'causal SDPA')}; "
        f"{_ratio(each['points'][-1])} of its time at {each['points'][-1]['length']:,} tokens"
    )
    return words, _below(low, high, ROOT)


def _halo(data: dict[str, Any]) -> Found:
    pair = data["counted"]["halo"]
    times, peaks = pair["ratios"], pair["mib_ratios"]
    words = (
        f"with a halo of 3 on {pair['length']:,} patches, blocks of 8 × 8 take {_all(times)} of the time and "
        f"{_all(peaks)} of the memory of a window for each patch"
    )
    return words, _below(min(*times, *peaks), max(*times, *peaks), 1.0)


def _aaren(data: dict[str, Any]) -> Found:
    held = data["counted"]["aaren"]
    numbers = {each["numbers"] for each in held["stream"].values()}
    more = held["parameters"] / held["plain_parameters"] - 1
    low, high, longest = min(held["exponents"]), max(held["exponents"]), max(map(int, held["stream"]))
    words = (
        f"a state of {' to '.join(f'{n:,}' for n in sorted(numbers))} numbers after 1 to {longest:,} tokens, time of "
        f"an update growing with exponent {_range(_median(held['exponents']), low, high)}, {more:+.2%} parameters"
    )
    if len(numbers) > 1 or abs(more) > SAME:
        return words, "does not hold"
    return words, _below(low, high, LINEAR - 1)


def _operations(data: dict[str, Any]) -> Found:
    forms, rooms = data["counted"]["sqa"], data["rooms"]
    exact = all(each["counted"] == each["formula"] for each in forms.values())
    whole = forms["mha"]["counted"]
    shares = ", ".join(f"{name} {each['counted'] / whole:.3g}" for name, each in forms.items() if name != "mha")
    timed = [rooms[name]["points"][-1] for name in ("sqa", "sqa:xsqa")]
    words = (
        f"counted shares {shares}, {'exactly' if exact else 'not'} query heads / heads; time of sqa {_ratio(timed[0])} "
        f"and of xsqa {_ratio(timed[1])} at {timed[0]['length']:,} tokens"
    )
    right = exact and all(abs(each["counted"] / whole - each["share"]) < 1e-12 for each in forms.values())
    return words, "holds" if right else "does not hold"


def _prompt(data: dict[str, Any]) -> Found:
    last = {name: data["rooms"][f"sqa:{name}"]["points"][-1] for name in ("gqa", "mqa")}
    words = f"{' and '.join(f'{name} {_ratio(point)}' for name, point in last.items())} of the time of multi-head "
    words += f"attention at {last['gqa']['length']:,} tokens, between the projections"
    if all(point["high"] >= 1 - SAME and point["seconds_over_sdpa"] >= 1 - SAME for point in last.values()):
        return words, "holds"
    return words, "does not hold" if any(point["high"] < 1 - SAME for point in last.values()) else "undecided"


def _cache(data: dict[str, Any]) -> Found:
    held = data["counted"]["s2"]
    shares = [kept / held["length"] for kept in held["kept"]]
    local = held["block"] * held["local_blocks"] / held["length"]
    words = (
        f"{min(shares):.1%} to {max(shares):.1%} of {held['length']:,} tokens, head by head, for v = "
        f"{held['vert_stride']}; {local:.1%} are local"
    )
    expected, edge = 1 / held["vert_stride"], held["block"] / held["length"]
    near = all(expected - edge <= share <= expected + local + edge for share in shares)
    return words, "holds" if near else "does not hold"


def _s2(data: dict[str, Any]) -> Found:
    last = data["rooms"]["s2"]["points"][-1]
    seen = data["counted"]["s2"]["density"]
    words = (
        f"{_ratio(last)} of the time of dense causal attention at {last['length']:,} tokens, of whose blocks it sees "
        f"{seen:.0%}"
    )
    return words, _below(last["low"], last["high"], 0.25)


def _channels(data: dict[str, Any]) -> Found:
    each = data["rooms"]["davit-channels"]
    low, high, last = each["exponent_low"], each["exponent_high"], each["points"][-1]
    words = f"exponent {_range(each['exponent'], low, high)}, {_plain(data, 'SDPA of all tokens')}; {_ratio(last)} of "
    return words + f"its time at {last['length']:,} patches", _below(low, high, LINEAR)


def _strips(data: dict[str, Any]) -> Found:
    each = [data["rooms"][name]["points"] for name in ("s2aformer", "s2aformer:fewer keys")]
    last = min(points[-1]["length"] for points in each)
    ours, theirs = (next(point for point in points if point["length"] == last) for points in each)
    words = (
        f"{_ratio(ours)} of the time of attention over all {ours['length']:,} patches, and fewer keys alone "
        f"{_ratio(theirs)}"
    )
    faster, slower = ours["high"] < theirs["low"], ours["low"] > theirs["high"]
    return words, "holds" if faster else "does not hold" if slower else "undecided"


def _filters(data: dict[str, Any]) -> Found:
    pair = data["counted"]["rcmha"]
    ratios = pair["mib_ratios"]
    words = f"{_all(ratios)} of the memory of the same layer without filters at {pair['length']:,} tokens"
    return words, _below(min(ratios), max(ratios), 1 - SAME)


JUDGES: dict[tuple[str, str], tuple[str, Judge]] = {
    ("agent", "Its cost grows linearly with the number of patches."): ("time of a forward at growing length", _agent),
    ("routing", "Its cost grows no faster than n^1.5."): ("time of a forward at growing length", _routing),
    ("halo", "Blocks with a halo cost less than a window of its own for each pixel."): (
        "time and memory of a forward", _halo),
    ("aaren", "It takes a new token in constant memory and time, with about as many parameters."): (
        "state and time of an update, parameters counted", _aaren),
    ("sqa", "Scores and values cost query heads / heads of what multi-head attention takes."): (
        "operations counted as they run, time of a forward", _operations),
    ("sqa", "Grouped-query and multi-query attention are no faster than multi-head attention over a prompt."): (
        "time of a forward", _prompt),
    ("s2", "A head keeps a share of about 1/v of the cache."): ("keys counted in a cache", _cache),
    ("s2", "At a sparsity of 90 % a long prompt takes a small part of dense attention's time."): (
        "time of a forward", _s2),
    ("davit-channels", "Its cost grows linearly with the number of patches."): (
        "time of a forward at growing length", _channels),
    ("s2aformer", "It is faster than attention with fewer keys alone."): ("time of a forward", _strips),
    ("rcmha", "It takes less memory than relative attention without filters."): ("peak memory of a forward", _filters),
}  # fmt: skip
"""By room and claim, as its card has it: how it was examined, and what judges the figures."""


def _below(low: float, high: float, bound: float) -> str:
    return "holds" if high < bound else "does not hold" if low > bound else "undecided"


def _range(value: float, low: float, high: float) -> str:
    digits = 2 if abs(value) >= 0.095 or not value else 3
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _ratio(point: dict[str, float]) -> str:
    return _range(point["seconds_over_sdpa"], point["low"], point["high"])


def _all(values: Sequence[float]) -> str:
    return _range(_median(values), min(values), max(values))


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _plain(data: dict[str, Any], name: str) -> str:
    each = data["rooms"][name]
    return f"that of softmax attention {_range(each['exponent'], each['exponent_low'], each['exponent_high'])}"
