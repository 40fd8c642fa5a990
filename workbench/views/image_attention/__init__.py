"""Image attention: what heads look at, over the images."""

from workbench.views.base.kinds import register_kind
from workbench.views.image_attention.view import ImageAttention, image_attention
from workbench.views.image_attention.windows import Windows

__all__ = ["ImageAttention", "Windows", "image_attention"]

register_kind("image_attention", __package__)
