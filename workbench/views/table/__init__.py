"""Table: named rows, numbers shaded column by column, to sort and to walk over."""

from workbench.views.base.kinds import register_kind
from workbench.views.table.view import Column, Table, table

__all__ = ["Column", "Table", "table"]

register_kind("table", __package__)
