"""Specs refuse what a page could not read, and arrays arrive as they were."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from workbench.errors import ReportError, WorkbenchError
from workbench.views import Selection, SharedSelection, token_strip
from workbench.views.base.kinds import Kind
from workbench.views.base.spec import ViewSpec, validator

CHANNEL = {"label": "a", "unit": "", "signed": False}


def strip(**changes: Any) -> ViewSpec:
    n = 3
    held: dict[str, Any] = {
        "facts": {"tokens": ["a"] * n, "channels": [CHANNEL]},
        "blocks": {"values": np.zeros((1, n), np.float32)},
    }
    return ViewSpec("token_strip", "Title", "Caption.", **{**held, **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"facts": {"tokens": ["a"]}}, '"channels" is a required property'),
        ({"facts": {"tokens": [], "channels": [CHANNEL]}}, "facts.tokens"),
        ({"facts": {"tokens": [1], "channels": [CHANNEL]}}, "facts.tokens.0"),
        ({"blocks": {}}, '"values" is a required property'),
        ({"blocks": {"values": np.zeros(3, np.float32)}}, "blocks.values"),
        ({"blocks": {"values": np.zeros((1, 3), np.float64)}}, "blocks.values"),
        ({"blocks": {"values": np.zeros((1, 3), np.float16)}}, "holds float16, which no page can read"),
        ({"facts": {"tokens": ["a"], "channels": [CHANNEL], "\ud800": 1}}, "is no JSON"),
        ({"table": {"a": np.zeros(2), "b": ["x"]}}, r"lengths \[1, 2\]"),
    ],
)
def test_a_wrong_spec_is_refused_with_the_place(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ReportError, match=said):
        strip(**changes)


def test_facts_are_of_json_types_whatever_their_classes() -> None:
    class Name(str):
        """Text with a class of its own."""

    channel = {Name("label"): Path("a"), "unit": Name("nat"), "signed": np.bool_(False)}
    facts = {"tokens": [Name("a"), np.str_("b"), Path("c")], "channels": (channel,)}
    assert strip(facts=facts).to_static()["facts"] == {
        "tokens": ["a", "b", "c"],
        "channels": [{"label": "a", "unit": "nat", "signed": False}],
    }


@pytest.mark.parametrize(
    "schema", [{"type": "text"}, {"$ref": "http://127.0.0.1:9/a"}, {"$ref": Path(__file__).as_uri()}]
)
def test_a_schema_is_whole_and_nothing_is_fetched_for_it(schema: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "own.schema.json").write_text(json.dumps(schema))
    with pytest.raises(ReportError, match=r"own\.schema\.json is no schema of a view"):
        validator(Kind("own", tmp_path))


def test_an_unknown_view_is_refused() -> None:
    with pytest.raises(ReportError, match="there is no view 'pie'"):
        ViewSpec("pie", "Title", "Caption.")


@given(
    hnp.arrays(
        st.sampled_from(["u1", "u2", "u4", "i1", "i2", "i4", "f4", "f8", ">f4", ">i2"]),
        hnp.array_shapes(max_dims=3, max_side=9),
        elements={"allow_nan": True, "allow_infinity": True},
    )
)
def test_arrays_arrive_as_they_were(array: np.ndarray[Any, Any]) -> None:
    spec = strip(table={"column": array.reshape(-1)})
    for packed in (spec.to_static(), spec.to_live()):
        block = packed["blocks"]["table:column"]
        if "data" in block:
            raw = block["data"]
        else:
            raw = base64.b64decode(block["base64"])
            raw = zlib.decompress(raw) if block["deflate"] else raw
        back = np.frombuffer(raw, "<" + block["dtype"]).reshape(block["shape"])
        np.testing.assert_array_equal(back, array.reshape(-1))


def test_whole_numbers_of_eight_bytes_keep_their_value() -> None:
    spec = strip(table={"small": np.array([-1, 2**31 - 1]), "large": np.array([0, 2**53])})
    kinds = {name: block["dtype"] for name, block in spec.to_static()["blocks"].items()}
    assert kinds["table:small"] == "i4"
    assert kinds["table:large"] == "f8"


def test_numbers_that_json_has_not_are_null_and_order_is_kept() -> None:
    spec = strip(selection={"layer": 2}, notes=("b", "a"))
    static = spec.to_static()
    assert static["notes"] == ["b", "a"]
    assert static["selection"] == {"layer": 2}
    assert spec.digest == strip(selection={"layer": 2}, notes=("b", "a")).digest
    assert spec.digest != strip(selection={"layer": 3}, notes=("b", "a")).digest


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"row": 1}, "a selection has no 'row'"),
        ({"layer": -1}, "layer is -1"),
        ({"heads": [0, "x"]}, "heads is"),
        ({"query": 1.5}, "query is 1.5"),
        ({"site": 3}, "site is 3"),
    ],
)
def test_a_wrong_selection_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(WorkbenchError, match=said):
        Selection.of(values)


def test_those_who_share_a_selection_are_told_once() -> None:
    shared, told = SharedSelection(), []
    end = shared.on_select(told.append)
    shared.select(layer=1, heads=[2, 0])
    shared.select(layer=1, heads=[2, 0])
    assert told == [Selection(layer=1, heads=(2, 0))]
    assert Selection.of(told[0].to_json()) == told[0]
    end()
    shared.select(layer=2)
    assert len(told) == 1


@pytest.mark.parametrize(
    ("tokens", "values", "said"),
    [
        (["a"], torch.zeros(1, dtype=torch.complex64), "entropy is complex"),
        (["a"], ["much"], "entropy is no numbers"),
        (["a"], torch.zeros(1, device="meta"), "entropy is no plain tensor"),
        ([7], [0.5], "token 0 is int, expected its text"),
    ],
)
def test_a_view_is_of_real_numbers_and_texts(tokens: list[Any], values: Any, said: str) -> None:
    with pytest.raises(ReportError, match=said):
        token_strip(tokens, values, label="entropy")
