"""The rules for imports hold, and their check sees what breaks them."""

import ast
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ABOVE = ("cli", "demo", "gallery", "report", "views")  # rooms that may use the public names


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the package's sources, with `kernels` and `hooks` where they are installed."""
    ignored = shutil.ignore_patterns("__pycache__", "shipped", "assets", "node_modules")
    shutil.copytree(ROOT / "workbench", tmp_path / "workbench", ignore=ignored)
    for folder in ("kernels", "hooks"):
        shutil.copytree(ROOT / folder, tmp_path / "workbench" / folder, ignore=ignored)
    return tmp_path


def _lint(tree: Path) -> tuple[int, str]:
    """Exit status and output of the import linter on a tree."""
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", code, "--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    environment = os.environ | {"PYTHONPATH": str(tree), "COLUMNS": "300"}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_the_rules_hold(tree: Path) -> None:
    status, said = _lint(tree)
    assert status == 0, said
    assert "0 broken" in said


BROKEN = {
    "the whole package from below": ("kernels/checks.py", "def f():\n    import workbench\n    return workbench.views"),
    "a public name from below": ("analysis/statistics/__init__.py", "from workbench import attach"),
    "a room above": ("storage/files.py", "def f():\n    from workbench.views import page\n    return page"),
    "the views from an analysis": ("analysis/profile/result.py", "from workbench.views import of"),
    "a circle": ("errors.py", "def f():\n    from workbench import tokens\n    return tokens"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_forbidden_import_is_seen(tree: Path, case: str) -> None:
    file, line = BROKEN[case]
    target = tree / "workbench" / file
    target.write_text(target.read_text(encoding="utf-8") + f"\n\n{line}\n", encoding="utf-8")
    status, said = _lint(tree)
    module = "workbench." + file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    assert status == 1, said
    assert module in said or "No cycles" in said


def test_no_module_below_the_views_imports_by_name_what_the_linter_cannot_see() -> None:
    """`import_module` with a name of this package is an import that no linter sees."""
    found = []
    for folder in ("workbench", "kernels", "hooks"):
        for path in (ROOT / folder).rglob("*.py"):
            place = path.relative_to(ROOT)
            if place.parts[:2] in {("workbench", room) for room in ABOVE} or place == Path("workbench/__init__.py"):
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                called = isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__"))
                if called and any("workbench" in ast.unparse(argument) for argument in node.args):
                    found.append(f"{place}:{node.lineno}")
    assert not found


def test_the_drawing_of_the_rooms_is_what_its_script_makes() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "make_architecture.py"))
    assert script["page"]() == (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"), (
        "run docs/make_architecture.py"
    )


def test_rooms_that_import_each_other_have_no_floors() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "make_architecture.py"))
    assert script["floors"]({"a": set(), "b": {"a"}, "c": {"a", "b"}}) == [["a"], ["b"], ["c"]]
    with pytest.raises(ValueError, match="circle: b, c"):
        script["floors"]({"a": set(), "b": {"a", "c"}, "c": {"b"}})
