"""Agent S2's mixture of grounding on generated screens: a visual, a textual and a structural expert, and who is asked.

The visual expert is V2P's pointer and knows kind and colour alone. The textual expert has what a reader makes of the
names that are written on elements, the worse the smaller they are. The structural expert has a tree of elements with
their names and exact boxes, in which texts and some others are missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.mechanisms.screens.drawing import COLOURS, ELEMENTS, KINDS, LETTERS, Screens
from workbench.mechanisms.screens.pointer import clicks

EXPERTS = ("visual", "textual", "structural")
_GIVEN = 0.7  # how often a request says kind and colour, and how often the name
_IN_TREE = 0.8  # of buttons and fields
_MISREAD = 2.5  # over the height in pixels: how often a letter is taken for another one
FEATURES = (
    "kind and colour are given",
    "the name is given",
    "the name is in the tree",
    "letters that fit the best word",
)


@dataclass(frozen=True)
class Requests:
    """What is asked of experts, and what they have to find it by.

    Attributes:
        described, named: [screen] whether kind and colour, and whether the name, are given; one of them at least.
        read: [screen, element, letter] what a reader makes of the names. in_tree: [screen, element].
    """

    screens: Screens
    described: Tensor
    named: Tensor
    read: Tensor
    in_tree: Tensor


def request(screens: Screens, random: torch.Generator) -> Requests:
    """Requests for the first element of each screen."""
    n = len(screens)
    described, named = (torch.rand(2, n, generator=random) < _GIVEN).unbind()
    either = torch.rand(n, generator=random) < 0.5
    described, named = described | (~named & either), named | (~described & ~either)
    height = screens.boxes[..., 3] - screens.boxes[..., 1]
    wrong = torch.rand(n, ELEMENTS, LETTERS, generator=random) < (_MISREAD / height).clamp(max=0.9)[..., None]
    read = torch.where(wrong, (26 * torch.rand(wrong.shape, generator=random)).long(), screens.names)
    in_tree = (screens.kinds < KINDS.index("text")) & (torch.rand(n, ELEMENTS, generator=random) < _IN_TREE)
    return Requests(screens, described, named, read, in_tree)


def answer(pointer: Any, asked: Requests, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """[screen, expert, 2] where each expert clicks, and [screen, feature] what is known of a request before.

    An expert that is given nothing that it could look for takes an element, or a kind and colour, at random.
    """
    screens, n = asked.screens, len(asked.screens)
    guess = (len(KINDS) * len(COLOURS) * torch.rand(n, generator=random)).long()
    kinds = torch.where(asked.described, screens.kinds[:, 0], guess // len(COLOURS))
    colours = torch.where(asked.described, screens.colours[:, 0], guess % len(COLOURS))
    seen = Screens(screens.pixels, screens.boxes, kinds[:, None], colours[:, None], screens.names)
    visual, _ = clicks(pointer, seen)  # `asked` is that of the only element
    middles = (screens.boxes[..., :2] + screens.boxes[..., 2:]) / 2
    chance = torch.rand(n, ELEMENTS, generator=random)
    fits = (asked.read == screens.names[:, :1]).float().mean(-1)
    best = torch.where(asked.named[:, None], fits + 1e-3 * chance, chance).argmax(1)
    textual = middles[torch.arange(n), best]
    exact = (screens.names == screens.names[:, :1]).all(-1) & asked.in_tree & asked.named[:, None]
    node = (2.0 * exact + asked.in_tree + 0.5 * chance).argmax(1)
    structural = middles[torch.arange(n), node]
    known = torch.stack([asked.described, asked.named, exact.any(1), fits.amax(1) * asked.named], -1).float()
    return torch.stack([visual, textual, structural], 1), known


def right(points: Tensor, screens: Screens) -> Tensor:
    """[screen, expert] whether clicks land in the box that was asked for."""
    box = screens.boxes[:, :1]
    return ((points >= box[..., :2]) & (points <= box[..., 2:])).all(-1)


def by_action(known: Tensor) -> Tensor:
    """[screen] which expert the request itself names, as Agent S2's worker does by its action: a name in the tree is
    set there, another name is read, and what has none is looked for."""
    described, named, in_tree = (known[:, k] > 0 for k in range(3))
    return torch.where(named & in_tree, 2, torch.where(named & ~described, 1, torch.where(described, 0, 1)))


def fit_router(known: Tensor, hits: Tensor, steps: int = 300) -> nn.Module:
    """A linear router that is trained on which experts were right: [screen, feature] -> logits of each being right."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(len(FEATURES), 16), nn.ReLU(), nn.Linear(16, len(EXPERTS)))
    optimiser = torch.optim.Adam(model.parameters(), 2e-2)
    for _ in range(steps):
        loss = F.binary_cross_entropy_with_logits(model(known), hits.float())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model
