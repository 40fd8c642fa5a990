"""S2AFormer: strips of queries and keys, one number or few for each head, over an image that was made smaller.

The paper's text could not be read: that queries and keys lose channels, keys and values lose positions, and a
convolution looks at what is near, is known from its abstract. How they do so here is one reading of it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.hooks.readers import Mixing, ModuleRun, reader
from workbench.kernels.checks import check_range
from workbench.kernels.patterns import DensePattern, Pattern
from workbench.mechanisms.frame import Card, Claim, Mechanism, Mixer, Place, Signature, register


class Strip(NamedTuple):
    """What a head with queries and keys of one number does.

    Attributes:
        order: [batch, head, key], the keys in the order in which every query above zero likes them, the best first; a
            query below zero likes them the other way round.
        keys: [batch, head, key], the numbers that it sorts by.
        sharpness: [batch, head, query], |q|: how much more the first of them weighs; zero sees all keys alike.
        turned: [batch, head, query] bool, whether a query is below zero.
    """

    order: Tensor
    keys: Tensor
    sharpness: Tensor
    turned: Tensor


class StripAttention(Mixer):
    """softmax(q kᵀ/√r) v over an image that is s times smaller in each direction, with q and k of r numbers a head.

    Args:
        place: a grid whose sides s divides.
        reduction: s, of squares that do not overlap; 1 for none.
        width: r, from 1, a strip, to the width of a head, which it is if None.
        squares: what makes a square one: a depth-wise "convolution", or the "mean"; normalised.

    Raises:
        WorkbenchError: a reduction that does not divide the grid, or a width out of range.
    """

    def __init__(
        self, place: Place, reduction: int = 2, width: int | None = 1,
        squares: Literal["convolution", "mean"] = "convolution",
    ) -> None:  # fmt: skip
        super().__init__(place)
        assert place.grid is not None
        width = self.d_head if width is None else width
        if squares not in ("convolution", "mean"):
            raise WorkbenchError(f'squares="{squares}" is not known', hint='"convolution" or "mean"')
        check_range("reduction", reduction, 1, min(place.grid))
        check_range("width", width, 1, self.d_head)
        if any(side % reduction for side in place.grid):
            raise WorkbenchError(
                f"squares of {reduction} do not divide a grid of {' × '.join(map(str, place.grid))}",
                hint="a reduction that divides both sides, or 1",
            )
        self.reduction, self.width, d = reduction, width, place.d_model
        self.q, self.k = nn.Linear(d, self.n_heads * width), nn.Linear(d, self.n_heads * width)
        self.squares = nn.Conv2d(d, d, reduction, reduction, groups=d, bias=False) if reduction > 1 else None
        if self.squares is not None and squares == "mean":
            mean = torch.full_like(self.squares.weight, reduction**-2, requires_grad=False)
            del self.squares.weight
            self.squares.register_buffer("weight", mean)  # nothing that is learned
        self.norm = nn.BatchNorm1d(d) if reduction > 1 else None

    def reduced(self, x: Tensor) -> Tensor:
        """[batch, square, d_model] of x [batch, token, d_model]."""
        if self.squares is None or self.norm is None:
            return x
        made: Tensor = self.norm(self.squares(x.mT.unflatten(2, self.place.grid)).flatten(2))
        return made.mT

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [batch, head, token, r], and of squares keys [batch, head, square, r] and values."""
        less = self.reduced(x)
        q, k = (t.unflatten(-1, (-1, self.width)).transpose(1, 2) for t in (self.q(x), self.k(less)))
        return q, k, self.split(self.v(less))

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """[batch, head, token, square]."""
        return (q @ k.mT * self.width**-0.5).softmax(-1)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """A·V over the squares."""
        return F.scaled_dot_product_attention(q, k, v, scale=self.width**-0.5)

    def strip(self, x: Tensor) -> Strip:
        """What each head does with x, where queries and keys are one number.

        Raises:
            WorkbenchError: they are more: no one order of the keys is that of every query.
        """
        if self.width > 1:
            raise WorkbenchError(
                f"queries and keys of {self.width} numbers do not lie on a line", hint="a layer of width=1"
            )
        q, k, _ = (t[..., 0] for t in self.heads(x))
        return Strip(k.argsort(-1, descending=True), k, q.abs(), q < 0)

    def token_map(self, x: Tensor, channel: int) -> Tensor:
        """[batch, head, token, token]: A·R, how tokens reach each other by one channel of the smaller image.

        With the map held fixed, z_i = Σ over channels of W_v Σ_j (A R)_ij x_j and what biases add. Where squares are
        plain means R is 1/s² inside of them. Exact in evaluation, where normalisation is a fixed factor.

        Raises:
            WorkbenchError: there is no such channel.
        """
        check_range("channel", channel, 0, self.place.d_model - 1)
        q, k, _ = self.heads(x)
        weights = self.weights(q, k)
        if self.squares is None or self.norm is None:
            return weights
        assert self.place.grid is not None
        assert self.norm.running_var is not None
        (rows, columns), s = self.place.grid, self.reduction
        factor = self.norm.weight[channel] / (self.norm.running_var[channel] + self.norm.eps).sqrt()
        y, at = torch.arange(rows, device=x.device), torch.arange(columns, device=x.device)
        square = (y[:, None] // s * (columns // s) + at // s).flatten()
        inside = self.squares.weight[channel, 0][y[:, None] % s, at % s].flatten() * factor
        return weights[..., square] * inside

    @staticmethod
    def products(place: Place, reduction: int, width: int) -> int:
        """Multiplications in the scores, N n r · heads, and in reading the values, N n · d_model."""
        n = place.length // reduction**2
        return place.length * n * (width * place.n_heads + place.d_model)


@reader(StripAttention, kind="pooled", when=lambda module: getattr(module, "reduction", 1) > 1)
def _strips(run: ModuleRun) -> Mixing:
    module, x = run.module, run.inputs["x"]
    assert isinstance(module, StripAttention)
    q, k, v = module.heads(x)
    pattern = DensePattern(module.weights(q, k))
    pattern.values = v
    return Mixing(pattern, v, lambda z: module.finish(z.to(x.dtype), v, x), "strip", queries=q, keys=k)


class Shares(NamedTuple):
    """How much the parts of a block add, as lengths [batch, token]: what is near, the strips, the MLP."""

    local: Tensor
    strips: Tensor
    mlp: Tensor


class HybridPerception(nn.Module):
    """A convolution looks at what is near, strips at all of the image, and an MLP at each patch.

    Args:
        place, reduction, width: as of `StripAttention`.
        local: whether there is the part that looks at what is near.
    """

    def __init__(self, place: Place, reduction: int = 2, width: int = 1, local: bool = True) -> None:
        super().__init__()
        self.place, d = place, place.d_model
        self.near = nn.Conv2d(d, d, 3, padding=1, groups=d, bias=False) if local else None
        self.near_norm = nn.BatchNorm2d(d) if local else None
        self.near_mix = nn.Linear(d, d) if local else None
        self.strips, self.norm = StripAttention(place, reduction, width), nn.LayerNorm(d)
        self.mlp = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What each adds, one after the other, [batch, token, d_model]."""
        local = torch.zeros_like(x)
        if self.near is not None and self.near_norm is not None and self.near_mix is not None:
            image = F.gelu(self.near_norm(self.near(x.mT.unflatten(2, self.place.grid))))
            local = self.near_mix(image.flatten(2).mT)
        seen = self.strips(self.norm(x + local))
        return local, seen, self.mlp(x + local + seen)

    def shares(self, x: Tensor) -> Shares:
        """How long what each part adds is, for every token."""
        return Shares(*(part.norm(dim=-1) for part in self.parts(x)))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, token, d_model] to the same shape."""
        return x + sum(self.parts(x))


def _sides(module: nn.Module, pattern: Pattern) -> dict[str, Tensor]:
    """The sharpest row of each head, and the sharpest of those that sort the squares the other way round."""
    if not isinstance(module, StripAttention) or module.width > 1 or module.place.grid is None:
        return {}
    rows = pattern.dense()[0].double()  # [head, query, square]
    n, heads = rows.shape[2], torch.arange(len(rows))
    sharp = (rows * (n * rows).clamp(min=1e-300).log()).sum(-1)  # nats below an even row
    logs = rows.clamp(min=1e-300).log()
    logs = logs - logs.mean(-1, keepdim=True)
    first = sharp.argmax(-1)
    turned = (logs * logs[heads, first][:, None]).sum(-1) < 0
    other = sharp.masked_fill(~turned, -1).argmax(-1)
    squares = tuple(side // module.reduction for side in module.place.grid)
    found = {"one side": rows[heads, first], "other side": rows[heads, other]}
    found["other side"] = found["other side"].masked_fill(~turned.any(-1, keepdim=True), torch.nan)
    if bool(found["other side"].isnan().all()):
        del found["other side"]
    return {name: row.unflatten(1, squares) for name, row in found.items()}


S2AFORMER = register(
    Mechanism(
        "s2aformer",
        Card(
            title="S2AFormer: strip self-attention",
            arxiv="2505.22195",
            equation="A = softmax(q kᵀ/√r), k and v of an image s times smaller, r numbers a head; with r = 1 all "
            "queries sort the keys alike",
            map="A softmax over squares of s × s patches. `token_map` has what it means for patches. Its internals are "
            "not verified: the paper's text and code could not be read.",
            kind="pooled",
            grade="exact",
            cost="O(n²/s² · (r + width of a head)) for each head",
            causal="never",
            grid=True,
            code="No official code was found; one reading of the abstract.",
            claims=(
                Claim("It is faster than attention with fewer keys alone."),
                Claim("It is more accurate than attention with fewer keys alone."),
                Claim("Convolutions make better squares than pooling does."),
            ),
        ),
        StripAttention,
        places=(
            Place(24, 4, 36, causal=False, grid=(6, 6)),
            Place(16, 2, 40, causal=False, grid=(4, 10)),
        ),
        variants={"wide": {"width": 3}, "fewer keys": {"width": None}, "means": {"squares": "mean"}},
        signature=Signature(
            "The strip of each head",
            "What the sharpest query of a head sees, square by square, and the sharpest of those that sort the squares "
            "the other way round. Queries and keys of a head are one number each: all its other queries see the same "
            "order, less sharply.",
            _sides,
            rows="row of squares",
            columns="column of squares",
        ),
    )
)
