"""What linear and recurrent layers of a capture keep: how fast heads forget, and their states as they fill."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from workbench.capture.capture import Capture
from workbench.capture.site_capture import SiteCapture
from workbench.counting import count
from workbench.errors import CaptureError, ReportError, WorkbenchError, expect
from workbench.hooks.sites import Site
from workbench.kernels.recurrent import RecurrentPattern
from workbench.views.base.selection import SharedSelection
from workbench.views.head_atlas import HeadAtlas, head_atlas
from workbench.views.head_gallery import Axes, HeadGallery, head_gallery

_TIMES = 88  # positions of which a state is shown
_FASTEST, _SLOWEST = 0.1, 0.9


def recurrences(capture: Capture) -> Iterator[tuple[SiteCapture, RecurrentPattern]]:
    """The sites of a forward whose maps are those of recurrences, with these; those whose patterns were kept."""
    for one in capture:
        try:
            found = one.pattern.as_recurrence()
        except WorkbenchError:
            continue
        if isinstance(found, RecurrentPattern):
            yield one, found


def half_lives(capture: Capture, *, selection: SharedSelection | None = None) -> HeadAtlas:
    """How many positions it takes until decay has halved what a head of a recurrence holds: every such head at once.

    Of the mean of log-decays over positions and examples; where the channels of a state decay by themselves, the
    middle one, and the tenths that forget first and last. What a delta rule erases is not counted. Powers of two, since
    heads differ by powers; what never fades is grey.

    Raises:
        ReportError: no site has a decay. CaptureError: several forwards (choose one of `cap.calls`).
    """
    expect(Capture, capture=capture)
    rows: list[tuple[Site, int, float, float, float]] = []
    several = False
    for one, found in recurrences(capture):
        if found.log_decay is None:
            continue
        lives = 1 / (1 / found.half_life.double()).mean(0)  # [head, channel or 1]
        several |= lives.shape[1] > 1
        ends = [lives.quantile(share, dim=-1, interpolation="nearest") for share in (_FASTEST, 0.5, _SLOWEST)]
        fast, middle, slow = (end.tolist() for end in ends)
        rows += [(one.site, head, fast[head], middle[head], slow[head]) for head in range(len(lives))]
    if not rows:
        raise ReportError(
            "no site has a decay", hint="capture a model with linear or recurrent layers, with queries_keys=True"
        )
    names = ("fastest tenth of channels", "half-life", "slowest tenth of channels")
    shown = (1, 0, 2) if several else (1,)
    scores = {"log₂ half-life" if k == 1 else f"log₂, {names[k]}": _frame(rows, k, log=True) for k in shown}
    scores["half-life"] = _frame(rows, 1, log=False)
    return head_atlas(
        scores, title="Half-lives", unit="positions", kind="state",
        caption=f"In how many positions decay halves what each of {count(len(rows), 'head')} holds, on average over "
        "the input; of a logarithm below 0 in less than one.",
        provenance=capture.provenance, selection=selection,
    )  # fmt: skip


def _frame(rows: Sequence[tuple[Site, int, float, float, float]], k: int, *, log: bool) -> pd.DataFrame:
    values = np.array([row[2 + k] for row in rows])
    values = np.where(np.isfinite(values), values, np.nan)
    return pd.DataFrame({
        "layer": [site.layer for site, *_ in rows], "site": [site.name for site, *_ in rows],
        "head": [head for _, head, *_ in rows], "value": np.log2(values) if log else values,
    })  # fmt: skip


def states(
    capture: Capture, site: str | int | Site, *, heads: Sequence[int] | None = None, batch: int = 0,
    selection: SharedSelection | None = None,
) -> HeadGallery:  # fmt: skip
    """The state of each head of a recurrence as it fills: the size of each of its rows down, positions across.

    A row is what one channel of the keys has written; its size is the length of that part of the state h [d, width].

    Args:
        site: of a capture with values=True. heads: which; all if None. batch: which example.

    Raises:
        CaptureError: the site is no recurrence, or values were not kept.
    """
    expect(Capture, capture=capture)
    one = capture[site]
    found = one.pattern.as_recurrence()
    if not isinstance(found, RecurrentPattern):
        raise CaptureError(
            f"a {type(one.pattern).__name__} has no state of a fixed size", site=one.site.name,
            hint="views.states is of linear and recurrent layers",
        )  # fmt: skip
    if one.before is not None:
        raise CaptureError(
            "the recurrence goes on from a state of before the capture, which is not known whole", site=one.site.name,
            hint="begin the capture before the prompt is run",
        )  # fmt: skip
    if not 0 <= batch < one.shape[0]:
        raise ReportError(f"there are examples 0 to {one.shape[0] - 1}, no example {batch}")
    which = list(range(one.shape[1])) if heads is None else list(heads)
    bad = [head for head in which if not 0 <= head < one.shape[1]]
    if bad or not which:
        raise ReportError(f"there are {one.shape[1]} heads, no head {bad[0] if bad else '(none given)'}")
    every = -(-found.n_keys // _TIMES)
    sizes = found.states(every=every)[batch, which].norm(dim=-1)  # [head, time, d]
    tokens = capture.key_tokens(one.site.name)
    places = range(every - 1, found.n_keys, every)
    texts = [str(i) if tokens is None else f"{i} {tokens[batch][i]}" for i in places]
    rows = found.q.shape[-1]
    numbers: dict[str, Any] = {"size at the end": sizes[:, -1].norm(dim=-1)}
    if found.log_decay is not None:
        lives = found.half_life[batch, which].double().quantile(0.5, dim=-1, interpolation="nearest")
        numbers["half-life"] = torch.where(lives.isfinite(), lives, torch.nan)
    moments = f"every {every} positions" if every > 1 else "at every position"
    return head_gallery(
        sizes.transpose(1, 2).float().cpu().numpy(),
        [(one.site.layer, head) for head in which],
        axes=Axes("channel", "position", value="size", column_texts=texts),
        sites=[one.site.name] * len(which),
        numbers={name: value.cpu().numpy() for name, value in numbers.items()},
        title="States",
        caption=f"What {count(len(which), 'head')} of {one.site.name} hold, {moments}: the size of each of {rows:,} "
        "rows of the state.",
        provenance=capture.provenance,
        selection=selection,
    )
