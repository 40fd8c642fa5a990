"""The demo begins with an induction head: what it says of the chosen row is so, and the page opens there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.browser import WatchedPage
from workbench.demo import induction
from workbench.report import Report


@pytest.fixture(scope="module", params=[0, 3])
def report(request: pytest.FixtureRequest) -> Report:
    made = Report("Heads")
    induction.add(made, request.param)
    return made


def test_the_chosen_row_is_an_induction_row(report: Report) -> None:
    entry = report._entries[0]
    spec = entry.thing
    chosen, tokens = spec.selection, spec.facts["tokens"][0]
    query, key = chosen["query"], chosen["key"]
    assert tokens[key - 1] == tokens[query]
    assert key <= query
    words = re.findall(r"\*\*(.+?)\*\*", entry.note)
    assert float(re.findall(r"(\d\.\d+) of its weight", entry.note)[0]) > 0.5  # worth to be seen first
    assert words[:2] == [tokens[query].strip("\u2423"), tokens[key].strip("\u2423")]
    weight = (
        spec.blocks["top"] if "top" in spec.blocks else next(b for n, b in spec.blocks.items() if n.startswith("top:"))
    )
    assert f"{float(weight[0, query].max()):.2f}" in entry.note


@pytest.mark.browser
def test_the_page_opens_at_the_head_and_its_contents_are_short(
    report: Report, page: WatchedPage, tmp_path: Path
) -> None:
    label = re.search(r"L\d+H\d+", report._entries[0].title)[0]  # type: ignore[index]
    tab = page.open(report.write(tmp_path / "report.html"))
    tab.wait_for_selector("html[data-ready]")
    assert tab.locator(".head_gallery .detail h3").inner_text() == label
    assert tab.locator(".attention_pattern figcaption").first.inner_text().startswith(label)
    first = tab.locator(".head_gallery button.tile").first
    assert first.locator("span").inner_text().startswith(label)
    page.assert_clean()
