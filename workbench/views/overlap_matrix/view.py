"""Matrix of overlaps: each of several circuits against each other, and the chosen pair as a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.analysis.circuits.circuit import Circuit
from workbench.analysis.circuits.overlap import circuit_overlap
from workbench.analysis.circuits.overlap_result import CircuitOverlap
from workbench.errors import ReportError
from workbench.tokens import visible
from workbench.views.base import scales
from workbench.views.base.selection import SharedSelection
from workbench.views.base.spec import ViewSpec
from workbench.views.circuit_graph import pins_of
from workbench.views.circuit_graph.overlap import MOST_EDGES, OverlapGraph, compared, unlike
from workbench.views.circuit_graph.picture import WIDTH, height_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST = 24  # circuits
_MEASURES = {
    "jaccard": ("Jaccard", "items in both of those in either"),
    "weighted": ("weighted", "smaller of larger shares of |score|, over all that is scored"),
    "share": ("share of the row's", "of the items of the row, those that the column has too"),
    "chance": ("Jaccard by chance", "mean with one circuit's heads renamed at random"),
}


class OverlapMatrix(OverlapGraph):
    """See `overlap_matrix`."""

    def _put_state(self, state: Mapping[str, Any]) -> None:
        n, pair = len(self.spec.facts["circuits"]), state.get("pair", (0, 1))
        if not all(isinstance(i, int) and 0 <= i < n for i in pair) or len(set(pair)) != 2:
            raise ReportError(f"there is no pair {pair} of {n} circuits")
        if state.get("measure", "jaccard") not in _MEASURES:
            raise ReportError(f"there is no measure {state['measure']!r}", hint=f"one of {', '.join(_MEASURES)}")
        super()._put_state(state)

    def picture(self, figure: Figure) -> None:
        import matplotlib as mpl

        facts, values = self.spec.facts, self.spec.blocks["measures"]
        names = facts["circuits"]
        which = [each["name"] for each in facts["measures"]].index(self.spec.state.get("measure", "jaccard"))
        tall = height_of(facts["rows"])
        top = 0.7 + 0.28 * len(names)
        figure.set_size_inches(WIDTH, tall + top)
        upper, lower = figure.subplots(2, 1, height_ratios=[top, tall])
        upper.imshow(values[which], vmin=0, vmax=1, aspect="auto")
        for (i, j), value in np.ndenumerate(values[which]):
            ink = scales.ink_on(mpl.colors.to_hex(scales.sequential()(float(np.nan_to_num(value)))))
            if np.isfinite(value):
                upper.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink)
        upper.set_facecolor(scales.unseen_colour())
        upper.set_xticks(range(len(names)), names)
        upper.set_yticks(range(len(names)), names)
        upper.set_title(facts["measures"][which]["label"])
        self._draw_pair(lower)


def overlap_matrix(
    circuits: Mapping[str, Circuit] | Sequence[Circuit],
    *,
    unit: str | None = None,
    names: Mapping[Any, str] | None = None,
    n_null: int = 2000,
    seed: int = 0,
    most: int = MOST_EDGES,
    selection: SharedSelection | None = None,
) -> OverlapMatrix:
    """How much each of several circuits overlaps with each other one; a click shows what a pair shares.

    Args:
        circuits: at least two of one model, by name; in a list they are called by their tasks.
        unit: "edges", "heads" or "nodes", as in `circuit_overlap`; edges if all are circuits of edges.
        names: of nodes to pin, as in `circuit_graph`.
        n_null, seed: of renamings of heads, per pair.
        most: edges that the page holds.

    Raises:
        ReportError: fewer than two circuits, or more than 24.
        InterventionError: circuits of two models, or an empty one.
    """
    labels = [*circuits] if isinstance(circuits, Mapping) else [circuit.task or "circuit" for circuit in circuits]
    several = [*circuits.values()] if isinstance(circuits, Mapping) else [*circuits]
    if not 2 <= len(several) <= _MOST:
        raise ReportError(f"a matrix is of 2 to {_MOST} circuits, not of {len(several)}")
    unit = unit or ("edges" if all(circuit.level == "edge" for circuit in several) else "heads")
    labels = unlike([visible(label) for label in labels])
    pairs = {
        (i, j): circuit_overlap(several[i], several[j], unit=unit, n_null=n_null, n_bootstrap=0, seed=seed)
        for i, j in combinations(range(len(several)), 2)
    }
    items: list[set[str]] = [set() for _ in several]
    for (i, j), found in pairs.items():
        items[i] |= {*found.shared, *found.only_a}
        items[j] |= {*found.shared, *found.only_b}
    facts, blocks, notes = compared(several[0].graph, labels, items, several, unit, most)
    facts["measures"] = [{"name": name, "label": label, "about": about} for name, (label, about) in _MEASURES.items()]
    blocks["measures"] = _measures(pairs, len(several))
    spec = ViewSpec(
        kind="overlap_matrix",
        title=f"Overlap of {len(several)} circuits",
        caption=f"Each against each other, by {unit}; choose a cell, and the graph shows what the two share.",
        facts=facts,
        blocks=blocks,
        table=_table(labels, pairs),
        notes=(
            *notes,
            f"p: share of {n_null:,} renamings of one circuit's heads within layers that overlap at least as much.",
            "Overlap alone does not say that shared parts do the same.",
        ),
        state={"pins": pins_of(several[0].graph, names or {})},
        provenance={label: circuit.provenance for label, circuit in zip(labels, several, strict=True)},
    )
    return OverlapMatrix(spec, selection, several[0].graph)


def _measures(pairs: Mapping[tuple[int, int], CircuitOverlap], n: int) -> Any:
    """[measure, row, column]."""
    found = np.full((len(_MEASURES), n, n), np.nan)
    for k, name in enumerate(_MEASURES):
        if name != "chance":
            np.fill_diagonal(found[k], 1.0)
        for (i, j), pair in pairs.items():
            there, back = {
                "share": (pair.values["of_a"], pair.values["of_b"]),
                "chance": (pair.expected, pair.expected),
            }.get(name) or (pair.values[name], pair.values[name])
            found[k, i, j], found[k, j, i] = there, back
    return found


def _table(labels: Sequence[str], pairs: Mapping[tuple[int, int], CircuitOverlap]) -> dict[str, Any]:
    several = list(pairs.values())
    return {
        "a": [labels[i] for i, _ in pairs],
        "b": [labels[j] for _, j in pairs],
        "shared": np.array([len(pair.shared) for pair in several], np.int32),
        "only a": np.array([len(pair.only_a) for pair in several], np.int32),
        "only b": np.array([len(pair.only_b) for pair in several], np.int32),
        **{name: np.array([pair.values[name] for pair in several]) for name in several[0].values},
        "chance": np.array([pair.expected for pair in several]),
        "p": np.array([pair.p_value for pair in several]),
    }
