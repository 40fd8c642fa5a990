"""Gates and additive maps against their definitions, row sums of every kind of map, and convolutions as maps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.errors import CaptureError, FormatError
from workbench.kernels import families
from workbench.kernels.composed import RowGatedPattern
from workbench.kernels.filters import DepthwisePattern, composite_kernel
from workbench.kernels.gates import AdditivePattern, GatePattern, gate_map
from workbench.kernels.masks import Mask
from workbench.kernels.patterns import DensePattern, Pattern, SignedPattern
from workbench.kernels.softmax import SoftmaxPattern
from workbench.kernels.statistics import Options, dense


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _again(pattern: Pattern) -> Pattern:
    facts, tensors = pattern.state()
    return families.rebuild(type(pattern).__name__, facts, tensors)


@pytest.mark.parametrize("n", [1, 17, 63, 300])
@pytest.mark.parametrize("everywhere", [False, True])
def test_a_gate_is_a_diagonal(n: int, everywhere: bool) -> None:
    gates = _random(2, 3, 1 if everywhere else n)
    pattern, u = GatePattern(gates, n), _random(2, 3, n, 2, seed=1)
    whole = torch.diag_embed(gates.expand(-1, -1, n))
    assert torch.equal(pattern.dense(), whole)
    assert torch.equal(pattern.apply(u), whole @ u)
    assert torch.equal(pattern.tile(slice(n // 3, n), slice(0, n // 2 + 1), [2]), whole[:, 2:, n // 3 :, : n // 2 + 1])
    assert not pattern.tile(slice(0, n // 3), slice(n // 2 + 1, n)).any()  # off the diagonal
    assert torch.equal(_again(pattern).dense(), whole)
    assert pattern.over == (("channel",) if everywhere or n == 1 else ("position", "channel"))
    names = ["row_sum", "signed_mass", "entropy", "received", "peak_key"]
    found = pattern.statistics(names)
    for name, value in dense(whole, names, pattern.mask, options=Options(), by_magnitude=True).items():
        torch.testing.assert_close(
            found[name].double(), value.double(), atol=1e-12, rtol=1e-12, equal_nan=True, msg=name
        )


def test_gates_of_one_step_after_another_are_one() -> None:
    parts = [GatePattern(_random(2, 3, n, seed=n), n if n > 1 else 2, values=None) for n in (1, 4)]
    whole = parts[0].then(parts[1:])
    assert torch.equal(whole.gates, torch.cat([part.gates for part in parts], dim=2))
    assert whole.shape == (2, 3, 6, 6)
    with pytest.raises(CaptureError, match="kind, batch or heads of a gate differ"):
        parts[0].then([GatePattern(_random(2, 4, 1), 1)])
    with pytest.raises(CaptureError, match="kind, batch or heads of a gate differ"):
        parts[0].then([DensePattern(torch.ones(2, 3, 1, 1))])


def test_a_gate_that_is_shut_has_no_distribution_but_a_factor() -> None:
    pattern = GatePattern(torch.tensor([[[0.0, -2.0]]]), 2)
    found = pattern.statistics(["row_sum", "signed_mass", "entropy"])
    assert found["row_sum"].tolist() == [[[0.0, -2.0]]]
    assert found["signed_mass"][0, 0].isnan().tolist() == [True, False]
    assert found["entropy"][0, 0].isnan().tolist() == [True, False]
    weighted = GatePattern(torch.tensor([[[1.0, -2.0]]]), 2, values=torch.ones(1, 1, 2, 4)).value_weighted()
    assert weighted.row_sum.tolist() == [[[2.0, -4.0]]]


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 1, 4, 5), (2, 3, 1, 1), (2, 3, 4, 5), (1, 1, 1, 1), (2, 3, 1, 5)])
def test_a_factor_of_any_shape_is_laid_out_with_what_it_multiplies(shape: tuple[int, ...]) -> None:
    u, g = _random(2, 3, 4, 5), _random(*shape, seed=1)
    pattern, values = gate_map(u, g, channels=1)
    got = pattern.apply(values).transpose(2, 3).flatten(1, 2).unflatten(2, (4, 5))
    torch.testing.assert_close(got, u * g)
    assert pattern.n_heads == (3 if shape[1] == 3 else 1)
    assert ("position" in pattern.over) == (max(shape[2:]) > 1)
    last = gate_map(u.movedim(1, -1), g.movedim(1, -1))[0]
    assert torch.equal(last.gates, pattern.gates)


def test_factors_that_do_not_fit_are_named() -> None:
    with pytest.raises(CaptureError, match=r"\[2, 4, 3\] does not broadcast to \[2, 5, 3\]"):
        gate_map(torch.ones(2, 5, 3), torch.ones(2, 4, 3))
    with pytest.raises(CaptureError, match=r"\[5, 1\] does not broadcast to \[2, 5, 3\]"):
        gate_map(torch.ones(2, 5, 3), torch.ones(5, 1))
    with pytest.raises(CaptureError, match="gates holds nan at"):
        GatePattern(torch.tensor([[[torch.nan]]]), 3)
    with pytest.raises(CaptureError, match=r"gates must be \[batch, head, 3 or 1 position\]"):
        GatePattern(torch.ones(1, 1, 2), 3)
    with pytest.raises(CaptureError, match="a DensePattern has no gates"):
        DensePattern(torch.ones(1, 1, 2, 2)).ungated(torch.ones(1, 1, 2, 1))
    with pytest.raises(FormatError, match="the file does not hold a GatePattern"):
        families.rebuild("GatePattern", {}, {"gates": torch.ones(1, 1, 1)})


def test_rows_of_every_kind_add_up() -> None:
    q, k, mask = _random(2, 2, 9, 4), _random(2, 2, 9, 4, seed=1), Mask(9, 9, causal=True)
    softmax, sunk = (SoftmaxPattern(q, k, mask, sinks=sinks) for sinks in (None, _random(2, seed=2)))
    hidden = SoftmaxPattern(q, k, Mask(9, 9, tensor=(torch.arange(9) > 3)[None, None, :, None]))
    signed = SignedPattern(_random(2, 2, 9, 9, seed=3))
    gated = RowGatedPattern(softmax, _random(2, 2, 9, seed=4))
    loose = DensePattern(_random(2, 2, 9, 9, seed=5).abs(), normalised=False)
    for pattern in (softmax, sunk, hidden, signed, gated, loose):
        want = pattern.dense().sum(-1)
        torch.testing.assert_close(pattern.statistics(["row_sum", "peak"])["row_sum"], want, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(pattern.row_sum, want, atol=1e-10, rtol=1e-10)
    assert torch.equal(hidden.row_sum[0, 0, :4], torch.zeros(4, dtype=torch.float64))
    v = _random(2, 2, 9, 3, seed=6)
    torch.testing.assert_close(gated.ungated(v) * gated.gates[..., None], gated.apply(v))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("read_out", [False, True])
def test_an_additive_map_is_every_term_of_the_sum(gated: bool, read_out: bool) -> None:
    base, width = SignedPattern(_random(2, 3, 7, 5)), 4 if read_out else 1
    v = _random(2, 3, 5, width, seed=1)
    w = _random(6, 3, width, seed=2) if read_out else None
    g = _random(2, 6 if read_out else 3, 7, seed=3) if gated else None
    pattern = AdditivePattern(base, v, w, g)
    want = base.dense() * v[:, :, None, :, 0] if w is None else torch.einsum(
        "bhij,bhjw,chw->bcij", base.dense(), v, w
    )  # fmt: skip
    want = want if g is None else want * g[..., None]
    torch.testing.assert_close(pattern.dense(), want)
    torch.testing.assert_close(pattern.total, want.sum(-1))
    torch.testing.assert_close(pattern.apply(torch.ones(2, 1, 5, 1).double())[..., 0], want.sum(-1))
    torch.testing.assert_close(pattern.tile(slice(2, 6), slice(1, 4), [2, 0]), want[:, [2, 0], 2:6, 1:4])
    torch.testing.assert_close(pattern.statistics(["row_sum"])["row_sum"], want.sum(-1))
    assert torch.equal(_again(pattern).dense(), pattern.dense())
    assert (pattern.grade, pattern.signed) == ("frozen", True)


def test_values_that_heads_share_are_read_by_each() -> None:
    base, v = DensePattern(_random(1, 4, 3, 3).softmax(-1)), _random(1, 2, 3, 1, seed=1)
    want = base.dense() * v.repeat_interleave(2, 1)[:, :, None, :, 0]
    torch.testing.assert_close(AdditivePattern(base, v).dense(), want)
    with pytest.raises(CaptureError, match=r"readout must be \[channel, head, width\]"):
        AdditivePattern(base, v, _random(5, 3, 1))
    with pytest.raises(CaptureError, match=r"gates must be \[batch, channel, query\]"):
        AdditivePattern(base, v, gates=_random(1, 3, 3))


@pytest.mark.parametrize(("edges", "dilations"), [((3,), (1,)), ((5, 7), (1, 3)), ((1, 3), (2, 2))])
@pytest.mark.parametrize("grid", [(1, 1), (5, 9), (4, 3)])
def test_convolutions_as_maps(edges: tuple[int, ...], dilations: tuple[int, ...], grid: tuple[int, int]) -> None:
    kernels = [_random(3, edge, edge, seed=i) for i, edge in enumerate(edges)]
    n = grid[0] * grid[1]
    pattern, image = DepthwisePattern(kernels, dilations, grid, 2), _random(2, 3, *grid, seed=9)
    want = image
    for kernel, d in zip(kernels, dilations, strict=True):
        want = F.conv2d(want, kernel[:, None], padding=d * (kernel.shape[-1] // 2), dilation=d, groups=3)
    v, whole = image.flatten(2)[..., None], pattern.dense()
    torch.testing.assert_close((whole @ v)[..., 0], want.flatten(2))
    torch.testing.assert_close(pattern.apply(v)[..., 0], want.flatten(2))
    wide = v.expand(-1, -1, -1, 2) * torch.tensor([1.0, -2.0]).double()
    torch.testing.assert_close(pattern.apply(wide), whole @ wide)
    part = pattern.tile(slice(n // 3, n), slice(0, n // 2 + 1), [2, 0])
    torch.testing.assert_close(part, whole[:, [2, 0], n // 3 :, : n // 2 + 1])
    torch.testing.assert_close(_again(pattern).dense(), whole)


def test_two_kernels_are_one_of_23_inside_the_image() -> None:
    kernels, image = [_random(2, 5, 5), _random(2, 7, 7, seed=1)], _random(1, 2, 29, 31, seed=2)
    whole = composite_kernel(kernels, [1, 3])
    assert whole.shape == (2, 23, 23)
    assert int((whole != 0).sum()) == 2 * 529
    one = F.conv2d(image, whole[:, None], padding=11, groups=2)
    near = F.conv2d(image, kernels[0][:, None], padding=2, groups=2)
    both = F.conv2d(near, kernels[1][:, None], padding=9, dilation=3, groups=2)
    torch.testing.assert_close(both[..., 9:-9, 9:-9], one[..., 9:-9, 9:-9])
    assert not torch.allclose(both[..., 8:-9, 9:-9], one[..., 8:-9, 9:-9])


def test_kernels_that_make_no_map_are_named() -> None:
    with pytest.raises(CaptureError, match="odd edges"):
        DepthwisePattern([torch.ones(2, 4, 4)], [1], (3, 3), 1)
    with pytest.raises(CaptureError, match="1 kernels and 2 dilations"):
        composite_kernel([torch.ones(2, 3, 3)], [1, 2])
    with pytest.raises(CaptureError, match="dilation=0"):
        composite_kernel([torch.ones(2, 3, 3)], [0])
    with pytest.raises(CaptureError, match=r"a kernel must be \[2 channels"):
        composite_kernel([torch.ones(2, 3, 3), torch.ones(3, 3, 3)], [1, 1])
    with pytest.raises(CaptureError, match="grid of 0 × 3"):
        DepthwisePattern([torch.ones(2, 3, 3)], [1], (0, 3), 1)
