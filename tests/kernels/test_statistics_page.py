"""docs/statistics.md is what its script makes of the records."""

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_what_the_script_makes() -> None:
    page = runpy.run_path(str(DOCS / "make_statistics.py"))["page"]()
    assert page == (DOCS / "statistics.md").read_text(), "run docs/make_statistics.py"
