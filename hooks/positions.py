"""Token positions that an intervention touches: given once, resolved for each call's batch size and length."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import InterventionError

Where = int | slice | Sequence[int] | Tensor | None


class Positions:
    """Positions along the query axis of a call; negative ones count from its end.

    Args:
        given: None for all; an int, a slice or a sequence of ints, for every example; a bool tensor [position] or
            [batch, position], True: touched; an integer tensor [n] for every example, or [batch, n] with n positions
            for each.

    Raises:
        InterventionError: it is none of these, or empty.

    >>> Positions([0, -1]).mask(1, 4).int().tolist()
    [[1, 0, 0, 1]]
    >>> Positions(torch.tensor([[0], [2]])).mask(2, 3).int().tolist()
    [[1, 0, 0], [0, 0, 1]]
    """

    def __init__(self, given: Where = None) -> None:
        self._slice: slice | None = None
        self._tensor: Tensor | None = None
        if isinstance(given, slice):
            self._slice = given
        elif isinstance(given, Tensor):
            self._tensor = _checked(given)
        elif given is not None:
            self._tensor = torch.tensor(_integers(given), dtype=torch.long)[None]

    @property
    def everywhere(self) -> bool:
        """Whether all positions are meant."""
        return self._slice is None and self._tensor is None

    def mask(self, batch: int, length: int, site: str | None = None, device: torch.device | None = None) -> Tensor:
        """[batch or 1, length] bool, True where a position is touched.

        Raises:
            InterventionError: a position is out of range, the batch size does not fit, or none is touched.
        """
        if self._tensor is None or self._tensor.dtype != torch.bool:
            index = self.index(batch, length, site, device)
            return torch.zeros(index.shape[0], length, dtype=torch.bool, device=index.device).scatter(1, index, True)
        mask = self._tensor
        if mask.shape[0] not in (1, batch) or mask.shape[1] != length:
            raise InterventionError(
                f"positions are a mask {list(mask.shape)}, the call has {batch} examples of {length} positions",
                site=site,
            )
        if not bool(mask.any()):
            raise InterventionError("positions choose nothing: the mask is False everywhere", site=site)
        return mask.to(device)

    def index(self, batch: int, length: int, site: str | None = None, device: torch.device | None = None) -> Tensor:
        """[batch or 1, n] of the touched positions, counted from 0.

        Raises:
            InterventionError: as for `mask`; or a mask that touches more positions of one example than of another.
        """
        if self._tensor is None:
            index = torch.arange(length, device=device)[self._slice if self._slice is not None else slice(None)][None]
            if index.numel() == 0:
                raise InterventionError(f"positions {self._slice} choose none of {length}", site=site)
            return index
        if self._tensor.dtype == torch.bool:
            mask = self.mask(batch, length, site, device)
            counts = mask.sum(-1)
            if bool((counts != counts[0]).any()):
                raise InterventionError(
                    f"positions choose {counts.tolist()} positions of the examples, which must be as many of each",
                    site=site,
                    hint="run the examples one by one, or choose the positions of the longest",
                )
            return mask.nonzero()[:, 1].view(mask.shape[0], -1)
        index = self._tensor
        if index.shape[0] not in (1, batch):
            raise InterventionError(
                f"positions are given for {index.shape[0]} examples, the call has {batch}",
                site=site,
                shape=index.shape,
                hint="a tensor [n] holds for every example",
            )
        bad = index[(index < -length) | (index >= length)]
        if bad.numel():
            raise InterventionError(
                f"there is no position {int(bad[0])}: the call has {length} queries, −{length} to {length - 1}",
                site=site,
            )
        return index.to(device) % length


def positions_first(name: str, module: nn.Module, sizes: tuple[int, ...], given: tuple[int, ...]) -> bool:
    """Whether a module's output is [position, batch, d_model]: as PyTorch's own layers say, or the model's inputs show.

    Args:
        sizes: the first two of the output. given: those of what the model was given; () where that is not known.

    Raises:
        InterventionError: layers of PyTorch's inside a module have positions first, and nothing shows whether it has.
    """
    attention = next((part for part in module.modules() if isinstance(part, nn.MultiheadAttention)), None)
    stated = attention is not None and not attention.batch_first
    turned = sizes == given[::-1] and sizes[0] != sizes[-1]
    if not stated or turned or not given or type(module).__module__.startswith("torch.nn."):
        return stated or turned
    raise InterventionError(
        "attention inside the module has positions first, and whether its output has cannot be told",
        site=name, shape=sizes, hint="steer the attention itself, or heads of it, or all positions",
    )  # fmt: skip


def _integers(given: Any) -> list[int]:
    several = [given] if isinstance(given, bool) or not hasattr(given, "__iter__") else list(given)
    try:
        if any(isinstance(one, bool) for one in several):
            raise TypeError
        found = [operator.index(one) for one in several]
    except TypeError:
        raise InterventionError(
            f"positions are None, an int, a slice, ints or a tensor, not {given!r}",
            hint="a mask is a bool tensor [batch, position]",
        ) from None
    if not found:
        raise InterventionError("positions choose nothing: the list is empty", hint="None chooses all")
    return found


def _checked(given: Tensor) -> Tensor:
    integer = not given.is_floating_point() and not given.is_complex() and given.dtype != torch.bool
    given = given.reshape(1) if integer and given.dim() == 0 else given
    if not (integer or given.dtype == torch.bool) or given.dim() not in (1, 2):
        raise InterventionError(
            f"positions are a bool or integer tensor [position] or [batch, position], not {given.dtype}",
            shape=given.shape,
        )
    if given.numel() == 0:
        raise InterventionError("positions choose nothing: the tensor is empty", shape=given.shape)
    given = given.detach()
    given = given if given.dtype == torch.bool else given.long()
    return given if given.dim() == 2 else given[None]
