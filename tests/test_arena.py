"""The memory of a capture: many tensors in few maps, apart from each other, given back when they are gone."""

from __future__ import annotations

import gc
import mmap
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import workbench
from workbench.capture import arena as spare
from workbench.capture.arena import Arena

MAPS = Path("/proc/self/maps")
linux = pytest.mark.skipif(not MAPS.exists(), reason="counts the maps that Linux tells of")


def n_maps() -> int:
    return len(MAPS.read_text().splitlines())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64, torch.int64])
@pytest.mark.parametrize("shape", [(3,), (17, 63, 100), (1, 5_000_000), (0,), (2, 0, 3), ()])
def test_copies_are_equal_contiguous_and_apart(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    arena = Arena()
    given = (torch.rand(*shape) * 9).to(dtype).transpose(0, -1) if len(shape) > 1 else (torch.rand(shape) * 9).to(dtype)
    first, second = arena.copy(given), arena.copy(given)
    assert torch.equal(first, given)
    assert first.is_contiguous()
    assert first.dtype == dtype
    assert first.untyped_storage().nbytes() == given.numel() * given.element_size()
    first.zero_()
    assert torch.equal(second, given)


def test_a_tensor_outlives_the_arena_and_can_be_pickled() -> None:
    whole = torch.rand(300, 300)
    kept = Arena().copy(whole)
    gc.collect()
    assert torch.equal(kept, whole)
    sent = pickle.dumps(kept)
    assert len(sent) < kept.nbytes + 10_000
    assert torch.equal(pickle.loads(sent), whole)


@linux
def test_many_large_tensors_take_few_maps() -> None:
    arena, given, before = Arena(), torch.rand(128, 128), n_maps()
    kept = [arena.copy(given) for _ in range(3000)]
    assert n_maps() - before < 30
    assert all(torch.equal(each, given) for each in kept[::100])


@linux
def test_what_is_gone_is_given_back() -> None:
    def resident() -> int:
        """Bytes, without those that the system may take."""
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        of = {name: int(rest.split()[0]) for name, rest in (line.split(":") for line in lines[1:])}
        return 1024 * (of["Rss"] - of["LazyFree"])

    arena, given, before = Arena(), torch.rand(1 << 18), resident()
    kept = [arena.copy(given) for _ in range(300)]
    held = sum(each.nbytes for each in kept)
    assert resident() - before > 0.8 * held
    del kept
    arena.copy(torch.rand(1 << 25))  # the arena itself holds on to its last block only
    gc.collect()
    assert resident() - before < 0.6 * held
    del arena
    assert sum(map(len, spare._spare)) <= spare._SPARE
    spare.give_back()
    assert not spare._spare


@pytest.mark.skipif(not hasattr(mmap, "MADV_FREE"), reason="spare blocks need it")
def test_a_block_is_used_again_once_all_in_it_is_gone() -> None:
    spare.give_back()
    given, arena = torch.rand(1 << 16), Arena()
    first, second = arena.copy(given), arena.copy(given)
    at = first.data_ptr()
    del arena, first
    other = Arena().copy(given)
    assert other.data_ptr() != at
    assert torch.equal(second, given)
    del second
    again = Arena().copy(given + 1)
    assert again.data_ptr() == at
    assert torch.equal(again, given + 1)


@pytest.mark.parametrize("kept_by", [lambda t: t[1:], lambda t: t.numpy()[1:], lambda t: torch.from_dlpack(t)])
def test_a_block_is_filled_again_once_nothing_lies_in_it(kept_by: Callable[[torch.Tensor], Any]) -> None:
    arena, given = Arena(), torch.rand(300, 300)
    first = [arena.copy(given) for _ in range(3)]
    at = first[0].data_ptr()
    held = kept_by(first.pop())  # the last one lives on in another form, behind those that are gone
    first.clear()
    others = [arena.copy(torch.zeros(300, 300)) for _ in range(30)]  # more than the block has room for
    assert at not in [one.data_ptr() for one in others]
    assert held[-1].tolist() == given[-1].tolist()
    del held, others
    latest = arena.copy(given)
    again = latest.data_ptr()
    for _ in range(3):
        del latest
        latest = arena.copy(given)
        assert latest.data_ptr() == again
    assert torch.equal(latest, given)


@linux
def test_a_capture_of_many_forwards_takes_few_maps() -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.MultiheadAttention(64, 4, batch_first=True) for _ in range(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x, x, x, need_weights=False)[0]
            return x

    model, x = Layers().eval(), torch.randn(1, 256, 64)
    with workbench.attach(model) as wb, torch.no_grad(), wb.capture(("peak",), z=True) as cap:
        model(x)  # what runs for the first time maps libraries
        before = n_maps()
        for _ in range(40):
            model(x)
        assert n_maps() - before < 40
    assert torch.equal(cap.calls[0]["layers.7"].z, cap.calls[40]["layers.7"].z)


def test_memory_is_private_to_a_process() -> None:
    if sys.platform == "win32":
        pytest.skip("there is no fork")
    kept = Arena().copy(torch.zeros(1 << 16))
    numbers = memoryview(kept.numpy())
    child = os.fork()
    if child == 0:  # nothing of torch here: its threads are not those of the child
        numbers[0] = 1.0
        os._exit(0)
    os.waitpid(child, 0)
    assert not kept.any()
