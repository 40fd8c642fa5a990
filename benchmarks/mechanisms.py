"""What the rooms of `workbench.mechanisms` cost: time and memory of a forward over plain attention at growing length.

A layer of each room on one example of N tokens, 12 heads of 64, float32, without its four linear projections, which
all have. Plain attention is `scaled_dot_product_attention` in the same layer: causal for rooms that can be, on all
tokens for the others, whose tokens are a grid as nearly square as can be. Time: at each length all rooms take turns, in
turning order. Memory: the peak above what is held, in a process of its own. A room is left out at lengths at which it
would take more than `--gib` or `--seconds`. What claims of cost on the cards need besides is counted, or timed in pairs
of forms.

Writes its section of docs/benchmarks.md, and workbench/mechanisms/weights/cost.json, which cards and the gallery read;
with --rooms or --quick it writes neither. With --again, what is written has new figures of these rooms alone, over
plain attention in the same run.

    python benchmarks/mechanisms.py [--rooms agent sqa:gqa ...] [--again s2 ...] [--lengths 512 1024 ... 8192]
        [--rounds 6] [--quick]
"""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

from costs.arms import HEADS, WIDTH, default_names
from costs.claims import claims
from costs.counted import counted
from costs.measured import CAUSAL, WHOLE, Limits, costs, peaks_of, print_peaks, print_peaks_of_forms, times_of
from shared.measuring import machine, say, table, write_section

from workbench.mechanisms.frame.findings import COSTS

HEADING = "What mechanisms cost"
LENGTHS = (512, 1024, 2048, 4096, 8192)


def measure(names: list[str], lengths: list[int], rounds: int, limits: Limits) -> dict[str, Any]:
    """Everything, as it is kept."""
    peaks, left_out = peaks_of(names, lengths, limits)
    times = times_of(peaks, lengths, rounds)
    data: dict[str, Any] = {
        "facts": {"heads": HEADS, "width": WIDTH, "rounds": rounds, "machine": machine("torch")},
        "rooms": costs(times, peaks),
        "left_out": left_out,
        "counted": counted(max(lengths), rounds),
    }
    return data | {"claims": claims(data)}


def measure_again(names: list[str], lengths: list[int], rounds: int, limits: Limits) -> dict[str, Any]:
    """What is kept, with new figures of these rooms."""
    kept: dict[str, Any] = json.loads(COSTS.read_text(encoding="utf-8"))
    peaks, left_out = peaks_of(names, lengths, limits)
    found = costs(times_of(peaks, lengths, rounds), peaks)
    kept["rooms"] |= {name: each for name, each in found.items() if name in names}
    kept["left_out"] = {name: why for name, why in kept["left_out"].items() if name not in names} | left_out
    again = sorted({*kept.get("again", []), *names})
    return kept | {"again": again, "claims": claims(kept)}


def section(data: dict[str, Any]) -> str:
    """Say it in markdown."""
    rooms, facts = data["rooms"], data["facts"]
    lengths = sorted({point["length"] for each in rooms.values() for point in each["points"]})
    rows = []
    for name, each in rooms.items():
        by_length = {point["length"]: point for point in each["points"]}
        ratios = [f"{by_length[n]['seconds_over_sdpa']:.2f}" if n in by_length else "" for n in lengths]
        last = each["points"][-1]
        ends = "" if each["exponent"] is None else f"{each['exponent_low']:.2f} to {each['exponent_high']:.2f}"
        grows = "" if each["exponent"] is None else f"{each['exponent']:.2f}"
        memory = "" if each["memory_exponent"] is None else f"{each['memory_exponent']:.2f}"
        held = f"{last['mib']:.0f}" if last["length"] == lengths[-1] else ""
        rows.append([name, *ratios, grows, ends, held, memory])
    at = [f"N = {n}" for n in lengths]
    header = ["room", *at, "exponent", "of all rounds", f"MiB at {lengths[-1]}", "of memory"]
    left = "".join(f"{name} is left out {why}. " for name, why in data["left_out"].items())
    again = "".join(
        f"{name} was measured again, in a run of its own or with others. " for name in data.get("again", [])
    )
    said = [
        f"- {room}: {says} {found['outcome'].capitalize()}: {found['found']}."
        for room, of_room in data["claims"].items()
        for says, found in of_room.items()
    ]
    return f"""`python benchmarks/mechanisms.py`: time of a forward of each room over that of plain attention in its
place, so that less is better, and how its own time grows with the length N. One example, {facts["heads"]} heads of
{facts["width"]}, float32, without the linear projections.

{table(header, rows)}

"{CAUSAL}" and "{WHOLE}" are `scaled_dot_product_attention` in the same layer; rooms that can be causal are compared
with the first, others with the second. The exponent is the slope of log time over log length, memory the peak above
what is held. {left}{again}

Claims of cost, as they stand on the cards:

{chr(10).join(said)}

Median of {facts["rounds"]} interleaved rounds in one process; in brackets the least and the largest of all rounds.
{facts["machine"]}
"""


def finite(value: Any) -> Any:
    """The value with None for numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rooms", nargs="+", help="names, a variant behind a colon; by default all rooms")
    parser.add_argument("--again", nargs="+", help="these rooms alone; the rest stays as it was written")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--gib", type=float, default=4.0, help="a room that would take more is left out")
    parser.add_argument("--seconds", type=float, default=8.0, help="likewise, of one call")
    parser.add_argument("--quick", action="store_true", help="128 and 256 tokens: shows that it works")
    parser.add_argument("--only-memory", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--only-forms", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only_forms:
        print_peaks_of_forms(options.only_forms)
        return
    names = options.rooms or default_names()
    lengths = [128, 256] if options.quick else sorted(set(options.lengths))
    limits = Limits(options.gib, options.seconds)
    if options.only_memory:
        print_peaks(names, lengths, limits)
        return
    if options.again:
        data = finite(measure_again(options.again, lengths, options.rounds, limits))
    else:
        data = finite(measure(names, lengths, options.rounds, limits))
    if options.rooms or options.quick:
        say(section(data))
        return
    COSTS.parent.mkdir(exist_ok=True)
    COSTS.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write_section(HEADING, section(data))


if __name__ == "__main__":
    main()
