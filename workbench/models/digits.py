"""Handwritten digits of 8 x 8 pixels, as the demonstration ViT reads them: where they come from and how they are split.

They are the test set of "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak, UCI machine learning
repository, CC BY 4.0), which scikit-learn bundles: 1797 images, each pixel a count from 0 to 16.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from workbench.errors import WorkbenchError, nearest
from workbench.storage import disk

SIDE = 16
"""Pixels along a side of what the model reads: twice those of the digits."""
N_HELD_OUT = 500
SPLIT_SEED = 20
_EXAMPLES = "examples.safetensors"


class Digits(NamedTuple):
    """Images with what they show.

    Attributes:
        pixel_values: [image, 1, 16, 16] float32 from −1 (paper) to 1 (ink), as the model takes them.
        labels: [image] int64, 0 to 9.
    """

    pixel_values: Tensor
    labels: Tensor


def to_pixels(counts: Tensor) -> Tensor:
    """Counts [image, 8, 8] from 0 to 16 as the model's input [image, 1, 16, 16], enlarged bilinearly.

    >>> to_pixels(torch.full((1, 8, 8), 16)).unique().tolist()
    [1.0]
    """
    enlarged = interpolate(counts[:, None].float() / 8 - 1, (SIDE, SIDE), mode="bilinear", align_corners=False)
    return enlarged.clamp(-1, 1)


def read_counts(path: Path | None = None) -> tuple[Tensor, Tensor]:
    """All images: counts [1797, 8, 8] uint8 and labels [1797].

    Args:
        path: the data set's own file (optdigits.tes: 64 counts and the digit on each line); None for scikit-learn's.

    Raises:
        WorkbenchError: scikit-learn is not installed, or the file is not the data set.
    """
    if path is None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise WorkbenchError(
                "the digits come with scikit-learn, which is not installed",
                hint='pip install "attention-workbench[train]"',
            ) from error
        bundled = load_digits()
        table = np.concatenate([bundled.data, bundled.target[:, None]], axis=1)
    else:
        table = np.loadtxt(path, delimiter=",", ndmin=2)
    if table.shape != (1797, 65) or table.min() < 0 or table[:, :64].max() != 16 or set(table[:, 64]) != set(range(10)):
        raise WorkbenchError("this is not the data set: 1797 rows of 64 counts up to 16 and a digit", shape=table.shape)
    whole = torch.from_numpy(table.astype(np.int64))
    return whole[:, :64].reshape(-1, 8, 8).to(torch.uint8), whole[:, 64]


def split() -> tuple[Tensor, Tensor]:
    """Row numbers of the 1297 images for training and of the 500 held out, drawn at random once and for all.

    The data do not say who wrote which image, so both parts may hold digits of one hand.
    """
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(SPLIT_SEED))
    return order[N_HELD_OUT:], order[:N_HELD_OUT]


def examples(name: str = "demo-vit") -> Digits:
    """The images that ship with a model: 40 of those held out from its training, four of each digit.

    Raises:
        WorkbenchError: no images ship with a model of that name.

    >>> images = examples("demo-vit")
    >>> list(images.pixel_values.shape), images.labels[:5].tolist()
    ([40, 1, 16, 16], [0, 1, 2, 3, 4])
    """
    from safetensors.torch import load_file

    shipped = {path.parent.name: path for path in (Path(__file__).parent / "shipped").glob(f"*/{_EXAMPLES}")}
    if name not in shipped:
        raise WorkbenchError(f"no images ship with {name!r}", hint=nearest(name, sorted(shipped), "model"))
    held = load_file(shipped[name])
    return Digits(to_pixels(held["counts"]), held["labels"])


def save_examples(folder: Path, counts: Tensor, labels: Tensor, each: int = 4) -> None:
    """Write the first `each` images of every digit beside a model, in turns of 0 to 9."""
    from safetensors.torch import save

    rows = torch.stack([(labels == digit).nonzero()[:each, 0] for digit in range(10)], dim=1).flatten()
    disk.write(folder / _EXAMPLES, save({"counts": counts[rows].contiguous(), "labels": labels[rows].contiguous()}))
