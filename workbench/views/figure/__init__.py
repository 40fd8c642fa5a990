"""Figure: any plotly figure as a view."""

from workbench.views.base.kinds import register_kind
from workbench.views.figure.view import Click, Figure, band, columns_of_table, figure

__all__ = ["Click", "Figure", "band", "columns_of_table", "figure"]

register_kind("figure", __package__, plotly=True)
