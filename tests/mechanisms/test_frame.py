"""The list of mechanisms, their places, and cards that cannot say more than was found."""

from typing import Any

import pytest
import torch
from torch import nn

import workbench
from workbench import WorkbenchError, mechanisms
from workbench.mechanisms import Card, Claim, Mechanism, Place, Signature
from workbench.mechanisms.deconstructed import laid_out
from workbench.mechanisms.frame import by_blocks, catalogue, named
from workbench.mechanisms.moh import MixtureOfHeads
from workbench.mechanisms.reduced import chain


def test_the_list_is_a_table_and_finds_by_name() -> None:
    all_of_them = mechanisms.list()
    assert len(all_of_them) == len(all_of_them.table) == len(set(all_of_them.names))
    assert all_of_them.names == sorted(all_of_them.names)
    assert all_of_them["agent"] is mechanisms.get("agent") is all_of_them[all_of_them.names.index("agent")]
    assert all_of_them[:2].names == all_of_them.names[:2]
    assert "Agent Attention" in repr(all_of_them)
    assert "<td>Agent Attention</td>" in all_of_them._repr_html_()
    with pytest.raises(WorkbenchError, match='no mechanism "agents"') as caught:
        mechanisms.get("agents")
    assert "agent" in str(caught.value.hint)


def test_a_name_is_a_mechanism_s_with_its_variant_or_is_refused() -> None:
    assert named("moh") == (mechanisms.get("moh"), None)
    assert named("sqa:mha") == (mechanisms.get("sqa"), "mha")
    for wrong, says in (
        ("moh:", 'no variant ""'),
        ("moh:haf", 'no variant "haf"'),
        ("agents:few", 'no mechanism "agents"'),
        (3, 'no mechanism "3"'),  # not the third of the list
        (None, 'no mechanism "None"'),
    ):
        with pytest.raises(WorkbenchError, match=says):
            named(wrong)  # type: ignore[arg-type]
        with pytest.raises(WorkbenchError, match=says):
            mechanisms.room(wrong)  # type: ignore[arg-type]
    with pytest.raises(WorkbenchError, match='no mechanism "moh:half"') as caught:
        mechanisms.get("moh:half")
    assert 'get("moh").build(place, variant)' in str(caught.value.hint)


def test_a_claim_has_an_outcome_with_its_figure_or_none() -> None:
    assert str(Claim("It is small.")) == "It is small. Not examined yet."
    done = Claim("It is small.", "parameters, a script", "10 % fewer (95 %: 9 to 11 %)", "holds")
    assert str(done) == "It is small. Holds at our scale: 10 % fewer (95 %: 9 to 11 %) (parameters, a script)."
    for wrong in (
        ("a script", "", "holds"),
        ("", "12", "holds"),
        ("a script", "12", "not examined"),
        ("", "", "holds"),
    ):
        with pytest.raises(WorkbenchError, match="a claim whose outcome is"):
            Claim("It is small.", *wrong)  # type: ignore[arg-type]


def test_a_place_that_cannot_be_is_refused_by_name() -> None:
    with pytest.raises(WorkbenchError, match="16 tokens are no grid of 3 × 5"):
        Place(24, 4, 16, causal=False, grid=(3, 5))
    with pytest.raises(WorkbenchError, match="no order of its tokens: causal=True"):
        Place(24, 4, 15, grid=(3, 5))
    with pytest.raises(WorkbenchError, match="width 3 cannot be turned"):
        Place(12, 4, 16, rotary=True)
    with pytest.raises(WorkbenchError, match="length=0"):
        Place(12, 4, 0)


class _Mean(nn.Module):
    def __init__(self, place: Place) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(1, keepdim=True).expand_as(x)


def test_a_mechanism_of_ones_own_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    mechanisms.list()
    monkeypatch.setattr(catalogue, "_MECHANISMS", dict(catalogue._MECHANISMS))
    card = Card(
        "Mean", "2601.00001", "A = 1/n", "All alike.", "self", "exact", "O(n)", "never", "None.", (Claim("It mixes."),)
    )
    own = mechanisms.register(Mechanism("mean", card, _Mean))
    assert mechanisms.get("mean") is own
    assert mechanisms.register(own) is own
    with pytest.raises(WorkbenchError, match='a mechanism "mean" already'):
        mechanisms.register(Mechanism("mean", card, nn.Identity))
    with pytest.raises(WorkbenchError, match="cannot be causal"):
        own.build(Place(8, 2, 5))
    page = card._repr_html_()
    assert "<caption>Mean</caption>" in page
    assert "Not examined yet." in page


def test_a_cell_of_a_notebook_runs_again_and_takes_no_room_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    mechanisms.list()
    for kept in ("_MECHANISMS", "_HOMES"):
        monkeypatch.setattr(catalogue, kept, dict(getattr(catalogue, kept)))
    cell = """
from torch import nn
from workbench import mechanisms
class Mine(nn.Module):
    def __init__(self, place, {option}: int = 1):
        super().__init__()
claims = (mechanisms.Claim("x."),)
card = mechanisms.Card("Mine", "2601.00001", "A = 1", "m", "self", "exact", "O(n)", "never", "c", claims)
{name} = mechanisms.register(mechanisms.Mechanism("{called}", card, {make}))
"""
    notebook: dict[str, Any] = {"__name__": "__main__"}
    for option in ("first", "second"):
        exec(cell.format(option=option, name="one", called="mine", make="Mine"), notebook)
    assert mechanisms.get("mine") is notebook["one"]
    mechanisms.get("mine").build(Place(8, 2, 5, causal=False), second=2)
    with pytest.raises(WorkbenchError, match='"mine" has no option "first"'):
        mechanisms.get("mine").build(Place(8, 2, 5, causal=False), first=2)
    other = {"__name__": "elsewhere"}
    with pytest.raises(WorkbenchError, match='a mechanism "mine" already'):
        exec(cell.format(option="first", name="one", called="mine", make="Mine"), other)
    agent = mechanisms.get("agent")
    for name in ("__main__", agent.make.__module__):
        with pytest.raises(WorkbenchError, match='a mechanism "agent" already'):
            exec(cell.format(option="first", name="one", called="agent", make="Mine"), {"__name__": name})
    assert mechanisms.get("agent") is agent
    with pytest.raises(WorkbenchError, match="3 is no mechanism"):
        mechanisms.register(3)  # type: ignore[arg-type]


def test_what_is_no_name_place_or_option_is_named() -> None:
    moh, place = mechanisms.get("moh"), Place(24, 4, 9)
    for call, said in (
        (lambda: mechanisms.get(None), 'no mechanism "None"'),  # type: ignore[arg-type]
        (lambda: mechanisms.get(["moh"]), "no mechanism"),  # type: ignore[arg-type]
        (lambda: Place(24, 4, 9, causal=False, grid=4), r"grid=4 is not \(rows, columns\)"),  # type: ignore[arg-type]
        (lambda: Place(24, 4, 9, causal=False, grid=(3, 3, 1)), "is not"),  # type: ignore[arg-type]
        (lambda: Place(24, 4, 9, causal=False, grid=(3, "3")), "is not"),  # type: ignore[arg-type]
        (lambda: Place(24, 4, 9, causal=None), "causal is True or False, not None"),  # type: ignore[arg-type]
        (lambda: moh.build(None), "stands in a Place, not in None"),  # type: ignore[arg-type]
        (lambda: moh.build(place, 3), 'no variant "3"'),  # type: ignore[arg-type]
        (lambda: moh.build(place, ["half"]), "no variant"),  # type: ignore[arg-type]
        (lambda: moh.build(place, shared=float("nan")), 'shared=nan of "moh" is not a finite number'),
        (lambda: MixtureOfHeads(place, active=float("nan")), "active=nan is no share of the 4 heads"),
        (lambda: moh.build(place, shared="all"), "shared='all' of \"moh\" is not a finite number"),
        (lambda: moh.build(place, scaling=3), 'scaling=3 of "moh" is not "paper" or "code" or "norms"'),
        (lambda: moh.build(place, sharing=0.5), 'has no option "sharing"'),
        (lambda: mechanisms.get("rcmha").build(place, taps=1.5), "taps=1.5 .* is not a whole number"),
        (lambda: mechanisms.get("sink_lora").build(place, group=True), "is not a whole number or None"),
        (lambda: mechanisms.get("sink_lora").build(place, shifted=3), "is not a list of which each is True or False"),
        (lambda: mechanisms.get("deconstructed").build(place, "taylor", heads=2), 'no option "heads"'),
        (lambda: mechanisms.get("deconstructed").build(place, form=[]), "form"),
        (lambda: chain([]), "no layers of this mechanism to chain"),
        (lambda: chain([nn.Linear(3, 3)]), "no layers of this mechanism to chain"),  # type: ignore[list-item]
        (lambda: laid_out("deconstructed:mlp", "even", "4"), "n_layers is a whole number"),  # type: ignore[arg-type]
    ):  # fmt: skip
        with pytest.raises(WorkbenchError, match=said):
            call()


def test_a_notebook_shows_of_a_mechanism_what_a_terminal_does() -> None:
    page = mechanisms.get("agent")._repr_html_()
    assert "<caption>agent: Agent Attention</caption>" in page
    assert "few, without convolution" in page


def test_html_of_a_card_is_text() -> None:
    card = Card(
        "<b>", "2601.00001", "a < b", "m", "self", "exact", "O(n)", "either", "c", (Claim("x < y."),), leaks="<i>"
    )
    assert not any(tag in card._repr_html_() for tag in ("<b>", "<i>"))
    assert "&lt;b&gt;" in card._repr_html_()


def test_blocks_hold_the_mean_of_what_their_queries_give_and_nothing_where_nothing_is_seen() -> None:
    weights = torch.full((1, 5, 5), 1.0).tril() / torch.arange(1.0, 6)[:, None]
    found = by_blocks(weights, 2)
    assert found.shape == (1, 3, 3)
    torch.testing.assert_close(
        found[0, 1], torch.tensor([(2 / 3 + 2 / 4) / 2, (1 / 3 + 2 / 4) / 2, torch.nan]), equal_nan=True
    )
    torch.testing.assert_close(found[0, 2], torch.tensor([0.4, 0.4, 0.2]))  # of the one query that is left
    torch.testing.assert_close(found.nansum(-1), torch.ones(1, 3))


def test_maps_of_a_signature_that_are_none_are_refused() -> None:
    module = mechanisms.get("sqa").build(Place(24, 2, 9), "mha")
    with workbench.attach(module) as wb, wb.capture([]) as cap:
        module(torch.randn(1, 9, 24))
    pattern = cap[0].pattern
    for maps, message in (
        ({"a": torch.ones(1, 3, 3)}, r"“Odd” is not \[2 heads, row, column\]"),
        ({"a": torch.ones(2, 3, 3), "b": torch.ones(2, 1, 3)}, 'the map "b"'),
        ({"a": -torch.ones(2, 1, 3)}, "below zero"),
    ):
        signature = Signature("Odd", "No maps.", lambda module, pattern, maps=maps: maps)
        with pytest.raises(WorkbenchError, match=message):
            signature.of(module, pattern)


def test_queries_are_turned_by_their_positions_alone() -> None:
    torch.manual_seed(0)
    layer = mechanisms.get("sqa").build(Place(24, 2, 9, rotary=True), "mha")
    x = torch.randn(1, 1, 24).expand(1, 9, 24)
    q, k, _ = layer.heads(x)
    scores = q @ k.mT  # of one token everywhere: by distance
    for distance in range(-8, 9):
        line = scores[0, 0].diagonal(distance)
        torch.testing.assert_close(line, line[:1].expand_as(line), atol=1e-4, rtol=1e-4)
    assert scores[0, 0, 8].std() > 1e-3
