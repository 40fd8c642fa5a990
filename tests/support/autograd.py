"""Gradients of attention weights from autograd: the same model on attention that is written out in its own dtype."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from support.tiny import eager_twin

Seen = dict[str, tuple[Tensor, Tensor]]  # site -> (weights, heads' output), both with their gradients


@contextmanager
def written_out(model: nn.Module) -> Iterator[tuple[nn.Module, Seen]]:
    """A twin of the model, in its dtype, and what its attention modules compute; Hugging Face's eager attention has
    softmaxes in float32 whatever the dtype.
    """
    twin = eager_twin(model).to(next(model.parameters()).dtype)
    names = {module: name for name, module in twin.named_modules()}
    seen: Seen = {}

    def attention(
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scaling: float | None = None,
        **more: Any,
    ) -> tuple[Tensor, Tensor]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
        for bias in (more.get("position_bias"), mask):
            scores = scores if bias is None else scores + bias.to(scores.dtype)
        weights = scores.softmax(-1)
        z = weights @ v
        weights.retain_grad()
        z.retain_grad()
        seen[names[module]] = weights, z
        return z.transpose(1, 2).contiguous(), weights

    AttentionInterface.register("written_out_for_tests", attention)
    AttentionMaskInterface.register("written_out_for_tests", eager_mask)
    try:
        twin.set_attn_implementation("written_out_for_tests")
        yield twin, seen
    finally:
        for registry in (AttentionInterface, AttentionMaskInterface):
            registry._global_mapping.pop("written_out_for_tests", None)


def sums_of(weights: Tensor) -> dict[str, Tensor]:
    """The definitions of `GRADIENT_SUMS`, from weights [batch, head, query, key] that hold their gradient."""
    product = (weights * weights.grad).detach()
    return {
        "query_gradient": product.sum(-1),
        "key_gradient": product.sum(-2),
        "head_gradient": product.sum((-1, -2)),
        "key_gradient_magnitude": product.abs().sum(-2),
    }


def loss_of(output: Any, inputs: dict[str, Any]) -> Tensor:
    """A loss in which every real position of the output has weights of its own."""
    out = output["logits"] if "logits" in output else output["last_hidden_state"]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(out.dtype)
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape == out.shape[:2]:
        weights = weights * mask[..., None].to(out.dtype)
    return (out * weights).sum()
