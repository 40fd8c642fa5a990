"""Run timeline: what it says of a capture, the trace for Perfetto, and the view in a browser."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from playwright.sync_api import Page

import workbench
from support.browser import WatchedPage
from support.every_view import capture
from workbench.capture.capture import Capture
from workbench.capture.site_capture import Forward
from workbench.capture.timing import CallTimes
from workbench.errors import ReportError
from workbench.views import run_timeline
from workbench.views.base import modules


def timed(kernels: tuple[str, ...] = ("flash", "math"), forwards: int = 2) -> Capture:
    """Two sites a forward, forwards in turn in two threads, at 10 ms steps; times are known."""
    cap = capture(batch=2)
    made = []
    for n in range(forwards):
        sites = {}
        for i, site in enumerate(cap):
            at = 0.1 * n + 0.01 * (i + 1)
            times = CallTimes(at, at + 0.004, 0.002, 1000 * (i + 1))
            kernel = kernels[(n + i) % len(kernels)]
            sites[site.site.name] = replace(site, kernel=kernel, times=times)
        made.append(Forward(n, sites, thread=n % 2, span=(0.1 * n, 0.1 * n + 0.05)))
    return Capture(made, cap.model_sites, {"device": "cpu"})


def test_the_table_sums_per_site() -> None:
    table = run_timeline(timed()).data()
    assert table["site"].tolist() == ["transformer.h.0.attn", "transformer.h.1.attn"]
    assert table["kernel"].tolist() == ["flash, math", "math, flash"]
    assert table["calls"].tolist() == [2, 2]
    assert np.allclose(table["until seen, ms"], 8)
    assert np.allclose(table["statistics took, ms"], 4)
    assert table["bytes"].tolist() == [2000, 4000]


def test_a_real_capture_is_shown() -> None:
    view = run_timeline(capture())
    assert view.data()["calls"].tolist() == [1, 1]
    assert "host" in view.spec.notes[0]
    assert len(view.spec.notes) == 1
    assert view.to_png()[:4] == b"\x89PNG"


def test_many_kernels_share_the_last_colour() -> None:
    view = run_timeline(timed(tuple(f"kernel{i}" for i in range(9)), forwards=9))
    assert len(view.spec.facts["kernels"]) == 6
    assert view.spec.facts["kernels"][-1] == "other kernels"
    assert "4 kernels" in view.spec.notes[-1]
    view.to_png()


def test_what_is_not_known_is_said() -> None:
    cap = timed()
    first = cap.forwards[0]
    for i, (name, site) in enumerate(list(first.sites.items())):
        times = None if i else replace(site.times, entered=None) if site.times else None
        first.sites[name] = replace(site, times=times)
    cap.provenance["device"] = "cuda:0"
    notes = " ".join(run_timeline(cap).spec.notes)
    assert "GPU" in notes
    assert "1 call is a thin mark: where the module began was not seen." in notes
    assert "1 call has no times and is left out." in notes


def test_a_capture_without_times_is_refused() -> None:
    with pytest.raises(ReportError, match="does not tell when"):
        run_timeline(capture().pool())


def test_the_trace_holds_every_call() -> None:
    trace = run_timeline(timed()).chrome_trace()
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(events) == 2 + 4 + 4
    second = next(e for e in events if e["name"] == "transformer.h.1.attn" and e["tid"] == 1)
    assert (second["ts"], second["dur"]) == (pytest.approx(120_000), pytest.approx(4_000))
    assert second["args"] == {"kernel": "flash", "bytes": 2000, "entered": "seen"}
    for event in events:
        assert event["dur"] >= 0
    json.dumps(trace, allow_nan=False)


def test_threads_have_lanes_of_their_own() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = torch.nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attn(x, x, x, need_weights=False)[0]

    model = Layer().eval()
    with workbench.attach(model) as wb, wb.capture() as cap:
        for _ in range(2):
            one = threading.Thread(target=model, args=(torch.randn(1, 3, 8),))
            one.start()
            one.join()
        model(torch.randn(1, 3, 8))
    view = run_timeline(cap)
    assert len(set(view.spec.blocks["threads"].tolist())) >= 2


@pytest.mark.usefixtures("released")
def test_the_module_is_small() -> None:
    assert len(modules.live("run_timeline").encode()) < 50_000


@pytest.fixture
def tab(page: WatchedPage, tmp_path: Path) -> Page:
    run_timeline(timed()).to_html(tmp_path / "run.html")
    page.open(tmp_path / "run.html").wait_for_selector("html[data-ready]")
    return page.page


@pytest.mark.browser
def test_keys_walk_over_the_calls_and_choose_a_site(page: WatchedPage, tab: Page) -> None:
    canvas, status = tab.locator("canvas"), tab.locator(".status")
    canvas.press("ArrowRight")
    assert status.inner_text().startswith("transformer.h.1.attn, forward 0: 4 ms until seen at 24 ms")
    assert "2.0 KiB kept, math" in status.inner_text()
    canvas.press("ArrowDown")
    assert "forward 1" in status.inner_text()
    canvas.press("Enter")
    assert "s=transformer.h.0.attn" in tab.url
    for key in "wwadds":
        canvas.press(key)
    page.assert_clean()


@pytest.mark.browser
def test_a_stretch_of_time_is_summed(page: WatchedPage, tab: Page) -> None:
    canvas, sums = tab.locator("canvas"), tab.locator(".sums")
    canvas.press("Home")
    canvas.press("[")
    canvas.press("ArrowRight")
    canvas.press("]")
    assert "2 calls of 2 sites" in sums.inner_text()
    assert "8 ms until seen, statistics took 4 ms, 2.9 KiB kept" in sums.inner_text()
    box = canvas.bounding_box()
    assert box
    tab.mouse.move(box["x"] + 70, box["y"] + 60)
    tab.mouse.down()
    tab.mouse.move(box["x"] + box["width"] - 2, box["y"] + 60, steps=4)
    tab.mouse.up()
    assert "4 calls of 2 sites" in sums.inner_text()
    page.assert_clean()


@pytest.mark.browser
def test_the_file_is_the_trace_that_python_gives(page: WatchedPage, tab: Page) -> None:
    with tab.expect_download() as download:
        tab.get_by_role("button", name="Chrome trace").click()
    given = json.loads(Path(download.value.path()).read_text())
    ours = json.loads(json.dumps(run_timeline(timed()).chrome_trace()))
    timeless = {"ts": 0, "dur": 0}
    assert [e | timeless for e in given["traceEvents"]] == [e | timeless for e in ours["traceEvents"]]
    for one, other in zip(given["traceEvents"], ours["traceEvents"], strict=True):
        assert one.get("ts", 0) == pytest.approx(other.get("ts", 0), abs=2e-3)
    page.assert_clean()
