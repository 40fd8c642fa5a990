"""Results of saliency and of cross-attention have views that hold their numbers."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from support.comparisons import comparison, saliency
from workbench import Report, views
from workbench.analysis.cross_attention import CrossAttention
from workbench.errors import ReportError
from workbench.report import check
from workbench.views import of
from workbench.views.results.cross_attention import atlas, averages, curves, maps


@pytest.mark.parametrize("kind", ["spectrogram", "frames", "tokens", "patches", "image"])
def test_every_kind_of_saliency_has_a_view(kind: str, tmp_path: Path) -> None:
    found = saliency(kind)
    view = of(found)
    assert check(view.to_html(tmp_path / "a.html")) == []
    assert "300 masks" in view.spec.caption
    if kind == "tokens":
        assert view.spec.facts["names"][0] == "␣in0"
        np.testing.assert_allclose(view.spec.blocks["strip0"], found.scores, rtol=1e-6)
    if kind == "spectrogram":
        np.testing.assert_allclose(view.spec.blocks["strip0"], found.scores.amax(2), rtol=1e-6)
        np.testing.assert_allclose(view.spec.blocks["error0"], 0.1 * found.scores.amax(2), rtol=1e-5)


def test_attention_alone_has_a_view() -> None:
    held = comparison(1).maps[0]
    found = CrossAttention(
        maps=held["attention"], mass=torch.ones(2, 2, 3), sites=("a", "b"), layers=(4, 5), weighting="raw",
        rollout=False, renormalised=False, target_ids=(1, 2, 3), target_texts=held["target_texts"],
        special=held["special"], position_texts=(), kept_positions=tuple(range(20)), length=22,
        seconds_per_position=0.02, alignment_heads=(), provenance={},
    )  # fmt: skip
    view = of(found)
    assert view.spec.facts["attention"]["layers"] == [4, 5]
    assert "2 positions of padding" in view.spec.caption
    np.testing.assert_allclose(view.spec.blocks["strip0"], held["attention"].mean((0, 1)), rtol=1e-6)


def test_an_image_of_many_tokens_is_cut_and_says_so() -> None:
    assert of(saliency("patches", n=14)).spec.notes == ("2 more tokens are not shown.",)


def test_patches_without_a_grid_are_refused() -> None:
    with pytest.raises(ReportError, match="no grid"):
        of(saliency("patches", grid=None))


def test_exact_and_early_results_say_so() -> None:
    assert "all masks" in of(saliency("tokens", exact=True)).spec.caption
    assert "ended early" in of(saliency("tokens", partial=True)).spec.caption


def test_the_views_of_a_comparison() -> None:
    found = comparison()
    kinds = [view.spec.kind for view in views.cross_attention(found)]
    assert kinds == ["saliency_map", "head_atlas", "figure", "figure"]
    assert len(views.cross_attention(comparison(curves=False))) == 3
    assert [view.spec.kind for view in views.all_of(found)] == kinds
    assert [view.spec.kind for view in views.all_of(replace(found, maps=()))] == kinds[1:]


def test_spans_are_where_the_alignment_lies() -> None:
    found = comparison(2)
    view = maps(found, utterance=1, spans={"said": np.zeros((3, 2))})
    assert view.spec.facts["spans"] == ["attention", "input saliency", "said"]
    spans = view.spec.blocks["spans"]
    first, last = found.alignments[1]["attention"][1].tolist()
    np.testing.assert_allclose(spans[0, 1], [0.02 * first, 0.02 * (last + 1)], rtol=1e-6)
    assert np.isnan(spans[:2, 2]).all()


def test_text_stands_on_the_axis() -> None:
    facts = maps(comparison(kind="tokens")).spec.facts
    assert facts["names"] == [f"␣in{i}" for i in range(5)]
    assert (facts["unit"], facts["step"], facts["picture"]) == ("position", 1.0, None)


def test_the_atlas_holds_every_head_with_its_interval() -> None:
    found = comparison()
    view = atlas(found)
    assert view.spec.facts["groups"][0]["label"] == "Cross-attention"
    assert "L1H0" in view.spec.caption
    np.testing.assert_allclose(view.data()["Pearson r, input saliency"], found.by_head().flatten(), rtol=1e-6)
    np.testing.assert_allclose(
        view.data()["Spearman r, encoder-output saliency"],
        found.by_head("encoder_output", "spearman").flatten(),
        rtol=1e-6,
    )
    assert np.isfinite(view.spec.blocks["low"]).all()


def test_of_many_heads_the_best_stand_beside_the_averages(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["workbench.views.results.cross_attention"]
    monkeypatch.setattr(module, "_MANY", 3)
    monkeypatch.setattr(module, "_BEST", 2)
    found = comparison()
    bars = averages(found)._whole["data"][0]["x"]
    order = found.by_head().flatten().argsort(descending=True)[:2].tolist()
    assert set(bars[:2]) == {("L0H0", "L0H1", "L1H0", "L1H1")[i] for i in order}
    assert list(bars[2:]) == ["L0", "L1", "all", "alignment heads"]


def test_averages_choose_their_head() -> None:
    view = averages(comparison())
    bars = view._whole["data"]
    assert [trace["name"] for trace in bars] == ["input saliency", "encoder-output saliency"]
    assert np.asarray(bars[0]["customdata"])[[2, 5, 6]].tolist() == [[1, 0], [1, -1], [-1, -1]]


def test_curves_hold_the_means_and_know_their_scores() -> None:
    found = comparison()
    data = curves(found, score="probability").data()
    deletion = data[(data["curve"] == "deletion") & (data["order"] == "random")]
    np.testing.assert_allclose(deletion["probability"], found.curves[:, -1, 0, :, 1].mean(0))
    with pytest.raises(ReportError, match="no score 'wer'"):
        curves(found, score="wer")
    with pytest.raises(ReportError, match="no curves"):
        curves(comparison(curves=False))


def test_what_was_not_kept_is_refused() -> None:
    with pytest.raises(ReportError, match="utterances 0 to 0 were kept"):
        maps(comparison(1), utterance=1)
    bare = replace(comparison(1), maps=())
    assert of(bare).spec.kind == "head_atlas"
    with pytest.raises(ReportError, match="no maps were kept"):
        maps(bare)


def test_undefined_correlations_are_said() -> None:
    found = replace(comparison(1), undefined=tuple(f"clip {i}: constant" for i in range(5)))
    assert maps(found).spec.notes[-2:] == ("Clip 2: constant.", "2 more correlations are undefined.")


def test_a_report_takes_the_result_and_its_views(tmp_path: Path) -> None:
    found = comparison()
    report = Report("Speech").add(found).add(views.cross_attention(found, utterance=1)[0])
    path = report.write(tmp_path / "speech.html")
    assert check(path) == []
    assert "media-src data: blob:" in path.read_text(encoding="utf-8")
