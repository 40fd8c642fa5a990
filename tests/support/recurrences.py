"""Inputs of linear recurrences of every kind."""

import torch
from torch import Tensor

KINDS = ["linear", "decay", "channels", "delta", "gated delta", "kimi delta"]


def inputs(kind: str, n: int, *, b: int = 2, h: int = 4, d: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """In float64; uneven decays, some of which wipe the state out; keys of delta rules have unit length."""
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen, dtype=torch.float64)

    found = {"q": normal(b, h, n, d), "k": normal(b, h, n, d)}
    if kind in ("decay", "gated delta"):
        found["log_decay"] = -(2 * normal(b, h, n) - 2).exp()
    if kind in ("channels", "kimi delta"):
        found["log_decay"] = -(2 * normal(b, h, n, d) - 2).exp()
    if "delta" in kind:
        found["k"] = torch.nn.functional.normalize(found["k"], dim=-1)
        found["beta"] = 2 * normal(b, h, n).sigmoid()
    return found
