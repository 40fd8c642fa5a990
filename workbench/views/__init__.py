"""Views: interactive in JupyterLab, the same on a static page. `workbench.views.<name>(...)` makes one.

Each view has `.show()`, `.to_html(path)`, `.to_png(path)`, `.data()`, and shares its selection with the others.
"""

# These register the views of results.
from workbench.views import circuits as _circuits  # noqa: F401
from workbench.views import conditioning as _conditioning  # noqa: F401
from workbench.views import importance as _importance  # noqa: F401
from workbench.views.attention_pattern import AttentionPattern, attention_pattern
from workbench.views.base import View
from workbench.views.circuit_graph import circuit_graph
from workbench.views.compare import Compare, compare
from workbench.views.cross_attention import cross_attention
from workbench.views.figure import Click, Figure, figure
from workbench.views.head_atlas import HeadAtlas, head_atlas
from workbench.views.of import of
from workbench.views.overview import overview
from workbench.views.run_timeline import RunTimeline, run_timeline
from workbench.views.saliency_map import SaliencyMap, saliency_map
from workbench.views.selection import SHARED, Selection, SharedSelection
from workbench.views.tensor_peek import TensorPeek, tensor_peek
from workbench.views.token_strip import TokenStrip, token_strip

__all__ = [
    "SHARED",
    "AttentionPattern",
    "Click",
    "Compare",
    "Figure",
    "HeadAtlas",
    "RunTimeline",
    "SaliencyMap",
    "Selection",
    "SharedSelection",
    "TensorPeek",
    "TokenStrip",
    "View",
    "attention_pattern",
    "circuit_graph",
    "compare",
    "cross_attention",
    "figure",
    "head_atlas",
    "of",
    "overview",
    "run_timeline",
    "saliency_map",
    "tensor_peek",
    "token_strip",
]
