"""What may be told of a model while it runs, and asked: an `Observer` calls these methods, in the thread that runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from workbench.hooks.tap import AttentionCall


class Listener:
    """Hears everything and wants nothing changed; a subclass overrides what it needs.

    What runs again in a backward pass (gradient checkpointing) starts no forward, and its calls are marked `replay`.
    What a method raises leaves through the model's forward; so does what goes wrong where a call is read, unless
    `on_failed` says otherwise.
    """

    def only(self) -> frozenset[str]:
        """The sites that alone are to be told of, and whose calls come through Hugging Face's registry; none: all.

        It is asked as a forward begins.
        """
        return frozenset()

    def on_start(self, name: str) -> None:
        """A forward begins in this thread; `name` is that of its outermost module."""

    def on_end(self) -> None:
        """The forward of this thread has ended, also by an exception."""

    def on_inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The model itself was called with these inputs, or its encoder alone; it has not run yet."""

    def on_module(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A module of the model is about to run; `args` are its positional inputs."""

    def follows_linear(self) -> bool:
        """Whether `on_linear` is to be told, which takes time."""
        return False

    def on_linear(self, name: str, module: nn.Module, given: Tensor) -> None:
        """A linear function is about to be applied to `given` [..., feature], by the code of a module."""

    def on_call(self, call: AttentionCall) -> Tensor | None:
        """An attention call was made. What is given, if not None, is what the heads give instead [batch, head, query,
        width], and the model goes on with it.
        """
        return None

    def on_step(self, site: str, backend: str, q: Tensor, k: Tensor, scale: float | None) -> bool:
        """A site of `only` has one query, which sees all keys. Whether that is enough; else `on_call` is told of it.

        Args:
            q, k: [batch, head, 1, d] and [batch, kv head, key, d].
        """
        return False

    def cannot_wait(self, site: str) -> bool:
        """A call was made of which the axes are not known. Whether it is to be told at once, by those that most models
        have, to change what the heads give; that they are not so is then an error. Else `on_call` is told once they are
        known.
        """
        return False

    def edits_at(self, site: str) -> bool:
        """Whether what the heads of a site give may be changed, and gradients are to flow through that."""
        return False

    def takes_blocks(self) -> bool:
        """Whether calls that make a site's map together are told one by one, each with its `block`, by one who runs the
        model on the inputs of an earlier forward. Else they are told as one call with the whole map, which nothing can
        be edited in.
        """
        return False

    def on_refused(self, site: str, reason: str, *, edited: bool) -> None:
        """Calls of a site are not what they were told to be, or cannot be told at all.

        Args:
            edited: one of them had been edited.
        """

    def on_failed(self, site: str, error: Exception) -> bool:
        """A call of the site could not be told. Whether the forward goes on all the same; else the error is raised."""
        return False

    def on_output(self, name: str, module: nn.Module, output: Any) -> Any:
        """A module has ended. What is given, if not None, takes the place of its output."""
        return None

    def leaves_native_path(self) -> bool:
        """Whether calls may be edited, or their gradients are wanted.

        PyTorch's own attention modules then leave their native path, whose output per head does not exist: their
        numbers change by rounding.
        """
        return False

    def wants(self, site: str) -> bool:
        """Whether a call at the site is to be told of if that takes work: a reader runs half of the module again."""
        return True
