"""Layers of published forms, with the parts that packages give them, whose recurrences run step by step on a CPU.

They are written from the papers' equations, so that what is read of modules of these names is compared with something
else: gated linear attention (arXiv 2312.06635), retention (2307.08621), RWKV-7 (2503.14456), and the efficient
attention of diffusion U-Nets (1812.01243).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def stepped(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """[batch, position, head, width]: S ← diag(decay) S + b (a·S) + k vᵀ, read by q; all [batch, position, head, d]."""
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    found = []
    for t in range(q.shape[1]):
        old = state
        state = decay[:, t, :, :, None] * old + k[:, t, :, :, None] * v[:, t, :, None, :]
        if a is not None and b is not None:
            state = state + b[:, t, :, :, None] * torch.einsum("bhd,bhdw->bhw", a[:, t], old)[:, :, None]
        found.append(torch.einsum("bhd,bhdw->bhw", q[:, t], state))
    return torch.stack(found, dim=1)


class _Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, 1e-5)


class _GatedNorm(_Norm):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * F.silu(gate)


class _Gated(nn.Module):
    """Projections, short convolutions, and what follows the map, as gated linear attention and retention share them."""

    def __init__(self, hidden: int = 12, heads: int = 4, groups: int = 1, conv: bool = False, gate: str = "fused"):
        super().__init__()
        self.num_heads, self.num_kv_groups, self.head_k_dim, self.head_v_dim = heads, groups, 6, 3
        self.use_short_conv, self.use_output_gate, self.fuse_norm_and_gate = conv, gate != "none", gate == "fused"
        self.feature_map_fn, self.gate_fn, self.layer_idx = (F.relu if gate == "plain" else None), F.silu, 0
        keys, values = heads * self.head_k_dim, heads * self.head_v_dim
        self.q_proj = nn.Linear(hidden, keys, bias=False)
        self.k_proj = nn.Linear(hidden, keys // groups, bias=False)
        self.v_proj = nn.Linear(hidden, values // groups, bias=False)
        self.g_proj = nn.Linear(hidden, values, bias=False)
        if conv:
            for part, width in (("q", keys), ("k", keys // groups), ("v", values // groups)):
                setattr(self, f"{part}_conv1d", nn.Conv1d(width, width, 4, groups=width, padding=3, bias=False))
        self.g_norm_swish_gate, self.g_norm = _GatedNorm(self.head_v_dim), _Norm(self.head_v_dim)
        self.o_proj = nn.Linear(values, hidden, bias=False)

    def project(self, x: Tensor) -> list[Tensor]:
        """q, k and v [batch, position, head, d]."""
        found = []
        for part, width in (("q", self.head_k_dim), ("k", self.head_k_dim), ("v", self.head_v_dim)):
            t = getattr(self, f"{part}_proj")(x)
            if self.use_short_conv:
                t = F.silu(getattr(self, f"{part}_conv1d")(t.mT)[..., : x.shape[1]].mT)
            t = t.unflatten(-1, (-1, width))
            t = t if part == "q" else t.repeat_interleave(self.num_kv_groups, dim=2)
            found.append(t if part == "v" or self.feature_map_fn is None else self.feature_map_fn(t))
        return found

    def end(self, y: Tensor, x: Tensor) -> Tensor:
        """What follows the map."""
        gate = self.g_proj(x)
        if self.fuse_norm_and_gate:
            y = self.g_norm_swish_gate(y, gate.unflatten(-1, y.shape[2:])).flatten(2)
        else:
            y = self.g_norm(y).flatten(2) * (F.silu(gate) if self.use_output_gate else 1.0)
        return self.o_proj(y)


class GatedLinearAttention(_Gated):
    """A decay for each channel of the state."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.gate_logit_normalizer, self.clamp_min = 16, -0.02
        self.gk_proj = nn.Sequential(
            nn.Linear(12, 5, bias=False), nn.Linear(5, self.num_heads * self.head_k_dim // self.num_kv_groups)
        )

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None
    ) -> tuple[Tensor, None, Any]:
        q, k, v = self.project(hidden_states)
        g = F.logsigmoid(self.gk_proj(hidden_states)) / self.gate_logit_normalizer
        g = g.clamp_min(self.clamp_min).unflatten(-1, (-1, self.head_k_dim))
        decay = g.repeat_interleave(self.num_kv_groups, dim=2).exp()
        y = stepped(q * self.head_k_dim**-0.5, k, v, decay)
        return self.end(y, hidden_states), None, past_key_values


class _Rotary(nn.Module):
    def forward(
        self, q: Tensor, k: Tensor, seqlen_offset: int = 0, max_seqlen: int | None = None, cu_seqlens: Any = None
    ) -> list[Tensor]:
        at, half = torch.arange(q.shape[1], dtype=q.dtype) + seqlen_offset, q.shape[-1] // 2
        angles = at[:, None] * 100.0 ** (-torch.arange(half, dtype=q.dtype) / half)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return [
            torch.cat((t[..., :half] * cos - t[..., half:] * sin, t[..., half:] * cos + t[..., :half] * sin), dim=-1)
            for t in (q, k)
        ]


class MultiScaleRetention(_Gated):
    """A constant decay for each head, and rotated queries and keys."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.rotary = _Rotary()

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None) -> Any:
        q, k, v = self.project(hidden_states)
        q, k = self.rotary(q, k)
        decay = 1 - 2.0 ** (-5 - torch.arange(self.num_heads, dtype=q.dtype))
        y = stepped(q * self.head_k_dim**-0.5, k, v, decay[:, None].expand_as(q))
        return self.end(y, hidden_states), None, past_key_values


class _Low(nn.Module):
    def __init__(self, hidden: int, out: int, act: nn.Module, bias: bool = True) -> None:
        super().__init__()
        self.lora = nn.Sequential(nn.Linear(hidden, 5, bias=False), act, nn.Linear(5, out, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.lora(x)


class RWKV7Attention(nn.Module):
    """A state that is erased along one direction and written along another, with decays for each channel."""

    def __init__(self, layer: int = 1, fuse_norm: bool = False) -> None:
        super().__init__()
        hidden, self.head_dim, self.head_v_dim, self.num_heads = 12, 4, 4, 3
        self.layer_idx, self.fuse_norm = layer, fuse_norm
        self.time_shift = nn.ZeroPad2d((0, 0, 1, -1))
        for part in "rwkvag":
            setattr(self, f"x_{part}", nn.Parameter(torch.rand(1, 1, hidden)))
        self.k_k, self.k_a = nn.Parameter(torch.ones(hidden)), nn.Parameter(torch.ones(hidden))
        self.r_k = nn.Parameter(torch.zeros(self.num_heads, self.head_dim))
        self.r_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))
        self.w_lora, self.a_lora = _Low(hidden, hidden, nn.Tanh()), _Low(hidden, hidden, nn.Identity())
        self.v_lora = _Low(hidden, hidden, nn.Identity())
        self.g_lora = _Low(hidden, hidden, nn.Sigmoid(), bias=False)
        self.g_norm = nn.GroupNorm(self.num_heads, hidden, eps=4e-5)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None,
        v_first: Tensor | None = None,
    ) -> Any:  # fmt: skip
        x = hidden_states if attention_mask is None else hidden_states * attention_mask[..., None]
        before = self.time_shift(x)
        r, w, k, v, a, g = (x + (before - x) * getattr(self, f"x_{part}") for part in "rwkvag")
        decay = (-0.5 * torch.ones((), dtype=x.dtype)).exp().neg() * self.w_lora(w).sigmoid()
        r, k, wide = self.r_proj(r), self.k_proj(k), self.v_proj(v)
        wide = wide if self.layer_idx == 0 else wide + (v_first - wide) * self.v_lora(v).sigmoid()
        if attention_mask is not None:
            wide = wide * attention_mask[..., None]
        rate = self.a_lora(a).sigmoid()

        def heads(t: Tensor) -> Tensor:
            return t.unflatten(-1, (self.num_heads, -1))

        removed = F.normalize(heads(k * self.k_k), dim=-1)
        k = k * (1 + (rate - 1) * self.k_a)
        y = stepped(heads(r), heads(k), heads(wide), heads(decay).exp(), -removed, removed * heads(rate))
        y = self.g_norm(y.flatten(0, 1).flatten(1)).view_as(x)
        bonus = (heads(r) * heads(k) * self.r_k).sum(-1, keepdim=True) * heads(wide)
        return self.o_proj((y + bonus.flatten(2)) * self.g_lora(g)), None, past_key_values, v_first


class EfficientAttention(nn.Module):
    """Keys are softmaxed over positions, queries over their channels; head by head, as the paper writes it."""

    def __init__(self, channels: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.head_count, self.key_channels, self.value_channels = heads, 6, 4
        self.keys, self.queries = nn.Conv2d(channels, 6, 1), nn.Conv2d(channels, 6, 1)
        self.values, self.reprojection = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, input_: Tensor) -> Tensor:
        keys, queries, values = (part(input_).flatten(2) for part in (self.keys, self.queries, self.values))
        found = []
        for i in range(self.head_count):
            k, q, v = (t[:, i * (n := t.shape[1] // self.head_count) : (i + 1) * n] for t in (keys, queries, values))
            context = k.softmax(2) @ v.mT
            found.append(context.mT @ q.softmax(1))
        return self.reprojection(torch.cat(found, 1).view(len(input_), -1, *input_.shape[2:])) + input_


class _ChannelNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.g * x.shape[1] ** 0.5


class Residual(nn.Module):
    """A model of one layer, which is added to its input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        found = self.layer(x)
        return x + (found if isinstance(found, Tensor) else found[0])


class LinearAttention(nn.Module):
    """The same in a diffusion U-Net, with one projection, a scale, and a norm behind it."""

    def __init__(self, channels: int = 8, heads: int = 2, width: int = 5) -> None:
        super().__init__()
        self.heads, self.scale = heads, width**-0.5
        self.to_qkv = nn.Conv2d(channels, 3 * heads * width, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(heads * width, channels, 1), _ChannelNorm(channels))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(x).flatten(2).chunk(3, dim=1)
        q, k, v = (t.unflatten(1, (self.heads, -1)) for t in (q, k, v))
        context = torch.einsum("bhdn,bhen->bhde", k.softmax(-1), v)
        out = torch.einsum("bhde,bhdn->bhen", context, q.softmax(-2) * self.scale)
        return self.to_out(out.flatten(1, 2).view(len(x), -1, *x.shape[2:]))
