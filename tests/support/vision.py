"""timm, from a folder of its own, and the torchvision that it imports.

The torchvision there need not fit the torch at hand: its Python side describes operators of its compiled side, and
fails if that could not be loaded. No model of the tests calls them, so they get a schema here and nothing else. Other
packages, such as `transformers`, look for torchvision to use it; after the import nothing of it can be found any more.
"""

import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch

FOLDER = Path(__file__).parents[2] / ".cache" / "vision"
INSTALL = f"pip install --no-deps --target {FOLDER.relative_to(FOLDER.parents[1])} -r tests/vision.txt"

_OPERATORS = ("nms", "qnms", "roi_align", "qroi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")
_kept: list[object] = []  # a torch.library.Library takes its definitions along when it is freed


@cache
def timm() -> ModuleType:
    """The package `timm`.

    Raises:
        ModuleNotFoundError: it is not installed, neither in the environment nor in the folder.
    """
    if find_spec("timm") is not None:
        return import_module("timm")
    if not (FOLDER / "timm").exists():
        raise ModuleNotFoundError(f"timm: {INSTALL}", name="timm")
    library = torch.library.Library("torchvision", "DEF")
    for operator in _OPERATORS:
        library.define(f"{operator}(Tensor input) -> Tensor")
        library.define(f"_{operator}_backward(Tensor input) -> Tensor")
    _kept.append(library)
    sys.path.append(str(FOLDER))
    try:
        return import_module("timm")
    finally:
        sys.path.remove(str(FOLDER))
        for loaded in list(sys.modules):
            if loaded.partition(".")[0] in ("timm", "torchvision"):
                _kept.append(sys.modules.pop(loaded))


def vision_transformer() -> ModuleType:
    """The module `timm.models.vision_transformer`; raises as `timm`."""
    module: ModuleType = timm().models.vision_transformer
    return module
