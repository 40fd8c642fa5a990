"""What runs in one thread: the modules that have begun and not ended, and the modes that this takes.

PyTorch tells of a module's end also after an exception, but not after an interrupt (a BaseException). So the stack of
modules is never trusted to be whole: what has ended without a word is found by the interpreter's own frames, and the
modes follow from the stack by `settle`, which may be repeated at any time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from torch import nn

from workbench.hooks import registry
from workbench.hooks.calls import Owner
from workbench.hooks.finding import site_name
from workbench.hooks.kernel_watch import KernelWatch
from workbench.hooks.modes import leave_dispatch_mode, leave_function_mode
from workbench.hooks.readers import Begun
from workbench.hooks.sdpa import FunctionTap
from workbench.hooks.tap import AttentionCall


@dataclass(eq=False, slots=True)
class Running:
    """A module that runs.

    Attributes:
        frame: of the interpreter, in which its forward is called.
        native: it is on a native path of PyTorch's.
        begun: what its reader needs to know of it from before it ran; None if nobody has asked.
    """

    name: str
    module: nn.Module
    frame: FrameType | None
    native: bool = False
    begun: Begun | None = None


@dataclass(eq=False)
class ThreadRun:
    """One forward in one thread.

    Attributes:
        tap: sees functions, while something runs and not on a native path; there `watch` sees operators.
        backend: runs Hugging Face's backends.
        replay: it runs in a backward pass.
        compiled: compiled code runs, which is not to see the tap.
        narrow: only some sites are watched, and `backend` is all that it takes. ran, called: modules of theirs that
            have begun, and those that have made a call.
        reading: a reader is at work, whose own use of the model is not the model's.
        stack: the modules that run, the innermost last.
        examples: how many the model was given; None if it was not itself called.
        scope: the frame of a method of the model's that calls its parts one by one, without the model itself; what runs
            in it goes on while the stack is empty.
        entries: the parts that have run in it and made calls.
        blocks: by site, calls that wait for the others of their map.
    """

    tap: FunctionTap
    backend: registry.Listener
    replay: bool = False
    reading: bool = False
    compiled: bool = False
    narrow: bool = False
    ran: list[nn.Module] = field(default_factory=list)
    called: set[nn.Module] = field(default_factory=set)
    examples: int | None = None
    watch: KernelWatch | None = None
    stack: list[Running] = field(default_factory=list)
    scope: FrameType | None = None
    entries: set[str] = field(default_factory=set)
    blocks: dict[str, list[AttentionCall]] = field(default_factory=dict)

    @property
    def native(self) -> bool:
        """Whether some module that runs is on a native path."""
        return any(running.native for running in self.stack)

    @property
    def owner(self) -> Owner:
        """Site and module of the innermost module that runs."""
        return site_name(self.stack[-1].name), self.stack[-1].module

    def settle(self) -> None:
        """Put on and take off modes so that they are those of what runs."""
        native = self.native
        if native or self.compiled or self.narrow or not self.stack:
            leave_function_mode(self.tap)
        if not native and self.watch is not None:
            leave_dispatch_mode(self.watch)
            self.watch = None
        if self.compiled or not self.stack:
            registry.stop_listening(self.backend)
            return
        registry.listen(self.backend)
        if native and self.watch is not None and not self.watch.entered:
            self.watch.__enter__()
        elif not native and not self.narrow and not self.tap.entered:
            self.tap.__enter__()

    @contextmanager
    def compiled_code(self) -> Iterator[None]:
        """Inside, no mode of ours is on: it would be compiled too, and asked for at each later call."""
        before, self.compiled = self.compiled, True
        try:
            self.settle()
            yield
        finally:
            self.compiled = before
            self.settle()

    def drop_ended(self, frame: FrameType | None) -> bool:
        """Forget the modules whose forward was left by an interrupt; whether any was forgotten.

        Args:
            frame: the present one. A module runs if its own frame called it, by however many steps.
        """
        dropped = False
        while self.stack:
            at, own = frame, self.stack[-1].frame
            while at is not None and at is not own:
                at = at.f_back
            if at is not None:
                break
            self.stack.pop()
            dropped = True
        if dropped:
            self.settle()
        return dropped
