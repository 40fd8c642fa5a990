"""How far a layer reaches: which tokens move one of its outputs, and how many of them do most of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from workbench.errors import WorkbenchError


def receptive_field(layer: Callable[[Tensor], Tensor], x: Tensor, token: int) -> Tensor:
    """[batch, token]: ‖∂y_t/∂x_j‖ of one output y_t, over all features of both; a surrogate for what it reads.

    Takes one backward pass for each feature of the output, and sees all that the layer does: maps, convolutions, gates.

    Args:
        layer: [batch, token, d_model] to [batch, token, …]. x: what it is given.

    Raises:
        WorkbenchError: there is no such token.

    >>> receptive_field(torch.nn.Identity(), torch.zeros(1, 4, 2), 1)[0].gt(0).tolist()
    [False, True, False, False]
    """
    if not -x.shape[1] <= token < x.shape[1]:
        raise WorkbenchError(
            f"there are {x.shape[1]} tokens, and no token {token}", shape=x.shape, hint=f"0 to {x.shape[1] - 1}"
        )
    with torch.enable_grad():
        live = x.detach().requires_grad_()
        y = layer(live)[:, token]
        parts = [torch.autograd.grad(y[:, c].sum(), live, retain_graph=True)[0] for c in range(y.shape[-1])]
    return torch.stack([part.square().sum(-1) for part in parts]).sum(0).sqrt()


def field_area(field: Tensor, share: float) -> Tensor:
    """[batch] the fewest tokens that hold a share of a receptive field [batch, token].

    Raises:
        WorkbenchError: a share that is none.

    >>> field_area(torch.tensor([[1.0, 5.0, 4.0]]), 0.9)
    tensor([2])
    """
    if not 0 < share <= 1:
        raise WorkbenchError(f"share={share} is not above 0 and at most 1")
    sorted_down = field.double().sort(dim=1, descending=True).values
    held = sorted_down.cumsum(1) / sorted_down.sum(1, keepdim=True)
    return (held < share - 1e-12).sum(1) + 1
