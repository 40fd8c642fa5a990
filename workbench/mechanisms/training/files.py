"""Trained models as files: weights in half precision, and what they were trained on and can do."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from workbench.errors import FormatError, WorkbenchError
from workbench.mechanisms.frame import Place
from workbench.mechanisms.training.language import ByteLM
from workbench.mechanisms.training.run import Trained
from workbench.mechanisms.training.text import Corpus
from workbench.storage import files

FORM = "workbench.mechanism_model"


@dataclass(frozen=True)
class TrainedModel:
    """A model and how it came about.

    Attributes:
        model: in float32. scores: as of `score`, of the weights in half precision.
        facts: JSON values: layers, seed, steps, rate, losses, seconds, corpus, versions.
    """

    model: ByteLM
    scores: dict[str, float]
    facts: dict[str, Any]

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file."""
        model = self.model
        shape = asdict(model.place) | {"layers": list(model.layers), "hidden": model.hidden}
        tensors = {name: t.half() if t.is_floating_point() else t for name, t in model.state_dict().items()}
        del tensors["head.weight"]  # it is the embedding
        return files.write(path, FORM, {"model": shape, "scores": self.scores, "facts": self.facts}, tensors)


def load(path: str | Path) -> TrainedModel:
    """Read what `TrainedModel.save` wrote.

    Raises:
        FormatError: not such a file, or one that does not fit this version.
    """
    header, tensors = files.read(path, FORM)
    try:
        shape, scores, facts = (dict(header[name].value) for name in ("model", "scores", "facts"))
        layers, hidden = shape.pop("layers"), shape.pop("hidden")
        grid = shape.pop("grid")
        place = Place(**shape, grid=None if grid is None else tuple(grid))
        model = ByteLM(place, layers, hidden)
        model.load_state_dict(tensors | {"head.weight": tensors["embed.weight"]})
    except (WorkbenchError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise FormatError(f"{Path(path).name} holds no model of this version: {error}") from None
    return TrainedModel(model.eval(), scores, facts)


def facts_of(source: Corpus, held: Corpus, run: Trained, **settings: Any) -> dict[str, Any]:
    """What is told of a run: its settings, its losses, the corpora and the versions."""
    return {
        **settings,
        "losses": [list(each) for each in run.losses],
        "seconds": round(run.seconds, 1),
        "corpus": {"training": source.digest, "held_out": held.digest, "python": platform.python_version()},
        "torch": torch.__version__.partition("+")[0],
    }


def halved(model: ByteLM) -> ByteLM:
    """The model with its weights as a file has them, rounded to half precision; in place."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.half())
    return model
