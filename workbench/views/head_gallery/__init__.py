"""Head gallery: a small map per head, in groups, and the chosen one large."""

from workbench.views.base.kinds import register_kind
from workbench.views.head_gallery.view import MOST, Axes, Group, HeadGallery, head_gallery

__all__ = ["MOST", "Axes", "Group", "HeadGallery", "head_gallery"]

register_kind("head_gallery", __package__)
