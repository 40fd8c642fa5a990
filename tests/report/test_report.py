"""What a report takes, what it writes, and what it refuses."""

import errno
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch

from support.tiny import family, make
from workbench import attach, views
from workbench.errors import FileError, ReportError
from workbench.report import Report, check
from workbench.report import report as writer
from workbench.storage.result import Result
from workbench.views.base import page as pages


def block_of(page: str, name: str) -> Any:
    """A data block of a page."""
    found = re.search(rf'<script type="application/json" id="{name}"[^>]*>(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found.group(1))


def strip(n: int = 5, title: str = "Tokens") -> views.TokenStrip:
    return views.token_strip([f" t{i}" for i in range(n)], np.linspace(0, 1, n), title=title)


@dataclass(frozen=True)
class Scores(Result):
    form: ClassVar[str] = "tests.scores"
    values: list[float]
    provenance: Any

    @property
    def table(self) -> pd.DataFrame:
        return pd.DataFrame({"head": [f"L0H{i}" for i in range(len(self.values))], "score": self.values})


def _view_of_scores(scores: Scores) -> views.TokenStrip:
    return views.token_strip([f"L0H{i}" for i in range(len(scores.values))], scores.values, title="Scores")


views.register(Scores, _view_of_scores)


class _Letters:
    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(chr(97 + int(i) % 26) for i in ids)


@pytest.mark.parametrize(("name", "causal"), [("gpt2", True), ("bert", False)])
def test_a_causal_mask_is_spoken_of_where_there_is_one(name: str, causal: bool) -> None:
    found = family(name)
    with attach(make(found), _Letters()) as wb, torch.no_grad(), wb.capture(["received"]) as cap:
        wb.model(**found.inputs())
    page = Report("A model").add(cap).to_html()
    assert "Attention received by each token" in page
    assert ("causal mask" in page) == causal


def test_a_page_has_everything_and_passes_its_check(make_capture: Any, verification: Any, tmp_path: Path) -> None:
    report = Report("Heads of a model", question="Which head copies?", answer="**L1H0**, by 0.4.")
    report.add(make_capture([" a", " b", "\n"]), text="a b\n", verification=verification)
    path = report.write(tmp_path / "report.html")
    assert path == tmp_path / "report.html"
    assert check(path) == []
    page = path.read_text(encoding="utf-8")
    head = ("Heads of a model", "Which head copies?", "<strong>L1H0</strong>, by 0.4.", "Written <time")
    run = ("small-model", "3 tokens", "2 sites, 6 heads", "flash_attention_for_cpu", "asks the network for nothing")
    checked = ("All 2 sites fired", "identical to the bit", "2e-07", "versions torch", "model.layers.1.self_attn")
    assert [part for part in head + run + checked if part not in page] == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_the_footer_tells_the_size_to_the_byte(make_capture: Any, tmp_path: Path) -> None:
    path = Report("t").add(strip()).add(make_capture()).write(tmp_path / "report.html")
    page = path.read_text(encoding="utf-8")
    assert f"This file has {path.stat().st_size:,} bytes." in page
    first = len(re.findall(r'id="view-0"[^>]*>(.*?)</script>', page, re.DOTALL)[0])
    assert f'<a href="#fig-1-token-strip">1</a> {first:,}' in page


def test_everything_can_be_added(make_capture: Any) -> None:
    scores = Scores([0.5, 0.25], {"model": "m", "metric": "logit_diff", "seeds": [1, 2]})
    report = Report("t").add("Words *first*.", title="Why").add(strip()).add(scores, note="It *counts*.", title="Score")
    report.add(make_capture([" a", " b"]), title="Capture of a b")
    page = report.to_html()
    assert re.findall(r'<h2 id="section-\d-heading">(.*?)</h2>', page) == ["Why", "Tokens", "Score", "Capture of a b"]
    for part in ("Words <em>first</em>.", "It <em>counts</em>.", "All numbers: 2 rows", '<td class="n">0.25</td>'):
        assert part in page
    assert block_of(page, "provenance")["metric"] == ["logit_diff"]
    assert block_of(page, "provenance")["sources"][0] == {
        "sections": [3],
        "facts": {"model": "m", "metric": "logit_diff", "seeds": [1, 2]},
    }
    assert repr(report) == "Report('t', 1 text, 1 view, 1 result, 1 capture)"


def test_several_views_are_one_section_and_keep_their_titles() -> None:
    report = Report("t").add([strip(title="One"), strip(title="Two")], title="Both", note="Of *both*.").add("x")
    page = report.to_html()
    assert re.findall(r'<h2 id="section-\d-heading">(.*?)</h2>', page) == ["Both"]
    assert [block_of(page, f"view-{i}")["title"] for i in (0, 1)] == ["One", "Two"]
    assert block_of(page, "words")["sections"][0]["n_figures"] == 2
    assert "Of <em>both</em>." in page
    assert repr(report) == "Report('t', 2 views, 1 text)"
    for nothing in ([], [strip(), "words"]):
        with pytest.raises(ReportError, match="a report shows views"):
            Report("t").add(nothing)  # type: ignore[arg-type]


def test_figures_are_numbered_and_the_contents_name_them() -> None:
    page = Report("t").add(strip()).add("x").add(strip(), title="Again", caption="Said otherwise.").to_html()
    ids = re.findall(r'<figure id="([^"]*)"', page)
    assert ids == ["fig-1-token-strip", "fig-2-token-strip"]
    contents = page[page.index('<nav class="contents"') : page.index("</nav>")]
    assert [anchor in contents for anchor in (*[f'href="#{i}"' for i in ids], 'href="#limits"', 'href="#origin"')] == [
        True
    ] * 4
    assert ">Figure 2</a>" in contents
    assert block_of(page, "view-1")["caption"] == "Said otherwise."
    assert [figure["id"] for figure in block_of(page, "provenance")["figures"]] == ids
    for anchor in re.findall(r'href="#([^"]*)"', page):
        assert page.count(f'id="{anchor}"') == 1


def test_same_captures_same_bytes(make_capture: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    written = [Report("t", seeds=[0]).add(make_capture(length=7)).add(strip()).to_html() for _ in range(2)]
    assert written[0] == written[1]
    block = block_of(written[0], "provenance")
    assert block["created"] == "2023-11-14T22:13:20+00:00"
    assert block["wall_time_seconds"] is None
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    block = block_of(Report("t").add(strip()).to_html(), "provenance")
    assert block["created"] > "2026"
    assert block["wall_time_seconds"] >= 0


def test_provenance_says_where_the_numbers_come_from(make_capture: Any) -> None:
    from workbench import attach
    from workbench.models import load

    model, tokenizer = load("demo-lm")
    with attach(model, tokenizer) as wb, torch.inference_mode(), wb.capture(["entropy", "received"]) as capture:
        model(**wb.tokenize("Then, Mary and John"))
    page = Report("t", seeds=[3]).add(capture, text="Then, Mary and John").to_html()
    block = block_of(page, "provenance")
    (source,) = block["sources"]
    facts = source["facts"]
    assert len(facts["weights_sha256"]) == len(facts["tokenizer_sha256"]) == 64
    for value in (facts["weights_sha256"], facts["tokenizer_sha256"], "demo-lm", "sdpa", "float32"):
        assert f"<dd>{value}</dd>" in page
    assert (facts["model_name"], facts["device"], facts["attention_backend"]) == ("demo-lm", "cpu", "sdpa")
    assert block["seeds"] == [3]
    assert block["data"][0]["prompt"] == "Then, Mary and John"
    assert block["data"][0]["tokens"]["input"][:2] == ["Then", ","]
    assert {"torch", "transformers", "transformer-lens", "captum", "plotly"} <= set(block["software"]["versions"])
    assert "commit" in block["software"]
    assert str(Path.home()) not in block["command_line"]
    assert "/" not in block["command_line"].replace("tests/", "")


def test_several_calls_show_the_first_and_say_so(make_capture: Any) -> None:
    page = Report("t").add(make_capture(n_calls=3)).to_html()
    assert "the first of 3 forward calls" in page
    assert "only the first of 3 forward calls is shown." in page[page.index('id="limits"') :]


def test_batch_row_is_chosen_and_named(make_capture: Any) -> None:
    capture = make_capture([" a", " b", " c"], batch=3, statistics=["received"])
    page = Report("t").add(capture, batch=2).to_html()
    assert "2 of 0 to 2" in page
    assert "only one of 3 batch rows is shown" in page
    assert block_of(page, "provenance")["data"][0]["batch_row"] == 2


def test_limits_say_once_what_holds_of_several_figures(make_capture: Any) -> None:
    page = Report("t").add(make_capture([" a", " b"])).add(make_capture([" c", " d"])).to_html()
    said = page.partition('id="limits"')[2].partition("</ul>")[0]
    assert said.count("The 8 largest weights of each row are exact.") == 1
    assert "Figures 2, 5: The 8 largest weights of each row are exact." in said


def test_limits_are_made_of_facts(make_capture: Any) -> None:
    values = [0.5, float("nan"), *[0.1] * 58]
    many = views.token_strip([f"t{i}" for i in range(60)], values)
    report = Report("t").add(make_capture(keep=False)).add(many).add(Scores([0.0] * 70, {"model": "m"}))
    said = report.to_html().partition('id="limits"')[2].partition("</ul>")[0]
    for part in (
        "The captures are of 1 example",
        "not verified",
        "the patterns of 2 sites were not kept",
        "the weights have no hash",
        "values are not known and grey",
        "its table shows the first 50 of 60 rows",
        "the first 50 of 70 rows",
    ):
        assert part in said, part


def test_a_failed_verification_is_not_called_verified(make_capture: Any) -> None:
    nan = float("nan")
    checks = [
        {"site": "a", "fired": True, "row_sum_error": 0.5, "output_error": nan, "tolerance": 1e-4, "ok": False},
        {"site": "b", "fired": False, "row_sum_error": nan, "output_error": nan, "ok": False},
    ]
    failed = SimpleNamespace(ok=False, identical=False, checks=checks)
    page = Report("t").add(make_capture(), verification=failed).to_html()
    for part in (
        "Verification failed",
        "1 of 2 checks saw their site fire",
        "changed the model",
        "largest error 0.5",
        "the verification failed at a, b",
    ):
        assert part in page
    assert "badge good" not in page
    assert "Not verified" in Report("t").add(make_capture()).to_html()


def test_bad_input_is_named(make_capture: Any, tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="needs a title, not ''"):
        Report("")
    with pytest.raises(ReportError, match="not Tensor"):
        Report("t").add(torch.zeros(1))  # type: ignore[arg-type]
    with pytest.raises(ReportError, match="rows 0 to 0, not 1"):
        Report("t").add(make_capture(), batch=1)
    with pytest.raises(ReportError, match="capture is empty"):
        Report("t").add(make_capture(n_calls=0))
    with pytest.raises(ReportError, match="text is empty"):
        Report("t").add(" \n")
    with pytest.raises(ReportError, match="belong to captures"):
        Report("t").add(strip(), batch=1)
    with pytest.raises(ReportError, match="report is empty"):
        Report("t").to_html()
    with pytest.raises(FileError, match="there is no folder"):
        Report("t").add(make_capture()).write(tmp_path / "none" / "report.html")
    with pytest.raises(FileError, match="is a folder"):
        Report("t").add(make_capture()).write(tmp_path)


def test_writing_replaces_the_old_file_whole(make_capture: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    Report("t").add(make_capture()).write(path)
    assert check(path) == []
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("broken", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=str)
@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_what_goes_wrong_while_writing_leaves_the_old_file(
    broken: BaseException, at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def fail(*_: Any) -> None:
        raise broken

    monkeypatch.setattr(os, at, fail)
    with pytest.raises((FileError, KeyboardInterrupt)) as caught:
        Report("t").add(strip()).write(path)
    assert isinstance(caught.value, FileError) == isinstance(broken, OSError)
    if isinstance(broken, OSError):
        assert "No space left on device" in str(caught.value)
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(FileError, match="cannot be written: Permission denied"):
        Report("t").add(strip()).write(tmp_path / "report.html")


def test_large_pages_warn_and_larger_ones_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report("t").add(strip(title="Small")).add(strip(400, title="Large"))
    size = len(report.to_html())
    monkeypatch.setattr(pages, "LARGE_BYTES", size - 100)
    with pytest.warns(UserWarning, match="may open slowly"):
        path = report.write(tmp_path / "large.html")
    assert "it may open slowly" in path.read_text(encoding="utf-8")
    assert f"This file has {path.stat().st_size:,} bytes," in path.read_text(encoding="utf-8")
    assert check(path) == []
    monkeypatch.setattr(writer, "REFUSED_BYTES", size - 50)
    with pytest.raises(ReportError, match=r"figure 2 “Large”, 0.0 MB, figure 1 “Small”"):
        report.write(tmp_path / "refused.html")
    assert not (tmp_path / "refused.html").exists()
    with pytest.warns(UserWarning, match="may open slowly"):
        assert report.write(tmp_path / "refused.html", allow_large=True).is_file()


def test_repr_says_what_is_in_it(make_capture: Any) -> None:
    assert repr(Report("Heads").add(make_capture())) == "Report('Heads', 1 capture)"
    assert repr(Report("Heads")) == "Report('Heads', empty: add a capture)"


def test_a_model_called_by_its_folder_does_not_show_the_path_as_title(make_capture: Any) -> None:
    page = Report("t").add(make_capture(provenance={"model_name": "/somewhere/deep/minilm"})).to_html()
    assert ">minilm</h2>" in page


def test_hostile_text_is_escaped_everywhere(make_capture: Any, verification: Any) -> None:
    bad = "</script><img src=x onerror=alert(1)>\u202e\ud800\ue000\ue001"
    capture = make_capture([bad, "b"], provenance={"model_name": bad, bad: bad}, name="site<i>.{}")
    verification.checks[0]["site"] = bad
    report = Report(bad, question=bad, answer=bad).add(bad, title=bad)
    page = report.add(capture, title=bad, text=bad, note=bad, verification=verification).to_html()
    assert "<img" not in page
    assert "\u202e" not in page
    page.encode("utf-8")
    assert page.count("</script>") == page.count("<script")


def test_a_report_without_much_in_it_is_small(tmp_path: Path) -> None:
    assert Report("t").add("Nothing was found.").write(tmp_path / "small.html").stat().st_size < 100_000


@pytest.mark.slow
@pytest.mark.parametrize(("length", "most"), [(64, 6_000_000), (512, 15_000_000)], ids=["S", "M"])
def test_a_standard_report_stays_small(make_capture: Any, tmp_path: Path, length: int, most: int) -> None:
    capture = make_capture([f" w{i}" for i in range(length)], layers=12, heads=12, statistics=("entropy", "received"))
    path = Report("t").add(capture).write(tmp_path / "report.html")
    assert path.stat().st_size < most
    assert check(path) == []
