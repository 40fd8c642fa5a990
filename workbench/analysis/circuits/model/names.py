"""How nodes are named in circuits, and what the same heads are called elsewhere."""

from __future__ import annotations

import re

_DOOR = re.compile(r"((?:\w+\.)*)([asx])(\d+)(?=<x>|$)")  # through which a mixer's heads read the stream
_HEAD = re.compile(r"((?:\w+\.)*)([asx])(\d+)\.(h|kv)(\d+)")
_LABEL = re.compile(r"L(\d+)(?:H|KV)(\d+)")
_SITE_LABEL = re.compile(r"(.+)\.(?:H|KV)\d+")
_PARTS = {"a": "attn", "s": "mixer", "x": "cross_attn"}


def label(name: str) -> str:
    """A head node as the label that interventions take: L9H6, decoder.0.cross_attn.H1; other names as they are.

    >>> label("a9.h6"), label("a9.kv2<k>"), label("m3"), label("decoder.x0.h1"), label("a3<x>"), label("blocks.s0.h1")
    ('L9H6', 'L9KV2<k>', 'm3', 'decoder.0.cross_attn.H1', 'L3<x>', 'blocks.0.mixer.H1')
    """
    if door := _DOOR.match(name):
        prefix, letter, layer = door.groups()
        return (f"{prefix}{layer}.{_PARTS[letter]}" if prefix else f"L{layer}") + name[door.end() :]

    def spelled(found: re.Match[str]) -> str:
        prefix, letter, layer, kind, number = found.groups()
        head = f"{kind.upper()}{number}"
        return f"{prefix}{layer}.{_PARTS[letter]}.{head}" if prefix else f"L{layer}{head}"

    return re.sub(rf"^{_HEAD.pattern}", spelled, name)


def site_of(label: str) -> str | None:
    """The site that a head's label names; None where it names a layer.

    >>> site_of("decoder.0.cross_attn.H1"), site_of("L9H6")
    ('decoder.0.cross_attn', None)
    """
    found = _SITE_LABEL.fullmatch(label)
    return found[1] if found else None


def number_of(label: str) -> tuple[int, int] | None:
    """(layer or block, head or group) of a head's label; None if it is none.

    >>> number_of("L9KV2"), number_of("decoder.3.cross_attn.H1"), number_of("m3")
    ((9, 2), (3, 1), None)
    """
    found = _LABEL.fullmatch(label) or re.fullmatch(r"(?:\w+\.)*?(\d+)\.\w+\.(?:H|KV)(\d+)", label)
    return (int(found[1]), int(found[2])) if found else None


def head_of(name: str) -> tuple[int, int] | None:
    """(block, head) of a query head's node, else None.

    >>> head_of("a9.h6"), head_of("decoder.x0.h1"), head_of("m3")
    ((9, 6), (0, 1), None)
    """
    found = _HEAD.fullmatch(name)
    return (int(found[3]), int(found[5])) if found and found[4] == "h" else None
