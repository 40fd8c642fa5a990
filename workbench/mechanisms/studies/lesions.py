"""MEDUSA on images with planted lesions: one body for the gates of all scales, or a body of its own at each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.capture.capture import Capture
from workbench.hooks.changes import Changes
from workbench.mechanisms.frame import Place
from workbench.mechanisms.medusa import Body, Medusa, agreement, gate_pyramid
from workbench.mechanisms.studies.exhibit import Bars, Exhibit, Heat
from workbench.mechanisms.studies.shipped import add
from workbench.mechanisms.studies.study import Phase, Study
from workbench.session.attaching import attach

SIDE, GRID, WIDTH, SCALES, CLASSES = 32, 16, 16, 3, 3
_CONTRAST = 0.55
_TEST, _SEED = 512, 99
PLACE = Place(WIDTH, 1, GRID * GRID, causal=False, grid=(GRID, GRID))


class Lesions(NamedTuple):
    """Images and what was planted.

    Attributes:
        images: [image, 1, 32, 32]. classes: [image], 0 for no lesion, 1 for a disc, 2 for a ring.
        masks: [image, 16, 16], the share of a patch that the lesion covers.
    """

    images: Tensor
    classes: Tensor
    masks: Tensor


def lesions(n: int, random: torch.Generator) -> Lesions:
    """Cloudy, noisy images with bright strokes; in two of three a faint disc or ring of 3 to 5 pixels.

    >>> found = lesions(6, torch.Generator().manual_seed(0))
    >>> found.images.shape, (found.masks.amax((1, 2)) > 0).equal(found.classes > 0)
    (torch.Size([6, 1, 32, 32]), True)
    """
    clouds = F.interpolate(torch.randn(n, 1, 4, 4, generator=random), size=SIDE, mode="bicubic", align_corners=False)
    images = 0.5 * clouds + 0.3 * torch.randn(n, 1, SIDE, SIDE, generator=random)
    row, column = torch.arange(SIDE)[:, None], torch.arange(SIDE)
    for _ in range(3):  # strokes
        at = torch.randint(2, SIDE - 8, (n, 2, 1, 1), generator=random)
        lying = torch.rand(n, 1, 1, generator=random) < 0.5
        down, across = torch.where(lying, 2, 7), torch.where(lying, 7, 2)
        inside = (row >= at[:, 0]) & (row < at[:, 0] + down) & (column >= at[:, 1]) & (column < at[:, 1] + across)
        images = images + _CONTRAST * inside[:, None]
    classes = torch.randint(0, CLASSES, (n,), generator=random)
    centre = 6 + (SIDE - 13) * torch.rand(n, 2, 1, 1, generator=random)
    radius = 3 + 2 * torch.rand(n, 1, 1, generator=random)
    away = ((row - centre[:, 0]).square() + (column - centre[:, 1]).square()).sqrt()
    kind = classes[:, None, None]
    shape = ((away <= radius) & (kind == 1)) | ((away <= radius + 0.8) & (away > radius - 1.2) & (kind == 2))
    images = images + 2 * _CONTRAST * shape[:, None]
    masks = F.avg_pool2d(((away <= radius + 0.8) & (kind > 0)).float()[:, None], SIDE // GRID)
    return Lesions(images, classes, masks[:, 0])


class Separate(Medusa):
    """Medusa with a body of its own at each scale, which sees what that scale has, and no other."""

    def __init__(self, place: Place, scales: int, width: int) -> None:
        super().__init__(place, scales, width)
        self.body = nn.Identity()  # type: ignore[assignment]
        self.bodies = nn.ModuleList(Body(place.d_model, width) for _ in range(scales))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, token, d_model] to the same shape."""
        y, image = torch.zeros_like(x), x
        for s, (join, body) in enumerate(zip(self.joins, self.bodies, strict=True)):
            here: Any = self.gates[s]
            if s:
                before: Any = self.gates[s - 1]
                image = F.relu(self.stages[s - 1](_pixels(image, before.place))).flatten(2).mT
            image = here(image, body(_pixels(image, here.place)))
            y = y + F.interpolate(_pixels(join(image), here.place), size=self.place.grid, mode="nearest").flatten(2).mT
        return y


def _pixels(x: Tensor, place: Place) -> Tensor:
    assert place.grid is not None
    return x.mT.unflatten(2, place.grid)


class Reader(nn.Module):
    """Which lesion an image has: logits [image, 3] of images [image, 1, 32, 32]."""

    def __init__(self, arm: str) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, WIDTH, 3, SIDE // GRID, 1)
        self.medusa = {
            "shared": lambda: Medusa(PLACE, SCALES, 8),
            "separate": lambda: Separate(PLACE, SCALES, 4),  # of about as many parameters
            "open": lambda: Medusa(PLACE, SCALES, 8),
        }[arm]()
        self.open, self.head = arm == "open", nn.Linear(WIDTH, CLASSES)
        if self.open:
            for gate in self.medusa.gates:
                head: Any = gate.head
                nn.init.zeros_(head[-1].weight)
                nn.init.constant_(head[-1].bias, 40.0)  # σ of which is one
                head.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [image, class]."""
        x = F.gelu(self.embed(images)).flatten(2).mT
        logits: Tensor = self.head(F.gelu(self.medusa(x)).mean(1))
        return logits


def _loss(model: Reader, random: torch.Generator) -> Tensor:
    found = lesions(32, random)
    return F.cross_entropy(model(found.images), found.classes)


@contextmanager
def told_nothing(model: Reader, scale: int) -> Iterator[None]:
    """While open, the gate of a scale is made of the mean of what the body says of all images of a batch."""

    def mean(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return given[0], given[1].mean(0, keepdim=True).expand_as(given[1])

    with Changes() as changes:
        changes.before(model.medusa.gates[scale], mean)
        yield


def inside(gates: Tensor, masks: Tensor) -> float:
    """How often a patch of the lesion has a larger factor than one outside, a mean over images; half is chance.

    Args:
        gates: [image, patch]. masks: [image, patch], above one half inside.

    >>> inside(torch.tensor([[0.1, 0.9, 0.3]]), torch.tensor([[0.0, 1.0, 0.0]]))
    1.0
    """
    found = []
    for g, mask in zip(gates, masks, strict=True):
        within, without = g[mask > 0.5], g[mask <= 0.5]
        if len(within) and len(without):
            above = (within[:, None] > without).double() + 0.5 * (within[:, None] == without).double()
            found.append(float(above.mean()))
    return sum(found) / len(found) if found else float("nan")


def gates_of(model: Reader, images: Tensor) -> list[Tensor]:
    """[image, patch] of each scale."""
    with torch.no_grad(), attach(model) as wb, wb.capture([]) as capture:
        model(images)
    patterns: list[Any] = [capture[f"medusa.gates.{s}"].pattern for s in range(SCALES)]
    return [pattern.gates.mean(1) for pattern in patterns]


@torch.no_grad()
def _score(model: Reader) -> dict[str, float]:
    found = lesions(_TEST, torch.Generator().manual_seed(_SEED))

    def accuracy() -> float:
        return float((model(found.images).argmax(-1) == found.classes).float().mean())

    scores = {"accuracy": accuracy()}
    if model.open:
        return scores
    for s, gates in enumerate(gates_of(model, found.images)):
        here: Any = model.medusa.gates[s]
        masks = F.adaptive_max_pool2d(found.masks[:, None], here.place.grid).flatten(1)
        scores[f"inside, scale {s}"] = inside(gates[found.classes > 0], masks[found.classes > 0])
        with told_nothing(model, s):
            scores[f"without, scale {s}"] = accuracy()
    return scores


def _shown() -> Lesions:
    found = lesions(24, torch.Generator().manual_seed(2))
    first = [int((found.classes == kind).nonzero()[0]) for kind in (1, 2, 0)]
    return Lesions(*(each[first] for each in found))


@torch.no_grad()
def _exhibits(model: Reader, capture: Capture) -> Sequence[Exhibit]:
    shown, names = _shown(), ("a disc", "a ring", "no lesion")
    patterns: list[Any] = [capture[f"medusa.gates.{s}"].pattern for s in range(SCALES)]
    pyramid = gate_pyramid(model.medusa, [pattern.gates for pattern in patterns])
    found = []
    for i, name in enumerate(names):
        boxes = _box(shown.masks[i])
        image = Heat("image", F.avg_pool2d(shown.images[i], SIDE // GRID)[0], boxes=boxes)
        scales = [Heat(f"gate, scale {s}", pyramid[i, s], boxes=boxes) for s in range(SCALES)]
        found.append(
            Exhibit(
                f"Gates over the image: {name}",
                "The factors of all scales laid over the image; the lesion is outlined.",
                (image, *scales),
            )
        )
    test = lesions(_TEST, torch.Generator().manual_seed(_SEED))
    alike = agreement(gate_pyramid(model.medusa, [g[:, None] for g in gates_of(model, test.images)]))
    scores = _score(model)
    without = [scores["accuracy"], *(scores[f"without, scale {s}"] for s in range(SCALES))]
    names_of = ["whole", *(f"scale {s}" for s in range(SCALES))]
    found.append(
        Exhibit(
            "What the shared body carries",
            f"Accuracy on {_TEST} new images when a scale's gate is made of the mean of what the body says of all "
            "images; and how alike the gates of two scales are, the correlation over patches.",
            (
                Bars("accuracy without the body at", names_of, {"accuracy": without}, "accuracy"),
                Heat("agreement of scales", alike, "scale", "scale"),
            ),
        )
    )
    return found


def _box(mask: Tensor) -> list[tuple[int, int, int, int]]:
    """The patches around a lesion; none without one."""
    at = (mask > 0).nonzero()
    if not len(at):
        return []
    (top, left), (bottom, right) = at.amin(0).tolist(), at.amax(0).tolist()
    return [(top, left, bottom - top + 1, right - left + 1)]


LESIONS = add(
    Study(
        "medusa",
        "lesions",
        f"cloudy images of {SIDE} × {SIDE} pixels with bright strokes: is there a faint disc, a ring, or neither? One "
        f"convolution, gates at {SCALES} scales, and a mean over patches",
        {
            "shared": "one body for the gates of all scales",
            "separate": "a smaller body of its own at each scale",
            "open": "no gates",
        },
        Reader,
        lambda arm: [Phase(350, _loss)],
        _score,
        lambda: {"images": _shown().images},
        _exhibits,
        (GRID, GRID),
    )
)
