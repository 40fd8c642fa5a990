"""Reads windowed attention of the package local-attention over the whole sequence, with its rotary positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.hooks.readers.registered import Mixing, ModuleRun, reader
from workbench.hooks.readers.state_space import has
from workbench.hooks.tap import Unshown
from workbench.kernels.grouped import GroupedPattern, group_weights
from workbench.kernels.masks import Mask
from workbench.kernels.patterns import Pattern
from workbench.kernels.softmax import SoftmaxPattern

_ITSELF = -5e4  # the score of a token's own key where queries are the keys


@dataclass(frozen=True)
class _Windows:
    """Positions of the queries of each window, [window, w], and of the keys that it sees, [window, W].

    Of `rows` and `columns` −1 stands for those that the sequence has not; `at` and `to` are as if it went on. Keys
    before the first and behind the last window are hidden; the last one is filled up with keys of zeros, which are not.
    """

    at: Tensor
    to: Tensor
    rows: Tensor
    columns: Tensor
    hidden: Tensor

    @classmethod
    def of(cls, module: Any, n: int, size: int, device: torch.device) -> _Windows:
        whole = -(-n // size) * size
        starts = torch.arange(0, whole, size, device=device)[:, None]
        at = starts + torch.arange(size, device=device)
        to = starts + torch.arange(-module.look_backward * size, (module.look_forward + 1) * size, device=device)
        apart = at[..., :, None] - to[..., None, :]
        hidden = ((to < 0) | (to >= whole))[:, None].expand_as(apart)
        if module.causal:
            hidden = hidden | (apart < 0)
        if module.exact_windowsize:
            hidden = hidden | (apart > module.look_backward * size) | (-apart > module.look_forward * size)
        rows, columns = (t.where((t >= 0) & (t < n), -1) for t in (at, to))
        return cls(at, to, rows[None, None], columns[None, None], hidden[None, None])


@reader(
    "local_attention.local_attention.LocalAttention", kind="self",
    when=has("window_size", "look_backward", "look_forward", "rel_pos", "shared_qk", "exact_windowsize"),
)  # fmt: skip
def local(run: ModuleRun) -> Mixing:
    """Windows of one size, each of which sees itself and some beside it."""
    module: Any = run.module
    given = [run.inputs[name] for name in "qkv"]
    q, k, v = (t[:, None] if t.dim() == 3 else t for t in given)
    size = run.inputs.get("window_size") or module.window_size
    windows = _Windows.of(module, q.shape[2], size, q.device)
    k = F.normalize(k, dim=-1) if module.shared_qk else k
    scale = q.shape[-1] ** -0.5 if module.scale is None else module.scale
    turned = _turned(module.rel_pos, q, module.look_forward * size, 1), _turned(module.rel_pos, k, 0, -1)
    pattern = _pattern(run, windows, *turned, v, float(scale), size)
    return Mixing(pattern, v, lambda z: z.to(given[0].dtype).view(*given[0].shape[:-1], -1), "local", queries=q, keys=k)


def _pattern(run: ModuleRun, windows: _Windows, q: Tensor, k: Tensor, v: Tensor, scale: float, size: int) -> Pattern:
    module: Any = run.module
    n, hidden = q.shape[2], windows.hidden
    keys = next((run.inputs[name] for name in ("mask", "input_mask") if run.inputs.get(name) is not None), None)
    added = run.inputs.get("attn_bias")
    if module.causal and module.exact_windowsize and keys is None and added is None and not module.shared_qk:
        mask = Mask(n, n, causal=True, window=module.look_backward * size + 1)
        return SoftmaxPattern(q, k, mask, scale=scale, values=v.to(q.dtype))
    bias = None if added is None else added[None, :, None].to(q.dtype)
    if module.shared_qk:
        itself = (windows.at[..., :, None] == windows.to[..., None, :])[None, None]
        own = torch.zeros(itself.shape, dtype=q.dtype, device=q.device).masked_fill(itself, _ITSELF)
        bias = own if bias is None else bias + own
    if keys is not None:
        there = F.pad(keys, (0, 1))[:, windows.columns[0, 0]]  # −1 is the one more, which is not there
        hidden = hidden | ~there[:, None, :, None]
    if bool((hidden.all(-1) & (windows.rows >= 0)).any()):
        raise Unshown("a token sees no other, and the module then gives the mean of all of its window", site=run.site)
    weights = group_weights(q, k, windows.rows, windows.columns, scale=scale, bias=bias, hidden=hidden, pads=True)
    fills = bool(((windows.columns < 0)[..., None, :] & ~hidden & (windows.rows >= 0)[..., None]).any())
    return GroupedPattern(
        weights, windows.rows, windows.columns, n, n, causal=module.causal, normalised=not fills, values=v
    )  # fmt: skip


def _turned(positions: Any, t: Tensor, ahead: int, sign: int) -> Tensor:
    """Queries (sign 1) or keys (−1), turned and, with xPos, scaled by where they stand; scores know distances alone."""
    if positions is None:
        return t
    at = torch.arange(t.shape[2], dtype=torch.float64, device=t.device)[:, None] + ahead
    angle = (at * positions.inv_freq.double()).repeat(1, 2)
    factor = torch.ones((), dtype=torch.float64, device=t.device)
    if positions.use_xpos:
        factor = (positions.scale.double() ** (sign * at / positions.scale_base)).repeat(1, 2)
    a, b = t.double().chunk(2, dim=-1)
    turned: Tensor = (t.double() * angle.cos() + torch.cat((-b, a), dim=-1) * angle.sin()) * factor
    return turned if t.dtype == torch.float64 or positions.use_xpos else turned.float()
