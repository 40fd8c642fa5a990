"""Released modules beside ours: the weights that their printed outputs are of, and what is read of either."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

import workbench
from workbench.capture.site_capture import SiteCapture

Module = TypeVar("Module", bound=nn.Module)


@torch.no_grad()
def filled(module: Module) -> Module:
    """The module in float64, its parameters sines in the order of their names, which anybody can make again."""
    module.double().eval()
    for number, (_, p) in enumerate(sorted(module.named_parameters())):
        p.copy_(torch.sin(torch.arange(p.numel(), dtype=torch.float64) * (number + 1.3)).view(p.shape) * 0.7)
    return module


def read_alone(module: nn.Module, x: Tensor, kind: str, statistics: Sequence[str] = ()) -> SiteCapture:
    """What is captured of a module whose only site is of this kind, once it is verified."""
    with workbench.attach(module) as wb:
        report = wb.verify(x=x)
        assert report.ok, report.table
        assert [site.kind for site in wb.sites] == [kind]
        with wb.capture(statistics) as cap:
            module(x)
    return cap[0]
