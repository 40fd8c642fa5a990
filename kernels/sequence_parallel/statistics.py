"""Statistics of softmax attention over a split sequence: rows of the queries here, columns of the keys here.

Keys are gathered, as `split_attention` gathers them; what is added up over queries is summed over the processes. No
part of a map is sent.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.masks import Mask
from workbench.kernels.sequence_parallel.softmax import gathered
from workbench.kernels.sequence_parallel.split import SplitSequence
from workbench.kernels.softmax import SoftmaxPattern
from workbench.kernels.statistics import known

_SUMS = ("received", "received_mean")


def split_statistics(
    q: Tensor,
    k: Tensor,
    names: Sequence[str],
    split: SplitSequence,
    *,
    causal: bool = True,
    scale: float | None = None,
    lse: Tensor | None = None,
    tokens: Tensor | None = None,
    sink_keys: Sequence[int] | None = None,
    n_top: int = 8,
) -> dict[str, Tensor]:
    """Statistics of the map over all positions, for the positions of this process.

    Every process calls it with its own positions and the same names.

    Args:
        q, k, split, causal, scale: as of `split_attention`.
        names: of statistics of rows, "received" and "received_mean".
        lse: what `split_attention` gave; streamed if None.
        tokens: [batch, position] ids of all positions. sink_keys, n_top: as of a pattern's `statistics`.

    Returns:
        By name: of rows [batch, head, query here, …], of columns [batch, head, key here].

    Raises:
        CaptureError: sizes that do not fit, a statistic that is of blocks, a process that ended.
    """
    blocks = [name for name in names if known(name).of_columns and name not in _SUMS]
    if blocks:
        raise CaptureError(
            f"{', '.join(blocks)} of a split sequence would need the blocks of all processes",
            hint=f"statistics of rows, {' and '.join(_SUMS)} are there",
        )
    split.check("q", q)
    split.check("k", k)
    n, mask = sum(split.lengths), Mask(q.shape[2], sum(split.lengths), causal, offset=split.here.start)
    pattern = SoftmaxPattern(q, torch.cat(gathered(k, split), dim=2), mask, scale=scale, lse=lse)
    columns = [name for name in names if name in _SUMS]
    asked = [name for name in names if name not in _SUMS] + (["received"] if columns else [])
    found = pattern.statistics(asked, tokens=tokens, sink_keys=sink_keys, n_top=n_top)
    if columns:
        total = split.summed(found.pop("received"))[:, :, split.here.start : split.here.stop]
        positions = torch.arange(split.here.start, split.here.stop, device=q.device)
        means = total / ((n - positions) if causal else n)
        found |= {name: {"received": total, "received_mean": means}[name] for name in columns}
    return found
