"""The trained models that are shipped, and how every run went that figures are of.

All of one work had the same data, budget and number of parameters; `benchmarks/rooms.py` makes them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import WorkbenchError, nearest
from workbench.mechanisms.training.files import TrainedModel, load
from workbench.mechanisms.training.work import PLACES, check_work

if TYPE_CHECKING:
    import pandas as pd

WEIGHTS = Path(__file__).parents[1] / "weights"
RUNS = WEIGHTS / "runs.json"


def trained(name: str, work: str = "text") -> TrainedModel:
    """A small model with a mechanism in every layer, trained and shipped: nothing is downloaded.

    Args:
        name: of the mechanism, with a variant behind a colon: "moh", "sqa:mha" (plain attention). work: what it was
            trained on, "text" or "images"; of other works none are shipped.

    Returns:
        The model in eval mode, its scores, and facts, whose "losses" are the (step, loss) of its training.

    Raises:
        WorkbenchError: no such work, or no model of this name; the hint says what there is.

    >>> found = trained("sqa:mha")
    >>> found.model.stack.layers
    ('sqa:mha', 'sqa:mha', 'sqa:mha')
    """
    check_work(work)
    known = {each: [one for one, of in _shipped() if of == each] for each in PLACES}
    if name not in known[work]:
        elsewhere = [each for each, names in known.items() if name in names]
        hint = f'work="{elsewhere[0]}"' if elsewhere else nearest(name, known[work], "model")
        raise WorkbenchError(
            f'no model of "{name}" trained on {work} is shipped',
            hint=f"{hint}; mechanisms.trained_models() lists all, python -m workbench.mechanisms.training trains one",
        )
    return load(file_of(name, work))


def trained_models() -> pd.DataFrame:
    """What `trained` takes: a row for each model, with its work, parameters, steps and scores."""
    import pandas as pd

    rows = []
    for name, work in _shipped():
        found = load(file_of(name, work))
        facts = {each: found.facts[each] for each in ("parameters", "steps", "rows")}
        rows.append({"work": work, "name": name, **facts, **found.scores})
    return pd.DataFrame(rows)


def runs() -> pd.DataFrame:
    """All runs that the figures are of, with those of other seeds and layouts, which are not shipped.

    Returns:
        A row for each: work, name, layout, hidden (width of the MLPs), parameters, seed, and the scores.
    """
    import pandas as pd

    told = ("work", "name", "layout", "hidden", "parameters", "seed")
    return pd.DataFrame([{each: run[each] for each in told} | run["scores"] for run in read_runs()])


def read_runs() -> list[dict[str, Any]]:
    """The runs as they are kept, with all that was measured of each."""
    found: list[dict[str, Any]] = json.loads(RUNS.read_text(encoding="utf-8")) if RUNS.is_file() else []
    return found


def file_of(name: str, work: str) -> Path:
    """Where the model of that name is kept, whether it is there or not."""
    plain = name.replace(":", "-").replace(" ", "-")
    return WEIGHTS / work / f"{plain}.safetensors"


def _shipped() -> list[tuple[str, str]]:
    """(name, work) of all, those of text first."""
    listed = {(run["name"], run["work"]) for run in read_runs()}
    return sorted((each for each in listed if file_of(*each).is_file()), key=lambda each: (each[1] != "text", each[0]))
