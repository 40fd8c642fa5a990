"""What is open on a model: edits in the order they were entered, then the capture, whichever was entered first."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import workbench
from support.tiny import FAMILIES, make
from workbench.errors import InterventionError
from workbench.hooks.edits import Edit, OutputEdit
from workbench.hooks.tap import AttentionCall

GPT2 = FAMILIES[0]
SITE = "transformer.h.0.attn"


class Apply(Edit):
    def __init__(self, function: Callable[[Tensor], Tensor], site: str = SITE) -> None:
        super().__init__([site])
        self.function = function

    def __call__(self, call: AttentionCall, z: Tensor) -> Tensor:
        return self.function(z)


class AddToOutput(OutputEdit):
    def __call__(self, name: str, module: nn.Module, output: Any) -> Any:
        return (output[0] + 1, *output[1:]) if isinstance(output, tuple) else output + 1


@pytest.fixture
def model() -> nn.Module:
    return make(GPT2)


@torch.no_grad()
def test_edits_apply_in_the_order_they_were_entered(model: nn.Module) -> None:
    inputs = GPT2.inputs()
    with workbench.attach(model) as wb:
        with wb.editing(Apply(lambda z: z + 1)), wb.editing(Apply(lambda z: z * 2)), wb.capture(z=True) as edited:
            model(**inputs)
        with wb.capture(z=True) as plain:
            model(**inputs)
    torch.testing.assert_close(edited[0].z, (plain[0].z + 1) * 2)


@torch.no_grad()
def test_a_capture_sees_the_edited_heads_whichever_was_entered_first(model: nn.Module) -> None:
    inputs = GPT2.inputs()
    with workbench.attach(model) as wb:
        with wb.capture(z=True) as outside, wb.editing(Apply(torch.zeros_like)):
            one = model(**inputs).logits
        with wb.editing(Apply(torch.zeros_like)), wb.capture(z=True) as inside:
            two = model(**inputs).logits
    assert torch.equal(one, two)
    assert not outside[0].z.any()
    assert not inside[0].z.any()
    assert torch.equal(outside[1].z, inside[1].z)


@torch.no_grad()
def test_an_edit_of_a_module_goes_on_into_the_model(model: nn.Module) -> None:
    inputs = GPT2.inputs()
    handle = model.transformer.h[0].register_forward_hook(lambda module, args, out: AddToOutput([""])("", module, out))
    want = model(**inputs).logits
    handle.remove()
    with workbench.attach(model) as wb, wb.editing(AddToOutput(["transformer.h.0"])):
        assert torch.equal(model(**inputs).logits, want)


def test_an_edit_that_never_fires_raises_and_one_that_fails_restores(model: nn.Module) -> None:
    inputs = GPT2.inputs()
    with torch.no_grad(), workbench.attach(model) as wb:
        bare = model(**inputs).logits
        with pytest.raises(InterventionError, match="never fired"), wb.editing(Apply(lambda z: z)):
            pass

        def fail(z: Tensor) -> Tensor:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError), wb.editing(Apply(fail)):
            model(**inputs)
        assert torch.equal(model(**inputs).logits, bare)
        wb.check_idle()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_are_edited_again_in_the_backward_pass(model: nn.Module, reentrant: bool) -> None:
    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(**GPT2.inputs()).logits.square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    with workbench.attach(model) as wb:
        with wb.editing(Apply(lambda z: z * 3)):
            plain = gradients()
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        for block in model.transformer.h:
            block.attn.attn_dropout.p = 0.0
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with wb.editing(Apply(lambda z: z * 3)), wb.capture() as capture:
            again = gradients()
    assert capture.ledger == {"transformer.h.0.attn": 1, "transformer.h.1.attn": 1}
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b)
