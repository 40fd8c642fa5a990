"""What if: sliders over the capacity theory. Width of keys, load, rule, heads and depth, and what follows from them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from workbench.analysis.conditioning import RULES, theory
from workbench.errors import ReportError, nearest
from workbench.views.base.drawing import SERIES
from workbench.views.base.selection import SharedSelection
from workbench.views.base.spec import ViewSpec
from workbench.views.base.view import View

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MEMORY, _CRITERION, _STACK = "Memory of a head", "What counts as held", "Stack of heads"
_SILENT = "The theory has no formula for the interference under this rule"
_RULES = {
    "hebb": ("Hebb", "Pairs add up: the signal stays, the interference grows with every pair."),
    "decay": (
        "decay",
        "An endless stream of pairs, each fainter than the next. Asked for is the n-th latest; the interference is "
        "always that of the whole stream.",
    ),
    "delta": (
        "delta",
        f"{_SILENT}. After many passes over at most d_k independent keys it recalls all of them exactly.",
    ),
    "gated_delta": ("gated delta", f"{_SILENT}."),
    "oja": ("Oja", f"{_SILENT}."),
    "bcm": ("BCM", f"{_SILENT}."),
    "softmax": ("softmax", f"{_SILENT}: it is not linear. Measure it: workbench.capacity."),
}
_SLIDERS = (
    ("d_k", _MEMORY, "width of the keys, d_k", "", 1, 512, 1),
    ("n", _MEMORY, "load, n", "pairs", 1, 1024, 1),
    ("decay", _MEMORY, "kept at each write, γ", "", 0.5, 0.999, 0.001),
    ("threshold", _CRITERION, "least SNR, as a ratio", "", 0.1, 10, 0.05),
    ("delta", _CRITERION, "noise over signal that fails, δ", "", 0.05, 2, 0.05),
    ("epsilon", _CRITERION, "chance that any item fails, ε", "", 0.01, 0.5, 0.01),
    ("heads", _STACK, "heads per layer, H", "heads", 1, 32, 1),
    ("depth", _STACK, "depth, L", "layers", 1, 64, 1),
    ("needed", _STACK, "heads that a layer needs", "heads", 1, 32, 1),
    ("failure", _STACK, "chance that a head fails, p", "", 0, 1, 0.001),
)
_NUMBERS = (
    ("signal_power", "signal power", "of 1"),
    ("interference_power", "interference power", "of 1"),
    ("snr", "SNR, as a ratio", ""),
    ("snr_db", "SNR", "dB"),
    ("average_capacity", "capacity, average case", "pairs"),
    ("worst_capacity", "capacity, worst case", "pairs"),
    ("retained_signal", "retained amplitude", "of 1"),
    ("memory_span", "memory span", "writes"),
    ("failure_bound", "one item fails, at most", "chance"),
    ("union_bound", "any of n fails, at most", "chance"),
    ("head_failure", "a head fails, taken as", "chance"),
    ("stack_failure", "the stack fails", "chance"),
    ("stack_failure_linear", "the same, linear form", "chance"),
    ("redundant_stack_failure", "with the heads needed", "chance"),
    ("linear_range", "linear form holds far below", "pairs"),
)
_NOTES = (
    "Assumed: keys and values are independent and uniform on unit spheres, the query is one of the stored keys, and "
    "d_v drops out. Keys of real heads are not like that: put their effective dimension in the place of d_k.",
    "One item's chance to fail is Markov's bound, that of any item a union over all: both lie far above what random "
    "keys show. A head is taken to fail as often as the bound allows, and 1 where it is above 1.",
    "Heads and layers fail independently, one head that works carries its layer, and all layers must work. That a "
    "layer needs several heads, and the bound for the n-th latest pair under decay, carry the paper's argument on.",
    "Formulas: arXiv 2508.08289, v1, theorems 6 and 9; workbench.analysis.conditioning.theory has them one by one.",
)


@dataclass(frozen=True)
class Settings:
    """Where the sliders stand; see `what_if`."""

    rule: str = "hebb"
    d_k: int = 64
    n: int = 32
    heads: int = 4
    depth: int = 6
    needed: int = 1
    threshold: float = 1.0
    delta: float = 1.0
    epsilon: float = 0.1
    decay: float = 0.95
    failure: float | None = None


class WhatIf(View):
    """See `what_if`."""

    size = (10.0, 4.0)

    def __init__(self, spec: ViewSpec, selection: SharedSelection | None = None) -> None:
        super().__init__(spec, selection)

    @property
    def settings(self) -> Settings:
        """Where the sliders stand now.

        Raises:
            ReportError: they were set to what no slider can be set to.
        """
        return _checked({**self.spec.facts["start"], **(self.state.get("settings") or {})})

    def numbers(self, **changes: Any) -> dict[str, float | None]:
        """What the sliders' numbers are with these settings changed; None where the theory is silent.

        >>> found = what_if(d_k=64, n=33).numbers(n=17)
        >>> found["interference_power"], found["snr"], found["average_capacity"]
        (0.25, 4.0, 65.0)
        """
        return outlook(_checked(asdict(self.settings) | changes))

    def picture(self, figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        now, found = self.settings, self.numbers()
        if found["snr"] is None:
            left.set_axis_off()
            left.text(0.5, 0.5, f"{_SILENT}.", ha="center", va="center", wrap=True)
        else:
            most = max(16, now.n, int(1.5 * (found["average_capacity"] or 0)))
            xs = range(2, most + 1)
            each = [self.numbers(n=min(n, 1024)) for n in xs]
            for name, label, colour in (
                ("signal_power", "signal", SERIES[0]), ("interference_power", "interference", SERIES[1]),
            ):  # fmt: skip
                left.plot(xs, [max(-60.0, _decibel(one[name] or 0.0)) for one in each], label=label, color=colour)
            left.axvline(now.n, linewidth=1, color=left.xaxis.label.get_color(), label=f"n = {now.n}")
            left.axvline(found["average_capacity"] or 0, linewidth=1, linestyle=":", color=SERIES[1], label="capacity")
            left.set(title="Power of signal and interference", xlabel="pairs n", ylabel="power, dB")
            left.legend(fontsize=8)
        p = found["head_failure"]
        if p is None:
            right.set_axis_off()
            right.text(0.5, 0.5, "No failure rate of a head is known.", ha="center", va="center")
            return
        depths = range(1, max(12, 2 * now.depth) + 1)
        exact = [theory.stack_failure(p, depth, now.heads) for depth in depths]
        needed = [theory.redundant_stack_failure(p, depth, now.heads, now.needed) for depth in depths]
        right.plot(depths, exact, marker=".", color=SERIES[0], label="one head is enough")
        if now.needed > 1:
            right.plot(depths, needed, marker=".", color=SERIES[1], label=f"{now.needed} of {now.heads} heads needed")
        right.axvline(now.depth, linewidth=1, color=right.xaxis.label.get_color(), label=f"L = {now.depth}")
        right.set(title="Chance that a stack fails", xlabel="layers L", ylabel="chance")
        right.set_ylim(bottom=0)
        right.legend(fontsize=8)


def what_if(
    *,
    rule: str = "hebb",
    d_k: int = 64,
    n: int = 32,
    heads: int = 4,
    depth: int = 6,
    needed: int = 1,
    threshold: float = 1.0,
    delta: float = 1.0,
    epsilon: float = 0.1,
    decay: float = 0.95,
    failure: float | None = None,
    title: str = "What if",
    selection: SharedSelection | None = None,
) -> WhatIf:
    """Sliders over the capacity theory; they start here and go on without a kernel, also on an exported page.

    Args:
        rule: a learning rule; the theory speaks of "hebb" and "decay" and says where it is silent.
        d_k: width of the keys, or their effective dimension. n: load: pairs stored, or under decay which of the latest
            is asked for.
        heads, depth: of the stack. needed: heads that a layer cannot do without.
        threshold: least SNR, a ratio. delta, epsilon: of the worst case. decay: kept of the memory at each write.
        failure: chance that a head fails; as much as the bound allows if None.

    Raises:
        ReportError: an unknown rule, or a setting outside its slider's range.

    >>> what_if(d_k=64, n=33).numbers()["snr"]
    2.0
    """
    start = _checked(
        {
            "rule": rule, "d_k": d_k, "n": n, "heads": heads, "depth": depth, "needed": needed, "threshold": threshold,
            "delta": delta, "epsilon": epsilon, "decay": decay, "failure": failure,
        }
    )  # fmt: skip
    found = outlook(start)
    spec = ViewSpec(
        kind="what_if",
        title=title,
        caption=(
            "What the theory of capacity says of one head's memory and of a stack of heads. Move a slider and all "
            "numbers follow; a dash stands where the theory is silent."
        ),
        facts={
            "start": asdict(start),
            "groups": [_MEMORY, _CRITERION, _STACK],
            "rules": [{"name": name, "label": label, "about": about} for name, (label, about) in _RULES.items()],
            "sliders": [
                dict(zip(("name", "group", "label", "unit", "low", "high", "step"), one, strict=True))
                for one in _SLIDERS
            ],
            "numbers": [{"name": name, "label": label, "unit": unit} for name, label, unit in _NUMBERS],
        },
        table={
            "number": [label for _, label, _ in _NUMBERS],
            "at the start": [_said(found[name]) for name, _, _ in _NUMBERS],
            "unit": [unit for *_, unit in _NUMBERS],
        },
        notes=_NOTES,
    )
    return WhatIf(spec, selection)


def outlook(s: Settings) -> dict[str, float | None]:
    """All that the theory says of one setting, by the names of its functions; None where it is silent."""
    hebb, decay = s.rule == "hebb", s.rule == "decay"
    found: dict[str, float | None] = dict.fromkeys(name for name, _, _ in _NUMBERS)
    bound: float | None = None
    if hebb:
        bound = theory.failure_bound(s.n, s.d_k, s.delta)
        found |= {
            "signal_power": 1.0,
            "interference_power": theory.interference_power(s.n, s.d_k),
            "snr": theory.snr(s.n, s.d_k),
            "average_capacity": theory.average_capacity(s.d_k, s.threshold),
            "worst_capacity": theory.worst_capacity(s.d_k, s.delta, s.epsilon),
            "retained_signal": 1.0,
            "union_bound": theory.union_bound(s.n, s.d_k, s.delta),
            "linear_range": theory.linear_range(s.d_k, s.depth, s.heads, s.delta),
        }
    elif decay:
        lag = s.n - 1
        signal, noise = theory.retained_signal(lag, s.decay) ** 2, theory.retention_noise(lag, s.decay, s.d_k)
        span = theory.memory_span(s.decay, s.d_k, s.threshold)
        bound = noise / (s.delta * signal) if signal > 0 else math.inf
        found |= {
            "signal_power": signal,
            "interference_power": noise,
            "snr": theory.retention_snr(lag, s.decay, s.d_k),
            "average_capacity": max(0.0, span + 1),
            "retained_signal": theory.retained_signal(lag, s.decay),
            "memory_span": span,
        }
    snr = found["snr"]
    found |= {"snr_db": None if snr is None else _decibel(snr), "failure_bound": bound}
    p = s.failure if s.failure is not None else None if bound is None else min(1.0, bound)
    if p is not None:
        found |= {
            "head_failure": p,
            "stack_failure": theory.stack_failure(p, s.depth, s.heads),
            "stack_failure_linear": theory.stack_failure_linear(p, s.depth, s.heads),
            "redundant_stack_failure": theory.redundant_stack_failure(p, s.depth, s.heads, s.needed),
        }
    return found


def _decibel(ratio: float) -> float:
    if ratio == math.inf:
        return math.inf
    return 10 * math.log10(ratio) if ratio > 0 else -math.inf


def _said(value: float | None) -> str:
    return "–" if value is None else "∞" if value == math.inf else f"{value:.6g}"


def _checked(values: dict[str, Any]) -> Settings:
    unknown = set(values) - set(Settings.__dataclass_fields__)
    if unknown:
        name = sorted(unknown)[0]
        raise ReportError(f'there is no setting "{name}"', hint=nearest(name, list(Settings.__dataclass_fields__)))
    if values["rule"] not in RULES:
        raise ReportError(
            f'there is no learning rule "{values["rule"]}"', hint=nearest(str(values["rule"]), list(RULES))
        )
    for name, _, label, _, low, high, step in _SLIDERS:
        value = values[name]
        if name == "failure" and value is None:
            continue
        if not low <= value <= high:
            raise ReportError(f"{label}: {value} is outside the slider's range, {low} to {high}")
        whole = isinstance(step, int)
        if whole and value != int(value):
            raise ReportError(f"{label}: {value} is not a whole number")
        values[name] = int(value) if whole else float(value)
    if values["needed"] > values["heads"]:
        raise ReportError(f"a layer of {values['heads']} heads cannot need {values['needed']} of them")
    return Settings(**values)
