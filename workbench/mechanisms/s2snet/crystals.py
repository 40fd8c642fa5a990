"""Toy crystals with a planted rule: what they are made of counts, and where it stands."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.kernels.checks import check_range

MASK = 95
"""The number that stands for an atom which is to be told from the others; 0 is padding."""
RULED = 29  # copper
OTHERS = (8, 26, 39, 56)  # oxygen, iron, yttrium, barium


class Crystals(NamedTuple):
    """Crystals as lists of atoms.

    Attributes:
        numbers: [crystal, atom] atomic numbers; 0 where there is no further atom.
        positions: [crystal, atom, 3], in ångström, around their common centre.
        labels: [crystal], 1 where the rule holds.
    """

    numbers: Tensor
    positions: Tensor
    labels: Tensor


def follows_rule(numbers: Tensor, positions: Tensor) -> Tensor:
    """[crystal] bool: at least two atoms are copper, and copper stands nearer to the centre than the others on average.

    The centre is that of all atoms, as the model takes it.
    """
    real, ruled = numbers > 0, numbers == RULED
    centre = (positions * real[..., None]).sum(1, keepdim=True) / real.sum(1).clamp(min=1)[:, None, None]
    radius = (positions - centre).norm(dim=-1)

    def mean(which: Tensor) -> Tensor:
        return (radius * which).sum(1) / which.sum(1).clamp(min=1)

    return (ruled.sum(1) >= 2) & (mean(ruled) < mean(real & ~ruled))


def crystals(n: int, seed: int = 0, most: int = 8) -> Crystals:
    """n random crystals, in pairs of twins with the same atoms, of which one follows the rule and one does not.

    Whoever sees the composition alone is right for one twin of each pair and wrong for the other.

    Args:
        n: even. most: atoms of a crystal, at least 5.

    Raises:
        WorkbenchError: an odd number.

    >>> found = crystals(4)
    >>> found.labels.tolist(), found.numbers[0].sort().values.equal(found.numbers[1].sort().values)
    ([1, 0, 1, 0], True)
    """
    check_range("n", n, 2, None)
    check_range("most", most, 5, None)
    if n % 2:
        raise WorkbenchError(f"n={n} crystals are no pairs of twins", hint="an even number")
    random = torch.Generator().manual_seed(seed)
    numbers, positions = torch.zeros(n, most, dtype=torch.long), torch.zeros(n, most, 3)
    for i in range(0, n, 2):
        atoms = int(torch.randint(5, most + 1, (), generator=random))
        copper = int(torch.randint(2, atoms - 1, (), generator=random))
        kinds = torch.tensor(OTHERS)[torch.randint(len(OTHERS), (atoms - copper,), generator=random)]
        made_of = torch.cat((torch.full((copper,), RULED), kinds))
        found: dict[bool, tuple[Tensor, Tensor]] = {}
        while len(found) < 2:  # a place at random follows the rule about every second time
            at = torch.randn(atoms, 3, generator=random) * 2
            at = at - at.mean(0)
            found.setdefault(bool(follows_rule(made_of[None], at[None])), (made_of, at))
        for k, holds in enumerate((True, False)):
            order = torch.randperm(atoms, generator=random)
            numbers[i + k, :atoms], positions[i + k, :atoms] = found[holds][0][order], found[holds][1][order]
    return Crystals(numbers, positions, follows_rule(numbers, positions).long())


def masked(numbers: Tensor, share: float = 0.15, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Numbers with some atoms hidden, at least one in each crystal, and which they are [crystal, atom].

    Raises:
        WorkbenchError: a share that is none.
    """
    if not 0 < share <= 1:
        raise WorkbenchError(f"share={share} is not above 0 and at most 1")
    drawn = torch.rand(numbers.shape, generator=torch.Generator().manual_seed(seed)).masked_fill(numbers == 0, 2.0)
    hidden = (drawn < share) | (drawn == drawn.amin(1, keepdim=True))
    return numbers.masked_fill(hidden, MASK), hidden
