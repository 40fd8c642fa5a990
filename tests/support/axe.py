"""axe-core's findings on a page: what it says of WCAG 2.2 A and AA."""

from importlib.resources import files
from importlib.util import find_spec

from playwright.sync_api import Page

from support.unavailable import unavailable

TAGS = ("wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa")


def axe_violations(page: Page) -> list[str]:
    """One line per element that breaks a rule; empty when none does."""
    if find_spec("axe_playwright_python") is None:
        unavailable("axe-core is not installed: pip install axe-playwright-python")
    # Evaluated over the browser's own channel: the page's policy allows no script but its own.
    page.evaluate(files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8"))
    # Of what breaks no rule, thousands of elements, nothing is gathered or sent here.
    run = "tags => axe.run(document, { runOnly: tags, resultTypes: ['violations'] }).then((found) => found.violations)"
    violations = page.evaluate(run, list(TAGS))
    return [
        f"{violation['id']}: {node['html'][:160]} ({node['failureSummary'][:200]})"
        for violation in violations
        for node in violation["nodes"]
    ]
