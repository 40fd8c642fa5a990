"""Capacity curves: what one head holds as more pairs are stored, the theory beside it, and the spectrum of its keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from workbench.analysis.conditioning.capacity import Capacity
from workbench.counting import count
from workbench.errors import ReportError
from workbench.tokens import visible
from workbench.views.base.drawing import SERIES
from workbench.views.base.selection import SharedSelection
from workbench.views.base.spec import ViewSpec
from workbench.views.base.view import View

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASURE_LABELS = {
    "cosine": "cosine",
    "relative_error": "relative error",
    "top1": "share identified",
    "snr_db": "SNR, dB",
}
QUERY_LABELS = {"stored": "the stored keys", "noisy": "noisy keys", "own": "the model's own queries"}
_TABLE = ("label", "rule", "query", "n_star", "n_low", "n_high", "censored", "load", "headroom", "excess")
_SHOWN = 60.0  # dB: beyond it recall is exact, or there is none


class CapacityCurves(View):
    """See `capacity_curves`."""

    size = (8.0, 3.4)

    def picture(self, figure: Figure) -> None:
        facts, blocks = self.spec.facts, self.spec.blocks
        chosen = [i for i, h in enumerate(facts["heads"]) if self.chosen.has(h["layer"], h["head"], h["site"])]
        row = chosen[0] if chosen else facts["first"]
        names = [self.state.get("measure"), facts["criterion"]["measure"]]
        measure = next(facts["measures"].index(name) for name in names if name in facts["measures"])
        asked = self.state.get("query")
        query = facts["queries"].index(asked) if asked in facts["queries"] else 0
        left, right = figure.subplots(1, 2, width_ratios=[3, 2])
        sizes, level = facts["sizes"], facts["criterion"]["at"]
        decisive = facts["measures"][measure] == facts["criterion"]["measure"]
        told = facts["queries"][query] == facts["stored"] and "hebb" in facts["rules"]
        for r, rule in enumerate(facts["rules"]):
            colour = SERIES[r % len(SERIES)]
            ys, low, high = (blocks[name][measure, row, r, query] for name in ("curves", "low", "high"))
            n, *_, censored = blocks["knees"][row, r, query]
            left.plot(sizes, ys, color=colour, label=f"{rule}, n* {'≥ ' if censored else ''}{n:.3g}")
            left.fill_between(sizes, low, high, color=colour, alpha=0.2, linewidth=0)
            if n > 0 and not censored and decisive:
                left.plot([n], [level], "o", color=colour)
        muted = left.xaxis.label.get_color()
        if facts["measures"][measure] == facts["snr"]:
            for t, theory in enumerate(facts["theories"][: 2 if told else 0]):
                style = "--" if t == 0 else ":"
                left.plot(sizes, blocks["theory"][row, t], style, color=muted, label=f"theory for Hebb, {theory}")
            known = blocks["curves"][measure, row, :, query]
            known = np.concatenate([known[np.abs(known) <= _SHOWN].ravel(), [level]])
            left.set_ylim(float(known.min()) - 2, float(known.max()) + 4)
        if decisive:
            left.axhline(level, color=muted, linewidth=0.8, linestyle="--")
        left.axvline(blocks["about"][row, 1], color=muted, linewidth=0.8, label=f"load {blocks['about'][row, 1]:.3g}")
        left.set_xscale("log", base=2)
        left.xaxis.set_major_formatter("{x:g}")
        title = f"{facts['heads'][row]['label']}, asked with {facts['queries'][query]}"
        left.set(title=title, xlabel="stored pairs n", ylabel=facts["measures"][measure])
        left.legend(fontsize=8)
        width = int(blocks["about"][row, 0])
        shares = blocks["spectrum"][row, :width]
        right.plot(range(1, width + 1), np.where(shares > 0, shares, np.nan), marker=".", label="this head's keys")
        right.axhline(1 / width, color=muted, linestyle="--", label="random keys")
        right.set(title="Spectrum of the keys", xlabel="direction", ylabel="share of power", yscale="log")
        right.xaxis.get_major_locator().set_params(integer=True)
        right.yaxis.set_major_formatter("{x:g}")
        right.yaxis.set_minor_formatter("")
        right.set_ylim(bottom=max(1e-3 / width, float(np.nanmin(shares[shares > 0], initial=1 / width)) / 2), top=1.5)
        right.legend(fontsize=8)


def capacity_curves(
    capacity: Capacity,
    *,
    layer: int | str | None = None,
    head: int | None = None,
    title: str = "Capacity curves",
    selection: SharedSelection | None = None,
) -> CapacityCurves:
    """Retrieval against the number of stored pairs, per rule and for the head's own softmax, with 95 % intervals.

    Shown is one head at a time: the one that is selected here or in any other view. For the SNR of stored keys the
    theory's curves for Hebb's rule stand beside it, once for d_k and once for the keys' effective dimension. Below is
    the spectrum of the keys' second moment: 1/d_k in each direction if they were random.

    Args:
        capacity: what `workbench.capacity` found.
        layer, head: to begin with, as in `Capacity.row`; the head of median n* if None.

    Raises:
        ReportError: there is no head. CaptureError: no such head.
    """
    if not capacity.heads:
        raise ReportError("the result has no heads to show")
    if layer is None or head is None:
        order = capacity.n_star[:, 0, 0].argsort(stable=True)
        first = int(order[len(order) // 2])
    else:
        first = capacity.row(layer, head)
    measure, threshold = capacity.criterion
    labels = [visible(label) for label in capacity.labels]
    queries = [QUERY_LABELS[query] for query in capacity.queries]
    knees = np.stack(
        [part.numpy().astype(np.float32) for part in (capacity.n_star, capacity.n_low, capacity.n_high)]
        + [capacity.censored.numpy().astype(np.float32)],
        axis=-1,
    )
    about = np.stack([capacity.d_k.numpy(), capacity.effective_keys.numpy(), capacity.excess.numpy()], axis=-1)
    table = capacity.table
    spec = ViewSpec(
        kind="capacity_curves",
        title=title,
        caption=(
            f"{count(len(labels), 'head')}, n up to {capacity.sizes[-1]:,} pairs; bands are 95 % intervals over "
            f"draws of pairs. n*: where {MEASURE_LABELS[measure]} falls past {threshold:g}."
        ),
        facts={
            "heads": [
                {"label": label, "layer": int(la), "head": int(h), "site": visible(site)}
                for label, la, h, site in zip(labels, capacity.layers, capacity.heads, capacity.sites, strict=True)
            ],
            "first": first,
            "sizes": [int(n) for n in capacity.sizes],
            "rules": list(capacity.rules),
            "queries": queries,
            "measures": [MEASURE_LABELS[name] for name in capacity.measures],
            "theories": ["d_k", *(f"effective dimension, {name}" for name in capacity.theories[1:])],
            "dimensions": list(capacity.dimensions),
            "snr": MEASURE_LABELS["snr_db"],
            "stored": QUERY_LABELS["stored"],
            "criterion": {"measure": MEASURE_LABELS[measure], "at": float(threshold)},
        },
        blocks={
            **{
                name: np.ascontiguousarray(getattr(capacity, name).numpy(), dtype=np.float32)
                for name in ("curves", "low", "high", "spectrum", "dimension")
            },
            "knees": knees,
            "theory": np.ascontiguousarray(capacity.theory_snr_db.numpy(), dtype=np.float32),
            "about": np.ascontiguousarray(about, dtype=np.float32),
        },
        table={
            name: table[name].to_numpy() if name not in ("site", "label", "rule", "query", "censored") else
            [visible(str(value)) for value in table[name]]
            for name in _TABLE
        },
        notes=capacity.limits,
        provenance=capacity.provenance,
    )  # fmt: skip
    return CapacityCurves(spec, selection)
