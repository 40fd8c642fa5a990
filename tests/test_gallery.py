"""The gallery of mechanisms: what a room holds, what the matrix says, and that the page is whole."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import workbench
from workbench import WorkbenchError, mechanisms
from workbench.gallery import GalleryInterrupted, build
from workbench.mechanisms import Card, Claim, Mechanism, Mixer, Place, rooms
from workbench.mechanisms.frame import catalogue
from workbench.mechanisms.rooms import see
from workbench.mechanisms.rooms.costs import cost_of
from workbench.mechanisms.rooms.inputs import LOSS, TEXT, Examples, shown_text
from workbench.mechanisms.training import TrainedModel
from workbench.mechanisms.training.text import IGNORE
from workbench.mechanisms.training.work import run_work
from workbench.report import check
from workbench.views import all_of, of
from workbench.views.results.mechanisms import matrix


@pytest.fixture(scope="module")
def quick() -> TrainedModel:
    """A mixture of heads that was trained for three steps."""
    return run_work("text", ["moh"] * 3, quick=True)


@pytest.fixture(scope="module")
def moh(quick: TrainedModel) -> mechanisms.Room:
    return mechanisms.room("moh", {"text": quick})


@pytest.fixture(scope="module")
def unseen() -> mechanisms.Room:
    """A mechanism of which nothing is shipped."""
    return mechanisms.room("agent:few")


def titles(one: object) -> list[str]:
    return [view.spec.title for view in all_of(one)]


def test_the_text_that_all_are_shown_begins_again() -> None:
    assert len(TEXT) == 87  # with BOS 88 tokens, which a small map shows cell by cell
    ids = shown_text()
    assert ids.shape == (1, 88)
    assert 0 < int(ids[0, 1:].min()) <= int(ids.max()) < 127
    again = TEXT.index("(row):\n    s = sum(row)\n    return ", 20)
    assert TEXT[again:] == TEXT[7 : 7 + len(TEXT) - again]


def test_the_loss_of_an_example_is_that_of_what_counts_in_it() -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, IGNORE, 2], [IGNORE, IGNORE, 4]])
    nats = -logits.log_softmax(-1)
    found = LOSS(logits, Examples({}, labels))
    torch.testing.assert_close(found, torch.stack([(nats[0, 0, 1] + nats[0, 2, 2]) / 2, nats[1, 2, 4]]))
    classes = torch.tensor([3, 0])
    torch.testing.assert_close(LOSS(logits[:, 0], Examples({}, classes)), nats[:, 0].gather(1, classes[:, None])[:, 0])


def test_a_room_shows_its_card_heads_importance_distances_gates_and_training(moh: mechanisms.Room) -> None:
    assert titles(moh) == [
        "MoH: Mixture-of-Head Attention",
        "Every head on the same text",
        "Head importance, text",
        "Where heads look, relative to the query, text",
        "Which heads speak at each token, text",
        "Every head on the same scenes",
        "Head importance, images",
        "Where heads look, relative to the query, images",
        "Which heads speak at each token, images",
        "Training" if moh.cost is None else "Training and cost",
    ]
    card, maps, _, _, gates, *_ = all_of(moh)
    told = dict(zip(card.data()["Card"], card.data()["moh"], strict=True))
    assert told["Paper"] == "arXiv 2410.11842"
    shown = [text for head, text in zip(card.data()["Card"], card.data()["moh"], strict=True) if head == "Shown"]
    assert [("it has learned nothing" in text) for text in shown] == [True, False]  # that of text is given
    assert ("Measured cost" in told) == (moh.cost is None)
    heads, texts = card.data()["Card"].tolist(), card.data()["moh"].tolist()
    for claim in moh.card.claims:
        at = texts.index(claim.says)
        assert heads[at] == f"Claim, {claim.outcome}"
        if claim.outcome != "not examined":
            assert heads[at + 1 : at + 3] == ["found at our scale", "examined how"]
            assert texts[at + 1 : at + 3] == [claim.found, claim.how]
    assert maps.spec.facts["axes"]["step"] == 1
    assert maps.spec.facts["axes"]["column_texts"][:5] == ["BOS", "d", "e", "f", "␣"]
    seen = moh.seen[0]
    pattern = seen.capture[0].pattern
    assert gates.spec.blocks["maps"].shape == (12, 1, 88)
    torch.testing.assert_close(torch.from_numpy(gates.spec.blocks["maps"][:4, 0].copy()), pattern.gates[0])
    assert seen.importance is not None
    assert seen.importance.n_examples == 32
    assert "moh, text" in str(seen.importance.provenance["model_name"])


def test_a_room_of_an_image_model_is_shown_the_scenes() -> None:
    one = mechanisms.room("halo", {"images": run_work("images", ["halo"] * 2, quick=True)})
    assert titles(one)[1:5] == [
        "Every head on the same scenes",
        "Head importance",
        "Where heads look, relative to the query",
        "The window of a block",
    ]
    scenes, _, _, windows = all_of(one)[1:5]
    assert scenes.spec.blocks["pixels"].shape == (3, 32, 32, 3)
    assert [head["seams"] for head in scenes.spec.facts["heads"]] == [[[4], [4]]] * 8  # where its blocks meet
    maps = windows.spec.blocks["maps"]
    assert maps.shape == (2 * 4 * 4, 8, 8)
    first = ~np.isnan(maps[0])  # block 0 of 4 x 4 patches in a corner, and a halo of one around it
    assert first[:5, :5].all()
    assert first.sum() == 25
    np.testing.assert_allclose(np.nansum(maps, (1, 2)), 1, atol=1e-5)


def test_gates_are_shown_by_their_factors() -> None:
    one = mechanisms.room("van")
    assert {site.kind for site in one.seen[0].capture.sites} == {"gate"}
    assert titles(one)[1:3] == ["Gates", "Gates over positions"]
    importance = all_of(one)[3]
    assert [group["label"] for group in importance.spec.facts["groups"]] == ["Gates"]


def test_windows_are_laid_over_the_scenes() -> None:
    seen = see(mechanisms.get("davit-windows"), "davit-windows:filled up", "images")
    room = mechanisms.Room("davit-windows:filled up", mechanisms.get("davit-windows"), (seen,))
    scenes = all_of(room)[1]
    assert scenes.spec.kind == "image_attention"
    assert len(all_of(room)) == 2  # every head has its place there
    assert {str(head["seams"]) for head in scenes.spec.facts["heads"]} == {"[[4], [4]]"}


def test_where_no_weights_are_shipped_it_is_said(unseen: mechanisms.Room) -> None:
    assert not unseen.is_trained
    card, maps, *_ = all_of(unseen)
    assert "random weights: no trained weights are shipped" in " ".join(card.data()["agent:few"])
    assert "No importance" in card.data()["Card"].tolist()
    assert "Weights are random." in maps.spec.caption
    assert "Head importance" not in titles(unseen)
    assert rooms.matrix([unseen]).table.filter(like="distance").empty


def test_random_weights_are_the_same_every_time_and_disturb_nothing(unseen: mechanisms.Room) -> None:
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    again = mechanisms.room("agent:few")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [view.spec.digest for view in all_of(again)[1:3]] == [view.spec.digest for view in all_of(unseen)[1:3]]


def test_the_matrix_has_a_row_for_each_and_what_was_measured(
    moh: mechanisms.Room, unseen: mechanisms.Room, quick: TrainedModel
) -> None:
    found = rooms.matrix([moh, unseen])
    table = found.table
    assert list(table.index) == ["moh", "agent:few"]
    assert table.loc["moh", "copy"] == pytest.approx(quick.scores["copy"])
    assert table.loc["moh", "parameters, text, thousands"] == pytest.approx(quick.facts["parameters"] / 1000)
    assert table.loc["agent:few"].filter(regex="copy|parameters|induction").isna().all()
    code = next(each for each in found.columns if each.name == "code, nats")
    assert code.better == "low"
    assert "trained for a few steps" in code.said[0]
    assert code.said[1] == "not measured"
    assert sum(map(int, re.findall(r"\d+", table.loc["moh", "claims"]))) == len(moh.card.claims)
    assert table.loc["agent:few", "claims"] == ""
    spec = of(found).spec
    assert [row["place"] for row in spec.facts["rows"]] == [None, None]
    assert "No trained weights are shipped of agent:few" in spec.notes[0]
    assert [row["place"] for row in matrix(found, ["section-2", "section-3"]).spec.facts["rows"]] == [
        "section-2",
        "section-3",
    ]


def test_recall_and_copying_alone_are_means_over_seeds(
    monkeypatch: pytest.MonkeyPatch, unseen: mechanisms.Room
) -> None:
    def run(seed: int, work: str, hidden: int = 9, **scores: float) -> dict[str, object]:
        shared = {"name": "agent:few", "layout": "uniform", "work": work, "seed": seed, "hidden": hidden}
        return {**shared, "scores": scores}

    kept = [run(seed, "mqar", **{"8 pairs": 0.2 * seed, "far": 0.5}) for seed in range(3)]
    kept += [run(0, "induction", copy=0.75), run(0, "induction", hidden=0, copy=0.0)]
    monkeypatch.setattr(sys.modules["workbench.mechanisms.rooms.matrix"], "read_runs", lambda: kept)
    found = {each.name: each for each in rooms.matrix([unseen]).columns}
    assert found["8 pairs recalled"].values == (pytest.approx(0.2),)
    assert found["8 pairs recalled"].said == ("mean of 3 seeds, 0 to 0.4",)
    assert found["copied"].values == (0.75,)
    assert found["copied"].said == ("one seed",)
    assert found["copied"].better == "high"


def test_the_page_is_sound_small_and_the_same_every_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    path = build(["sqa:mha", "halo"]).write(tmp_path / "gallery.html")
    assert check(path) == []
    assert path.stat().st_size < 4_000_000
    page = path.read_text(encoding="utf-8")
    headings = re.findall(r'<h2 id="section-\d-heading">(.*?)</h2>', page)
    assert headings == [
        "All mechanisms",
        "sqa:mha: plain attention, a limit of Sparse Query Attention",
        "halo: HaloNet: blocked local attention",
    ]
    assert build(["sqa:mha", "halo"]).to_html() == page


def test_a_mechanism_of_ones_own_has_a_room(monkeypatch: pytest.MonkeyPatch) -> None:
    mechanisms.list()
    monkeypatch.setattr(catalogue, "_MECHANISMS", dict(catalogue._MECHANISMS))

    class Own(Mixer):
        def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.place.causal)

    card = Card(
        "Own <b>", "2601.00001", "A = softmax", "All.", "self", "exact", "O(n²)", "always", "None.", (Claim("It is."),)
    )
    mechanisms.register(Mechanism("own", card, Own))
    one = mechanisms.room("own")
    assert [each.work for each in one.seen] == ["text"]
    assert one.seen[0].signatures == ()
    assert "Own &lt;b&gt;" in str(one.to_html())
    assert "<b>" not in str(one.to_html()).partition("<body")[2].partition("<script")[0]


def test_a_module_that_stands_in_no_model_is_shown_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    mechanisms.list()
    monkeypatch.setattr(catalogue, "_MECHANISMS", dict(catalogue._MECHANISMS))
    sqa = mechanisms.get("sqa")

    def only_small(place: Place) -> torch.nn.Module:
        if place.length > 40:
            raise WorkbenchError("too long")
        return sqa.build(place)

    mechanisms.register(Mechanism("small", sqa.card, only_small))
    one = mechanisms.room("small")
    assert [each.work for each in one.seen] == ["alone"]
    assert "the module alone, with random weights" in " ".join(of(one).data()["small"])
    assert len(all_of(one)) >= 2


def test_all_mechanisms_have_a_room_and_so_have_shipped_variants() -> None:
    found = rooms.names()
    assert found[0] == rooms.showing.PLAIN
    assert len(found) == len(set(found))
    assert set(mechanisms.list().names) <= set(found)
    models = mechanisms.trained_models()
    assert set(models["name"]) <= set(found)
    one = mechanisms.room(found[0])
    assert [each.work for each in one.seen] == models[models["name"] == found[0]]["work"].tolist()
    assert one.seen[0].trained is not None
    assert one.plain["text"][0][0] > 0


def test_what_is_no_mechanism_is_refused(quick: TrainedModel) -> None:
    with pytest.raises(WorkbenchError, match='no mechanism "mho"'):
        mechanisms.room("mho")
    with pytest.raises(WorkbenchError, match="no variant"):
        mechanisms.room("moh:third")
    for names in ("moh", []):
        with pytest.raises(WorkbenchError, match="is no list of mechanisms"):
            build(names)
    with pytest.raises(WorkbenchError, match="is no work"):
        mechanisms.room("moh", {"sound": quick})
    with pytest.raises(workbench.ReportError, match="no notebook"):
        mechanisms.show("sqa:mha")


def test_outside_of_a_notebook_nothing_is_measured_in_vain(
    monkeypatch: pytest.MonkeyPatch, moh: mechanisms.Room
) -> None:
    monkeypatch.setattr(rooms.showing, "room", lambda *_: pytest.fail("it was measured"))
    with pytest.raises(workbench.ReportError, match="there is no notebook") as caught:
        mechanisms.show("moh")
    assert "mechanisms.room('moh').to_html" in str(caught.value.hint)
    with pytest.raises(WorkbenchError, match='there is no mechanism "hom"'):
        mechanisms.show("hom")
    with pytest.raises(workbench.ReportError, match="there is no notebook"):
        moh.show()


def test_names_in_code_are_drawn_as_such_or_without_their_marks() -> None:
    one = mechanisms.room("rcmha", {"text": run_work("text", ["rcmha"] * 3, quick=True)})
    assert "`on_tokens(A)`" in one.card.beside
    assert "<code>on_tokens(A)</code>" in one.card._repr_html_()
    told = dict(zip(all_of(one)[0].data()["Card"], all_of(one)[0].data()["rcmha"], strict=True))
    assert "`" not in "".join(told.values())
    assert "on_tokens(A)" in told["Beside"]


def test_costs_are_read_in_the_order_of_lengths(tmp_path: Path) -> None:
    file = tmp_path / "cost.json"
    points = [
        {"length": 1024, "seconds": 0.4, "seconds_over_sdpa": 2.0, "mib": 8},
        {"length": 512, "seconds": 0.1, "seconds_over_sdpa": 1.0, "mib": 2},
    ]
    held = {"points": points, "exponent": 2.0, "exponent_low": 1.9, "exponent_high": 2.1}
    file.write_text(
        json.dumps(
            {
                "facts": {"machine": "A machine."},
                "rooms": {"moh": held, "few": {"points": points[:1], "exponent": None}},
            }
        )
    )
    found = cost_of("moh", file)
    assert found is not None
    assert (found.lengths, found.over_sdpa, found.exponent) == ((512, 1024), (1.0, 2.0), 2.0)
    assert found.growth == "its time grows as the length to the power of 2.00 (1.90 to 2.10)"
    assert found.machine == "A machine."
    few = cost_of("few", file)
    assert few is not None
    assert "not measured" in few.growth
    assert cost_of("agent", file) is None
    assert cost_of("moh", tmp_path / "absent.json") is None


def test_what_was_looked_at_before_an_interrupt_is_kept(
    moh: mechanisms.Room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(name: str) -> mechanisms.Room:
        if name != "moh":
            raise KeyboardInterrupt
        return moh

    monkeypatch.setattr(rooms, "room", stopped)
    with pytest.raises(GalleryInterrupted, match="sqa, halo, agent-s2 are not looked at") as raised:
        build(["moh", "agent-s2", "sqa", "halo"])
    assert raised.value.left == ("sqa", "halo", "agent-s2")
    assert raised.value.partial is not None
    path = raised.value.partial.write(tmp_path / "gallery.html")
    assert check(path) == []
    text = path.read_text(encoding="utf-8")
    assert "sqa, halo, agent-s2 are <strong>not looked at</strong>" in text
    assert f"moh: {moh.title}" in text
    assert "section-3" in text
    with pytest.raises(GalleryInterrupted, match="halo is not looked at") as raised:
        build(["halo"])
    assert raised.value.partial is None
