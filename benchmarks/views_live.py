"""How long JupyterLab takes: from a click to Python, and from a press in a playground to the new probabilities.

A notebook with a head atlas runs in a JupyterLab of its own; heads are clicked, and the clocks of the browser and of
the kernel, which are one machine's, are compared. In a second one heads of a playground are ablated and put back, over
a model of GPT-2's size with random weights, and the time until the table of tokens is another is compared with that of
two forwards of the bare model in the same kernel. Writes its section of docs/benchmarks.md.

    python benchmarks/views_live.py [--clicks 50] [--presses 20]
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
from playwright.sync_api import Page, sync_playwright
from shared.measuring import machine, say, write_section

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from support.jupyterlab import jupyterlab, open_notebook, run_all

HEADING = "Views in JupyterLab"
_KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}
_ATLAS = """
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
_PLAYGROUND = """
import json, statistics, time
import torch
from transformers import GPT2Config, GPT2LMHeadModel
import workbench
_, tokenizer = workbench.models.load("demo-lm")
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config()).eval()
wb = workbench.attach(model, tokenizer)
prompt = workbench.tasks.induction(1, seed=0)[0].prompt
while wb.tokenize(prompt)["input_ids"].shape[1] < 100:
    prompt += prompt
inputs = wb.tokenize(prompt)
def twice():
    start = time.perf_counter()
    with torch.no_grad():
        model(**inputs)
        model(**inputs)
    return 1000 * (time.perf_counter() - start)
twice()
with open("forwards.json", "w") as file:
    json.dump([inputs["input_ids"].shape[1], statistics.median(twice() for _ in range(9))], file)
workbench.views.playground(wb, prompt)
"""
_WATCH = """() => {
  window.pressed = []; window.drawn = [];
  const table = document.querySelector('.workbench.playground .next .wide');
  new MutationObserver(() => window.drawn.push(performance.now())).observe(table, { childList: true });
  document.addEventListener('pointerup', () => window.pressed.push(performance.now()), true);
}"""


def atlas(page: Page, folder: Path, clicks: int) -> list[float]:
    """Milliseconds from a click on a head to a callback in Python."""
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
    heard = [json.loads(line)[0] for line in (folder / "heard.txt").read_text().splitlines()]
    if len(heard) != len(sent):
        raise SystemExit(f"{len(sent)} clicks, {len(heard)} heard")
    return [there - here for here, there in zip(sent, heard, strict=True)]


def playground(page: Page, folder: Path, presses: int) -> tuple[list[float], int, float]:
    """Milliseconds from a press to new probabilities; the tokens of the prompt, and the time of two bare forwards."""
    canvas = page.locator(".workbench.playground .matrix canvas").first
    canvas.wait_for()
    page.get_by_label("Pressing ablates").check()
    page.wait_for_timeout(1000)
    page.evaluate(_WATCH)
    data = canvas.evaluate("canvas => ({ ...canvas.dataset })")
    left, top, width, height = (float(data[name]) for name in ("left", "top", "cell", "height"))
    took = []
    for i in range(presses):
        place = {"x": left + (i // 2 % 12 + 0.5) * width, "y": top + (5 * (i // 2) % 12 + 0.5) * height}
        n_edits = page.locator(".workbench.playground .edits bdi").count()
        canvas.click(position=place)  # every second press puts back what the one before took out
        page.wait_for_function(f"document.querySelectorAll('.workbench.playground .edits bdi').length !== {n_edits}")
        took.append(page.evaluate("() => window.drawn.at(-1) - window.pressed.at(-1)"))
        page.wait_for_timeout(200)
    tokens, forwards = json.loads((folder / "forwards.json").read_text())
    return took, tokens, forwards


def main() -> None:
    """Measure and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clicks", type=int, default=50)
    parser.add_argument("--presses", type=int, default=20)
    asked = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        return say("left out: Chromium is missing")
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryDirectory() as home,
        sync_playwright() as playwright,
    ):
        for name, cell in (("atlas", _ATLAS), ("playground", _PLAYGROUND)):
            cells = [nbformat.v4.new_code_cell(cell.strip())]
            notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": _KERNEL})
            nbformat.write(notebook, Path(folder) / f"{name}.ipynb")
        with jupyterlab(Path(folder), Path(home)) as address:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])

            def opened(name: str) -> Page:
                page = browser.new_page(viewport={"width": 1280, "height": 1600})
                open_notebook(page, address, f"{name}.ipynb")
                run_all(page)
                return page

            took = atlas(opened("atlas"), Path(folder), asked.clicks)
            pressed, tokens, forwards = playground(opened("playground"), Path(folder), asked.presses)
            browser.close()
    p95, slowest = (statistics.quantiles(found, n=20)[-1] for found in (took, pressed))
    write_section(
        HEADING,
        f"""`python benchmarks/views_live.py`: {asked.clicks} clicks on a head atlas; milliseconds from the click to a
callback in Python: median {statistics.median(took):.0f}, 95th percentile {p95:.0f}. The goal is below 250.

{asked.presses} presses in a playground over random weights of GPT-2's size and {tokens} tokens; milliseconds
from the press to the new probabilities: median {statistics.median(pressed):.0f}, 95th percentile {slowest:.0f}. Two
forwards of the bare model in the same kernel take {forwards:.0f}. The goal is these and 300 more.

{machine("anywidget", "jupyterlab")}""",
    )


if __name__ == "__main__":
    main()
