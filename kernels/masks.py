"""Which keys each query may see, and what is added to its scores.

A `Mask` joins the three ways in which attention calls restrict keys: a causal or windowed rule on positions, a boolean
tensor (True: may see) and an additive tensor. It answers for any tile without building [query, key] for the rules.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from workbench.errors import CaptureError
from workbench.kernels.checks import LARGEST, ask_later, check_range, check_sizes, place_of
from workbench.kernels.layouts import Layout
from workbench.kernels.mask_summary import MaskSummary, summary_of_rules

_WIDEST = 1 << 40  # positions: a window that hides nothing, however large it is


@dataclass(frozen=True)
class Mask:
    """Visibility and score bias of one attention call.

    Attributes:
        n_queries, n_keys: size of the full [query, key] map.
        causal: query i sees key j only if j <= i + offset.
        offset: absolute position of query row 0; n_keys - n_queries when the first keys come from a cache.
        window: query i sees key j only if |i + offset - j| < window; None for no window.
        tensor: [batch or 1, head or 1, query or 1, key]; bool (True: may see) or additive; None for none.
        layout: a block-sparse layout that hides more; None for none.
        n_heads: number of query heads that the layout is for.

    An additive entry below half of the lowest number of its dtype hides its key, as -inf does: models write both.
    """

    n_queries: int
    n_keys: int
    causal: bool = False
    offset: int = 0
    window: int | None = None
    tensor: Tensor | None = None
    layout: Layout | None = None
    n_heads: int = 1

    def __post_init__(self) -> None:
        check_sizes(n_queries=self.n_queries, n_keys=self.n_keys)
        check_range("offset", self.offset, 1 - LARGEST, LARGEST)
        check_range("n_heads", self.n_heads, 1, LARGEST)
        if not isinstance(self.causal, bool):
            raise CaptureError(f"causal is True or False, not {self.causal!r}")
        if self.window is not None:
            check_range("window", self.window, 1, None, hint="1 is the query's own position, None is no window")
            object.__setattr__(self, "window", min(self.window, _WIDEST))
        if self.tensor is None:
            return
        if self.tensor.dim() != 4:
            raise CaptureError("a mask needs four dimensions [batch, head, query, key]", shape=self.tensor.shape)
        queries, keys = self.tensor.shape[-2:]
        if keys not in (1, self.n_keys) or queries not in (1, self.n_queries):
            raise CaptureError(
                f"the mask does not fit a map of {self.n_queries} queries and {self.n_keys} keys",
                shape=self.tensor.shape,
                hint="its last two dimensions must be (queries, keys), or 1 to broadcast",
            )
        if not self.additive and self.tensor.dtype != torch.bool:
            raise CaptureError(f"a mask is boolean or floating point, not {self.tensor.dtype}")

    @property
    def additive(self) -> bool:
        """Whether the tensor is added to the scores rather than switching keys on and off."""
        return self.tensor is not None and self.tensor.is_floating_point()

    def _laid_out(self, at: Any, device: torch.device) -> MaskSummary:
        """Layers make a layout of the same description each."""
        if at not in _of_layouts:
            for old in list(_of_layouts)[:-_RULES]:
                _of_layouts.pop(old, None)
            _of_layouts[at] = self._summarised(device)
        return _of_layouts[at]

    @property
    def may_hide_all(self) -> bool:
        """Whether some query may see no key, as far as the rules tell."""
        if self.tensor is not None or self.layout is not None:
            return True
        outside = self.offset < 0 or self.offset + self.n_queries > self.n_keys
        return (self.causal and self.offset < 0) or (self.window is not None and outside)

    @property
    def farthest(self) -> int:
        """No query and key are farther apart than this."""
        return abs(self.offset) + self.n_queries + self.n_keys

    def check_fits(self, shape: Sequence[int], device: torch.device) -> None:
        """Check that this can be the mask of a [batch, head, query, key] map whose tensors are on a device.

        Raises:
            CaptureError: other sizes, a tensor that does not broadcast to them, or one on another device.
        """
        b, h, n_queries, n_keys = shape
        if (self.n_queries, self.n_keys) != (n_queries, n_keys):
            raise CaptureError(
                f"the mask is for {self.n_queries} queries and {self.n_keys} keys, not for {n_queries} and {n_keys}"
            )
        if self.layout is not None and (self.n_heads != h or h % self.layout.n_layouts):
            raise CaptureError(f"the mask's layout is for {self.n_heads} heads, not for {h}")
        if self.tensor is None:
            return
        if self.tensor.shape[0] not in (1, b) or self.tensor.shape[1] not in (1, h):
            raise CaptureError(
                f"the mask does not fit a map of batch {b} and {h} heads",
                shape=self.tensor.shape,
                hint="its first two dimensions must be (batch, head), or 1 to broadcast",
            )
        if self.tensor.device != device:
            raise CaptureError(
                f"the mask is on {self.tensor.device} and the queries on {device}", hint="move them to one device"
            )

    def without_rows(self, rows: Tensor) -> Mask:
        """The mask that lets these rows, [batch, head, query] bool, see no key."""
        kept = ~rows[..., None]
        if self.tensor is None:
            return replace(self, tensor=kept)
        return replace(self, tensor=self.tensor.where(kept, -torch.inf if self.additive else False))

    def check_numbers(self) -> None:
        """Raise a CaptureError that names a NaN or +inf that would be added to the scores; on a device, later."""
        if not self.additive or self.tensor is None:
            return
        tensor = self.tensor
        if tensor.device.type != "cpu":  # the host would have to wait; NaN and +inf are greatest
            ask_later("the mask", lambda: tensor.amax().clamp(min=0), tensor)
        elif not self._adds_numbers:
            bad = (self.tensor.isnan() | self.tensor.isposinf()).nonzero()[0].tolist()
            raise CaptureError(
                f"the mask holds {self.tensor[tuple(bad)].item()} at {bad}",
                shape=self.tensor.shape,
                hint="−inf hides a key; a row of −inf less −inf is NaN",
            )

    @cached_property
    def _adds_numbers(self) -> bool:
        assert self.tensor is not None
        if self.tensor.numel() == 0:
            return True
        low, high = self.tensor.aminmax()  # both are NaN if one number is
        return bool((high < torch.inf) & ~low.isnan())

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """JSON facts and the tensor (as "mask") from which `rebuild` makes the mask; a layout is not among them."""
        facts = {"n_queries": self.n_queries, "n_keys": self.n_keys, "causal": self.causal, "offset": self.offset,
                 "window": self.window}  # fmt: skip
        return facts, {} if self.tensor is None else {"mask": self.tensor}

    @classmethod
    def rebuild(cls, facts: dict[str, Any], tensors: dict[str, Tensor]) -> Mask:
        """The mask from its `state`."""
        return cls(**facts, tensor=tensors.get("mask"))

    def key_range(self, queries: slice) -> tuple[int, int]:
        """First key and one past the last key that the positional rules let any of these query rows see."""
        first, last = 0, self.n_keys
        if self.causal:
            last = min(last, queries.stop + self.offset)
        if self.window is not None:
            first = max(first, queries.start + self.offset - self.window + 1)
            last = min(last, queries.stop - 1 + self.offset + self.window)
        return max(first, 0), max(last, 0)

    def key_tiles(self, queries: slice, width: int, heads: slice) -> Iterator[slice]:
        """Slices of at most `width` keys, on multiples of it, that together hold all that these queries may see."""
        first, last = self.key_range(queries)
        visited = None if self.layout is None else self._visited(queries, heads)
        for left in range(first // width * width, last, width):
            keys = slice(left, min(left + width, last))
            if visited is None or bool(visited[keys.start // self._block : -(-keys.stop // self._block)].any()):
                yield keys

    @property
    def _block(self) -> int:
        return 1 if self.layout is None else self.layout.block

    @cached_property
    def _blocks(self) -> Tensor:
        assert self.layout is not None
        return self.layout.blocks().cpu()

    def _visited(self, queries: slice, heads: slice) -> Tensor:
        """[key block] bool: whether one of these heads lets one of these queries see something of the block."""
        assert self.layout is not None
        which = self.layout.for_heads(heads, self.n_heads).unique()
        rows = slice(queries.start // self._block, -(-queries.stop // self._block))
        return self._blocks[which][:, rows].any(0).any(0)

    def rule(self, queries: slice, keys: slice, device: torch.device) -> Tensor | None:
        """[query, key] bool of the positional rules for a tile, or None when they hide nothing in it."""
        low, high = queries.start + self.offset, queries.stop - 1 + self.offset  # absolute positions of the rows
        hides_causal = self.causal and keys.stop - 1 > low
        farthest = max(high - keys.start, keys.stop - 1 - low)
        hides_far = self.window is not None and farthest >= self.window
        if not hides_causal and not hides_far:
            return None
        i = torch.arange(low, high + 1, device=device)[:, None]
        j = torch.arange(keys.start, keys.stop, device=device)[None, :]
        seen = i >= j if hides_causal else torch.ones(len(i), j.shape[1], dtype=torch.bool, device=device)
        if hides_far and self.window is not None:
            seen = seen & ((i - j).abs() < self.window)
        return seen

    def cut(self, queries: slice, keys: slice, batch: slice, heads: slice | Tensor) -> Tensor | None:
        """The part [b, h, q, k] of the mask tensor that belongs to a tile; size-1 dimensions stay 1."""
        if self.tensor is None:
            return None
        t = self.tensor
        t = t if t.shape[0] == 1 else t[batch]
        t = t if t.shape[1] == 1 else t[:, heads]
        t = t if t.shape[2] == 1 else t[:, :, queries]
        return t if t.shape[3] == 1 else t[..., keys]

    def visible(self, queries: slice, keys: slice, batch: slice, heads: slice | Tensor) -> Tensor | None:
        """Bool, broadcastable to [b, h, q, k], of the keys that may be seen; None when all of the tile is."""
        part = self.cut(queries, keys, batch, heads)
        if part is not None and self.additive:
            part = part > hidden_below(part.dtype)
        device = torch.device("cpu") if part is None else part.device
        seen = [part, self.rule(queries, keys, device), self.laid_out(queries, keys, heads)]
        found: Tensor | None = None
        for each in seen:
            if each is not None:
                found = each if found is None else found & each.to(found.device)
        return found

    def laid_out(self, queries: slice, keys: slice, heads: slice | Tensor) -> Tensor | None:
        """[head or 1, q, k] bool of the layout for a tile, or None without a layout."""
        if self.layout is None:
            return None
        if self.layout.n_layouts == 1:
            return self.layout.visible(queries, keys, torch.zeros(1, dtype=torch.long, device="cpu"))
        return self.layout.visible(queries, keys, self.layout.for_heads(heads, self.n_heads))

    def head_group(self, n_heads: int, n_kv_heads: int) -> int:
        """How many neighbouring heads share keys and layout, so that they are streamed together."""
        return n_heads // max(n_kv_heads, 1 if self.layout is None else self.layout.n_layouts)

    def summary(self, device: torch.device) -> MaskSummary:
        """Counts per query and per key, on a device; made once for all layers that share a tensor."""
        if device not in self._summaries:
            self._summaries[device] = self._shared(device)
        return self._summaries[device]

    def _shared(self, device: torch.device) -> MaskSummary:
        tensor = self.tensor
        rules = self.n_queries, self.n_keys, self.causal, self.offset, self.window, device
        if tensor is None and self.layout is not None and self.layout.is_described:
            return self._laid_out((self.layout, self.n_heads, *rules), device)
        if tensor is None or self.layout is not None or tensor.is_inference():
            return self._summarised(device)
        lies = place_of(tensor)
        known = _of_tensors.setdefault(tensor if tensor._base is None else tensor._base, {})
        if (rules, lies) not in known:
            for old in list(known)[:-_RULES]:
                known.pop(old, None)
            known[rules, lies] = self._summarised(device)
        return known[rules, lies]

    @cached_property
    def _summaries(self) -> dict[torch.device, MaskSummary]:
        return {}

    def _summarised(self, device: torch.device) -> MaskSummary:
        """From the rules alone where there is no tensor, else in blocks of rows."""
        if self.tensor is None and self.layout is None:
            window = self.n_queries + self.n_keys + abs(self.offset) if self.window is None else self.window
            return summary_of_rules(self.n_queries, self.n_keys, self.causal, self.offset, window, device)
        if self.tensor is None and self.window is None and self.layout is not None and self.layout.exact:
            return self._summary_of_blocks(device)
        b, h = (1, 1) if self.tensor is None else self.tensor.shape[:2]
        if self.layout is not None and self.layout.n_layouts > 1:
            h = self.n_heads
        per_key = torch.zeros(b, h, self.n_keys, dtype=torch.long, device=device)
        per_query = torch.zeros(b, h, self.n_queries, dtype=torch.long, device=device)
        first = torch.zeros(b, h, self.n_queries, dtype=torch.long, device=device)
        cells = 1 << (22 if device.type == "cpu" else 26)  # on a device each block of rows is several launches
        block = max(1, cells // max(1, b * h * self.n_keys))
        alike = self.tensor is not None and self.tensor.shape[2] == 1 and self.layout is None
        if alike and not self.causal and self.window is None:
            block = self.n_queries  # all rows are alike, and `visible` gives one
        for start in range(0, self.n_queries, block):
            rows = slice(start, min(start + block, self.n_queries))
            seen = self.visible(rows, slice(0, self.n_keys), slice(None), slice(None))
            if seen is None:
                raise AssertionError("a mask with a tensor is visible as a tensor")
            seen = seen.to(device).expand(b, h, seen.shape[-2], self.n_keys)
            per_query[..., rows] = seen.sum(-1)
            first[..., rows] = seen.to(torch.uint8).argmax(-1)
            per_key += seen.sum(-2) * ((rows.stop - rows.start) // seen.shape[2])
        return MaskSummary(per_query, per_key, first)

    def _summary_of_blocks(self, device: torch.device) -> MaskSummary:
        """Counts from the blocks of an exact layout: how much of each block its queries, or keys, have in common."""
        size, blocks = self._block, self._blocks
        i = torch.arange(self.n_queries, device="cpu") + self.offset
        j = torch.arange(self.n_keys, device="cpu")
        key_start, row_start = (torch.arange(n, device="cpu") * size for n in (blocks.shape[2], blocks.shape[1]))
        key_stop = (key_start + size).clamp(max=self.n_keys)
        row_stop = (row_start + size).clamp(max=self.n_queries)
        last = i + 1 if self.causal else torch.full_like(i, self.n_keys)
        of_query = (torch.minimum(key_stop, last[:, None]) - key_start).clamp(min=0)  # [query, key block] in common
        first = j - self.offset if self.causal else torch.zeros_like(j)
        of_key = (row_stop[:, None] - torch.maximum(row_start[:, None], first)).clamp(min=0)  # [query block, key]
        found = []
        for each in blocks:  # one at a time: together they would hold query x block x layout numbers
            keys = of_query * each.repeat_interleave(size, dim=0)[: self.n_queries]
            queries = of_key * each.repeat_interleave(size, dim=1)[:, : self.n_keys]
            found.append((keys.sum(-1), queries.sum(-2), (keys > 0).to(torch.uint8).argmax(-1) * size))
        repeat = 1 if len(blocks) == 1 else self.n_heads // len(blocks)
        counts = (torch.stack(several) for several in zip(*found, strict=True))
        return MaskSummary(*(t.repeat_interleave(repeat, dim=0)[None].to(device) for t in counts))


_of_tensors: MutableMapping[Tensor, dict[Any, MaskSummary]] = WeakIdKeyDictionary()
"""Of masks that live, by what they are views of: where in it each lies, as it is now, with which rules."""
_of_layouts: dict[Any, MaskSummary] = {}
_RULES = 8


def hidden_below(dtype: torch.dtype) -> float:
    """The additive value below which a key counts as hidden: half of the lowest finite number."""
    return torch.finfo(dtype).min / 2


def as_four(mask: Tensor) -> Tensor:
    """A mask of one to four dimensions as [batch, head, query, key]; leading dimensions are added in front."""
    if not 1 <= mask.dim() <= 4:
        raise CaptureError("a mask has one to four dimensions", shape=mask.shape)
    return mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))


def causal(n_queries: int, n_keys: int | None = None) -> Mask:
    """Causal over `n_keys` keys of which the first n_keys - n_queries come from a cache.

    >>> causal(2, 5).rule(slice(0, 2), slice(0, 5), torch.device("cpu")).int().tolist()
    [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    """
    n_keys = n_queries if n_keys is None else n_keys
    return Mask(n_queries, n_keys, causal=True, offset=n_keys - n_queries)


def sliding_window(n: int, window: int, causal: bool = True) -> Mask:
    """Each of `n` queries sees the keys less than `window` positions away.

    >>> sliding_window(4, 2).rule(slice(0, 4), slice(0, 4), torch.device("cpu")).int().tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    """
    return Mask(n, n, causal=causal, window=window)


def padding(lengths: Sequence[int], n: int, side: str = "right", causal: bool = False) -> Mask:
    """Hide the padding of a batch whose rows hold `lengths` real tokens out of `n`, padded on `side`.

    >>> padding([1, 3], 3, side="left").tensor[:, 0, 0].int().tolist()
    [[0, 0, 1], [1, 1, 1]]
    """
    if side not in ("left", "right"):
        raise CaptureError(f'padding is "left" or "right", not {side!r}')
    position, length = torch.arange(n, device="cpu")[None, :], torch.tensor(list(lengths), device="cpu")[:, None]
    real = position < length if side == "right" else position >= n - length
    return Mask(n, n, causal=causal, tensor=real[:, None, None, :])
