"""Every interval and p-value that the package makes is simulated, and stands on the page of simulations."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType

import workbench
from workbench.analysis.statistics import intervals, p_values

ROOT = Path(__file__).parents[2]
PACKAGE = Path(inspect.getfile(workbench)).parent
HOMES = {f"workbench.analysis.statistics.{home.__name__.rpartition('.')[2]}": home for home in (intervals, p_values)}
# Which examples are drawn, how many carry a mean, and how intervals are told.
NO_INTERVAL = {"draws", "halves", "effective_examples", "carried_by_few", "without_interval", "bracketed"}
# What makes intervals besides, so that none grows outside of their home.
ELSEWHERE = re.compile(r"\.ppf\(|n?an?quantile\(|percentile\(|bootstrap\(|1\.96|scipy\.stats import (?!.*rankdata)")


def printed() -> ModuleType:
    spec = importlib.util.spec_from_file_location("printed", ROOT / "benchmarks" / "simulated" / "printed.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def makes_intervals() -> set[tuple[str, str]]:
    """(function of a home, module) of all imports in the package."""
    found = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in HOMES:
                module = ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
                found |= {(name.name, module) for name in node.names if name.name not in NO_INTERVAL}
    return found


def test_every_interval_and_p_value_has_a_row() -> None:
    assert makes_intervals() == set(printed().PRINTED)
    made = {
        name
        for home in HOMES.values()
        for name, function in vars(home).items()
        if inspect.isfunction(function) and function.__module__ == home.__name__ and not name.startswith("_")
    }
    assert made - NO_INTERVAL == {function for function, _ in printed().PRINTED}


def test_the_page_has_the_rows() -> None:
    page = (ROOT / "docs" / "simulations.md").read_text()
    rows = {line.split("|")[1].strip() for line in page.splitlines() if line.startswith("|")}
    wanted = [names for _, names in printed().PRINTED.values()] + list(printed().OTHERS.values())
    assert {name for names in wanted for name in names} <= rows
    for (function, module), _ in printed().PRINTED.items():
        assert f"`{module}`, `{function}`" in page


def test_what_the_page_says_holds() -> None:
    """p is at most .05 in at most .07 of the pairs that share nothing; intervals hold the truth in at least .9."""
    page = (ROOT / "docs" / "simulations.md").read_text()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    p_values = [row for row in cells if len(row) == 9 and row[0].endswith(("renamed", "degrees"))]
    assert len(p_values) > 20
    alone = [row for row in p_values if not row[1].startswith("shared")]
    assert all(float(row[5]) >= 0.9 for row in p_values if row not in alone)
    for row in alone:
        assert row[0].endswith("degrees") or float(row[5]) <= 0.07, row
    by_degrees = [float(row[5]) for row in alone if row[0].endswith("degrees")]  # of fewer pairs each
    assert sum(by_degrees) / len(by_degrees) <= 0.07
    covered = [row for row in cells if len(row) == 6 and row[4].startswith(("0.", "1."))]
    assert len(covered) > 40
    for row in covered:
        assert float(row[4]) >= 0.9, row


def test_what_few_examples_carry_is_seldom_given_an_interval_that_is_wrong() -> None:
    page = (ROOT / "docs" / "simulations.md").read_text()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    rows = [(row[0], int(row[1]), *map(float, row[2:])) for row in cells if len(row) == 5 and row[1].isdigit()]
    light = ("normal", "uniform", "square of uniform: mass, entropy", "Student's t, 5 degrees")
    assert {row[0] for row in rows} > set(light)
    for of, n, _, none, wrong in rows:
        if of in light:
            assert none <= (0.05 if n >= 24 else 0.1), (of, n)
        if n >= 24 and not (of.startswith("normal, 5%") and n < 60):  # 3 in n
            assert wrong <= 0.11, (of, n)
    assert any(held < 0.6 and none > 0.9 for _, _, held, none, _ in rows)


def test_no_interval_grows_outside_of_its_home() -> None:
    for file in (PACKAGE / "analysis").rglob("*.py"):
        if file.parent.name != "statistics":
            found = [line for line in file.read_text().splitlines() if ELSEWHERE.search(line)]
            assert not found, f"{file.name}: {found[0]}"
