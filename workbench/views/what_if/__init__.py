"""What if: a form of changes to a model, and what they do."""

from workbench.views.base.kinds import register_kind
from workbench.views.what_if.view import WhatIf, what_if

__all__ = ["WhatIf", "what_if"]

register_kind("what_if", __package__)
