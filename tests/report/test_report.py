"""What a report takes, what it writes, and what it refuses."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from workbench.errors import ReportError
from workbench.report import Report, check


def data_of(page: str) -> Any:
    """The data block of a page."""
    found = re.search(r'<script type="application/json" id="data"[^>]*>(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found.group(1))


def test_a_page_has_everything_and_passes_its_check(make_capture: Any, verification: Any, tmp_path: Path) -> None:
    report = Report("Heads of a model").add(make_capture([" a", " b", "\n"]), text="a b\n", verification=verification)
    path = report.write(tmp_path / "report.html")
    assert path == tmp_path / "report.html"
    assert check(path) == []
    page = path.read_text(encoding="utf-8")
    run = ("Heads of a model", "small-model", "3 tokens", "2 sites, 6 heads", "flash_attention_for_cpu")
    checked = ("All 2 sites fired", "identical to the bit", "2e-07", "versions torch", "model.layers.1.self_attn")
    assert [part for part in run + checked if part not in page] == []
    assert data_of(page)["tokens"] == [["␣a", "␣b", "⏎"]]
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_means_and_largest_weights_are_those_of_the_capture(make_capture: Any) -> None:
    capture = make_capture(length=11)
    site = data_of(Report("t").add(capture).to_html())["sections"][0]["sites"][1]
    record = capture["model.layers.1.self_attn"]
    assert site["means"]["entropy"] == pytest.approx(record.entropy[0].nanmean(-1).tolist(), rel=1e-6)
    assert site["map"]["block"] == 1
    assert site["map"]["packed"] is True
    assert site["map"]["error"] <= 1 / 254
    assert site["queryTokens"] is None


def test_same_captures_same_bytes(make_capture: Any) -> None:
    pages = [Report("t").add(make_capture(length=7)).to_html() for _ in range(2)]
    assert pages[0] == pages[1]


def test_several_calls_show_the_first_and_say_so(make_capture: Any) -> None:
    page = Report("t").add(make_capture(n_calls=3)).to_html()
    assert "the first of 3 forward calls" in page


def test_batch_row_is_chosen_and_named(make_capture: Any) -> None:
    capture = make_capture(batch=3, statistics=["entropy"])
    page = Report("t").add(capture, batch=2).to_html()
    assert "2 of 0 to 2" in page
    got = data_of(page)["sections"][0]["sites"][0]["means"]["entropy"]
    assert got == pytest.approx(capture["model.layers.0.self_attn"].entropy[2].mean(-1).tolist(), rel=1e-6)


def test_sites_without_a_pattern_say_why(make_capture: Any) -> None:
    page = Report("t").add(make_capture(keep=False)).to_html()
    site = data_of(page)["sections"][0]["sites"][0]
    assert site["map"] is None
    assert "not kept" in site["missing"]
    assert site["means"]["entropy"]


def test_towers_and_kinds_have_maps_of_their_own(translation_capture: Any) -> None:
    section = data_of(Report("t").add(translation_capture).to_html())["sections"][0]
    assert [group["label"] for group in section["groups"]] == [
        "Encoder self-attention",
        "Decoder self-attention",
        "Cross-attention",
    ]
    cross = section["sites"][4]
    assert (cross["queries"], cross["keys"], cross["map"]["packed"]) == (7, 30, False)
    assert "distance" not in cross["means"]


def test_a_failed_verification_is_not_called_verified(make_capture: Any) -> None:
    checks = [
        {
            "site": "a",
            "fired": True,
            "row_sum_error": 0.5,
            "output_error": float("nan"),
            "tolerance": 1e-4,
            "ok": False,
        },
        {"site": "b", "fired": False, "row_sum_error": float("nan"), "output_error": float("nan"), "ok": False},
    ]
    failed = SimpleNamespace(ok=False, identical=False, checks=checks)
    page = Report("t").add(make_capture(), verification=failed).to_html()
    for part in ("Verification failed", "1 of 2 checks saw their site fire", "changed the model", "largest error 0.5"):
        assert part in page
    assert "badge good" not in page
    assert "Not verified" in Report("t").add(make_capture()).to_html()


def test_long_inputs_are_pooled_and_keep_exact_rows(make_capture: Any) -> None:
    capture = make_capture(length=300, layers=1, heads=2, statistics=["entropy"])
    site = data_of(Report("t").add(capture).to_html())["sections"][0]["sites"][0]["map"]
    assert (site["block"], site["rows"], site["columns"], site["top"]) == (2, 150, 150, 8)


def test_a_small_limit_pools_further_until_the_page_fits(make_capture: Any, tmp_path: Path) -> None:
    capture = make_capture(length=128, layers=6, heads=8, statistics=["entropy"])
    whole = len(Report("t").add(capture).to_html())
    limit = 500_000
    assert whole > limit
    path = Report("t").add(capture).write(tmp_path / "small.html", limit_bytes=limit)
    assert path.stat().st_size <= limit
    sites = data_of(path.read_text(encoding="utf-8"))["sections"][0]["sites"]
    assert {site["map"]["block"] for site in sites} != {1}
    assert check(path, limit_bytes=limit) == []


def test_what_cannot_fit_is_refused_and_nothing_is_written(make_capture: Any, tmp_path: Path) -> None:
    capture = make_capture(length=60, layers=6, heads=8, statistics=["entropy"])
    with pytest.raises(ReportError, match="raise limit_bytes"):
        Report("t").add(capture).write(tmp_path / "small.html", limit_bytes=60_000)
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_named(make_capture: Any, tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="needs a title, not ''"):
        Report("")
    with pytest.raises(ReportError, match="not Tensor"):
        Report("t").add(torch.zeros(1))  # type: ignore[arg-type]
    with pytest.raises(ReportError, match="rows 0 to 0, not 1"):
        Report("t").add(make_capture(), batch=1)
    with pytest.raises(ReportError, match="capture is empty"):
        Report("t").add(make_capture(n_calls=0))
    with pytest.raises(ReportError, match="report is empty"):
        Report("t").to_html()
    with pytest.raises(ReportError, match="there is no folder"):
        Report("t").add(make_capture()).write(tmp_path / "none" / "report.html")
    with pytest.raises(ReportError, match="is a folder"):
        Report("t").add(make_capture()).write(tmp_path)


def test_writing_replaces_the_old_file_whole(make_capture: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    Report("t").add(make_capture()).write(path)
    assert check(path) == []
    assert len(list(tmp_path.iterdir())) == 1


def test_repr_says_what_is_in_it(make_capture: Any) -> None:
    assert repr(Report("Heads").add(make_capture())) == "Report('Heads', 1 capture, 2 sites, 6 heads)"


def test_a_model_called_by_its_folder_does_not_show_the_path_as_title(make_capture: Any) -> None:
    page = Report("t").add(make_capture(provenance={"model_name": "/somewhere/deep/minilm"})).to_html()
    assert ">minilm</h2>" in page


def test_hostile_text_is_escaped_everywhere(make_capture: Any, verification: Any) -> None:
    bad = "</script><img src=x onerror=alert(1)>\u202e\ud800"
    capture = make_capture([bad, "b"], provenance={"model_name": bad, bad: bad}, name="site<i>.{}")
    verification.checks[0]["site"] = bad
    page = Report(bad).add(capture, text=bad, note=bad, verification=verification).to_html()
    assert "<img" not in page
    assert "\u202e" not in page
    page.encode("utf-8")
    assert page.count("</script>") == 3
