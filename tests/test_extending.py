"""The recipes of docs/extending.md run, from a package outside this repository."""

import os
import re
import subprocess
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"```python\n# outside/(\w+)\.py\n(.*?)```", PAGE, flags=re.DOTALL))
RUN = """
import importlib, pathlib, sys, traceback, warnings
warnings.filterwarnings("error", module="workbench$")
for name in sys.argv[1:]:
    try:
        importlib.import_module(f"outside.{name}").demonstrate(pathlib.Path.cwd())
        print("ran", name)
    except Exception:
        print("failed", name, traceback.format_exc())
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory, forked: list[str]) -> str:
    """What running all recipes in one process printed, which nothing has been added to before."""
    folder = tmp_path_factory.mktemp("extending")
    (folder / "outside").mkdir()
    (folder / "outside" / "__init__.py").touch()
    (folder / "all_recipes.py").write_text(RUN, encoding="utf-8")
    for name, text in RECIPES.items():
        (folder / "outside" / f"{name}.py").write_text(text, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(folder)}
    command = [*forked, "all_recipes", *RECIPES]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout


def test_there_is_a_recipe_for_each_thing_that_can_be_added() -> None:
    rows = re.findall(r"^\| \[[^\]]+\]\(#([\w-]+)\)", PAGE, flags=re.MULTILINE)
    heads = [head.lower().replace(" ", "-") for head in re.findall(r"^## (.+)$", PAGE, flags=re.MULTILINE)]
    assert rows == heads
    assert len(RECIPES) == len(rows) == 8


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_runs(said: str, name: str) -> None:
    assert f"ran {name}\n" in said, said
