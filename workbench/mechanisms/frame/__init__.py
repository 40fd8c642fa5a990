"""What the rooms of the mechanisms share: the place that a module is told of, its card, and where rooms are listed."""

from workbench.mechanisms.frame.card import Card, Claim
from workbench.mechanisms.frame.catalogue import Mechanisms, get, listed, register
from workbench.mechanisms.frame.gate import Gate, read_gate
from workbench.mechanisms.frame.mechanism import Mechanism
from workbench.mechanisms.frame.mixer import Mixer
from workbench.mechanisms.frame.options import check_options
from workbench.mechanisms.frame.place import Place

__all__ = [
    "Card",
    "Claim",
    "Gate",
    "Mechanism",
    "Mechanisms",
    "Mixer",
    "Place",
    "check_options",
    "get",
    "listed",
    "read_gate",
    "register",
]
