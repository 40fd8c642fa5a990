"""What claims of cost need beside time and memory at growing length: counts that are exact, and pairs of forms."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from shared.measuring import exponent, say, timed
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from costs.arms import HEADS, WIDTH, arm
from costs.measured import peaks_of_forms
from workbench import mechanisms
from workbench.kernels.s2 import S2Layout
from workbench.mechanisms import Place
from workbench.mechanisms.aaren import Aaren
from workbench.mechanisms.s2 import S2Attention

PAIRS = 1024
"""Tokens of the forms that are compared in pairs."""


def counted(longest: int, rounds: int) -> dict[str, Any]:
    """All of it, by mechanism.

    Args:
        longest: tokens of the cache and of the stream. rounds: of what is timed.
    """
    say("counts, and pairs of forms")
    return {
        "sqa": operations(),
        "aaren": stream(longest, rounds),
        "s2": cache(longest),
        "halo": blocks_and_pixels(rounds),
        "rcmha": with_and_without_filters(rounds),
    }


def operations(length: int = 256) -> dict[str, Any]:
    """Of each form of SQA, operations of scores and values: counted as they run, and by the formula 4·heads·n²·d."""
    room, place = mechanisms.get("sqa"), Place(HEADS * WIDTH, HEADS, length)
    found = {}
    for name in room.variants:
        layer, x = room.build(place, name), torch.randn(1, length, HEADS * WIDTH)
        q, k, v = layer.heads(x)
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:  # whose products are seen one by one
            layer.mix(q, k, v, x)
        formula = 4 * layer.n_heads * length**2 * WIDTH
        found[name] = {
            "heads": layer.n_heads, "kv_heads": layer.n_kv_heads, "counted": counter.get_total_flops(),
            "formula": formula, "share": layer.cost_share(),
        }  # fmt: skip
    return found


def stream(longest: int, rounds: int) -> dict[str, Any]:
    """Of Aaren token by token: numbers of the state and seconds of an update after more and more tokens, parameters."""
    place = Place(HEADS * WIDTH, HEADS, longest)
    layer = mechanisms.get("aaren").build(place)
    assert isinstance(layer, Aaren)
    plain = mechanisms.get("sqa").build(place, "mha")
    found: dict[int, Any] = {}
    for after in (n for n in (1, 64, 512, 4096, longest) if n <= longest):
        state, many = layer.stream(), torch.randn(2, 1, HEADS, after, WIDTH)
        one = torch.randn(2, 1, HEADS, WIDTH)
        state.update(*many)
        assert state.sums is not None
        seconds = timed({"update": _several(lambda state=state, one=one: state.update(*one))}, rounds)["update"]
        found[after] = {"numbers": sum(t.numel() for t in state.sums), "seconds": seconds}
    return {
        "stream": {str(after): each for after, each in found.items()},
        "exponents": [exponent({n: each["seconds"][turn] for n, each in found.items()}) for turn in range(rounds)],
        "parameters": sum(p.numel() for p in layer.parameters()),
        "plain_parameters": sum(p.numel() for p in plain.parameters()),
    }


def _several(call: Callable[[], object], times: int = 20) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            call()

    return run


def cache(longest: int) -> dict[str, Any]:
    """Of S2, the keys that each head keeps of so many tokens, and the share of the causal blocks that all see."""
    layer = mechanisms.get("s2").build(Place(HEADS * WIDTH, HEADS, longest))
    assert isinstance(layer, S2Attention)
    facts = {name: layer.layout[name] for name in ("block", "local_blocks", "vert_stride")}
    blocks = S2Layout(longest, longest, HEADS, HEADS, **layer.layout).blocks()
    density = float(blocks.sum()) / (HEADS * int(torch.ones_like(blocks[0]).tril().sum()))
    return {"length": longest, "kept": list(layer.kept(longest)), "density": density, **facts}


def blocks_and_pixels(rounds: int) -> dict[str, Any]:
    """Halo attention of 8 × 8 blocks, and of each pixel by itself, both with a halo of 3: seconds and MiB."""
    return _pair("halo", {"blocks": {"block": 8, "halo": 3}, "pixels": {"block": 1, "halo": 3}}, rounds)


def with_and_without_filters(rounds: int) -> dict[str, Any]:
    """Relative attention with its filters and without: seconds and MiB."""
    return _pair("rcmha", {"filters": {}, "none": {"taps": 0}}, rounds)


def _pair(room: str, forms: dict[str, dict[str, Any]], rounds: int) -> dict[str, Any]:
    calls = {name: arm(room, PAIRS, **options) for name, options in forms.items()}
    seconds = timed(calls, rounds)
    peaks = peaks_of_forms(room, PAIRS, forms, rounds)
    first, second = forms
    return {
        "length": PAIRS,
        "seconds": {name: statistics.median(each) for name, each in seconds.items()},
        "mib": {name: statistics.median(each) for name, each in peaks.items()},
        "ratios": [a / b for a, b in zip(seconds[first], seconds[second], strict=True)],
        "mib_ratios": [a / b for a, b in zip(peaks[first], peaks[second], strict=True)],
    }
