"""Feature maps φ of keys and queries: what a linear memory compares in place of k and q themselves."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from workbench.errors import WorkbenchError, nearest

FeatureMap = Callable[[Tensor], Tensor]
FEATURES = ("identity", "elu+1", "relu", "exp", "softmax")


def feature_map(name: str, d_k: int, *, n_random: int | None = None, seed: int = 0) -> tuple[FeatureMap, int]:
    """A feature map [..., d_k] -> [..., features] and its number of features.

    "identity"; "elu+1" (Katharopoulos et al., arXiv 2006.16236); "relu"; "exp", positive random features whose product
    is exp(q·k) on average (Choromanski et al., arXiv 2009.14794, eq. 7); "softmax", each vector's softmax over its own
    features (Shen et al., arXiv 1812.01243).

    Args:
        name: which map.
        d_k: width of the keys.
        n_random, seed: number of random features of "exp" (4·d_k if None), and the seed they are drawn with.

    Raises:
        WorkbenchError: there is no such map, or no feature.

    >>> phi, width = feature_map("elu+1", 2)
    >>> phi(torch.tensor([1.0, 0.0])).tolist(), width
    ([2.0, 1.0], 2)
    """
    if name not in FEATURES:
        raise WorkbenchError(f'there is no feature map "{name}"', hint=nearest(name, FEATURES))
    if name == "exp":
        width = 4 * d_k if n_random is None else n_random
        if width < 1:
            raise WorkbenchError(f"n_random is {width}; a feature map has at least one feature")
        directions = torch.randn(width, d_k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return partial(_positive_random, directions), width
    maps: dict[str, FeatureMap] = {"identity": _identity, "elu+1": _elu_plus_one, "relu": torch.relu, "softmax": _soft}
    return maps[name], d_k


def _identity(x: Tensor) -> Tensor:
    return x


def _elu_plus_one(x: Tensor) -> Tensor:
    return torch.nn.functional.elu(x) + 1


def _soft(x: Tensor) -> Tensor:
    return x.softmax(-1)


def _positive_random(directions: Tensor, x: Tensor) -> Tensor:
    """exp(w·x − ‖x‖²/2) / √m for each of m random directions w."""
    exponents = x @ directions.to(x).T - (x * x).sum(-1, keepdim=True) / 2
    return exponents.exp() * len(directions) ** -0.5


def unit(x: Tensor) -> Tensor:
    """Vectors scaled to length 1; those of length 0 stay 0.

    >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    length = x.norm(dim=-1, keepdim=True)
    return torch.where(length > 0, x / length.clamp(min=torch.finfo(x.dtype).tiny), 0.0)
