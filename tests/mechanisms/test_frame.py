"""The list of mechanisms, their places, and cards that cannot say more than was found."""

import pytest
import torch
from torch import nn

import workbench
from workbench import WorkbenchError, mechanisms
from workbench.mechanisms import Card, Claim, Mechanism, Place, Signature
from workbench.mechanisms.frame import by_blocks, catalogue


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
