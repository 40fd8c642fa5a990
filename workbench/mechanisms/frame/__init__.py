"""What the rooms of the mechanisms share: the place that a module is told of, its card, and where rooms are listed."""

from workbench.mechanisms.frame.card import Card, Claim
from workbench.mechanisms.frame.catalogue import Mechanisms, get, listed, named, register
from workbench.mechanisms.frame.field import field_area, receptive_field
from workbench.mechanisms.frame.gate import Gate, read_gate
from workbench.mechanisms.frame.mechanism import Mechanism
from workbench.mechanisms.frame.mixer import Mixer
from workbench.mechanisms.frame.options import check_options
from workbench.mechanisms.frame.place import Place
from workbench.mechanisms.frame.signature import Signature, at_places, by_blocks

__all__ = [
    "Card",
    "Claim",
    "Gate",
    "Mechanism",
    "Mechanisms",
    "Mixer",
    "Place",
    "Signature",
    "at_places",
    "by_blocks",
    "check_options",
    "field_area",
    "get",
    "listed",
    "named",
    "read_gate",
    "receptive_field",
    "register",
]
