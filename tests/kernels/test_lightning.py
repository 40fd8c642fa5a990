"""Lightning attention: the chunked form against the definition, its gradients, its states and its pattern."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from workbench.errors import CaptureError
from workbench.kernels import families
from workbench.kernels.lightning import (
    LightningPattern,
    decays,
    lightning_attention,
    naive_lightning,
    naive_pattern,
    slopes,
)
from workbench.kernels.statistics import Options, dense

SIZES = [1, 17, 63, 100]
TIGHT = {"atol": 1e-10, "rtol": 1e-10}


def inputs(n: int, *, b: int = 2, h: int = 3, d: int = 8, width: int = 5, seed: int = 0, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    shapes = (b, h, n, d), (b, h, n, d), (b, h, n, width)
    return tuple(torch.randn(s, generator=gen, dtype=torch.float64).to(dtype) for s in shapes)


def rates(h: int, seed: int = 0) -> Tensor:
    return torch.rand(h, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).clamp(min=0.05)


def recurrent(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One position at a time: KV ← λ·KV + kᵀv, o = q·KV."""
    state = torch.zeros(*q.shape[:2], q.shape[3], v.shape[3], dtype=q.dtype) if state is None else state
    out = []
    for t in range(q.shape[2]):
        state = decay[:, None, None] * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append((q[:, :, t, None] @ state).squeeze(2))
    return torch.stack(out, dim=2), state


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("chunk", [1, 16, 64, 1000])
def test_chunked_recurrent_and_quadratic_agree(n: int, chunk: int):
    q, k, v = inputs(n)
    want = naive_lightning(q, k, v, rates(3))
    out, state = lightning_attention(q, k, v, rates(3), chunk=chunk, return_state=True)
    stepped, last = recurrent(q, k, v, rates(3))
    torch.testing.assert_close(out, want, **TIGHT)
    torch.testing.assert_close(stepped, want, **TIGHT)
    torch.testing.assert_close(state, last, **TIGHT)


@pytest.mark.parametrize("n", SIZES)
def test_gradients_are_those_of_the_definition(n: int):
    tensors = [t.requires_grad_() for t in inputs(n)]
    out = lightning_attention(*tensors, rates(3), chunk=16)
    weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad(out, tensors, weight)
    want = torch.autograd.grad(naive_lightning(*tensors, rates(3)), tensors, weight)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, **TIGHT)


@pytest.mark.parametrize("n", [1, 7])
def test_gradcheck_with_states(n: int):
    tensors = inputs(n, b=1, h=2, d=3, width=2)
    state = torch.randn(1, 2, 3, 2, dtype=torch.float64)

    def run(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return lightning_attention(q, k, v, rates(2), chunk=3, initial_state=state, return_state=True)

    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in (*tensors, state)])


def test_gradients_of_the_state_alone():
    tensors = [t.requires_grad_() for t in inputs(17)]
    _, state = lightning_attention(*tensors, rates(3), chunk=4, return_state=True)
    _, last = recurrent(*tensors, rates(3))
    got = torch.autograd.grad(state.square().sum(), tensors, allow_unused=True, materialize_grads=True)
    want = torch.autograd.grad(last.square().sum(), tensors, allow_unused=True, materialize_grads=True)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, **TIGHT)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 90), st.data(), st.integers(0, 1000))
def test_segments_hand_their_state_over(n: int, data: st.DataObject, seed: int):
    cut = data.draw(st.integers(1, n - 1))
    chunk = data.draw(st.integers(1, n))
    tensors = [t.requires_grad_() for t in inputs(n, seed=seed)]
    decay = rates(3, seed)
    head, tail = ([t[:, :, s] for t in tensors] for s in (slice(0, cut), slice(cut, None)))
    first, state = lightning_attention(*head, decay, chunk=chunk, return_state=True)
    rest, last = lightning_attention(*tail, decay, chunk=chunk, initial_state=state, return_state=True)
    whole, end = lightning_attention(*tensors, decay, chunk=chunk, return_state=True)
    joined = torch.cat([first, rest], dim=2)
    torch.testing.assert_close(joined, whole, **TIGHT)
    torch.testing.assert_close(last, end, **TIGHT)
    got = torch.autograd.grad(joined.square().sum(), tensors)
    want = torch.autograd.grad(whole.square().sum(), tensors)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, atol=1e-8, rtol=1e-10)


def test_without_decay_it_is_causal_linear_attention():
    q, k, v = inputs(63)
    out = lightning_attention(q, k, v, torch.ones(3))
    torch.testing.assert_close(out, (q @ k.mT).tril() @ v, **TIGHT)


def test_with_total_decay_only_the_position_itself_is_read():
    q, k, v = inputs(63)
    out = lightning_attention(q, k, v, torch.full((3,), 1e-300, dtype=torch.float64))
    torch.testing.assert_close(out, (q * k).sum(-1, keepdim=True) * v, **TIGHT)


@pytest.mark.parametrize("rate", [1e-30, 1e-3, 0.5, 0.999])
def test_long_sequences_neither_overflow_nor_turn_to_nan(rate: float):
    tensors = inputs(1200, b=1, h=1, d=4, width=3, dtype=torch.float32)  # float64 does not hold 0.5⁻¹²⁰⁰
    decay = torch.full((1,), rate, dtype=torch.float64)
    want, _ = recurrent(*(t.double() for t in tensors), decay)
    for chunk in (64, 1200):
        given = [t.clone().requires_grad_() for t in tensors]
        out = lightning_attention(*given, decay, chunk=chunk)
        out.sum().backward()
        torch.testing.assert_close(out.double(), want, atol=1e-3, rtol=1e-4)
        assert all(bool(t.grad.isfinite().all()) for t in given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lower_precision_keeps_a_float32_state(dtype: torch.dtype):
    tensors = [t.requires_grad_() for t in inputs(100, dtype=dtype)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, state = lightning_attention(*tensors, return_state=True)
    assert out.dtype == dtype
    assert state.dtype == torch.float32
    want, last = recurrent(*(t.detach().double() for t in tensors), decays(3))
    tol = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(state.double(), last, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(out.double(), want, atol=tol * float(want.abs().max()), rtol=0)
    out.float().sum().backward()
    assert [t.grad.dtype for t in tensors] == [dtype] * 3


def test_fewer_kv_heads_are_repeated():
    q, k, v = inputs(17, h=4)
    k, v = k[:, :2], v[:, :2]
    wide = [t.repeat_interleave(2, dim=1) for t in (k, v)]
    torch.testing.assert_close(lightning_attention(q, k, v), naive_lightning(q, *wide, decays(4)), **TIGHT)
    pattern = LightningPattern(q, k)
    torch.testing.assert_close(pattern.dense(), naive_pattern(q, wide[0], decays(4)), **TIGHT)
    torch.testing.assert_close(pattern.column_mass(), pattern.dense().sum(-2), **TIGHT)


def test_slopes_follow_alibi():
    torch.testing.assert_close(slopes(8), torch.tensor([2.0**-i for i in range(1, 9)], dtype=torch.float64))
    twelve = [*(2.0**-i for i in range(1, 9)), *(2.0**-x for x in (0.5, 1.5, 2.5, 3.5))]
    torch.testing.assert_close(slopes(12), torch.tensor(twelve, dtype=torch.float64))
    torch.testing.assert_close(decays(12), torch.exp(-slopes(12)))
    for n in range(1, 40):
        assert len(slopes(n)) == n
        assert bool(((decays(n) > 0) & (decays(n) < 1)).all())


@pytest.mark.parametrize("n", SIZES)
def test_pattern_is_the_map_that_the_kernel_applies(n: int):
    q, k, v = inputs(n)
    pattern = LightningPattern(q, k, rates(3), values=v)
    torch.testing.assert_close(pattern.dense(), naive_pattern(q, k, rates(3)), **TIGHT)
    out = lightning_attention(q, k, v, rates(3))
    torch.testing.assert_close(pattern.dense() @ v, out, **TIGHT)
    torch.testing.assert_close(pattern.apply(v), out, **TIGHT)
    torch.testing.assert_close(pattern.column_mass(chunk=7), pattern.dense().sum(-2), **TIGHT)
    assert pattern.signed
    assert not pattern.normalised
    assert pattern.by_magnitude
    assert pattern.grade == "exact"


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.data())
def test_any_tile_is_a_part_of_the_whole(n: int, data: st.DataObject):
    q, k, _ = inputs(n)
    pattern = LightningPattern(q, k, rates(3))

    def piece() -> slice:
        start = data.draw(st.integers(0, n))
        return slice(start, data.draw(st.integers(start, n)))

    queries, keys = piece(), piece()
    heads = data.draw(st.none() | st.lists(st.integers(0, 2), max_size=3))
    whole = naive_pattern(q, k, rates(3))[:, :, queries, keys]
    torch.testing.assert_close(pattern.tile(queries, keys, heads), whole if heads is None else whole[:, heads], **TIGHT)


def test_dtype_of_the_pattern():
    q, k, _ = inputs(5, dtype=torch.bfloat16)
    assert LightningPattern(q, k).dense().dtype == torch.float32
    assert LightningPattern(q.double(), k.double()).dense().dtype == torch.float64


def test_horizon():
    q, k, _ = inputs(2)
    horizon = LightningPattern(q, k, torch.tensor([0.5, 0.9, 1.0], dtype=torch.float64)).horizon
    torch.testing.assert_close(horizon, torch.tensor([2.0, 10.0, math.inf], dtype=torch.float64))


@pytest.mark.parametrize("n", [1, 17, 100])
def test_statistics_are_those_of_magnitudes(n: int):
    q, k, v = inputs(n)
    pattern = LightningPattern(q, k, rates(3), values=v)
    names = [
        "entropy",
        "peak",
        "effective_keys",
        "distance",
        "sink",
        "current",
        "signed_mass",
        "received",
        "pooled_mean",
    ]
    got = pattern.statistics([*names, "value_weighted_received"])
    weighted = naive_pattern(q, k, rates(3)) * v.norm(dim=-1)[:, :, None]
    want = dense(naive_pattern(q, k, rates(3)), names, pattern.mask, options=Options(), by_magnitude=True)
    want["value_weighted_received"] = dense(weighted, ["received"], pattern.mask, by_magnitude=True)["received"]
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, **TIGHT, equal_nan=True, msg=f"{name} differs")


def test_parts_and_back():
    q, k, v = inputs(17)
    pattern = LightningPattern(q, k, rates(3), values=v)
    again = families.rebuild("LightningPattern", *pattern.state())
    torch.testing.assert_close(again.dense(), pattern.dense(), atol=0, rtol=0)
    torch.testing.assert_close(again.values, v, atol=0, rtol=0)
    kept = LightningPattern(q, k).kept(lambda name, tensor: tensor.clone())
    assert kept.values is None
    torch.testing.assert_close(kept.dense(), naive_pattern(q, k, decays(3)), **TIGHT)


class _Seen(TorchFunctionMode):
    """Records the calls of our kernels, as a tap does."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if hasattr(func, "attention_kernel"):
            self.calls.append((func.attention_kernel, func.pattern_of(*args, **(kwargs or {})), result))
        return result


def test_a_call_tells_its_pattern():
    q, k, v = inputs(17)
    with _Seen() as seen:
        lightning_attention(q, k, v, rates(3), chunk=4)
        lightning_attention(q, k, v, decay=rates(3), return_state=True)
        lightning_attention(q, k, v, initial_state=torch.zeros(2, 3, 8, 5, dtype=torch.float64))
    (name, first, out), (_, second, (again, state)), (_, third, default) = seen.calls
    assert name == "lightning"
    assert state.shape == (2, 3, 8, 5)
    for pattern, result in ((first, out), (second, again), (third, default)):
        assert isinstance(pattern, LightningPattern)
        torch.testing.assert_close(pattern.apply(pattern.values), result, **TIGHT)


def test_what_a_call_reads_of_a_state_is_beside_its_map():
    q, k, v = inputs(17)
    state = torch.randn(2, 3, 8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    out = lightning_attention(q, k, v, rates(3), initial_state=state)
    pattern = lightning_attention.pattern_of(q, k, v, rates(3), initial_state=state)
    torch.testing.assert_close(pattern.outputs(v), out, **TIGHT)
    assert float((pattern.apply(v) - out).abs().max()) > 0.1


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.5, math.nan, math.inf])
def test_decay_outside_its_range(rate: float):
    q, k, v = inputs(3)
    decay = torch.tensor([0.5, rate, 0.5])
    with pytest.raises(CaptureError, match=r"decay of head 1 is .*outside \(0, 1\]"):
        lightning_attention(q, k, v, decay)
    with pytest.raises(CaptureError, match="decay of head 1"):
        LightningPattern(q, k, decay)


def test_bad_input_is_named():
    q, k, v = inputs(9)
    state = torch.zeros(2, 3, 8, 5, dtype=torch.float64)
    spoiled = v.clone()
    spoiled[1, 2, 3, 4] = math.nan
    cases = [
        ("one number for each of 3 heads", (q, k, v, torch.ones(2)), {}),
        ("one number for each of 3 heads", (q, k, v, torch.ones(3, 1, 1)), {}),
        ("chunk is 0", (q, k, v), {"chunk": 0}),
        ("there are no keys", tuple(t[:, :, :0] for t in (q, k, v)), {}),
        ("k is torch.float32", (q, k.float(), v), {}),
        ("same positions, not 8 and 9", (q[:, :, :8], k, v), {}),
        (r"v holds nan at \[1, 2, 3, 4\]", (q, k, spoiled), {}),
        (r"q holds inf at \[0, 0, 0, 0\]", (q / 0.0 * q.sign(), k, v), {}),
        (r"initial_state must be .*\[2, 3, 8, 5\]", (q, k, v), {"initial_state": state[..., :4]}),
        ("initial_state is torch.float32", (q, k, v), {"initial_state": state.float()}),
        ("initial_state holds nan", (q, k, v), {"initial_state": state * math.nan}),
    ]
    for message, args, options in cases:
        with pytest.raises(CaptureError, match=message) as caught:
            lightning_attention(*args, **options)
        assert caught.value.hint
    with pytest.raises(CaptureError, match="n_heads is 0"):
        slopes(0)


@pytest.mark.parametrize("n_heads", [1, 4, 6, 12])
@pytest.mark.parametrize("n_layers", [2, 7])
def test_the_schedule_of_minimax_is_that_of_its_model(n_heads, n_layers):
    modeling = pytest.importorskip("transformers.models.minimax.modeling_minimax")
    from transformers import MiniMaxConfig

    config = MiniMaxConfig(
        hidden_size=8 * n_heads, num_attention_heads=n_heads, num_key_value_heads=n_heads, head_dim=8, block_size=4,
        num_hidden_layers=n_layers, layer_types=["linear_attention"] * n_layers,
    )  # fmt: skip
    for layer in range(n_layers):
        slopes_there = modeling.MiniMaxLightningAttention(config, layer).slope_rate.flatten().double()
        torch.testing.assert_close(
            decays(n_heads, layer, n_layers, "minimax"), torch.exp(-slopes_there), atol=1e-7, rtol=1e-6
        )


def test_deeper_layers_forget_more_slowly():
    of_layers = torch.stack([decays(6, layer, 5) for layer in range(5)])
    assert (of_layers.diff(dim=0) > 0).all()
    assert (of_layers < 1).all()
    torch.testing.assert_close(of_layers[2], torch.exp(-slopes(6) * (0.5 + 1e-5)))
    torch.testing.assert_close(decays(3, 0, 1), torch.exp(-slopes(3) * (1 + 1e-5)))


@pytest.mark.parametrize(("arguments", "says"), [
    ((4, 3, 3), "no layer 3 of 3"),
    ((4, -1, 3), "no layer -1"),
    ((4, 1), "its place and the number of layers"),
    ((4, None, 3), "its place and the number of layers"),
    ((4, 0, 3, "linear"), 'no schedule "linear"'),
    ((0, 0, 3, "minimax"), "n_heads is 0"),
])  # fmt: skip
def test_layers_that_are_not_there(arguments, says):
    with pytest.raises(CaptureError, match=says):
        decays(*arguments)
