"""Head page: what is known of one head, and of whichever head is chosen next."""

from workbench.views.base.kinds import register_kind
from workbench.views.head_page.view import HeadPage, head

__all__ = ["HeadPage", "head"]

register_kind("head_page", __package__)
