"""Finds the module that joins the heads of a site: the first linear one that is called with exactly their outputs.

It is found while a forward runs, by value, so that no model needs to be known by name. Where something changes the
heads' outputs on the way (a gate, a norm), nothing is found: a head then has no linear part in what follows.
"""

from __future__ import annotations

import sys
import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import CaptureError
from workbench.hooks.weights import matrix


@dataclass(frozen=True)
class Projection:
    """The output projection of a site. It does not keep the model alive, and a pickle of it is without the module.

    Attributes:
        name: path of the module in the model.
        version: of its weight when the capture was made.
    """

    name: str
    version: int | None
    _module: weakref.ref[nn.Module] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, name: str, module: nn.Module) -> Projection:
        """The projection as it is now."""
        return cls(name, _version(module.weight), weakref.ref(module))

    @property
    def module(self) -> nn.Module:
        """The linear module.

        Raises:
            CaptureError: the model is gone.
        """
        found = None if self._module is None else self._module()
        if found is None:
            raise CaptureError(
                f"the model is gone, and {self.name} with it",
                hint="compute results while the model is there, or keep them: save(path, result=True)",
            )
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "version": self.version, "_module": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Projection:
        return self

    def slices(self, n_heads: int, width: int) -> Tensor:
        """[head, width, d_model], as `projection_slices` gives them.

        Raises:
            CaptureError: the weight has changed since the capture, or cannot be cut into heads.
        """
        module = self.module
        if _version(module.weight) != self.version:
            raise CaptureError(
                f"the weight of {self.name} has changed since the capture",
                hint="compute results before the next step of training, or capture again",
            )
        if self.name.endswith(".base_layer"):
            raise CaptureError(
                f"{self.name} is only a part of its projection: an adapter adds to it",
                hint="merge the adapter into the model first",
            )
        return projection_slices(module, n_heads, width)


def projection_slices(module: nn.Module, n_heads: int, width: int) -> Tensor:
    """Each head's part of W_O, [head, width, d_model], so that out = Σ_h z_h @ slice_h + bias; a view of the weight
    where that is a plain tensor.

    Raises:
        CaptureError: the weight is not a floating-point matrix of n_heads · width inputs.

    >>> projection_slices(nn.Linear(6, 4), n_heads=3, width=2).shape
    torch.Size([3, 2, 4])
    """
    weight = matrix(module) if is_conv1d(module) else matrix(module).T  # [head · width, d_model]
    if weight.shape[0] != n_heads * width:
        raise CaptureError(f"a projection of {n_heads} heads of {width} has other inputs", shape=weight.shape)
    return weight.unflatten(0, (n_heads, width))


class ProjectionFinder:
    """Looks for the projections of sites while a model runs, each once."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[str, nn.Module]] = {}
        self._awaited: dict[int, dict[str, Tensor]] = {}  # by thread and site: [batch, query, head · width]

    def knows(self, site: str) -> bool:
        """Whether the projection of a site was found."""
        return site in self._found

    def saw_call(self, site: str, module: nn.Module, z: Tensor) -> None:
        """An attention call gave z [batch, query, head, width], in memory that stays as it is."""
        if site in self._found:
            return
        if isinstance(module, nn.MultiheadAttention):  # its projection is applied without being called
            self._found[site] = f"{site}.out_proj".lstrip("."), module.out_proj
            return
        self._awaited.setdefault(threading.get_ident(), {})[site] = z.flatten(2)

    def saw_module(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A module of the model is about to run on `args`."""
        awaited = self._awaited.get(threading.get_ident())
        if not awaited or not is_linear(module) or not args or not isinstance(args[0], Tensor):
            return
        for site, merged in awaited.items():
            if _same(args[0], merged):
                self._found[site] = name, module
                del awaited[site]
                return

    def end(self, thread: int) -> None:
        """The forward of that thread is over."""
        self._awaited.pop(thread, None)

    def of(self, site: str) -> Projection | None:
        """The projection of a site, if one was found."""
        return Projection.of(*self._found[site]) if site in self._found else None


def _same(given: Tensor, merged: Tensor) -> bool:
    """Whether a module's input is the merged heads, by value; [query, batch, ...] and flat batches too."""
    if given.shape[-1:] != merged.shape[-1:] or given.numel() != merged.numel():
        return False
    swapped = given.dim() == 3 and given.shape[:2] == (merged.shape[1], merged.shape[0])
    merged = merged.to(device=given.device, dtype=given.dtype)
    flat = given.detach().reshape(merged.shape)
    return torch.equal(flat, merged) or (swapped and torch.equal(given.detach().transpose(0, 1), merged))


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer with a weight."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, whose weight is [inputs, outputs]; there is none unless `transformers` is loaded."""
    utils = sys.modules.get("transformers.pytorch_utils")
    return utils is not None and isinstance(module, utils.Conv1D)


def _version(weight: Any) -> int | None:
    return None if not isinstance(weight, Tensor) or weight.is_inference() else weight._version
