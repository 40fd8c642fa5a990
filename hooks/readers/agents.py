"""Reads agent attention of the package agent-attention-pytorch: its two softmaxes, with or without talking heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.hooks.readers.registered import Mixing, ModuleRun, reader
from workbench.hooks.readers.state_space import has
from workbench.kernels.composed import ComposedPattern
from workbench.kernels.patterns import DensePattern, Pattern, SignedPattern

_PARTS = has("to_qkv", "to_gates", "qa_talking_heads", "ak_talking_heads", "to_out")


@reader("agent_attention_pytorch.agent_attention_pytorch.AgentSelfAttention", kind="self", when=_PARTS)
def agents(run: ModuleRun) -> Mixing:
    """Agents are parameters, or are given."""
    module: Any = run.module
    x, given = run.inputs["x"], run.inputs.get("agent_tokens")
    q, k, v = module.to_qkv.forward(x)
    marks = module.agent_tokens.expand(len(x), -1, -1, -1) if given is None else given
    marks = marks * module.scale
    return _mixing(run, q @ marks.mT, marks @ k.mT, v, x)


@reader("agent_attention_pytorch.agent_transformer.AgentSelfAttention", kind="self", when=_PARTS)
def agents_of_transformer(run: ModuleRun) -> Mixing:
    """Agents are tokens of their own, with queries and keys; what becomes of them is the module's second output."""
    module: Any = run.module
    x, tokens = module.norm.forward(run.inputs["x"]), module.norm.forward(run.inputs["agent_tokens"])
    q, k, v = module.to_qkv.forward(torch.cat((tokens, x), dim=1))
    n = tokens.shape[1]
    spread = q[:, :, n:] * module.scale @ k[:, :, :n].mT
    gather = q[:, :, :n] * module.scale @ k[:, :, n:].mT
    return _mixing(run, spread, gather, v[:, :, n:], x)


def _mixing(run: ModuleRun, spread: Tensor, gather: Tensor, v: Tensor, x: Tensor) -> Mixing:
    module: Any = run.module
    mask = run.inputs.get("mask")
    if mask is not None:
        gather = gather.masked_fill(~mask[:, None, None, :], -torch.finfo(gather.dtype).max)

    def factor(scores: Tensor, talking: Any) -> Pattern:
        weights = scores.softmax(-1)
        mixed = talking.forward(weights)
        return DensePattern(weights) if mixed is weights else SignedPattern(mixed)

    def finish(z: Tensor) -> Tensor:
        y = z.to(x.dtype)
        y = y if mask is None else y.masked_fill(~mask[:, None, :, None], 0.0)
        y = y if module.to_gates is None else y * module.to_gates.forward(x)
        out: Tensor = module.to_out.forward(y)
        return out

    factors = {
        "broadcast": factor(spread, module.qa_talking_heads),
        "aggregate": factor(gather, module.ak_talking_heads),
    }
    return Mixing(ComposedPattern(factors, values=v), v, finish, "agent")
