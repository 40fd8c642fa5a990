"""Sites: the places where a model mixes tokens, and what is said of modules that are none."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import overload

from workbench.errors import CaptureError, nearest
from workbench.hooks.tap import Kind as Kind
from workbench.kernels.statistics import known
from workbench.tokens import visible_text

_HOOK_SUFFIX = re.compile(r"\.(hook_\w+|attn_weights)$")


@dataclass(frozen=True)
class Site:
    """One place where a model mixes tokens.

    Attributes:
        name: path of the module in the model.
        layer: position among the sites of the same tower and kind, from 0.
        kind: what it mixes: "self" and "window": positions of one sequence; "halo": those of a window and around it, or
            such that nothing shows where the queries stand among the keys; "cross": those of another sequence;
            "channel": features; "pooled": summaries of several positions (slots, experts, pooled keys); "memory": keys
            that are learned, or kept of earlier frames; "state": a recurrence; "gate":
            nothing, what stands at a position is multiplied by a factor.
        n_heads, n_kv_heads, d_head: its sizes; None until a call has shown them.
        tower: "" for a model with one stack of layers, else such as "encoder".
        windows: how many entries its batch has for each example of the model, [example, window] in one axis.
        call: which of its calls in one forward; of a site of the model 0. The name of a later one ends in "#1", "#2".
        first_head, n_heads_here: which heads this process holds, where tensor parallelism splits them; else 0, None.
    """

    name: str
    layer: int
    kind: Kind
    n_heads: int | None = None
    n_kv_heads: int | None = None
    d_head: int | None = None
    tower: str = ""
    call: int = 0
    windows: int = 1
    first_head: int = 0
    n_heads_here: int | None = None

    @property
    def here(self) -> range | None:
        """The numbers of the heads that this process holds; None for all."""
        return None if self.n_heads_here is None else range(self.first_head, self.first_head + self.n_heads_here)

    @property
    def elsewhere(self) -> str:
        """What is to be said of heads that other processes hold: "heads 0 to 1 of 4 here"; "" if there are none."""
        here = self.here
        return "" if here is None else f"heads {here.start} to {here.stop - 1} of {self.n_heads} here"

    @property
    def path(self) -> str:
        """Name of the module, whichever of its calls this is."""
        return self.name.removesuffix(self._suffix)

    @property
    def positional(self) -> bool:
        """Whether its keys are positions of the queries' own sequence, so that the two can be compared."""
        return self.kind not in ("cross", "halo", "channel", "pooled", "memory")

    def has(self, statistic: str) -> bool:
        """Whether a statistic exists here: none that compares positions which are not of one sequence, or, of a gate,
        whose rows have one key, keys.

        >>> site = Site("squeeze", 0, "gate")
        >>> site.has("row_sum"), site.has("entropy")
        (True, False)

        Raises:
            CaptureError: there is no such statistic.
        """
        record = known(statistic)
        return (self.positional or not record.positional) and (self.kind != "gate" or record.of_gates)

    @property
    def windowed(self) -> bool:
        """Whether its batch is [example, window] in one axis, the windows of an example one after the other."""
        return self.kind in ("window", "halo") and self.windows > 1

    @property
    def _suffix(self) -> str:
        return f"#{self.call}" if self.call else ""

    def at_call(self, call: int) -> Site:
        """The site as its call of that number is named.

        >>> Site("h.9.attn", 9, "self").at_call(1).label(6)
        'L9H6#1'
        """
        return replace(self, name=f"{self.path}#{call}" if call else self.path, call=call)

    @property
    def alias(self) -> str:
        """TransformerLens' spelling: blocks.3.attn, or decoder.3.cross_attn in a model with several towers."""
        part = {"cross": "cross_attn", "memory": "memory_attn", "state": "mixer", "gate": "gate"}.get(self.kind, "attn")
        return f"{self.tower or 'blocks'}.{self.layer}.{part}{self._suffix}"

    @property
    def aliases(self) -> tuple[str, ...]:
        """The alias, and how it is also spelled: decoder.3.self_attn for decoder.3.attn."""
        if self.kind in ("cross", "state", "gate"):
            return (self.alias,)
        if self.kind == "memory":
            return self.alias, f"{self.tower or 'blocks'}.{self.layer}.attn{self._suffix}"
        return self.alias, f"{self.alias.removesuffix(self._suffix).removesuffix('attn')}self_attn{self._suffix}"

    def label(self, head: int) -> str:
        """Short name of a head: L9H6.

        >>> Site("h.9.attn", 9, "self").label(6)
        'L9H6'
        """
        return f"L{self.layer}H{head}{self._suffix}"


@dataclass(frozen=True)
class Unread:
    """A module that mixes tokens and is no site.

    Attributes:
        name: its path. cls: its class. reason: why it stands here: what it does, or why nothing is known of it.
        proved: it was seen to move other positions; False: it was not tried, or could not be.
    """

    name: str
    cls: str
    reason: str
    proved: bool = True


def _seen(name: str) -> str:
    """A name for a table: modules may be called anything."""
    return visible_text(name).replace("\n", "⏎")


class Sites(Sequence[Site]):
    """The sites of a model, in the order of its modules; indexed by position, name or TransformerLens name.

    Attributes:
        unread: modules that mix tokens and are no sites.
        looked: whether every module was looked at, so that `unread` is complete; None where nobody asks.
    """

    def __init__(self, sites: Iterable[Site], unread: Iterable[Unread] = (), looked: bool | None = None) -> None:
        self._sites, self.unread, self.looked = tuple(sites), tuple(unread), looked

    def __len__(self) -> int:
        return len(self._sites)

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites)

    @overload
    def __getitem__(self, key: int | str) -> Site: ...
    @overload
    def __getitem__(self, key: slice) -> Sites: ...
    def __getitem__(self, key: int | str | slice) -> Site | Sites:
        if isinstance(key, slice):
            return Sites(self._sites[key], self.unread, self.looked)
        if isinstance(key, str):
            return self.find(key)
        return self._sites[key]

    def __contains__(self, key: object) -> bool:
        return key in self._sites or any(key in (s.name, *s.aliases) for s in self._sites)

    def find(self, name: str) -> Site:
        """The site of that name or alias (a TransformerLens hook suffix is ignored).

        Raises:
            CaptureError: there is none; the hint names the nearest.
        """
        wanted = _HOOK_SUFFIX.sub("", name)
        for site in self._sites:
            if wanted in (site.name, *site.aliases):
                return site
        known = [site.name for site in self._sites] + [site.alias for site in self._sites]
        raise CaptureError(f'there is no site "{name}"', site=name, hint=nearest(wanted, known, "site"))

    def __repr__(self) -> str:
        header: tuple[str, ...] = ("site", "alias", "layer", "kind", "heads", "kv", "d_head")
        split = any(s.here is not None for s in self._sites)
        if split:
            header += ("here",)
        rows = [
            (
                _seen(s.name),
                _seen(s.alias),
                s.layer,
                f"{s.kind} × {s.windows}" if s.windows > 1 else s.kind,
                *("?" if n is None else n for n in (s.n_heads, s.n_kv_heads, s.d_head)),
                *([f"{s.here.start} to {s.here.stop - 1}" if s.here else "all"] if split else []),
            )
            for s in self._sites
        ]
        widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]
        lines = [
            "  ".join(str(cell).ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in [header, *rows]
        ]
        return "\n".join([*lines, *self._of_unread()])

    def _of_unread(self) -> list[str]:
        """What is to be said of modules that mix tokens and are no sites."""
        lines = [f"  {one.name}  {one.cls}: {one.reason}" for one in self.unread]
        if lines:
            lines.insert(0, f"unread: {len(lines)} modules mix tokens, or may do so, and are no sites")
        if self.looked is False:
            lines.append("other mixers were not looked for yet: wb.verify(**inputs) or wb.look(**inputs) does")
        return lines

    def _repr_html_(self) -> str:
        import html

        import pandas as pd

        frame = pd.DataFrame(
            [(s.name, s.alias, s.layer, s.kind, s.n_heads, s.n_kv_heads, s.d_head) for s in self._sites]
        )
        frame.columns = pd.Index(["site", "alias", "layer", "kind", "heads", "kv", "d_head"])
        if any(s.here is not None for s in self._sites):
            frame["here"] = [f"{s.here.start} to {s.here.stop - 1}" if s.here else "all" for s in self._sites]
        unread = "".join(f"<p>{html.escape(line.strip())}</p>" for line in self._of_unread())
        return frame.to_html(index=False, na_rep="?") + unread


def without(sites: Sites, names: Iterable[str]) -> Sites:
    """The sites but those, with the numbers that they have."""
    gone = frozenset(names)
    return Sites((site for site in sites if site.name not in gone), sites.unread, sites.looked)


def with_kind(sites: Sites, name: str, kind: Kind) -> Sites:
    """The sites with a kind that a call, or a look, has shown; layers stay."""
    changed = (replace(site, kind=kind) if site.name == name else site for site in sites)
    return Sites(changed, sites.unread, sites.looked)


def all_here(site: Site) -> Site:
    """The site with all its heads in this process."""
    return replace(site, first_head=0, n_heads_here=None)
