"""What runs on a model while it runs: interventions in the order they were entered, then the capture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from workbench.errors import CaptureError, InterventionError
from workbench.hooks.edits import Edit, OutputEdit
from workbench.hooks.observer import Observer
from workbench.hooks.tap import AttentionCall
from workbench.session.recorder import Recorder


class Live:
    """One observer on a model for all that is open on it: it begins with the first, and ends with the last.

    A capture sees what the interventions have made of each head's output, whichever of the two was entered first.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.recorder: Recorder | None = None
        self.edits: list[Edit | OutputEdit] = []
        self._users = 0
        self._observer: Observer | None = None

    @contextmanager
    def recording(self, recorder: Recorder) -> Iterator[None]:
        """The recorder takes every call."""
        if self.recorder is not None:
            raise CaptureError("this Workbench is capturing already", hint="end the outer capture first")
        self.recorder = recorder
        try:
            with self._observed():
                yield
        finally:
            self.recorder = None

    @contextmanager
    def editing(self, edit: Edit | OutputEdit) -> Iterator[None]:
        """The edit applies to every call.

        Raises:
            InterventionError: at the end, if one of its sites never fired.
        """
        edit.fired.clear()
        self.edits.append(edit)
        try:
            with self._observed():
                yield
        finally:
            self.edits.remove(edit)
        silent = sorted(edit.sites - edit.fired)
        if silent:
            raise InterventionError(
                f"the intervention never fired at {', '.join(silent[:5])}{' …' if len(silent) > 5 else ''}",
                site=silent[0],
                hint="call the model inside the `with`; does its forward reach the site?",
            )

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """What is open so far has no part in the forwards inside."""
        edits, recorder = self.edits, self.recorder
        self.edits, self.recorder = [], None
        try:
            yield
        finally:
            self.edits, self.recorder = edits, recorder

    @contextmanager
    def _observed(self) -> Iterator[None]:
        if self._users == 0:
            self._observer = Observer(
                self.model,
                self._on_call,
                self._for_recorder("on_start"),
                self._for_recorder("on_end"),
                self._for_recorder("on_inputs"),
                self._on_output,
                self._leaves_native_path,
                self._for_recorder("on_module"),
                self._wants,
            ).__enter__()
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if self._users == 0 and self._observer is not None:
                observer, self._observer = self._observer, None
                observer.__exit__(None, None, None)

    def _for_recorder(self, name: str) -> Callable[..., None]:
        def tell(*args: Any) -> None:
            if self.recorder is not None:
                getattr(self.recorder, name)(*args)

        return tell

    def _leaves_native_path(self) -> bool:
        """Whether a head's output must be a tensor that the model itself goes on with, and every module must run."""
        gradients = self.recorder is not None and self.recorder.settings.gradients
        return gradients or bool(self.edits)

    def _wants(self, site: str) -> bool:
        """Whether someone is to see the calls of a site."""
        chosen = None if self.recorder is None else self.recorder.settings.sites
        recorded = self.recorder is not None and (chosen is None or site in chosen)
        return recorded or any(isinstance(edit, Edit) and site in edit.sites for edit in self.edits)

    def _on_call(self, call: AttentionCall) -> Tensor | None:
        edits = [edit for edit in self.edits if isinstance(edit, Edit) and call.site in edit.sites]
        z = None
        for edit in edits:
            if z is None:
                z = call.z() if call.finish is None else call.pattern().apply(call.v)
            z = edit(call, z)
            edit.fired.add(call.site)
        if self.recorder is not None and not call.replay:
            self.recorder.on_call(call, z)
        return z

    def _on_output(self, name: str, module: nn.Module, output: Any) -> Any:
        changed = None
        for edit in self.edits:
            if isinstance(edit, OutputEdit) and name in edit.sites:
                changed = edit(name, module, output if changed is None else changed)
                edit.fired.add(name)
        return changed
