"""Every notebook runs from top to bottom, with the sizes in its cell of parameters made small."""

import ast
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
SMALL: dict[str, dict[str, int]] = {
    "02-long-context": {"N": 4096},
    "03-heads": {"N_PROMPTS": 16, "N_ORDERS": 2, "N_EPOCHS": 3},
    "04-circuits": {"N_PROMPTS": 6, "N_DRAWS": 100, "N_HELD_OUT": 20},
    "05-cross-attention": {"N_CLIPS": 2, "N_MASKS": 100, "N_ENCODER_MASKS": 100},
    "06-capacity": {"N_PROMPTS": 12, "N_REPEATS": 3, "N_CHOICES": 6},
    "07-linear-layers": {"N_STEPS": 3},
}
"""What a test gives in place of a notebook's own parameters: the cell with the tag `parameters` says what there is."""


def parameters(notebook: Any) -> list[int]:
    """Where the cells of parameters are."""
    return [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]


def assigned(source: str) -> set[str]:
    """The names that a cell assigns."""
    return {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    small = SMALL.get(path.stem, {})
    for i in parameters(notebook):
        assert assigned(notebook.cells[i].source) == small.keys()
        made = "\n".join(f"{name} = {value}" for name, value in small.items())
        notebook.cells.insert(i + 1, nbformat.v4.new_code_cell(made))
    NotebookClient(notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


def test_there_are_notebooks_and_they_hold_no_output() -> None:
    assert NOTEBOOKS
    assert {path.stem for path in NOTEBOOKS} >= SMALL.keys()
    for path in NOTEBOOKS:
        read = nbformat.read(path, as_version=4)
        assert not any(cell.get("outputs") for cell in read.cells), f"clear the outputs of {path.name}"
        assert len(parameters(read)) == (path.stem in SMALL)
