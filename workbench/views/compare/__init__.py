"""Compare: two patterns, atlases or matrices, and their difference."""

from workbench.views.base.kinds import register_kind
from workbench.views.compare.view import Compare, compare

__all__ = ["Compare", "compare"]

register_kind("compare", __package__)
