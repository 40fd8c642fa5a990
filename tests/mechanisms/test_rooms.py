"""Every mechanism keeps the same promises: its map is what it does, and all that works on attention works on it."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import workbench
from workbench import WorkbenchError, mechanisms
from workbench.kernels.statistics import Options
from workbench.kernels.statistics import dense as defined
from workbench.mechanisms import Mechanism, Mixer, Place

ALL = mechanisms.list()
FORMS = [(one, place, None) for one in ALL for place in one.places]
FORMS += [(one, one.places[0], variant) for one in ALL for variant in one.variants]
FIRST = [(one, one.places[0]) for one in ALL]
STATISTICS = (
    "entropy",
    "peak",
    "effective_keys",
    "distance",
    "sink",
    "previous",
    "received",
    "received_mean",
    "pooled_mean",
    "row_sum",
)


def _id(value: Any) -> str:
    if isinstance(value, Place):
        kind = "x".join(map(str, value.grid)) if value.grid else "causal" if value.causal else "whole"
        return f"{kind}-{value.length}"
    return getattr(value, "name", value or "plain")


each_form = pytest.mark.parametrize(("one", "place", "variant"), FORMS, ids=_id)
each_gate = pytest.mark.parametrize(
    ("one", "place", "variant"), [form for form in FORMS if form[0].card.kind == "gate"], ids=_id
)
each_room = pytest.mark.parametrize(("one", "place"), FIRST, ids=_id)


def _made(
    one: Mechanism, place: Place, variant: str | None = None, **options: Any
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The module and its inputs, in float64, with nothing left at a value that hides faults."""
    torch.manual_seed(0)
    module = one.build(place, variant, **options).double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module, {name: x.double() for name, x in one.example(place).items()}


def _maps(cap: workbench.Capture) -> Tensor:
    """[batch, head, query, key] of all sites, whose heads lie one after the other."""
    return torch.cat([cap[site.name].pattern.dense() for site in cap.sites], dim=1)


def _left_behind(module: nn.Module) -> dict[str, Any]:
    return {
        f"{name}.{key}": len(value) if isinstance(value, dict) else None
        for name, inner in module.named_modules()
        for key, value in vars(inner).items()
    }


@each_form
def test_the_map_times_the_values_is_the_output(one: Mechanism, place: Place, variant: str | None) -> None:
    module, inputs = _made(one, place, variant)
    with torch.no_grad():
        bare = module(**inputs)
    before = _left_behind(module)
    with torch.no_grad(), workbench.attach(module) as wb, wb.capture(["entropy"], z=True, values=True) as cap:
        assert torch.equal(module(**inputs), bare)
    assert _left_behind(module) == before
    assert bare.shape == inputs["x"].shape
    assert len(cap.sites)
    for site in cap.sites:
        pattern = cap[site.name].pattern
        assert pattern.values is not None
        v = pattern.values.repeat_interleave(pattern.n_heads // pattern.values.shape[1], dim=1)
        z = cap[site.name].z.transpose(1, 2)
        torch.testing.assert_close(pattern.dense() @ v, z, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(pattern.apply(pattern.values), z, atol=1e-10, rtol=1e-10)
        assert (site.kind, pattern.grade) == one.card.of(site.path)


@each_form
def test_the_map_is_the_jacobian_in_the_values_and_hides_nothing(
    one: Mechanism, place: Place, variant: str | None
) -> None:
    module, inputs = _made(one, place, variant)
    if not isinstance(module, Mixer):
        pytest.skip("it is no Mixer: its own test compares its map with its Jacobian")
    with torch.no_grad(), workbench.attach(module) as wb, wb.capture([]) as cap:
        module(**inputs)
    weights, x = _maps(cap), inputs["x"]
    q, k, v = module.heads(x)
    each = torch.eye(v.shape[2], dtype=v.dtype).expand(*v.shape[:2], -1, -1)
    with torch.no_grad():
        jacobian = module.mix(q, k, each, x)  # z is linear in the values: this is ∂z_i/∂v_j
    torch.testing.assert_close(jacobian, weights, atol=1e-12, rtol=1e-10)
    assert torch.equal(jacobian == 0, weights == 0)
    if place.causal:
        assert not weights.triu(1).any()


@each_room
def test_no_token_depends_on_a_later_one_where_it_is_causal(one: Mechanism, place: Place) -> None:
    if not place.causal:
        pytest.skip("it is not causal")
    module, inputs = _made(one, place)
    x = inputs["x"].requires_grad_()
    y = module(**inputs)
    reached = torch.zeros(place.length, place.length, dtype=torch.bool)
    for i in range(place.length):
        (gradient,) = torch.autograd.grad(y[:, i].square().sum(), x, retain_graph=True)
        reached[i] = gradient.abs().sum((0, 2)) > 0
    assert reached.diagonal().all()
    assert not reached.triu(1).any()
    with torch.no_grad():
        half = module(x[:, : place.length // 2])
    same = torch.allclose(half, y[:, : place.length // 2], atol=1e-10)
    assert same or one.card.leaks, "a map that leaks says so in its card"


@each_form
@torch.no_grad()
def test_examples_do_not_see_each_other_nor_do_heads(one: Mechanism, place: Place, variant: str | None) -> None:
    module, inputs = _made(one, place, variant)
    both = module(**inputs)
    swapped = module(**{name: x.flip(0) for name, x in inputs.items()})
    torch.testing.assert_close(swapped.flip(0), both, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(module(**{name: x[:1] for name, x in inputs.items()}), both[:1], atol=1e-12, rtol=1e-10)
    if not isinstance(module, Mixer) or module.n_kv_heads == 1:
        return
    q, k, v = module.heads(inputs["x"])
    each = torch.eye(v.shape[2], dtype=v.dtype).expand(*v.shape[:2], -1, -1)

    def maps(q: Tensor, k: Tensor) -> Tensor:
        weights = module.mix(q, k, each, inputs["x"])  # gates may choose between heads: only shapes are compared
        return (weights / weights.abs().sum(-1, keepdim=True))[:, group:]

    group = module.n_heads // module.n_kv_heads
    others = [q.clone(), k.clone()]
    for t, n in zip(others, (group, 1), strict=True):
        t[:, :n] += torch.randn_like(t[:, :n])
    was, now = maps(q, k), maps(*others)
    both = ~(was.isnan() | now.isnan())
    assert both.any()
    torch.testing.assert_close(now[both], was[both], atol=1e-12, rtol=1e-10)


@each_form
def test_gradients_reach_the_input_and_every_parameter(one: Mechanism, place: Place, variant: str | None) -> None:
    module, inputs = _made(one, place, variant)
    module.train()
    inputs["x"].requires_grad_()
    loss = module(**inputs).square().mean()
    extra = getattr(module, "extra_loss", None)
    (loss if extra is None else loss + extra).backward()
    missing = [name for name, parameter in module.named_parameters() if parameter.grad is None]
    assert not missing
    gradients = [inputs["x"].grad, *(parameter.grad for parameter in module.parameters())]
    assert all(bool(gradient.isfinite().all()) for gradient in gradients if gradient is not None)
    assert bool(inputs["x"].grad.any())  # type: ignore[union-attr]
    if isinstance(module, Mixer):
        module.eval()
        module(**inputs)
        assert module.extra_loss is None


@each_room
@torch.no_grad()
def test_every_statistic_is_that_of_the_definition(one: Mechanism, place: Place) -> None:
    module, inputs = _made(one, place)
    with workbench.attach(module) as wb, wb.capture(STATISTICS) as cap:
        module(**inputs)
    for site in cap.sites:
        held, pattern = cap[site.name], cap[site.name].pattern
        names = [name for name in STATISTICS if site.has(name)]
        assert set(held.statistics) == set(names)
        want = defined(
            pattern.dense(), names, pattern.mask, options=Options(), by_magnitude=pattern.by_magnitude
        )  # fmt: skip
        for name in names:
            torch.testing.assert_close(
                held.statistics[name].double(), want[name], atol=1e-6, rtol=1e-6, equal_nan=True,
                msg=lambda said, name=name: f"{name}: {said}",
            )  # fmt: skip


@each_room
@torch.no_grad()
def test_captures_and_modules_come_back_from_files(one: Mechanism, place: Place, tmp_path: Path) -> None:
    module, inputs = _made(one, place)
    with workbench.attach(module) as wb, wb.capture(["entropy"]) as cap:
        y = module(**inputs)
    again = workbench.load_capture(cap.save(tmp_path / "room.safetensors", pattern=True))
    for site in cap.sites:
        was, found = cap[site.name].patterns, again[site.name].patterns
        assert set(was) == set(found)
        for name, pattern in was.items():
            torch.testing.assert_close(found[name].dense(), pattern.dense(), atol=1e-12, rtol=1e-12)
            assert (found[name].grade, found[name].normalised) == (pattern.grade, pattern.normalised)
        for name, statistic in cap[site.name].statistics.items():
            torch.testing.assert_close(again[site.name].statistics[name], statistic, equal_nan=True)
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    other = one.build(place).double().eval()
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(other(**inputs), y)


@pytest.mark.filterwarnings("ignore:the sweep runs whole forwards")  # there is one block
@each_room
@torch.no_grad()
def test_heads_are_ablated_patched_and_swept(one: Mechanism, place: Place) -> None:
    module, inputs = _made(one, place)
    with workbench.attach(module) as wb:
        site = wb.sites[0].name
        with wb.capture(z=True) as cap:
            whole = module(**inputs)
        z = cap[site].z  # [batch, query, head, width]
        with wb.patch({(site, 0): z[:, :, 0]}):
            torch.testing.assert_close(module(**inputs), whole, atol=1e-10, rtol=1e-10)
        with wb.ablate((site, 0)), wb.capture(z=True) as without:
            ablated = module(**inputs)
        assert not without[site].z[:, :, 0].any()
        assert torch.equal(without[site].z[:, :, 1:], z[:, :, 1:])
        with wb.patch({(site, 0): torch.zeros_like(z[:, :, 0])}):
            torch.testing.assert_close(module(**inputs), ablated, atol=1e-10, rtol=1e-10)
        with wb.edit_pattern((site, 0), lambda rows, site, head: rows):
            torch.testing.assert_close(module(**inputs), whole, atol=1e-6, rtol=1e-6)
        variants = [workbench.Variant((site, head)) for head in range(z.shape[2])]
        found = workbench.run_sweep(wb, variants, [inputs], lambda y, batch: y.mean((1, 2)), progress=False)
        torch.testing.assert_close(found.values[0, 0], ablated.mean((1, 2)).double(), atol=1e-6, rtol=1e-6)
    assert not torch.allclose(ablated, whole) or not z[:, :, 0].any()


@each_gate
@torch.no_grad()
def test_gates_are_factors_that_can_be_set(one: Mechanism, place: Place, variant: str | None) -> None:
    module, inputs = _made(one, place, variant)
    with workbench.attach(module) as wb:
        with wb.capture(z=True, values=True) as cap:
            whole = module(**inputs)
        for site in cap.sites:
            held, g, u = cap[site.name], cap[site.name].pattern.gates, cap[site.name].pattern.values
            assert torch.equal(held.pattern.dense(), torch.diag_embed(g))
            assert torch.equal(held.row_sum, g)
            torch.testing.assert_close(held.z.transpose(1, 2), g[..., None] * u, atol=1e-12, rtol=1e-12)
            with wb.set_gate(site, to=lambda g, site, head: g):
                torch.testing.assert_close(module(**inputs), whole, atol=1e-10, rtol=1e-10)
            mean = g.mean((0, 2))[None, :, None, None]
            for to, factor in ((1.0, 1.0), (cap, mean), (torch.full((1,), -2.0).double(), -2.0)):
                with wb.set_gate(site.name, to=to), wb.capture(z=True) as without:
                    module(**inputs)
                torch.testing.assert_close(without[site.name].z.transpose(1, 2), factor * u, atol=1e-10, rtol=1e-10)
            with wb.set_gate(site, to=0.0):
                closed = module(**inputs)
            with wb.ablate([(site.name, head) for head in range(g.shape[1])]):
                torch.testing.assert_close(module(**inputs), closed, atol=1e-12, rtol=1e-12)


@each_room
def test_with_its_factor_held_a_gate_moves_nothing_from_token_to_token(one: Mechanism, place: Place) -> None:
    if one.card.kind != "gate" or one.card.beside:
        pytest.skip("it is no gate, or mixes tokens beside it")
    module, inputs = _made(one, place)
    x = inputs["x"].requires_grad_()
    with workbench.attach(module) as wb, contextlib.ExitStack() as held:
        with torch.no_grad(), wb.capture():
            module(**inputs)
        for site in wb.sites:
            held.enter_context(wb.set_gate(site, to=lambda g, site, head: g.detach()))
        y = module(**inputs)
        reached = torch.stack([
            torch.autograd.grad(y[:, i].square().sum(), x, retain_graph=True)[0].abs().sum((0, 2)) > 0
            for i in range(place.length)
        ])  # fmt: skip
    assert torch.equal(reached, torch.eye(place.length, dtype=torch.bool))


@each_room
@torch.no_grad()
def test_every_call_is_verified_and_factors_stand_beside_the_map(one: Mechanism, place: Place) -> None:
    module, inputs = _made(one, place)
    with workbench.attach(module) as wb:
        report = wb.verify(**inputs)
        assert report.ok, report.table
        assert bool(wb.sites.unread) == bool(one.card.beside), wb.sites
        with wb.capture([]) as cap:
            module(**inputs)
    for site in cap.sites:
        pattern, beside = cap[site.name].pattern, cap[site.name].patterns
        assert set(pattern.factors) <= set(beside)
        assert set(beside) - {"source"} == {"pattern", *pattern.factors}
        assert "source" not in beside or site.kind == "gate"


@each_form
@torch.no_grad()
def test_a_signature_is_maps_of_one_shape_for_each_head(one: Mechanism, place: Place, variant: str | None) -> None:
    signatures = [each for each in (one.signature, one.also) if each is not None]
    if not signatures:
        pytest.skip("it has none")
    module, inputs = _made(one, place, variant)
    with workbench.attach(module) as wb, wb.capture([]) as cap:
        module(**inputs)
    for site, each in itertools.product(cap.sites, signatures):
        found = each.of(module, cap[site.name].pattern)
        shapes = {tuple(t.shape) for t in found.values()}
        assert len(shapes) <= 1
        assert all(shape[0] == cap[site.name].shape[1] for shape in shapes)
        assert all(bool(t.isfinite().any()) for t in found.values())


@each_room
def test_places_and_inputs_that_it_cannot_take_are_named(one: Mechanism, place: Place) -> None:
    with pytest.raises(WorkbenchError, match="5 heads do not divide d_model=24"):
        Place(24, 5, 8)
    if one.card.grid:
        with pytest.raises(WorkbenchError, match="patches of an image"):
            one.build(Place(24, 4, 9, causal=False))
    elif one.card.causal == "never":
        with pytest.raises(WorkbenchError, match="cannot be causal"):
            one.build(Place(24, 4, 9))
    if one.card.causal == "always":
        with pytest.raises(WorkbenchError, match="is causal, and has no other form"):
            one.build(Place(24, 4, 9, causal=False))
    with pytest.raises(WorkbenchError, match='no variant "nothing"'):
        one.build(place, "nothing")
    module = one.build(place)
    if isinstance(module, Mixer):
        assert module(torch.zeros(0, place.length, place.d_model)).shape == (0, place.length, place.d_model)
    if isinstance(module, Mixer) or one.card.kind == "gate":
        for shape in (
            (2, place.length + 1, place.d_model),
            (2, place.length, place.d_model + 1),
            (2, 0, place.d_model),
        ):
            with pytest.raises(WorkbenchError, match=rf"tokens, {place.d_model}\]") as caught:
                module(torch.zeros(shape))
            assert caught.value.shape == shape


@each_room
def test_the_card_says_what_it_has_to(one: Mechanism, place: Place) -> None:
    card = one.card
    assert all((card.title, card.equation, card.map, card.cost, card.code, card.claims))
    lead, _, number = card.arxiv.partition(".")
    assert (lead + number).isdigit()
    assert (len(lead), len(number)) == (4, 5)
    assert str(card) in repr(one)
    for claim in card.claims:
        assert claim.says.endswith(".")
        assert claim.outcome == "not examined" or "at our scale" in str(claim)
    assert one.name in repr(ALL)
