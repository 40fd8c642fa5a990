"""Trained models as files: weights in half precision, and what they were trained on and can do."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.errors import FormatError, WorkbenchError
from workbench.mechanisms.frame import Place
from workbench.mechanisms.training.models import ByteLM, PatchModel
from workbench.mechanisms.training.run import Trained
from workbench.storage import files
from workbench.storage.parts import Part

FORM = "workbench.mechanism_model"
_MOST_LAYERS, _WIDEST, _LONGEST = 32, 512, 4096
"""Of models in files: a mechanism allocates by them before its weights are compared with the file's."""


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
        """Write a safetensors file.

        Raises:
            WorkbenchError: the model is larger than those that are read again.
        """
        model, place = self.model, self.model.place
        if len(model.stack.layers) > _MOST_LAYERS or place.d_model > _WIDEST or place.length > _LONGEST:
            raise WorkbenchError(
                f"a file holds a model of at most {_MOST_LAYERS} layers, d_model={_WIDEST} and {_LONGEST} tokens",
                hint="keep the model's state_dict() instead",
            )
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
    scores = {name: score.number() for name, score in header["scores"].items().items()}
    facts = {name: fact.plain() for name, fact in header["facts"].items().items()}
    for point in header["facts"]["losses"].list():
        step, loss = point.list(2, 2)
        step.integer(0), loss.number()
    try:
        model = _model(header, tensors)
        if isinstance(model, ByteLM):
            tensors["head.weight"] = tensors["embed.weight"]
        model.load_state_dict(tensors)
    except (WorkbenchError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise FormatError(f"{Path(path).name} holds no model of this version: {error}") from None
    return TrainedModel(model.eval(), scores, facts)


def _model(header: Part, tensors: Mapping[str, Tensor]) -> ByteLM | PatchModel:
    """The model, made once what is said of its size is seen to be that of the file's tensors."""
    layers = [layer.text() for layer in header["layers"].list(_MOST_LAYERS, 1)]
    hidden, said = header["hidden"].integer(0), header["place"]
    grid = said.get("grid")
    place = Place(
        d_model=said["d_model"].integer(1, _WIDEST),
        n_heads=said["n_heads"].integer(1, _WIDEST),
        length=said["length"].integer(1, _LONGEST),
        causal=said["causal"].flag(),
        grid=None if grid is None else tuple(side.integer(1, _LONGEST) for side in grid.list(2, 2)),  # type: ignore[arg-type]
        rotary=said["rotary"].flag(),
    )
    sizes = {"position": (place.length, place.d_model)}
    for block in range(len(layers)) if hidden else ():
        sizes[f"stack.blocks.{block}.up.weight"] = (hidden, place.d_model)
    for name, shape in sizes.items():
        if tuple(tensors[name].shape) != shape:
            raise FormatError(f"{name} has another shape than the file says", shape=tensors[name].shape)
    made: type[ByteLM] | type[PatchModel] = PatchModel if header["work"].text() == "images" else ByteLM
    return made(place, layers, hidden)


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
