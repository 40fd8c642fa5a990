"""How the views fare in a browser, against BertViz and CircuitsVis: time to the drawn page, hover to repaint, bytes.

The same maps go to each tool: one layer of twelve heads over N tokens, causal, of random peaked weights. Each page is
opened from disk with the network off in headless Chromium; BertViz's requirejs, d3 and jQuery stand inlined instead of
coming from a CDN, which is to its advantage. Then the goals of docs/views.md on larger fixtures. Times are of a browser
that draws in software: ratios and orders of magnitude mean something. Writes its section of docs/benchmarks.md.

    python benchmarks/views.py [--lengths 64 128 256 512] [--rounds 5]
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from playwright.sync_api import Browser, Page, TimeoutError, sync_playwright
from shared import peers
from shared.measuring import machine, peak_above, say, table, write_section

import workbench
from workbench import views
from workbench.kernels.masks import causal
from workbench.kernels.patterns import Pattern
from workbench.kernels.softmax import SoftmaxPattern

HEADING = "Views in a browser"
HEADS = 12
PATIENCE = 60  # seconds that a page may take
HOVERS = 50
WALL = "Wall: 32 x 32 heads, 512 tokens"
TOOLS = ("workbench", "bertviz", "circuitsvis")
_FRAME = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done())))"
_SCROLL = """async () => {
  const frame = () => new Promise(requestAnimationFrame);
  const gaps = [];
  let last = await frame();
  for (let y = 0; y < document.documentElement.scrollHeight - innerHeight; y += 120) {
    scrollTo(0, y);
    const now = await frame();
    gaps.push(now - last);
    last = now;
  }
  return gaps;
}"""
_JS = {"d3": "5.16.0", "jquery": "3.7.1"}


@dataclass
class Seen:
    """One page in a browser: seconds to drawn, 95th percentile of hover to repaint (ms), nodes, heap, bytes."""

    seconds: float
    hover: float
    nodes: int
    heap: float
    size: int


@dataclass
class Drawn:
    """Selectors: what is there once a tool has drawn, and where its tokens or cells are."""

    ready: str
    target: str


DRAWN = {
    "workbench": Drawn("html[data-ready]:not(:has([aria-busy=true]))", ".workbench canvas"),
    "bertviz": Drawn("svg line", "svg"),
    "circuitsvis": Drawn(":is(canvas, img, table)", "[id^=circuits-vis]"),
}


def peaked(heads: int, n: int) -> torch.Tensor:
    """[head, query, key] of peaked random rows that sum to 1."""
    scores = 3 * torch.randn(heads, n, n, generator=torch.Generator().manual_seed(0))
    return scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


def _script(name: str) -> str:
    """A library of BertViz's from npm, once."""
    folder = peers.FOLDER / "js" / name
    if not folder.exists():
        with tempfile.TemporaryDirectory() as there:
            command = ["npm", "pack", f"{name}@{_JS[name]}", "--silent", "--pack-destination", there]
            packed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
            with tarfile.open(Path(there) / packed) as archive:
                archive.extractall(folder, filter="data")
    return (folder / "package" / "dist" / f"{name}.min.js").read_text(encoding="utf-8")


def page_of(tool: str, weights: torch.Tensor, tokens: list[str], path: Path) -> Path:
    """The page that a tool makes of [head, query, key] weights."""
    if tool == "workbench":
        views.attention_pattern(weights, tokens=tokens, heads=range(len(weights))).to_html(path)
        return path
    sys.path.append(str(peers.FOLDER))
    if tool == "bertviz":
        from bertviz.head_view import head_view

        inner = head_view([weights[None]], tokens, html_action="return", prettify_tokens=False).data
        shim = "window.requirejs = window.require = (names, run) => run(jQuery, d3); require.config = () => {};"
        libraries = "".join(f"<script>{text}</script>" for text in (_script("jquery"), _script("d3"), shim))
        inner = libraries + inner[inner.index("</script>") + 9 :]  # without the loader from the CDN
    else:
        from circuitsvis.attention import attention_heads

        inner = attention_heads(attention=weights, tokens=tokens).local_src
    path.write_text(f'<!doctype html><meta charset="utf-8"><title>{tool}</title><body>{inner}', encoding="utf-8")
    return path


@contextmanager
def opened(browser: Browser, path: Path, ready: str) -> Iterator[tuple[Page, float]]:
    """The page once it is drawn, and the seconds that this took; `TimeoutError` after `PATIENCE`."""
    context = browser.new_context(offline=True, viewport={"width": 1280, "height": 800})
    page = context.new_page()
    page.set_default_timeout(1000 * PATIENCE)
    start = time.perf_counter()
    page.goto(path.as_uri(), wait_until="commit")
    page.wait_for_selector(ready, state="attached")
    page.evaluate(_FRAME)
    yield page, time.perf_counter() - start
    context.close()


def hovered(page: Page, target: str) -> float:
    """95th percentile of milliseconds from a move of the pointer to the frame after the next."""
    box = page.locator(target).first.bounding_box() or {"x": 0, "y": 0, "width": 100, "height": 100}
    found = []
    for i in range(HOVERS):
        x = box["x"] + box["width"] * (0.3 + 0.6 * ((i * 7) % HOVERS) / HOVERS)
        y = box["y"] + min(box["height"], 600) * (0.3 + 0.6 * i / HOVERS)
        start = time.perf_counter()
        page.mouse.move(x, y)
        page.evaluate(_FRAME)
        found.append(1000 * (time.perf_counter() - start))
    return statistics.quantiles(found, n=20)[-1]


def scrolled(page: Page) -> float:
    """The longest frame in milliseconds while the page is scrolled to its end, by a notch of a wheel in each."""
    gaps: list[float] = page.evaluate(_SCROLL)
    page.evaluate("scrollTo(0, 0)")
    return max(gaps, default=0.0)


def measure(browser: Browser, path: Path, drawn: Drawn) -> Seen | None:
    """One page, once; None when it is not drawn in time."""
    try:
        with opened(browser, path, drawn.ready) as (page, seconds):
            nodes = page.evaluate("document.querySelectorAll('*').length")
            heap = page.evaluate("performance.memory.usedJSHeapSize") / 1e6
            return Seen(seconds, hovered(page, drawn.target), nodes, heap, path.stat().st_size)
    except TimeoutError:
        return None


def median(runs: list[Seen | None]) -> Seen | None:
    """Each figure's median; None when any run failed."""
    whole = [run for run in runs if run is not None]
    if len(whole) < len(runs):
        return None
    pick: Callable[[str], Any] = lambda name: statistics.median(getattr(run, name) for run in whole)  # noqa: E731
    return Seen(pick("seconds"), pick("hover"), int(pick("nodes")), pick("heap"), int(pick("size")))


def against_peers(browser: Browser, lengths: list[int], rounds: int, folder: Path) -> str:
    """The table of all tools at all lengths."""
    rows = []
    for n in lengths:
        weights, tokens = peaked(HEADS, n), [f"tok{i}" for i in range(n)]
        files = {tool: page_of(tool, weights, tokens, folder / f"{tool}-{n}.html") for tool in TOOLS}
        runs: dict[str, list[Seen | None]] = {tool: [] for tool in TOOLS}
        for turn in range(rounds):
            for tool in TOOLS if turn % 2 == 0 else TOOLS[::-1]:
                if None in runs[tool]:
                    continue  # it would only time out again
                runs[tool].append(measure(browser, files[tool], DRAWN[tool]))
                say(f"N = {n}, {tool}: {runs[tool][-1]}")
        ours = median(runs["workbench"])
        for tool in TOOLS:
            seen = median(runs[tool])
            if seen is None or ours is None:
                rows.append([f"{n:,}", tool, f"not drawn in {PATIENCE} s", "", "", "", ""])
                continue
            ratio = "1" if tool == "workbench" else f"{seen.seconds / ours.seconds:.1f}"
            figures = [f"{seen.seconds:.2f}", ratio, f"{seen.hover:.0f}", f"{seen.nodes:,}", f"{seen.size / 1e6:.2f}"]
            rows.append([f"{n:,}", tool, *figures])
    return table(["N", "tool", "drawn (s)", "over ours", "hover p95 (ms)", "DOM nodes", "page (MB)"], rows)


def long_pattern(n: int) -> Pattern:
    """One causal head over n tokens from random queries and keys; never held whole."""
    made = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, n, 64, generator=made) for _ in range(2))
    return SoftmaxPattern(2 * q, k, causal(n))


def model_capture(n: int, layers: int = 12, heads: int = 12) -> Any:
    """A capture of a random model over n tokens, by default with GPT-2 small's number of heads."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=layers, n_head=heads, n_embd=16 * heads, n_positions=n, vocab_size=512)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "c_attn.weight" in name:
                parameter.mul_(12)
    names = ("entropy", "sink", "previous", "distance")
    with workbench.attach(model) as wb, torch.inference_mode(), wb.capture(names) as capture:
        model(torch.randint(0, 512, (1, n)))
    return capture


def goals(browser: Browser, rounds: int, folder: Path) -> str:
    """The table of our own pages: S and M of a whole model, L and XL of one head."""
    fixtures: dict[str, Callable[[], Any]] = {
        "S: 12 x 12 heads, 64 tokens": lambda: views.attention_pattern(model_capture(64)),
        "M: 12 x 12 heads, 512 tokens": lambda: views.attention_pattern(model_capture(512)),
        "L: one head, 4,096 tokens": lambda: views.attention_pattern(long_pattern(4096)),
        "XL: one head, 32,768 tokens": lambda: views.attention_pattern(long_pattern(32768)),
        WALL: lambda: views.head_gallery(model_capture(512, 32, 32)),
    }
    rows = []
    for name, build in fixtures.items():
        path = folder / f"{name.split(':')[0]}.html"
        start = time.perf_counter()
        peak, _ = peak_above(lambda build=build, path=path: build().to_html(path))
        made = time.perf_counter() - start
        seen = median([measure(browser, path, DRAWN["workbench"]) for _ in range(rounds)])
        say(f"{name}: {seen}, {peak / 1e6:.0f} MB")
        if seen is None:
            raise SystemExit(f"{name} was not drawn")
        figures = [f"{seen.seconds:.2f}", f"{seen.hover:.0f}", f"{seen.nodes:,}", f"{seen.heap:.0f}"]
        rows.append([name, *figures, f"{seen.size / 1e6:.2f}", f"{made:.1f}", f"{peak / 1e6:.0f}"])
    header = ["page", "drawn (s)", "hover p95 (ms)", "DOM nodes", "JS heap (MB)", "page (MB)", "made in (s)"]
    return table([*header, "made with (MB)"], rows)


def scrolling(browser: Browser, rounds: int, folder: Path) -> str:
    """The wall of heads while it is scrolled, as it stands first and in the order of a statistic."""
    path = folder / f"{WALL.split(':')[0]}.html"
    rows = []
    for order in ("", "Entropy"):
        longest = []
        for _ in range(rounds):
            with opened(browser, path, DRAWN["workbench"].ready) as (page, _seconds):
                if order:
                    page.get_by_label("Order by").select_option(order)
                    page.evaluate(_FRAME)
                longest.append(scrolled(page))
        say(f"scrolling the wall, {order or 'layer by layer'}: {longest}")
        rows.append([order or "layer by layer", f"{statistics.median(longest):.0f}", f"{max(longest):.0f}"])
    return table(["wall in the order of", "longest frame (ms)", "in the worst run"], rows)


def main() -> None:
    """Measure and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None or shutil.which("npm") is None or not peers.FOLDER.exists():
        return say("left out: Chromium, npm or the peers are missing; `make bench` installs the peers")
    arguments = ["--no-sandbox", "--disable-gpu", "--enable-precise-memory-info"]
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as there:
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        compared = against_peers(browser, chosen.lengths, chosen.rounds, Path(there))
        own = goals(browser, chosen.rounds, Path(there))
        wall = scrolling(browser, chosen.rounds, Path(there))
        browser.close()
    text = f"""`python benchmarks/views.py`: one layer of {HEADS} heads over N tokens in headless Chromium that draws in
software, network off. BertViz's `head_view` with its libraries inlined, CircuitsVis' `attention_heads`, our
`attention_pattern`; the same weights.

{compared}

Our own pages of whole models and long inputs; "made" is the time, and the memory above what was held, of making the
capture and the page.

{own}

The wall of heads while it is scrolled from its top to its end, 120 pixels a frame:

{wall}

Median of {chosen.rounds} loads, interleaved in both orders. {machine("plotly")}"""
    write_section(HEADING, text)


if __name__ == "__main__":
    main()
