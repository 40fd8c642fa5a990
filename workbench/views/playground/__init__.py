"""Playground: a prompt to edit and run, what comes next before and after heads, rows, edges are ablated."""

from workbench.views.base.kinds import register_kind
from workbench.views.playground.edits import Ablated
from workbench.views.playground.view import Playground, playground

__all__ = ["Ablated", "Playground", "playground"]

register_kind("playground", __package__)
