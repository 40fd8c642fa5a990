"""The pictures that stand in a notebook for live views: drawn anew when what they show has changed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

_PAUSE = 0.8  # seconds without a change after which pictures are drawn: a slider moves through many values


class Stills:
    """The still pictures of one view in the outputs of a notebook, each under the id of its display.

    A saved notebook, and what nbconvert makes of it, then show what was selected and set when it was saved.
    """

    def __init__(self, shell: Any, bundle: Callable[[str], dict[str, Any]]) -> None:
        self._bundle = bundle
        self._shown: list[str] = []
        self._outdated = False
        self._waiting: asyncio.TimerHandle | None = None
        # A cell that changes the selection leaves pictures that fit, however the notebook is run.
        shell.events.register("post_run_cell", self._after_a_cell)

    def show(self, identity: str) -> None:
        """Display the picture, as an output that can be replaced."""
        from IPython.display import display

        display(self._bundle(identity), raw=True, display_id=identity)
        self._shown.append(identity)

    def outdate(self) -> None:
        """Say that what the pictures show has changed."""
        self._outdated = True
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return  # then the end of the next cell draws them
        if self._waiting is not None:
            self._waiting.cancel()
        self._waiting = loop.call_later(_PAUSE, self.refresh)

    def refresh(self) -> None:
        """Draw the pictures anew if they are outdated."""
        if not self._outdated:
            return
        from IPython.display import display

        self._outdated = False
        for identity in self._shown:
            display(self._bundle(identity), raw=True, display_id=identity, update=True)

    def _after_a_cell(self, *_: Any) -> None:
        self.refresh()
