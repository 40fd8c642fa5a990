"""Reads xLSTM's mLSTM layers of Hugging Face transformers: a matrix memory with a gate to write and one to forget.

h_i = C_i q_i / max(|n_i·q_i|, 1), where C fades by σ(f) and takes in e^i k vᵀ, and n is the same of the keys alone.
The denominator is a number for each row, and so is part of the map; a norm for each head, the output gate and the
projection follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.hooks.readers.registered import Mixing, ModuleRun, reader
from workbench.hooks.readers.state_space import carried, check_run, has
from workbench.kernels.recurrent import RecurrentPattern


def _continues(module: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """A cache begins with zeros."""
    state: Any = inputs.get("state")
    return state is not None and any(bool((part != 0).any()) for part in state)


def _held(module: nn.Module, inputs: Mapping[str, Any], output: Any) -> dict[str, Tensor] | None:
    state = inputs.get("state") if output is None else output[1]
    return None if state is None else dict(zip(("C", "n", "m"), state, strict=True))


@reader(
    "xLSTMLayer", when=has("mlstm_backend", "multihead_norm", "ogate_act_fn", "out_proj"), continues=_continues,
    state=_held,
)  # fmt: skip
def mlstm(run: ModuleRun) -> Mixing:
    """The gates are soft-capped, so that the map needs no stabiliser; only its ε knows of that."""
    check_run(run)
    module: Any = run.module
    x = run.inputs["x"]
    q, k, v, gate, write, forget = _projected(module, x)
    eps = module.config.eps
    log_decay = F.logsigmoid(forget.float())
    largest = carried(run, "m")  # what a running maximum of exponents has come to, which states are divided by
    start = log_decay.new_zeros(*log_decay.shape[:2], 1) if largest is None else largest.view(*log_decay.shape[:2], 1)
    total = log_decay.double().cumsum(-1)
    m = total + torch.maximum(start.double(), (write.double() - total).cummax(-1).values)
    q, k, v = q.float() * q.shape[-1] ** -0.5, k.float() * write.float().exp()[..., None], v.float()
    plain = RecurrentPattern(q, k, log_decay)
    n = plain.apply(torch.ones_like(v[..., :1]))
    state = None
    if run.carried is not None:
        both = torch.cat((run.carried["C"], run.carried["n"][..., None]), dim=-1).float()
        both = both * start.float().exp()[..., None]
        state = both[..., :-1]
        n = n + plain.from_state(both[..., -1:])
    size = n.abs().squeeze(-1).clamp(min=1) + eps * m.exp().to(n)
    pattern = RecurrentPattern(q / size[..., None], k, log_decay, values=v)
    if state is not None:
        pattern.before = pattern.from_state(state)

    def finish(z: Tensor) -> Tensor:
        y = module.multihead_norm.forward(z.transpose(1, 2).to(x.dtype)).flatten(2)
        out: Tensor = module.out_proj.forward(gate.sigmoid() * y)
        return out

    return Mixing(pattern, v, finish, "mlstm", queries=q, keys=k)


def _projected(module: Any, x: Tensor) -> tuple[Tensor, ...]:
    """q, k, v [batch, head, position, d], the output gate [batch, position, width], and both gates of the memory."""
    if hasattr(module, "qkv_opreact"):
        widths = (module.qk_dim, module.qk_dim, module.v_dim, module.v_dim)
        q, k, v, gate = module.qkv_opreact.forward(x).split(widths, dim=-1)
        write, forget = _capped(module, module.ifgate_preact.forward(x)).chunk(2, dim=-1)
    else:
        q, k, v, gate = (part.forward(x) for part in (module.q, module.k, module.v, module.ogate_preact))
        write, forget = (_capped(module, part.forward(x)) for part in (module.igate_preact, module.fgate_preact))
    q, k, v = (t.unflatten(-1, (write.shape[-1], -1)).transpose(1, 2) for t in (q, k, v))
    return q, k, v, gate, write.transpose(1, 2), forget.transpose(1, 2)


def _capped(module: Any, gate: Tensor) -> Tensor:
    cap = module.config.gate_soft_cap
    return gate if cap is None else cap * torch.tanh(gate / cap)
