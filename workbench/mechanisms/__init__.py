"""Mechanisms of papers, each a module in the place of self-attention, with its map and a card that says what it is.

Every file of this folder is one of them and ends in `register(Mechanism(…))`; what they share is in `frame/`.
`training/` puts any of them into the same small model, `studies/` trains some on data of their own kind, and `weights/`
has models that were trained so. `matvlm/` makes a Mamba-2 layer of a trained attention layer, distils it, and compares
the maps of both.

>>> from workbench import mechanisms
>>> "agent" in mechanisms.list().names
True
>>> mechanisms.get("agent").card.arxiv
'2312.08874'
"""

from workbench.mechanisms.frame import (
    Card,
    Claim,
    Gate,
    Mechanism,
    Mechanisms,
    Mixer,
    Place,
    Signature,
    field_area,
    get,
    read_gate,
    receptive_field,
    register,
)
from workbench.mechanisms.frame import listed as list
from workbench.mechanisms.matvlm import seed_mamba2
from workbench.mechanisms.rooms import Room, room, show
from workbench.mechanisms.studies import runs as study_runs
from workbench.mechanisms.studies import studied
from workbench.mechanisms.training import trained, trained_models

__all__ = [
    "Card",
    "Claim",
    "Gate",
    "Mechanism",
    "Mechanisms",
    "Mixer",
    "Place",
    "Room",
    "Signature",
    "field_area",
    "get",
    "list",
    "read_gate",
    "receptive_field",
    "register",
    "room",
    "seed_mamba2",
    "show",
    "studied",
    "study_runs",
    "trained",
    "trained_models",
]
