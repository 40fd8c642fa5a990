"""Sites: the places where a model mixes tokens. Found from the code of its modules, before anything has run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, overload

from torch import nn

from workbench.errors import CaptureError, nearest
from workbench.hooks.code import calls_attention
from workbench.hooks.configs import config_of, read
from workbench.hooks.readers import reader_of
from workbench.hooks.tap import AttentionCall
from workbench.hooks.tap import Kind as Kind
from workbench.kernels.statistics import known
from workbench.tokens import visible_text

_CROSS = re.compile(r"cross_?att|encoder_attn|encdecattention|multihead_attn", re.IGNORECASE)
_WINDOW = re.compile(r"swin|window", re.IGNORECASE)
_MEMORY = re.compile(r"memory_?att", re.IGNORECASE)  # of a tracker: keys are what it kept of earlier frames
_WRAPPED = "._original_component"
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


def find_sites(model: nn.Module) -> Sites:
    """The sites of a model, read from the code of its modules' classes; sizes from their attributes where they tell.

    >>> find_sites(nn.TransformerEncoderLayer(16, 4))
    site       alias          layer  kind  heads  kv  d_head
    self_attn  blocks.0.attn  0      self  4      4   4
    """
    found: dict[str, Site] = {}
    for across_methods in (False, True):  # the second is a guess that is needed only where nothing else is found
        for path, module in model.named_modules() if not found else ():
            if isinstance(module, (nn.TransformerEncoderLayer, nn.Transformer)):
                continue  # their attention modules are sites of their own
            if (
                isinstance(module, nn.MultiheadAttention)
                or reader_of(module) is not None
                or calls_attention(module, across_methods=across_methods)
            ):
                name = site_name(path)
                found[name] = _describe(name, module)  # of a bridge and what it wraps, the latter knows its sizes
    return _number(list(found.values()))


def site_name(path: str) -> str:
    """The name of the site at a module's path: a TransformerLens bridge and the module that it wraps are one site.

    >>> site_name("blocks.0._original_component.attn._original_component")
    'blocks.0._original_component.attn'
    """
    while path.endswith(_WRAPPED):
        path = path.removesuffix(_WRAPPED)
    return path


def add_site(sites: Sites, name: str, module: nn.Module) -> Sites:
    """The sites with one more, which a call has shown."""
    more = _number([*sites, _describe(name, module)])
    return Sites(more, sites.unread, sites.looked)


def without(sites: Sites, names: Iterable[str]) -> Sites:
    """The sites but those, with the numbers that they have."""
    gone = frozenset(names)
    return Sites((site for site in sites if site.name not in gone), sites.unread, sites.looked)


def with_kind(sites: Sites, name: str, kind: Kind) -> Sites:
    """The sites with a kind that a call, or a look, has shown; layers stay."""
    changed = (replace(site, kind=kind) if site.name == name else site for site in sites)
    return Sites(changed, sites.unread, sites.looked)


def with_call(sites: Sites, call: AttentionCall) -> Sites:
    """The sites with what a call has shown: one more, or its sizes, which heads are here, its windows and kind."""
    if all(site.name != call.site for site in sites):
        sites = add_site(sites, call.site, call.module)
    known = next(site for site in sites if site.name == call.site)
    heads, kv_heads, width = call.sizes_of_all
    first, here = (0, None) if call.shard is None else (call.shard.first, call.shard.n_here)
    kind = known.kind
    if call.axes is not None and call.axes.axes.over == "features":
        kind = "channel"
    elif kind in ("self", "window") and call.is_apart:
        kind = "halo"
    found = replace(known, n_heads=heads, n_kv_heads=kv_heads, d_head=width, kind=kind, windows=call.windows)
    found = replace(found, first_head=first, n_heads_here=here)
    if found == known:
        return sites
    return Sites((found if site is known else site for site in sites), sites.unread, sites.looked)


def all_here(site: Site) -> Site:
    """The site with all its heads in this process."""
    return replace(site, first_head=0, n_heads_here=None)


_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")


def heads_of(module: nn.Module) -> int | None:
    """How many heads a module, or the config that it has, says it has."""
    return _number_of(module, config_of(module), *_HEADS)


def stated_heads(module: nn.Module) -> int | None:
    """How many heads a module itself says it has: a config may speak of other parts, or of the model before pruning."""
    return _number_of(module, None, *_HEADS)


def kv_heads_of(module: nn.Module) -> int | None:
    """How many heads of keys and values a module says it has."""
    names = ("num_key_value_heads", "n_kv_heads", "num_kv_heads", "n_key_value_heads")
    return _number_of(module, config_of(module), *names)


def _describe(name: str, module: nn.Module) -> Site:
    config = config_of(module)
    heads = heads_of(module)
    kv = kv_heads_of(module)
    width = _number_of(module, config, "head_dim", "attention_head_size", "d_head", "key_value_proj_dim")
    if width is None and heads:
        total = _number_of(module, config, "embed_dim", "hidden_size", "d_model")
        width = None if total is None else total // heads
    cross = _CROSS.search(f"{name} {type(module).__name__}") or getattr(module, "is_cross_attention", False)
    if (reader := reader_of(module)) is not None:
        return Site(name, -1, reader.kind)  # its sizes are what the reader says at its first call
    kind: Kind = "cross" if cross else "window" if _WINDOW.search(type(module).__name__) else "self"
    kind = "memory" if cross and _MEMORY.search(name) else kind
    return Site(name, -1, kind, heads, heads if kv is None else kv, width)


def _number_of(module: nn.Module, config: Any, *names: str) -> int | None:
    for owner in (module, config):
        for name in names:
            value = read(owner, name)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def _number(sites: list[Site]) -> Sites:
    """Sites with layers and towers: a name's only number is its layer, otherwise sites of one kind are counted."""
    stems = [
        s.name[: m.start()].rstrip(".") if (m := re.search(r"(?<![^.])\d+(?![^.])", s.name)) else "" for s in sites
    ]
    towers = _towers(set(stems))
    seen: Counter[tuple[str, Kind]] = Counter()
    numbered = []
    for site, stem in zip(sites, stems, strict=True):
        tower = towers[stem]
        index = seen[tower, site.kind]
        seen[tower, site.kind] += 1
        numbers = re.findall(r"(?<![^.])\d+(?![^.])", site.name)
        numbered.append(replace(site, tower=tower, layer=int(numbers[0]) if len(numbers) == 1 else index))
    return Sites(numbered)


def _towers(stems: set[str]) -> dict[str, str]:
    """Short names that tell stacks of layers apart; "" for the only one, and for what stands outside of stacks.

    >>> sorted(_towers({"model.encoder.layers", "model.decoder.layers"}).values())
    ['decoder', 'encoder']
    >>> sorted(_towers({"text_model.encoder.layers", "vision_model.encoder.layers"}).values())
    ['text_model', 'vision_model']
    """
    if len(stems) <= 1:
        return dict.fromkeys(stems, "")
    plain = {"model", "layers", "layer", "blocks", "block", "h", ""}
    parts = {stem: [part for part in stem.split(".") if part not in plain] for stem in stems}
    shared = takewhile(lambda column: len(set(column)) == 1, zip(*parts.values(), strict=False))
    first = len(list(shared))
    towers = {}
    for stem, own in parts.items():
        others = [other for name, other in parts.items() if name != stem]
        ends = range(first + 1, len(own) + 1)
        end = next((n for n in ends if all(other[:n] != own[:n] for other in others)), len(own))
        towers[stem] = ".".join(own[first:end]) or ("blocks" if stem else "")
    return towers
