"""Model families: output unchanged to the bit, statistics equal to the eager model's, nothing left behind."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import workbench
from support.against_eager import COLUMNS, ROWS, assert_equal_to_eager
from support.backends import flash_packages, on_backend, uncompiled_flex
from support.tiny import FAMILIES, ZOO, Family, eager_twin, family, make
from support.unavailable import unavailable
from support.zoo.decoders import DECODERS
from support.zoo.refusals import REFUSALS, Refusal
from support.zoo.twins import eager_outputs
from workbench.capture.capture import Capture

EVERYTHING = (*ROWS, *COLUMNS)
families = pytest.mark.parametrize("family", ZOO, ids=lambda one: one.name)


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
    """The capture equals the family's true attentions at every attention; `test_state_sites.py` has state spaces."""
    truth = one.truth(model, one.inputs()) if one.outputs else {}
    found = assert_equal_to_eager(capture, truth, one.outputs)
    assert found == sum(site.kind != "state" for site in capture.sites)


def in_dtype(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The inputs with their floating point tensors in a dtype."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def build(one: Family) -> nn.Module:
    """The family's model; the test is skipped where its library is not installed."""
    try:
        return make(one)
    except ModuleNotFoundError as error:
        unavailable(str(error))


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
    """On the fast kernel, where that is the usual one."""
    model, inputs = build(family), family.inputs()
    with mode(), workbench.attach(model) as wb:
        found = wb.verify(**inputs)
    assert found.ok, found.table
    assert not max(check["row_sum_error"] for check in found.checks) >= 1e-5
    if family in FAMILIES:
        assert {check["kernel"] for check in found.checks} == {"flash_attention_for_cpu"}


@pytest.mark.parametrize(
    ("one", "backend"),
    [(one, backend) for one in ZOO for backend in one.backends if backend != "sdpa"],
    ids=lambda value: value.name if isinstance(value, Family) else value,
)
def test_other_backends(one: Family, backend: str) -> None:
    model, inputs = on_backend(make(one), backend), one.inputs()
    with flash_packages(), uncompiled_flex(), torch.no_grad():
        capture = captured(model, inputs)
        with workbench.attach(model) as wb:
            found = wb.verify(**inputs)
    assert_true(one, model, capture)
    assert {seen.kernel for seen in capture if seen.site.kind != "state"} <= {backend.rpartition("/")[2], "written out"}
    assert found.ok, found.table


def continued(model: nn.Module, one: Family, length: int) -> dict[str, Any]:
    """Inputs that go on from a cache of all but the last `length` tokens."""
    inputs = one.inputs()
    first = {name: value[:, :-length] for name, value in inputs.items()}
    cache = model(**first, use_cache=True).past_key_values
    return inputs | {"input_ids": inputs["input_ids"][:, -length:], "past_key_values": cache}


@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        (one.name, backend)
        for one in DECODERS
        for backend in one.backends or ("eager",)
        if backend != "flash_attention_3" and one.truth is eager_outputs
    ],
)
def test_going_on_from_a_cache(name: str, backend: str, length: int) -> None:
    one = family(name)
    model = make(one)
    if one.backends:
        on_backend(model, backend)
    with flash_packages(), uncompiled_flex(), torch.no_grad():
        inputs = continued(model, one, length)
        with workbench.attach(model) as wb, wb.capture(EVERYTHING) as capture:
            model(**inputs)
        twin = eager_twin(model)
        truth = twin(**continued(twin, one, length), output_attentions=True)
    assert assert_equal_to_eager(capture, truth, one.outputs) == len(capture.sites)


def test_rows_that_flash_attention_leaves_out_see_no_key() -> None:
    one = family("bart")  # whose encoder's padding is on the right: the last four of the decoder's nine rows are lost
    model = on_backend(make(one), "flash_attention_2")
    with flash_packages(), torch.no_grad():
        capture = captured(model, one.inputs())
        with workbench.attach(model) as wb:
            assert wb.verify(**one.inputs()).raise_if_failed().identical
    for site in capture:
        if site.site.kind == "cross":
            lost = torch.zeros(2, 9, dtype=torch.bool)
            lost[0, -4:] = True
            assert torch.equal(site.entropy.isnan(), lost[:, None].expand(2, 4, 9))


@pytest.mark.slow
def test_flex_attention_compiled() -> None:
    one = family("llama-left-padded")
    model = on_backend(make(one), "flex_attention")
    with torch.no_grad():
        model(**one.inputs())
        bare = counters["stats"]["unique_graphs"]
        capture = captured(model, one.inputs())
    assert counters["stats"]["unique_graphs"] - bare <= 1  # that of the mask; attention is not compiled once more
    assert_true(one, model, capture)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "mistral", "gemma2", "gpt-oss", "t5", "deberta-v2", "swin"])
def test_other_dtypes_verify(name: str, dtype: torch.dtype) -> None:
    if (name, dtype) == ("gpt-oss", torch.float64):
        pytest.skip("its experts do not run in float64")
    model, inputs = make(family(name)).to(dtype), in_dtype(family(name).inputs(), dtype)
    with torch.no_grad(), workbench.attach(model) as wb:
        assert wb.verify(**inputs).raise_if_failed().identical


@pytest.mark.parametrize("name", ["gpt2", "llama-left-padded", "gemma2", "whisper"])
def test_flash_attention_in_bfloat16(name: str) -> None:
    model, inputs = make(family(name)).to(torch.bfloat16), in_dtype(family(name).inputs(), torch.bfloat16)
    on_backend(model, "flash_attention_2")
    with flash_packages(), torch.no_grad(), workbench.attach(model) as wb:
        assert wb.verify(**inputs).raise_if_failed().identical


@families
def test_gradients_are_those_of_the_bare_model(family: Family) -> None:
    model, inputs = build(family), family.inputs()

    def gradients() -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        tensors(model(**inputs))[0].square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    bare = gradients()
    with workbench.attach(model) as wb, wb.capture():
        observed = gradients()
    assert bare
    assert all(torch.equal(a, b) for a, b in zip(bare, observed, strict=True))


def test_sink_logits_take_a_part_of_every_row() -> None:
    one = family("gpt-oss")
    model = make(one)
    with torch.no_grad(), workbench.attach(model) as wb, wb.capture(["entropy"]) as capture:
        model(**one.inputs())
    for site in capture:
        assert (site.pattern.dense().sum(-1) < 0.99).double().mean() > 0.3
        assert (site.marks, site.pattern.signed) == ("unnormalised", False)
        p = site.pattern.dense().double()
        torch.testing.assert_close(site.entropy.double(), -torch.special.xlogy(p, p).sum(-1), atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.name)
def test_what_cannot_be_captured_is_an_error(refusal: Refusal) -> None:
    with pytest.raises(refusal.error, match="^" + re.escape(refusal.message)):
        refusal.run()
