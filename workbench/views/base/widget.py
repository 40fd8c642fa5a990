"""The live form of a view: an anywidget that runs the view's module, answers its questions, shares the selection."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Protocol

import anywidget
import traitlets

from workbench.errors import WorkbenchError
from workbench.views.base import modules
from workbench.views.base.selection import Selection, SharedSelection
from workbench.views.base.spec import ViewSpec


class Shown(Protocol):
    """What a widget needs of its view."""

    spec: ViewSpec

    def answer(self, question: Mapping[str, Any]) -> tuple[dict[str, Any], list[bytes]]:
        """JSON values and buffers for what the module asks."""

    def _put_state(self, state: Mapping[str, Any]) -> None: ...


class ViewWidget(anywidget.AnyWidget):
    """A view in a browser. `selection` follows the view's shared selection both ways.

    Attributes:
        spec: the view's spec, with arrays as binary buffers.
        state: what has been set in the view alone, both ways.
        still: ids of the pictures that this widget replaces.
    """

    spec = traitlets.Dict().tag(sync=True)
    selection = traitlets.Dict().tag(sync=True)
    state = traitlets.Dict().tag(sync=True)
    still = traitlets.List(traitlets.Unicode()).tag(sync=True)
    live = traitlets.Bool(True).tag(sync=True)

    @staticmethod
    def of(view: Shown, shared: SharedSelection) -> ViewWidget:
        """The widget of a view."""
        state = dict(view.spec.state)
        shared.join(view.spec.scope)
        given = {"spec": view.spec.to_live(), "selection": shared.of(view.spec.scope).to_json(), "state": state}
        widget = _widget_class(view.spec.kind)(**given)
        widget._view, widget._shared = view, shared
        widget.on_msg(widget._asked)
        widget.observe(widget._chosen, "selection")
        widget.observe(widget._stated, "state")
        shared.on_select(widget._follow, view.spec.scope)
        return widget

    _view: Shown
    _shared: SharedSelection

    def _chosen(self, change: Any) -> None:
        self._shared.select(self._view.spec.scope, **change["new"])

    def _stated(self, change: Any) -> None:
        try:
            self._view._put_state(change["new"])
        except WorkbenchError:
            self.state = dict(self._view.spec.state)  # what the browser keeps is what Python has
            raise

    def _follow(self, selection: Selection) -> None:
        self.selection = selection.to_json()

    def _asked(self, _: Any, content: Any, buffers: Any) -> None:
        """A question of the module; answered under its number."""
        if not isinstance(content, dict) or "ask" not in content:
            return
        try:
            answer, found = answer_of(self._view, content)
        except WorkbenchError as error:
            answer, found = {"error": str(error)}, []
        self.send({"number": content.get("number"), **answer}, buffers=found)


def answer_of(view: Shown, question: dict[str, Any]) -> tuple[dict[str, Any], list[bytes]]:
    """What any module may ask for, and else what the view answers."""
    if question["ask"] == "plotly":
        return {}, [modules.plotly().encode()]
    if question["ask"] == "module":
        return {}, [modules.later(view.spec.kind, str(question.get("name"))).encode()]
    return view.answer(question)


@cache
def _widget_class(kind: str) -> type[ViewWidget]:
    return type(
        f"{kind.title().replace('_', '')}Widget",
        (ViewWidget,),
        {"_esm": modules.live(kind), "_css": modules.style([kind])},
    )
