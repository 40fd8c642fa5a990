"""A result and a view of one's own, from a package outside this one: in a notebook, on a page, in a report."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from support.browser import WatchedPage
from workbench import Report, ReportError, views
from workbench.report import check
from workbench.views.base import kinds, modules

PYTHON = """
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from workbench.storage.result import Result
from workbench.views import View, ViewSpec, register, register_kind

register_kind("counted_words", __package__)


@dataclass(frozen=True)
class Counts(Result):
    form: ClassVar[str] = "outside.counts"
    words: list[str]
    counts: list[int]
    provenance: Any

    @property
    def table(self):
        return pd.DataFrame({"word": self.words, "count": self.counts})


class CountedWords(View):
    def picture(self, figure):
        panel = figure.subplots()
        panel.bar(range(len(self.spec.blocks["counts"])), self.spec.blocks["counts"])


def counted_words(found):
    return CountedWords(
        ViewSpec(
            kind="counted_words",
            title="Counted words",
            caption="How often each word stands there.",
            facts={"words": list(found.words)},
            blocks={"counts": np.array(found.counts, np.uint32)},
            table={"word": list(found.words), "count": np.array(found.counts)},
        )
    )


register(Counts, counted_words)
"""
MODULE = """\
// Counted words: a button for each.

import { make } from "workbench/shared/dom.js";
import { open } from "workbench/shared/frame.js";
import { said as sentence } from "./words.js";

export async function render({ model, el }) {
  const frame = await open({ model, el });
  const { data } = frame.blocks.counts;
  const buttons = frame.facts.words.map((word, i) => make("button", { class: "counted" }, sentence(word, data[i])));
  buttons.forEach((button, token) => button.addEventListener("click", () => frame.select({ token })));
  frame.body.append(...buttons);
  frame.onSelect(({ token }) => buttons.forEach((button, i) => button.setAttribute("aria-pressed", `${i === token}`)));
  return () => frame.close();
}
"""
NEIGHBOUR = "export const said = (word, n) => `${word}: ${n} times`;\n"
SCHEMA = {
    "type": "object",
    "title": "Counted words",
    "properties": {
        "facts": {"type": "object", "properties": {"words": {"type": "array"}}, "required": ["words"]},
        "blocks": {"type": "object", "properties": {"counts": {"const": {"dtype": "u4", "axes": 1}}}},
    },
}
STYLE = ".workbench .counted {\n  letter-spacing: 3px;\n}\n"
FILES = {
    "__init__.py": PYTHON,
    "counted_words.js": MODULE,
    "words.js": NEIGHBOUR,
    "counted_words.schema.json": json.dumps(SCHEMA),
    "counted_words.css": STYLE,
}


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A package outside ours."""
    folder = tmp_path / "outside_views"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    with monkeypatch.context() as patched:
        patched.syspath_prepend(tmp_path)
        patched.setattr(kinds, "_KINDS", dict(kinds._KINDS))
        yield importlib.import_module("outside_views")
    del sys.modules["outside_views"]
    modules.live.cache_clear()
    modules._chunk.cache_clear()


@pytest.fixture
def counts(outside: ModuleType) -> Any:
    return outside.Counts(["one", "<script>two"], [3, 1], {"seed": 0})


@pytest.mark.browser
def test_it_draws_on_a_page_that_passes_its_check(counts: Any, page: WatchedPage, tmp_path: Path) -> None:
    path = counts.to_html(tmp_path / "page.html")
    assert check(path) == []
    page.open(path).wait_for_selector("html[data-ready]")
    buttons = page.page.locator(".workbench .counted")
    assert buttons.all_inner_texts() == ["one: 3 times", "<script>two: 1 times"]
    assert buttons.first.evaluate("each => getComputedStyle(each).letterSpacing") == "3px"
    buttons.nth(1).click()
    assert buttons.nth(1).get_attribute("aria-pressed") == "true"
    assert page.page.evaluate("location.hash") == "#t=1"
    page.assert_clean()


@pytest.mark.browser
def test_it_stands_in_a_report_beside_others(counts: Any, page: WatchedPage, tmp_path: Path) -> None:
    strip = views.token_strip(["one", "two"], [0.1, 0.9], title="Tokens")
    path = Report("Words").add(counts).add(strip).write(tmp_path / "report.html")
    assert check(path) == []
    page.open(path).wait_for_selector("html[data-ready]")
    page.page.locator(".counted").nth(1).click()
    assert page.page.locator(".strip [aria-selected=true]").get_attribute("data-at") == "1"
    page.assert_clean()


@pytest.mark.browser
def test_it_lives_in_a_notebook(counts: Any, page: WatchedPage) -> None:
    widget = counts.view().widget
    assert ".counted" in widget._css
    spec = json.dumps(counts.view().spec.to_static())
    code = widget._esm.replace("export default", "const { render } =")
    page.page.set_content("<!doctype html><html lang=en><title>live</title><body></body>")
    model = """{ get: (name) => values[name], set: (name, value) => { values[name] = value; sent.push(name); },
                 save_changes() {}, on() {}, off() {}, send() {} }"""
    values = f"const values = {{ spec: {spec}, selection: {{}}, still: [], live: true, state: {{}} }};".replace(
        "<", "\\u003c"
    )
    drawn = f"render({{ model: {model}, el: document.body }});"
    page.page.add_script_tag(content=f"(() => {{ {code}\n globalThis.sent = []; {values} {drawn} }})();")
    page.page.locator(".counted").nth(1).click()
    assert "selection" in page.page.evaluate("sent")
    page.assert_clean()


def test_results_of_a_subclass_are_shown_alike_until_they_have_a_view(outside: ModuleType) -> None:
    class More(outside.Counts):  # type: ignore[misc, name-defined]
        pass

    more = More(["a"], [1], {})
    assert more.view().spec.kind == "counted_words"
    views.register(More, lambda found: views.token_strip(found.words, found.counts, title="Words"), lambda found: [])
    assert [view.spec.kind for view in views.all_of(more)] == ["token_strip"]
    assert outside.Counts(["a"], [1], {}).view().spec.kind == "counted_words"


def test_a_kind_that_is_wrong_is_refused(outside: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    folder.mkdir()
    for name in ("counted_words.js", "counted_words.schema.json"):
        (folder / name).write_text(FILES[name])
    with pytest.raises(ReportError, match="there is a kind 'counted_words' already"):
        views.register_kind("counted_words", folder)
    with pytest.raises(ReportError, match=r"has no nothing\.js"):
        views.register_kind("nothing", tmp_path)
    with pytest.raises(ReportError, match="cannot be the name"):
        views.register_kind("no-name", tmp_path)
    with pytest.raises(ReportError, match="there is no view 'counted_word'") as raised:
        views.ViewSpec(kind="counted_word", title="a", caption="b")
    assert "counted_words" in str(raised.value.hint)
    assert views.register_kind("counted_words", "outside_views").name == "counted_words"  # again the same: fine
