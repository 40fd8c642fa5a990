"""Random sequences of interventions, interrupts, exceptions and threads: the model and the process are as they were."""

from __future__ import annotations

import contextlib
import gc
import random
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers import AttentionInterface

import workbench
from support.tiny import FAMILIES, make
from workbench.hooks import registry
from workbench.session.workbench import Workbench

GPT2 = FAMILIES[0]
INPUTS = GPT2.inputs()
ORIGINAL = AttentionInterface.__dict__["get_interface"]


class Stop(BaseException):
    """What is no Exception, as a timeout, so that PyTorch calls no hook for it."""


def left(model: nn.Module) -> list[str]:
    """What is left of ours in the process, in this thread and on the model."""
    found = [
        name
        for name, held in vars(torch_module).items()
        if name.startswith("_global_") and held and isinstance(held, dict)
    ]
    for name, module in model.named_modules():
        found += [f"hook on {name}"] * len(module._forward_pre_hooks | module._forward_hooks)
        found += [f"{name}.forward"] if "forward" in vars(module) else []
    found += [repr(mode) for mode in (*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack())]
    found += ["registry"] if AttentionInterface.__dict__["get_interface"] is not ORIGINAL else []
    return found + ["owners"] * len(registry._installed) + ["listeners"] * len(registry._listeners.stack)


class Bomb(nn.Module):
    """Goes off when it is told to."""

    error: type[BaseException] | None = None

    def forward(self, x: Any) -> Any:
        if self.error is not None:
            raise self.error
        return x


OPENERS: list[Callable[[Workbench], Any]] = [
    lambda wb: wb.capture(),
    lambda wb: wb.capture(z=True, sites=[1]),
    lambda wb: wb.ablate((0, 1)),
    lambda wb: wb.ablate((1, 1), threads="this"),
    lambda wb: wb.ablate("L1H2", "mean", reference=INPUTS),
    lambda wb: wb.edit_pattern((0, 2), lambda rows, site, head: rows.roll(1, -1)),
    lambda wb: wb.steer(("resid", 0), torch.ones(32), threads="this"),
]


def random_sequence(rng: random.Random, wb: Workbench, bomb: Bomb) -> None:
    """A few contexts, and forwards inside them of which some are broken off."""
    model = wb.model
    with contextlib.suppress(workbench.WorkbenchError), contextlib.ExitStack() as stack:
        for _ in range(rng.randint(1, 5)):
            step = rng.random()
            if step < 0.5:
                stack.enter_context(rng.choice(OPENERS)(wb))
            elif step < 0.7:
                model(**INPUTS)
            elif step < 0.8:
                bomb.error = rng.choice([Stop, ValueError])
                with contextlib.suppress(Stop, ValueError):
                    model(**INPUTS)
                bomb.error = None
            elif step < 0.9:
                stack.pop_all().close()
            else:
                raise workbench.WorkbenchError("planned")


@pytest.fixture
def model() -> nn.Module:
    made = make(GPT2)
    made.transformer.h[1].attn.resid_dropout = Bomb()
    return made


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("seed", range(8))
def test_a_long_run_of_random_sequences_leaves_the_model_as_it_was(model: nn.Module, seed: int) -> None:
    bomb, rng = model.transformer.h[1].attn.resid_dropout, random.Random(seed)
    bare, hit = model(**INPUTS).logits, 0
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for number in range(250):
            wb = workbench.attach(model)
            try:
                if number % 2:
                    signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-4, 2e-2))
                random_sequence(rng, wb, bomb)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                hit += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            bomb.error = None
            gc.collect(0)
            wb.detach()
            assert left(model) == [], number
    finally:
        signal.signal(signal.SIGALRM, before)
    assert hit > 0
    assert torch.equal(model(**INPUTS).logits, bare)


@pytest.mark.slow
@torch.no_grad()
def test_threads_that_open_and_close_at_once_leave_nothing(model: nn.Module) -> None:
    bare, failed = model(**INPUTS).logits, []
    wb = workbench.attach(model)

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(60):
                with wb.ablate((rng.randint(0, 1), rng.randint(0, 3)), threads=rng.choice(["all", "this"])):
                    model(**INPUTS)
            assert _get_current_function_mode_stack() == []
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    wb.check_idle()
    assert left(model) == []
    assert torch.equal(model(**INPUTS).logits, bare)


@torch.no_grad()
@pytest.mark.parametrize("error", [Stop, ValueError])
def test_a_forward_that_is_broken_off_is_one_forward(model: nn.Module, error: type[BaseException]) -> None:
    bomb = model.transformer.h[1].attn.resid_dropout
    with workbench.attach(model) as wb:
        with wb.ablate((0, 0)):
            want = model(**INPUTS).logits
        with wb.ablate((0, 0)), wb.capture() as cap:
            bomb.error = error
            with pytest.raises(error):
                model(**INPUTS)
            bomb.error = None
            for _ in range(2):
                assert torch.equal(model(**INPUTS).logits, want)
    assert len(cap.calls) == 3
    assert [len(call.sites) for call in cap.calls] == [2, 2, 2]
    assert left(model) == []


@torch.no_grad()
def test_an_edit_can_be_kept_to_the_thread_that_opened_it(model: nn.Module) -> None:
    bare, seen = model(**INPUTS).logits, {}

    def request() -> None:
        seen["other"] = model(**INPUTS).logits

    with workbench.attach(model) as wb:
        for threads in ("this", "all"):
            with wb.ablate((0, 0), threads=threads):
                here = model(**INPUTS).logits
                other = threading.Thread(target=request)
                other.start()
                other.join()
            assert not torch.equal(here, bare)
            assert torch.equal(seen["other"], bare if threads == "this" else here)
        with pytest.raises(workbench.InterventionError, match="threads is"), wb.ablate((0, 0), threads="mine"):
            pass


@torch.no_grad()
def test_detach_ends_what_is_open(model: nn.Module) -> None:
    bare = model(**INPUTS).logits
    wb = workbench.attach(model)
    opened = wb.ablate((0, 0))
    opened.__enter__()
    assert not torch.equal(model(**INPUTS).logits, bare)
    wb.detach()
    assert left(model) == []
    assert torch.equal(model(**INPUTS).logits, bare)
