"""Results keep every field in a file, to the bit, and refuse what they cannot keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from workbench.errors import FormatError, WorkbenchError
from workbench.storage import files
from workbench.storage.result import Result


@dataclass(frozen=True)
class Scores(Result):
    form = "workbench.test_scores"

    scores: Any
    provenance: Any

    @property
    def table(self) -> pd.DataFrame:
        return pd.DataFrame()


@dataclass(frozen=True)
class OtherScores(Scores):
    more: int = 0


FIELDS = [
    torch.tensor([1.0, float("nan"), float("inf"), -0.0]),
    np.arange(6, dtype=np.int16).reshape(2, 3),
    {(9, 6): torch.zeros(0), "L9H6": (1, [2.5, None], {"x": True})},
    {},
    np.float32(0.1),
    "text with \x00 and \ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


@pytest.mark.parametrize("value", FIELDS, ids=lambda v: type(v).__name__)
def test_fields_survive_a_file(tmp_path, value):
    path = Scores(value, {"model": "m", "seeds": [1, 2]}).save(tmp_path / "scores.safetensors")
    loaded = Scores.load(path)
    assert same(value, loaded.scores)
    assert loaded.provenance == {"model": "m", "seeds": [1, 2]}


def test_half_a_character_is_kept_as_its_number(tmp_path):
    loaded = Scores.load(Scores({"\ud800": "a\udfff"}, {}).save(tmp_path / "scores.safetensors"))
    assert loaded.scores == {"\\ud800": "a\\udfff"}


def test_half_a_character_in_a_file_is_refused(tmp_path):
    header = {"fields": {"scores": "a\ud800", "provenance": {"items": []}}}
    path = files.write(tmp_path / "scores.safetensors", Scores.form, header, {})
    with pytest.raises(FormatError, match="not text of whole characters"):
        Scores.load(path)


def test_what_cannot_be_kept_is_named(tmp_path):
    with pytest.raises(WorkbenchError, match="scores/1 is a object"):
        Scores([1, object()], {}).save(tmp_path / "scores.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_version_is_refused(tmp_path):
    path = Scores(1, {}).save(tmp_path / "scores.safetensors")
    with pytest.raises(FormatError, match="does not fit this version: more"):
        OtherScores.load(path)
