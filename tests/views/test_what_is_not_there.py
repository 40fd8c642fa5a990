"""Addresses that name what no view has: every view stays what it is, draws itself, and says nothing that is not so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from playwright.sync_api import Page

from support.browser import LOOKS, WatchedPage, settled
from support.every_view import FORMS, SETTING, VIEWS, made, page_of
from workbench.views.base.kinds import kind_of

NOWHERE = ["L99H7,q=99999,k=99999,t=99999,x=99", "s=nowhere,L0H99,q=0", "7.L1H1,3.q=2", "L1H2+99+2+99", "L0H0+0+0"]
NONSENSE: list[Any] = [None, -1, 2, 1e9, "nonsense", "", [], [99, 99], [0], {}, {"n": -5, "rule": "none"}, True]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with all kinds of views, and all forms."""
    return page_of([*VIEWS, *FORMS], tmp_path_factory.mktemp("page") / "all.html")


def opened(watched: WatchedPage, file: Path, address: str = "") -> Page:
    tab = watched.page
    tab.goto("about:blank")
    tab.goto(f"{file.as_uri()}#{address}")
    tab.wait_for_selector("html[data-ready]")
    settled(tab)
    return tab


@pytest.mark.browser
def test_a_selection_that_no_view_has_changes_no_view(page: WatchedPage, whole: Path) -> None:
    before = opened(page, whole).evaluate(LOOKS)
    for address in NOWHERE[:2]:
        after = opened(page, whole, address).evaluate(LOOKS)
        # What is chosen is listed by number in an atlas, which has no such head either.
        assert [name for name in before if before[name][1:] != after[name][1:]] == [], address
    for address in NOWHERE[2:]:
        opened(page, whole, address)
    page.assert_clean()


@pytest.mark.browser
def test_settings_that_no_view_has_leave_it_whole(page: WatchedPage, whole: Path) -> None:
    names = [*VIEWS, *FORMS]
    having = [i for i, name in enumerate(names) if name in SETTING]
    for value in NONSENSE:
        states = {}
        for i in having:
            properties = kind_of(made(names[i]).spec.kind).schema["properties"]["state"]["properties"]
            states[i] = dict.fromkeys(properties, value)
        address = ",".join(f"view-{i}={quote(json.dumps(state))}" for i, state in states.items())
        tab = opened(page, whole, address)
        assert tab.get_by_text("could not be drawn").count() == 0, value
        seen = tab.locator(".workbench").all_inner_texts()
        assert len(seen) == len(names)
        assert not [text for text in seen if "NaN" in text or "undefined" in text or "Infinity" in text], value
        page.assert_clean()
