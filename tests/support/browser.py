"""A browser page that keeps a record of what went wrong on it and of every attempt to reach the network."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Locator, Page, Playwright

from support.patience import PATIENCE

# What --disable-gpu and --no-sandbox are for: machines without a screen, and root in a container. The others stop
# Chromium's own traffic, so that a request on the record comes from the page. Pages of one context share a process.
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--no-first-run",
    "--renderer-process-limit=1",
)
_LOCAL = ("file:", "data:", "blob:", "about:")


def chromium() -> str | None:
    """The path of an installed Chromium or Chrome. Playwright's own download is not used.

    The one without windows comes first: a page takes a quarter of the processor time of one in an unseen window.
    """
    names = (
        "chromium-headless-shell", "chrome-headless-shell", "chromium", "chromium-browser", "google-chrome",
        "google-chrome-stable",
    )  # fmt: skip
    return next((path for path in map(shutil.which, names) if path), None)


def started(playwright: Playwright, path: str) -> Browser:
    """Chromium at `path`, whose pages wait for what has to come as long as a loaded machine takes."""
    browser = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS), timeout=1000 * PATIENCE)
    for name in ("new_context", "new_page"):
        setattr(browser, name, _patient(getattr(browser, name)))
    return browser


def _patient(opening: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(opening)
    def opened(**how: Any) -> Any:
        found = opening(**how)
        found.set_default_timeout(1000 * PATIENCE)
        return found

    return opened


def settled(page: Page) -> None:
    """Return when the page has drawn what it was told until now, and nothing is on its way."""
    page.evaluate(
        "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))))"
    )


LOOKS = """Object.fromEntries([...document.querySelectorAll('.workbench')].map((view, i, all) => {
  const canvases = [...view.querySelectorAll('canvas')].filter((canvas) => !canvas.closest('[hidden]'));
  const drawn = canvases.map((canvas) => canvas.toDataURL());
  const kind = view.className.split(' ')[1];
  const n = 1 + all.slice(0, i).filter((each) => each.className === view.className).length;
  return [n > 1 ? `${kind} ${n}` : kind, [view.querySelector('.body').innerHTML, ...drawn]];
}))"""
"""Kind of view, and its number where there are several -> what stands in it and what its canvases show."""


def changed(page: Page, before: dict[str, Any]) -> dict[str, Any]:
    """What the views look like once every one is another than before: a chart's cursor, or a kernel, takes a moment."""
    same: list[str] = []
    for _ in range(10 * PATIENCE):
        settled(page)
        after: dict[str, Any] = page.evaluate(LOOKS)
        same = [kind for kind in before if before[kind] == after[kind]]
        if not same:
            return after
        page.wait_for_timeout(100)
    raise AssertionError(f"these show nothing of what is chosen and set: {same}")


@dataclass
class WatchedPage:
    """A Playwright `page`, its `errors` (console errors and uncaught exceptions) and its outside `requests`."""

    page: Page
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    _handed_over: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self._record(request.url))
        self.page.on("websocket", lambda socket: self._record(socket.url))

    def _record(self, url: str) -> None:
        if not url.startswith(_LOCAL):
            self.requests.append(url)

    def open(self, path: Path) -> Page:
        """Load the file and return the Playwright page."""
        self.page.goto(path.resolve().as_uri())
        return self.page

    def file(self, button: Locator, ending: str = "") -> Path:
        """The file that a press of the button hands over, whose name there has this ending.

        Chromium drops all but ten of those of a second.
        """
        if len(self._handed_over) >= 9:
            self.page.wait_for_timeout(max(0.0, 1_100 - 1_000 * (time.monotonic() - self._handed_over[-9])))
        with self.page.expect_download() as download:
            button.press("Enter")  # a click goes to a place, where by then something else may stand
        self._handed_over.append(time.monotonic())
        assert download.value.suggested_filename.endswith(ending)
        return Path(download.value.path())

    def assert_clean(self) -> None:
        """Fail when the page logged an error or tried to reach the network."""
        assert not self.errors, f"errors on the page: {self.errors}"
        assert not self.requests, f"requests to the network: {self.requests}"
