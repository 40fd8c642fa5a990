"""A2Mamba's MASS: attention over near and over dilated neighbors, and the same two maps again on a scan's states."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.hooks.readers import Mixing, ModuleRun, gating, reader
from workbench.kernels.checks import check_range
from workbench.kernels.composed import ComposedPattern
from workbench.kernels.grouped import GroupedPattern
from workbench.kernels.grouped.pattern import apply_groups
from workbench.kernels.neighborhood import NeighborhoodLayout, neighbor_weights, neighborhood_attention
from workbench.kernels.patterns import Pattern
from workbench.kernels.recurrent import gated_linear_attention
from workbench.kernels.state_space import SelectivePattern
from workbench.mechanisms.frame import Card, Claim, Mechanism, Place, Signature, at_places, register


class Neighbors(nn.Module):
    """Softmax attention of each patch over the window × window patches around it, in steps of a dilation.

    Attributes:
        layout: the windows; at an edge they are moved inwards, so that each has window² patches.
    """

    def __init__(self, grid: tuple[int, int], window: int, dilation: tuple[int, int]) -> None:
        super().__init__()
        self.layout = NeighborhoodLayout(grid, window, dilation=dilation)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """[batch, head, patch, d] to A·V; bias is [head, 2 · window − 1, 2 · window − 1]."""
        layout = self.layout
        z = neighborhood_attention(
            q, k, v, shape=layout.shape, window=layout.window, dilation=layout.dilation, bias=bias
        )
        assert isinstance(z, Tensor)  # no log-sum-exp was asked for
        return z


class AugmentedScan(nn.Module):
    """y = C ∘ F(A s) + D ∘ u: a scan whose states s are attended to before they are read, and mixed between heads.

    s_t = exp(−Δ_t a) s_{t−1} + Δ_t B_t u_t, one number for each channel, patch after patch in raster order. A are the
    maps of neighbors, half of the heads near and half dilated, F a matrix between heads, C and B one number for each
    patch. What is shown is A·S of each channel, S the map of the scan with its Δ and B held fixed.

    Args:
        scan: without it the states are u itself.
    """

    def __init__(
        self, n_heads: int, d_head: int, layouts: tuple[NeighborhoodLayout, NeighborhoodLayout], scan: bool
    ) -> None:
        super().__init__()
        d = n_heads * d_head
        self.n_heads, self.layouts, rank = n_heads, layouts, -(-d // 16)
        self.to_read = nn.Linear(d, 1, bias=False)
        self.to_write = nn.Linear(d, rank + 1, bias=False) if scan else None
        self.to_step = nn.Linear(rank, d) if scan else None
        self.rate = nn.Parameter(torch.zeros(d)) if scan else None  # ln a
        self.skip = nn.Parameter(torch.ones(d))
        self.fuse = nn.Linear(n_heads, n_heads)

    def steps(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Δ [batch, channel, patch], −a [channel] and B [batch, patch] of u [batch, patch, channel]."""
        if self.to_write is None or self.to_step is None or self.rate is None:  # nothing is left of an earlier state
            return torch.ones_like(u).mT, u.new_full(u.shape[2:], -1e4), u.new_ones(u.shape[:2])
        low, write = self.to_write(u).split([self.to_step.in_features, 1], dim=-1)
        return F.softplus(self.to_step(low)).mT, -self.rate.exp(), write[..., 0]

    def states(self, u: Tensor) -> Tensor:
        """s, [batch, channel, patch]."""
        if self.rate is None:
            return u.mT
        delta, rate, write = self.steps(u)
        keys = (delta * write[:, None])[..., None]
        s = gated_linear_attention(torch.ones_like(keys), keys, u.mT[..., None], delta * rate[:, None])
        assert isinstance(s, Tensor)
        return s[..., 0]

    def neighbors(self, q: Tensor, k: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, rows and columns of the maps of all heads, as `GroupedPattern` takes them."""
        each = [
            neighbor_weights(q_of, k_of, layout, bias=bias)
            for q_of, k_of, layout in zip(q.chunk(2, 1), k.chunk(2, 1), self.layouts, strict=True)
        ]
        columns = [part[2].expand(-1, q.shape[1] // 2, -1, -1) for part in each]
        return torch.cat([part[0] for part in each], dim=1), each[0][1], torch.cat(columns, dim=1)

    def read(self, attended: Tensor, u: Tensor) -> Tensor:
        """y [batch, patch, channel] of A s [batch, channel, patch]."""
        fused = self.fuse(attended.unflatten(1, (self.n_heads, -1)).movedim(1, -1)).movedim(-1, 1).flatten(1, 2)
        return self.to_read(u) * fused.mT + self.skip * u

    def forward(self, u: Tensor, q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
        """[batch, patch, channel] to the same shape; q and k [batch, head, patch, d]."""
        weights, rows, columns = self.neighbors(q, k, bias)
        s = self.states(u).unflatten(1, (self.n_heads, -1)).mT
        attended = apply_groups(weights, s.to(weights.dtype), rows, columns, s.shape[2]).to(u.dtype)
        return self.read(attended.mT.flatten(1, 2), u)

    def exact_map(self, u: Tensor, q: Tensor, k: Tensor, bias: Tensor, *, channel: int, head: int) -> Tensor:
        """E [batch, query, key]: what `channel` of y reads of the channel of u at its own place in another head.

        E = C F A S, and D on the diagonal where it is the channel's own head; all that depends on the input is held
        fixed. Over the heads E·u is y, but for what the bias of F adds.

        Raises:
            WorkbenchError: there is no such channel or head.
        """
        d_head = u.shape[2] // self.n_heads
        for name, at, n in (("channel", channel, u.shape[2]), ("head", head, self.n_heads)):
            if not 0 <= at < n:
                raise WorkbenchError(f"there are {n} of them, and no {name} {at}")
        into, slot = divmod(channel, d_head)
        between = self.pattern(u, q, k, bias).dense([head * d_head + slot])[:, 0]
        found = self.to_read(u) * self.fuse.weight[into, head] * between
        own = torch.eye(u.shape[1], dtype=u.dtype, device=u.device) * self.skip[channel]
        return found + own if into == head else found

    def pattern(self, u: Tensor, q: Tensor, k: Tensor, bias: Tensor) -> ComposedPattern:
        """A·S, [batch, channel, query, key], with both as its factors."""
        n, d_head = u.shape[1], u.shape[2] // self.n_heads
        weights, rows, columns = self.neighbors(q, k, bias)
        weights, columns = (t.repeat_interleave(d_head, dim=1) for t in (weights, columns))
        delta, rate, write = self.steps(u)
        B = write[:, None, :, None]
        scan = SelectivePattern(delta, rate[:, None], B, torch.ones_like(B))
        return ComposedPattern({"attention": GroupedPattern(weights, rows, columns, n, n), "scan": scan})


@reader(AugmentedScan, kind="state")
def _augmented(run: ModuleRun) -> Mixing:
    module, u = run.module, run.inputs["u"]
    assert isinstance(module, AugmentedScan)
    pattern = module.pattern(*(run.inputs[name] for name in ("u", "q", "k", "bias")))
    pattern.values = values = u.mT[..., None]
    return Mixing(pattern, values, lambda z: module.read(z[..., 0].to(u.dtype), u), kernel="mass")


class WholeAttention(nn.Module):
    """Softmax attention over all patches with the queries and keys of the neighborhoods, and a bias for each pair."""

    def __init__(self, n_heads: int, length: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(n_heads, length, length) * 0.02)

    def forward(self, u: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """[batch, head, patch, d] of u to [batch, patch, d_model]."""
        z = F.scaled_dot_product_attention(q, k, u, attn_mask=self.bias[None].to(q.dtype))
        return z.transpose(1, 2).flatten(2)


class OutputGate(nn.Module):
    """u ∘ SiLU(BN(W x)): what was mixed times a factor of its own for each patch and channel, of what went in."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.project, self.norm = nn.Linear(d, d, bias=False), nn.BatchNorm1d(d)

    def factor(self, x: Tensor) -> Tensor:
        """[batch, patch, d_model]."""
        return F.silu(self.norm(self.project(x).mT).mT)

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        """[batch, patch, d_model] of u, gated by x."""
        return u * self.factor(x)


@reader(OutputGate, kind="gate")
def _gated(run: ModuleRun) -> Mixing:
    module = run.module
    assert isinstance(module, OutputGate)
    return gating(run.inputs["u"], module.factor(run.inputs["x"]))


class MassAttention(nn.Module):
    """Patches attend to neighbors; what they read goes through a scan, whose states the same maps attend to again.

    Half of the heads see neighbors side by side, and give what they read to the other half, which see them in steps.

    Args:
        place: a grid, heads of a width that four divides, an even number of them.
        window: patches of a neighborhood along each side, odd; 1 for no attention.
        scan: whether there are states; without it the maps are used on what they gave.
        whole: as in the last of the paper's four stages, attention over the whole image stands for states and for their
            convolution.

    Raises:
        WorkbenchError: heads or a window that do not fit.
    """

    def __init__(self, place: Place, window: int = 3, scan: bool = True, whole: bool = False) -> None:
        super().__init__()
        assert place.grid is not None
        d, heads, grid = place.d_model, place.n_heads, place.grid
        if heads % 2:
            raise WorkbenchError(
                f"{heads} heads have no halves", hint="one half sees near, the other dilated neighbors"
            )
        if place.d_head % 4:
            raise WorkbenchError(
                f"heads of width {place.d_head} cannot be turned by rows and columns", hint="a width that 4 divides"
            )
        check_range("window", window, 1, min(grid))
        if not window % 2:
            raise WorkbenchError(f"window={window} has no middle", hint="an odd one")
        self.place, half = place, heads // 2
        rows, columns = (min(side // window, window) for side in grid)
        self.q, self.k, self.v = (nn.Linear(d, d) for _ in range(3))
        self.bias = nn.Parameter(torch.randn(half, 2 * window - 1, 2 * window - 1) * 0.02)
        self.local, self.dilated = Neighbors(grid, window, (1, 1)), Neighbors(grid, window, (rows, columns))
        self.before = None if whole else nn.Conv2d(d, d, 5, padding=2, groups=d)
        self.beside = nn.Conv2d(d, d, 5, padding=2, groups=d)
        layouts = self.local.layout, self.dilated.layout
        self.scan = None if whole else AugmentedScan(heads, place.d_head, layouts, scan)
        self.whole = WholeAttention(heads, place.length) if whole else None
        self.gate = OutputGate(d)
        self.inner, self.outer = nn.LayerNorm(d), nn.LayerNorm(d)
        self.out = nn.Linear(d, d)
        pace = 10000.0 ** -torch.linspace(0, 1, place.d_head // 4)
        y, x = (t.flatten()[:, None] * pace for t in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
        angle = torch.cat((y, x), dim=1)
        self.register_buffer("turn", torch.stack([angle.cos(), angle.sin()]), persistent=False)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, turned by row and column, and values, [batch, head, patch, d]."""
        q, k, v = (each(x).unflatten(-1, (self.place.n_heads, -1)).transpose(1, 2) for each in (self.q, self.k, self.v))
        return self._turned(q), self._turned(k), v

    def _turned(self, t: Tensor) -> Tensor:
        cos, sin = self.get_buffer("turn").to(t.dtype)
        a, b = t.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)

    def read(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[batch, head, patch, d]: what both halves read of the values."""
        half = self.place.n_heads // 2
        first = self.local(q[:, :half], k[:, :half], v[:, :half], self.bias)
        second = self.dilated(q[:, half:], k[:, half:], v[:, half:] + first, self.bias)
        return torch.cat((first, second), dim=1)

    def attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """u [batch, patch, d_model]: what was read, through a convolution."""
        assert self.before is not None
        return F.silu(self._over_grid(self.before, self.read(q, k, v)))

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """y [batch, patch, d_model] of states, or of the whole image."""
        if self.whole is not None:
            y: Tensor = self.whole(self.read(q, k, v), q, k)
        else:
            assert self.scan is not None
            y = self.scan(self.attended(q, k, v), q, k, self.bias)
        return y

    def _over_grid(self, conv: nn.Module, heads: Tensor) -> Tensor:
        image = heads.mT.flatten(1, 2).unflatten(2, self.place.grid)
        made: Tensor = conv(image)
        return made.flatten(2).mT

    def forward(self, x: Tensor) -> Tensor:
        """[batch, patch, d_model] to the same shape."""
        place = self.place
        if x.dim() != 3 or x.shape[1:] != (place.length, place.d_model):
            raise WorkbenchError(f"x must be [batch, {place.length} tokens, {place.d_model}]", shape=x.shape)
        q, k, v = self.heads(x)
        mixed = self.inner(self.mixed(q, k, v)) + self._over_grid(self.beside, v)
        out: Tensor = self.out(self.outer(self.gate(mixed, x)))
        return out


def _lasting(module: nn.Module, pattern: Pattern) -> dict[str, Tensor]:
    """ln 2 / (Δ a) of each channel and patch; without a scan nothing lasts."""
    scan = pattern.factors.get("scan")
    if not isinstance(module, MassAttention) or module.scan is None or module.scan.rate is None:
        return {}
    if not isinstance(scan, SelectivePattern):
        return {}
    decay = scan.delta[0] * -scan.A.view(-1, 1)  # [channel, patch]
    return {"half-life": at_places(module.place, (math.log(2) / decay).clamp(max=module.place.length))}


A2MAMBA = register(
    Mechanism(
        "a2mamba",
        Card(
            title="A2Mamba: attention-augmented state-space layer (MASS)",
            arxiv="2507.16624",
            equation="o₁ = A₁ v₁, o₂ = A₂ (v₂ + o₁), u = SiLU(DWC([o₁ o₂])), s = S u, y = C∘F([A₁ s₁, A₂ s₂]) + D∘u",
            map="A₁ and A₂ of the values are exact. Of the states A·S of each channel, made of “attention” and “scan”; "
            "`exact_map` also has what reads and mixes them.",
            kind="self",
            grade="exact",
            parts={"scan": ("state", "frozen"), "gate": ("gate", "exact")},
            cost="O(n·window²) time and memory, and a scan of one number for each channel",
            causal="never",
            grid=True,
            beside="Depth-wise convolutions of what was read and of the values.",
            code="LMMMEng/A2Mamba has no licence: unused. Written from the equations.",
            claims=(
                Claim("States that are attended to see more of the image than the scan alone."),
                Claim("It classifies better than attention or scan alone at equal cost."),
            ),
        ),
        MassAttention,
        places=(
            Place(16, 4, 36, causal=False, grid=(6, 6)),
            Place(16, 2, 45, causal=False, grid=(5, 9)),
        ),
        variants={"scan alone": {"window": 1}, "attention alone": {"scan": False}, "whole image": {"whole": True}},
        signature=Signature(
            "How long the states last",
            "For each channel and patch, after how many patches in raster order half of a state is left: ln 2 / (Δ a), "
            "at most as many as there are. What the state tells then comes from the patches before; who attends to it "
            "may stand anywhere.",
            _lasting,
            value="patches",
        ),
    )
)
