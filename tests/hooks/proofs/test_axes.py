"""The axes of kernel calls are found from values alone, in any layout, or said not to be known."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workbench import CaptureError
from workbench.hooks.proofs.axes import Axes
from workbench.hooks.proofs.by_size import axes_by_size
from workbench.hooks.proofs.by_value import prove_axes
from workbench.hooks.proofs.placements import placements

B, H, Q, D = 2, 3, 5, 4


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(prod(shape))).to(dtype)


def proved(z: Tensor, p: Tensor, mixed: tuple[int, ...] = (-2,), width: int = -1) -> Axes:
    proof = prove_axes(z, p, mixed, width)
    assert proof is not None
    assert proof.axes is not None, proof
    return proof.axes


LAYOUTS = {  # how the kernel's output is laid out -> its query axis
    "b h q d": 2,
    "h b q d": 2,
    "(b h) q d": 1,
    "(h b) q d": 1,
    "b q h d": 1,
    "q b h d": 0,
    "q (b h) d": 0,
    "d h q b": 2,
    "h q b d": 1,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("merged", ["b q (h d)", "q b (h d)", "(b q) (h d)", "b q (d h)"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_found(layout: str, merged: str, dtype: torch.dtype) -> None:
    heads = random(B, H, Q, D, dtype=dtype)
    z, p = rearrange(heads, f"b h q d -> {layout}"), rearrange(heads, f"b h q d -> {merged}")
    axes = proved(z, p, (LAYOUTS[layout],), 0 if layout.startswith("d") else -1)
    bound = axes.bind(z.shape)
    assert torch.equal(bound.heads(z), heads)
    assert axes.over == "positions"
    assert torch.equal(bound.output(heads), z)
    more = random(5, H, 7, D)  # the same layout at other sizes
    z = rearrange(more, f"b h q d -> {layout}")
    assert torch.equal(axes.bind(z.shape).heads(z), more)


def test_windows_lie_among_the_examples() -> None:
    heads = random(B, 4, H, Q, D)  # example, window, head, query, width
    for layout in ("b w h q d", "(b w) h q d", "b h w q d", "w b h q d", "(w b) h q d", "(b w h) q d"):
        z = rearrange(heads, f"b w h q d -> {layout}")
        axes = proved(z, rearrange(heads, "b w h q d -> b (w q) (h d)"))
        assert torch.equal(axes.bind(z.shape).heads(z), heads.flatten(0, 1)), layout


def test_windows_of_an_image_are_put_together_before_the_projection() -> None:
    heads = random(B, 2, 3, H, 16, D)
    p = rearrange(heads, "b y x h (v u) d -> b (y v) (x u) (h d)", v=4)
    axes = proved(z := heads.flatten(0, 2), p)
    assert str(axes) == "batch head query width"
    assert axes.is_plain
    assert torch.equal(axes.bind(z.shape).heads(z), z)


def test_groups_of_heads() -> None:
    heads = random(B, 2, 3, Q, D)  # example, kv head, group, query, width
    z = heads.permute(0, 3, 1, 2, 4)
    axes = proved(z, heads.permute(0, 3, 1, 2, 4).flatten(2), mixed=(1, 3))
    bound = axes.bind(z.shape)
    assert torch.equal(bound.heads(z), heads.flatten(1, 2))
    keys = random(B, 7, 2, D)
    assert torch.equal(bound.arrange(keys, [0, None, 2, None]), keys.transpose(1, 2))


def test_values_that_all_heads_share() -> None:
    """What the values do not have is a query among the rows and a head among the features."""
    heads = random(B, H, Q, D)
    for layout, mixed in (("b h q d", (1, 2)), ("b q h d", (1, 2)), ("h b q d", (0, 2))):
        z = rearrange(heads, f"b h q d -> {layout}")
        axes = proved(z, rearrange(heads, "b h q d -> b q (h d)"), mixed)
        assert torch.equal(axes.bind(z.shape).heads(z), heads), layout
        values = random(B, 7, D)
        got = axes.bind(z.shape).arrange(values, [1 if layout.startswith("h") else 0, None, None])
        assert torch.equal(got, values[:, None])


def test_a_softmax_over_channels_is_told() -> None:
    z = random(B, H, D, Q)  # the channels of each head are mixed, positions are the width
    axes = proved(z, z.permute(0, 3, 1, 2).flatten(2))
    assert axes.over == "features"
    assert torch.equal(axes.bind(z.shape).heads(z), z)


def test_a_gate_is_told() -> None:
    proof = prove_axes(random(B, Q, D), random(B, Q, D), mixed=())
    assert proof is not None
    assert proof.gate
    assert proof.axes is None


@pytest.mark.parametrize("case", ["half zeros", "padding", "equal examples", "one query", "one example", "nan rows"])
def test_hard_values(case: str) -> None:
    heads = random(1 if case == "one example" else B, H, 1 if case == "one query" else Q, D)
    if case == "half zeros":
        heads *= (random(*heads.shape) > 0).float()
    if case == "padding":
        heads[0, :, 2:] = 0
    if case == "equal examples":
        heads[1] = heads[0]
    if case == "nan rows":
        heads[:, :, :2] = torch.nan
    z = heads.transpose(0, 1).reshape(-1, *heads.shape[2:])
    axes = proved(z, heads.transpose(1, 2).flatten(2))
    torch.testing.assert_close(axes.bind(z.shape).heads(z), heads, rtol=0, atol=0, equal_nan=True)


def test_equal_heads_are_ambiguous_and_zeros_say_nothing() -> None:
    one = random(1, 1, Q, D).expand(H, H, Q, D)
    proof = prove_axes(one, one.transpose(1, 2).flatten(2), (-2,))
    assert proof is not None
    assert proof.axes is None
    assert "several layouts" in proof.reason
    proof = prove_axes(torch.zeros(2, 2, 8, 8), torch.zeros(2, 8, 16), (-2,))
    assert proof is not None
    assert proof.axes is None
    assert proof.reason


def test_something_else_is_no_proof() -> None:
    heads = random(B, H, Q, D)
    p = heads.transpose(1, 2).flatten(2)
    assert prove_axes(heads, p * 1.001, (-2,)) is None
    assert prove_axes(heads, p.roll(1, 1), (-2,)) is None
    assert prove_axes(heads, p[:, 1:], (-2,)) is None


def test_heads_stay_as_many_in_later_calls() -> None:
    """With one example the place of the batch is not seen: more rows of the axis are no more heads."""
    heads = random(1, H, Q, D)
    axes = proved(heads[0], heads.transpose(1, 2).flatten(2))
    assert axes.bind((H, Q, D)) is not None
    assert axes.bind((2 * H, Q, D)) is None
    assert axes.bind((1, H, Q, D)) is None


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_random_layouts(data: Any) -> None:
    """Axes in any order and merged in any way, before and after: one placement, and it is the right one."""
    sizes = dict(zip("bwhqd", data.draw(st.tuples(*[st.integers(1, 4)] * 4, st.integers(2, 6))), strict=True))
    if prod(sizes.values()) < 12:
        sizes["q"] += 12
    heads = torch.randn(*sizes.values(), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    order = data.draw(st.permutations("bwh"))
    cut = data.draw(st.integers(1, 3))
    lead = [f"({' '.join(order[:cut])})", *order[cut:]]
    z = rearrange(heads, f"b w h q d -> {' '.join(lead)} q d")
    p = rearrange(
        heads, f"b w h q d -> {data.draw(st.sampled_from(['b (w q) (h d)', '(b w) q (h d)', 'q b w (h d)']))}"
    )
    proof = prove_axes(z, p, (-2,))
    assert proof is not None
    if proof.axes is None:
        assert proof.reason
        return
    bound = proof.axes.bind(z.shape)
    want = heads.flatten(0, 1) if sizes["h"] > 1 or bound.count("head") == 1 else None
    assert want is not None
    assert torch.equal(bound.heads(z), want)


def test_layouts_are_stated_as_text() -> None:
    z = random(2 * H, Q, D)
    axes = Axes.parse("(head batch) query width", heads=H)
    assert str(axes) == f"(head={H} batch) query width"
    assert torch.equal(axes.bind(z.shape).heads(z), z.view(H, 2, Q, D).transpose(0, 1))
    assert torch.equal(Axes.parse("b h q d").bind((2, 3, 5, 4)).heads(random(2, 3, 5, 4)), random(2, 3, 5, 4))
    for text, message in (
        ("(head batch) query width", "open"),
        ("batch head query", "one width"),
        ("batch tail query width", 'no "tail"'),
        ("(batch head query width", "needs a query|brackets"),
        ("batch, head", "no layout"),
    ):
        with pytest.raises(CaptureError, match=message):
            Axes.parse(text)


def test_sizes_tell_where_nothing_else_does() -> None:
    assert str(axes_by_size((2, 4, 5, 8), (2,), 3, heads=4, examples=2)) == "batch head query width"
    assert str(axes_by_size((4, 2, 5, 8), (2,), 3, heads=4, examples=2)) == "head batch query width"
    assert str(axes_by_size((2, 5, 4, 8), (1,), 3, heads=4, examples=None)) == "batch query head width"
    assert axes_by_size((6, 4, 5, 8), (2,), 3, heads=4, examples=2) is None, "of windows the order is not known"
    assert str(axes_by_size((1, 1, 5, 8), (2,), 3, heads=None, examples=1)) == "batch head query width"
    assert axes_by_size((4, 4, 5, 8), (2,), 3, heads=4, examples=4) is None
    assert axes_by_size((2, 3, 5, 8), (2,), 3, heads=4, examples=2) is None, "the stated heads are not there"
    assert axes_by_size((8, 5, 8), (1,), 2, heads=4, examples=2) is None
    assert axes_by_size((2, 4, 5, 8), (2,), 3, heads=None, examples=None) is None


def test_few_elements_are_compared() -> None:
    heads = random(12, 512, 64).view(1, 12, 512, 64)
    [placement] = placements(heads, heads.transpose(1, 2).flatten(2))
    assert placement.tried < 4000
