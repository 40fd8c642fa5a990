"""What an intervention is: it changes what heads or modules give while the model runs, and nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from workbench.hooks.tap import AttentionCall


class _OnSites:
    """Attributes: sites: names of the modules it means to touch. fired: those it has touched."""

    def __init__(self, sites: Iterable[str]) -> None:
        self.sites = frozenset(sites)
        self.fired: set[str] = set()


class Edit(_OnSites, ABC):
    """Changes the output of heads at attention sites."""

    @abstractmethod
    def __call__(self, call: AttentionCall, z: Tensor) -> Tensor:
        """The heads' new output [batch, head, query, width], from the present one; never in place."""


class OutputEdit(_OnSites, ABC):
    """Changes the output of whole modules, such as the residual stream after a block."""

    @abstractmethod
    def __call__(self, name: str, module: nn.Module, output: Any) -> Any:
        """The module's new output."""
