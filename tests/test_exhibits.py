"""Papers without a mechanism of their own: their cards, and their places in the gallery."""

import json
from pathlib import Path

import pytest

from workbench.gallery import build
from workbench.gallery.exhibits import EXHIBITS
from workbench.mechanisms.dualformer import card as dualformer
from workbench.mechanisms.dualformer.card import _CLAIMS
from workbench.report import check
from workbench.views import View


def test_the_gallery_has_places_for_papers_without_a_mechanism(tmp_path: Path) -> None:
    page = build(list(EXHIBITS)).write(tmp_path / "page.html")
    assert check(page) == []
    text = page.read_text(encoding="utf-8")
    for name, exhibit in EXHIBITS.items():
        assert f"{name}: {exhibit.card().title}" in text
        card, *views = exhibit.all()
        assert all(isinstance(view, View) for view in views)
        texts = card.data()[name].tolist()
        assert not [each for each in texts if "`" in each or "examined yet" in each]
        assert {claim.says for claim in exhibit.card().claims} <= set(texts)
    assert "L0H" in text  # the investigation that is shown found its circuit
    for view in EXHIBITS["agent-s2"].views():  # each finding came from one analysis, each action goes to one expert
        _, row, value = view.data().columns
        assert set(view.data().groupby(row)[value].sum()) == {1}


def test_cards_say_what_was_not_examined() -> None:
    for exhibit in EXHIBITS.values():
        assert exhibit.card().claims
        assert exhibit.card().arxiv in str(exhibit.card())
        for claim in exhibit.card().claims:
            assert (claim.outcome == "not examined") == bool(claim.needs)
            assert not claim.needs or f"Not examined: it needs {claim.needs}." in str(exhibit.card())
    assert "simulated, on no GPU" in str(EXHIBITS["cad"].card())


@pytest.mark.parametrize(
    ("low", "high", "outcome"), [(0.1, 0.3, ("holds", "does not hold")), (-0.3, -0.1, ("does not hold", "holds")),
                                 (-0.1, 0.1, ("undecided", "undecided"))],
)  # fmt: skip
def test_claims_follow_from_the_intervals(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, low: float, high: float, outcome: tuple[str, str]
) -> None:
    gaps = {name: [(low + high) / 2, low, high] for _, name, _ in _CLAIMS}
    (tmp_path / "results.json").write_text(json.dumps({"differences": gaps}))
    monkeypatch.setattr(dualformer, "RESULTS", tmp_path / "results.json")
    made = dualformer.card.__wrapped__
    monkeypatch.setattr(dualformer, "results", dualformer.results.__wrapped__)
    for claim, (_, _, sign) in zip(made().claims, _CLAIMS, strict=True):
        assert claim.outcome == outcome[sign < 0]
        assert f"[{low:+.1f}" in claim.found or f"[{low:+.1%}" in claim.found
