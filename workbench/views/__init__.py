"""Views: interactive in JupyterLab, the same on a static page. `workbench.views.<name>(...)` makes one.

Each view has `.show()`, `.to_html(path)`, `.to_png(path)`, `.data()`, and shares its selection with the others.
"""

from workbench.views import results as _results  # noqa: F401 (registers the views of results)
from workbench.views.attention_pattern import AttentionPattern, attention_pattern
from workbench.views.base import page as page
from workbench.views.base.kinds import register_kind
from workbench.views.base.registry import all_of, of, page_of, register
from workbench.views.base.selection import SHARED, Selection, SharedSelection
from workbench.views.base.spec import ViewSpec
from workbench.views.base.view import View
from workbench.views.capacity_curves import CapacityCurves, capacity_curves
from workbench.views.circuit_graph import CircuitGraph, OverlapGraph, circuit_graph, overlap_graph
from workbench.views.compare import Compare, compare
from workbench.views.conditioning_curves import ConditioningCurves, conditioning_curves
from workbench.views.figure import Click, Figure, figure
from workbench.views.grounding import GroundingView, grounding
from workbench.views.head_atlas import HeadAtlas, head_atlas
from workbench.views.head_gallery import Axes, Group, HeadGallery, head_gallery
from workbench.views.head_page import HeadPage, head
from workbench.views.image_attention import ImageAttention, Windows, image_attention
from workbench.views.overlap_matrix import OverlapMatrix, overlap_matrix
from workbench.views.playground import Ablated, Playground, playground
from workbench.views.results import (
    capacity_correlation,
    cross_attention,
    half_lives,
    overlap_chance,
    overview,
    states,
)
from workbench.views.run_timeline import RunTimeline, run_timeline
from workbench.views.saliency_map import SaliencyMap, saliency_map
from workbench.views.table import Column, Table, table
from workbench.views.tensor_peek import TensorPeek, tensor_peek
from workbench.views.token_strip import TokenStrip, token_strip
from workbench.views.what_if import WhatIf, what_if

__all__ = [
    "SHARED",
    "Ablated",
    "AttentionPattern",
    "Axes",
    "CapacityCurves",
    "CircuitGraph",
    "Click",
    "Column",
    "Compare",
    "ConditioningCurves",
    "Figure",
    "GroundingView",
    "Group",
    "HeadAtlas",
    "HeadGallery",
    "HeadPage",
    "ImageAttention",
    "OverlapGraph",
    "OverlapMatrix",
    "Playground",
    "RunTimeline",
    "SaliencyMap",
    "Selection",
    "SharedSelection",
    "Table",
    "TensorPeek",
    "TokenStrip",
    "View",
    "ViewSpec",
    "WhatIf",
    "Windows",
    "all_of",
    "attention_pattern",
    "capacity_correlation",
    "capacity_curves",
    "circuit_graph",
    "compare",
    "conditioning_curves",
    "cross_attention",
    "figure",
    "grounding",
    "half_lives",
    "head",
    "head_atlas",
    "head_gallery",
    "image_attention",
    "of",
    "overlap_chance",
    "overlap_graph",
    "overlap_matrix",
    "overview",
    "page_of",
    "playground",
    "register",
    "register_kind",
    "run_timeline",
    "saliency_map",
    "states",
    "table",
    "tensor_peek",
    "token_strip",
    "what_if",
]
