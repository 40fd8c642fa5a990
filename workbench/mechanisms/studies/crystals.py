"""S2SNet on toy crystals: a rule of composition and geometry, and hidden atoms that are filled in before."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.capture.capture import Capture
from workbench.mechanisms.frame import Place
from workbench.mechanisms.s2snet import Crystals, S2SNet, atom_gradients, crystals, element_pairs, masked
from workbench.mechanisms.s2snet.crystals import RULED
from workbench.mechanisms.studies.exhibit import Atoms, Exhibit, Heat
from workbench.mechanisms.studies.shipped import add
from workbench.mechanisms.studies.study import Phase, Study

PLACE = Place(32, 4, 8, causal=False)
_LABELLED, _UNLABELLED, _ROWS = 192, 2048, 32
_TEST, _SEED = 512, 990_000
_NAMES = {8: "O", 26: "Fe", RULED: "Cu", 39: "Y", 56: "Ba"}


@cache
def _drawn(n: int, seed: int) -> Crystals:
    return crystals(n, seed)


class Crystalline(S2SNet):
    """S2SNet of a study; that of "composition" sees all atoms at one place."""

    def __init__(self, arm: str) -> None:
        super().__init__(PLACE, layers=2, turns=4)
        self.arm = arm

    def atoms(self, numbers: Tensor, positions: Tensor) -> Tensor:
        """[crystal, atom, d_model]: what the encoder is given."""
        return super().atoms(numbers, torch.zeros_like(positions) if self.arm == "composition" else positions)


def _batch(found: Crystals, random: torch.Generator) -> Crystals:
    which = torch.randint(len(found.labels), (_ROWS,), generator=random)
    return Crystals(*(each[which] for each in found))


def _filling(model: S2SNet, random: torch.Generator) -> Tensor:
    """Which atoms were hidden."""
    found = _batch(_drawn(_UNLABELLED, 1), random)
    hidden, which = masked(found.numbers, 0.25, int(torch.randint(2**31, (), generator=random)))
    return F.cross_entropy(model.filled(hidden, found.positions)[which], found.numbers[which])


def _telling(model: S2SNet, random: torch.Generator) -> Tensor:
    """Whether the rule holds."""
    found = _batch(_drawn(_LABELLED, 2), random)
    return F.cross_entropy(model(found.numbers, found.positions), found.labels)


def _phases(arm: str) -> list[Phase]:
    before = [Phase(300, _filling, 2e-3)] if arm == "filled in" else []
    return [*before, Phase(300, _telling, 2e-3)]


@torch.no_grad()
def _score(model: S2SNet) -> dict[str, float]:
    found, labelled = _drawn(_TEST, _SEED), _drawn(_LABELLED, 2)

    def accuracy(of: Crystals) -> float:
        return float((model(of.numbers, of.positions).argmax(-1) == of.labels).float().mean())

    hidden, which = masked(found.numbers, 0.25, 0)
    filled = model.filled(hidden, found.positions)[which].argmax(-1) == found.numbers[which]
    with torch.enable_grad():
        shares = atom_gradients(model, found.numbers, found.positions)
    ruled = found.numbers == RULED
    scores = {"accuracy": accuracy(found), "accuracy, labelled": accuracy(labelled)}
    scores["copper's share"] = float((shares * ruled).sum(1).mean())
    scores["copper's atoms"] = float((ruled.sum(1) / (found.numbers > 0).sum(1)).mean())
    return scores | ({"filled in": float(filled.float().mean())} if model_fills(model) else {})


def model_fills(model: Any) -> bool:
    """Whether it was trained to fill in hidden atoms."""
    return bool(model.arm == "filled in")


def _shown() -> Crystals:
    return crystals(4, 21)


def _exhibits(model: S2SNet, capture: Capture) -> Sequence[Exhibit]:
    shown, found = _shown(), list[Exhibit]()
    shares = atom_gradients(model, shown.numbers, shown.positions)
    with torch.no_grad():
        chance = model(shown.numbers, shown.positions).softmax(-1)[:, 1]
    first, last = (capture[f"blocks.{i}.attention"].pattern for i in (0, len(model.blocks) - 1))
    maps = first.dense().mean(1)
    for pair in range(len(shown.labels) // 2):
        panels = []
        for i, name in ((2 * pair, "follows the rule"), (2 * pair + 1, "does not")):
            n = int((shown.numbers[i] > 0).sum())
            title = f"{name}; the model says {float(chance[i]):.0%}"
            elements = [_NAMES[int(z)] for z in shown.numbers[i, :n]]
            panels.append(Atoms(title, shown.positions[i, :n], elements, shares[i, :n].detach(), maps[i, :n, :n]))
        found.append(
            Exhibit(
                f"Crystals of the same atoms, pair {pair + 1}",
                "Seen along their flattest side. Atoms are as large as the gradient of what the model says of them; "
                "lines are the strongest weights of the first layer's attention, a mean over heads. The rule: copper "
                "stands nearer to the centre than the others do. Composition alone cannot tell the two apart.",
                tuple(panels),
            )
        )
    heats = []
    for name, pattern in (("first layer", first), ("last layer", last)):
        table = element_pairs(pattern, shown.numbers)
        elements = [_NAMES[int(number)] for number in table.index]
        weights = torch.tensor(table.to_numpy(dtype=float))
        heats.append(Heat(name, weights, "element that looks", "element seen", elements, elements))
    found.append(Exhibit("Attention by element", "Mean weight of one element's atoms on another's.", tuple(heats)))
    return found


CRYSTALS = add(
    Study(
        "s2snet",
        "crystals",
        f"toy crystals of 5 to {PLACE.length} atoms, in pairs of the same atoms of which one follows a rule of "
        f"copper's distance from the centre; {_LABELLED} with labels, {_UNLABELLED} without",
        {
            "filled in": "hidden atoms are filled in before, in crystals without labels",
            "labels alone": "trained on labels alone",
            "composition": "trained on labels alone, and sees no geometry",
        },
        Crystalline,
        _phases,
        _score,
        lambda: {"numbers": _shown().numbers, "positions": _shown().positions},
        _exhibits,
    )
)
