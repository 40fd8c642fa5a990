"""Class semantics-based attention finds actions: generated sequences with known segments, and a weak recogniser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.capture.capture import Capture
from workbench.mechanisms.csa import ChannelGate, ClassSemanticsAttention
from workbench.mechanisms.frame import Place
from workbench.mechanisms.studies.exhibit import Exhibit, Heat, Lines
from workbench.mechanisms.studies.shipped import add
from workbench.mechanisms.studies.study import Phase, Study

TIMES, CHANNELS, CLASSES, WIDTH = 64, 12, 4, 24
_SLOTS, _SLOT = 3, 21  # segments at most, and times for each
_SCENE, _ACTION = 0.15, 0.5  # how far class directions stand out of noise of one
_TEST, _SEED = 512, 99


class Actions(NamedTuple):
    """Sequences of features, and what happens in them.

    Attributes:
        features: [sequence, time, channel]. labels: [sequence, time], 0 for nothing, else the class plus one.
        present: [sequence, class], 1 where the scene is one of that class.
    """

    features: Tensor
    labels: Tensor
    present: Tensor


def actions(n: int, random: torch.Generator) -> Actions:
    """Sequences of up to three actions of 6 to 14 times, of the one or two classes of their scene.

    A scene tells its classes faintly at every time. Bursts of two times look like actions of the other classes.

    >>> found = actions(40, torch.Generator().manual_seed(0))
    >>> found.features.shape, found.labels.unique().tolist()
    (torch.Size([40, 64, 12]), [0, 1, 2, 3, 4])
    """
    directions = F.normalize(torch.randn(2 * CLASSES, CHANNELS, generator=torch.Generator().manual_seed(3)), dim=1)
    looks, scenes = directions.split(CLASSES)
    order = torch.rand(n, CLASSES, generator=random).argsort(1)
    n_there = torch.randint(1, 3, (n, 1), generator=random)
    present = torch.zeros(n, CLASSES).scatter(1, order, (torch.arange(CLASSES) < n_there).float())
    labels, seen = torch.zeros(n, TIMES, dtype=torch.long), torch.zeros(n, TIMES, CLASSES)
    time = torch.arange(TIMES)
    for slot in range(_SLOTS):
        start = slot * _SLOT + torch.randint(0, 7, (n, 1), generator=random)
        stop = start + torch.randint(6, 15, (n, 1), generator=random)
        which = order.gather(1, torch.randint(0, 2, (n, 1), generator=random).minimum(n_there - 1))
        there = (time >= start) & (time < stop) & (torch.rand(n, 1, generator=random) < 0.75)
        labels = torch.where(there, which + 1, labels)
    seen.scatter_(2, (labels - 1).clamp(min=0)[..., None], (labels > 0).float()[..., None])
    for _ in range(4):  # what only looks like an action
        start = torch.randint(0, TIMES - 1, (n, 1), generator=random)
        which = order.gather(1, torch.randint(2, CLASSES, (n, 1), generator=random))
        burst = ((time >= start) & (time < start + 2) & (labels == 0)).float()
        seen = seen.scatter_add(2, which[:, None].expand(-1, TIMES, 1), burst[..., None])
    noise = torch.randn(n, TIMES, CHANNELS, generator=random)
    scale = CHANNELS**0.5
    features = noise + scale * (_ACTION * seen @ looks + _SCENE * (present @ scenes)[:, None])
    return Actions(features, labels, present)


class Detector(nn.Module):
    """What happens at each time: logits [sequence, time, class + 1] of features [sequence, time, channel].

    A recogniser, which is told only what is in a whole sequence, makes the class-rich features of which the gates of
    `arm` are made; those of "squeeze" are made of what they gate.
    """

    def __init__(self, arm: str) -> None:
        super().__init__()
        place = Place(WIDTH, 1, TIMES, causal=False)
        self.arm, self.enter = arm, nn.Conv1d(CHANNELS, WIDTH, 3, padding=1)
        self.recognise = nn.Conv1d(WIDTH, CLASSES, 1)
        self.attend = ClassSemanticsAttention(place, CLASSES) if arm in ("both", "channel", "time") else None
        self.squeeze = ChannelGate(place, WIDTH, "mean") if arm == "squeeze" else None
        self.find = nn.Conv1d(WIDTH, CLASSES + 1, 5, padding=2)

    def both(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of what happens, and of the classes at each time, [sequence, time, class]."""
        x = F.relu(self.enter(features.mT)).mT
        classes = self.recognise(x.mT).mT
        told = classes.detach().sigmoid()
        if self.squeeze is not None:
            x = self.squeeze(x)
        elif self.attend is not None:
            part = {"channel": self.attend.channel, "time": self.attend.time}.get(self.arm, self.attend)
            x = part(x, told)
        return self.find(x.mT).mT, classes

    def forward(self, features: Tensor) -> Tensor:
        """What happens at each time."""
        return self.both(features)[0]


def _loss(model: Detector, random: torch.Generator) -> Tensor:
    found = actions(32, random)
    logits, classes = model.both(found.features)
    pooled = classes.logsumexp(1) - torch.tensor(float(TIMES)).log()
    weak = F.binary_cross_entropy_with_logits(pooled, found.present)
    return F.cross_entropy(logits.flatten(0, 1), found.labels.flatten()) + weak


def segments(labels: Tensor) -> list[tuple[int, int, int]]:
    """(class, start, stop) of every run of one label above zero, of [time].

    >>> segments(torch.tensor([0, 2, 2, 1, 0, 1]))
    [(2, 1, 3), (1, 3, 4), (1, 5, 6)]
    """
    values, counts = torch.unique_consecutive(labels, return_counts=True)
    stops = counts.cumsum(0).tolist()
    return [(int(v), stop - int(c), stop) for v, c, stop in zip(values, counts, stops, strict=True) if v]


def found_again(given: Tensor, truth: Tensor, overlap: float = 0.5) -> float:
    """F1 of segments [sequence, time]: one is found if one of its class overlaps with it by that share of both.

    >>> found_again(torch.tensor([[0, 1, 1, 2]]), torch.tensor([[0, 1, 1, 0]]))
    0.6666666666666666
    """
    hits = made = real = 0
    for one, other in zip(given, truth, strict=True):
        mine, theirs = segments(one), segments(other)
        made, real = made + len(mine), real + len(theirs)
        hits += sum(any(_overlap(a, b) >= overlap for b in mine) for a in theirs)
    return 2 * hits / (made + real) if made + real else 1.0


def _overlap(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
    """Times of both over times of either; 0 of other classes."""
    shared = max(0, min(a[2], b[2]) - max(a[1], b[1]))
    return shared / (a[2] - a[1] + b[2] - b[1] - shared) if a[0] == b[0] else 0.0


@torch.no_grad()
def _score(model: Detector) -> dict[str, float]:
    found = actions(_TEST, torch.Generator().manual_seed(_SEED))
    logits, classes = model.both(found.features)
    given = logits.argmax(-1)
    named = ((classes.logsumexp(1) - torch.tensor(float(TIMES)).log() > 0) == found.present.bool()).float()
    return {
        "segments": found_again(given, found.labels),
        "times": float((given == found.labels).float().mean()),
        "recognised": float(named.mean()),
    }


def _shown() -> Actions:
    return actions(3, torch.Generator().manual_seed(7))


@torch.no_grad()
def _exhibits(model: Detector, capture: Capture) -> Sequence[Exhibit]:
    shown = _shown()
    logits, classes = model.both(shown.features)
    pattern: Any = capture["attend.time"].pattern
    time, lines = list(range(TIMES)), []
    for i in range(len(shown.labels)):
        spans = [(start - 0.5, stop - 0.5, f"class {kind}") for kind, start, stop in segments(shown.labels[i])]
        y: Mapping[str, Tensor] = {"time gate": pattern.gates[i, 0], "an action": 1 - logits[i].softmax(-1)[:, 0]}
        lines.append(Lines(f"sequence {i + 1}", time, y, "time", "factor, probability", spans))
    assert model.attend is not None
    by_channel, by_time = model.attend.opened_by(classes.sigmoid())
    order = by_channel.mean(0).mean(1).argsort()
    return [
        Exhibit(
            "The time gate, and where actions are",
            "Actions that were planted are shaded. The gate is made of what a recogniser says of the classes that is "
            "told only what is in a whole sequence.",
            tuple(lines),
        ),
        Exhibit(
            "Which classes open the gates",
            "Gradient times class features of the gates' logits: of each channel, sorted, and over time, sequence 1.",
            (
                Heat("channel gate", by_channel.mean(0)[order], "channel", "class"),
                Heat("time gate", by_time[0].T, "class", "time"),
            ),
        ),
    ]


ACTIONS = add(
    Study(
        "csa",
        "actions",
        f"sequences of {TIMES} times with up to three actions of {CLASSES} classes, and bursts that look like "
        "them; one convolution, the gates, and one that says what happens",
        {
            "both": "gates over channels and time from class semantics",
            "none": "no attention",
            "squeeze": "squeeze-and-excitation",
            "channel": "the gate over channels alone",
            "time": "the gate over time alone",
        },
        Detector,
        lambda arm: [Phase(300, _loss)],
        _score,
        lambda: {"features": _shown().features},
        _exhibits,
    )
)
