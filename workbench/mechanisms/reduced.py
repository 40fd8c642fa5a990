"""A transformer reduced to a minimum: matrices that are multiplied anyway are one, and similarity is symmetric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.kernels.patterns import Pattern
from workbench.mechanisms.frame import Card, Claim, Mechanism, Mixer, Place, Signature, register

Similarity = Literal["two", "shared", "collapsed", "symmetric", "positive"]
Values = Literal["two", "collapsed", "none"]


class Reduced(Mixer):
    """Softmax attention with fewer matrices, without biases; without the MLP beside it where a model has hidden=0.

    Positions are for the embedding: queries and keys are not turned, since a product of matrices would not be one then.

    Args:
        place: where it stands, of width N and H heads.
        similarity: of x_i and x_j in each head. "two": of W^Q x_i and W^K x_j. "shared": W^K is W^Q. "collapsed":
            x_i W^QK x_jᵀ, of N² numbers. "symmetric": W^QK is its own transpose, of N(N+1)/2. "positive": so is
            T Tᵀ with a triangle T, and nothing is less similar to itself than zero.
        values: "two": W^V and W^O. "collapsed": W^VO, of N². "none": what is seen itself, of one head.
        heads: the place's where all matrices are two or shared, else one: a collapsed matrix is as large for any head.

    Raises:
        WorkbenchError: a form that is not known, or heads that do not divide N or are several without values.
    """

    def __init__(
        self,
        place: Place,
        similarity: Similarity = "collapsed",
        values: Values = "collapsed",
        heads: int | None = None,
    ) -> None:
        for name, given, known in (
            ("similarity", similarity, ("two", "shared", "collapsed", "symmetric", "positive")),
            ("values", values, ("two", "collapsed", "none")),
        ):
            if given not in known:
                raise WorkbenchError(f'{name}="{given}" is not known', hint=" or ".join(f'"{each}"' for each in known))
        by_head = similarity in ("two", "shared")
        whole = by_head and values == "two"
        heads = (place.n_heads if whole else 1) if heads is None else heads
        if heads < 1 or place.d_model % heads:
            divide = ", ".join(str(n) for n in range(1, place.d_model + 1) if place.d_model % n == 0)
            raise WorkbenchError(f"{heads} heads do not divide d_model={place.d_model}", hint=f"take one of {divide}")
        if values == "none" and heads > 1:
            raise WorkbenchError(f"{heads} heads would each give all of x", hint='one head, or values="collapsed"')
        n_kv_heads = heads if by_head or values == "two" else 1
        super().__init__(replace(place, rotary=False), heads, n_kv_heads)
        d_model, d_head = place.d_model, place.d_model // heads
        self.similarity, self.values, self.d_head, self.scale = similarity, values, d_head, d_head**-0.5
        if by_head:
            self.q = nn.Linear(d_model, d_model, bias=False)
            self.k = self.q if similarity == "shared" else nn.Linear(d_model, d_model, bias=False)
        else:
            made = nn.Linear(d_model, heads * d_model, bias=False)
            self.q = made if similarity == "collapsed" else _Triangle(d_model, heads, similarity == "positive")
            self.k = nn.Identity()
        self.v = nn.Linear(d_model, d_model, bias=False) if values == "two" else nn.Identity()
        wide = heads * d_model if values == "collapsed" else d_model
        self.out = nn.Identity() if values == "none" else nn.Linear(wide, d_model, bias=False)  # type: ignore[assignment]

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [batch, head, token, width]; of keys and values that are x itself, one head's."""

        def split(t: Tensor, n_heads: int) -> Tensor:
            return t.unflatten(-1, (n_heads, -1)).transpose(1, 2)

        q = split(self.q(x), self.n_heads)
        k = split(self.k(x), self.n_heads if self.similarity in ("two", "shared") else 1)
        v = split(self.v(x), self.n_heads if self.values == "two" else 1)
        return q, k.expand(-1, self.n_kv_heads, -1, -1), v.expand(-1, self.n_kv_heads, -1, -1)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """Plain softmax attention."""
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=self.place.causal, scale=self.scale, enable_gqa=self.n_heads != self.n_kv_heads
        )

    def matrices(self) -> tuple[Tensor, Tensor]:
        """W^QK and W^VO of each head, [head, N, N], for rows x: scores are x W^QK xᵀ · scale, outputs A x W^VO."""
        h, n = self.n_heads, self.place.d_model
        eye = torch.eye(n, dtype=next(self.parameters()).dtype, device=next(self.parameters()).device)
        q = self.q(eye).unflatten(-1, (h, -1)).transpose(0, 1)  # [head, N, width]
        if self.similarity in ("two", "shared"):
            q = q @ self.k(eye).unflatten(-1, (h, -1)).permute(1, 2, 0)
        if self.values == "none":
            return q, eye[None]
        out: Tensor = self.out.weight.T.unflatten(0, (h, -1))  # [head, width, N]
        return q, out if self.values == "collapsed" else self.v(eye).unflatten(-1, (h, -1)).transpose(0, 1) @ out


class _Triangle(nn.Module):
    """x to x W of each head, with a symmetric W of N(N+1)/2 numbers: their sum with their transpose, or T Tᵀ."""

    def __init__(self, n: int, heads: int, positive: bool) -> None:
        super().__init__()
        self.n, self.heads, self.positive = n, heads, positive
        rows, columns = torch.tril_indices(n, n)
        self.register_buffer("at", rows * n + columns, persistent=False)
        self.entries = nn.Parameter(torch.randn(heads * len(rows)) * (n**-0.5 if positive else 0.5 * n**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        entries = self.entries.unflatten(0, (self.heads, -1))
        flat = entries.new_zeros(self.heads, self.n * self.n)
        lower = flat.index_copy(1, self.get_buffer("at"), entries).unflatten(1, (self.n, self.n))
        weight = lower @ lower.mT if self.positive else lower + lower.mT
        return torch.einsum("btn,hnm->bthm", x, weight).flatten(2) if x.dim() == 3 else self.forward(x[None])[0]


@torch.no_grad()
def collapse(layer: Reduced) -> Reduced:
    """The same layer with W^QK and W^VO in the place of the matrices that they are the products of."""
    similar, given = layer.matrices()
    made = Reduced(layer.place, heads=layer.n_heads).to(similar)
    made.scale = layer.scale
    made.q.weight.copy_(similar.transpose(1, 2).flatten(0, 1))  # type: ignore[operator]
    made.out.weight.copy_(given.flatten(0, 1).T)
    return made.train(layer.training)


@torch.no_grad()
def chain(layers: Sequence[Reduced]) -> tuple[list[Reduced], Tensor]:
    """Layers without values, and one matrix [N, N] after the last of them, that give what these give one by one.

    It holds where nothing lies between the layers: no residual connection, norm or MLP.

    Raises:
        WorkbenchError: no layers, or a layer of several heads, whose outputs are no product.
    """
    if not layers or not all(isinstance(layer, Reduced) for layer in layers):
        raise WorkbenchError("there are no layers of this mechanism to chain", hint="a list of them, in their order")
    made, so_far = [], torch.eye(layers[0].place.d_model).to(next(layers[0].parameters()))
    for layer in layers:
        if layer.n_heads > 1:
            raise WorkbenchError(f"{layer.n_heads} heads add up, and cannot be chained", hint="layers of one head")
        similar, given = layer.matrices()
        each = Reduced(layer.place, values="none").to(similar)
        each.scale = layer.scale
        each.q.weight.copy_((so_far @ similar[0] @ so_far.T).T)  # type: ignore[operator]
        made.append(each.train(layer.training))
        so_far = so_far @ given[0]
    return made, so_far


def _singular_values(module: nn.Module, pattern: Pattern) -> dict[str, Tensor]:
    """Of W^QK and of its skew part, each as shares of the largest of W^QK."""
    assert isinstance(module, Reduced)
    similar = module.matrices()[0]
    whole, skew = (torch.linalg.svdvals(each) for each in (similar, (similar - similar.mT) / 2))
    top = whole[:, :1].clamp(min=torch.finfo(whole.dtype).tiny)
    return {"W^QK": (whole / top)[:, None], "its skew part": (skew / top)[:, None]}


REDUCED = register(
    Mechanism(
        "reduced",
        Card(
            title="Reducing the Transformer to a Minimum",
            arxiv="2410.13732",
            equation="A = softmax(x W^QK xᵀ/√N), y = A x W^VO; W^QK symmetric, or W^VO left out, in its variants",
            map="Plain softmax attention; where values are x itself, all heads share them.",
            kind="self",
            grade="exact",
            cost="O(n²·N·heads), and 2N² parameters of the 4N² of attention in its collapsed form",
            causal="either",
            code="No official code was found.",
            claims=(
                Claim("Without its MLP a model of a third of the parameters generalises about as well on digits."),
                Claim("A symmetric similarity costs little accuracy, and saves a quarter of attention's parameters."),
                Claim("With one matrix for similarity and none for values it is a little worse."),
            ),
        ),
        Reduced,
        variants={
            "original": {"similarity": "two", "values": "two"},
            "shared": {"similarity": "shared", "values": "two"},
            "symmetric": {"similarity": "symmetric"},
            "positive": {"similarity": "positive"},
            "minimal": {"values": "none"},
        },
        signature=Signature(
            "How much of a similarity is symmetric",
            "Singular values of W^QK, and of the part of it that changes its sign where the two tokens change "
            "places, which is zero where the similarity is symmetric.",
            _singular_values,
            columns="number of the singular value",
            value="share of the largest",
        ),
    )
)
