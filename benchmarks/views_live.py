"""How long a click in JupyterLab takes to reach Python: from the browser's event to a callback in the kernel.

A notebook with a head atlas runs in a JupyterLab of its own; heads are clicked, and the clocks of the browser and of
the kernel, which are one machine's, are compared. Writes its section of docs/benchmarks.md.

    python benchmarks/views_live.py [--clicks 50]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import nbformat
from playwright.sync_api import sync_playwright
from shared.measuring import machine, say, write_section

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from support.jupyterlab import jupyterlab, open_notebook, run_all

HEADING = "Views in JupyterLab"
_KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}
_CELL = """
import json, time
import numpy as np
from workbench import views
atlas = views.head_atlas({"score": np.random.default_rng(0).random((12, 12))})
def heard(selection):
    with open("heard.txt", "a") as file:
        file.write(json.dumps([time.time() * 1000, selection.layer, list(selection.heads)]) + "\\n")
atlas.on_select(heard)
atlas
"""


def main() -> None:
    """Measure and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clicks", type=int, default=50)
    clicks = parser.parse_args().clicks
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        return say("left out: Chromium is missing")
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryDirectory() as home,
        sync_playwright() as playwright,
    ):
        cells = [nbformat.v4.new_code_cell(_CELL.strip())]
        notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": _KERNEL})
        nbformat.write(notebook, Path(folder) / "atlas.ipynb")
        with jupyterlab(Path(folder), Path(home)) as address:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 1600})
            open_notebook(page, address, "atlas.ipynb")
            run_all(page)
            canvas = page.locator(".workbench.head_atlas canvas").first
            canvas.wait_for()
            page.wait_for_timeout(1000)
            page.evaluate(
                """() => { window.clicked = [];
                  document.addEventListener('pointerup', () => window.clicked.push(Date.now()), true); }"""
            )
            data = canvas.evaluate("canvas => ({ ...canvas.dataset })")
            left, top, width, height = (float(data[name]) for name in ("left", "top", "width", "height"))
            for i in range(clicks):
                row, column = i % 12, (5 * i + i // 12) % 12
                canvas.click(position={"x": left + (column + 0.5) * width, "y": top + (row + 0.5) * height})
                page.wait_for_timeout(150)
            sent = page.evaluate("() => window.clicked")
            browser.close()
        heard = [json.loads(line)[0] for line in (Path(folder) / "heard.txt").read_text().splitlines()]
    if len(heard) != len(sent):
        raise SystemExit(f"{len(sent)} clicks, {len(heard)} heard")
    took = [there - here for here, there in zip(sent, heard, strict=True)]
    p95 = statistics.quantiles(took, n=20)[-1]
    write_section(
        HEADING,
        f"""`python benchmarks/views_live.py`: {clicks} clicks on a head atlas; milliseconds from the click to a
callback in Python: median {statistics.median(took):.0f}, 95th percentile {p95:.0f}. The goal is below 250.

{machine("anywidget", "jupyterlab")}""",
    )


if __name__ == "__main__":
    main()
