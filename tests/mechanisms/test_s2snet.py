"""S2SNet: what it can know of a crystal and what not, its reader, and crystals whose twins differ by place alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import workbench
from workbench import WorkbenchError
from workbench.mechanisms import Place
from workbench.mechanisms.s2snet import S2SNet, SetReader, atom_gradients, crystals, element_pairs, follows_rule, masked

PLACE = Place(16, 2, 13, causal=False)


def _model(**options: Any) -> S2SNet:
    torch.manual_seed(0)
    return S2SNet(PLACE, **options).double().eval()


def _crystals(n: int = 4) -> tuple[Tensor, Tensor]:
    found = crystals(n, seed=1)
    return found.numbers, found.positions.double()


def _maps(model: S2SNet, *given: Tensor) -> tuple[Tensor, list[Tensor]]:
    with workbench.attach(model) as wb, torch.no_grad(), wb.capture([]) as cap:
        y = model(*given)
    return y, [cap[site.name].pattern.dense() for site in cap.sites]


def test_twins_have_the_same_atoms_and_different_labels() -> None:
    found = crystals(40, seed=3)
    assert found.labels.tolist() == [1, 0] * 20
    assert torch.equal(found.labels.bool(), follows_rule(found.numbers, found.positions))
    assert torch.equal(found.numbers[::2].sort(1).values, found.numbers[1::2].sort(1).values)
    assert bool(((found.numbers == 29).sum(1) >= 2).all())
    far = found.positions.clone()
    far[found.numbers == 29] *= 30  # the rule is about place
    assert not follows_rule(found.numbers, far).any()
    assert not follows_rule(found.numbers.masked_fill(found.numbers == 29, 26), found.positions).any()
    assert torch.equal(crystals(40, seed=3).positions, found.positions)
    assert not torch.equal(crystals(40, seed=4).positions, found.positions)


@torch.no_grad()
def test_atoms_have_no_order_and_space_no_direction() -> None:
    model, (numbers, positions) = _model(), _crystals()
    y, maps = _maps(model, numbers, positions)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    moved, turned = _maps(model, numbers[:, order], positions[:, order])
    torch.testing.assert_close(moved, y)
    for was, now in zip(maps[:2], turned[:2], strict=True):
        torch.testing.assert_close(now, was[:, :, order][..., order])
    q, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    again, same = _maps(model, numbers, positions @ q.T + 5)
    torch.testing.assert_close(again, y)
    for was, now in zip(maps, same, strict=True):
        torch.testing.assert_close(now, was)


@torch.no_grad()
def test_what_lies_on_the_same_spheres_is_one_crystal_to_it_and_a_larger_cell_is_not() -> None:
    model = _model()
    numbers = torch.tensor([[29, 29, 8, 8]])
    directions = torch.eye(3, dtype=torch.float64)[:2]
    positions = torch.stack([directions[0], -directions[0], 2 * directions[0], -2 * directions[0]])[None]
    other = torch.stack([directions[0], -directions[0], 2 * directions[1], -2 * directions[1]])[None]
    assert not torch.allclose(torch.cdist(positions, positions), torch.cdist(other, other))
    torch.testing.assert_close(model(numbers, positions), model(numbers, other))
    twice = torch.cat((numbers, numbers), dim=1), torch.cat((positions, positions + 6), dim=1)
    assert not torch.allclose(model(*twice), model(numbers, positions))


def test_of_far_atoms_nothing_is_known_but_what_they_are() -> None:
    near, last, far = (S2SNet.shells(torch.tensor([r])) for r in (1.0, 5.11, 6.5))
    assert (float(near.max()), int(near.argmax())) == (1.0, 100)  # shells are 0.01 apart
    assert float(last.max()) == pytest.approx(1)
    assert float(far.max()) < 1e-3
    torch.testing.assert_close(near[0, 150], torch.tensor(-((1.0 - 1.5) ** 2) / 0.25).exp())


@torch.no_grad()
def test_padding_changes_nothing_and_a_single_atom_sees_itself() -> None:
    model, (numbers, positions) = _model(), _crystals()
    y, maps = _maps(model, numbers, positions)
    wider = torch.nn.functional.pad(numbers, (0, 5)), torch.nn.functional.pad(positions, (0, 0, 0, 5), value=3.0)
    padded, wide = _maps(model, *wider)
    torch.testing.assert_close(padded, y)
    for was, now in zip(maps, wide, strict=True):
        assert not now[..., 8:].any()
        torch.testing.assert_close(now[:, :, : was.shape[2], :8], was)
    _, alone = _maps(model, torch.tensor([[8]]), torch.ones(1, 1, 3, dtype=torch.float64))
    assert all(bool((each == 1).all()) for each in alone)


@torch.no_grad()
def test_equal_atoms_at_equal_distance_are_seen_and_see_alike() -> None:
    numbers = torch.tensor([[29, 29, 8]])
    positions = torch.tensor([[[1.0, 0, 0], [-1.0, 0, 0], [0, 0, 0]]], dtype=torch.float64)
    _, maps = _maps(_model(), numbers, positions)
    for each in maps[:2]:
        torch.testing.assert_close(each[:, :, 0], each[:, :, 1])
        torch.testing.assert_close(each[..., 0], each[..., 1])


def test_the_reader_s_turns_are_a_map_and_begin_evenly_where_atoms_are_equal() -> None:
    torch.manual_seed(0)
    model, (numbers, positions) = _model(turns=3), _crystals()
    with workbench.attach(model) as wb:
        report = wb.verify(numbers, positions)
        assert report.ok, report.table
        assert [(site.kind, site.n_heads) for site in wb.sites] == [("self", 2), ("self", 2), ("cross", 1)]
        with torch.no_grad(), wb.capture(["entropy"], z=True, values=True) as cap:
            bare = model(numbers, positions)
            read = cap[2].pattern
            assert read.shape == (4, 1, 3, 8)
        with torch.no_grad(), wb.ablate((wb.sites[2], 0)):
            assert not torch.allclose(model(numbers, positions), bare)
    torch.testing.assert_close(read.apply(read.values), cap[2].z.transpose(1, 2))
    assert not read.dense()[:, 0][:, :, :][(numbers == 0)[:, None].expand(-1, 3, -1)].any()
    alike = SetReader(4, turns=1)
    weights, _ = alike.ask(torch.ones(1, 5, 4), torch.ones(1, 5, dtype=torch.bool))
    torch.testing.assert_close(weights, torch.full((1, 1, 5), 0.2))


def test_gradients_by_atom_and_weights_by_element() -> None:
    model, (numbers, positions) = _model(), _crystals()
    found = atom_gradients(model, numbers, positions)
    torch.testing.assert_close(found.sum(1), torch.ones(4, dtype=torch.float64))
    assert not found[numbers == 0].any()
    atoms = model.atoms(numbers, positions).detach()
    real = numbers > 0
    step = torch.zeros_like(atoms)
    step[1, 2, 3] = 1e-6
    give = lambda x: model.head(model.read(model.encoded(x, real), real))[1, 1]  # noqa: E731
    with torch.no_grad():
        slope = (give(atoms + step) - give(atoms - step)) / 2e-6
    live = atoms.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(give(live), live)
    torch.testing.assert_close(gradient[1, 2, 3], slope, atol=1e-8, rtol=1e-5)
    size = gradient[1].abs().sum(-1) * real[1]
    torch.testing.assert_close(found[1], size / size.sum())
    with workbench.attach(model) as wb, torch.no_grad(), wb.capture([]) as cap:
        model(numbers, positions)
    table = element_pairs(cap[0].pattern, numbers)
    dense = cap[0].pattern.dense().mean(1)
    copper, oxygen = numbers == 29, numbers == 8
    pairs = copper[:, :, None] & oxygen[:, None]
    assert table.loc[29, 8] == pytest.approx(float(dense[pairs].mean()))
    with pytest.raises(WorkbenchError, match="the map is"):
        element_pairs(cap[0].pattern, numbers[:, :5])


def test_hidden_atoms_are_filled_in_and_every_parameter_learns() -> None:
    model, (numbers, positions) = _model(), _crystals()
    given, hidden = masked(numbers, 0.3)
    assert bool(hidden.any(1).all())
    assert not hidden[numbers == 0].any()
    assert bool((given[hidden] == 95).all())
    assert torch.equal(given[~hidden], numbers[~hidden])
    logits = model.filled(given, positions)
    loss = torch.nn.functional.cross_entropy(logits[hidden], numbers[hidden])
    (loss + model(numbers, positions).square().sum()).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters() if p.dim() > 1)


def test_bad_input_is_named() -> None:
    model, (numbers, positions) = _model(), _crystals()
    with pytest.raises(WorkbenchError, match="96 is no atomic number"):
        model(numbers.masked_fill(numbers == 29, 96), positions)
    with pytest.raises(WorkbenchError, match="a crystal has no atoms"):
        model(torch.zeros_like(numbers), positions)
    with pytest.raises(WorkbenchError, match=r"positions \[crystal, atom, 3\]"):
        model(numbers, positions[..., :2])
    with pytest.raises(WorkbenchError, match="no pairs of twins"):
        crystals(3)
    with pytest.raises(WorkbenchError, match="most=4"):
        crystals(2, most=4)
    with pytest.raises(WorkbenchError, match="share=0"):
        masked(numbers, 0)
    with pytest.raises(WorkbenchError, match=r"real must be \[2, 3\]"):
        model.blocks[0].attention(torch.zeros(2, 3, 16).double(), torch.ones(2, 4))
