"""Rows that enter a projection are accounted for by the calls that gave them, and the share is told."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.hooks.proofs.rows import account

B, H, Q, D = 2, 3, 8, 4


def heads(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(B, H, Q, D, generator=torch.Generator().manual_seed(0)).to(dtype)


def merged(z: Tensor) -> Tensor:
    return z.transpose(1, 2).flatten(2)


def test_one_call_explains_all_rows() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        found = account(merged(heads(dtype)), [heads(dtype)])
        assert found.explained == found.n_rows == B * Q
        assert str(found) == "16 of 16 rows"


def test_blocks_of_queries_add_up() -> None:
    z = heads()
    blocks = [z[:, :, i : i + 2] for i in range(0, Q, 2)]
    whole, part = account(merged(z), blocks), account(merged(z), blocks[:1])
    assert whole.explained == B * Q
    assert part.explained == 4
    assert str(part) == "4 of 16 rows"
    assert whole.rows_of(1).tolist() == [2, 3, 10, 11]
    assert torch.equal(whole.owner[:, 0], torch.arange(4).repeat_interleave(2).repeat(B))


def test_half_of_the_heads() -> None:
    z = heads()
    found = account(merged(z), [z[:, :2]])
    assert found.explained == 0
    assert found.touched == B * Q
    assert found.slices == (2, 3)
    assert str(found) == "2 of 3 heads"


def test_padding_and_repeated_rows() -> None:
    z = heads()
    z[1, :, 4:] = 0
    z[0, :, 1] = z[0, :, 0]
    assert account(merged(z), [z]).explained == B * Q
    assert account(merged(torch.zeros_like(z)), [z * 0]).explained == 0, "zeros tell nothing"


def test_sums_are_not_parts() -> None:
    z = heads()
    assert account(merged(z + z.roll(1, 2)), [z, z.roll(1, 2)]).explained == 0


def test_other_widths_have_no_account() -> None:
    assert account(torch.randn(3, 10), [torch.randn(3, 4)]) is None
    assert account(torch.randn(3, 8), [torch.randn(3, 4), torch.randn(3, 2)]) is None
