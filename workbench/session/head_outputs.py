"""What heads give: their outputs z, and what of these enters the projection that joins them; kept by a capture."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from workbench.capture.arena import Arena
from workbench.capture.site_capture import Forward
from workbench.hooks.entering import entering, own_columns
from workbench.hooks.projections import ProjectionFinder, is_linear
from workbench.hooks.tap import AttentionCall


@dataclass
class HeadOutputs:
    """Copies of what heads give, and the projections of their sites as they are found.

    What enters a projection is kept beside z where the two differ: past the norm, gate and skip of a module that has a
    reader, which its call tells, and past a gate, which is seen when the projection is called; or when the call is
    told of only then, since its axes had to be proved.

    Attributes:
        sites: paths of the sites.
    """

    arena: Arena
    sites: frozenset[str]
    projections: ProjectionFinder = field(default_factory=ProjectionFinder)
    _sites_around: dict[str, str | None] = field(default_factory=dict)
    _ran: dict[int, dict[str, tuple[str, nn.Module, Tensor]]] = field(default_factory=dict)

    def end(self, thread: int) -> None:
        """The forward of that thread is over."""
        self.projections.end(thread)
        self._ran.pop(thread, None)

    def of_call(self, call: AttentionCall, edited: Tensor | None, *, check: bool) -> tuple[Tensor, Tensor | None]:
        """z, and of modules that have a reader what enters the projection; both [batch, query, head, width].

        Args:
            edited: [batch, head, query, width] that an intervention has made of the heads' output.
            check: prove what enters the projection.
        """
        given = (call.mixed if edited is None else call.own(edited)).detach()
        z = self.arena.copy(given.transpose(1, 2))
        entered = None
        if call.finish is not None and call.part is None:
            entered = self._past_finish(call, given, check)
        if entered is not None:
            return z, self.arena.copy(entered)
        if call.part is None:
            if call.joins is not None:  # a compiled graph shows it
                self.projections.joins(call.site, *call.joins)
                return z, None
            self.projections.saw_call(call.site, call.module, z, call.output)
            ran = self._ran.get(threading.get_ident(), {}).pop(call.site, None)
            late = None if ran is None else self.projections.saw_module(*ran[:2], ran[2:])
            if late is not None and call.shard is None:
                return z, self.arena.copy(late[1].unflatten(-1, z.shape[2:]))
        elif not self.projections.awaits(call.site, call.output):
            whole = replace(call, part=None).z() if edited is None else edited
            self.projections.saw_call(call.site, call.module, whole.detach().transpose(1, 2).clone(), call.output)
        return z, None

    def _past_finish(self, call: AttentionCall, z: Tensor, check: bool) -> Tensor | None:
        """What the heads of a module that has a reader give to its projection.

        None where they cannot be told apart in it; the projection is then not known.
        """
        assert call.finish is not None
        found = entering(call.module, call.finish, z)
        if found is None or (check and not own_columns(call.module, call.finish, z, found)):
            return None
        if check:
            self.projections.knows_of(call.site, f"{call.site}.{found.name}".strip("."), found.module)
        return found.heads.transpose(1, 2) if self.projections.knows(call.site) else None

    def saw_module(self, name: str, module: nn.Module, args: tuple[Any, ...], forward: Forward | None) -> int:
        """A module is about to run: where it is a projection behind a gate, keep what enters it.

        Args:
            forward: that runs in this thread; what enters becomes a part of the last call of the site in it.

        Returns:
            Bytes that were kept.
        """
        past_gate = self.projections.saw_module(name, module, args)
        if is_linear(module) and args and isinstance(args[0], Tensor):
            self._remember(name, module, args[0])
        if past_gate is None or forward is None:
            return 0
        site, joined = past_gate
        for key, capture in reversed(list(forward.sites.items())):
            if capture.site.path != site:
                continue
            if capture.z is None or capture.shard is not None or capture.z.shape[:2] != joined.shape[:2]:
                return 0
            entered = self.arena.copy(joined.unflatten(-1, (capture.z.shape[2], -1)))
            forward.sites[key] = replace(capture, entering=entered)
            return entered.nbytes
        return 0

    def _remember(self, name: str, module: nn.Module, given: Tensor) -> None:
        """The last linear module inside of a site whose call was not told yet, or whose projection is not known, or
        lies behind a gate.
        """
        site = self._around(name)
        known = site is not None and self.projections.knows(site) and not self.projections.gated(site)
        if site is not None and not (known and self.projections.awaits(site)):
            self._ran.setdefault(threading.get_ident(), {})[site] = name, module, given

    def _around(self, name: str) -> str | None:
        """The site that a module is a part of."""
        if name not in self._sites_around:
            parts = name.split(".")
            outer = (".".join(parts[:end]) for end in range(len(parts) - 1, -1, -1))
            self._sites_around[name] = next((one for one in outer if one in self.sites), None)
        return self._sites_around[name]
