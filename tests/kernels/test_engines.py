"""Every engine gives the same statistics, in as many passes over the keys as the plan says."""

import ctypes
import logging
import math
import platform
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workbench.errors import CaptureError
from workbench.kernels import passes, streaming
from workbench.kernels.layouts import Layout
from workbench.kernels.masks import Mask, causal
from workbench.kernels.native import NativeEngine, blocks, build, call
from workbench.kernels.native import engine as native_engine
from workbench.kernels.s2 import S2Layout, s2_naive
from workbench.kernels.s2.tiles import plan
from workbench.kernels.softmax import SoftmaxPattern
from workbench.kernels.softmax_tiles import SoftmaxTiles
from workbench.kernels.statistics import Options, dense

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
COLUMNS = ["received", "received_mean", "pooled_mean", "pooled_max"]
ENGINES = ["torch", "native"]


@pytest.fixture(params=ENGINES)
def engine(request, monkeypatch):
    """Runs the test once in plain torch and once in C++."""
    if request.param == "torch":
        monkeypatch.setattr(NativeEngine, "refusal", lambda *asked: "switched off for this test")
    elif build.library() is None:
        pytest.fail("there is no C++ compiler, so that the native engine cannot be tested")
    return request.param


class Checkered(Layout):
    """Blocks in which (query block + 2 · key block + layout) is divisible by three, with holes, and the diagonal."""

    def __init__(self, n_queries: int, n_keys: int, block: int, n_layouts: int) -> None:
        self.n_queries, self.n_keys, self.block, self.n_layouts = n_queries, n_keys, block, n_layouts

    def blocks(self):
        whole = slice(0, self.n_queries), slice(0, self.n_keys), torch.arange(self.n_layouts)
        seen = self.visible(*whole)
        pad = (0, -self.n_keys % self.block, 0, -self.n_queries % self.block)
        seen = torch.nn.functional.pad(seen, pad)
        return seen.unflatten(-1, (-1, self.block)).unflatten(-3, (-1, self.block)).any(-1).any(-2)

    def visible(self, queries, keys, layouts):
        i = torch.arange(queries.start, queries.stop)[:, None]
        j = torch.arange(keys.start, keys.stop)[None, :]
        of_layout = torch.as_tensor(layouts)[:, None, None]
        return ((i // self.block + 2 * (j // self.block) + of_layout) % 3 == 0) & ((i + j) % 7 != 0) | (i == j)


def truth(pattern: SoftmaxPattern):
    """Weights and lse in float64 from the definition."""
    group = pattern.n_heads // pattern.n_kv_heads
    q, k = pattern.q.double(), pattern.k.double().repeat_interleave(group, dim=1)
    scores = q @ k.transpose(-1, -2) * pattern.scale
    if pattern.softcap is not None:
        scores = pattern.softcap * torch.tanh(scores / pattern.softcap)
    if pattern.key_bias is not None:
        scores = scores + pattern.key_bias.double()[:, :, None, :]
    whole = slice(0, pattern.n_queries), slice(0, pattern.n_keys), slice(None), slice(None)
    seen = pattern.mask.visible(*whole)
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    if pattern.sinks is not None:
        extra = pattern.sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        lse = torch.cat((scores, extra), dim=-1).logsumexp(-1)
    else:
        lse = scores.logsumexp(-1)
    return torch.exp(scores - lse[..., None]).nan_to_num(0.0), lse


def agree(pattern: SoftmaxPattern, names: list[str], options: Options | None = None, tol: float = 3e-5):
    options = options or Options(block=16)
    got = streaming.statistics(pattern, names, options)
    weights, lse = truth(pattern)
    want = dense(weights, names, pattern.mask, lse=lse, options=options)
    unit = {"distance": pattern.n_keys, "distance_var": pattern.n_keys**2, "effective_keys": pattern.n_keys}
    for name in names:
        if name == "peak_key":
            at = weights.gather(-1, got[name].clamp(min=0)[..., None]).squeeze(-1)
            torch.testing.assert_close(at, got["peak"].double().nan_to_num(0.0), atol=tol, rtol=tol)
        elif name != "top_keys":
            atol = tol * unit.get(name, pattern.n_queries if name == "received" else 1)
            torch.testing.assert_close(got[name].double(), want[name], atol=atol, rtol=tol, equal_nan=True, msg=name)
    if "top_keys" in names:
        found = weights.gather(-1, got["top_keys_index"].clamp(min=0)) * (got["top_keys_index"] >= 0)
        torch.testing.assert_close(found, got["top_keys_weight"].double(), atol=tol, rtol=tol)
        torch.testing.assert_close(got["top_keys_weight"].double(), want["top_keys_weight"], atol=tol, rtol=tol)


def random(n_q: int, n_k: int, h: int = 4, h_kv: int = 2, d: int = 24, b: int = 2, seed: int = 0):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(b, h, n_q, d, generator=gen) * 2, torch.randn(b, h_kv, n_k, d, generator=gen)


@pytest.mark.parametrize(
    ("n_q", "n_k"), [(1, 1), (17, 17), (63, 63), (100, 100), (64, 64), (65, 200), (300, 300), (5, 777)]
)
@pytest.mark.parametrize("known", [False, True])
def test_every_statistic(engine, n_q, n_k, known):
    q, k = random(n_q, n_k)
    mask = causal(n_q, n_k)
    lse = truth(SoftmaxPattern(q, k, mask))[1] if known else None
    pattern = SoftmaxPattern(q, k, mask, lse=lse)
    assert pattern.engines(["entropy"], Options()) == {engine}
    names = [*ROWS, *COLUMNS, "top_keys"]
    options = Options(tokens=torch.randint(0, 5, (2, n_k)), block=16, n_top=5)
    agree(pattern, [*names, "induction"], options)


def test_induction_over_a_cache_that_has_forgotten_keys(engine):
    q, k = random(70, 100)
    ids = torch.randint(0, 3, (2, 101))
    options = Options(tokens=ids[:, 1:], token_before=ids[:, 0])
    agree(SoftmaxPattern(q, k, causal(70, 100)), ["induction"], options)
    assert SoftmaxPattern(q, k, causal(70, 100)).engines(["induction"], options) == {engine}


@pytest.mark.parametrize("block", [1, 7, 16, 50, 64])
@pytest.mark.parametrize("n_top", [1, 8, 9, 20])
def test_blocks_and_top_keys(engine, block, n_top):
    q, k = random(150, 150, h=1, h_kv=1, b=1)
    agree(SoftmaxPattern(q, k, causal(150)), ["top_keys", *COLUMNS], Options(block=block, n_top=n_top))


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("n_layouts", [1, 2])
def test_layouts(engine, known, n_layouts):
    q, k = random(130, 130)
    layout = Checkered(130, 130, 16, n_layouts)
    mask = Mask(130, 130, causal=True, layout=layout, n_heads=4)
    lse = truth(SoftmaxPattern(q, k, mask))[1] if known else None
    agree(SoftmaxPattern(q, k, mask, lse=lse), [*ROWS, *COLUMNS, "top_keys"])


@pytest.mark.parametrize("known", [False, True])
def test_softcap_sinks_and_key_bias(engine, known):
    q, k = random(90, 90)
    extra = {"softcap": 3.0, "sinks": torch.tensor([0.0, 2.0, -3.0, 9.0]), "key_bias": torch.randn(2, 4, 90)}
    lse = truth(SoftmaxPattern(q, k, causal(90), **extra))[1] if known else None
    agree(SoftmaxPattern(q, k, causal(90), lse=lse, **extra), [*ROWS, *COLUMNS, "top_keys"])


def test_sink_keys(engine):
    q, k = random(80, 80)
    agree(SoftmaxPattern(q, k, causal(80)), ["sink", "received"], Options(sink_keys=(0, 3, -1)))


def test_scores_of_ten_thousand_and_one_hot_rows(engine):
    q, k = torch.zeros(1, 1, 70, 8), torch.zeros(1, 1, 70, 8)
    q[..., 0], k[..., 0] = 1e4, torch.linspace(-1, 1, 70)
    pattern = SoftmaxPattern(q, k, scale=1.0)
    agree(pattern, ["entropy", "peak", "peak_key", "effective_keys", "received"])
    assert pattern.statistics(["peak_key"])["peak_key"].unique().tolist() == [69]
    assert pattern.statistics(["entropy"])["entropy"].abs().max() < 1e-6


@pytest.mark.parametrize("known", [False, True])
def test_rows_that_a_large_number_hides_whole_are_what_kernels_give(engine, known):
    """−1e9 on all keys of a row, as of padding on the left, leaves equal scores, whose sum float32 cannot hold."""
    q, k = random(20, 20)
    hides = torch.zeros(2, 1, 20, 20).masked_fill(~torch.ones(20, 20, dtype=torch.bool).tril(), -1e9)
    hides[1, :, :, :3] = -1e9
    hides[0, :, 4] = -1e4
    scores = q @ k.repeat_interleave(2, 1).mT * 24**-0.5 + hides
    mask = Mask(20, 20, tensor=hides)
    pattern = SoftmaxPattern(q, k, mask, lse=scores.logsumexp(-1) if known else None)
    weights = scores.double().softmax(-1)
    torch.testing.assert_close(pattern.dense().double(), weights, atol=3e-4, rtol=0)
    torch.testing.assert_close(pattern.dense()[1, :, :3], torch.full((4, 3, 20), 0.05))
    names = ["entropy", "effective_keys", "received", "distance"]
    for name, want in dense(weights, names, mask).items():
        torch.testing.assert_close(pattern.statistics(names)[name].double(), want, atol=1e-2, rtol=2e-3)
    assert pattern.lse.dtype == torch.float32


def test_equal_scores_have_closed_forms(engine):
    n = 200
    pattern = SoftmaxPattern(torch.zeros(1, 2, n, 4), torch.zeros(1, 1, n, 4), causal(n))
    got = pattern.statistics(["entropy", "distance", "received", "effective_keys", "sink", "peak_key"])
    seen = torch.arange(1, n + 1).double()
    for head in range(2):
        torch.testing.assert_close(got["entropy"][0, head].double(), seen.log(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got["distance"][0, head].double(), (seen - 1) / 2, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(got["effective_keys"][0, head].double(), seen, atol=1e-3, rtol=1e-5)
        torch.testing.assert_close(got["sink"][0, head].double(), 1 / seen, atol=1e-6, rtol=1e-5)
        columns = (1 / seen).flip(0).cumsum(0).flip(0)
        torch.testing.assert_close(got["received"][0, head].double(), columns, atol=1e-5, rtol=1e-5)
    assert got["peak_key"].unique().tolist() == [0]  # of equal weights, the first


def test_the_variance_of_a_narrow_row_far_away(engine):
    n = 3000
    k = torch.zeros(1, 1, n, 2)
    k[..., 0, 0] = k[..., 1, 0] = 60.0  # rows lie on keys 0 and 1 alone, evenly
    pattern = SoftmaxPattern(torch.ones(1, 1, n, 2), k, causal(n), scale=1.0)
    got = pattern.statistics(["distance", "distance_var"])
    i = torch.arange(2, n).double()
    torch.testing.assert_close(got["distance"][0, 0, 2:].double(), i - 0.5, atol=1e-3, rtol=1e-6)
    torch.testing.assert_close(got["distance_var"][0, 0, 2:].double(), torch.full_like(i, 0.25), atol=1e-4, rtol=1e-3)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(n=st.integers(1, 150), seed=st.integers(0, 999), sharp=st.sampled_from([0.1, 1.0, 30.0]), window=st.booleans())
def test_invariants(engine, n, seed, sharp, window):
    gen = torch.Generator().manual_seed(seed)
    q, k = torch.randn(1, 2, n, 8, generator=gen) * sharp, torch.randn(1, 2, n, 8, generator=gen)
    mask = Mask(n, n, causal=True, window=max(1, n // 3) if window else None)
    pattern = SoftmaxPattern(q, k, mask)
    options = {"block": 16, "n_top": 6}
    got = pattern.statistics(["received", "entropy", "effective_keys", "peak", "top_keys", "pooled_mean"], **options)
    visible = pattern.seen.keys_per_query.double()
    entropy, effective = got["entropy"].double(), got["effective_keys"].double()
    assert got["received"].sum(-1).double().sub(n).abs().max() < 1e-3 * n  # each row gives one
    assert (entropy >= 0).all()
    assert (entropy <= visible.log() + 1e-4).all()
    assert (effective <= visible * (1 + 1e-4)).all()
    assert (effective >= 1 - 1e-4).all()
    assert (effective <= entropy.exp() * (1 + 1e-3)).all()  # Rényi-2 entropy is at most Shannon's
    top = got["top_keys_weight"]
    assert (top.sum(-1) <= 1 + 1e-4).all()
    assert (top.diff(dim=-1) <= 0).all()
    assert torch.equal(top[..., 0], got["peak"])
    assert got["pooled_mean"].sum(-1).sub(1).abs().max() < 1e-4
    order = torch.randperm(n, generator=gen)
    free, moved = SoftmaxPattern(q, k), SoftmaxPattern(q, k[:, :, order])
    names = ["entropy", "peak", "effective_keys", "lse"]
    for name, value in free.statistics(names).items():
        torch.testing.assert_close(moved.statistics(names)[name], value, atol=1e-4, rtol=1e-4, equal_nan=True)


class Reads:
    """Counts how often each key enters a product."""

    def __init__(self, n_keys: int) -> None:
        self.count = torch.zeros(n_keys, dtype=torch.long)

    def watch(self, monkeypatch) -> None:
        made = SoftmaxTiles._score_maker

        def counted(tiles, *arguments):
            make = made(tiles, *arguments)

            def loaded(queries, keys):
                self.count[keys] += 1
                return make(queries, keys)

            return loaded

        monkeypatch.setattr(SoftmaxTiles, "_score_maker", counted)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("names", [["entropy"], ["received"], ["lse"], ["entropy", "received"], [*ROWS, *COLUMNS]])
def test_keys_are_read_as_often_as_the_plan_says(monkeypatch, names, known):
    monkeypatch.setattr(NativeEngine, "refusal", lambda *asked: "the plain torch loop is what is counted")
    n = 600
    q, k = random(n, n, h=2, h_kv=2, b=1)
    lse = truth(SoftmaxPattern(q, k))[1] if known else None
    pattern = SoftmaxPattern(q, k, lse=lse)
    plan = passes(names, denominators_known=known)
    reads = Reads(n)
    reads.watch(monkeypatch)
    pattern.statistics(names, block=16)
    n_query_tiles = math.ceil(n / streaming._TILE_QUERIES)
    assert reads.count.unique().tolist() == [plan.key_reads(n_query_tiles)]


def test_a_plan_tells_itself():
    plan = passes(["entropy", "received", "value_weighted_received"])
    assert plan.needed == 2
    assert [p.statistics for p in plan.passes] == [("entropy",), ("received",)]
    assert [p.statistics for p in plan.weighted] == [(), ("received",)]
    assert "pass 1: entropy, denominators" in repr(plan)
    with pytest.raises(CaptureError, match="entrpy"):
        passes(["entrpy"])


def test_bad_numbers_are_named(engine):
    for bad in (math.nan, math.inf):
        q, k = random(20, 20)
        k[1, 0, 7, 3] = bad
        with pytest.raises(CaptureError, match=rf"k holds {bad} at \[1, 0, 7, 3\]"):
            SoftmaxPattern(q, k).statistics(["entropy"])


def test_large_finite_numbers_are_no_error(engine):
    q, k = torch.full((1, 1, 9, 2), 3e38), torch.zeros(1, 1, 9, 2)
    got = SoftmaxPattern(q, k).statistics(["entropy"])["entropy"]
    torch.testing.assert_close(got, torch.full_like(got, math.log(9)))


def test_no_compiler_is_said_once_and_torch_takes_over(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    build.library.cache_clear()
    try:
        q, k = random(20, 20)
        with caplog.at_level(logging.WARNING, "workbench"):
            pattern = SoftmaxPattern(q, k, causal(20))
            assert pattern.engines(["entropy"], Options()) == {"torch"}
            agree(pattern, [*ROWS, *COLUMNS])
        assert len(caplog.records) == 1
        assert "plain torch takes over" in caplog.text
    finally:
        build.library.cache_clear()


def test_switched_off_is_said_once_and_torch_takes_over(monkeypatch, caplog):
    monkeypatch.setenv("WORKBENCH_NATIVE", "0")
    build.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "workbench"):
            for n in (20, 33):
                q, k = random(n, n)
                pattern = SoftmaxPattern(q, k, causal(n))
                assert pattern.engines(["entropy"], Options()) == {"torch"}
                agree(pattern, [*ROWS, *COLUMNS])
        assert [record.getMessage().count("WORKBENCH_NATIVE=0") for record in caplog.records] == [1]
        assert "plain torch takes over" in caplog.text
    finally:
        build.library.cache_clear()


def test_equal_largest_weights_in_several_tiles(monkeypatch):
    """The first of equal keys, whether they lie at one place of their tiles or at several, and in many tiles."""
    monkeypatch.setattr(NativeEngine, "refusal", lambda *asked: "the tiles of plain torch are what is tested")
    width = streaming._TILE_KEYS
    n = 2 * width * (streaming._TILES_AT_ONCE + 1)
    for keys in ([5, width + 5], [7, width + 3], [width + 9, 2 * width + 2], [3, 4, n - 1], [n - 2, n - 1], [n - 1]):
        k = torch.zeros(1, 1, n, 2)
        k[0, 0, keys, 0] = 1.0
        got = SoftmaxPattern(torch.ones(1, 1, 3, 2), k, scale=4.0).statistics(["peak", "peak_key"])
        assert got["peak_key"].unique().tolist() == [keys[0]]


def test_a_long_row_in_plain_torch(monkeypatch):
    """More tiles than are kept before they are put together, and a number of keys that no band divides."""
    monkeypatch.setattr(NativeEngine, "refusal", lambda *asked: "the tiles of plain torch are what is tested")
    n = streaming._TILE_KEYS * (streaming._TILES_AT_ONCE + 2) + 37
    q, k = random(19, n, h=2, h_kv=1, b=1)
    mask = causal(19, n)
    lse = truth(SoftmaxPattern(q, k, mask))[1]
    agree(SoftmaxPattern(q, k, mask, lse=lse), [*ROWS, *COLUMNS, "top_keys"])


def test_a_folder_that_others_can_write_is_not_trusted(monkeypatch, tmp_path, caplog):
    folder = tmp_path / "attention-workbench"
    folder.mkdir()
    folder.chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "workbench"):
            assert build.library() is None
        assert "can be written by everybody" in caplog.text
    finally:
        build.library.cache_clear()


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_any_number_of_threads_gives_the_same_bits(threads, monkeypatch):
    q, k = random(400, 400, h=2, h_kv=2, b=1)
    names = ["entropy", "peak_key", "top_keys", "distance_var"]
    want = SoftmaxPattern(q, k, causal(400)).statistics(names)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(call, "_AT_ONCE", 1)  # many short calls instead of one
    got = SoftmaxPattern(q, k, causal(400)).statistics(names)
    assert all(torch.allclose(got[name], want[name], rtol=0, atol=0, equal_nan=True) for name in want)
    monkeypatch.setattr(call, "gomp_parallel", lambda: None)  # threads of the library's own
    got = SoftmaxPattern(q, k, causal(400)).statistics(names)
    assert all(torch.allclose(got[name], want[name], rtol=0, atol=0, equal_nan=True) for name in want)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86 compilers")
@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3", "x86-64-v4"])
def test_narrower_registers(processor, monkeypatch, tmp_path):
    """The code for processors with registers of 4, 8 and 16 numbers; the other tests run that of this machine alone."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if processor != "x86-64" and {"x86-64-v3": "avx2", "x86-64-v4": "avx512bw"}[processor] not in flags:
        pytest.skip(f"this processor cannot run {processor}")
    build.compile_source(build._compiler(), build.source(), tmp_path / "library.so", f"-march={processor}")
    library = ctypes.CDLL(str(tmp_path / "library.so"))
    for module in (call, native_engine, blocks):
        monkeypatch.setattr(module, "library", lambda: library)
    call._strip.cache_clear()
    try:
        assert call._strip() == {"x86-64": 16, "x86-64-v3": 16, "x86-64-v4": 64}[processor]
        q, k = random(130, 130)
        layout = Checkered(130, 130, 16, 2)
        mask = Mask(130, 130, causal=True, layout=layout, n_heads=4)
        hidden = Mask(130, 130, tensor=torch.rand(2, 1, 130, 130, generator=torch.Generator().manual_seed(1)) < 0.5)
        for given in (causal(130), Mask(130, 130, window=9), mask, hidden):
            for lse in (None, truth(SoftmaxPattern(q, k, given))[1]):
                agree(SoftmaxPattern(q, k, given, lse=lse), [*ROWS, *COLUMNS, "top_keys"])
        for block in (16, 64):
            sparse = S2Layout(116, 130, 4, 2, block, 1, 2)
            out, lse = blocks.attend_blocks(q[:, :, :116], k, k[..., :7], plan(sparse).lists, 0.3)
            want, _, want_lse = s2_naive(
                q[:, :, :116].double(), k.double(), k[..., :7].double(), block=block, local_blocks=1, vert_stride=2,
                scale=0.3,
            )  # fmt: skip
            torch.testing.assert_close(out.double(), want, rtol=0, atol=1e-5)
            torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=1e-5)
    finally:
        call._strip.cache_clear()
