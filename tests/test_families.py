"""Model families: output unchanged to the bit, statistics equal to the eager model's, nothing left behind."""

import pytest
import torch

import workbench
from support.against_eager import COLUMNS, ROWS, assert_equal_to_eager
from support.tiny import FAMILIES, Family, eager_twin, make

EVERYTHING = (*ROWS, *COLUMNS)
families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


@families
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode], ids=lambda m: m.__name__)
def test_capture_leaves_the_output_and_equals_eager(family: Family, mode: type[torch.no_grad]) -> None:
    model, inputs = make(family), family.inputs()
    with mode():
        bare = model(**inputs)
        with workbench.attach(model) as wb, wb.capture(EVERYTHING) as capture:
            observed = model(**inputs)
    assert torch.equal(bare[0], observed[0])
    with torch.no_grad():
        eager = eager_twin(model)(**inputs, output_attentions=True)
    assert assert_equal_to_eager(capture, eager, family.outputs) == len(capture.sites)


@families
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
def test_verify_holds(family: Family, mode: type[torch.no_grad]) -> None:
    model, inputs = make(family), family.inputs()
    with mode(), workbench.attach(model) as wb:
        found = wb.verify(**inputs)
    assert found.ok, found.table
    assert {check["kernel"] for check in found.checks} == {"flash_attention_for_cpu"}
    assert max(check["row_sum_error"] for check in found.checks) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("family", FAMILIES[:1] + FAMILIES[3:4] + FAMILIES[6:7], ids=lambda family: family.name)
def test_other_dtypes_verify(family: Family, dtype: torch.dtype) -> None:
    model = make(family).to(dtype)
    with torch.no_grad(), workbench.attach(model) as wb:
        assert wb.verify(**family.inputs()).raise_if_failed().identical


@families
def test_gradients_are_those_of_the_bare_model(family: Family) -> None:
    model, inputs = make(family), family.inputs()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad(set_to_none=True)
        model(**inputs)[0].square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    bare = gradients()
    with workbench.attach(model) as wb, wb.capture():
        observed = gradients()
    assert bare
    assert all(torch.equal(a, b) for a, b in zip(bare, observed, strict=True))
