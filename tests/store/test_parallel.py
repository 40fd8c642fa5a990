"""Rows that several threads write are those that one writes, and an interrupt or an error leaves none at work."""

import concurrent.futures
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import workbench
from support.tiny import small_llama, some_ids
from workbench import FileError
from workbench.storage.store import parallel
from workbench.storage.store.shards import Array


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on two cores, for rows of any size."""
    monkeypatch.setattr(parallel, "_SMALL", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def _files(path: Path) -> dict[str, bytes]:
    return {str(one.relative_to(path)): one.read_bytes() for one in path.glob("shape-*/**/c.*")}


@torch.no_grad()
def test_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_llama()
    with workbench.attach(model) as wb:
        for name, least in (("alone", 1 << 60), ("together", 0)):
            monkeypatch.setattr(parallel, "_SMALL", least)
            with wb.capture(("entropy", "received"), z=True, store=tmp_path / name):
                for seed in range(3):
                    model(some_ids(2, 9, seed=seed))
    assert _files(tmp_path / "alone") == _files(tmp_path / "together")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
@torch.no_grad()
def test_what_is_broken_off_is_gone_on_with(error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt comes while threads write, an error in one of them; the next forward waits for the rest."""
    model, path, plain = small_llama(), tmp_path / "a", Array.encode
    raised: list[int] = []

    def encode(array: Array, *given: Any) -> Any:
        if isinstance(error, OSError) and not raised:
            raised.append(1)
            raise error
        return plain(array, *given)

    def waiting(futures: Any) -> Any:
        if error is KeyboardInterrupt and futures and not raised:
            raised.append(1)
            raise KeyboardInterrupt
        return concurrent.futures.wait(futures)

    with workbench.attach(model) as wb, wb.capture(("entropy", "received"), z=True, store=path) as cap:
        model(some_ids(2, 9, seed=0))
        monkeypatch.setattr(Array, "encode", encode)
        monkeypatch.setattr(parallel, "wait", waiting)
        with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else FileError):
            model(some_ids(2, 9, seed=1))
        model(some_ids(2, 9, seed=2))
    assert raised
    opened = workbench.load_capture(path)
    assert [forward.ids["input"].tolist() for forward in opened.forwards] == [
        some_ids(2, 9, seed=seed).tolist() for seed in (0, 2)
    ]
    with workbench.attach(model) as wb, wb.capture(("entropy", "received"), z=True) as alone:
        model(some_ids(2, 9, seed=2))
    assert torch.equal(opened.calls[1].stack("entropy"), alone.stack("entropy"))
    assert len(cap.forwards) >= 2
