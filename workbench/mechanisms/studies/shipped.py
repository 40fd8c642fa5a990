"""Trained models of studies as files, the runs that figures are of, and which studies there are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import FormatError, WorkbenchError, nearest
from workbench.mechanisms.studies.study import Studied, Study
from workbench.storage import files

if TYPE_CHECKING:
    import pandas as pd

FORM = "workbench.mechanism_study"
WEIGHTS = Path(__file__).parents[1] / "weights" / "studies"
RUNS = WEIGHTS.parent / "studies.json"
_STUDIES: dict[str, Study] = {}


def add(study: Study) -> Study:
    """Put a study into the list; one of each mechanism."""
    _STUDIES[study.mechanism] = study
    return study


def studies() -> dict[str, Study]:
    """All studies, by the name of the mechanism."""
    return dict(_STUDIES)


def study(mechanism: str) -> Study:
    """The study of a mechanism.

    Raises:
        WorkbenchError: there is none.
    """
    if mechanism not in _STUDIES:
        raise WorkbenchError(f'there is no study of "{mechanism}"', hint=nearest(mechanism, list(_STUDIES), "study"))
    return _STUDIES[mechanism]


def studied(mechanism: str) -> Studied:
    """The model of a mechanism that was trained on data of its own and is shipped: nothing is downloaded.

    Raises:
        WorkbenchError: there is no study of it, or its model is not shipped.

    >>> studied("csa").arm
    'both'
    """
    path = file_of(mechanism)
    if not path.is_file():
        study(mechanism)
        raise WorkbenchError(f'no model of the study of "{mechanism}" is shipped', hint="studies.run(study) trains one")
    return load(path)


def file_of(mechanism: str) -> Path:
    """Where the model of a study is kept, whether it is there or not."""
    study(mechanism)
    return WEIGHTS / f"{mechanism}.safetensors"


def save(found: Studied, path: str | Path) -> Path:
    """Write a safetensors file, weights in half precision."""
    tensors = {name: t.half() if t.is_floating_point() else t for name, t in found.model.state_dict().items()}
    header = {"mechanism": found.study.mechanism, "scores": found.scores, "facts": found.facts}
    return files.write(path, FORM, header, tensors)


def load(path: str | Path) -> Studied:
    """Read what `save` wrote.

    Raises:
        FormatError: not such a file, or one that does not fit this version.
    """
    header, tensors = files.read(path, FORM)
    try:
        found, facts = study(header["mechanism"].text()), dict(header["facts"].value)
        model = found.built(facts["arm"])
        model.load_state_dict(tensors)
        return Studied(found, model, dict(header["scores"].value), facts)
    except (WorkbenchError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise FormatError(f"{Path(path).name} holds no study of this version: {error}") from None


def read_runs() -> list[dict[str, Any]]:
    """All runs as they are kept: mechanism, arm, seed, scores and facts of each."""
    found: list[dict[str, Any]] = json.loads(RUNS.read_text(encoding="utf-8"))["runs"] if RUNS.is_file() else []
    return found


def runs() -> pd.DataFrame:
    """All runs that figures are of: mechanism, arm, seed, parameters, and the scores."""
    import pandas as pd

    told = ("mechanism", "arm", "seed", "parameters")
    return pd.DataFrame([{each: run[each] for each in told} | run["scores"] for run in read_runs()])
