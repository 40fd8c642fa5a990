"""Layers of flash-linear-attention and of diffusion U-Nets: what is read gives back what the recurrences gave."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import workbench
from support.judges import naive_of_fla
from support.linear_layers import (
    EfficientAttention,
    GatedLinearAttention,
    LinearAttention,
    MultiScaleRetention,
    Residual,
    RWKV7Attention,
    stepped,
)
from support.reading import assert_true, calls_of, drawn
from workbench.errors import CaptureError
from workbench.hooks.readers import reader_of
from workbench.kernels.recurrent import GeneralDeltaPattern
from workbench.kernels.systems import to_dsf

# How to build it, its kernel, and (head, width) of its map.
LAYERS: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, int]]] = {
    "gla": (GatedLinearAttention, "gated_linear", (4, 3)),
    "gla-conv": (lambda: GatedLinearAttention(conv=True, groups=2, gate="plain"), "gated_linear", (4, 3)),
    "gla-no-gate": (lambda: GatedLinearAttention(gate="none"), "gated_linear", (4, 3)),
    "retention": (MultiScaleRetention, "retention", (4, 3)),
    "retention-grouped": (lambda: MultiScaleRetention(groups=2, conv=True), "retention", (4, 3)),
    "rwkv7": (RWKV7Attention, "rwkv7", (3, 4)),
    "rwkv7-first": (lambda: RWKV7Attention(layer=0), "rwkv7", (3, 4)),
}  # fmt: skip
IMAGES: dict[str, tuple[Callable[[], nn.Module], tuple[int, int]]] = {
    "efficient": (EfficientAttention, (2, 2)),
    "u-net": (LinearAttention, (2, 5)),
}
EACH = pytest.mark.parametrize("name", LAYERS)


def given(name: str, n: int = 19, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, n, 12, generator=generator, dtype=torch.float64).to(dtype)
    if name == "rwkv7":
        return {
            "hidden_states": x,
            "v_first": torch.randn(2, n, 12, generator=generator, dtype=torch.float64).to(dtype),
        }
    return {"hidden_states": x}


@EACH
@pytest.mark.parametrize("n", [1, 19, 70])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@torch.no_grad()
def test_the_map_gives_back_what_the_module_gave(name: str, n: int, dtype: torch.dtype, tolerance: float) -> None:
    make, kernel, (heads, width) = LAYERS[name]
    layer = drawn(make).to(dtype)
    with calls_of(layer) as calls:
        layer(**given(name, n, dtype))
    [call] = calls
    assert (call.kernel, call.tap) == (kernel, "reader")
    assert call.pattern().shape == (2, heads, n, n)
    assert call.v.shape == (2, heads, n, width)
    assert_true(call, tolerance)


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@torch.no_grad()
def test_efficient_attention_over_images(name: str, dtype: torch.dtype, tolerance: float) -> None:
    make, (heads, width) = IMAGES[name]
    layer = drawn(make).to(dtype)
    x = torch.randn(2, 8, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    with calls_of(layer) as calls:
        layer(x)
    [call] = calls
    pattern = call.pattern()
    assert pattern.shape == (2, heads, 15, 15)
    assert call.v.shape[-1] == width
    torch.testing.assert_close(pattern.dense().sum(-1), torch.ones(2, heads, 15, dtype=pattern.dtype))
    assert not pattern.signed
    assert_true(call, tolerance)
    memory = LinearAttention()
    memory.mem_kv = nn.Parameter(torch.zeros(2, 2, 5, 4))  # keys that are no positions
    assert reader_of(memory) is None


@pytest.mark.parametrize("n", [1, 15, 16, 17, 50])
def test_the_general_delta_rule_is_its_recurrence(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    q, k, a, b, g = (torch.randn(2, 3, n, 5, generator=generator, dtype=torch.float64) for _ in range(5))
    v = torch.randn(2, 3, n, 4, generator=generator, dtype=torch.float64)
    a, g = a / 4, -g.abs()
    pattern = GeneralDeltaPattern(q, k, g, a=a, b=b, values=v)
    want = stepped(*(t.transpose(1, 2) for t in (q, k, v, g.exp(), a, b))).transpose(1, 2)
    torch.testing.assert_close(pattern.apply(v), want, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(pattern.dense() @ v, want, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(to_dsf(pattern).map(), pattern.dense(), atol=1e-10, rtol=1e-10)
    half = n // 2
    facts, tensors = pattern.state()
    again = GeneralDeltaPattern.rebuild(facts, tensors)
    assert torch.equal(again.dense(), pattern.dense())
    if half:
        early = GeneralDeltaPattern(*(t[:, :, :half] for t in (q, k, g)), a=a[:, :, :half], b=b[:, :, :half])
        late = GeneralDeltaPattern(*(t[:, :, half:] for t in (q, k, g)), a=a[:, :, half:], b=b[:, :, half:])
        state = early.state_at(-1, v[:, :, :half])
        found = late.apply(v[:, :, half:]) + late.from_state(state)
        torch.testing.assert_close(found, want[:, :, half:], atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(pattern.states(every=half)[:, :, 0], state, atol=1e-10, rtol=1e-10)
    for bad in ({"a": a[:, :1], "b": b}, {"a": a, "b": b * torch.nan}):
        with pytest.raises(CaptureError):
            GeneralDeltaPattern(q, k, g, **bad)


def test_the_layers_of_these_tests_are_those_of_other_peoples_code() -> None:
    """The recurrences above against the plain ones of flash-linear-attention."""
    generator = torch.Generator().manual_seed(0)
    q, k, a, b, g = (torch.randn(2, 9, 3, 4, generator=generator) for _ in range(5))
    v, g = torch.randn(2, 9, 3, 5, generator=generator), -g.abs()
    scaled = q * q.shape[-1] ** -0.5
    torch.testing.assert_close(
        stepped(scaled, k, v, g.exp()), naive_of_fla("gla", "naive_recurrent_gla")(q, k, v, g)[0], atol=1e-5, rtol=1e-4
    )
    first = [t.transpose(1, 2) for t in (q, k, v, a / 4, b, g)]
    want = naive_of_fla("generalized_delta_rule/dplr", "dplr_recurrence")(*first)[0].transpose(1, 2)
    torch.testing.assert_close(stepped(scaled, k, v, g.exp(), a / 4, b), want, atol=1e-5, rtol=1e-4)
    decay = (1 - 2.0 ** (-5 - torch.arange(3.0)))[:, None].expand_as(q)
    want = naive_of_fla("retention", "naive_retention")(*first[:3]).transpose(1, 2)
    torch.testing.assert_close(stepped(scaled, k, v, decay), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["gla", "retention", "rwkv7-first"])
@torch.no_grad()
def test_padding_and_caches(name: str) -> None:
    """RWKV-7 writes nothing at padding; the others take it out, which is no map of the call. Caches are refused."""
    layer, inputs = drawn(LAYERS[name][0]), given(name)
    mask = torch.ones(2, 19)
    with calls_of(layer) as calls:
        layer(**inputs, attention_mask=mask)
    assert_true(calls[0], 1e-5)
    mask[0, :4] = 0
    if name == "rwkv7-first":
        with calls_of(layer) as calls:
            layer(**inputs, attention_mask=mask)
        assert_true(calls[0], 1e-5)
    else:
        with calls_of(layer), pytest.raises(CaptureError, match="takes padding out"):
            layer(**inputs, attention_mask=mask)
    with calls_of(layer), pytest.raises(CaptureError, match="goes on from a cached state"):
        layer(**inputs, past_key_values=[{"recurrent_state": None}])
    with calls_of(layer) as calls:
        layer(**inputs, past_key_values=[])
    assert_true(calls[0], 1e-5)


@pytest.mark.parametrize("name", ["gla", "retention", "rwkv7-first", "efficient", "u-net"])
@torch.no_grad()
def test_a_model_of_them_is_captured_and_its_heads_switched_off(name: str) -> None:
    image = name in IMAGES
    x = torch.randn(*((2, 8, 3, 5) if image else (2, 9, 12)), generator=torch.Generator().manual_seed(0))
    model = Residual(drawn((LAYERS | IMAGES)[name][0])).eval()
    bare = model(x)
    with workbench.attach(model) as wb:
        assert wb.verify(x).raise_if_failed().ok
        with wb.capture(["entropy"], z=True) as cap:
            assert torch.equal(model(x), bare)
        with wb.ablate((0, 1)), wb.capture([], z=True) as without:
            changed = model(x)
        assert not torch.equal(changed, bare)
        assert bool((without[0].z[:, :, 1] == 0).all())
        if not image:
            total = cap[0].result().sum(2)
            torch.testing.assert_close(total, bare - x, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("cls", [GatedLinearAttention, MultiScaleRetention, RWKV7Attention, EfficientAttention])
def test_other_classes_of_the_same_name_are_none(cls: type[nn.Module]) -> None:
    assert reader_of(type(cls.__name__, (nn.Module,), {})()) is None
