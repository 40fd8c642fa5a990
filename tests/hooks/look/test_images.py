"""Mixing along one axis of an image: found wherever the features are; keys of one axis are positions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import workbench

D, H = 20, 4
SIZES = [(6, 5), (6, 6)]


class Around(nn.Module):
    """A function of an image [batch, row, column, feature], or with features first, between two linear layers."""

    def __init__(self, mix: Callable[[Tensor], Tensor], *, first: bool) -> None:
        super().__init__()
        self.mix, self.first = mix, first
        layer = (lambda: nn.Conv2d(D, D, 1)) if first else (lambda: nn.Linear(D, D))
        self.before, self.after = layer(), layer()

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        y = self.mix(y.movedim(1, -1)).movedim(-1, 1) if self.first else self.mix(y)
        return x + self.after(y)


class ChannelNorm(nn.LayerNorm):
    """Over the features, where they are the first axis after the examples."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.movedim(1, -1), self.normalized_shape, self.weight, self.bias, self.eps).movedim(-1, 1)


def sigmoid(x: Tensor) -> Tensor:
    return torch.sigmoid(torch.einsum("brcd,bscd->bcrs", x, x)).matmul(x.transpose(1, 2)).transpose(1, 2)


MIXERS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda x: x.cumsum(1), "columns": lambda x: x.cumsum(2), "sigmoid": sigmoid
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("mix", MIXERS)
@torch.no_grad()
def test_what_mixes_along_one_axis_is_found(mix: str, first: bool, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Around(torch.tanh, first=first), Around(MIXERS[mix], first=first)).eval()
    with workbench.attach(model, check=False) as wb:
        wb.look(torch.randn(2, D, *size) if first else torch.randn(2, *size, D))
        assert [one.name for one in wb.sites.unread] == ["1"]


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_what_works_position_by_position_is_not(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    norm = ChannelNorm(D)
    nn.init.normal_(norm.weight)
    first = nn.Sequential(norm, Around(torch.relu, first=True), nn.BatchNorm2d(D)).eval()
    last = nn.Sequential(nn.LayerNorm(D), Around(torch.relu, first=False)).eval()
    for model, x in ((first, torch.randn(2, D, *size)), (last, torch.randn(2, *size, D))):
        with workbench.attach(model, check=False) as wb:
            wb.look(x)
            assert not wb.sites.unread


class Axial(nn.Module):
    """Attention along the rows or the columns of an image [batch, row, column, feature]."""

    def __init__(self, axis: int, *, written: bool) -> None:
        super().__init__()
        self.num_heads, self.axis, self.written = H, axis, written
        self.qkv, self.o = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).chunk(3, -1)
        q, k, v = (t.movedim(self.axis, 2).unflatten(-1, (H, -1)).transpose(2, 3) for t in parts)
        if self.written:
            z = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v
        else:
            z = F.scaled_dot_product_attention(q, k, v)
        return self.o(z.transpose(2, 3).flatten(3).movedim(2, self.axis))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("written", [False, True])
@torch.no_grad()
def test_keys_along_one_axis_are_positions(written: bool, axis: int, size: tuple[int, int]) -> None:
    """Where a whole row of the image changes, so do all keys of one column."""
    torch.manual_seed(0)
    model, x = nn.Sequential(Axial(axis, written=written)).eval(), torch.randn(2, *size, D)
    with workbench.attach(model, check=False) as wb:
        found = wb.verify(x).raise_if_failed()
        assert found.complete, wb.sites
        with wb.capture() as cap:
            model(x)
    n, windows = size[axis - 1], size[2 - axis]
    assert (cap[0].site.kind, cap[0].site.windows, cap[0].shape) == ("self", windows, (2 * windows, H, n, n))
    parts = model[0].qkv(x).double().chunk(3, -1)
    q, k, _ = (t.movedim(axis, 2).unflatten(-1, (H, -1)).transpose(2, 3) for t in parts)
    want = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1).flatten(0, 1)
    torch.testing.assert_close(cap[0].pattern.dense().double(), want, atol=1e-5, rtol=1e-4)
