"""Token strip: a text coloured by a value per token."""

from workbench.views.base.kinds import register_kind
from workbench.views.token_strip.view import TokenStrip, token_strip

__all__ = ["TokenStrip", "token_strip"]

register_kind("token_strip", __package__)
