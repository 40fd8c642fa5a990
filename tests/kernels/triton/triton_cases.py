"""The patterns that the kernels are compared on, and the comparison with the dense float64 definition."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from workbench.kernels.layouts import Layout
from workbench.kernels.masks import Mask
from workbench.kernels.neighborhood.layout import NeighborhoodLayout
from workbench.kernels.softmax import SoftmaxPattern
from workbench.kernels.statistics import Options, dense
from workbench.kernels.triton import engine

DISTRIBUTION = ["lse", "entropy", "peak", "peak_key", "effective_keys", "distance", "distance_var"]
ROWS = [*DISTRIBUTION, "sink", "current", "previous"]
COLUMNS = ["received", "received_mean", "top_keys", "pooled_mean", "pooled_max"]


class Blocks(Layout):
    """A layout of given blocks, each seen as a whole."""

    exact = True

    def __init__(self, blocks: Tensor, block: int) -> None:
        self._blocks, self.block, self.n_layouts = blocks, block, len(blocks)

    def blocks(self) -> Tensor:
        return self._blocks

    def visible(self, queries: slice, keys: slice, layouts: Tensor) -> Tensor:
        i = torch.arange(queries.start, queries.stop) // self.block
        j = torch.arange(keys.start, keys.stop) // self.block
        return self._blocks[layouts][:, i][:, :, j]


@dataclass(frozen=True)
class Case:
    """One pattern: sizes, mask, dtype and the scale of its scores."""

    name: str
    n: int = 70
    n_keys: int | None = None
    heads: tuple[int, int] = (2, 1)
    batch: int = 1
    d: int = 32
    causal: bool = True
    offset: int = 0
    window: int | None = None
    layout: tuple[int, int] | None = None  # (block, number of layouts)
    half: bool = False
    spread: float = 1.5
    given_lse: bool = False
    block: int = 16
    n_top: int = 8
    transposed: bool = False  # [batch, position, head, d] in memory, as models have it
    tensor: str = ""  # what kind of mask tensor: "padding", "bool", "additive", "bias of positions"
    softcap: float | None = None
    sinks: bool = False
    key_bias: bool = False
    tokens: bool = False  # so that there is induction
    sink_keys: tuple[int, ...] | None = None
    image: tuple[int, int] | None = None  # of n patches, in neighborhoods: tokens are hidden within blocks
    image_block: int = 16

    def mask_tensor(self, n_keys: int) -> Tensor | None:
        """The mask's tensor: what is hidden differs from row to row, and a row of "bool" sees nothing."""
        gen = torch.Generator().manual_seed(11)
        if self.tensor == "padding":
            real = torch.arange(n_keys) >= torch.tensor([[3], [20]])
            return real[: self.batch, None, None]
        if self.tensor == "bool":
            shown = torch.rand(1, self.heads[0], self.n, n_keys, generator=gen) < 0.7
            shown[:, 0, 5] = False
            return shown
        if self.tensor == "additive":  # as models hide keys: by the lowest number, or −inf; [query, key] transposed
            added = torch.randn(self.batch, 1, n_keys, self.n, generator=gen).mT
            hidden = torch.rand(added.shape, generator=gen) < 0.3
            return added.masked_fill(hidden, torch.finfo(torch.float32).min).masked_fill(hidden[..., :1], -torch.inf)
        if self.tensor == "bias of positions":
            return torch.randn(1, self.heads[0], self.n, n_keys, generator=gen).to(torch.bfloat16)
        return None

    def problem(self, q: Tensor, k: Tensor, mask: Mask, lse: Tensor | None = None) -> SoftmaxPattern:
        """The pattern on these queries and keys, whatever their dtype and device."""
        gen, dtype = torch.Generator().manual_seed(12), torch.promote_types(q.dtype, torch.float32)
        sinks = torch.randn(self.heads[0], generator=gen) if self.sinks else None
        bias = torch.randn(self.batch, self.heads[0], k.shape[2], generator=gen) if self.key_bias else None
        tensor = None if mask.tensor is None else mask.tensor.to(q.device)
        sinks, bias = (None if each is None else each.to(q.device, dtype) for each in (sinks, bias))
        how = {"softcap": self.softcap, "sinks": sinks, "key_bias": bias}
        return SoftmaxPattern(q, k, replace(mask, tensor=tensor), lse=lse, **how)

    @property
    def bare(self) -> bool:
        """Whether the fused forward, which has neither caps nor sinks nor biases of keys, is for it."""
        return not (self.softcap or self.sinks or self.key_bias or self.sink_keys)

    def options(self) -> Options:
        """What the statistics need besides."""
        ids = torch.randint(0, 5, (self.batch, self.n_keys or self.n), generator=torch.Generator().manual_seed(13))
        return Options(
            n_top=self.n_top, block=self.block, sink_keys=self.sink_keys, tokens=ids if self.tokens else None
        )

    @property
    def names(self) -> list[str]:
        """Every statistic that it has."""
        return [*ROWS, *(["induction"] if self.tokens else []), *COLUMNS]

    def mask(self) -> Mask:
        n_keys = self.n_keys or self.n
        if self.image:
            layout = NeighborhoodLayout(self.image, 3, dilation=(2, 1), block=self.image_block)
            return Mask(self.n, n_keys, layout=layout, n_heads=self.heads[0])
        rules = {"causal": self.causal, "offset": self.offset, "window": self.window}
        rules["tensor"] = self.mask_tensor(n_keys)
        if self.layout is None:
            return Mask(self.n, n_keys, **rules)
        block, count = self.layout
        gen = torch.Generator().manual_seed(7)
        blocks = torch.rand(count, -(-self.n // block), -(-n_keys // block), generator=gen) < 0.5
        return Mask(self.n, n_keys, **rules, layout=Blocks(blocks, block), n_heads=self.heads[0])

    def tensors(self, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        gen = torch.Generator().manual_seed(len(self.name))
        (h, kv), n_keys = self.heads, self.n_keys or self.n

        def draw(heads: int, n: int) -> Tensor:
            if self.transposed:
                return torch.randn(self.batch, n, heads, self.d, generator=gen).transpose(1, 2)
            return torch.randn(self.batch, heads, n, self.d, generator=gen)

        q, k, v = draw(h, self.n) * self.spread, draw(kv, n_keys), draw(kv, n_keys)
        return q.to(device, dtype), k.to(device, dtype), v.to(device, dtype)


CASES = [
    Case("one token", n=1),
    Case("short", n=17, block=8),
    Case("tiles", n=64, d=64, batch=2),
    Case("ragged, wide", d=80, heads=(1, 1)),
    Case("more tiles", n=96, heads=(1, 1), n_top=16),
    Case("full", causal=False, heads=(1, 1)),
    Case("keys from a cache", n=17, n_keys=70, offset=53, heads=(4, 2)),
    Case("window", window=40, heads=(1, 1)),
    Case("window on both sides", causal=False, window=23, n_top=3, heads=(1, 1)),
    Case("narrow window", n=64, window=1, heads=(1, 1)),
    Case("dead rows", n=64, n_keys=40, offset=-20, heads=(1, 1)),
    Case("dead by window", n=70, n_keys=30, causal=False, window=16, heads=(1, 1)),
    Case("layout", layout=(16, 2), heads=(4, 2)),
    Case("layout of large blocks", layout=(64, 1), n=96, causal=False, heads=(1, 1)),
    Case("layout of small blocks", layout=(8, 1), window=50, heads=(1, 1)),
    Case("layout, cache", layout=(32, 2), n=64, n_keys=100, offset=36),
    Case("lse given", given_lse=True, block=64, heads=(1, 1)),
    Case("peaked", spread=300.0, heads=(1, 1)),
    Case("half", half=True, heads=(1, 1)),
    Case("half, layout", half=True, layout=(16, 1), d=64, heads=(1, 1)),
    Case("half, transposed", half=True, transposed=True, d=80, heads=(2, 2), causal=False, block=32),
    Case("padded batch", batch=2, tensor="padding", tokens=True),
    Case("boolean mask, sinks", causal=False, tensor="bool", sinks=True, sink_keys=(0, 3, -1)),
    Case("additive mask, softcap", n=40, batch=2, causal=False, tensor="additive", softcap=2.0, key_bias=True),
    Case("bias of positions, half", n=33, n_keys=40, offset=7, half=True, tensor="bias of positions", sink_keys=(2,)),
    Case("capped window with sinks", n=64, window=20, softcap=5.0, sinks=True, heads=(4, 2), tokens=True),
    Case("neighborhood", n=63, image=(7, 9), heads=(1, 1)),
    Case("neighborhood of odd blocks, half", n=63, image=(7, 9), image_block=12, half=True),
    Case("layout of odd blocks", layout=(24, 2), heads=(4, 2)),
    Case(
        "everything",
        n=40,
        n_keys=64,
        offset=24,
        batch=2,
        layout=(16, 2),
        window=50,
        tensor="padding",
        softcap=3.0,
        sinks=True,
        key_bias=True,
        tokens=True,
    ),
]


def compare(
    case: Case, device: str, dtype: torch.dtype, tolerance: float, true_mask: Mask | None = None
) -> Iterator[str]:
    """What is wrong, statistic by statistic, with the kernels' account of a case; nothing if all is well.

    Args:
        true_mask: a mask for the definition alone, to see that the comparison notices.
    """
    q, k, v = case.tensors(device, dtype)
    mask, options = case.mask(), case.options()
    truth = case.problem(q.cpu().double(), k.cpu().double(), true_mask or mask)
    weights = truth.dense()
    want = dense(weights, case.names, truth.mask, lse=truth.lse, options=options)
    given = truth.lse.to(device, torch.float32) if case.given_lse else None
    pattern = case.problem(q, k, mask, given)
    why = engine.refusal(pattern.problem, case.names, options)
    if why is not None:
        yield f"refused: {why}"
        return
    # Errors of scores grow with the scores: those of float32 in the kernels with scores of hundreds.
    slack = tolerance * max(1.0, case.spread / 10)
    got = engine.statistics(pattern.problem, case.names, options)
    alone = engine.statistics(case.problem(q, k, mask, given).problem, COLUMNS, options)
    output, rows = engine.attention(q, k, v, pattern.mask) if case.bare else (None, {})
    wanted_output = weights @ v.cpu().double().repeat_interleave(case.heads[0] // case.heads[1], dim=1)
    if output is not None:
        yield from differ("output", output, wanted_output, slack)
    for name in want:
        yield from statistic(name, got[name], want, weights, slack)
        if name in alone:
            yield from statistic(name + " alone", alone[name], want, weights, slack)
        if name in rows:
            yield from statistic(name + " with output", rows[name], want, weights, slack)


def gradients(case: Case, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A gradient of the output, and those of q, k and v that follow, by the definition in float64 and autograd."""
    mask, group = case.mask(), case.heads[0] // case.heads[1]
    leaves = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    wide = [x.repeat_interleave(group, dim=1) for x in leaves[1:]]
    scores = leaves[0] @ wide[0].mT * q.shape[-1] ** -0.5
    everything = slice(0, mask.n_queries), slice(0, mask.n_keys), slice(0, case.batch), slice(0, case.heads[0])
    seen = mask.visible(*everything)
    seen = torch.ones_like(scores, dtype=torch.bool) if seen is None else seen.expand_as(scores)
    if mask.additive:
        scores = scores + mask.tensor.double()  # type: ignore[union-attr]
    sees = seen.any(-1, keepdim=True)
    p = torch.where(seen | ~sees, scores, -torch.inf).softmax(-1) * sees
    output = p @ wide[1]
    d_out = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return d_out, torch.autograd.grad(output, leaves, d_out)


def statistic(label: str, got: Tensor, want: dict[str, Tensor], weights: Tensor, slack: float) -> Iterator[str]:
    name = label.split(" ")[0]
    if name == "peak_key":  # several keys may weigh nearly the same
        yield from _same_weight(label, got[..., None], want["peak"][..., None], weights, slack)
    elif name == "top_keys_index":
        yield from _same_weight(label, got, want["top_keys_weight"], weights, slack)
        repeated = got.cpu().sort(-1).values
        if bool(((repeated[..., 1:] == repeated[..., :-1]) & (repeated[..., 1:] >= 0)).any()):
            yield f"{label}: a key twice"
    else:
        yield from differ(label, got, want[name], slack)


def _same_weight(label: str, index: Tensor, want: Tensor, weights: Tensor, slack: float) -> Iterator[str]:
    """The keys at `index` (-1: none) weigh what the dense ones weigh."""
    index = index.cpu()
    if index.dtype != torch.long or int(index.max()) >= weights.shape[-1] or int(index.min()) < -1:
        yield f"{label}: not key indices"
        return
    found = weights.gather(-1, index.clamp(min=0)).where(index >= 0, 0.0)
    yield from differ(label, found, want.nan_to_num(0.0), slack)


def differ(label: str, got: Tensor, want: Tensor, slack: float) -> Iterator[str]:
    got, want = got.cpu().double(), want.double()
    if got.shape != want.shape:
        yield f"{label}: shape {list(got.shape)}, not {list(want.shape)}"
    elif not torch.allclose(got, want, rtol=slack, atol=slack, equal_nan=True):
        worst = (got - want).abs().nan_to_num(0.0, posinf=0.0).max()
        dead = (got.isfinite() != want.isfinite()).sum()
        yield f"{label}: off by {worst:.2e}, {int(dead)} entries finite in one only"
