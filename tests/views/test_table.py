"""Tables of named rows: what is shaded and how deep, what sorting does, and where a row leads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from support.browser import WatchedPage
from workbench import ReportError, views
from workbench.report import Report
from workbench.views import Column
from workbench.views.table.view import _depths

NAN = float("nan")


def _table(**more: object) -> views.Table:
    columns = [
        Column("words", ["b", "a", ""]),
        Column("loss", [1.5, 1.0, 2.0], "quality", "low", said=["one seed", "three seeds", "one seed"]),
        Column("recall", [0.5, NAN, 0.75], "quality", "high"),
    ]
    return views.table(["x", "y", "z"], columns, of="model", title="Models", **more)  # type: ignore[arg-type]


def test_numbers_are_shaded_from_the_worst_to_the_best_of_their_column() -> None:
    np.testing.assert_allclose(_depths(np.array([1.0, 3.0, 2.0, NAN]), "high"), [0, 1, 0.5, NAN])
    np.testing.assert_allclose(_depths(np.array([1.0, 3.0, 2.0, NAN]), "low"), [1, 0, 0.5, NAN])
    np.testing.assert_allclose(_depths(np.array([1.0, 1.1]), "high", span=1.0), [0, 0.1])  # hardly another: alike
    np.testing.assert_allclose(_depths(np.array([1.0, 3.0]), "low", span=1.0), [1, 0])
    np.testing.assert_allclose(_depths(np.array([-1.0, 3.0, 1.5]), None), [0, 1, 0.5])
    np.testing.assert_allclose(_depths(np.array([2.0, 2.0]), "high"), [0, 0])
    np.testing.assert_allclose(_depths(np.array([NAN, NAN]), "low"), [NAN, NAN])
    np.testing.assert_allclose(_depths(np.array([0.0, 0.0]), None), [0, 0])


def test_the_data_are_the_columns_and_words_are_seen() -> None:
    found = _table().data()
    assert list(found.columns) == ["model", "words", "loss", "recall"]
    assert found["loss"].tolist() == [1.5, 1.0, 2.0]
    assert views.table(["a\u202eb"], [Column("n", [1.0])]).data()["name"].tolist() == ["a⟨U+202E⟩b"]


def test_what_is_not_known_comes_last_whichever_way_a_table_is_sorted() -> None:
    view = _table()
    assert view._order() == [0, 1, 2]
    assert view.set_state(sort="recall", rising=True)._order() == [0, 2, 1]
    assert view.set_state(sort="recall", rising=False)._order() == [2, 0, 1]
    assert view.set_state(sort="words", rising=True)._order() == [1, 0, 2]
    assert view.set_state(sort="no such column", rising=True)._order() == [0, 1, 2]


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([], [Column("n", [])], "at least one row"),
        (["a"], [], "at least one row and one column"),
        (["a"], [Column("n", [1.0, 2.0])], r"1 rows, and 2 values \(n\)"),
        (["a"], [Column("n", [1.0], said=["x", "y"])], "2 texts said"),
        (["a"], [Column("n", [1.0]), Column("n", [2.0])], "two columns have the same name"),
    ],
    ids=["rows", "columns", "values", "said", "names"],
)
def test_tables_that_cannot_be_are_refused(rows: list[str], columns: list[Column], message: str) -> None:
    with pytest.raises(ReportError, match=message):
        views.table(rows, columns)


@pytest.mark.browser
def test_headings_sort_and_rows_lead_on(page: WatchedPage, tmp_path: Path) -> None:
    report = Report("Models").add(_table(places=[None, "section-2", None])).add("Of y.", title="y")
    tab = page.open(report.write(tmp_path / "page.html"))
    tab.wait_for_selector("html[data-ready]")
    names = tab.locator(".table tbody th")
    assert names.all_inner_texts() == ["x", "y", "z"]
    loss = tab.get_by_role("button", name="loss")
    loss.click()
    assert names.all_inner_texts() == ["y", "x", "z"]  # low is good, and comes first
    assert tab.locator(".table [aria-sort]").get_attribute("aria-sort") == "ascending"
    loss.click()
    assert names.all_inner_texts() == ["z", "x", "y"]
    loss.click()
    assert names.all_inner_texts() == ["x", "y", "z"]
    tab.get_by_role("button", name="recall").click()
    assert names.all_inner_texts() == ["z", "x", "y"]
    tab.locator(".table tbody td").first.focus()
    assert "z, words" in tab.locator(".table .status").inner_text()
    tab.keyboard.press("ArrowRight")
    assert "loss: 2; one seed" in tab.locator(".table .status").inner_text()
    tab.get_by_role("button", name="y", exact=True).click()
    assert tab.locator("#section-2").evaluate("each => Math.abs(each.getBoundingClientRect().top) < innerHeight")
    page.assert_clean()
