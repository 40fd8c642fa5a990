"""Trained models as files: weights in half precision, and what they were trained on and can do."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from workbench.errors import FormatError, WorkbenchError
from workbench.mechanisms.frame import Place
from workbench.mechanisms.training.models import ByteLM, PatchModel
from workbench.mechanisms.training.run import Trained
from workbench.storage import files

FORM = "workbench.mechanism_model"


@dataclass(frozen=True)
class TrainedModel:
    """A model and how it came about.

    Attributes:
        model: in float32. scores: as of `score_text`, `score_images` and the like, of the weights in half precision.
        facts: JSON values: work, seed, steps, rate, losses, seconds, what was read, versions.
    """

    model: ByteLM | PatchModel
    scores: dict[str, float]
    facts: dict[str, Any]

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file."""
        model = self.model
        tensors = {name: t.half() if t.is_floating_point() else t for name, t in model.state_dict().items()}
        if isinstance(model, ByteLM):
            del tensors["head.weight"]  # it is the embedding
        header = {
            "work": "images" if isinstance(model, PatchModel) else self.facts.get("work", "text"),
            "place": asdict(model.place),
            "layers": list(model.stack.layers),
            "hidden": model.stack.hidden,
            "scores": self.scores,
            "facts": self.facts,
        }
        return files.write(path, FORM, header, tensors)


def load(path: str | Path) -> TrainedModel:
    """Read what `TrainedModel.save` wrote.

    Raises:
        FormatError: not such a file, or one that does not fit this version.
    """
    header, tensors = files.read(path, FORM)
    try:
        shape, scores, facts = (dict(header[name].value) for name in ("place", "scores", "facts"))
        grid = shape.pop("grid")
        place = Place(**shape, grid=None if grid is None else tuple(grid))
        made: type[ByteLM] | type[PatchModel] = PatchModel if header["work"].value == "images" else ByteLM
        model = made(place, header["layers"].value, header["hidden"].value)
        if isinstance(model, ByteLM):
            tensors["head.weight"] = tensors["embed.weight"]
        model.load_state_dict(tensors)
    except (WorkbenchError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise FormatError(f"{Path(path).name} holds no model of this version: {error}") from None
    return TrainedModel(model.eval(), scores, facts)


def facts_of(run: Trained, **settings: Any) -> dict[str, Any]:
    """What is told of a run: its settings, its losses and the versions."""
    return {
        **settings,
        "losses": [list(each) for each in run.losses],
        "seconds": round(run.seconds, 1),
        "python": platform.python_version(),
        "torch": torch.__version__.partition("+")[0],
    }


def halve(model: ByteLM | PatchModel) -> None:
    """Give a model its weights as a file has them, rounded to half precision."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.half())
