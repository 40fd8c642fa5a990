"""Attention that is cut into items and moved: nothing is lost, loads are level, and rows are those of the whole."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import CaptureError
from workbench.kernels.disaggregation import Devices, Item, Model, Sizes, attend, packed, plan, simulate
from workbench.kernels.masks import Mask
from workbench.kernels.softmax import SoftmaxPattern

LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=12)


@given(st.integers(1, 60), st.data())
@settings(max_examples=60, deadline=None)
def test_pairs_are_counted_and_mirror_images_cost_the_same(length: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, (length - 1) // 2))
    item = Item(0, length, first, data.draw(st.integers(first + 1, (length + 1) // 2)))
    assert item.pairs == sum(row + 1 for row in item.rows)
    assert item.n_keys == max(item.rows) + 1
    assert len(set(item.rows)) == item.n_rows
    assert set(item.rows) == {length - 1 - row for row in item.rows}
    if 2 * item.last <= length:  # of a head that does not reach the middle
        assert item.pairs == (item.last - item.first) * (length + 1)


def _rows(items: list[Item]) -> list[tuple[int, int]]:
    return sorted((item.document, row) for item in items for row in item.rows)


@given(LENGTHS, st.integers(1, 7), st.floats(0, 0.5))
@settings(max_examples=80, deadline=None)
def test_every_row_is_somewhere_once_before_and_after(lengths: list[int], n: int, tolerance: float) -> None:
    placed = packed(lengths, n)
    every = sorted((document, row) for document, length in enumerate(lengths) for row in range(length))
    assert _rows(list(itertools.chain(*placed))) == every
    budget = -(-sum(lengths) // n)
    assert all(sum(item.n_rows for item in items) <= budget + 1 for items in placed)
    made = plan(placed, tolerance=tolerance)
    assert _rows(list(itertools.chain(*made.items))) == every
    assert sum(made.loads) == sum(made.before) == sum(length * (length + 1) // 2 for length in lengths)
    mean = sum(made.loads) / n
    assert max(made.loads) <= max(made.before)
    if max(lengths) + 1 <= tolerance * mean:  # a row and its mirror image are not divided
        assert max(made.loads) <= (1 + tolerance) * mean
    assert plan(placed, tolerance=tolerance) == made


def test_loads_of_long_and_short_documents_come_within_the_tolerance() -> None:
    draw = random.Random(0)
    lengths = [min(65536, int(draw.lognormvariate(7.5, 1.5)) + 1) for _ in range(400)]
    for tolerance in (0.02, 0.1):
        made = plan(packed(lengths, 16), tolerance=tolerance)
        assert made.imbalance[0] > 1.5
        assert 1 <= made.imbalance[1] <= 1 + tolerance + 1e-3
        assert 1 - min(made.loads) / (sum(made.loads) / 16) <= tolerance + 1e-3
        assert all(move.n_bytes > 0 for move in made.moves)
        assert sum(made.traffic) == 2 * sum(move.n_bytes for move in made.moves)


def test_long_documents_are_moved_before_short_ones() -> None:
    """Their pairs cost fewer bytes each."""
    placed = [[Item.whole(0, 4096), *(Item.whole(i, 1024) for i in range(1, 9))], [Item.whole(9, 64)]]
    made = plan(placed, Sizes(heads=8, kv_heads=8))
    assert {move.item.document for move in made.moves} == {0}
    first = made.moves[0]
    assert first.n_bytes == first.item.n_rows * 8 * (2 * 128 * 2 + 4) + first.item.n_keys * 8 * 2 * 128 * 2


def test_items_in_any_order_are_packed_causal_attention() -> None:
    """Outputs, log-sum-exps and statistics of rows, scattered to where they belong."""
    lengths, generator = [33, 5, 1, 18], torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, sum(lengths), 8, generator=generator, dtype=torch.float64) for h in (4, 2, 2))
    document = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    mask = (document[:, None] == document) & torch.ones(57, 57).tril().bool()
    want = F.scaled_dot_product_attention(q, *(t.repeat_interleave(2, 1) for t in (k, v)), attn_mask=mask)
    whole = SoftmaxPattern(q, k, Mask(57, 57, tensor=mask[None, None]))
    made = plan(packed(lengths, 3), tolerance=0.05)
    items = [item for items in made.items for item in items]
    random.Random(1).shuffle(items)
    out, lse, entropy = torch.full_like(q, torch.nan), q.new_zeros(1, 4, 57), q.new_zeros(1, 4, 57)
    for item in items:
        start = sum(lengths[: item.document])
        at = start + torch.tensor(item.rows)
        keys = slice(start, start + item.n_keys)
        out[:, :, at], lse[:, :, at], found = attend(
            item, q[:, :, at], k[:, :, keys], v[:, :, keys], names=("entropy",)
        )
        entropy[:, :, at] = found["entropy"]
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, whole.lse, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropy, whole.statistics(["entropy"])["entropy"], rtol=1e-10, atol=1e-10)


def test_equal_documents_have_nothing_to_move_and_mixed_ones_gain() -> None:
    level = simulate([4096] * 8, devices=Devices(n=8))
    assert level.plan.moves == ()
    assert level.speedup == 1
    assert level.transfers == 0
    mixed = simulate([65536, *[2048] * 96], devices=Devices(n=4))
    assert 1.2 < mixed.speedup <= mixed.plan.imbalance[0]
    slow = simulate([65536, *[2048] * 96], devices=Devices(n=4, n_bytes=1e8))
    assert slow.speedup < 1  # where the network is slow it does not pay
    assert slow.moved > slow.hidden == slow.transfers
    by_hand = 32 * 65536 * Model().linear_operations / 4e14
    assert mixed.linear == pytest.approx(by_hand)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Item(0, 10, 3, 6), "mirror"),
        (lambda: packed([], 2), "0 documents"),
        (lambda: packed([4, 0], 2), "at least one token"),
        (lambda: packed([50], 2, budget=20), "do not fit"),
        (lambda: packed([9] * 5, 15, budget=3), "do not fit"),
        (lambda: plan([]), "nothing to plan"),
        (lambda: plan([[Item.whole(0, 4)]], tolerance=-0.1), "share of the mean"),
        (lambda: attend(Item.whole(0, 4), *torch.ones(3, 1, 1, 3, 2)), "3 queries"),
    ],
)
def test_bad_input_is_named(call: object, says: str) -> None:
    with pytest.raises(CaptureError, match=says):
        call()  # type: ignore[operator]
