"""Every notebook runs, with the sizes in its cell of parameters made small, and holds what it shows."""

import ast
import re
import runpy
from pathlib import Path
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAKER = runpy.run_path(str(ROOT / "docs" / "make_notebooks.py"))
SMALL: dict[str, dict[str, int]] = {
    "02-long-context": {"N": 1024},
    "03-heads": {"N_IMAGES": 10, "N_PROMPTS": 8, "N_ORDERS": 1, "N_EPOCHS": 1},
    "04-circuits": {"N_PROMPTS": 2, "N_DRAWS": 10, "N_BOOTSTRAP": 10, "N_HELD_OUT": 4},
    "05-cross-attention": {"N_CLIPS": 2, "N_MASKS": 40, "N_ENCODER_MASKS": 40, "N_FRACTIONS": 4},
    "06-capacity": {"N_PROMPTS": 12, "N_EXAMPLES": 4, "N_REPEATS": 3, "N_CHOICES": 3},
    "07-linear-layers": {"N_STEPS": 3, "N_EPOCHS": 1},
    "09-where-it-looks": {"N_PICTURES": 4},
    "10-two-ways-of-thinking": {"N_MAZES": 12, "N_PROMPTS": 8, "N_DRAWS": 20, "N_BOOTSTRAP": 10},
    "interventions": {"N_PROMPTS": 2},
}
"""What a test gives in place of a notebook's own parameters: the cell with the tag `parameters` says what there is."""


def parameters(notebook: Any) -> list[int]:
    """Where the cells of parameters are."""
    return [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]


def assigned(source: str) -> set[str]:
    """The names that a cell assigns."""
    return {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, tmp_path: Path, forked: list[str]) -> None:
    notebook = nbformat.read(path, as_version=4)
    small = SMALL.get(path.stem, {})
    for i in parameters(notebook):
        assert assigned(notebook.cells[i].source) == small.keys()
        made = "\n".join(f"{name} = {value}" for name, value in small.items())
        notebook.cells.insert(i + 1, nbformat.v4.new_code_cell(made))
    MAKER["execute"](notebook, tmp_path, forked)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


def test_there_are_notebooks_and_each_has_its_parameters() -> None:
    assert NOTEBOOKS
    assert {path.stem for path in NOTEBOOKS} >= SMALL.keys()
    for path in NOTEBOOKS:
        assert len(parameters(nbformat.read(path, as_version=4))) == (path.stem in SMALL)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_a_notebook_shows_is_small_and_current(path: Path) -> None:
    assert (reason := MAKER["stale"](path)) is None, f"{reason}: make notebooks NOTEBOOKS={path.stem}"
    outputs = [output for cell in nbformat.read(path, as_version=4).cells for output in cell.get("outputs", [])]
    shown = [output.data for output in outputs if output.output_type != "stream"]
    assert outputs
    assert all(set(data) <= {"image/png", "text/plain"} for data in shown)
    assert max((len(data.get("image/png", "")) for data in shown), default=0) < 200_000
    assert path.stat().st_size < 600_000
    assert not re.search(r"/(tmp|home|root|work)/", path.read_text(encoding="utf-8"))


def test_another_line_of_code_or_of_drawing_makes_outputs_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = MAKER["stale"]
    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
    assert notebook.metadata.workbench.views
    path = tmp_path / "changed.ipynb"
    next(cell for cell in notebook.cells if cell.cell_type == "markdown").source += " A word."
    nbformat.write(notebook, path)
    assert stale(path) is None
    (tmp_path / "head_atlas").mkdir()
    (tmp_path / "head_atlas" / "view.py").write_text("class HeadAtlas: ...")
    monkeypatch.setitem(stale.__globals__, "VIEWS", tmp_path)
    assert "the drawing of" in stale(path)
    next(cell for cell in notebook.cells if cell.cell_type == "code").source += "\n1 + 1"
    nbformat.write(notebook, path)
    assert stale(path) == "its code is another"


def test_layout_comments_and_docstrings_do_not_make_outputs_stale(tmp_path: Path) -> None:
    bare = MAKER["_bare"]
    forms = [
        'def f(a):\n    """What."""\n    return a + 1',
        "def f(a):  # why\n\n    return (a + 1)",
        "def f(a):\n    return a",
    ]
    for i, text in enumerate(forms):
        (tmp_path / f"{i}.py").write_text(text)
    first, second, other = (bare(tmp_path / f"{i}.py") for i in range(3))
    assert first == second != other
