"""Attention inside groups of neighbours, which some heads shift by half a group; sinks that all queries see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.checks import LARGEST, check_range
from workbench.kernels.functions import attention_function
from workbench.kernels.grouped.attention import check_sequence
from workbench.kernels.layouts import Layout
from workbench.kernels.masks import Mask
from workbench.kernels.softmax import SoftmaxPattern


@dataclass(frozen=True)
class ShiftedLayout(Layout):
    """Which keys are of a query's group: groups of neighbours that shifted heads begin half a group later.

    Attributes:
        n: positions. group: positions in a group; the last group may be smaller, and so may the first of shifted heads.
        shifted: whether the groups of each part of the heads are shifted; the parts are equal.
        n_sinks: so many first positions are seen by all queries.
        wrap: shifted groups go on from the end at the beginning, as rolling does. In the causal form the first half
            group then sees the last one, which lies in its future: groups are ordered as they are rolled.
        causal: no key after the query is seen.

    Raises:
        CaptureError: a number out of range; positions that groups do not divide, or sinks, where they wrap.

    >>> ShiftedLayout(4, 2, (False, True)).visible(slice(0, 4), slice(0, 4), torch.tensor([1]))[0].int().tolist()
    [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
    """

    n: int
    group: int
    shifted: tuple[bool, ...]
    n_sinks: int = 0
    wrap: bool = False
    causal: bool = True
    block: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "shifted", tuple(self.shifted))
        check_range("n", self.n, 0, LARGEST)
        check_range("group", self.group, 1, None, hint="a group has at least one position")
        check_range("n_sinks", self.n_sinks, 0, LARGEST)
        if not self.shifted or not all(isinstance(each, bool) for each in self.shifted):
            raise CaptureError(f"shifted is True or False for each part of the heads, not {self.shifted}")
        if self.wrap and (self.n % self.group or self.n_sinks):
            raise CaptureError(
                f"groups of {self.group} that wrap take multiples of {self.group} positions and no sinks, "
                f"not {self.n} positions and {self.n_sinks} sinks",
                hint="wrap=False takes all lengths, and does not let the beginning see the end",
            )

    @property
    def n_layouts(self) -> int:  # type: ignore[override]
        return len(self.shifted)

    def facts(self) -> dict[str, Any]:
        """What JSON needs to make the layout again."""
        return asdict(self)

    def _places(self, positions: Tensor, shifted: bool) -> tuple[Tensor, Tensor]:
        """The group of each position, and the order in which causal attention counts it."""
        half = self.group // 2 if shifted else 0
        if not self.wrap:
            return torch.div(positions - half, self.group, rounding_mode="floor"), positions
        rolled = (positions - half) % max(self.n, 1)
        return rolled // self.group, rolled

    def visible(self, queries: slice, keys: slice, layouts: Tensor) -> Tensor:
        """[len(layouts), q, k] bool."""
        i, j = torch.arange(queries.start, queries.stop)[:, None], torch.arange(keys.start, keys.stop)
        kinds = []
        for shifted in (False, True):
            (of_query, at), (of_key, there) = self._places(i, shifted), self._places(j, shifted)
            seen = (of_query == of_key) | (j < self.n_sinks)
            kinds.append(seen & (there <= at) if self.causal else seen)
        which = torch.tensor(self.shifted)[layouts.cpu()].long()
        return torch.stack(kinds)[which]

    def blocks(self) -> Tensor:
        """[layout, query block, key block] bool, but for what the causal rule hides."""
        n_blocks, positions = -(-self.n // self.block), torch.arange(self.n)
        found = []
        for shifted in self.shifted:
            group = self._places(positions, shifted)[0]
            group = group - group.min() if self.n else group
            member = torch.zeros(int(group.max()) + 1 if self.n else 0, n_blocks)
            member[group, positions // self.block] = 1
            seen = member.mT @ member > 0
            seen[:, : -(-min(self.n_sinks, self.n) // self.block)] = True
            found.append(seen)
        return torch.stack(found)


class ShiftedPattern(SoftmaxPattern):
    """The exact softmax weights inside the groups of a layout, zero elsewhere.

    Args:
        q: [batch, head, position, d]; k: [batch, kv head, position, d].
        layout: the groups.
        scale, lse, values: as in `SoftmaxPattern`.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        layout: ShiftedLayout,
        *,
        scale: float | None = None,
        lse: Tensor | None = None,
        values: Tensor | None = None,
    ) -> None:
        check_sequence(q, k)
        _check_sizes(q, layout)
        n, plain = layout.n, layout.causal and not layout.wrap
        super().__init__(
            q, k, Mask(n, n, causal=plain, layout=layout, n_heads=q.shape[1]), scale=scale, lse=lse, values=values
        )
        self.layout = layout

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The facts of the layout and the scale; q, k and what is known of lse and values."""
        _, tensors = super().state()
        return {"scale": self.scale, "layout": self.layout.facts()}, tensors

    @classmethod
    def rebuild(cls, facts: dict[str, Any], tensors: dict[str, Tensor]) -> ShiftedPattern:
        """The pattern from its `state`."""
        held = {name: tensors.get(name) for name in ("lse", "values")}
        return cls(tensors["q"], tensors["k"], ShiftedLayout(**facts["layout"]), scale=facts["scale"], **held)


def _pattern(
    q: Tensor,
    k: Tensor,
    *,
    group: int,
    shifted: Sequence[bool] = (False, True),
    n_sinks: int = 0,
    wrap: bool = False,
    causal: bool = True,
    scale: float | None = None,
) -> ShiftedPattern:
    return ShiftedPattern(q, k, ShiftedLayout(q.shape[2], group, tuple(shifted), n_sinks, wrap, causal), scale=scale)


@attention_function(_pattern)
def shifted_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: int,
    shifted: Sequence[bool] = (False, True),
    n_sinks: int = 0,
    wrap: bool = False,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention inside groups, shifted in some heads (LongLoRA, arXiv 2309.12307), with sinks (2406.05678).

    Args:
        q: [batch, head, position, d]; k: [batch, kv head, position, d]; v: the same with its own width.
        group, shifted, n_sinks, wrap, causal: see `ShiftedLayout`.
        scale: factor on q kᵀ; 1/√d if None.

    Returns:
        [batch, head, position, width].

    Raises:
        CaptureError: tensors that do not fit, heads that the parts do not divide, an option out of range.

    >>> q = k = v = torch.ones(1, 2, 6, 4)
    >>> shifted_attention(q, k, v, group=4).shape
    torch.Size([1, 2, 6, 4])
    """
    check_sequence(q, k, v)
    layout = ShiftedLayout(q.shape[2], group, tuple(shifted), n_sinks, wrap, causal)
    _check_sizes(q, layout)
    repeat = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(repeat, dim=1) for t in (k, v))
    in_part = q.shape[1] // len(layout.shifted)
    of_head = torch.tensor(layout.shifted).repeat_interleave(in_part)
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    parts = []
    for shift in (False, True):
        heads = (of_head == shift).nonzero().flatten().to(q.device)
        if len(heads):
            own_q, own_k, own_v = (t.index_select(1, heads) for t in (q, k, v))
            parts.append((heads, _inside(own_q, own_k, own_v, layout, shift, scale)))
    heads = torch.cat([each for each, _ in parts])
    return torch.cat([z for _, z in parts], dim=1).index_select(1, heads.argsort()) if out.numel() else out


def _inside(q: Tensor, k: Tensor, v: Tensor, layout: ShiftedLayout, shift: bool, scale: float | None) -> Tensor:
    """[batch, head, position, width] of heads whose groups lie alike: each group is a small attention of its own."""
    n, size = layout.n, layout.group
    half = size // 2 if shift else 0
    if layout.wrap:
        q, k, v = (t.roll(-half, dims=2) for t in (q, k, v))
    front = 0 if layout.wrap or not half else size - half
    behind = -(n + front) % size
    grouped = [F.pad(t, (0, 0, front, behind)).flatten(0, 1).unflatten(1, (-1, size)) for t in (q, k, v)]
    place = torch.arange(-front, n + behind, device=q.device).view(-1, size)  # [group, place]
    mask = None
    if front or behind or layout.n_sinks:
        real = (place >= 0) & (place < n)
        mask = real[:, None, :] & (place[:, None, :] <= place[:, :, None] if layout.causal else True)
        mask = mask | ~real[:, :, None]  # what padding sees is thrown away, and must be no NaN
        if layout.n_sinks:
            mask, grouped = _with_sinks(mask, grouped, k, v, place, layout)
    in_groups, keys, values = grouped
    z = F.scaled_dot_product_attention(
        in_groups, keys, values, attn_mask=mask, is_causal=layout.causal and mask is None, scale=scale
    ).flatten(1, 2)[:, front : front + n]
    z = z.unflatten(0, q.shape[:2])
    return z.roll(half, dims=2) if layout.wrap else z


def _with_sinks(
    mask: Tensor, grouped: list[Tensor], k: Tensor, v: Tensor, place: Tensor, layout: ShiftedLayout
) -> tuple[Tensor, list[Tensor]]:
    """The sinks as keys of every group before its own, seen by rows in whose group they are not anyway."""
    n_sinks = min(layout.n_sinks, layout.n)
    sink = torch.arange(n_sinks, device=place.device)
    inside = (place[:, :, None] == sink).any(1)  # [group, sink]
    seen = ~inside[:, None, :].expand(-1, place.shape[1], -1)
    if layout.causal:
        seen = seen & (sink <= place[:, :, None])
    longer = [
        torch.cat((t[:, :, :n_sinks].flatten(0, 1)[:, None].expand(-1, len(place), -1, -1), own), dim=2)
        for t, own in zip((k, v), grouped[1:], strict=True)
    ]
    return torch.cat((seen, mask), dim=2), [grouped[0], *longer]


def _check_sizes(q: Tensor, layout: ShiftedLayout) -> None:
    if q.shape[2] != layout.n:
        raise CaptureError(f"the layout is of {layout.n} positions, not of {q.shape[2]}", shape=q.shape)
    if q.shape[1] % len(layout.shifted):
        raise CaptureError(
            f"{q.shape[1]} heads are no multiple of the {len(layout.shifted)} parts in `shifted`",
            shape=q.shape,
            hint="give one entry for each head",
        )
