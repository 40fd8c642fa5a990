"""S2SNet: attention over the atoms of a crystal, on toy crystals whose rule composition alone cannot tell."""

from workbench.mechanisms.s2snet.crystals import Crystals, crystals, follows_rule, masked
from workbench.mechanisms.s2snet.model import AtomAttention, S2SNet, SetReader
from workbench.mechanisms.s2snet.reading import atom_gradients, element_pairs

__all__ = [
    "AtomAttention",
    "Crystals",
    "S2SNet",
    "SetReader",
    "atom_gradients",
    "crystals",
    "element_pairs",
    "follows_rule",
    "masked",
]
