"""Finding the sites of a model from the code of its modules, and what its calls add to them."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from itertools import takewhile
from typing import Any

from torch import nn

from workbench.hooks.code import calls_attention
from workbench.hooks.configs import config_of, read
from workbench.hooks.readers import reader_of
from workbench.hooks.sites import Site, Sites
from workbench.hooks.tap import AttentionCall, Kind

_CROSS = re.compile(r"cross_?att|encoder_attn|encdecattention|multihead_attn", re.IGNORECASE)
_WINDOW = re.compile(r"swin|window", re.IGNORECASE)
_MEMORY = re.compile(r"memory_?att", re.IGNORECASE)  # of a tracker: keys are what it kept of earlier frames
_WRAPPED = "._original_component"
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")


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
