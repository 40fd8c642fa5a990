"""Head page: role evidence, importance, what a head reads and writes, its strongest rows and its circuits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.analysis.circuits.circuit import Circuit
from workbench.analysis.circuits.roles import HeadRoles
from workbench.analysis.importance import HeadImportance
from workbench.analysis.logits import LogitAttribution
from workbench.capture.capture import Capture
from workbench.counting import count
from workbench.errors import ReportError, expect, nearest
from workbench.hooks.sites import Site
from workbench.tokens import visible
from workbench.views.base import scales
from workbench.views.base.selection import Selection, SharedSelection, inputs_of
from workbench.views.base.spec import ViewSpec
from workbench.views.base.view import View
from workbench.views.head_atlas.leading import leading
from workbench.views.head_page.gathering import Rows, circuit_facts, heads_of, named_circuits, numbers_of, rows_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PICTURED = 24  # numbers in the still picture


class HeadPage(View):
    """See `head`."""

    @property
    def at(self) -> int:
        """The row of the head that is shown: the first of those chosen."""
        heads = self.spec.facts["heads"]
        for one in (self.chosen, Selection.of(self.spec.selection)):
            for i, each in enumerate(heads):
                if one.heads[:1] == (each["head"],) and one.has(each["layer"], each["head"], each["site"]):
                    return i
        return 0

    def picture(self, figure: Figure) -> None:
        facts, values = self.spec.facts, self.spec.blocks["values"]
        at = self.at
        known = [i for i in range(len(facts["numbers"])) if np.isfinite(values[i, at])][:_PICTURED]
        figure.set_size_inches(7.5, max(1.6, 0.28 * len(known) + 0.9))
        panel = figure.subplots()
        head = facts["heads"][at]
        panel.set_title(" · ".join([head["label"], *head["roles"]]))
        panel.set_xlabel("share of the largest magnitude among all heads")
        for row, i in enumerate(known):
            top = float(np.nanmax(np.abs(values[i][np.isfinite(values[i])]), initial=0)) or 1.0
            panel.barh(row, float(values[i, at]) / top, color=scales.accent() if values[i, at] < 0 else None)
            panel.annotate(f" {float(values[i, at]):.3g}", (max(0.0, float(values[i, at]) / top), row), va="center")
        panel.set_yticks(range(len(known)), [facts["numbers"][i]["name"] for i in known])
        panel.set_xlim(-1 if any(values[i, at] < 0 for i in known) else 0, 1.15)
        panel.invert_yaxis()


def head(
    capture: Capture,
    head: str | None = None,
    *,
    roles: HeadRoles | None = None,
    importance: HeadImportance | None = None,
    circuits: Circuit | Sequence[Circuit] | Mapping[str, Circuit] = (),
    attribution: LogitAttribution | None = None,
    n_rows: int = 8,
    title: str = "Head by head",
    selection: SharedSelection | None = None,
) -> HeadPage:
    """What is known of one head: the page follows the head that is chosen in an atlas, a gallery or a circuit.

    Args:
        capture: of the prompts on which it is looked at: any forwards and batch entries. Gives the statistics,
            and where patterns were kept the rows that stand out.
        head: which to begin with, such as "L5H1"; the chosen one, else the one that stands out most, if None.
        roles: evidence for what heads do. importance: what the model loses without each. circuits: which it is in, with
            what it reads and writes there. attribution: what it writes to a logit.
        n_rows: rows that are listed of each head.

    Raises:
        ReportError: no such head, an empty capture, a circuit of another model.

    >>> import torch, workbench
    >>> model, tokenizer = workbench.models.load("demo-lm")
    >>> with workbench.attach(model, tokenizer) as wb, torch.no_grad(), wb.capture(["induction"]) as cap:
    ...     _ = model(**wb.tokenize(workbench.tasks.induction(1, seed=0)[0].prompt))
    >>> head(cap, "L1H6")
    HeadPage(Head by head)
    """
    expect(Capture, capture=capture)
    if not len(capture.calls) or not len(capture.calls[0].sites):
        raise ReportError("the capture is empty", hint="call the model inside `with wb.capture() as cap:`")
    every, labels = heads_of(capture)
    if head is not None and head not in labels:
        raise ReportError(f"there is no head {head!r}", hint=nearest(head, labels, "head"))
    numbers = numbers_of(capture, every, labels, roles, importance, attribution)
    rows = rows_of(capture, every, n_rows)
    named = {} if roles is None else dict(zip(roles.heads, roles.roles, strict=True))
    several = len({site.layer for site, _ in every}) < len({site.name for site, _ in every})
    first = labels.index(head) if head is not None else _leading(capture, every, rows)
    site, number = every[first]
    texts = [] if rows is None else rows.texts
    n_prompts = sum(call[0].shape[0] for call in capture.calls)
    spec = ViewSpec(
        kind="head_page",
        title=title,
        caption=f"Each of {count(len(labels), 'head')}, over {count(n_prompts, 'prompt')}.",
        facts={
            "heads": [
                {
                    "label": visible(name),
                    "layer": int(site.layer),
                    "head": int(number),
                    "site": visible(site.name) if several else None,
                    "roles": [visible(role) for role in named.get(name, ())],
                }
                for name, (site, number) in zip(labels, every, strict=True)
            ],
            "numbers": [
                {"group": each.group, "name": visible(each.name), "interval": each.low is not None} for each in numbers
            ],
            "prompts": [None if row is None else [visible(token) for token in row] for row in texts],
            "rows": rows is not None,
            "circuits": [circuit_facts(visible(n), c, labels) for n, c in named_circuits(circuits).items()],
        },
        blocks={
            "values": _stacked([each.values for each in numbers], len(labels)),
            "low": _stacked([each.low for each in numbers], len(labels)),
            "high": _stacked([each.high for each in numbers], len(labels)),
            **_row_blocks(rows, len(labels)),
        },
        table={
            "head": [visible(name) for name in labels],
            **({"roles": [", ".join(named.get(name, ())) for name in labels]} if roles is not None else {}),
            **{f"{each.group}: {visible(each.name)}": each.values for each in numbers},
        },
        notes=()
        if rows is not None
        else ("No pattern was kept, so there are no rows: capture with queries_keys=True.",),
        selection={
            "layer": int(site.layer), "heads": [int(number)], "site": visible(site.name) if several else None,
        },
        provenance=dict(capture.provenance),
        inputs=inputs_of(texts[0]) if len(texts) == 1 and texts[0] is not None else None,
    )  # fmt: skip
    made = HeadPage(spec, selection)
    if head is not None:
        made.select(layer=int(site.layer), heads=(int(number),), site=visible(site.name) if several else None)
    return made


def _leading(capture: Capture, heads: Sequence[tuple[Site, int]], rows: Rows | None) -> int:
    """The head that leads by the capture's statistics, else the one whose strongest rows are strongest."""
    found = leading(capture, heads)
    if found is not None:
        return [(site.name, head) for site, head in heads].index((found.head[0].name, found.head[1]))
    if rows is None or not heads or not np.isfinite(rows.weight).any():
        return 0
    return int(np.nan_to_num(rows.weight).mean(1).argmax())


def _stacked(columns: Sequence[Any], n: int) -> Any:
    filled = [np.full(n, np.nan) if column is None else np.asarray(column, np.float64) for column in columns]
    return np.stack(filled) if filled else np.zeros((0, n))


def _row_blocks(rows: Rows | None, n: int) -> dict[str, Any]:
    if rows is None:
        return {
            **{name: np.zeros((n, 0), np.int32) for name in ("prompt", "query", "key")},
            "weight": np.zeros((n, 0), np.float32),
        }
    return {name: getattr(rows, name) for name in ("prompt", "query", "key", "weight")}
