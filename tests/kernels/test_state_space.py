"""State-space maps: tiles against the dense definition, the definition against the recurrence, and its limits."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels import families
from workbench.kernels.state_space import DualPattern, SelectivePattern, naive_dual, naive_selective
from workbench.kernels.statistics import Options, dense

SIZES = [1, 17, 63, 100]
TIGHT = {"atol": 1e-11, "rtol": 1e-11}
KINDS = {"selective": SelectivePattern, "dual": DualPattern}
STATISTICS = [
    "entropy", "peak", "peak_key", "effective_keys", "distance", "distance_var", "sink", "current", "previous",
    "induction", "signed_mass", "received", "received_mean", "top_keys", "pooled_mean", "pooled_max",
]  # fmt: skip


def inputs(
    kind: str, n: int, *, b: int = 2, h: int = 4, g: int = 2, state: int = 3, seed: int = 0
) -> dict[str, Tensor]:
    """delta, A, B and C in float64; steps are uneven, so that some positions wipe the state out."""
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen, dtype=torch.float64)

    A = -normal(h, state).exp() if kind == "selective" else -normal(h).exp()
    delta = torch.nn.functional.softplus(2 * normal(b, h, n) - 3)
    return {"delta": delta, "A": A, "B": normal(b, g, n, state), "C": normal(b, g, n, state)}


def naive(kind: str, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """[batch, head, query, key] of the definition, one head after the other, in float64."""
    delta, A, B, C = (t.double() for t in (delta, A, B, C))
    one = naive_selective if kind == "selective" else naive_dual
    per_group = delta.shape[1] // B.shape[1]
    rows = [
        torch.stack([one(delta[b, h], A[h], B[b, h // per_group], C[b, h // per_group]) for h in range(len(A))])
        for b in range(len(delta))
    ]
    return torch.stack(rows)


def recurrence(delta: Tensor, A: Tensor, B: Tensor, C: Tensor, v: Tensor) -> Tensor:
    """[batch, head, position, width]: h ← exp(ΔA) h + Δ B v, y = C·h, one position at a time."""
    rate = A if A.dim() == 2 else A[:, None]
    wide = [t.repeat_interleave(delta.shape[1] // t.shape[1], dim=1) for t in (B, C)]
    h, out = torch.zeros(*delta.shape[:2], v.shape[-1], B.shape[-1], dtype=v.dtype), []
    for t in range(delta.shape[2]):
        step = delta[:, :, t, None, None]
        h = (step * rate[:, None]).exp() * h + step * v[:, :, t, :, None] * wide[0][:, :, t, None]
        out.append((h @ wide[1][:, :, t, :, None]).squeeze(-1))
    return torch.stack(out, dim=2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [*SIZES, 200])
def test_pattern_definition_and_recurrence_agree(kind: str, n: int):
    given = inputs(kind, n)
    v = torch.randn(2, 4, n, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    want = recurrence(**given, v=v)
    pattern = KINDS[kind](**given)
    whole = naive(kind, **given)
    torch.testing.assert_close(whole @ v, want, **TIGHT)
    torch.testing.assert_close(pattern.dense(), whole, **TIGHT)
    torch.testing.assert_close(pattern.apply(v), want, **TIGHT)
    assert (pattern.grade, pattern.signed, pattern.normalised, pattern.by_magnitude) == ("frozen", True, False, True)
    assert pattern.head_group == 1


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.integers(1, 60), st.data())
def test_any_tile_is_a_part_of_the_whole(kind: str, n: int, data: st.DataObject):
    given = inputs(kind, n)
    pattern = KINDS[kind](**given)

    def piece() -> slice:
        start = data.draw(st.integers(0, n))
        return slice(start, data.draw(st.integers(start, n)))

    queries, keys = piece(), piece()
    heads = data.draw(st.none() | st.lists(st.integers(0, 3), max_size=5))
    whole = naive(kind, **given)[:, :, queries, keys]
    torch.testing.assert_close(pattern.tile(queries, keys, heads), whole if heads is None else whole[:, heads], **TIGHT)


@pytest.mark.parametrize("kind", KINDS)
def test_many_heads_are_made_a_few_at_a_time(kind: str, monkeypatch: pytest.MonkeyPatch):
    given = inputs(kind, 40, h=6)
    whole = KINDS[kind](**given).dense()
    made = []
    fill = KINDS[kind]._fill

    def counted(self: Any, out: Tensor, *args: Any) -> None:
        made.append(out.shape[1])
        fill(self, out, *args)

    monkeypatch.setattr("workbench.kernels.state_space.pattern._NUMBERS", 1)
    monkeypatch.setattr(KINDS[kind], "_fill", counted)
    torch.testing.assert_close(KINDS[kind](**given).dense(), whole, atol=0, rtol=0)
    assert made == [1] * 6


def test_a_capture_of_many_channels_holds_tiles_of_few():
    given = inputs("selective", 60, b=1, h=400, g=1)
    pattern = SelectivePattern(**given)
    largest = 0
    tile_of = pattern.tile_of

    def watched(*args: Any) -> Tensor:
        nonlocal largest
        tile = tile_of(*args)
        largest = max(largest, tile.numel())
        return tile

    pattern.tile_of = watched
    pattern.statistics(["entropy", "received"])
    assert 0 < largest <= 12 * 192 * 192  # the streaming's own bound


@pytest.mark.parametrize("n", SIZES)
def test_equal_rates_and_shared_steps_make_both_the_same(n: int):
    dual = inputs("dual", n, h=4, g=1)
    shared = dual["delta"][:, :1].expand(-1, 4, -1)
    rate = torch.full((4,), -0.7, dtype=torch.float64)
    wide = SelectivePattern(shared, rate[:, None].expand(-1, 3), dual["B"], dual["C"])
    torch.testing.assert_close(wide.dense(), DualPattern(shared, rate, dual["B"], dual["C"]).dense(), **TIGHT)


@pytest.mark.parametrize("kind", KINDS)
def test_no_part_below_the_diagonal_has_a_rank_above_the_states(kind: str):
    """The map is semiseparable: a block of queries reads all keys before it through a state of so many numbers."""
    given = inputs(kind, 40, b=1, state=3)
    whole = KINDS[kind](**given).dense()
    for first, last in ((20, 40), (7, 15), (39, 40)):
        singular = torch.linalg.svdvals(whole[..., first:last, : first + 1])
        assert bool((singular[..., 3:] <= 1e-12 * singular[..., :1]).all())
    assert int(torch.linalg.matrix_rank(whole[0, 0])) > 3


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_later_is_read(kind: str):
    given = inputs(kind, 21, b=1, h=2, g=1)
    upper = torch.ones(21, 21, dtype=torch.bool).triu(1)
    assert bool((KINDS[kind](**given).dense()[..., upper] == 0).all())
    assert bool((naive(kind, **given)[..., upper] == 0).all())
    v = torch.randn(1, 2, 21, 1, dtype=torch.float64)

    def run(delta: Tensor, B: Tensor, C: Tensor, v: Tensor) -> Tensor:
        return recurrence(delta, given["A"], B, C, v)[0, ..., 0]  # [head, query]

    of_delta, of_B, of_C, of_v = torch.autograd.functional.jacobian(run, (given["delta"], given["B"], given["C"], v))
    assert bool((of_delta[:, :, 0].diagonal(dim1=0, dim2=2)[upper] == 0).all())
    for jacobian in (of_B, of_C):
        assert bool((jacobian[:, :, 0, 0][:, upper] == 0).all())
    frozen = of_v[:, :, 0, ..., 0].diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    torch.testing.assert_close(frozen, naive(kind, **given)[0], **TIGHT)  # the map is the derivative in the values


@pytest.mark.parametrize("kind", KINDS)
def test_total_decay_leaves_the_position_itself(kind: str):
    given = inputs(kind, 63)
    given["A"] = torch.full_like(given["A"], -1e30)
    want = given["delta"] * (given["C"] * given["B"]).sum(-1).repeat_interleave(2, dim=1)
    torch.testing.assert_close(KINDS[kind](**given).dense(), torch.diag_embed(want), **TIGHT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", [0.0, 0.1, 3.0])
def test_rows_of_a_constant_decay_sum_to_a_geometric_series(kind: str, rate: float):
    n = 100
    one = torch.ones(1, 1, n, 1, dtype=torch.float64)
    A = torch.full((1, 1) if kind == "selective" else (1,), -rate, dtype=torch.float64)
    sums = KINDS[kind](one[..., 0], A, one, one).dense().sum(-1).flatten()
    a, i = math.exp(-rate), torch.arange(1, n + 1).double()
    torch.testing.assert_close(sums, i if rate == 0 else (1 - a**i) / (1 - a), **TIGHT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_float32_is_true_far_from_the_start(kind: str, scale: float):
    """Running sums of thousands, of which small differences matter: float32 sums would be wrong in the third digit."""
    given = {name: t.float() for name, t in inputs(kind, 3000, b=1, h=2, g=1).items()}
    given["delta"] = given["delta"] * torch.where(torch.arange(3000) % 7 == 0, scale, 0.01 * scale)
    pattern = KINDS[kind](**given)
    assert pattern.dtype == torch.float32
    last = {name: t if name == "A" else t[:, :, -150:] for name, t in given.items()}  # nothing before them matters
    want = naive(kind, **last)
    for queries in (slice(2850, 3000), slice(2990, 3000), slice(2990, 2991)):
        got = pattern.tile(queries, slice(2850, 3000)).double()
        expected = want[:, :, queries.start - 2850 : queries.stop - 2850]
        torch.testing.assert_close(got, expected, atol=2e-6 * float(want.abs().max()), rtol=1e-5)
        # Asked for with all keys before them, their part is the same.
        wide = pattern.tile(queries, slice(0, 3000)).double()[..., 2850:]
        torch.testing.assert_close(wide, expected, atol=2e-6 * float(want.abs().max()), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_long_sequences_with_any_rate_stay_finite(kind: str):
    given = {name: t.float() for name, t in inputs(kind, 2000, b=1, h=4, g=1).items()}
    rates = torch.tensor([0.0, 1e-6, 1.0, 1e20])
    given["A"] = -(rates[:, None].expand(-1, 3).contiguous() if kind == "selective" else rates)
    pattern = KINDS[kind](**given)
    v = torch.ones(1, 4, 2000, 1)
    want = recurrence(**{name: t.double() for name, t in given.items()}, v=v.double())
    got = pattern.apply(v).double()
    torch.testing.assert_close(got, want, atol=1e-4 * float(want.abs().max()), rtol=1e-4)
    tile = pattern.tile(slice(1800, 2000), slice(1800, 2000))
    assert bool((tile.diagonal(dim1=-2, dim2=-1) != 0).all())
    assert not bool(((tile != 0) & (tile.abs() < torch.finfo(torch.float32).tiny)).any())  # subnormal: slow


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [*SIZES, 210])
def test_statistics_are_those_of_magnitudes(kind: str, n: int):
    given = inputs(kind, n)
    v = torch.randn(2, 4, n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tokens = torch.randint(0, 5, (2, n), generator=torch.Generator().manual_seed(2))
    pattern = KINDS[kind](**given, values=v)
    got = pattern.statistics([*STATISTICS, *(f"value_weighted_{s}" for s in ("entropy", "received"))], tokens=tokens)
    whole, options = naive(kind, **given), Options(tokens=tokens)
    want = dense(whole, STATISTICS, pattern.mask, options=options, by_magnitude=True)
    weighted = whole * v.norm(dim=-1)[:, :, None]
    by_value = dense(weighted, ["entropy", "received"], pattern.mask, by_magnitude=True)
    want |= {f"value_weighted_{name}": value for name, value in by_value.items()}
    assert set(got) == set(want)
    for name, value in want.items():
        torch.testing.assert_close(
            got[name].double(),
            value.double(),
            atol=1e-9,
            rtol=1e-9,
            equal_nan=True,
            msg=lambda m, name=name: f"{name}: {m}",
        )


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_in_float32(kind: str):
    given = {name: t.float() for name, t in inputs(kind, 100).items()}
    names = [name for name in STATISTICS if name not in ("peak_key", "top_keys", "induction")]
    got = KINDS[kind](**given).statistics(names)
    want = dense(naive(kind, **given), names, KINDS[kind](**given).mask, by_magnitude=True)
    for name in names:
        atol = 2e-6 * max(1.0, float(want[name].abs().max()))
        torch.testing.assert_close(
            got[name].double(), want[name], atol=atol, rtol=2e-5, equal_nan=True, msg=f"{name} differs"
        )


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_weight_have_no_distribution(kind: str):
    given = inputs(kind, 9)
    given["C"][0, :, :4] = 0  # padding on the left reads nothing
    pattern = KINDS[kind](**given)
    got = pattern.statistics(["entropy", "received"])
    want = dense(naive(kind, **given), ["entropy", "received"], pattern.mask, by_magnitude=True)
    assert bool(got["entropy"][0, :, :4].isnan().all())
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, **TIGHT, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_and_back(kind: str):
    given = inputs(kind, 17)
    v = torch.randn(2, 4, 17, 2, dtype=torch.float64)
    pattern = KINDS[kind](**given, values=v)
    again = families.rebuild(type(pattern).__name__, *pattern.state())
    torch.testing.assert_close(again.dense(), pattern.dense(), atol=0, rtol=0)
    torch.testing.assert_close(again.values, v, atol=0, rtol=0)
    kept = KINDS[kind](**given).kept(lambda name, tensor: tensor.clone())
    assert type(kept) is KINDS[kind]
    assert kept.values is None
    torch.testing.assert_close(kept.dense(), pattern.dense(), atol=0, rtol=0)


def test_dtype_of_the_pattern():
    given = inputs("dual", 5)
    half = {name: t.bfloat16() for name, t in given.items()}
    assert DualPattern(**half).dense().dtype == torch.float32
    assert DualPattern(**(half | {"A": half["A"].float()})).dense().dtype == torch.float32
    assert DualPattern(**given).dense().dtype == torch.float64
    want = naive("dual", **half)
    torch.testing.assert_close(DualPattern(**half).dense().double(), want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_is_named(kind: str):
    good = inputs(kind, 9)
    spoiled = good["B"].clone()
    spoiled[1, 0, 3, 2] = math.nan
    cases = [
        ("delta must be", {"delta": good["delta"][0]}),
        ("delta must be", {"delta": good["delta"][..., :0]}),
        ("must both be", {"B": good["B"][:, :, :8]}),
        ("must both be", {"C": good["C"][..., :2]}),
        ("must both be", {name: good[name][:, :1].expand(-1, 3, -1, -1) for name in ("B", "C")}),
        (r"A must be \[head 4", {"A": good["A"][:3]}),
        ("values must be", {"values": torch.zeros(2, 2, 9, 1, dtype=torch.float64)}),
        ("delta must be floating", {"delta": good["delta"].long()}),
        (r"B holds nan at \[1, 0, 3, 2\]", {"B": spoiled}),
        ("delta is -", {"delta": -good["delta"]}),
        ("a rate A is", {"A": -good["A"]}),
    ]
    for message, change in cases:
        with pytest.raises(CaptureError, match=message):
            KINDS[kind](**(good | change))
    pattern = KINDS[kind](**good)
    pattern.C[0, 1, 2, 0] = math.inf
    with pytest.raises(CaptureError, match=r"C holds inf at \[0, 1, 2, 0\]"):
        pattern.statistics(["entropy"])
