"""What TransformerLens' bridges need: `run_with_cache` and `run_with_hooks` call `forward` itself, past module hooks.

Each block would then look like a forward of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class Whole:
    """While open, a direct call of a bridge's `forward` is a call of the bridge; does nothing for other models.

    Args:
        is_running: whether the model is running in this thread.
    """

    def __init__(self, model: nn.Module, is_running: Callable[[], bool]) -> None:
        self._model, self._is_running = model, is_running
        self._is_bridge = any(cls.__module__.startswith("transformer_lens.") for cls in type(model).__mro__)
        self._call: Callable[..., Any] | None = None  # what stands in place of the bridge's forward
        self._before: Any = None

    def open(self) -> None:
        """Does nothing when it is open."""
        if not self._is_bridge or self._call is not None:
            return
        forward = self._model.forward

        def call(*args: Any, **kwargs: Any) -> Any:
            return forward(*args, **kwargs) if self._is_running() else self._model(*args, **kwargs)

        self._before, self._call = self._model.__dict__.get("forward"), call
        self._model.__dict__["forward"] = call  # past the bridge's own __setattr__

    def close(self) -> None:
        """Does nothing when it is closed."""
        held = self._model.__dict__
        if self._call is not None and held.get("forward") is self._call:
            if self._before is None:
                del held["forward"]
            else:
                held["forward"] = self._before
        self._call = None
