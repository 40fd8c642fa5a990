"""Modules joined into one: what stands in for the imports, what cannot be joined, and the smaller form of a release."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.browser import WatchedPage
from workbench import ReportError
from workbench.report import check
from workbench.views import register_kind, token_strip
from workbench.views.base import kinds, modules

RENDER = "export function render() {}\n"


@pytest.fixture
def joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Joins a kind that has these files."""

    def join(text: str, **others: str) -> str:
        for name, content in {"own": text, **others}.items():
            (tmp_path / f"{name}.js").write_bytes(content.encode())
        (tmp_path / "own.schema.json").write_text("{}")
        register_kind("own", tmp_path)
        return modules.live("own")

    with monkeypatch.context() as patched:
        patched.setattr(kinds, "_KINDS", dict(kinds._KINDS))
        yield join
    modules.live.cache_clear()
    modules.later.cache_clear()
    modules._chunk.cache_clear()


def run(page: WatchedPage, module: str, expression: str) -> Any:
    page.page.set_content("<!doctype html><html lang=en><title>joined</title></html>")
    code = module.replace("export default", "const { render } =", 1)
    page.page.add_script_tag(content=f"globalThis.found = (() => {{ {code}\n return {expression}; }})();")
    return page.page.evaluate("found")


@pytest.mark.browser
def test_files_keep_their_names_to_themselves(joined: Callable[..., str], page: WatchedPage) -> None:
    found = joined(
        'import { value as first, Thing } from "./a.js";\nimport {\n  value,\n} from "./b.js";\nconst own = 1;\n'
        "export function render() {\n  return [own, first, value, new Thing().own];\n}\n",
        a='const own = 2;\nexport const value = own * 10; // "export "\nexport class Thing {\n  own = 5;\n}\n',
        b='import { value as a } from "./a.js";\nlet own = a + 1;\nexport const value = own;\n',
    )
    assert run(page, found, "render()") == [1, 20, 21, 5]
    assert found.count("const own = 2;") == 1  # imported twice, there once
    page.assert_clean()


LATER = {
    "text": 'import { own } from "./a.js";\nexport async function render() {\n'
    '  const { late } = await import("./b.js");\n  return late + own;\n}\n',
    "a": "export const own = 10;\n",
    "b": 'import { own } from "./a.js";\nimport { half } from "./c.js";\nexport const late = own * half;\n',
    "c": "export const half = 0.5;\n",
}
KERNEL = """
  const heard = new Set(), asked = [];
  const bytes = new TextEncoder().encode(HANDED);
  const model = {
    on: (_, call) => heard.add(call),
    off: (_, call) => heard.delete(call),
    send: ({ ask, name, number }) => {
      asked.push([ask, name]);
      for (const call of heard) queueMicrotask(() => call({ number }, [new DataView(bytes.buffer)]));
    },
  };
"""


@pytest.mark.browser
def test_what_is_wanted_later_comes_from_the_kernel_once(joined: Callable[..., str], page: WatchedPage) -> None:
    found = joined(**LATER)
    handed = modules.later("own", "own:/b.js")
    assert ["half = 0.5" in text for text in (found, handed)] == [False, True]
    assert ["own = 10" in text for text in (found, handed)] == [True, False]  # which the widget has
    code = f"{found}\n{KERNEL.replace('HANDED', json.dumps(handed))}"
    told = run(
        page, code, "Promise.all([render({ model }), render({ model })]).then((got) => [got, asked, heard.size])"
    )
    assert told == [[15, 15], [["module", "own:/b.js"]], 0]
    page.assert_clean()


def test_a_page_has_what_is_wanted_later(joined: Callable[..., str]) -> None:
    joined(**LATER)
    text = modules.static(["own"])
    places = [text.index(part) for part in ("own = 10", "half = 0.5", "late = own", ".draw({")]
    assert places == sorted(places)
    assert 'await modules.later("own:/b.js")' in text


@pytest.mark.parametrize("name", ["own:/a.js", "own:/own.js", "shared/frame.js", "", "../../x"])
def test_nothing_else_is_handed_over(joined: Callable[..., str], name: str) -> None:
    joined(**LATER)
    with pytest.raises(ReportError, match="asks for no module"):
        modules.later("own", name)


def test_line_ends_of_windows_make_no_difference(joined: Callable[..., str]) -> None:
    found = joined('import { a } from "./a.js";\r\n\r\nexport function render() {}\r\n', a="export const a = 1;\r\n")
    assert "\r" not in found
    assert "import" not in found


@pytest.mark.parametrize(
    "line",
    [
        'import a from "./a.js";',
        'import * as a from "./a.js";',
        'import "./a.js";',
        'export { a } from "./a.js";',
        "export default 1;",
        "import { a } from './a.js';",
    ],
)
def test_other_forms_are_refused_not_guessed(joined: Callable[..., str], line: str) -> None:
    with pytest.raises(ReportError, match="cannot be joined"):
        joined(f"{line}\n{RENDER}", a="export const a = 1;\n")


@pytest.mark.parametrize(
    "specifier",
    [
        "https://example.org/a.js",
        "d3",
        "../a.js",
        "/a.js",
        "./sub/a.js",
        "workbench/../a.js",
        "workbench/a.json",
        "./a",
    ],
)
def test_nothing_is_loaded_from_elsewhere(joined: Callable[..., str], specifier: str) -> None:
    with pytest.raises(ReportError, match="imports") as raised:
        joined(f'import {{ a }} from "{specifier}";\n{RENDER}')
    assert "workbench/shared/frame.js" in str(raised.value.hint)


def test_a_file_that_is_not_there_is_named(joined: Callable[..., str]) -> None:
    with pytest.raises(ReportError, match=r'imports "\./gone\.js", which is not there'):
        joined(f'import {{ a }} from "./gone.js";\n{RENDER}')


def test_a_circle_is_named(joined: Callable[..., str]) -> None:
    with pytest.raises(ReportError, match=r"circle: own:/own\.js → own:/a\.js → own:/b\.js → own:/a\.js"):
        joined(
            f'import {{ a }} from "./a.js";\n{RENDER}',
            a='import { b } from "./b.js";\nexport const a = 1;\n',
            b='import { a } from "./a.js";\nexport const b = 1;\n',
        )


@pytest.mark.parametrize("text", ["</script>", "</SCRIPT", "<!-- a"])
def test_a_module_cannot_end_its_script(joined: Callable[..., str], text: str) -> None:
    with pytest.raises(ReportError, match="would end its script"):
        joined(f'{RENDER}export const a = "{text}";\n')


@pytest.mark.browser
def test_a_release_draws_and_passes_the_check_of_a_checkout(
    page: WatchedPage, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    strip = token_strip(["a", "b"], [0.1, 0.9], title="Tokens")
    whole = strip.to_html()
    assert isinstance(whole, str)
    request.getfixturevalue("released")
    path = strip.to_html(tmp_path / "page.html")
    assert len(Path(path).read_text()) < len(whole) - 10_000
    (tmp_path / "checkout.html").write_text(whole)
    assert check(tmp_path / "checkout.html") == []
    assert check(path) == []
    page.open(Path(path)).wait_for_selector("html[data-ready]")
    page.page.locator("[data-at='1']").click()
    assert page.page.evaluate("location.hash") == "#q=1,t=1"
    page.assert_clean()


def test_a_file_that_was_changed_since_a_release_is_taken_itself(
    release: dict[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    modules._chunk.cache_clear()
    stale = {name: {**each, "source": "of another text"} for name, each in release.items()}
    monkeypatch.setattr(modules, "_released", lambda: stale)
    assert modules.static(["token_strip"]) == modules.static(["token_strip"], minified=False)
    modules._chunk.cache_clear()
