"""A capture under the names and in the layouts of TransformerLens' activation cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from workbench.capture.site_capture import Forward, SiteCapture
from workbench.errors import CaptureError, nearest
from workbench.hooks.sites import Site, Sites

Key = str | tuple[str, int] | tuple[str, int, str]


class Cache(Mapping[str, Tensor]):
    """Activations of one forward by TransformerLens' names; patterns and results are computed when they are read.

    - `blocks.3.attn.hook_pattern` [batch, head, query, key]
    - `hook_q`, `hook_k`, `hook_v`, `hook_z` [batch, position, head, d_head]; k and v have their own number of heads.
      Queries and keys are as they enter the product: in a model with rotary embeddings their names are `hook_rot_q`
      and `hook_rot_k`, and a model that scales its queries first (OPT, Whisper) gives them scaled. Where a model writes
      its attention out, there are none.
    - `hook_result` [batch, position, head, d_model], `hook_z_grad` like `hook_z`

    A key exists where the capture kept what it needs. In a model with several towers names begin with the tower:
    `decoder.3.cross_attn.hook_pattern`. `cache["pattern", 3]` is short for the first form, `cache["pattern", -1]`
    counts from the last layer, and `cache["pattern", 3, "decoder.cross_attn"]` names tower and kind where they are not
    the only ones. The model's own module path may stand in a name's place. Where a site is called several times in a
    forward, these are its first call; that of a later one is `blocks.3.attn#1.hook_pattern`.
    """

    def __init__(self, forward: Forward, model_sites: Sites, *, rotary: bool, limit: int | None) -> None:
        self._limit = limit
        self._sites = Sites([capture.site for capture in forward.sites.values()])
        self._make: dict[str, Callable[[], Tensor]] = {}
        self._stacks: dict[str, list[Site]] = {}  # by tower and kind, all layers of the model
        for site in dict.fromkeys((*model_sites, *self._sites)):
            self._stacks.setdefault(_stack(site), []).append(site)
        aliases = [site.alias for site in self._sites]
        self._prefix = {site.name: site.alias if aliases.count(site.alias) == 1 else site.name for site in self._sites}
        self._spelled = {
            name: self._prefix[site.name]
            for site in self._sites
            for name in (*(site.aliases if self._prefix[site.name] == site.alias else ()), site.name)
        }
        for capture in forward.sites.values():
            for hook, make in self._hooks(capture, rotary).items():
                self._make[f"{self._prefix[capture.site.name]}.{hook}"] = make

    def _hooks(self, capture: SiteCapture, rotary: bool) -> dict[str, Callable[[], Tensor]]:
        turned = "rot_" if rotary and capture.site.kind not in ("cross", "state") else ""
        hooks: dict[str, Callable[[], Tensor]] = {}
        if capture.lazy is not None or capture.weights is not None:
            hooks["hook_pattern"] = lambda: capture.pattern.dense(limit=self._limit)
        held = {} if capture.lazy is None else capture.lazy.state()[1]
        for name, hook in (("q", f"{turned}q"), ("k", f"{turned}k"), ("values", "v")):
            if name in held and held[name].dim() == 4:
                hooks[f"hook_{hook}"] = _held(capture, name)
        for name, tensor in (("z", capture.z), ("z_grad", capture.z_gradient)):
            if tensor is not None:
                hooks[f"hook_{name}"] = partial(_itself, tensor)
        if capture.has_result:
            hooks["hook_result"] = lambda: capture.result(limit=self._limit)
        return hooks

    def __getitem__(self, key: Key) -> Tensor:
        name = self._name(key)
        if name not in self._make:
            raise _NoKey(f'the cache has no "{name}"', hint=nearest(name, list(self._make), "name"))
        return self._make[name]()

    def __contains__(self, key: object) -> bool:
        try:
            return self._name(key) in self._make
        except CaptureError:
            return False

    def __iter__(self) -> Iterator[str]:
        return iter(self._make)

    def __len__(self) -> int:
        return len(self._make)

    def _name(self, key: Any) -> str:
        if isinstance(key, str):
            stem, _, hook = key.rpartition(".")
            return f"{self._spelled.get(stem, stem)}.{hook}"
        if not isinstance(key, tuple) or not 2 <= len(key) <= 3 or not isinstance(key[1], int):
            raise _NoKey(f"a key is a name or (hook, layer), not {key!r}")
        hook, layer = key[0].removeprefix("hook_"), key[1]
        stack = self._stack(key)
        layers = {site.layer: site for site in reversed(self._stacks[stack]) if not site.call}
        wanted = layer if layer >= 0 else max(layers) + 1 + layer
        if wanted not in layers:
            raise _NoKey(f"{stack} has the layers {', '.join(map(str, sorted(layers)))}, no layer {layer}")
        site = layers[wanted]
        return f"{self._prefix.get(site.name, site.alias)}.hook_{hook}"

    def _stack(self, key: tuple[Any, ...]) -> str:
        names = list(self._stacks)
        if len(key) == 2:
            if len(names) == 1:
                return names[0]
            example = f'cache["{key[0]}", {key[1]}, "{names[-1]}"]'
            raise _NoKey(f"layer {key[1]} is one of several: {', '.join(names)}", hint=f"say which: {example}")
        fitting = [name for name in names if name in (key[2], f"{key[2]}.attn") or name.endswith(f".{key[2]}")]
        if len(fitting) != 1:
            raise _NoKey(f'"{key[2]}" is {"several" if fitting else "none"} of {", ".join(names)}')
        return fitting[0]

    def __repr__(self) -> str:
        hooks = dict.fromkeys(name.rpartition(".")[2] for name in self._make)
        return f"Cache({len(self._sites)} sites: {', '.join(hooks)})"


class _NoKey(CaptureError, KeyError):
    """A name that a cache does not have."""

    __str__ = Exception.__str__  # a KeyError would quote its message


def _held(capture: SiteCapture, name: str) -> Callable[[], Tensor]:
    """[batch, position, head, d_head] of a tensor that the pattern is made of."""
    return lambda: capture.pattern.state()[1][name].transpose(1, 2)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _stack(site: Site) -> str:
    """Tower and kind of a site, as its alias spells them: "blocks.attn", "decoder.cross_attn"."""
    return f"{site.tower or 'blocks'}.{site.at_call(0).alias.rpartition('.')[2]}"
