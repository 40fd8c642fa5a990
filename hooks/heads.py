"""How heads, layers and modules are named by a user, and what they are in a model."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from workbench.errors import CaptureError, InterventionError, nearest
from workbench.hooks.edits import check_range
from workbench.hooks.sites import Site, Sites

_LABEL = re.compile(r"L(\d+)(H|KV)(\d+)")
_SITE_LABEL = re.compile(r"(.+)\.(H|KV)(\d+)")
_CALL = re.compile(r"#\d+")
_HINT = 'a head is (layer, head), (site, head), "L9H6", "L2KV1", "decoder.0.cross_attn.H1" or KVGroup(layer, group)'


@dataclass(frozen=True)
class KVGroup:
    """All query heads that read the keys and values of one kv head.

    >>> from workbench.hooks.sites import Site, Sites
    >>> parse_heads(Sites([Site("attn", 0, "self", n_heads=6, n_kv_heads=2)]), KVGroup(0, 1))
    {'attn': [3, 4, 5]}
    """

    layer_or_site: int | str | Site
    group: int


def parse_heads(sites: Sites, heads: Any) -> dict[str, list[int]]:
    """The chosen heads by name of their site, in the order of the sites and heads.

    Args:
        heads: one or several of (layer, head), (site name or alias, head), "L9H6", "L2KV1", a site's name or alias and
            a head as in "decoder.0.cross_attn.H1", `KVGroup(layer, group)`. A layer stands for its site where it has
            only one.

    Raises:
        InterventionError: no such site, layer, head or group; a layer with several sites (they are listed); a site
            without heads; nothing chosen; or a kv group of a site whose sizes are not known yet. A head of such a site
            is checked when the site fires.

    >>> from workbench.hooks.sites import Site, Sites
    >>> parse_heads(Sites([Site("h.0.attn", 0, "self", 4), Site("h.1.attn", 1, "self", 4)]), {"L1H2", (0, 3), (1, 0)})
    {'h.0.attn': [3], 'h.1.attn': [0, 2]}
    """
    chosen: dict[str, set[int]] = {}
    for one in each_head(heads):
        for site, head in find_heads(sites, one):
            chosen.setdefault(site.name, set()).add(head)
    return {site.name: sorted(chosen[site.name]) for site in sites if site.name in chosen}


def each_head(heads: Any) -> list[Any]:
    """The single heads of what a user gave as one or several.

    Raises:
        InterventionError: there is none.
    """
    if _is_single(heads):
        return [heads]
    if not isinstance(heads, Iterable):
        raise InterventionError(f"{heads!r} names no head", hint=_HINT)
    several = list(heads)
    if not several:
        raise InterventionError("no head was chosen", hint=_HINT)
    return several


def find_heads(sites: Sites, one: Any) -> list[tuple[Site, int]]:
    """What one head, or one kv group, is in a model.

    Raises:
        InterventionError: as `parse_heads`.
    """
    where: int | str | Site
    label = (_LABEL.fullmatch(one) or _SITE_LABEL.fullmatch(one)) if isinstance(one, str) else None
    if label is not None:
        where = int(label[1]) if label.re is _LABEL else label[1]
        number, is_group = int(label[3]), label[2] == "KV"
    elif isinstance(one, KVGroup):
        where, number, is_group = one.layer_or_site, one.group, True
    elif isinstance(one, tuple) and len(one) == 2 and _is_integer(one[1]):
        where, number, is_group = one[0], operator.index(one[1]), False
    else:
        raise _of_one_call(one) or InterventionError(f"{one!r} is no head", hint=_HINT)
    site = find_site(sites, where)
    if site.n_heads == 0:
        raise InterventionError(f'the site is of kind "{site.kind}" and has no heads', site=site.name)
    if not is_group:
        if number < 0 and not site.n_heads:
            raise InterventionError(f"there is no head {number}: heads count from 0", site=site.name)
        check_range([number], site.n_heads or number + 1, site.name)
        return [(site, number)]
    if not site.n_heads or not site.n_kv_heads:
        raise InterventionError(
            "how many query heads share a kv head is not known yet", site=site.name, hint="run one small capture first"
        )
    if not _is_integer(number) or not 0 <= number < site.n_kv_heads:
        raise InterventionError(
            f"there is no kv group {number}: the site has {site.n_kv_heads}, 0 to {site.n_kv_heads - 1}", site=site.name
        )
    size = site.n_heads // site.n_kv_heads
    return [(site, head) for head in range(number * size, (number + 1) * size)]


def find_site(sites: Sites, where: Any) -> Site:
    """The site of a layer, name, alias or Site.

    Raises:
        InterventionError: there is none, or the layer has several.
    """
    if isinstance(where, (str, Site)):
        name = where if isinstance(where, str) else where.name
        try:
            return sites.find(name)
        except CaptureError as error:
            raise _of_one_call(name) or InterventionError(error.message, site=error.site, hint=error.hint) from None
    if not _is_integer(where):
        raise InterventionError(f"{where!r} is neither a layer nor a site", hint=_HINT)
    return _only(sites, [site for site in sites if site.layer == where], operator.index(where))


def _of_one_call(what: Any) -> InterventionError | None:
    """What is to be said where a head, or a site, is named with the number of a call, as in tables: "L3H1#1"."""
    call = _CALL.search(what) if isinstance(what, str) else None
    if call is None:
        return None
    return InterventionError(
        f'"{what}" is one call of its site, and a head is edited in all of them',
        hint=f'leave "{call[0]}" out; a function given to wb.patch can count its calls, and change only one of them',
    )


def _only(sites: Sites, found: Sequence[Site], layer: int) -> Site:
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(f'"{site.alias}" ({site.name})' for site in found)
        raise InterventionError(f"layer {layer} has several sites: {names}", hint="name one in place of the layer")
    raise _no_layer(sites, layer)


def _no_layer(sites: Sites, layer: int) -> InterventionError:
    layers = sorted({site.layer for site in sites})
    if not layers:
        return InterventionError("the model has no site whose heads are known", hint="look at wb.sites.unread")
    known = f"{layers[0]} to {layers[-1]}" if layers == list(range(len(layers))) else ", ".join(map(str, layers))
    return InterventionError(f"there is no layer {layer}: the model has {known or 'none'}")


def find_block(model: nn.Module, sites: Sites, layer: Any) -> str:
    """Name of the module whose output is the residual stream after a layer.

    A block is an entry of a list of modules that all hold attention; where there is no such list, the part of a site's
    name up to its first number.

    Raises:
        InterventionError: there is no such layer, or there are several, as in a model with several towers.
    """
    if not _is_integer(layer):
        raise InterventionError(f"{layer!r} is no layer", hint='("resid", 3) is the output of block 3')
    at = [site for site in sites if site.layer == layer]
    blocks = list(dict.fromkeys(block_of(model, sites, site.name) for site in at))
    if not at:  # a layer without a site, between others that have one
        lists = {block_of(model, sites, site.name).rpartition(".")[0] for site in sites}
        blocks = [f"{name}.{layer}".lstrip(".") for name in lists]
        if layer < 0 or len(blocks) != 1 or blocks[0] not in dict(model.named_modules()):
            raise _no_layer(sites, operator.index(layer))
    if len(blocks) > 1:
        listed = ", ".join(f'"{name}"' for name in blocks)
        raise InterventionError(f"layer {layer} is that of several blocks: {listed}", hint="name the block instead")
    if not blocks[0]:
        raise InterventionError("the attention is in no block", site=at[0].name, hint="name the module to steer")
    return blocks[0]


def block_of(model: nn.Module, sites: Sites, name: str) -> str:
    """Name of the block that holds the module of this name; "" if it is in none."""
    parts = name.split(".")
    names = [site.name for site in sites]
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    for i in reversed(numbers):
        if i == len(parts) - 1:  # the attention module itself, whose output is no residual stream
            continue
        parent, stem = model.get_submodule(".".join(parts[:i])), ".".join(parts[:i])
        entries = [f"{stem}.{child}".lstrip(".") for child, _ in parent.named_children()]
        if all(any(site == entry or site.startswith(f"{entry}.") for site in names) for entry in entries):
            return ".".join(parts[: i + 1])
    return ".".join(parts[: numbers[0] + 1]) if numbers and numbers[0] < len(parts) - 1 else ""


def find_module(model: nn.Module, sites: Sites, where: str | Site) -> str:
    """Name of a module, given as a site, an alias or a path.

    Raises:
        InterventionError: there is none.
    """
    if isinstance(where, Site):
        return find_site(sites, where).name
    for site in sites:
        if where in (site.name, site.alias):
            return site.name
    names = {module: name for name, module in model.named_modules()}
    try:
        return names[model.get_submodule(where)]  # a module that is shared goes by its first name
    except AttributeError:
        known = [name for name in names.values() if name] + [site.alias for site in sites]
        raise InterventionError(f'there is no module "{where}"', hint=nearest(where, known, "module")) from None


def _is_integer(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


def _is_single(heads: Any) -> bool:
    if isinstance(heads, tuple):
        return len(heads) == 2 and not isinstance(heads[1], (str, tuple, KVGroup))
    return isinstance(heads, (str, KVGroup))
