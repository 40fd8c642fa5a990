"""Changes of modules: all are gone at the end, wherever an interrupt comes."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

from workbench.hooks.changes import Changes


def _state(module: nn.Module) -> dict[str, Any]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return {kind: dict(getattr(module, kind)) for kind in kinds} | {"forward": module.__dict__.get("forward")}


def test_hooks_and_forwards_act_and_end() -> None:
    layer, x = nn.Linear(3, 3), torch.randn(2, 3)
    own = layer.register_forward_hook(lambda module, args, output: output + 1)
    before, plain = _state(layer), layer(x)
    with Changes() as changes:
        changes.before(layer, lambda module, args: (2 * args[0],))
        changes.before(layer, lambda module, args, kwargs: (args, kwargs), with_kwargs=True)
        changes.after(layer, lambda module, args, kwargs, output: -output, with_kwargs=True)
        assert torch.equal(layer(x), -(nn.functional.linear(2 * x, layer.weight, layer.bias) + 1))
        changes.forward(layer, lambda x: x)
        changes.forward(layer, lambda x: 3 * x)
        assert torch.equal(layer(x), -(6 * x + 1))
    assert _state(layer) == before
    assert torch.equal(layer(x), plain)
    own.remove()


def test_an_interrupt_anywhere_leaves_nothing() -> None:
    """At each line that runs in the class in turn, once in the block and once at its end."""
    layer = nn.Linear(2, 2)
    layer.__dict__["forward"] = held = layer.forward  # as others leave one
    before = _state(layer)
    file = Changes._put.__code__.co_filename
    countdown = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal countdown
        if frame.f_code.co_filename != file or frame.f_code.co_name in ("__init__", "__enter__"):
            return None
        if event == "line":
            countdown -= 1
            if countdown == 0:
                raise KeyboardInterrupt
        return trace

    interrupted = 0
    for start in range(1, 200):
        countdown = start
        sys.settrace(trace)
        try:
            with Changes() as changes:
                changes.before(layer, print, with_kwargs=True)
                changes.after(layer, print)
                changes.forward(layer, print)
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            sys.settrace(None)
        del changes
        assert _state(layer) == before, f"interrupted at line {start}"
        if countdown > 0:
            break
    assert interrupted > 20
    assert layer.forward is held


def test_an_exception_leaves_nothing() -> None:
    layer = nn.Linear(2, 2)
    before = _state(layer)

    def fail() -> None:
        with Changes() as changes:
            changes.after(layer, print)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert _state(layer) == before


def test_an_object_that_an_interrupt_has_left_half_made_goes_without_a_word() -> None:
    Changes.__new__(Changes).__del__()


def test_the_package_hooks_modules_in_no_other_way() -> None:
    """An interrupt between PyTorch's own registering and what takes the hook off again would leave it for good."""
    root = Path(__file__).parents[2]
    found = [
        f"{path.relative_to(root)}:{node.lineno}"
        for folder in ("workbench", "hooks", "kernels")
        for path in (root / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr.startswith(("register_forward", "register_module_forward"))
    ]
    assert not found
