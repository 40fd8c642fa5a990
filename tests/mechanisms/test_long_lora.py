"""Shifted groups against rolling by hand, masks by their definition, and the leak of the rolled form."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from workbench import WorkbenchError, mechanisms
from workbench.errors import CaptureError
from workbench.kernels.grouped import ShiftedLayout, shifted_attention
from workbench.mechanisms import Place


def _qkv(n: int, heads: int = 4, kv_heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = ((2, heads, n, 8), (2, kv_heads, n, 8), (2, kv_heads, n, 5))
    return tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)  # type: ignore[return-value]


def _rolled(q: Tensor, k: Tensor, v: Tensor, group: int) -> Tensor:
    """The reference form: half of the heads rolled by half a group, attention in each group, rolled back."""
    half = q.shape[1] // 2

    def move(t: Tensor, by: int) -> Tensor:
        return torch.cat([t[:, :half], t[:, half:].roll(by, 2)], dim=1)

    parts = [move(t, -(group // 2)).unflatten(2, (-1, group)) for t in (q, k, v)]
    return move(F.scaled_dot_product_attention(*parts, is_causal=True).flatten(2, 3), group // 2)


def _mask(n: int, group: int, shifted: bool, causal: bool, n_sinks: int = 0) -> Tensor:
    def of(x: int) -> int:
        return x // group if not shifted else 0 if x < group // 2 else 1 + (x - group // 2) // group

    rows = [[(of(i) == of(j) or j < n_sinks) and (j <= i or not causal) for j in range(n)] for i in range(n)]
    return torch.tensor(rows)


@pytest.mark.parametrize(("n", "group"), [(1, 1), (17, 4), (24, 6), (24, 5), (23, 24), (130, 64)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n_sinks", [0, 4])
@torch.no_grad()
def test_it_is_softmax_under_the_mask_of_its_definition(n: int, group: int, causal: bool, n_sinks: int) -> None:
    q, k, v = _qkv(n, kv_heads=2)
    shifted = (False, True)
    mask = torch.stack([_mask(n, group, each, causal, n_sinks) for each in shifted]).repeat_interleave(2, 0)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    options = {"group": group, "shifted": shifted, "n_sinks": n_sinks, "causal": causal}
    torch.testing.assert_close(shifted_attention(q, k, v, **options), want, atol=1e-12, rtol=1e-10)
    pattern = shifted_attention.pattern_of(q, k, v, **options)
    scores = (q @ k.repeat_interleave(2, 1).mT / 8**0.5).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(pattern.dense(), scores.softmax(-1), atol=1e-12, rtol=1e-10)
    assert torch.equal(pattern.dense() > 0, mask.expand(2, -1, -1, -1))
    seen = pattern.seen.keys_per_query.expand(2, 4, -1)
    assert torch.equal(seen, mask.sum(-1).expand(2, -1, -1))


@torch.no_grad()
def test_wrapped_groups_are_the_rolled_reference_and_leak_what_it_leaks() -> None:
    n, group = 96, 24
    q, k, v = _qkv(n)
    options = {"group": group, "wrap": True}
    torch.testing.assert_close(shifted_attention(q, k, v, **options), _rolled(q, k, v, group), atol=1e-12, rtol=1e-10)
    wrapped = shifted_attention.pattern_of(q, k, v, **options).dense() > 0
    plain = shifted_attention.pattern_of(q, k, v, group=group).dense() > 0
    leaked = wrapped[0, 3] & ~plain[0, 3]
    assert torch.equal(wrapped[0, 0], plain[0, 0])
    assert int(leaked.sum()) == 144
    rows, columns = leaked.nonzero().T
    assert rows.max() < group // 2
    assert columns.min() >= n - group // 2
    assert not (plain & ~wrapped).any()


@torch.no_grad()
def test_limits_and_the_reconstruction_of_sinks() -> None:
    q, k, v = _qkv(20)
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(shifted_attention(q, k, v, group=20, shifted=(False,)), dense)
    torch.testing.assert_close(shifted_attention(q, k, v, group=3, n_sinks=20), dense)
    sink = mechanisms.get("sink_lora").build(Place(24, 4, 20))
    assert (sink.shifted, sink.n_sinks) == ((False, False, False, True), 4)
    x = torch.randn(2, 20, 24)
    bare = mechanisms.get("sink_lora").build(Place(24, 4, 20), n_sinks=0, shifted=(False,) * 4)
    bare.load_state_dict(sink.state_dict())
    long = mechanisms.get("long_lora").build(Place(24, 4, 20), "unshifted")
    long.load_state_dict(sink.state_dict())
    torch.testing.assert_close(bare(x), long(x))
    assert not torch.allclose(sink(x), long(x))


def test_layers_of_shifted_groups_connect_all_groups() -> None:
    both = (_mask(32, 8, False, False) | _mask(32, 8, True, False)).double()
    reach, layers = both, 1
    while not reach.all():
        reach, layers = (reach @ both > 0).double(), layers + 1
    assert layers <= 2 * 32 // 8
    alone = _mask(32, 8, False, False).double()
    assert not (torch.linalg.matrix_power(alone, 9) > 0).all()


def test_sizes_that_do_not_fit_are_named() -> None:
    long = mechanisms.get("long_lora")
    with pytest.raises(WorkbenchError, match="groups of 30 tokens do not fit a sequence of 20"):
        long.build(Place(24, 4, 20), group=30)
    with pytest.raises(WorkbenchError, match="3 heads cannot be split into 2 equal parts"):
        long.build(Place(24, 3, 20))
    with pytest.raises(WorkbenchError, match="names no part"):
        long.build(Place(24, 4, 20), shifted=())
    with pytest.raises(WorkbenchError, match="n_sinks=-1 is below 0"):
        long.build(Place(24, 4, 20), n_sinks=-1)
    with pytest.raises(CaptureError, match="groups of 8 that wrap take multiples of 8 positions"):
        ShiftedLayout(20, 8, (True,), wrap=True)
    with pytest.raises(CaptureError, match="and no sinks, not 16 positions and 4 sinks"):
        ShiftedLayout(16, 8, (True,), n_sinks=4, wrap=True)
    with pytest.raises(CaptureError, match="group=0"):
        ShiftedLayout(16, 0, (True,))
    q = torch.ones(1, 3, 4, 2)
    with pytest.raises(CaptureError, match="3 heads are no multiple of the 2 parts"):
        shifted_attention(q, q, q, group=2)
    with pytest.raises(CaptureError, match="4 queries and 5 keys"):
        shifted_attention(q, torch.ones(1, 3, 5, 2), torch.ones(1, 3, 5, 2), group=2, shifted=(True,))
