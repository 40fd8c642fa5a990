"""Run the notebooks and keep small pictures of what they show in them: `make notebooks`, or with names of some.

A reader of the repository then sees what a notebook gives without running it. Kept are pictures, in few colours, and
text; widgets, HTML and progress bars are not. `metadata.workbench` says of what the outputs are: a digest of the code,
and one of the drawing code of each view that is shown. A test fails where one of them is another by now.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import io
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

from workbench.views.base.few_colours import few_colours

ROOT = Path(__file__).parents[1]
VIEWS = ROOT / "workbench" / "views"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
WIDTH, COLOURS = 720, 96
"""Of a kept picture: the largest width in pixels, and how many colours it has."""
LIVE = "application/vnd.jupyter.widget-view+json"


def execute(notebook: Any, folder: Path, command: Sequence[str] = ()) -> None:
    """Run all cells in a fresh kernel that works in `folder`, however long that takes on a loaded machine.

    Args:
        command: what runs a module in the place of `python -m`.
    """
    patience = {"timeout": None, "startup_timeout": 600, "iopub_timeout": 600}
    client = NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": folder}}, **patience)
    if command:
        kernel = [*command, "ipykernel_launcher", "--ext=ipywidgets", "-f", "{connection_file}"]
        client.create_kernel_manager().kernel_spec.argv = kernel
    client.execute()


def run(path: Path) -> Any:
    """The notebook with the outputs that are kept, from a fresh kernel in a folder of its own."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        execute(notebook, Path(folder))
    shown = sorted({kind for cell in _code(notebook) for kind in kinds(cell)})
    for number, cell in enumerate(_code(notebook), start=1):
        cell.outputs = joined(kept(cell.outputs))
        cell.execution_count = number
        cell.metadata.pop("execution", None)
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = number
    notebook.metadata = {name: notebook.metadata[name] for name in ("kernelspec",)} | {
        "language_info": {"name": "python"},
        "workbench": {"code": code(notebook), "views": {kind: drawing(kind) for kind in shown}},
    }
    return notebook


def kept(outputs: list[Any]) -> Iterator[Any]:
    """What of a cell's outputs stays in the file: pictures, and text where there is no picture."""
    view = ""
    for output in outputs:
        if output.output_type == "stream":
            if output.name == "stdout":
                yield output
        elif "image/png" in output.data:
            data = {"image/png": small(output.data["image/png"]), "text/plain": view}
            yield nbformat.v4.new_output("display_data", data)
        elif LIVE in output.data:
            view = output.data["text/plain"]  # what is alive comes before its picture
        else:
            output.data = {"text/plain": output.data["text/plain"]}
            yield output


def joined(outputs: Iterator[Any]) -> list[Any]:
    """The outputs, with what was printed piece by piece in one."""
    together: list[Any] = []
    for output in outputs:
        if together and output.output_type == together[-1].output_type == "stream":
            together[-1].text += output.text
        else:
            together.append(output)
    return together


def small(png: str) -> str:
    """The picture in few pixels and colours, as base64."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    picture.thumbnail((WIDTH, 10 * WIDTH), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    few_colours(picture, COLOURS).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode("ascii")


def kinds(cell: Any) -> Iterator[str]:
    """The folders of the views that a cell shows alive, found by the names of their classes."""
    for output in cell.outputs:
        if LIVE in output.get("data", {}) and (name := re.match(r"([A-Z]\w+)\(", output.data["text/plain"])):
            yield from (file.parent.name for file in VIEWS.rglob("*.py") if f"\nclass {name[1]}(" in file.read_text())


def code(notebook: Any) -> str:
    """A digest of the code of a notebook: not of comments and layout."""
    return _digest("\0".join(ast.dump(ast.parse(cell.source)) for cell in _code(notebook)))


def drawing(kind: str) -> str:
    """A digest of the Python of a kind of view: not of comments, docstrings or layout."""
    files = sorted((VIEWS / kind).glob("*.py"))
    return _digest("\0".join(_bare(file) for file in files))


def _bare(file: Path) -> str:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            node.body = [each for each in node.body if not _is_docstring(each)]
    return ast.dump(tree)


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def stale(path: Path) -> str | None:
    """Why the outputs that a notebook holds are not those of its code and of the views; None if they are."""
    notebook = nbformat.read(path, as_version=4)
    made = notebook.metadata.get("workbench", {})
    if made.get("code") != code(notebook):
        return "its code is another"
    changed = [kind for kind, digest in made["views"].items() if digest != drawing(kind)]
    return f"the drawing of {', '.join(changed)} is another" if changed else None


if __name__ == "__main__":
    for each in NOTEBOOKS:
        if each.stem in sys.argv[1:] or not sys.argv[1:]:
            nbformat.write(run(each), each)
