"""What strangers may write into a store: said to be wrong, and nothing made of it before it is checked."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import workbench
from workbench import FileError, FormatError

FACTS, JOURNAL = "shape-0/facts.json", "forwards.jsonl"


def _model() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def _go_on(path: Path) -> None:
    model = _model()
    with workbench.attach(model) as wb, torch.no_grad(), wb.capture(("entropy",), queries_keys=False, store=path):
        model(torch.randn(2, 5, 16))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "a"
    _go_on(path)
    return path


@pytest.fixture
def path(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "a"))


def _sized(axis: int, n: int) -> Callable[[dict[str, Any]], None]:
    """Has the entropies be so long on an axis."""

    def change(facts: dict[str, Any]) -> None:
        [family] = facts["families"]
        family["arrays"]["entropy"]["shape"][axis] = n
        for entry in family["entries"]:
            entry["shape"][axis] = n

    return change


def _of_one_site(facts: dict[str, Any]) -> None:
    facts["families"][0]["arrays"]["entropy"]["sites"] = 1


def _ids_that_are_none(facts: dict[str, Any]) -> None:
    facts["ids"]["input"] = {
        "name": "input", "dtype": "float32", "sites": 0, "shape": [3], "head_axis": None, "dims": ["forward", "n"],
    }  # fmt: skip


def _facts_of_a_site(line: dict[str, Any]) -> None:
    line["sites"] = {name: [1] for name in line["sites"]}


def _texts_without_ids(line: dict[str, Any]) -> None:
    line["texts"] = ["input"]


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        (FACTS, _sized(1, 2**36), "index of .* is damaged"),
        (FACTS, _sized(2, 2**36), "index of .* is damaged"),
        (FACTS, _sized(2, 2**40), "an array that a file can hold"),
        (FACTS, _of_one_site, "of all its sites"),
        (FACTS, _ids_that_are_none, "not ids"),
        (JOURNAL, _facts_of_a_site, "not an object"),
        (JOURNAL, _texts_without_ids, "streams that have ids"),
    ],
)
def test_what_files_say(path: Path, file: str, change: Callable[[dict[str, Any]], None], said: str) -> None:
    lines = [json.loads(line) for line in (path / file).read_text().splitlines()]
    change(next(line for line in lines if "forward" in line or "families" in line))
    (path / file).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    with pytest.raises(FormatError, match=said):
        workbench.load_capture(path).forwards[0].sites["layers.1.self_attn"].statistics["entropy"].sum()


def test_heads_that_are_one_chunk(path: Path) -> None:
    """An index may not have all heads be the same bytes: a small file would be a large tensor."""
    [file] = (path / "shape-0" / "self" / "entropy").glob("c.0.*")
    from google_crc32c import value

    raw, n = file.read_bytes(), 2 * 4
    index = raw[-(16 * n + 4) :][:16] * n
    file.write_bytes(raw[: 2 * 5 * 4 + 4] + index + value(index).to_bytes(4, "little"))
    with pytest.raises(FormatError, match=r"index of .* is damaged"):
        workbench.load_capture(path).calls[0][1].entropy.sum()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts what this process has open")
def test_what_cannot_be_gone_on_with_is_closed(path: Path) -> None:
    (path / FACTS).write_text("{}")
    before = os.listdir("/proc/self/fd")
    with pytest.raises(FormatError, match="families"):
        _go_on(path)
    assert len(os.listdir("/proc/self/fd")) == len(before)


@pytest.mark.parametrize("name", ["000000.parquet", "other.parquet"])
def test_a_damaged_table_is_made_anew(path: Path, name: str) -> None:
    folder = path / "tables" / "heads"
    (folder / "000000.parquet").unlink()
    (folder / name).write_bytes(b"")
    with pytest.raises(FormatError, match="the table heads is damaged") as caught:
        _go_on(path)
    assert "remove the folder tables" in str(caught.value)
    shutil.rmtree(path / "tables")
    _go_on(path)
    import pandas as pd

    assert sorted(set(pd.read_parquet(folder).forward)) == [0, 1]


@pytest.mark.skipif(os.name != "posix", reason="pipes and devices in a folder")
@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("name", [JOURNAL, FACTS, "shape-0/self/entropy/c.0.0.0.0.0", "tables/heads/000000.parquet"])
def test_what_is_no_file_is_neither_waited_for_nor_read_to_its_end(path: Path, name: str, kind: str) -> None:
    (path / name).unlink()
    if kind == "pipe":
        os.mkfifo(path / name)
    else:
        (path / name).symlink_to("/dev/zero")
    read = name.startswith("shape-0/self")
    with pytest.raises((FormatError, FileError), match=r"it is no file|damaged"):
        _ = workbench.load_capture(path).calls[0][1].entropy.sum() if read else _go_on(path)


@pytest.mark.skipif(os.name != "posix", reason="links need no rights")
@pytest.mark.parametrize(
    "name",
    [
        "shape-0/self/entropy/c.1.0.0.0.0", ".zarr.json.draft", "tables/heads/.draft", ".lock", JOURNAL, "shape-0",
        "shape-0/self", "shape-0/self/entropy", "tables", "tables/heads",
    ],
)  # fmt: skip
def test_nothing_is_written_where_a_link_leads(path: Path, name: str, tmp_path: Path) -> None:
    place, elsewhere = path / name, tmp_path / "elsewhere"
    if place.exists():
        place.rename(elsewhere)
    else:
        elsewhere.write_text("theirs")
    place.symlink_to(elsewhere)
    inside = [one for one in (elsewhere, *elsewhere.rglob("*")) if one.is_file()]
    before = {one: one.read_bytes() for one in inside}
    with pytest.raises(FileError, match="link"):
        _go_on(path)
    assert {one: one.read_bytes() for one in [elsewhere, *elsewhere.rglob("*")] if one.is_file()} == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_leaves_the_store_to_its_own(tmp_path: Path) -> None:
    """Both would write the same rows, and the journal would tell of each twice."""
    model, path = _model(), tmp_path / "a"
    with workbench.attach(model) as wb, torch.no_grad():
        with wb.capture(("entropy",), store=path):
            model(torch.randn(2, 5, 16))
            child = os.fork()
            if not child:
                try:
                    model(torch.randn(2, 5, 16))
                except FileError as error:
                    os._exit(7 if "forked from" in str(error) else 1)
                os._exit(2)
            _, ended = os.waitpid(child, 0)
            model(torch.randn(2, 6, 16))
        assert os.waitstatus_to_exitcode(ended) == 7
    assert [call[1].shape[2] for call in workbench.load_capture(path).calls] == [5, 6]
