"""Head atlas: layers down, heads across, one number each."""

from workbench.views.base.kinds import register_kind
from workbench.views.head_atlas.view import HeadAtlas, group_label, head_atlas

__all__ = ["HeadAtlas", "group_label", "head_atlas"]

register_kind("head_atlas", __package__)
