"""Interventions are what they say: each equals the same change made by hand in a twin model, gradients included."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import workbench
from support.by_hand import ByHand, by_hand, gradients
from support.tiny import FAMILIES, make
from workbench.session.resampling import choose_donors, contents_of
from workbench.session.workbench import Workbench

BY_NAME = {family.name: family for family in FAMILIES}
CASES = [("gpt2", "blocks.1.attn", [0, 3]), ("llama-gqa", "blocks.0.attn", [1, 4]), ("t5", "decoder.1.cross_attn", [2])]


@dataclass
class Case:
    """A model on SDPA in float64, its twin, and the heads to change."""

    wb: Workbench
    twin: ByHand
    inputs: dict[str, Any]
    site: str
    heads: list[int]

    def assert_equal_by_hand(self) -> None:
        """Inside an intervention: logits and gradients are the twin's, and not those of the bare model."""
        got, got_gradients = gradients(self.wb.model, self.inputs)
        want, want_gradients = gradients(self.twin.model, self.inputs)
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)
        assert got_gradients.keys() == want_gradients.keys()
        for name, gradient in want_gradients.items():
            torch.testing.assert_close(got_gradients[name], gradient, atol=1e-9, rtol=1e-9, msg=name)
        with self.wb.undisturbed(), torch.no_grad():
            assert (self.wb.model(**self.inputs).logits - got).abs().max() > 1e-3

    def change_heads(self, new: Callable[[Tensor, int], Tensor], where: Tensor | slice = slice(None)) -> None:
        """In the twin, head h gives new(z, h) at the chosen positions of z [batch, position, d_head]."""

        def change(z: Tensor) -> Tensor:
            parts = list(z.unbind(1))
            for head in self.heads:
                changed = new(parts[head], head).expand_as(parts[head])
                if isinstance(where, slice):
                    chosen = torch.zeros(z.shape[2], dtype=torch.bool)
                    chosen[where] = True
                else:
                    chosen = where
                parts[head] = torch.where(chosen[..., None], changed, parts[head])
            return torch.stack(parts, 1)

        self.twin.heads[self.site] = change


@pytest.fixture(params=CASES, ids=lambda case: case[0])
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    name, alias, heads = request.param
    model = make(BY_NAME[name]).double()
    with workbench.attach(model) as wb, by_hand(model) as twin:
        yield Case(wb, twin, BY_NAME[name].inputs(), wb.sites[alias].name, heads)


def references(case: Case) -> list[dict[str, Any]]:
    """Two batches for the case's model, of 3 examples of 17 positions and 2 of 19, each with padding."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for batch, length in ((3, 17), (2, 19)):
        ids = torch.randint(3, 60, (batch, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, -3:] = 0
        if "decoder_input_ids" in case.inputs:
            found.append({"input_ids": ids, "decoder_input_ids": ids.flip(1), "decoder_attention_mask": mask})
        else:
            found.append({"input_ids": ids, "attention_mask": mask})
    return found


def examples_by_hand(case: Case) -> list[tuple[Tensor, Tensor]]:
    """(z [head, position, d_head], mask [position]) of each reference example, from the twin."""
    found = []
    for batch in references(case):
        with torch.no_grad():
            case.twin.model(**batch)
        mask = batch.get("decoder_attention_mask", batch.get("attention_mask"))
        found += list(zip(case.twin.seen[case.site], mask.bool(), strict=True))
    return found


def test_zero(case: Case) -> None:
    case.change_heads(lambda z, head: torch.zeros_like(z))
    with case.wb.ablate([(case.site, head) for head in case.heads]):
        case.assert_equal_by_hand()


def test_mean(case: Case) -> None:
    examples = examples_by_hand(case)
    case.change_heads(lambda z, head: torch.cat([e[head][real] for e, real in examples]).mean(0))
    with case.wb.ablate([(case.site, head) for head in case.heads], "mean", reference=references(case)):
        case.assert_equal_by_hand()


def real_inputs(case: Case) -> Tensor:
    """[batch, position] bool: where the inputs of the site are no padding."""
    decodes = "decoder_input_ids" in case.inputs
    ids = case.inputs["decoder_input_ids" if decodes else "input_ids"]
    mask = case.inputs.get("decoder_attention_mask" if decodes else "attention_mask")
    return torch.ones_like(ids).bool() if mask is None else mask.bool()


def test_mean_positional(case: Case) -> None:
    examples = examples_by_hand(case)
    ranks = (real_inputs(case).cumsum(1) - 1).clamp_min(0)

    def mean(z: Tensor, head: int) -> Tensor:
        by_rank = [torch.stack([e[head][real][i] for e, real in examples if real.sum() > i]).mean(0)
                   for i in range(int(ranks.max()) + 1)]  # fmt: skip
        return torch.stack(by_rank)[ranks]

    case.change_heads(mean)
    heads = [(case.site, head) for head in case.heads]
    with case.wb.ablate(heads, "mean_positional", reference=iter(references(case))):
        case.assert_equal_by_hand()


@pytest.mark.parametrize("draw", [0, 2])
def test_resample(case: Case, draw: int) -> None:
    """Real position p of n takes that of ⌊p (m − 1) / (n − 1) + ½⌋ among the donor's m."""
    examples, pool = examples_by_hand(case), [one for batch in references(case) for one in contents_of(batch)]
    donors = choose_donors(contents_of(case.inputs), pool, seed=3)

    def taken(z: Tensor, head: int) -> Tensor:
        new = torch.zeros_like(z)
        for i, real in enumerate(real_inputs(case)):
            given, n = examples[donors[i][draw]][0][head][examples[donors[i][draw]][1]], int(real.sum())
            places = [math.floor(p * (len(given) - 1) / (n - 1) + 0.5) for p in range(n)]
            new[i, real] = given[places]
        return new

    case.change_heads(taken)
    heads = [(case.site, head) for head in case.heads]
    with case.wb.ablate(heads, "resample", reference=references(case), seed=3, draw=draw):
        case.assert_equal_by_hand()


def test_only_some_positions(case: Case) -> None:
    length = case.inputs.get("decoder_input_ids", case.inputs["input_ids"]).shape[1]
    each = torch.zeros(2, length, dtype=torch.bool)
    each[0, 2], each[1, -1] = True, True
    last = torch.zeros(length, dtype=torch.bool)
    last[-1] = True
    heads = [(case.site, head) for head in case.heads]
    for given, where in [
        (each, each),
        (torch.tensor([[2], [-1]]), each),
        (-1, last),
        ([length - 1], last),
        (slice(1, 4), slice(1, 4)),
        (torch.tensor([1, 3, 2]), slice(1, 4)),
    ]:
        case.change_heads(lambda z, head: torch.zeros_like(z), where)
        with case.wb.ablate(heads, positions=given):
            case.assert_equal_by_hand()


def test_patch_with_tensors(case: Case) -> None:
    clean = {name: ids.roll(1, 0) if "ids" in name else ids for name, ids in case.inputs.items()}
    with torch.no_grad(), case.wb.capture(z=True) as capture:
        case.wb.model(**clean)
    z = capture[case.site].z
    case.change_heads(lambda old, head: z[:, :, head], slice(-1, None))
    with case.wb.patch({(case.site, head): z[:, :, head] for head in case.heads}, positions=-1):
        case.assert_equal_by_hand()


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_patch_with_what_broadcasts(case: Case, axes: int) -> None:
    length = case.inputs.get("decoder_input_ids", case.inputs["input_ids"]).shape[1]
    width = case.wb.sites[case.site].d_head
    given = torch.randn(*(2, length, width)[3 - axes :], dtype=torch.float64)
    case.change_heads(lambda old, head: given)
    with case.wb.patch({(case.site, head): given for head in case.heads}):
        case.assert_equal_by_hand()


def test_patch_with_functions(case: Case) -> None:
    asked = []

    def half(z: Tensor, site: workbench.hooks.sites.Site, head: int) -> Tensor:
        asked.append((site, head))
        z[:, 0] = 7.0  # its own copy
        return z / 2

    def half_by_hand(old: Tensor, head: int) -> Tensor:
        return torch.cat((torch.full_like(old[:, :1], 7.0), old[:, 1:]), 1) / 2

    case.change_heads(half_by_hand)
    with case.wb.patch({(case.site, head): half for head in case.heads}):
        case.assert_equal_by_hand()
    assert asked == [(case.wb.sites[case.site], head) for head in case.heads]


def mixed(rows: Tensor) -> Tensor:
    """Half the rows as they are, half of them moved on by a key, and a bit more."""
    return rows / 2 + rows.roll(1, -1).square() + 0.01


@pytest.mark.parametrize("queries", [None, -1, [5, 1], slice(2, 7, 2)], ids=str)
def test_edit_pattern(case: Case, queries: Any) -> None:
    def change(weights: Tensor) -> Tensor:
        chosen = torch.zeros(weights.shape[:3], dtype=torch.bool)
        chosen[:, case.heads] = True
        if queries is not None:
            rows = torch.zeros(weights.shape[2], dtype=torch.bool)
            rows[queries] = True
            chosen &= rows
        return torch.where(chosen[..., None], mixed(weights), weights)

    case.twin.weights[case.site] = change
    asked = []

    def edit(rows: Tensor, site: workbench.hooks.sites.Site, head: int) -> Tensor:
        asked.append((site, head, rows.shape[1]))
        return mixed(rows)

    with case.wb.edit_pattern([(case.site, head) for head in case.heads], edit, queries):
        case.assert_equal_by_hand()
    length = case.inputs.get("decoder_input_ids", case.inputs["input_ids"]).shape[1]
    n = length if queries is None else len(torch.arange(length)[queries].reshape(-1))
    assert asked == [(case.wb.sites[case.site], head, n) for head in case.heads]


@pytest.mark.parametrize("queries", [torch.tensor([[5], [1]]), "mask"], ids=["index", "mask"])
def test_edit_pattern_of_other_rows_in_each_example(case: Case, queries: Any) -> None:
    length = case.inputs.get("decoder_input_ids", case.inputs["input_ids"]).shape[1]
    mask = torch.zeros(2, length, dtype=torch.bool)
    mask[0, 5] = mask[1, 1] = True

    def change(weights: Tensor) -> Tensor:
        chosen = torch.zeros(weights.shape[:3], dtype=torch.bool)
        chosen[:, case.heads] = mask[:, None]
        return torch.where(chosen[..., None], mixed(weights), weights)

    case.twin.weights[case.site] = change
    given = mask if isinstance(queries, str) else queries
    with case.wb.edit_pattern([(case.site, h) for h in case.heads], lambda rows, site, head: mixed(rows), given):
        case.assert_equal_by_hand()


def test_pattern_edits_compose(case: Case) -> None:
    """The inner edit is given the rows that the outer one made, where both touch them."""

    def change(weights: Tensor) -> Tensor:
        new = weights.clone()
        for head in case.heads:
            new[:, head, 2:6] = mixed(new[:, head, 2:6])
            new[:, head, [1, 3]] = new[:, head, [1, 3]] ** 2
        return new

    case.twin.weights[case.site] = change
    heads = [(case.site, head) for head in case.heads]
    with (
        case.wb.edit_pattern(heads, lambda rows, site, head: mixed(rows), slice(2, 6)),
        case.wb.edit_pattern(heads, lambda rows, site, head: rows**2, [3, 1]),
    ):
        case.assert_equal_by_hand()


def test_steering_heads(case: Case) -> None:
    direction = torch.randn(case.wb.sites[case.site].d_head, dtype=torch.float64)
    case.change_heads(lambda z, head: z - 1.5 * direction, slice(3, None))
    with case.wb.steer([(case.site, h) for h in case.heads], direction, scale=-1.5, positions=slice(3, None)):
        case.assert_equal_by_hand()


@pytest.mark.parametrize("positions", [None, 2])
def test_steering_modules(case: Case, positions: int | None) -> None:
    """A site, a path, and the residual stream, against plain hooks on the twin."""
    site = case.site
    block = {"gpt2": "transformer.h.1", "llama": "model.layers.1", "t5": "decoder.block.1"}
    path = block[case.wb.model.config.model_type]
    direction = torch.randn(case.wb.model.get_parameter(next(iter(case.wb.model.state_dict()))).shape[-1]).double()

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        move = torch.zeros_like(hidden)
        move[:, slice(None) if positions is None else positions] = 2 * direction
        return (hidden + move, *output[1:]) if isinstance(output, tuple) else hidden + move

    places: list[tuple[Any, str]] = [(site, site), (case.wb.sites[site], site), (path, path)]
    if case.wb.model.config.model_type != "t5":
        places += [(("resid", 1), path), (case.wb.sites[site].alias, site)]
    for where, name in places:
        handle = case.twin.model.get_submodule(name).register_forward_hook(hook)
        with case.wb.steer(where, direction, scale=2.0, positions=positions):
            case.assert_equal_by_hand()
        handle.remove()


def test_gradients_reach_directions_and_patches(case: Case) -> None:
    width = case.wb.sites[case.site].d_head
    direction = torch.randn(width, dtype=torch.float64, requires_grad=True)
    patch = torch.randn(width, dtype=torch.float64, requires_grad=True)
    head = (case.site, case.heads[0])
    for given, intervention in ((direction, case.wb.steer(head, direction)), (patch, case.wb.patch({head: patch}))):
        with intervention:
            case.wb.model(**case.inputs).logits.square().sum().backward()
        assert given.grad is not None
        assert given.grad.abs().min() > 0


def test_interventions_of_several_kinds_compose_in_the_order_they_were_entered(case: Case) -> None:
    width = case.wb.sites[case.site].d_head
    direction = torch.ones(width, dtype=torch.float64)
    heads = [(case.site, head) for head in case.heads]
    with case.wb.ablate(heads), case.wb.steer(heads, direction):
        case.change_heads(lambda z, head: torch.ones_like(z))
        case.assert_equal_by_hand()
        with case.wb.patch({head: lambda z, site, head: 3 * z for head in heads}):
            case.change_heads(lambda z, head: 3 * torch.ones_like(z))
            case.assert_equal_by_hand()
    with case.wb.steer(heads, direction), case.wb.ablate(heads):
        case.change_heads(lambda z, head: torch.zeros_like(z))
        case.assert_equal_by_hand()


@torch.no_grad()
def test_what_is_not_edited_stays_the_same_to_the_bit(case: Case) -> None:
    wb, heads = case.wb, [(case.site, head) for head in case.heads]
    with wb.capture(z=True) as plain:
        wb.model(**case.inputs)
    direction = torch.ones(wb.sites[case.site].d_head, dtype=torch.float64)
    edits = [
        lambda: wb.ablate(heads, positions=[1, -1]),
        lambda: wb.patch(dict.fromkeys(heads, direction), positions=[1, -1]),
        lambda: wb.steer(heads, direction, positions=[1, -1]),
        lambda: wb.edit_pattern(heads, lambda rows, site, head: mixed(rows), [1, -1]),
    ]
    for edit in edits:
        with edit(), wb.capture(z=True) as edited:
            wb.model(**case.inputs)
        before, after = plain[case.site].z, edited[case.site].z
        same = torch.ones(before.shape[1:3], dtype=torch.bool)
        for row in (1, -1):
            same[row, case.heads] = False
        assert torch.equal(before[:, same], after[:, same])
        assert not torch.isclose(before[:, ~same], after[:, ~same]).all(-1).any()
        for site in plain.sites:  # sites are in the order of the modules: what comes before is untouched
            if site.name == case.site:
                break
            assert torch.equal(plain[site.name].z, edited[site.name].z)
