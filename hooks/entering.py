"""What each head of a module that has a reader gives to the projection that joins the heads.

Past the heads' output z such a module goes on to a norm, a gate, a skip, and a linear layer. What this is given is cut
into heads here, so that what the module writes is a sum over heads, with norm and gate as they were in this run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from workbench.hooks.projections import is_linear

_ROUNDING = 1e-5, 8  # by how much vectors that are the same may differ, of their length; in units of the last place


@dataclass(frozen=True)
class Entering:
    """What the heads of a module give to its last linear layer.

    Attributes:
        name: of the layer, inside the module. module: the layer.
        heads: [batch, head, query, width], whose columns lie head by head in what the layer is given.
    """

    name: str
    module: nn.Module
    heads: Tensor


def entering(module: nn.Module, finish: Callable[[Tensor], Tensor], z: Tensor) -> Entering | None:
    """What `finish` makes of z [batch, head, query, width] on its way to the linear layer that ends it.

    None where it does not end in one, or where this is given something else than positions of heads.
    """
    watch = _Linears()
    with watch:
        result = finish(z)
    given, weight, made = watch.last
    if given is None or made is None or made.numel() != result.numel() or given.dim() != 3:
        return None
    if not torch.equal(made.detach().reshape(result.shape), result.detach()):
        return None
    found = next(((n, m) for n, m in module.named_modules() if is_linear(m) and m.weight is weight), None)
    if found is None or given.shape[1] != z.shape[2] or given.shape[2] % z.shape[1]:
        return None
    return Entering(*found, given.unflatten(-1, (z.shape[1], -1)).transpose(1, 2))


def own_columns(module: nn.Module, finish: Callable[[Tensor], Tensor], z: Tensor, found: Entering) -> bool:
    """Whether each head has those columns that are its own: the others hear of it through a common factor at most.

    A norm over several heads is such a factor at each position. The first, the middle and the last head are tried.
    """
    n, generator = z.shape[1], torch.Generator().manual_seed(0)
    for head in sorted({0, n // 2, n - 1}):
        noise = torch.randn(z[:, head].shape, generator=generator).to(z) * (z.detach().abs().mean() + 1e-3)
        again = entering(module, finish, torch.cat((z[:, :head], (z[:, head] + noise)[:, None], z[:, head + 1 :]), 1))
        if again is None or torch.equal(again.heads[:, head], found.heads[:, head]):
            return False
        others = [other for other in range(n) if other != head]
        if not _proportional(found.heads[:, others].detach(), again.heads[:, others].detach()):
            return False
    return True


def _proportional(a: Tensor, b: Tensor) -> bool:
    """Whether b [..., width] is a times a number for each vector; for vectors of one number, whether both are equal."""
    allowed = max(_ROUNDING[0], _ROUNDING[1] * torch.finfo(a.dtype).eps)
    a, b = a.double(), b.double()
    factor = (a * b).sum(-1, keepdim=True) / (a * a).sum(-1, keepdim=True).clamp_min(1e-300)
    factor = factor if a.shape[-1] > 1 else torch.ones_like(factor)
    size = b.norm(dim=-1)
    return bool(((b - factor * a).norm(dim=-1) <= allowed * (size + 1e-3 * size.mean())).all())


class _Linears(TorchFunctionMode):
    """Keeps the last linear function that is applied: what it was given, its weight, and what it made."""

    last: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is nn.functional.linear and len(args) > 1:
            self.last = args[0], args[1], made
        return made
