"""Agent S2's mixture of grounding on generated screens: a visual, a textual and a structural expert, and who is asked.

The visual expert is V2P's pointer and knows kind and colour alone. The textual expert has what a reader makes of the
names that are written on elements, the worse the smaller they are. The structural expert has a tree of elements with
their names and exact boxes, in which texts and some others are missing. To mark a text, the textual expert finds its
first and its last word, and where each ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.analysis.grounding.clicks import regions
from workbench.mechanisms.screens.drawing import COLOURS, ELEMENTS, KINDS, LETTERS, Screens
from workbench.mechanisms.screens.pointer import CELLS, PATCHES, clicks

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


def ends(first: Tensor, last: Tensor) -> Tensor:
    """[..., 2, 2] where a mouse is pressed and let go to mark a text from one word to another, (x, y) each.

    Left of the first word and right of the last, at half height, as Agent S2's textual expert does it.

    Args:
        first, last: [..., 4] boxes (x0, y0, x1, y1) of two words.

    >>> ends(torch.tensor([10.0, 20, 40, 28]), torch.tensor([50.0, 20, 90, 28])).tolist()
    [[10.0, 24.0], [90.0, 24.0]]
    """
    press, release = torch.stack([first[..., 0], _middle(first)], -1), torch.stack([last[..., 2], _middle(last)], -1)
    return torch.stack([press, release], -2)


def _middle(box: Tensor) -> Tensor:
    return (box[..., 1] + box[..., 3]) / 2


def phrases(screens: Screens) -> tuple[Tensor, Tensor]:
    """[screen, 2] the first and the last text of each screen, from the top; [screen] whether there is a text at all."""
    place = screens.boxes[..., 1] + screens.boxes[..., 0] / 1e3
    texts = screens.kinds == KINDS.index("text")
    first, last = (place.masked_fill(~texts, end).sort(1).indices for end in (torch.inf, -torch.inf))
    return torch.stack([first[:, 0], last[:, -1]], 1), texts.any(1)


def marks(pointer: Any, asked: Requests, which: Tensor) -> tuple[Tensor, Tensor]:
    """[screen, 2, 2] the ends of a mark over texts [screen, 2], by the textual and by the visual expert.

    The one compares the words' names with what was read; the other is told kind and colour, and takes the edges of the
    brightest region.
    """
    screens, rows, found = asked.screens, torch.arange(len(asked.screens)), []
    for end in which.T:
        wanted = screens.names[rows, end]
        best = (asked.read == wanted[:, None]).float().mean(-1).argmax(1)
        seen = Screens(
            screens.pixels, screens.boxes, screens.kinds[rows, end, None], screens.colours[rows, end, None],
            screens.names,
        )  # fmt: skip
        weights = clicks(pointer, seen)[1]
        assert weights is not None
        bright = [PATCHES[regions(one, CELLS)[0]] for one in weights]
        region = torch.stack([torch.cat([one[:, :2].amin(0), one[:, 2:].amax(0)]) for one in bright])
        found.append((screens.boxes[rows, best], region))
    (read_first, seen_first), (read_last, seen_last) = found
    return ends(read_first, read_last), ends(seen_first, seen_last)


def marked(points: Tensor, screens: Screens, which: Tensor) -> Tensor:
    """[screen] whether a mark has both its words whole and no more: its ends are half a letter off at most."""
    rows, right_all = torch.arange(len(screens)), torch.ones(len(screens), dtype=torch.bool)
    for k, edge in enumerate((0, 2)):
        box, (x, y) = screens.boxes[rows, which[:, k]], points[:, k].unbind(-1)
        near = (x - box[:, edge]).abs() <= (box[:, 2] - box[:, 0]) / LETTERS / 2
        right_all &= near & (y >= box[:, 1]) & (y <= box[:, 3])
    return right_all


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
