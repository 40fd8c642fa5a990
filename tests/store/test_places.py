"""Where a store stands: moved, replaced, damaged and oddly named; nobody's forwards are lost without a word."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import workbench
from support.tiny import small_llama, some_ids
from workbench import FileError, FormatError


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_llama()


def _write(model: nn.Module, path: Path | str, seeds: range, then: Callable[[], object] = lambda: None) -> None:
    with workbench.attach(model) as wb, torch.no_grad(), wb.capture(("entropy",), store=path):
        for seed in seeds:
            model(some_ids(1, 5, seed=seed))
            then()


def _ids(path: Path) -> list[list[list[int]]]:
    return [forward.ids["input"].tolist() for forward in workbench.load_capture(path).forwards]


def _wanted(seeds: range) -> list[list[list[int]]]:
    return [some_ids(1, 5, seed=seed).tolist() for seed in seeds]


@pytest.mark.parametrize("then", ["nothing", "another store"])
def test_moved_while_it_is_written(then: str, model: nn.Module, tmp_path: Path) -> None:
    """What was finished goes with it, and what stands in its place is left alone."""
    path, away = tmp_path / "a", tmp_path / "b"
    if then == "another store":
        _write(model, tmp_path / "other", range(5, 7))

    def move() -> None:
        if not away.exists():
            path.rename(away)
            if then == "another store":
                (tmp_path / "other").rename(path)

    with pytest.raises(FileError, match="a was moved, removed or replaced"):
        _write(model, path, range(3), move)
    assert _ids(away) == _wanted(range(1))
    _write(model, away, range(1, 2))
    assert _ids(away) == _wanted(range(2))
    if then == "another store":
        assert _ids(path) == _wanted(range(5, 7))
        assert all(call.stack("entropy").isfinite().all() for call in workbench.load_capture(path).calls)
    else:
        assert not path.exists()


@pytest.mark.parametrize("left", [None, b"", b'{"forward":0,', "two"])
def test_a_journal_that_has_lost_lines(left: bytes | str | None, model: nn.Module, tmp_path: Path) -> None:
    """Forwards that nothing tells of are not written over."""
    path = tmp_path / "a"
    _write(model, path, range(4))
    journal = path / "forwards.jsonl"
    whole = journal.read_bytes()
    if left is None:
        journal.unlink()
    else:
        journal.write_bytes(left if isinstance(left, bytes) else b"".join(whole.splitlines(keepends=True)[:2]))
    files = {one: one.read_bytes() for one in path.rglob("*") if one.is_file()}
    told = 0 if left != "two" else sum("forward" in json.loads(line) for line in whole.splitlines()[:2])
    said = f"holds 4 forwards, and forwards.jsonl tells of {told}|forwards.jsonl cannot be read"
    with pytest.raises(FormatError, match=said):
        workbench.load_capture(path)
    if left is not None:
        with pytest.raises(FormatError, match="its lines are gone"):
            _write(model, path, range(4, 5))
        assert {one: one.read_bytes() for one in files} == files
    journal.write_bytes(whole)
    _write(model, path, range(4, 5))
    assert _ids(path) == _wanted(range(5))


def test_odd_names_and_what_is_mended(model: nn.Module, tmp_path: Path) -> None:
    pd = pytest.importorskip("pandas")
    xr = pytest.importorskip("xarray")
    with pytest.raises(FileError, match="null"):
        _write(model, f"{tmp_path}/a\0b", range(1))
    path = tmp_path / "ü <b>%20#?.zarr"
    _write(model, path, range(1))
    for damaged in ("shape-0/self/site/c.0", "shape-0/self/zarr.json", "zarr.json"):
        (path / damaged).write_bytes(b"\xff")
    assert _ids(path) == _wanted(range(1))
    _write(model, path, range(1, 2))
    assert xr.open_zarr(path, group="shape-0/self", chunks=None).entropy.shape[0] == 2
    strange = tmp_path / "a\udc80b"  # a name that is no UTF-8
    try:
        strange.mkdir()
    except (OSError, UnicodeError):
        pytest.skip("this system has no such names")
    _write(model, strange, range(1))
    _write(model, strange, range(1, 2))
    assert _ids(strange) == _wanted(range(2))
    shutil.move(strange, tmp_path / "plain")
    assert len(pd.read_parquet(tmp_path / "plain" / "tables" / "tokens")) == 10
