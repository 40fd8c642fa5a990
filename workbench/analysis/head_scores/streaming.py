"""`streaming_scores`: which heads can do with the first and the last few keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.analysis.head_scores.prompts import HeadNames, one_row, rows_of, self_attention
from workbench.analysis.logits.asked import check_model
from workbench.analysis.statistics.intervals import means_t, without_interval
from workbench.capture.site_capture import SiteCapture
from workbench.errors import CaptureError, expect
from workbench.kernels.patterns import Pattern
from workbench.session.workbench import Workbench
from workbench.storage.result import Result

if TYPE_CHECKING:
    import pandas as pd

_STRIP = 64  # queries at a time


@dataclass(frozen=True, repr=False)
class StreamingScores(Result):
    """What heads lose when they keep the first `sinks` and the last `recent` keys alone.

    Attributes:
        layers, numbers, sites: of each head. lengths: [prompt] tokens.
        sink, near: [head, prompt] mean weight on the first keys, and on the last ones that are none of these.
        error: [head, prompt] ‖z − z'‖ / ‖z‖ over all queries that lose keys, where z' has these keys alone.
    """

    form = "workbench.streaming_scores"
    filled = ("head", "prompt")

    sinks: int
    recent: int
    layers: Annotated[tuple[int, ...], "head"]
    numbers: Annotated[tuple[int, ...], "head"]
    sites: Annotated[tuple[str, ...], "head"]
    lengths: Annotated[tuple[int, ...], "prompt"]
    sink: Float[Tensor, "head prompt"]
    near: Float[Tensor, "head prompt"]
    error: Float[Tensor, "head prompt"]
    provenance: dict[str, Any]

    @property
    def kept(self) -> Tensor:
        """[head, prompt] mean weight on the keys that are kept."""
        return self.sink + self.near

    @property
    def interval(self) -> Tensor:
        """[head, 2] 95 % t intervals of the mean errors over prompts; NaN of one prompt, and where few carry a mean."""
        return means_t(self.error)

    @property
    def table(self) -> pd.DataFrame:
        """One row per head, the smallest error first: means over prompts, and the interval of the error."""
        import pandas as pd

        ends = self.interval
        frame = pd.DataFrame(
            {
                "layer": self.layers, "head": self.numbers, "site": self.sites,
                "sink": self.sink.double().mean(1).numpy(), "near": self.near.double().mean(1).numpy(),
                "kept": self.kept.double().mean(1).numpy(), "error": self.error.double().mean(1).numpy(),
                "low": ends[:, 0].numpy(), "high": ends[:, 1].numpy(),
            }
        )  # fmt: skip
        return frame.sort_values("error", kind="stable").reset_index(drop=True)

    def __repr__(self) -> str:
        ordered = list(self.table.itertuples())
        least, most = (f"L{row.layer}H{row.head} {row.error:.3f}" for row in (ordered[0], ordered[-1]))
        return (
            f"StreamingScores({len(self.layers)} heads, {len(self.lengths)} prompts, {self.sinks} sinks and "
            f"{self.recent} recent keys; error from {least} to {most}"
            f"{without_interval(self.interval, len(self.lengths))})"
        )


def streaming_scores(wb: Workbench, prompts: Any, *, sinks: int = 4, recent: int = 64) -> StreamingScores:
    """How well each head does with attention sinks and recent keys alone, as streaming caches keep them.

    Of every query that sees more than `sinks` + `recent` keys: its weight on the first `sinks` keys and on the last
    `recent` ones, itself included, and the change of the head's output z when its softmax runs over these keys alone:
    the pattern of StreamingLLM (Xiao et al. 2024, arXiv 2309.17453) at positions as they are. DuoAttention (Xiao et al.
    2024, arXiv 2410.10819) calls heads that can do so streaming heads, the others retrieval heads. It finds them by
    training a gate between the two patterns on all outputs at once; here the error of each head is measured, and
    nothing is trained. Only these keys' weights are computed, and rows' denominators: memory grows with the length
    alone.

    Args:
        prompts: a text or several, a Task, ids, or model inputs. On texts with repetitions or a needle far back heads
            show what they need; on others even a retrieval head may need nothing.
        sinks, recent: how many keys, from 0 and from 1.

    Raises:
        CaptureError: a prompt without a query that loses a key, or a map whose rows are no distributions.
    """
    expect(Workbench, wb=wb)
    check_model(wb)
    if sinks < 0 or recent < 1:
        raise CaptureError(f"sinks is from 0 and recent from 1, not {sinks} and {recent}")
    found, lengths, names, heads = [], [], None, None
    with torch.inference_mode(mode=False), torch.no_grad():
        for i, ids in enumerate(rows_of(wb, prompts)):
            if len(ids) <= sinks + recent:
                raise CaptureError(
                    f"prompt {i} has {len(ids)} tokens, so that no query loses one of {sinks} + {recent} keys",
                    hint="pass longer prompts, or fewer sinks= and recent=",
                )
            names = names or self_attention(wb, ids)
            with wb.capture((), names, values=True, z=True, limit=None) as cap:
                wb.model(**one_row(wb, ids))
            found.append(torch.cat([_of_site(site, sinks, recent) for site in cap], 1))
            lengths.append(len(ids))
            heads = heads or HeadNames.of(list(cap))
    if heads is None:
        raise CaptureError("there are no prompts")
    sink, near, error = torch.stack(found, -1).cpu()
    return StreamingScores(
        sinks=sinks, recent=recent, layers=heads.layers, numbers=heads.numbers, sites=heads.sites,
        lengths=tuple(lengths), sink=sink, near=near, error=error, provenance=wb.provenance(),
    )  # fmt: skip


def _of_site(site: SiteCapture, sinks: int, recent: int) -> Tensor:
    """[3, head] weight on sinks, weight near, and error, in float64."""
    pattern, n = site.pattern, site.shape[2]
    if pattern.signed or not (pattern.normalised or pattern.has_scores):
        raise CaptureError("rows of this map are no distributions over keys", site=site.site.name)
    assert site.z is not None
    if pattern.values is None:
        raise CaptureError("the values of this site are not known", site=site.site.name)
    values = pattern.values[0].double().repeat_interleave(pattern.n_heads // pattern.values.shape[1], 0)
    others = _on_no_key(pattern)
    sums = torch.zeros(4, pattern.n_heads, dtype=torch.float64, device=pattern.device)
    for start in range(sinks + recent, n, _STRIP):
        rows = slice(start, min(start + _STRIP, n))
        keys = slice(max(sinks, rows.start - recent + 1), rows.stop)
        first = pattern.tile(rows, slice(0, sinks))[0].double().nan_to_num(0.0)
        last = pattern.tile(rows, keys)[0].double().nan_to_num(0.0)
        far = torch.arange(rows.start, rows.stop)[:, None] - torch.arange(keys.start, keys.stop) >= recent
        last = last.masked_fill(far.to(last.device), 0.0)
        sink, near = first.sum(-1), last.sum(-1)
        made = first @ values[:, :sinks] + last @ values[:, keys]
        left = sink + near + others[:, rows]  # the share of the denominator that stays
        z = site.z[0, rows].transpose(0, 1).double()
        sums[0] += sink.sum(-1)
        sums[1] += near.sum(-1)
        sums[2] += (z - made / left.clamp_min(1e-300)[..., None]).square().sum((-2, -1))
        sums[3] += z.square().sum((-2, -1))
    n_queries = n - sinks - recent
    return torch.stack([sums[0] / n_queries, sums[1] / n_queries, (sums[2] / sums[3]).sqrt()])


def _on_no_key(pattern: Pattern) -> Tensor:
    """[head, query] what sink logits have of a row: 0 without them."""
    if pattern.sinks is None:
        return torch.zeros(pattern.n_heads, pattern.n_queries, dtype=torch.float64, device=pattern.device)
    return (pattern.sinks[:, None].double() - pattern.lse[0].double()).exp()
