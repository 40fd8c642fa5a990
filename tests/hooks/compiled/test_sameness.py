"""Which masks of a graph are the same, told from what they are computed of."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx

import workbench
from support.tiny import family, make
from workbench.hooks.compiled.sameness import Expressions, Runs
from workbench.session import keeping

PADDED = family("llama-left-padded")


def _graph(function: Any, *given: Tensor) -> fx.Graph:
    found: list[fx.Graph] = []

    def backend(module: fx.GraphModule, inputs: Any) -> Any:
        found.append(module.graph)
        return module.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend)(*given)
    return found[0]


def _numbers(function: Any, *given: Tensor) -> list[int | None]:
    """Of what the function gives."""
    graph = _graph(function, *given)
    [output] = graph.find_nodes(op="output")
    expressions = Expressions(graph)
    return [expressions.number(node) for node in output.args[0]]


X = torch.ones(4, 4)


def test_what_is_computed_alike_is_the_same() -> None:
    a, b, c, d = _numbers(lambda x: (x[:, :2] > 1, x[:, :2] > 1, x[:, :2] > 2, x[:, 1:3] > 1), X)
    assert a is not None
    assert a == b
    assert len({a, c, d}) == 3


def test_what_is_drawn_is_never_the_same() -> None:
    a, b = _numbers(lambda x: (x + torch.rand(4, 4), x + torch.rand(4, 4)), X)
    assert a != b


def test_what_is_written_to_tells_nothing() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        mask, apart = x > 0, x.new_ones(2) > 0
        first = mask * 1
        mask[0] = False
        return first, mask * 1, apart * 2

    first, second, _ = _numbers(function, X)
    assert first is None
    assert second is None


def test_a_place_that_fires_again_begins_another_run() -> None:
    runs = Runs()
    found = [runs.of(*at) for at in ((1, 10), (1, 11), (2, 20), (1, 10), (1, 11), (2, 20))]
    assert found[0] == found[1]
    assert found[3] == found[4]
    assert len(set(found)) == 4


@pytest.mark.parametrize("by_layer", [False, True])
def test_layers_share_a_mask_without_comparing_it(by_layer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device, where to compare it would have the host wait."""
    monkeypatch.setattr(keeping, "is_away", lambda device: device.type == "cpu")
    model: Any = make(PADDED)
    if by_layer:
        for layer in model.model.layers:
            layer.compile(backend="eager")
    built = model if by_layer else torch.compile(model, backend="eager")
    inputs = PADDED.inputs()
    with torch.no_grad(), workbench.attach(built) as wb, wb.capture(("entropy",)) as cap:
        built(**inputs)
        built(**{**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])})
    first, second = ([site.pattern.mask.tensor for site in call] for call in cap.calls)
    assert first[0] is not None
    assert first[0] is first[1]
    assert all(mask is None or mask is not first[0] for mask in second)
    torch._dynamo.reset()
