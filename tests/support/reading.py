"""Modules with readers, run by themselves: what is read of them, and whether it gives back what they gave."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from support.tiny import VOCABULARY
from workbench.hooks.readers import Begun, before_reading, read_module, reader_of
from workbench.hooks.tap import AttentionCall


def drawn(make: Callable[[], nn.Module]) -> nn.Module:
    """The model with every parameter drawn at random, so that no bias, norm or skip is trivial."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def tokens(n: int = 19, batch: int = 2) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, n), generator=torch.Generator().manual_seed(1))


@contextmanager
def calls_of(model: nn.Module) -> Iterator[list[AttentionCall]]:
    """The calls of every mixer that runs inside, read as the observer reads them."""
    found: list[AttentionCall] = []
    before: dict[nn.Module, Begun] = {}
    handles = []

    def begins(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        before[module] = before_reading(module, args, kwargs)

    for site, module in model.named_modules():
        if reader_of(module):

            def ends(module: nn.Module, args: Any, kwargs: Any, output: Any, site: str = site) -> None:
                found.append(read_module(site, module, args, kwargs, output, begun=before[module]))

            handles.append(module.register_forward_pre_hook(begins, with_kwargs=True))
            handles.append(module.register_forward_hook(ends, with_kwargs=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def assert_true(call: AttentionCall, tolerance: float = 2e-5) -> None:
    """finish(A·V) is what the module gave."""
    assert call.finish is not None
    again = call.finish(call.pattern().outputs(call.v))
    assert again.dtype == call.output.dtype
    assert float(call.output.detach().std()) > 0.01  # else anything would be close
    scale = max(1.0, float(call.output.abs().max()))
    torch.testing.assert_close(again, call.output, atol=tolerance * scale, rtol=0)
