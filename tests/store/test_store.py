"""Captures that lie in a store are those in memory, to the bit."""

import os
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import workbench
from support.tiny import FAMILIES, Family, make, small_llama, some_ids
from workbench import Capture, CaptureError, FileError, FormatError
from workbench.capture.site_capture import KEPT
from workbench.storage.store.stored_tensor import StoredTensor

NAMES = ("entropy", "received", "top_keys", "pooled_mean", "lse", "value_weighted_distance")
KEEP: dict[str, Any] = {"z": True, "values": True, "n_top": 3, "block": 5}


def assert_same(a: Capture, b: Capture) -> None:
    """All that two captures hold is equal to the bit."""
    assert len(a.forwards) == len(b.forwards)
    assert a.ledger == b.ledger
    for one, other in zip(a.forwards, b.forwards, strict=True):
        assert (one.index, one.packed, one.thread) == (other.index, other.packed, other.thread)
        assert dict(one.tokens) == dict(other.tokens)
        assert list(one.ids) == list(other.ids)
        assert list(one.sites) == list(other.sites)
        for stream, ids in one.ids.items():
            assert torch.equal(ids, other.ids[stream])
        for name, x in one.sites.items():
            y = other.sites[name]
            assert (x.site, x.shape, x.kernel, x.signed, x.normalised, x.n_calls, x.state) == (
                y.site, y.shape, y.kernel, y.signed, y.normalised, y.n_calls, y.state,
            )  # fmt: skip
            assert x.nbytes == y.nbytes
            assert list(x.statistics) == list(y.statistics)
            for key, tensor in x.statistics.items():
                assert_equal(tensor, y.statistics[key])
            for field in KEPT.values():
                assert_equal(getattr(x, field), getattr(y, field))
            assert list(x.patterns) == list(y.patterns)
            for key, pattern in x.patterns.items():
                there = y.patterns[key].state()[1]
                for part, tensor in pattern.state()[1].items():
                    assert_equal(tensor, there[part])


def assert_equal(a: Tensor | None, b: Tensor | None) -> None:
    assert (a is None) == (b is None)
    if a is not None and b is not None:
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        torch.testing.assert_close(b + 0, a + 0, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@torch.no_grad()
def test_every_family(family: Family, tmp_path: Path) -> None:
    model, inputs = make(family), family.inputs()
    with workbench.attach(model) as wb:
        with wb.capture(NAMES, **KEEP) as plain:
            outputs = [model(**inputs) for _ in range(2)]
        with wb.capture(NAMES, **KEEP, store=tmp_path / "a.zarr") as cap:
            again = [model(**inputs) for _ in range(2)]
        assert_same(plain, cap)
        for a, b in zip(plain.calls[0], cap.calls[0], strict=True):
            assert a.has_result == b.has_result
            if a.has_result:
                assert torch.equal(a.result(), b.result())
    assert str(outputs) == str(again)
    opened = workbench.load_capture(tmp_path / "a.zarr")
    assert_same(plain, opened)
    assert opened.provenance["weights_sha256"] == plain.provenance["weights_sha256"]
    for a, b in zip(plain.calls[1], opened.calls[1], strict=True):
        for name, value in a.pattern.statistics(("entropy", "received")).items():
            assert_equal(value, b.pattern.statistics((name,))[name])
        assert_equal(a.pattern.dense(), b.pattern.dense())
    for statistic in ("entropy", "received", "lse"):
        assert opened.table(statistic).equals(plain.table(statistic))
        assert opened.table(statistic, per="position").equals(plain.table(statistic, per="position"))


@torch.no_grad()
def test_pool_stack_save_and_steps_of_a_generation(tmp_path: Path) -> None:
    model = small_llama()
    with workbench.attach(model) as wb:
        captures = []
        for keep in ({}, {"store": tmp_path / "a.zarr"}):
            with wb.capture(("entropy", "induction"), z=True, values=True, **keep) as cap:
                model.generate(some_ids(2, 6), max_new_tokens=4, min_new_tokens=4, do_sample=False)
            captures.append(cap)
        captures.append(workbench.load_capture(tmp_path / "a.zarr"))
    plain = captures[0]
    for cap in captures[1:]:
        assert_same(plain, cap)
        assert_same(plain.joined(), cap.joined())
        assert_equal(plain.calls[2].stack("entropy"), cap.calls[2].stack("entropy"))
        assert_equal(plain.calls[0].pool().stack("entropy"), cap.calls[0].pool().stack("entropy"))
        file = cap.save(tmp_path / "again.safetensors", pattern=True)
        assert_same(plain, workbench.load_capture(file))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_other_numbers(dtype: torch.dtype, tmp_path: Path) -> None:
    model = small_llama().to(dtype)
    with workbench.attach(model) as wb:
        with wb.capture(NAMES, **KEEP) as plain:
            model(some_ids(2, 9))
        with wb.capture(NAMES, **KEEP, store=tmp_path / "a"):
            model(some_ids(2, 9))
    assert_same(plain, workbench.load_capture(tmp_path / "a"))


@torch.no_grad()
def test_packed_rows(tmp_path: Path) -> None:
    positions = torch.cat([torch.arange(n) for n in (4, 3, 6)])[None]
    inputs = {"input_ids": some_ids(1, 13), "position_ids": positions, "use_cache": False}
    model = small_llama()
    with workbench.attach(model) as wb:
        with wb.capture(NAMES, **KEEP) as plain:
            model(**inputs)
            model(**inputs)
        with wb.capture(NAMES, **KEEP, store=tmp_path / "a"):
            model(**inputs)
            model(**inputs)
    assert len(plain.forwards) == 6
    assert_same(plain, workbench.load_capture(tmp_path / "a"))


def test_gradients_are_stored_with_their_forward(tmp_path: Path) -> None:
    model = small_llama()
    with workbench.attach(model) as wb:
        for keep in ({}, {"store": tmp_path / "a"}):
            with wb.capture(("entropy",), gradients=True, **keep) as cap:
                for seed in range(2):
                    model(some_ids(2, 7, seed=seed)).logits.square().mean().backward()
                    if keep:
                        assert len(workbench.load_capture(tmp_path / "a").forwards) == seed
            if not keep:
                plain = cap
        assert_same(plain, workbench.load_capture(tmp_path / "a"))
        _late_gradients(wb, model, tmp_path / "b")


def _late_gradients(wb: workbench.Workbench, model: nn.Module, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of calls whose gradients did not arrive
        with wb.capture(("entropy",), gradients=True, store=path):
            first = model(some_ids(1, 5)).logits.mean()
            model(some_ids(1, 5)).logits.mean().backward()
            with pytest.raises(CaptureError, match="in the store already"):
                first.backward()


@torch.no_grad()
def test_threads(tmp_path: Path) -> None:
    model = small_llama()
    inputs = [some_ids(1, 5 + i) for i in range(4)]
    with workbench.attach(model) as wb, wb.capture(("entropy",), store=tmp_path / "a"):
        threads = [threading.Thread(target=model, args=(one,)) for one in inputs for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    opened = workbench.load_capture(tmp_path / "a")
    assert sorted(c.sites[0].name and c[0].shape[2] for c in opened.calls) == sorted([5, 6, 7, 8] * 3)
    with workbench.attach(model) as wb:
        for call in opened.calls:
            with wb.capture(("entropy",)) as alone:
                model(call.forwards[0].ids["input"] + 0)
            assert torch.equal(call.stack("entropy"), alone.stack("entropy"))


@torch.no_grad()
def test_memory_does_not_grow_and_the_limit_is_of_what_is_under_way(tmp_path: Path) -> None:
    model = small_llama()
    with workbench.attach(model) as wb:
        with wb.capture(("entropy",)) as one:
            model(some_ids(1, 40))
        limit = one.nbytes + 1000
        with wb.capture(("entropy",), limit=limit):
            model(some_ids(1, 40))
            with pytest.raises(CaptureError, match="limit"):
                model(some_ids(1, 40))
        with wb.capture(("entropy",), limit=limit, store=tmp_path / "a") as cap:
            for _ in range(3):
                model(some_ids(1, 40))
    assert cap.nbytes == 3 * one.nbytes
    assert all(isinstance(c[0].entropy, StoredTensor) for c in cap.calls)


@torch.no_grad()
def test_a_store_is_read_while_it_grows_and_gone_on_with(tmp_path: Path) -> None:
    model, path = small_llama(), tmp_path / "a"
    with workbench.attach(model) as wb:
        with wb.capture(("entropy",)) as plain:
            for i in range(5):
                model(some_ids(2, 4 + i % 2, seed=i))
        with wb.capture(("entropy",), store=path):
            for i in range(3):
                model(some_ids(2, 4 + i % 2, seed=i))
                opened = workbench.load_capture(path)
                assert len(opened.forwards) == i + 1
                assert torch.equal(opened.calls[i].stack("entropy"), plain.calls[i].stack("entropy"))
            with (
                workbench.attach(small_llama()) as other,
                pytest.raises(FileError, match="being written"),
                other.capture(("entropy",), store=path),
            ):
                pass
        with wb.capture(("entropy",), store=path) as cap:
            for i in range(3, 5):
                model(some_ids(2, 4 + i % 2, seed=i))
        assert [forward.index for forward in cap.forwards] == [3, 4]
    opened = workbench.load_capture(path)
    assert [forward.index for forward in opened.forwards] == list(range(5))
    for a, b in zip(plain.calls, opened.calls, strict=True):
        assert torch.equal(a.stack("entropy"), b.stack("entropy"))


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, Capture]:
    """A store of three forwards, and their capture in memory."""
    model = small_llama()
    with workbench.attach(model) as wb, torch.no_grad():
        with wb.capture(("entropy", "received"), values=True) as plain:
            for seed in range(3):
                model(some_ids(2, 33, seed=seed))
        with wb.capture(("entropy", "received"), values=True, store=tmp_path / "a"):
            for seed in range(3):
                model(some_ids(2, 33, seed=seed))
    return tmp_path / "a", plain


def test_a_head_is_read_alone(stored: tuple[Path, Capture], monkeypatch: pytest.MonkeyPatch) -> None:
    path, plain = stored
    cap, read = workbench.load_capture(path), []
    plain_read = os.pread

    def counted(file: int, n: int, at: int) -> bytes:
        found = plain_read(file, n, at)
        read.append(len(found))
        return found

    monkeypatch.setattr(os, "pread", counted)
    site = cap.calls[1][0]
    assert site.entropy.shape == (2, 4, 33)
    assert site.nbytes == plain.calls[1][0].nbytes
    assert not read
    assert torch.equal(site.entropy[:, 2], plain.calls[1][0].entropy[:, 2])
    chunk, index = 2 * 33 * 4 + 4, 16 * 8 + 4  # a head of two examples; two sites of four heads
    assert sum(read) == chunk + index
    read.clear()
    for asked in ([1, 3], slice(1, None, 2), [-1]):
        assert torch.equal(site.entropy[:, asked, 4:], plain.calls[1][0].entropy[:, asked, 4:])
    assert sum(read) == 5 * chunk + 3 * index
    read.clear()
    assert torch.equal(site.pattern.rows([3], heads=[1]), plain.calls[1][0].pattern.rows([3], heads=[1]))
    assert sum(read) < 0.5 * site.pattern.nbytes


def test_damage_is_named_and_the_rest_is_read(stored: tuple[Path, Capture]) -> None:
    path, plain = stored
    file = next((path / "shape-0" / "self" / "entropy").glob("c.1.*"))
    raw = bytearray(file.read_bytes())
    raw[3 * (2 * 33 * 4 + 4) + 9] ^= 1  # in head 3 of the first site
    file.write_bytes(raw)
    cap = workbench.load_capture(path)
    with pytest.raises(FormatError, match=r"self/entropy, row 1, site 0, head 3 is damaged"):
        cap.calls[1][0].entropy.sum()
    assert torch.equal(cap.calls[1][0].entropy[:, :3], plain.calls[1][0].entropy[:, :3])
    assert torch.equal(cap.calls[1][1].entropy, plain.calls[1][1].entropy + 0)
    assert torch.equal(cap.calls[1][0].received, plain.calls[1][0].received + 0)
    raw[-3] ^= 1
    file.write_bytes(raw)
    with pytest.raises(FormatError, match=r"index of .*row 1.* is damaged"):
        cap.calls[1][1].entropy.sum()
    file.unlink()
    with pytest.raises(FormatError, match=r"row 1.* cannot be read"):
        cap.calls[1][1].entropy.sum()
    journal = path / "forwards.jsonl"
    lines = journal.read_bytes().split(b"\n")
    journal.write_bytes(b"\n".join([lines[0], b"{", *lines[2:]]))
    with pytest.raises(FormatError, match="line 2"):
        workbench.load_capture(path)


@torch.no_grad()
def test_other_models_versions_settings_and_folders(stored: tuple[Path, Capture], tmp_path: Path) -> None:
    path, _ = stored
    other = small_llama()
    other.lm_head.weight.add_(1)
    with (
        workbench.attach(other) as wb,
        pytest.raises(CaptureError, match=r"another model: weights_sha256"),
        wb.capture(("entropy", "received"), values=True, store=path),
    ):
        pass
    with workbench.attach(small_llama()) as wb:
        with pytest.raises(CaptureError, match="another values="), wb.capture(("entropy", "received"), store=path):
            pass
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "notes.txt").write_text("x")
        with pytest.raises(FormatError, match="no store"), wb.capture(store=tmp_path / "mine"):
            pass
        with pytest.raises(FileError, match="is a file"), wb.capture(store=tmp_path / "mine" / "notes.txt"):
            pass
        with pytest.raises(FileError, match="cannot be written"), wb.capture(store=tmp_path / "no" / "a"):
            pass
        facts = (path / "workbench.json").read_text()
        (path / "workbench.json").write_text(facts.replace('"version": 1', '"version": 2'))
        for opened in (lambda: workbench.load_capture(path), lambda: wb.capture(store=path).__enter__()):
            with pytest.raises(FormatError, match="version 2"):
                opened()
    with pytest.raises(FormatError, match="no store"):
        workbench.load_capture(tmp_path / "mine")


@pytest.mark.parametrize("where", ["shards", "journal", "root", "tables"])
@torch.no_grad()
def test_an_interrupt_while_a_forward_is_written(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward under way may be lost, nothing else is, and the same capture goes on."""
    from workbench.capture.store.tables import Tables
    from workbench.capture.store.writing import StoreWriter
    from workbench.storage.store.journal import Journal
    from workbench.storage.store.shards import Array

    owner, name = {
        "shards": (Array, "encode"), "journal": (Journal, "add"), "root": (StoreWriter, "_write_root"),
        "tables": (Tables, "add"),
    }[where]  # fmt: skip
    plain = getattr(owner, name)

    def interrupted(*given: Any) -> Any:
        if where == "journal":  # half a line is written
            os.write(given[0]._file, b'{"forward":1,')
        monkeypatch.setattr(owner, name, plain)
        raise KeyboardInterrupt

    model, path = small_llama(), tmp_path / "a"
    with workbench.attach(model) as wb:
        with wb.capture(("entropy",), store=path) as cap:
            model(some_ids(1, 5, seed=0))
            monkeypatch.setattr(owner, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                model(some_ids(1, 6, seed=1))
            model(some_ids(1, 6, seed=2))
        found = [forward.ids["input"].tolist() for forward in workbench.load_capture(path).forwards]
        kept = [0, 1, 2] if where in ("root", "tables") else [0, 2]
        assert found == [some_ids(1, 5 + (seed > 0), seed=seed).tolist() for seed in kept]
        assert len(cap.forwards) == 3
    import pandas as pd

    assert sorted(set(pd.read_parquet(path / "tables" / "heads").forward)) == list(range(len(kept)))


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pyarrow", "pyarrow.parquet", "google_crc32c"):
        monkeypatch.setitem(sys.modules, name, None)
    with (
        workbench.attach(small_llama()) as wb,
        pytest.raises(workbench.WorkbenchError, match=r"\[store\]"),
        wb.capture(("entropy",), store=tmp_path / "a"),
    ):
        pass
    assert not (tmp_path / "a").exists()


@torch.no_grad()
def test_a_full_disk(tmp_path: Path) -> None:
    """Files may only be so large, as on a full disk; with room again it is gone on with."""
    resource = pytest.importorskip("resource")
    model, path = small_llama(), tmp_path / "a"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    done: list[int] = []

    def until_full() -> None:
        with wb.capture(("entropy",), store=path):
            for i in range(100):
                model(some_ids(1, 3, seed=i))
                done.append(i)
                resource.setrlimit(resource.RLIMIT_FSIZE, (9000, before[1]))

    with workbench.attach(model) as wb:
        try:
            with pytest.raises(FileError, match="cannot be written"):
                until_full()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        opened = workbench.load_capture(path)
        assert 1 <= len(done) <= len(opened.forwards) <= len(done) + 1 < 100
        with wb.capture(("entropy",), store=path):
            model(some_ids(1, 3, seed=len(opened.forwards)))
        opened = workbench.load_capture(path)
        with wb.capture(("entropy",)) as plain:
            for i in range(len(opened.forwards)):
                model(some_ids(1, 3, seed=i))
    assert plain.table("entropy").equals(opened.table("entropy"))
    import pandas as pd

    heads = pd.read_parquet(path / "tables" / "heads")
    assert heads.entropy.tolist() == plain.table("entropy").entropy.tolist()
