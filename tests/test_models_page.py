"""docs/models.md is what its script makes of the models at hand."""

import runpy
from pathlib import Path

from support.unavailable import unavailable

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_is_what_the_script_makes() -> None:
    try:
        page = runpy.run_path(str(DOCS / "make_models.py"))["page"]()
    except ModuleNotFoundError as error:
        unavailable(str(error))
    assert page == (DOCS / "models.md").read_text(), "run docs/make_models.py"
