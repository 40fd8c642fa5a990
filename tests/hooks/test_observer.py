"""Nothing stays behind: no hook, no mode, no patched function, whatever happens inside the `with`."""

import contextlib
import copy
import pickle
import sys
import threading
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers import GPT2Config, GPT2LMHeadModel

import workbench
from support.tiny import FAMILIES, make

SDPA = torch.nn.functional.scaled_dot_product_attention


def traces(model: nn.Module) -> list[str]:
    """Everything of ours that is left in the process or on the model."""
    found = [f"hook on {n}" for n, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    found += ["global hook"] * len(torch_module._global_forward_hooks | torch_module._global_forward_pre_hooks)
    found += [repr(mode) for mode in _get_current_function_mode_stack()]
    found += [repr(mode) for mode in _get_current_dispatch_mode_stack()]
    found += ["patched SDPA"] if torch.nn.functional.scaled_dot_product_attention is not SDPA else []
    return found


@pytest.fixture
def model() -> nn.Module:
    return make(FAMILIES[0])


@pytest.fixture
def ids() -> torch.Tensor:
    return FAMILIES[0].inputs()["input_ids"]


def test_nothing_is_left_after_a_capture(model: nn.Module, ids: torch.Tensor) -> None:
    wb = workbench.attach(model)
    assert traces(model) == []
    with wb.capture():
        assert traces(model)  # or the checks here could not fail
        model(ids)
        assert len(_get_current_function_mode_stack()) == 0
    wb.detach()
    assert traces(model) == []


def test_nothing_is_left_after_an_exception_in_the_with(model: nn.Module, ids: torch.Tensor) -> None:
    wb = workbench.attach(model)
    with pytest.raises(KeyError), wb.capture() as capture:
        {"output": model(ids)}["outputs"]
    assert traces(model) == []
    assert len(capture.calls) == 1  # what was captured before is kept


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("layer", [0, 1])
def test_nothing_is_left_after_an_exception_in_forward(
    model: nn.Module, ids: torch.Tensor, error: type[BaseException], layer: int
) -> None:
    bare = model(ids).logits
    broken = model.transformer.h[layer].attn.c_proj
    original = broken.forward

    def fail(*args: object) -> None:
        raise error

    wb = workbench.attach(model)
    broken.forward = fail
    with pytest.raises(error), wb.capture():
        model(ids)
    broken.forward = original
    assert traces(model) == []
    with wb.capture() as capture:
        assert torch.equal(model(ids).logits, bare)
    assert len(capture.sites) == 2


@torch.no_grad()
def test_nothing_is_left_after_an_interrupt_inside_a_native_layer() -> None:
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2, enable_nested_tensor=False
    )
    model.eval()
    x = torch.randn(2, 5, 16)
    wb = workbench.attach(model)

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    original = model.layers[1].forward
    model.layers[1].forward = interrupt
    with pytest.raises(KeyboardInterrupt), wb.capture():
        model(x)
    model.layers[1].forward = original
    assert traces(model) == []


def test_a_limit_error_leaves_through_the_model(model: nn.Module, ids: torch.Tensor) -> None:
    with workbench.attach(model) as wb, pytest.raises(workbench.CaptureError, match="limit"), wb.capture(limit=10):
        model(ids)
    assert traces(model) == []


def test_forwards_in_another_thread_are_seen(model: nn.Module, ids: torch.Tensor) -> None:
    with workbench.attach(model) as wb, wb.capture() as capture:
        thread = threading.Thread(target=model, args=(ids,))
        thread.start()
        thread.join()
    assert len(capture.sites) == 2


def test_two_models_in_two_threads_do_not_mix(ids: torch.Tensor) -> None:
    models = [make(FAMILIES[0], seed=seed) for seed in (1, 2)]
    alone = []
    for one in models:
        with workbench.attach(one) as wb, wb.capture() as capture:
            one(ids)
        alone.append(capture.stack("entropy"))
    together: list[torch.Tensor] = [torch.empty(0)] * 2
    barrier = threading.Barrier(2)

    def work(i: int) -> None:
        with workbench.attach(models[i]) as wb, wb.capture() as capture:
            barrier.wait()
            for _ in range(3):
                models[i](ids)
        assert len(capture.calls) == 3
        together[i] = capture.calls[-1].stack("entropy")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_an_attached_model_can_be_copied_and_pickled(model: nn.Module, ids: torch.Tensor) -> None:
    bare = model(ids).logits
    wb = workbench.attach(model)
    with wb.capture():
        model(ids)
    twin = copy.deepcopy(model)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(ids).logits, bare)
    assert torch.equal(again(ids).logits, bare)
    with workbench.attach(twin) as other, other.capture() as capture:
        twin(ids)
    assert len(capture.sites) == 2


def test_calls_outside_the_model_are_ignored(model: nn.Module, ids: torch.Tensor) -> None:
    other = make(FAMILIES[0], seed=5)
    q = torch.randn(1, 2, 3, 8)
    with workbench.attach(model) as wb, wb.capture() as capture:
        model(ids)
        other(ids)
        SDPA(q, q, q)
    assert len(capture.calls) == 1


def test_a_part_of_the_model_may_be_called_alone(model: nn.Module, ids: torch.Tensor) -> None:
    with workbench.attach(model) as wb, wb.capture() as capture:
        model.transformer(ids)
    assert [site.name for site in capture.sites] == ["transformer.h.0.attn", "transformer.h.1.attn"]


def test_a_shared_module_gets_a_site_for_every_call(ids: torch.Tensor) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(2):
                x = self.attn(x, x, x, need_weights=False)[0]
            return x

    model = Twice().eval()
    with workbench.attach(model) as wb, wb.capture() as capture:
        model(torch.randn(2, 5, 16))
    assert [site.name for site in capture.sites] == ["attn", "attn#1"]
    assert capture.stack("entropy").shape == (2, 2, 4, 5)


def test_an_interrupt_where_a_context_is_entered_leaves_nothing() -> None:
    """Where a generator's `with` is torn, it ends only when the traceback is freed: at each of these places in turn."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=1, n_head=2, n_embd=8, vocab_size=9, n_positions=8, bos_token_id=None, eos_token_id=None
    )
    model, x = GPT2LMHeadModel(config).eval(), torch.tensor([[1, 2, 3]])
    enter = contextlib._GeneratorContextManager.__enter__.__code__
    with torch.no_grad():
        bare = model(x).logits
    n_events = countdown = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal n_events, countdown
        if frame.f_code is not enter:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            n_events += 1
            if n_events == countdown:
                raise KeyboardInterrupt
        return trace

    def run() -> bool:
        nonlocal n_events
        n_events = 0
        sys.settrace(trace)
        try:
            with torch.no_grad(), workbench.attach(model) as wb, wb.capture():
                model(x)
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
        return False

    run()
    total = n_events
    assert total > 30
    interrupted = 0
    for countdown in range(1, total + 1):
        interrupted += run()
        assert not _get_current_function_mode_stack(), countdown
        assert not _get_current_dispatch_mode_stack(), countdown
        assert not torch_module._global_forward_hooks, countdown
    assert interrupted > total / 2
    with torch.no_grad(), workbench.attach(model) as wb, wb.capture() as cap:
        assert torch.equal(model(x).logits, bare)
    assert len(cap.calls) == 1
