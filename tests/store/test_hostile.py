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
from workbench import FormatError

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
