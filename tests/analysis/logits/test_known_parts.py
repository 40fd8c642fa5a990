"""Parts of a model that are known from an earlier call: found once, and never where something has changed since."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.tiny import family, make
from support.zoo.family import ids
from workbench import AttachError, LogitAttribution, Workbench, attach
from workbench import logit_attribution as attribute
from workbench.analysis.logits import known

INPUTS = {"input_ids": ids(2, 11) % 40}


def _twice(module: nn.Module) -> nn.Module:
    """A module that gives twice what it gave."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * self.inner(*args, **kwargs)

    return Twice()


def _forward_twice(module: nn.Module) -> None:
    """The same by a forward of the module's own."""
    forward = module.forward
    module.forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)  # type: ignore[method-assign]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that the parts were looked for."""
    found, find = list[int](), known.find_writers

    def count(*args: Any) -> Any:
        found.append(1)
        return find(*args)

    monkeypatch.setattr(known, "find_writers", count)
    return found


def _anew(wb: Workbench, inputs: dict[str, Tensor]) -> LogitAttribution:
    known._known.pop(wb)
    return attribute(wb, inputs, 7)


def test_they_are_found_once(counted: list[int]) -> None:
    with attach(make(family("gpt2"))) as wb:
        first = attribute(wb, INPUTS, 7)
        again = attribute(wb, INPUTS, 7)
        assert torch.equal(first.values, again.values)
        other = attribute(wb, {"input_ids": ids(1, 5) % 40}, 7, contrast=9)
        assert len(counted) == 1
        torch.testing.assert_close(other.values, attribute(wb, {"input_ids": ids(1, 5) % 40}, 7, contrast=9).values)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert "bfloat16" in attribute(wb, INPUTS, 7).precision
        assert len(counted) == 2


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a weight, past its version": lambda m: m.transformer.h[0].attn.c_proj.weight.data.mul_(-2),
    "the norm's gain": lambda m: m.transformer.ln_f.weight.data[:3].add_(1),
    "an MLP that was nothing": lambda m: m.transformer.h[1].mlp.c_proj.weight.data.normal_(),
    "a module": lambda m: setattr(m.transformer.h[0], "mlp", _twice(m.transformer.h[0].mlp)),
    "a part of a module": lambda m: setattr(m.transformer.h[0].mlp, "c_proj", _twice(m.transformer.h[0].mlp.c_proj)),
    "a hook": lambda m: m.transformer.h[0].mlp.register_forward_hook(lambda _, args, output: 2 * output),
    "a forward": lambda m: _forward_twice(m.transformer.h[1].mlp),
    "the head": lambda m: setattr(m, "lm_head", nn.Linear(*m.lm_head.weight.shape[::-1]).double()),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
@torch.no_grad()
def test_what_has_changed_is_found_again(what: str, counted: list[int]) -> None:
    model = make(family("gpt2")).double()
    if "nothing" in what:
        for parameter in model.transformer.h[1].mlp.c_proj.parameters():
            parameter.zero_()
    with attach(model) as wb:
        attribute(wb, INPUTS, 7)
        CHANGES[what](model)
        found = attribute(wb, INPUTS, 7)
        assert len(counted) == 2
        torch.testing.assert_close(found.values, _anew(wb, INPUTS).values, rtol=0, atol=0)
        torch.testing.assert_close(found.logits, model(**INPUTS).logits[:, -1, 7], rtol=1e-9, atol=1e-9)
        assert float(found.rounding.abs().max()) < 1e-9


def test_inputs_of_another_form_are_looked_at_again(counted: list[int]) -> None:
    """Token types are another table of GPT-2's."""
    model = make(family("gpt2")).double()
    with attach(model) as wb:
        attribute(wb, INPUTS, 7)
        found = attribute(wb, INPUTS | {"token_type_ids": ids(2, 11, 1) % 40}, 7)
        assert len(counted) == 2
        assert float(found.rounding.abs().max()) < 1e-9


def test_code_that_is_replaced_elsewhere_shows_in_the_sums(counted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A block's class gets another forward: no module, setting or weight tells."""
    model = make(family("gpt2")).double()
    block = type(model.transformer.h[0])
    with attach(model) as wb:
        attribute(wb, INPUTS, 7)
        forward = block.forward

        def shifted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            output = forward(self, *args, **kwargs)
            return output + 1 if isinstance(output, Tensor) else (output[0] + 1, *output[1:])

        monkeypatch.setattr(block, "forward", shifted)
        with pytest.raises(AttachError, match="adds something to the residual stream"):
            attribute(wb, INPUTS, 7)
        assert len(counted) == 2
        monkeypatch.setattr(block, "forward", forward)
        assert float(attribute(wb, INPUTS, 7).rounding.abs().max()) < 1e-9
