"""Mechanisms with what was measured of them: trained heads on one input that is the same for all, scores, costs."""

from workbench.mechanisms.rooms.costs import Cost, cost_of
from workbench.mechanisms.rooms.matrix import Matrix, Measured, matrix
from workbench.mechanisms.rooms.seen import Seen, see
from workbench.mechanisms.rooms.showing import Room, names, room, show

__all__ = ["Cost", "Matrix", "Measured", "Room", "Seen", "cost_of", "matrix", "names", "room", "see", "show"]
