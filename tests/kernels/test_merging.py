"""Statistics of shards, merged, are those of one pass over all keys."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import CaptureError
from workbench.kernels.masks import Mask
from workbench.kernels.merging import merge_rows
from workbench.kernels.softmax import SoftmaxPattern

ROWS = [
    "lse",
    "entropy",
    "peak",
    "peak_key",
    "effective_keys",
    "distance",
    "distance_var",
    "sink",
    "current",
    "previous",
]
COLUMNS = ["received", "received_mean"]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(2, 120),
    cuts=st.lists(st.floats(0.01, 0.99), min_size=1, max_size=4),
    causal=st.booleans(),
    window=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 999),
)
def test_shards_merge_into_one_pass(n, cuts, causal, window, dtype, seed):
    gen = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(2, 3, n, 8, generator=gen, dtype=dtype) for _ in "qk")
    reach = max(2, n // 3) if window else None
    starts = sorted({0} | {int(cut * n) for cut in cuts})
    stops = [*starts[1:], n]
    whole = SoftmaxPattern(q, k, Mask(n, n, causal=causal, window=reach))
    names = [*ROWS, "top_keys"]

    def shard(a, z, lse=None):
        mask = Mask(n, z - a, causal=causal, window=reach, offset=-a)
        return SoftmaxPattern(q, k[:, :, a:z], mask, lse=lse)

    parts = [shard(a, z).statistics(names, n_top=4) for a, z in zip(starts, stops, strict=True)]
    # Short shards have fewer keys than n_top: fill up, as a device would.
    for part in parts:
        short = 4 - part["top_keys_weight"].shape[-1]
        part["top_keys_weight"] = torch.nn.functional.pad(part["top_keys_weight"], (0, short))
        part["top_keys_index"] = torch.nn.functional.pad(part["top_keys_index"], (0, short), value=-1)
    merged = merge_rows(parts, starts)
    want = whole.statistics(names, n_top=min(4, n))
    tol = 1e-9 if dtype == torch.float64 else 2e-4
    for name, value in want.items():
        if name in ("peak_key", "top_keys_index"):
            continue  # equal weights may come in any order
        got = merged[name][..., : value.shape[-1]] if name.startswith("top") else merged[name]
        atol = tol * (n * n if name == "distance_var" else n)
        torch.testing.assert_close(got, value, atol=atol, rtol=tol, equal_nan=True, msg=f"{name} differs")
    weights = whole.dense()
    at = weights.gather(-1, merged["peak_key"].clamp(min=0)[..., None]).squeeze(-1)
    torch.testing.assert_close(at, merged["peak"], atol=tol, rtol=tol)
    columns = [shard(a, z, merged["lse"]).statistics(COLUMNS) for a, z in zip(starts, stops, strict=True)]
    for name, value in whole.statistics(COLUMNS).items():
        got = torch.cat([c[name] for c in columns], dim=-1)
        torch.testing.assert_close(got, value, atol=tol * n, rtol=tol, equal_nan=True)


def test_rows_that_see_nothing_stay_marked():
    seen = torch.tensor([[True, False, True], [False, False, False]])[None, None]
    q, k = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 3, 4)
    parts = [
        SoftmaxPattern(q, k[:, :, a:z], Mask(2, z - a, offset=-a, tensor=seen[..., a:z])).statistics(ROWS)
        for a, z in ((0, 2), (2, 3))
    ]
    merged = merge_rows(parts, [0, 2])
    assert merged["lse"][0, 0, 1] == -torch.inf
    assert merged["peak_key"][0, 0].tolist()[1] == -1
    assert merged["entropy"][0, 0].isnan().tolist() == [False, True]


def test_what_cannot_be_merged_is_said():
    lse = torch.zeros(1, 1, 2)
    with pytest.raises(CaptureError, match="received cannot be merged"):
        merge_rows([{"lse": lse, "received": lse}], [0])
    with pytest.raises(CaptureError, match="do not ascend"):
        merge_rows([{"lse": lse}, {"lse": lse}], [3, 0])
    with pytest.raises(CaptureError, match="a shard has entropy"):
        merge_rows([{"entropy": lse}], [0])
