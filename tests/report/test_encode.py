"""Bytes stand for weights within the stated error, pooling keeps peaks, and no JSON can end its script element."""

import base64
import hashlib
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from workbench.json_text import digest, json_for_html
from workbench.report.encode import (
    base64_size,
    dequantise,
    pack,
    packed_size,
    pool,
    quantise,
    row_lengths,
    text64,
)

WEIGHTS = hnp.arrays(np.float32, st.tuples(*[st.integers(1, 7)] * 3), elements=st.floats(0, 1, width=32))


@given(WEIGHTS)
def test_the_error_is_what_is_said_and_small(weights: np.ndarray) -> None:
    coded, error = quantise(weights)
    assert np.abs(dequantise(coded) - weights).max() <= error + 1e-9
    assert error <= 1 / 254  # half a level of the square root, where the square is steepest


@given(WEIGHTS)
def test_zero_bytes_are_the_cells_that_no_head_sees(weights: np.ndarray) -> None:
    coded, _ = quantise(weights)
    assert ((coded == 0) == ~(weights > 0).any(axis=0)).all()


@given(WEIGHTS)
def test_pooling_bytes_is_pooling_weights(weights: np.ndarray) -> None:
    coded, _ = quantise(weights)
    pooled = pool(coded)
    for row in range(pooled.shape[1]):
        for column in range(pooled.shape[2]):
            block = coded[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert (pooled[:, row, column] == block.max(axis=(1, 2))).all()


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 2), (17, 17), (5, 9)])
def test_causal_maps_lose_only_what_is_hidden(rows: int, columns: int) -> None:
    coded = np.random.default_rng(0).integers(1, 255, (3, rows, columns)).astype(np.uint8)
    coded *= np.tri(rows, columns, columns - rows, dtype=np.uint8)
    data, packed = pack(coded)
    assert packed == (rows > 1)
    assert base64_size(len(data)) == packed_size(coded)
    restored, at = np.zeros_like(coded), 0
    for head in range(3):
        for row, length in enumerate(row_lengths(rows, columns, packed=packed)):
            restored[head, row, :length] = np.frombuffer(data[at : at + length], np.uint8)
            at += length
    assert at == len(data)
    assert (restored == coded).all()


def test_maps_with_weight_above_the_diagonal_are_kept_whole() -> None:
    coded = np.ones((2, 4, 4), np.uint8)
    data, packed = pack(coded)
    assert not packed
    assert len(data) == 32


@given(st.recursive(st.text(st.characters()) | st.floats() | st.integers(), st.lists))
def test_json_says_the_same_and_cannot_leave_its_element(value: object) -> None:
    text = json_for_html(value)
    assert not set(text) & set("<>&\u2028\u2029")
    text.encode("utf-8")

    def plain(item: object) -> object:
        if isinstance(item, list):
            return [plain(each) for each in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    assert json.loads(text) == plain(value)


def test_digest_is_what_a_policy_names() -> None:
    assert digest("x") == "sha256-" + base64.b64encode(hashlib.sha256(b"x").digest()).decode()
    assert text64(b"\x00\xff") == "AP8="
