"""The numbers of a capture as a tidy frame."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from workbench.capture.padding import without_padding
from workbench.capture.site_capture import Forward
from workbench.errors import CaptureError
from workbench.hooks.sites import Site
from workbench.kernels.statistics import STATISTICS, VALUE_WEIGHTED

if TYPE_CHECKING:
    import pandas as pd


def tidy(forwards: Sequence[Forward], sites: Iterable[Site], statistic: str, per: str) -> pd.DataFrame:
    """A tidy frame of one statistic of the sites that fired in forwards; see `Capture.table`.

    Raises:
        CaptureError: no site has the statistic, `per` is neither "head" nor "position", or it has more axes.
    """
    import pandas as pd

    if per not in ("head", "position"):
        raise CaptureError(f'per is "head" or "position", not {per!r}')
    frames = []
    windowed = any(site.windowed for site in sites)
    known = statistic.removeprefix(VALUE_WEIGHTED) in STATISTICS
    somewhere = any(statistic in c.statistics for forward in forwards for c in forward.sites.values())
    for forward in forwards:
        for c in forward.sites.values():
            if statistic not in c.statistics and known and (somewhere or not c.site.has(statistic)):
                continue  # cross-attention has none that compare positions; gates alone always have a factor
            values = (without_padding(c, statistic) if per == "head" else getattr(c, statistic)).double()
            if values.dim() == 2 and per == "head":
                values = values[..., None]
            if values.dim() != 3:
                raise CaptureError(f'"{statistic}" has no tidy table', shape=values.shape, hint="use the tensor")
            counts = (~values.isnan()).sum(-1)
            values = values.nanmean(-1, keepdim=True) if per == "head" else values
            b, h, n = (x.flatten().tolist() for x in torch.meshgrid(*map(torch.arange, values.shape), indexing="ij"))
            where = {"site": c.site.path, "call": c.site.call, "layer": c.site.layer, "kind": c.site.kind}
            of_window = {"window": [i % c.site.windows if c.site.windowed else 0 for i in b]} if windowed else {}
            measured = {"head": h, "position": n, statistic: values.flatten().tolist()}
            frame = pd.DataFrame({"forward": forward.index, **where, "batch": b, **of_window, **measured})
            if per == "head":
                frame = frame.drop(columns="position").assign(n=counts.flatten().tolist())
            frames.append(frame if c.site.here is None else frame[frame["head"].isin(c.site.here)])
    if not frames:
        held = dict.fromkeys(name for forward in forwards for c in forward.sites.values() for name in c.statistics)
        raise CaptureError(f'no site has "{statistic}"', hint=f"captured: {', '.join(held)}")
    return pd.concat(frames, ignore_index=True)
