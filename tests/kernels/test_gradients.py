"""Sums of A∘∂L/∂A, streamed, against autograd through attention that is written out in float64; and what has none."""

import pytest
import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels import masks, streaming
from workbench.kernels.gradients import GRADIENT_SUMS, attention_times_gradient
from workbench.kernels.masks import Mask
from workbench.kernels.patterns import DensePattern
from workbench.kernels.s2 import S2Cache
from workbench.kernels.scan import ScanState
from workbench.kernels.softmax import SoftmaxPattern


def naive(weights: Tensor, v: Tensor, z_gradient: Tensor) -> dict[str, Tensor]:
    """The definitions, from the gradient that autograd finds for the weights [batch, head, query, key]."""
    a = weights.double().requires_grad_()
    v = v.double().repeat_interleave(a.shape[1] // v.shape[1], dim=1)
    (d_a,) = torch.autograd.grad(a @ v, a, z_gradient.double())
    product = (a * d_a).detach()
    return {
        "query_gradient": product.sum(-1),
        "key_gradient": product.sum(-2),
        "head_gradient": product.sum((-1, -2)),
        "key_gradient_magnitude": product.abs().sum(-2),
    }


def draw(n_q: int, n_k: int, kv: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    gen = torch.Generator().manual_seed(n_q)
    shapes = ((2, 6, n_q, 5), (2, kv, n_k, 5), (2, kv, n_k, 7), (2, 6, n_q, 7))
    return tuple(torch.randn(shape, generator=gen, dtype=dtype) for shape in shapes)


@pytest.mark.parametrize("kv", [6, 2, 1])
@pytest.mark.parametrize(("n_q", "n_k"), [(1, 1), (17, 17), (5, 40), (230, 230)])
def test_softmax_patterns(n_q: int, n_k: int, kv: int) -> None:
    q, k, v, g = draw(n_q, n_k, kv)
    pattern = SoftmaxPattern(q, k, masks.causal(n_q, n_k))
    got, want = attention_times_gradient(pattern, g, v), naive(pattern.dense(), v, g)
    assert got.keys() == want.keys() == GRADIENT_SUMS.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, atol=1e-11, rtol=1e-11, msg=name)


def test_half_precision_is_summed_in_float32() -> None:
    q, k, v, g = (t.bfloat16() for t in draw(33, 33, 2))
    pattern = SoftmaxPattern(q, k)
    got = attention_times_gradient(pattern, g, v)
    for name, value in naive(pattern.dense(), v, g).items():
        assert got[name].dtype == torch.float32
        torch.testing.assert_close(got[name].double(), value, atol=1e-5, rtol=1e-5)


def test_padding_and_rows_that_see_nothing() -> None:
    q, k, v, g = draw(9, 9, 6)
    seen = torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    seen[0, 0, 3] = False
    pattern = SoftmaxPattern(q, k, Mask(9, 9, tensor=seen))
    got = attention_times_gradient(pattern, g, v)
    for name, value in naive(pattern.dense(), v, g).items():
        torch.testing.assert_close(got[name], value)
    assert (got["query_gradient"][0, :, 3].abs() < 1e-100).all()


def test_signed_weights() -> None:
    _, _, v, g = draw(17, 17, 3)
    weights = torch.randn(2, 6, 17, 17, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = attention_times_gradient(DensePattern(weights), g, v)
    for name, value in naive(weights, v, g).items():
        torch.testing.assert_close(got[name], value)


def test_no_tile_is_larger_than_those_of_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """With smaller tiles the sums are the same, so that what is put together from tiles is put together right."""
    q, k, v, g = draw(50, 70, 2)
    pattern = SoftmaxPattern(q, k)
    whole = attention_times_gradient(pattern, g, v)
    for name, edge in (("_TILE_QUERIES", 16), ("_TILE_KEYS", 32), ("_TILE_NUMBERS", 16 * 32)):
        monkeypatch.setattr(streaming, name, edge)
    assert max(tile.p.numel() for tile in streaming.tiles(pattern)) == 3 * 16 * 32
    for name, value in attention_times_gradient(pattern, g, v).items():
        torch.testing.assert_close(value, whole[name])


@pytest.mark.parametrize(
    ("g", "v"),
    [((2, 6, 4, 7), (2, 2, 5, 7)), ((2, 6, 5, 6), (2, 2, 5, 7)), ((2, 6, 5, 7), (2, 4, 5, 7)), ((2, 6, 5, 7), (5, 7))],
)
def test_what_does_not_fit_is_refused(g: tuple[int, ...], v: tuple[int, ...]) -> None:
    pattern = DensePattern(torch.rand(2, 6, 5, 5))
    with pytest.raises(CaptureError, match="shape"):
        attention_times_gradient(pattern, torch.zeros(g), torch.zeros(v))


@pytest.mark.parametrize("asks", ["query", "key", "nothing"])
@pytest.mark.parametrize("what", ["cache", "stream"])
def test_what_forgets_says_so_when_gradients_are_asked_for(what: str, asks: str) -> None:
    """Numbers stay, also when they are written to; where something asks for gradients, `backward` is an error."""
    gen = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 2, 1, 8, generator=gen), torch.randn(1, 2, 20, 8, generator=gen)
    given_q, given_k = q.clone().requires_grad_(asks == "query"), k.clone().requires_grad_(asks == "key")

    def attended(q: Tensor, k: Tensor, later: Tensor) -> Tensor:
        if what == "stream":
            state = ScanState(q)
            state.update(k, k)
            return state.update(later, later)
        cache = S2Cache(2, 2, block=16, local_blocks=1, vert_stride=1)
        cache.extend(k, k)
        cache.extend(later, later)
        return cache.attend(q)

    want, got = attended(q, k, k[:, :, :1]), attended(given_q, given_k, k[:, :, :1])
    assert torch.equal(got, want)
    assert got.requires_grad == (asks != "nothing")
    with torch.no_grad():
        assert not attended(given_q, given_k, k[:, :, :1]).requires_grad
    got += 1
    if asks != "nothing":
        with pytest.raises(CaptureError, match="without their history") as caught:
            (got.sum() + given_k.sum() + given_q.sum()).backward()
        assert "over the whole sequence" in str(caught.value.hint)
