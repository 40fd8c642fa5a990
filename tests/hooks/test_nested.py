"""Nested outputs: every container that models use is walked and made anew in its own type."""

import dataclasses
from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

import workbench
from workbench.hooks.nested import first_tensor, map_tensors, tensors


@dataclasses.dataclass
class Output:
    logits: Tensor
    more: tuple[Tensor, ...] = ()
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Frozen:
    logits: Tensor
    total: float = dataclasses.field(init=False, default=2.0)


Pair = namedtuple("Pair", "first second")
A, B = torch.arange(3.0), torch.arange(4.0)
VALUES = [
    A, (A, B), [A, None, B], Pair(A, "text"), {"a": A, "b": {"c": B}}, OrderedDict(a=A), Output(A, (B,), "note"),
    Frozen(A), BaseModelOutput(last_hidden_state=A, hidden_states=(A, B)), torch.ones(2, 3).max(1), 3, None,
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_value_is_made_anew_in_its_own_type(value: object) -> None:
    found = map_tensors(lambda tensor: tensor + 1, value)
    assert type(found) is type(value)
    assert len(tensors(found)) == len(tensors(value))
    for old, new in zip(tensors(value), tensors(found), strict=True):
        assert torch.equal(new, old + 1)
    given = first_tensor(value)
    if given is not None:
        assert torch.equal(tensors(given[1](given[0] * 2))[0], tensors(value)[0] * 2)


def test_what_is_no_tensor_is_kept() -> None:
    found = map_tensors(lambda tensor: tensor + 1, Output(A, (), "note"))
    assert found.note == "note"
    assert map_tensors(lambda tensor: tensor, Frozen(A)).total == 2.0


@torch.no_grad()
def test_a_model_with_a_dataclass_output_is_verified_steered_and_swept() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 4, batch_first=True)
            self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, x: Tensor) -> Output:
            return Output(self.body(x))

    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(2, 5, 16)
    with workbench.attach(model) as wb:
        assert wb.verify(x).ok
        variants = [workbench.Variant((layer, 1)) for layer in (0, 1)]
        found = workbench.run_sweep(wb, variants, [{"x": x}], lambda y, batch: y.logits.mean((1, 2)), progress=False)
        for number, layer in enumerate((0, 1)):
            with wb.ablate((layer, 1)):
                torch.testing.assert_close(found.values[number, 0], model(x).logits.mean((1, 2)).double())
        with wb.editing(must_fire=False):
            bare = model(x).logits
        with wb.steer("", torch.ones(16)):
            torch.testing.assert_close(model(x).logits, bare + 1)
