"""Whatever is opened, run, broken off and closed, in any order: the model and the process are as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers import AttentionInterface

import workbench
from support.tiny import FAMILIES, make
from workbench.session.workbench import Workbench

GPT2 = FAMILIES[0]
INPUTS = GPT2.inputs()
ATTRIBUTES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
              "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called",
              "_state_dict_hooks", "_load_state_dict_pre_hooks")  # fmt: skip


class Planned(Exception):
    """What a broken function raises."""


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that an intervention or a capture could leave behind, and the model's numbers."""
    found: dict[str, Any] = {
        f"{name}.{attribute}": list(getattr(module, attribute)) if hasattr(module, attribute) else None
        for name, module in model.named_modules()
        for attribute in ATTRIBUTES
    }
    found |= {f"{name}.__dict__": sorted(vars(module)) for name, module in model.named_modules()}
    found |= {name: list(value) for name, value in vars(torch_module).items()
              if name.startswith("_global_") and isinstance(value, dict)}  # fmt: skip
    found["functions"] = [
        nn.functional.scaled_dot_product_attention, nn.functional.multi_head_attention_forward, nn.functional.softmax,
        AttentionInterface.__dict__["get_interface"], nn.Module.__call__, Tensor.softmax, torch.matmul,
    ]  # fmt: skip
    found["modes"] = (_get_current_function_mode_stack(), _get_current_dispatch_mode_stack(), torch.is_grad_enabled())
    with torch.no_grad():
        found["output"] = model(**INPUTS).logits.numpy().tobytes()
    found["parameters"] = [p.detach().numpy().tobytes() for p in model.state_dict().values()]
    return found


def _fail(*args: Any) -> Tensor:
    raise Planned


def _rolled(rows: Tensor, *args: Any) -> Tensor:
    return rows.roll(1, -1)


OPENERS: dict[str, Callable[[Workbench], Any]] = {
    "capture": lambda wb: wb.capture(),
    "capture z": lambda wb: wb.capture(z=True, sites=[1]),
    "zero": lambda wb: wb.ablate((0, 1)),
    "mean": lambda wb: wb.ablate("L1H2", "mean", reference=INPUTS),
    "resample": lambda wb: wb.ablate([(0, 0), (1, 0)], "resample", reference=[INPUTS], positions=-1),
    "patch": lambda wb: wb.patch({(1, 1): torch.ones(8)}, positions=[0, 3]),
    "broken patch": lambda wb: wb.patch({(1, 3): _fail}),
    "bad patch": lambda wb: wb.patch({(1, 3): torch.ones(5)}),
    "no such head": lambda wb: wb.ablate((9, 9)),
    "pattern": lambda wb: wb.edit_pattern((0, 2), _rolled, [1, 2]),
    "broken pattern": lambda wb: wb.edit_pattern((1, 2), _fail),
    "steer": lambda wb: wb.steer(("resid", 0), torch.ones(32), positions=2),
    "bad steer": lambda wb: wb.steer("blocks.1.attn", torch.ones(31)),
}
STEPS = st.lists(st.sampled_from([*OPENERS, "run", "run", "train", "part", "close", "raise", "verify"]), max_size=9)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS)
def test_nothing_is_left_behind(steps: list[str]) -> None:
    model = make(GPT2)
    before = state(model)
    wb = workbench.attach(model)
    with contextlib.suppress(Planned, workbench.WorkbenchError), contextlib.ExitStack() as stack:
        for step in steps:
            if step == "run":
                model(**INPUTS)
            elif step == "train":
                model(**INPUTS).logits.square().mean().backward()
                model.zero_grad()
            elif step == "part":
                model.transformer.h[0](torch.ones(1, 3, 32))
            elif step == "close":
                stack.pop_all().close()
            elif step == "raise":
                raise Planned
            elif step == "verify":
                wb.verify(**INPUTS)
            else:
                stack.enter_context(OPENERS[step](wb))
    wb.check_idle()
    wb.detach()
    assert state(model) == before


@torch.no_grad()
def test_interventions_may_be_closed_in_any_order() -> None:
    model = make(GPT2)
    before = state(model)
    with workbench.attach(model) as wb:
        zero, steer = wb.ablate((0, 1)), wb.steer((0, 1), torch.ones(8))
        zero.__enter__()
        with wb.capture(z=True) as capture:
            steer.__enter__()
            model(**INPUTS)
            zero.__exit__(None, None, None)
            model(**INPUTS)
            steer.__exit__(None, None, None)
            model(**INPUTS)
    first, second, third = (call[0].z[:, :, 1] for call in capture.calls)
    assert torch.equal(first, torch.ones_like(first))
    torch.testing.assert_close(second, third + 1)
    assert state(model) == before


def test_the_state_notices_what_is_left() -> None:
    model = make(GPT2)
    before = state(model)
    with workbench.attach(model) as wb, wb.ablate((0, 1)):
        inside = state(model)
    assert {key for key in before if before[key] != inside[key]} >= {
        "functions", "output", "_global_forward_hooks", "_global_forward_pre_hooks", "._forward_pre_hooks",
    }  # fmt: skip
    assert state(model) == before
