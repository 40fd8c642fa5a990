"""Every statistic, streamed tile by tile, against the dense float64 definition."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workbench.errors import CaptureError
from workbench.kernels import masks, streaming
from workbench.kernels.masks import Mask
from workbench.kernels.patterns import Pattern
from workbench.kernels.softmax import SoftmaxPattern
from workbench.kernels.statistics import Options, dense

ROWS = ["lse", "entropy", "peak", "effective_keys", "distance", "distance_var", "sink", "current", "previous"]
EVERYTHING = [*ROWS, "received", "received_mean", "top_keys", "pooled_mean", "pooled_max"]


def naive(q: torch.Tensor, k: torch.Tensor, mask: Mask, scale: float, softcap: float | None = None):
    """Softmax attention written out in float64: (pattern, lse), with zero rows where nothing is seen."""
    q, k = q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    whole = slice(0, q.shape[2]), slice(0, k.shape[2]), slice(None), slice(None)
    if mask.additive:
        scores = scores + mask.tensor.double()
    seen = mask.visible(*whole)
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    lse = scores.logsumexp(-1)
    return torch.exp(scores - lse[..., None]).nan_to_num(0.0), lse


MASKS = [
    "none",
    "causal",
    "cached",
    "window",
    "window both",
    "left",
    "right",
    "bool",
    "additive",
    "finfo",
    "dead",
    "per head",
]


def make_mask(kind: str, b: int, h: int, n_q: int, n_k: int, dtype: torch.dtype, gen: torch.Generator) -> Mask:
    keep = torch.rand(b, 1, n_q, n_k, generator=gen) < 0.6
    if kind == "causal":
        return Mask(n_q, n_k, causal=True)
    if kind == "cached":
        return masks.causal(n_q, n_k)
    if kind == "window":
        return Mask(n_q, n_k, causal=True, window=1 + n_k // 3, offset=n_k - n_q)
    if kind == "window both":
        return Mask(n_q, n_k, window=1 + n_k // 4, offset=n_k - n_q)
    if kind in ("left", "right"):
        lengths = torch.randint(1, n_k + 1, (b,), generator=gen).tolist()
        return Mask(n_q, n_k, causal=n_q == n_k, tensor=masks.padding(lengths, n_k, kind).tensor)
    if kind == "bool":
        return Mask(n_q, n_k, tensor=keep)
    if kind == "additive":
        return Mask(n_q, n_k, tensor=torch.randn(1, h, n_q, n_k, generator=gen).to(dtype))
    if kind == "finfo":
        return Mask(n_q, n_k, tensor=torch.zeros_like(keep, dtype=dtype).masked_fill(~keep, torch.finfo(dtype).min))
    if kind == "dead":
        keep[:, :, ::2] = False
        return Mask(n_q, n_k, tensor=keep)
    if kind == "per head":
        return Mask(n_q, n_k, causal=True, tensor=torch.rand(1, h, 1, n_k, generator=gen) < 0.5)
    return Mask(n_q, n_k)


def compare(pattern: Pattern, truth: torch.Tensor, lse: torch.Tensor, options: Options, names: list[str], tol: float):
    got = pattern.statistics(
        names, tokens=options.tokens, sink_keys=options.sink_keys, n_top=options.n_top, block=options.block
    )
    want = dense(truth, names, pattern.mask, lse=lse, options=options)
    for name in want:
        if name == "top_keys_index":
            continue  # ties may come in any order: what is at the index is compared below
        scale = {"distance": truth.shape[-1], "distance_var": truth.shape[-1] ** 2, "effective_keys": truth.shape[-1]}
        atol = tol * scale.get(name, truth.shape[-2] if name == "received" else 1)
        torch.testing.assert_close(
            got[name].double(), want[name], atol=atol, rtol=tol, equal_nan=True, msg=f"{name} differs"
        )
    if "top_keys" in names:
        index, weight = got["top_keys_index"], got["top_keys_weight"].double()
        found = truth.gather(-1, index.clamp(min=0)) * (index >= 0)
        torch.testing.assert_close(found, weight, atol=tol, rtol=tol)


@pytest.mark.parametrize("kind", MASKS)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    sizes=st.tuples(st.sampled_from([1, 2, 17, 63, 100, 130]), st.sampled_from([1, 5, 17, 63, 100, 300])),
    heads=st.sampled_from([(1, 1), (3, 3), (4, 2), (6, 1), (13, 13)]),
    batch=st.integers(1, 3),
    d=st.sampled_from([1, 8, 20]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    block=st.sampled_from([1, 7, 16]),
    sharp=st.sampled_from([0.1, 1.0, 8.0]),
    from_kernel=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_streaming_equals_the_definition(kind, sizes, heads, batch, d, dtype, block, sharp, from_kernel, seed):
    n_q, n_k = sizes
    if kind in ("cached", "window", "window both"):
        n_q, n_k = min(sizes), max(sizes)
    gen = torch.Generator().manual_seed(seed)
    q = (torch.randn(batch, heads[0], n_q, d, generator=gen) * sharp).to(dtype)
    k = torch.randn(batch, heads[1], n_k, d, generator=gen).to(dtype)
    mask = make_mask(kind, batch, heads[0], n_q, n_k, dtype, gen)
    truth, lse = naive(q, k, mask, d**-0.5)
    pattern = SoftmaxPattern(q, k, mask, lse=lse if from_kernel else None)
    names, tokens = list(EVERYTHING), None
    if mask.offset + n_q <= n_k:
        names.append("induction")
        tokens = torch.randint(0, 4, (batch, n_k), generator=gen)
    sink_keys = (0, n_k - 1) if seed % 2 and n_k > 1 else None
    options = Options(tokens, sink_keys, n_top=3, block=block)
    compare(pattern, truth, lse, options, names, 1e-9 if dtype == torch.float64 else 5e-5)
    rows = pattern.statistics(["peak", "peak_key"])
    at_peak = truth.gather(-1, rows["peak_key"].clamp(min=0)[..., None]).squeeze(-1)
    torch.testing.assert_close(at_peak, rows["peak"].double().nan_to_num(0.0), atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(pattern.dense().double(), truth, atol=5e-5, rtol=1e-4)
    values = torch.randn(batch, heads[1], n_k, 5, generator=gen)
    want = truth @ values.double().repeat_interleave(heads[0] // heads[1], dim=1)
    torch.testing.assert_close(pattern.apply(values).double(), want, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["causal", "window", "left", "bool", "additive", "dead"])
def test_rows_whose_values_are_all_zero_have_no_value_weighted_distribution(kind, dtype):
    gen = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 2, 2, 17, 8, generator=gen, dtype=dtype)
    mask = make_mask(kind, 2, 2, 17, 17, dtype, gen)
    mask = replace(mask, causal=True)  # so that the first rows see the first keys only
    values = torch.randn(2, 2, 17, 5, generator=gen, dtype=dtype)
    values[:, :, :3] = 0
    values[:, 1, 9] = 0
    truth, _ = naive(q, k, mask, 8**-0.5)
    weighted = truth * values.double().norm(dim=-1)[:, :, None]
    mass = weighted.sum(-1, keepdim=True)
    shown = mask.visible(slice(0, 17), slice(0, 17), slice(None), slice(None)) & (mass > 0)
    assert (mass[:, :, 3:] > 0).any()
    assert (mass[:, :, :3] == 0).all()
    names = ["entropy", "peak", "effective_keys", "distance", "current", "received", "received_mean", "pooled_mean"]
    got = SoftmaxPattern(q, k, mask, values=values).statistics([f"value_weighted_{name}" for name in names], block=4)
    seen = Mask(17, 17, tensor=shown)
    want = dense((weighted / mass).nan_to_num(0.0), names, seen, options=Options(block=4))
    for name, value in want.items():
        found = got[f"value_weighted_{name}"].double()
        torch.testing.assert_close(found, value, atol=1e-4, rtol=1e-4, equal_nan=True, msg=name)


def test_induction_over_a_cache_that_has_forgotten_keys():
    gen = torch.Generator().manual_seed(0)
    p = torch.rand(2, 3, 4, 9, generator=gen)
    p = p / p.sum(-1, keepdim=True)
    ids, before = torch.randint(0, 3, (2, 9), generator=gen), torch.tensor([1, 2])
    whole = [[before[b].item(), *ids[b].tolist()] for b in range(2)]
    mask = Mask(4, 9, offset=5)
    got = dense(p, ["induction"], mask, options=Options(ids, token_before=before))["induction"]
    for b, h, i in itertools.product(range(2), range(3), range(4)):
        now = whole[b][1 + 5 + i]
        after = [p[b, h, i, j].item() for j in range(9) if whole[b][j] == now and j <= 5 + i]
        assert got[b, h, i].item() == pytest.approx(sum(after) if after else math.nan, nan_ok=True)
    with_first = dense(p, ["induction"], mask, options=Options(ids))["induction"]
    assert (got.nan_to_num() - with_first.nan_to_num()).abs().max() > 0.01
    with pytest.raises(CaptureError, match="4 queries from 6 on of 9 keys"):
        dense(p, ["induction"], Mask(4, 9, offset=6), options=Options(ids))


@pytest.mark.parametrize(("n_keys", "offset"), [(6, 0), (9, 0), (9, 3)])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("rule", ["causal", "both", "causal and tensor"])
@pytest.mark.parametrize("forgotten", [False, True])
def test_rows_that_cannot_have_a_statistic_are_unknown(n_keys, offset, window, rule, forgotten):
    """Induction of a token without an earlier copy, or one that a mask hides; the previous token of the first one."""
    gen = torch.Generator().manual_seed(n_keys + offset)
    tensor = torch.rand(2, 1, 6, n_keys, generator=gen) > 0.4 if "tensor" in rule else None
    mask = Mask(6, n_keys, causal="causal" in rule, offset=offset, window=window, tensor=tensor)
    ids = torch.randint(0, 4, (2, n_keys), generator=gen)
    options = Options(ids, token_before=torch.tensor([1, 2]) if forgotten else None)
    q, k = torch.randn(2, 3, 6, 4, generator=gen), torch.randn(2, 3, n_keys, 4, generator=gen)
    found = streaming.statistics(SoftmaxPattern(q, k, mask), ["induction", "previous"], options)
    seen = mask.visible(slice(0, 6), slice(0, n_keys), slice(0, 2), slice(0, 3))
    seen = torch.ones(1, dtype=torch.bool) if seen is None else seen
    seen = seen.expand(2, 3, 6, n_keys)
    before = options.ids(2, 6, n_keys, offset)
    for b, h, i in itertools.product(range(2), range(3), range(6)):
        now = i + offset
        after = [j for j in range(now + 1) if seen[b, h, i, j] and before[b, j] == before[b, 1 + now]]
        assert found["induction"][b, h, i].isnan() == (not after)
        assert found["previous"][b, h, i].isnan() == (now == 0 or not seen[b, h, i, now - 1])
