"""Circuit graph: the nodes and edges of one circuit, or what two circuits share."""

from workbench.views.base.kinds import register_kind
from workbench.views.circuit_graph.overlap import OverlapGraph, overlap_graph
from workbench.views.circuit_graph.view import CircuitGraph, PinnedView, circuit_graph, pins_of

__all__ = ["CircuitGraph", "OverlapGraph", "PinnedView", "circuit_graph", "overlap_graph", "pins_of"]

register_kind("circuit_graph", __package__)
