"""Attention deconstructed: what is left when one of its four principles is given up, causal and of equal size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.kernels.checks import check_range
from workbench.kernels.functions import attention_function
from workbench.kernels.masks import Mask
from workbench.kernels.patterns import DensePattern, Pattern
from workbench.kernels.scan import ScanPattern, scan_attention
from workbench.kernels.softmax import SoftmaxPattern
from workbench.kernels.taylor import TaylorPattern, taylor_attention
from workbench.mechanisms.frame import (
    Card,
    Claim,
    Mechanism,
    Mixer,
    Place,
    Signature,
    by_blocks,
    check_options,
    register,
)
from workbench.mechanisms.sqa import SparseQueryAttention

Source = Literal["random", "text", "embedding"]
_BLOCK = 8  # tokens, in the signature
LAYOUTS = ("uniform", "even", "odd", "top", "middle", "bottom", "quarter", "first", "last", "bilateral")


def _own(q: Tensor, k: Tensor) -> Pattern:
    n = k.shape[2]
    return DensePattern(
        torch.eye(n, dtype=k.dtype, device=k.device).expand(*q.shape[:2], n, n), Mask(n, n, causal=True)
    )


@attention_function(_own)
def own_token_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The values, [batch, head, token, width]: every token reads itself alone, and A is the identity."""
    return v.clone()


class NoMixing(Mixer):
    """An MLP in the place of attention, W_down(SiLU(W_gate x) · W_up x), as near to its size as whole widths allow."""

    def __init__(self, place: Place) -> None:
        super().__init__(place, n_heads=1)
        d = place.d_model
        self.d_head = round(4 * d / 3 + 1)  # attention's 4 d² + 3 d parameters, of three matrices
        self.q = self.k = nn.Identity()
        self.gate, self.v = (nn.Linear(d, self.d_head, bias=False) for _ in range(2))
        self.out = nn.Linear(self.d_head, d, bias=False)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Nothing to compare, [batch, 1, token, 1], twice; the gated hidden layer, [batch, 1, token, width]."""
        none = x.new_zeros(x.shape[0], 1, x.shape[1], 1)
        return none, none, (F.silu(self.gate(x)) * self.v(x))[:, None]

    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """The values."""
        return own_token_attention(q, k, v)


class Series(Mixer):
    """1 + x + x²/2 in the place of eˣ, divided by one sum (the paper's Approximate; its appendix has one an order)."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """All orders."""
        return taylor_attention(q, k, v)


class ScoresOfKeys(Mixer):
    """exp(s_j) / Σ_{l ≤ i} exp(s_l), s_j = SiLU(q_j)·k_j/√d: one score a key for all queries (Non-approximate)."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """A running softmax, whose state is one value and one sum."""
        scores = (F.silu(q) * k).sum(-1, keepdim=True) * self.d_head**-0.5
        return scan_attention(scores.new_ones(1, self.n_heads, 1, 1), scores, v, 1.0)


class FromElsewhere(Mixer):
    """Softmax attention whose queries and keys are not made of its input, but of what a model gives it beside.

    Args:
        place: where it stands.
        source: what that is. "random": the same random embeddings for every input, passed through the layers before.
            "text": likewise, a fixed text. "embedding": the embeddings of the input's tokens, without context.

    Alone, without a model around it, it takes what a first layer would have: drawn rows for the first two, x itself
    for the third.
    """

    def __init__(self, place: Place, source: Source = "random") -> None:
        super().__init__(place)
        if source not in ("random", "text", "embedding"):
            raise WorkbenchError(f'source="{source}" is not known', hint='"random", "text" or "embedding"')
        self.source = source
        self.register_buffer("drawn", drawn_rows(place), persistent=False)

    def heads(self, x: Tensor, source: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys of the source, values of x."""
        if source is None:
            source = x if self.source == "embedding" else self.get_buffer("drawn")[None, : x.shape[1]].to(x)
        q, k = (self.turned(self.split(each(source))).expand(len(x), -1, -1, -1) for each in (self.q, self.k))
        return q, k, self.split(self.v(x))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """Plain softmax attention."""
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        """[batch, token, d_model] to the same shape.

        Args:
            source: what queries and keys are made of, [1 or batch, token, d_model].
        """
        self.check(x)
        if source is not None and (source.shape[1:] != x.shape[1:] or len(source) not in (1, len(x))):
            raise WorkbenchError(
                f"the source must be [1 or {len(x)}, {x.shape[1]}, {x.shape[2]}]", shape=source.shape,
                hint="as many tokens as x, for all examples at once or for each",
            )  # fmt: skip
        q, k, v = self.heads(x, source)
        return self.finish(self.mix(q, k, v, x), v, x)


def drawn_rows(place: Place) -> Tensor:
    """[token, d_model]: the random embeddings, always the same, of the size that embeddings have."""
    random = torch.Generator().manual_seed(0)
    return torch.randn(place.length, place.d_model, generator=random) * place.d_model**-0.5


_FORMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "standard": (SparseQueryAttention, {"heads": 1.0, "kv_heads": 1.0}),
    "mlp": (NoMixing, {}),
    "taylor": (Series, {}),
    "keys": (ScoresOfKeys, {}),
    "random": (FromElsewhere, {"source": "random"}),
    "text": (FromElsewhere, {"source": "text"}),
    "embedding": (FromElsewhere, {"source": "embedding"}),
}


def deconstructed(place: Place, form: str = "taylor", **options: Any) -> Mixer:
    """The module of a form.

    Raises:
        WorkbenchError: there is no such form, or it has no such options.
    """
    if form not in _FORMS:
        raise WorkbenchError(f'form="{form}" is not known', hint=", ".join(_FORMS))
    make, own = _FORMS[form]
    check_options(f"deconstructed:{form}", make, options)
    mixer: Mixer = make(place, **{**own, **options})
    return mixer


def laid_out(form: str, layout: str, n_layers: int, standard: str = "deconstructed:standard") -> list[str]:
    """What each layer is, where some stay standard attention: names for `ByteLM` and the training script.

    Args:
        form: of the other layers: a mechanism, with its variant behind a colon.
        layout: which layers stay, counted from one. "uniform": none; "even", "odd"; "top": the first half;
            "bottom": the second; "middle": all but the half in the middle; "quarter": every fourth; "first", "last";
            "bilateral": both of these. The paper's names, for as many layers as there are.

    Raises:
        WorkbenchError: unknown layout, or too few layers for it to have both.

    >>> laid_out("deconstructed:mlp", "even", 4)[:2]
    ['deconstructed:mlp', 'deconstructed:standard']
    """
    check_range("n_layers", n_layers, 0, None)
    n = n_layers
    kept: dict[str, Sequence[int]] = {
        "uniform": (),
        "even": range(2, n + 1, 2),
        "odd": range(1, n + 1, 2),
        "top": range(1, n // 2 + 1),
        "middle": (*range(1, n // 4 + 1), *range(n - n // 4 + 1, n + 1)),
        "bottom": range(n // 2 + 1, n + 1),
        "quarter": range(4, n + 1, 4),
        "first": (1,),
        "last": (n,),
        "bilateral": (1, n),
    }
    if layout not in kept:
        raise WorkbenchError(f'layout="{layout}" is not known', hint=", ".join(LAYOUTS))
    stays = set(kept[layout])
    if n < 1 or (layout != "uniform" and not 0 < len(stays) < n):
        raise WorkbenchError(
            f'{n} layers are too few for the layout "{layout}"', hint="more layers, so that some stay and some do not"
        )
    return [standard if at in stays else form for at in range(1, n + 1)]


def _beside_softmax(module: nn.Module, pattern: Pattern) -> dict[str, Tensor]:
    """What a variant makes of its scores, beside what softmax makes of them; in blocks of tokens."""
    if isinstance(pattern, ScanPattern):
        others = {"one score a key": pattern.dense()[0]}
    elif isinstance(pattern, TaylorPattern):
        softmax = SoftmaxPattern(pattern.q, pattern.k, pattern.mask, scale=pattern.scale)
        others = {"polynomial": pattern.dense()[0], "softmax of its scores": softmax.dense()[0]}
    else:
        return {}
    return {name: by_blocks(weights, _BLOCK) for name, weights in others.items()}


DECONSTRUCTED = register(
    Mechanism(
        "deconstructed",
        Card(
            title="Deconstructing Attention",
            arxiv="2510.11602",
            equation="t(s_ij) / Σ_{l ≤ i} t(s_il), t(s) = 1 + s + s²/2; exp(s_j) / Σ_{l ≤ i} exp(s_l); softmax with q "
            "and k from elsewhere; the identity",
            map="Of each variant its own: a polynomial in the place of exp; one score a key, the same for all queries; "
            "a softmax of fixed or of uncontextualised queries and keys; the identity for the MLP.",
            kind="self",
            grade="exact",
            cost="O(n·d²) a head for “taylor”, O(n) for “keys” and the MLP, O(n²) for the others",
            causal="always",
            code="HUIYINXUE/DeconAttn is announced; it was not read.",
            claims=(
                Claim("Mixing tokens is indispensable: with an MLP in every layer a model learns little."),
                Claim("Where some layers stay standard, all other variants come near to standard attention."),
                Claim("Alone, the polynomial is nearest to it; fixed queries and keys, or one score a key, are worse."),
            ),
        ),
        deconstructed,
        variants={form: {"form": form} for form in _FORMS},
        signature=Signature(
            "What a polynomial makes of scores",
            f"Beside each map the softmax of the same scores, in blocks of {_BLOCK} tokens: what a query gives to the "
            "block, a mean over its own.",
            _beside_softmax,
            rows="block of queries",
            columns="block of keys",
        ),
    )
)
