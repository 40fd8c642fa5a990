"""Model families: output unchanged to the bit, statistics equal to the eager model's, nothing left behind."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import workbench
from support.against_eager import COLUMNS, ROWS, assert_equal_to_eager
from support.flash import KERNEL, flash_packages, on_backend
from support.tiny import ZOO, Family, family, make
from workbench.capture import Capture

EVERYTHING = (*ROWS, *COLUMNS)
WITH_ATTENTION = [one for one in ZOO if one.outputs]
families = pytest.mark.parametrize("family", WITH_ATTENTION, ids=lambda one: one.name)
SDPA = [one for one in WITH_ATTENTION if "sdpa" in one.backends]


def tensors(output: Any) -> list[Tensor]:
    """Every tensor of a model's output."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if hasattr(output, "values") else output if isinstance(output, (list, tuple)) else []
    return [tensor for value in values for tensor in tensors(value)]


def captured(model: nn.Module, inputs: dict[str, Any]) -> Capture:
    """A capture of everything, whose model has given the bits that it gives bare."""
    bare = tensors(model(**inputs))
    with workbench.attach(model) as wb, wb.capture(EVERYTHING) as capture:
        observed = tensors(model(**inputs))
    assert len(bare) == len(observed) > 0
    assert all(torch.equal(a, b) for a, b in zip(bare, observed, strict=True))
    return capture


def assert_true(one: Family, model: nn.Module, capture: Capture) -> None:
    """The capture equals the family's true attentions at every site that has any."""
    truth = one.truth(model, one.inputs())
    found = assert_equal_to_eager(capture, truth, one.outputs)
    assert found == sum(site.kind != "state" for site in capture.sites)


def build(one: Family) -> nn.Module:
    """The family's model; the test is skipped where its library is not installed."""
    try:
        return make(one)
    except ModuleNotFoundError as error:
        from conftest import _unavailable

        _unavailable(str(error))


@families
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode], ids=lambda m: m.__name__)
def test_capture_leaves_the_output_and_equals_eager(family: Family, mode: type[torch.no_grad]) -> None:
    model = build(family)
    with mode():
        capture = captured(model, family.inputs())
    assert_true(family, model, capture)


@families
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
def test_verify_holds(family: Family, mode: type[torch.no_grad]) -> None:
    model, inputs = build(family), family.inputs()
    with mode(), workbench.attach(model) as wb:
        found = wb.verify(**inputs)
    assert found.ok, found.table
    assert not max(check["row_sum_error"] for check in found.checks) >= 1e-5
