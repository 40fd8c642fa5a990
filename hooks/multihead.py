"""The tap on PyTorch's own attention modules: `nn.MultiheadAttention` and the `nn.Transformer*` layers.

In inference they run one native operator that never calls SDPA, and they leave that path when they notice a function
mode or a hook on the module. So this tap looks from below, at operators: the module takes the path it always takes.
It knows the native operators, the fused SDPA kernels, and attention written out as product, softmax, product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from workbench.errors import CaptureError
from workbench.hooks.kernel_watch import SOFTMAX_OPERATORS, KernelWatch, kernel_lse, kernel_name
from workbench.hooks.tap import AttentionCall

MODULES = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)
"""Modules that choose a native path; inside them this tap replaces the SDPA tap."""

_ATEN = torch.ops.aten
_NATIVE = {_ATEN._native_multi_head_attention.default, _ATEN._transformer_encoder_layer_fwd.default}
_PRODUCTS = {_ATEN.bmm.default, _ATEN.baddbmm.default}


def watch(owner: Callable[[], tuple[str, nn.Module]], on_call: Callable[[AttentionCall], Any]) -> KernelWatch:
    """A context that reports the attention calls of PyTorch's modules.

    Args:
        owner: gives the name and module of the innermost module that is running.
        on_call: takes each call.
    """
    return KernelWatch(_Recogniser(owner, on_call), _NATIVE)


class _Recogniser:
    """Recognises attention in a stream of operators."""

    def __init__(self, owner: Callable[[], tuple[str, nn.Module]], on_call: Callable[[AttentionCall], Any]) -> None:
        self._owner, self._on_call = owner, on_call
        self._product: tuple[Tensor, Tensor, Tensor | None, Tensor] | None = None  # q, kᵀ, bias, scores
        self._scores: tuple[Tensor, Tensor, Tensor | None] | None = None  # the product that the last softmax took

    def __call__(self, op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        if op is _ATEN._native_multi_head_attention.default:
            self._native_attention(args, kwargs, result)
        elif op is _ATEN._transformer_encoder_layer_fwd.default:
            self._native_layer(args, kwargs, result)
        elif kernel_name(op) is not None and op._schema.name.count("backward") == 0:
            self._fused(op, args, kwargs, result)
        elif op in _PRODUCTS:
            self._written_out(op, args, result)
        elif (
            op in SOFTMAX_OPERATORS and self._product is not None and args[0].data_ptr() == self._product[3].data_ptr()
        ):
            self._scores = self._product[:3]

    def _report(self, **facts: Any) -> None:
        site, module = self._owner()
        if isinstance(module, nn.TransformerEncoderLayer):  # the native layer never enters its attention module
            site, module = f"{site}.self_attn".lstrip("."), module.self_attn
        self._on_call(AttentionCall(site=site, module=module, tap="multihead", **facts))

    def _fused(self, op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        given = _named(op, args, kwargs)
        site, module = self._owner()
        self._on_call(
            AttentionCall(
                site=site,
                module=module,
                q=given["query"],
                k=given["key"],
                v=given["value"],
                mask=given.get("attn_mask", given.get("attn_bias")),
                is_causal=bool(given.get("is_causal", False)),
                scale=given.get("scale"),
                dropout=float(given.get("dropout_p") or 0.0),
                output=result[0],
                lse=kernel_lse(result, given["query"].shape[-2]),
                kernel=kernel_name(op) or "",
                tap="multihead",
            )
        )

    def _written_out(self, op: OpOverload, args: Sequence[Any], result: Tensor) -> None:
        """scores = q·kᵀ (+ bias), weights = softmax(scores), output = weights·v, on [batch · head, position, d]."""
        if self._scores is None:
            bias, q, k_t = args[:3] if op is _ATEN.baddbmm.default else (None, *args[:2])
            self._product = (q, k_t, bias, result)
            return
        (q, k_t, bias), v = self._scores, args[1]
        self._product = self._scores = None
        heads = getattr(self._owner()[1], "num_heads", 1)
        if bias is not None and bias.shape[0] not in (1, q.shape[0]):
            raise CaptureError("an attention bias that fits no head", site=self._owner()[0], shape=bias.shape)

        def split(t: Tensor) -> Tensor:
            return t.unflatten(0, (-1, heads))

        self._report(
            q=split(q),
            k=split(k_t.transpose(-1, -2)),
            v=split(v),
            mask=None if bias is None else bias[None] if bias.shape[0] == 1 else split(bias),
            scale=1.0,  # the module has scaled q already
            output=split(result),
            kernel="math",
        )

    def _native_attention(self, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        given = _named(_ATEN._native_multi_head_attention.default, args, kwargs)
        q, k, v = _project(given["query"], given["qkv_weight"], given["qkv_bias"], given["num_head"], self._owner()[0])

        def finish(z: Tensor) -> Tensor:
            return nn.functional.linear(_join(z), given["proj_weight"].to(z.dtype), given["proj_bias"].to(z.dtype))

        self._report(
            q=q,
            k=k,
            v=v,
            mask=_native_mask(given["mask"], given["mask_type"]),
            output=result[0],
            kernel="native_multi_head_attention",
            finish=finish,
        )

    def _native_layer(self, args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor) -> None:
        given = _named(_ATEN._transformer_encoder_layer_fwd.default, args, kwargs)
        x = given["src"]

        def norm(t: Tensor, which: int) -> Tensor:
            weight, bias = given[f"norm_weight_{which}"].to(t.dtype), given[f"norm_bias_{which}"].to(t.dtype)
            return nn.functional.layer_norm(t, t.shape[-1:], weight, bias, given["eps"])

        q, k, v = _project(
            norm(x, 1) if given["norm_first"] else x,
            given["qkv_weight"], given["qkv_bias"], given["num_heads"], self._owner()[0],
        )  # fmt: skip

        def linear(t: Tensor, part: str) -> Tensor:
            kind, _, number = part.partition("_")
            ending = f"_{number}" if number else ""
            weight, bias = given[f"{kind}_weight{ending}"], given[f"{kind}_bias{ending}"]
            return nn.functional.linear(t, weight.to(t.dtype), bias.to(t.dtype))

        def finish(z: Tensor) -> Tensor:
            attended = x.to(z.dtype) + linear(_join(z), "proj")
            if not given["norm_first"]:
                attended = norm(attended, 1)
            inner = linear(norm(attended, 2) if given["norm_first"] else attended, "ffn_1")
            inner = nn.functional.gelu(inner) if given["use_gelu"] else inner.relu()
            out = attended + linear(inner, "ffn_2")
            return out if given["norm_first"] else norm(out, 2)

        self._report(
            q=q,
            k=k,
            v=v,
            mask=_native_mask(given["mask"], given["mask_type"]),
            output=result,
            kernel="transformer_encoder_layer_fwd",
            finish=finish,
        )


def _named(op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an operator's call by the names of its schema, defaults included."""
    parameters = op._schema.arguments
    given = dict(zip((p.name for p in parameters), args, strict=False))
    return {p.name: p.default_value for p in parameters} | given | dict(kwargs)


def _project(x: Tensor, weight: Tensor, bias: Tensor, heads: int, site: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [batch, head, position, d] from the packed projection that the native operator does inside."""
    if x.is_nested:
        raise CaptureError(
            "the layer runs on a nested tensor, whose attention cannot be read",
            site=site,
            hint="build the nn.TransformerEncoder with enable_nested_tensor=False",
        )
    q, k, v = nn.functional.linear(x, weight, bias).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _join(z: Tensor) -> Tensor:
    """[batch, head, position, d] -> [batch, position, head · d]."""
    return z.transpose(1, 2).flatten(2)


def _native_mask(mask: Tensor | None, kind: int | None) -> Tensor | None:
    """The native operators' mask (nonzero: hidden) as boolean, True: may see."""
    if mask is None:
        return None
    shown = ~mask.to(torch.bool)
    return shown[:, None, None, :] if kind == 1 else shown  # 1: key padding [batch, key]
