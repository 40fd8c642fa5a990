"""Join the forwards of a generation into one: what a single forward over prompt and answer would have shown.

With a cache, each new token is a forward of its own, of one query and all keys so far (or the last ones, where a
sliding window forgets). Here its queries, keys and log-sum-exp are put at their absolute positions, and the statistics
are streamed anew. Nothing is taken on trust: the keys that a step found in the cache must be those that the steps
before it put there, up to the rounding of a model that makes them anew of what it caches; the state that a recurrence
found, that which the step before left, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from workbench.capture.recurrences import join_recurrence
from workbench.capture.settings import Settings
from workbench.capture.site_capture import Forward, SiteCapture, joined_outputs
from workbench.errors import CaptureError
from workbench.hooks.sites import Site
from workbench.hooks.tap import StateLink
from workbench.kernels import streaming
from workbench.kernels.checks import equal_but_for_rounding
from workbench.kernels.masks import Mask
from workbench.kernels.patterns import DensePattern, PartOfHeads, Pattern, SignedPattern
from workbench.kernels.softmax import SoftmaxPattern


def join(forwards: Sequence[Forward], settings: Settings, unrecorded: Collection[str] = frozenset()) -> list[Forward]:
    """One forward per sequence: each prompt with the cached steps that follow it in the same thread.

    Args:
        unrecorded: sites of which calls are known to be missing; in a sequence where they are, they are left out.

    Raises:
        CaptureError: patterns were not kept or are no softmax, a sequence begins before the capture, the cache was
            changed between steps, or the limit of the capture is exceeded.
    """
    forwards = [forward for forward in forwards if forward.sites]  # at the others nothing was recorded
    found = _sequences(forwards)
    budget = _Budget(settings.limit)
    return [_join_sequence(index, part, settings, budget, unrecorded) for index, part in enumerate(found)]


def _sequences(forwards: Sequence[Forward]) -> list[list[Forward]]:
    """The forwards of each sequence, in the order in which sequences begin."""
    found: list[list[Forward]] = []
    latest: dict[int, list[Forward]] = {}  # by thread
    packed: dict[int, list[list[Forward]]] = {}
    for forward in forwards:
        if forward.packed is not None:
            several = packed.setdefault(forward.thread, [])
            sequence = next((one for one in several if _goes_on_in(one[-1], forward)), None)
            if sequence is None:
                several.append(sequence := [])
                found.append(sequence)
            sequence.append(forward)
            continue
        if not _continues(latest.get(forward.thread, []), forward):
            latest[forward.thread] = []
            found.append(latest[forward.thread])
        latest[forward.thread].append(forward)
    return found


def _goes_on_in(before: Forward, forward: Forward) -> bool:
    """Whether a packed sequence goes on with what one before it has put into the cache: its last keys are the same."""
    name = next((name for name, one in forward.sites.items() if one.site.kind not in ("cross", "state", "gate")), None)
    if name is None or name not in before.sites or before.span == forward.span:  # sequences of one forward are others
        return False
    old, new = (_joinable([each.sites[name]])[0] for each in (before, forward))
    cached = _keys(new)[:, :, : _filled(new) - new.n_queries]
    there = _keys(old)[:, :, : _filled(old)]
    n = min(cached.shape[2], there.shape[2])
    return n > 0 and equal_but_for_rounding(cached[:, :, cached.shape[2] - n :], there[:, :, there.shape[2] - n :])


def _continues(earlier: Sequence[Forward], forward: Forward) -> bool:
    """Whether a forward goes on with a sequence rather than beginning one."""
    before = {name: site for each in earlier for name, site in each.sites.items()}
    again = [site for name, site in forward.sites.items() if name in before]
    if not again:  # `generate` runs an encoder by itself, then the decoder
        decoding = any(c.site.kind == "cross" or c.site.tower == "decoder" for c in forward.sites.values())
        return bool(earlier) and decoding and all(c.site.tower == "encoder" for c in before.values())
    own = [site for site in again if site.site.kind != "cross"]
    if own:
        return any(site.shape[3] > site.shape[2] or site.state.found is not None for site in own)
    return all(_same_keys(before[site.site.name], site) for site in again)


def _same_keys(a: SiteCapture, b: SiteCapture) -> bool:
    one, other = _joinable([a])[0], _joinable([b])[0]
    return type(one) is type(other) and equal_but_for_rounding(_keys(one), _keys(other))


@dataclass
class _Budget:
    """Bytes that may still be kept."""

    limit: int | None
    used: int = 0

    def take(self, size: int, site: Site) -> None:
        self.used += size
        if self.limit is not None and self.used > self.limit:
            raise CaptureError(
                f"the joined capture would keep {self.used:,} bytes or more, the limit is {self.limit:,}",
                site=site.name,
                hint="capture fewer sites, or raise limit= in capture(...)",
            )


def _join_sequence(
    index: int, part: Sequence[Forward], settings: Settings, budget: _Budget, unrecorded: Collection[str]
) -> Forward:
    joined = Forward(index, thread=part[0].thread)
    _join_tokens(joined, part)
    for name in dict.fromkeys(name for forward in part for name in forward.sites):
        fired = [i for i, forward in enumerate(part) if name in forward.sites]
        captures = [part[i].sites[name] for i in fired]
        if len(fired) < len(part) - fired[0] and captures[0].site.path in unrecorded:
            continue
        if len(fired) > 1 and len(fired) < len(part) - fired[0]:
            raise CaptureError(
                f"it fired in {len(fired)} of {len(part) - fired[0]} steps of a sequence",
                site=name,
                hint="a model that skips layers has no joined pattern; look at cap.calls[i]",
            )
        site, shape = captures[0].site, captures[0].shape
        if len(captures) == 1 and (site.kind == "cross" or shape[2] == shape[3]):
            joined.sites[name] = captures[0]
        elif site.kind == "gate" or any(capture.state != StateLink() for capture in captures):
            budget.take(sum(capture.pattern.nbytes for capture in captures), site)
            joined.sites[name] = join_recurrence(captures, settings, joined.ids_of(site, "query"))
        else:
            joined.sites[name] = _join_site(captures, joined.ids_of(site, "query"), settings, budget)
    return joined


def _join_tokens(joined: Forward, part: Sequence[Forward]) -> None:
    """Ids and their text of the whole sequence; a stream that some step lacks is left out."""
    decoding = [f for f in part if f.sites.keys() & part[-1].sites.keys()]
    two_streams = any("decoder" in f.ids for f in part)
    for stream in dict.fromkeys(name for f in part for name in f.ids):
        having = [f for f in part if stream in f.ids]
        if stream == "input" and two_streams:
            having = having[:1]  # what the encoder read
        elif any(stream not in f.ids for f in decoding):
            continue
        if len({f.ids[stream].shape[0] for f in having}) > 1:
            continue  # the keys differ as well, which is an error
        joined.ids[stream] = torch.cat([f.ids[stream] for f in having], dim=1)
        rows = [f.tokens[stream] for f in having if stream in f.tokens]
        if len(rows) == len(having):
            joined.tokens[stream] = [list(chain(*parts)) for parts in zip(*rows, strict=True)]


@dataclass(frozen=True)
class _Step:
    """The pattern of one step, and which absolute queries and keys its rows and columns are."""

    pattern: Pattern
    queries: slice
    keys: slice

    @property
    def size(self) -> tuple[slice, slice, slice, slice]:
        """The step's own queries, keys, batch and heads, as a `Mask` asks for them."""
        n_keys = self.keys.stop - self.keys.start
        return slice(0, self.pattern.n_queries), slice(0, n_keys), slice(None), slice(None)


def _join_site(captures: Sequence[SiteCapture], ids: Tensor | None, settings: Settings, budget: _Budget) -> SiteCapture:
    site = captures[0].site
    if any(capture.z_gradient is not None for capture in captures):
        raise CaptureError(
            "gradients at single steps cannot be joined", site=site.name, hint="run the whole sequence in one forward"
        )
    patterns = _joinable(captures)
    first, cross = patterns[0], site.kind == "cross"
    n_queries = sum(pattern.n_queries for pattern in patterns)
    n_keys = first.n_keys if cross else n_queries
    shape = (first.n_batch, first.n_heads, n_queries, n_keys)
    shard = captures[0].shard
    keys = _keys(first)
    budget.take(settings.bytes_for(shape, first.n_kv_heads, keys.shape[-1], keys.element_size()), site)
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(keys.device.type, enabled=False):
        steps, keys, values = _one_set_of_keys(site, patterns) if cross else _grown(site, patterns)
        mask = None if cross else _positional_rule(steps, n_keys)
        if mask is None:
            mask = _mask_of_all(steps, n_queries, n_keys, site, budget)
        pattern = _one_pattern(site, steps, mask, keys, values, budget)
        try:
            statistics = streaming.statistics(pattern, settings.names_at(site), settings.options(ids))
        except CaptureError as error:
            raise CaptureError(error.message, site=site.name, shape=error.shape, hint=error.hint) from None
        kept = [capture.weights for capture in captures if capture.weights is not None]
        weights = None
        if len(kept) == len(captures):
            weights = _placed(kept, steps, (shape[0], kept[0].shape[1], *shape[2:]))
        if shard is not None:
            statistics = {name: shard.widened(value) for name, value in statistics.items()}
            pattern = PartOfHeads(pattern, shard.first, shard.n_heads)
    return replace(
        captures[0],
        shape=pattern.shape,
        statistics=statistics,
        kernel=", ".join(dict.fromkeys(capture.kernel for capture in captures)),
        weights=weights,
        lazy=pattern,
        held=captures[0].held if cross else [],  # all else is new
        signed=pattern.signed,
        normalised=pattern.normalised,
        times=None,
        **joined_outputs(captures),
    )


def _joinable(captures: Sequence[SiteCapture]) -> list[Pattern]:
    """The kept patterns, if they are such as can be joined with each other."""
    site = captures[0].site
    patterns = [capture.pattern for capture in captures]
    patterns = [pattern.here if isinstance(pattern, PartOfHeads) else pattern for pattern in patterns]
    for pattern in patterns:
        dense = type(pattern) in (DensePattern, SignedPattern) and pattern.values is not None
        if type(pattern) is not SoftmaxPattern and not dense:
            raise CaptureError(
                f"steps of a {type(pattern).__name__} cannot be joined",
                site=site.name,
                hint="capture with queries_keys=True, and values=True where the model writes its attention out; "
                "leave out sites= that have no softmax",
            )
    first = patterns[0]
    for pattern in patterns[1:]:
        if (pattern.n_batch, pattern.n_heads, pattern.n_kv_heads) != (first.n_batch, first.n_heads, first.n_kv_heads):
            raise _changed(site, pattern)
        if _facts(pattern) != _facts(first) or not _equal(pattern.sinks, first.sinks):
            raise CaptureError("kind, scale, softcap, sinks or dtype differ between steps", site=site.name)
    return patterns


def _facts(pattern: Pattern) -> tuple[object, ...]:
    scores = (pattern.scale, pattern.softcap) if isinstance(pattern, SoftmaxPattern) else ()
    return isinstance(pattern, DensePattern), pattern.dtype, pattern.values is None, *scores


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _keys(pattern: Pattern) -> Tensor:
    """What the cache holds of each key [batch, head, key, d]: of weights that a model wrote out, only the values."""
    held = pattern.k if isinstance(pattern, SoftmaxPattern) else pattern.values
    assert held is not None
    return held


def _one_pattern(
    site: Site, steps: Sequence[_Step], mask: Mask, keys: Tensor, values: Tensor | None, budget: _Budget
) -> Pattern:
    first, patterns = steps[0].pattern, [step.pattern for step in steps]
    softmax = [pattern for pattern in patterns if isinstance(pattern, SoftmaxPattern)]
    if isinstance(first, SoftmaxPattern):
        return SoftmaxPattern(
            torch.cat([pattern.q for pattern in softmax], dim=2),
            keys,
            mask,
            scale=first.scale,
            lse=torch.cat([pattern.lse for pattern in softmax], dim=2),
            values=values,
            softcap=first.softcap,
            sinks=None if first.sinks is None else first.sinks.clone(),
        )
    shape = (first.n_batch, first.n_heads, mask.n_queries, mask.n_keys)
    budget.take(math.prod(shape) * first.dtype.itemsize, site)
    weights = _placed([pattern.weights for pattern in patterns if isinstance(pattern, DensePattern)], steps, shape)
    signed = any(pattern.signed for pattern in patterns)
    normalised = all(pattern.normalised for pattern in patterns)
    dense = DensePattern.of(weights, mask, normalised=normalised, signed=signed)
    dense.values = values
    return dense


def _one_set_of_keys(site: Site, patterns: Sequence[Pattern]) -> tuple[list[_Step], Tensor, Tensor | None]:
    """Steps whose keys are the same, as in cross-attention; those keys and their values."""
    first, done, steps = patterns[0], 0, []
    for pattern in patterns:
        if not _equal(_keys(pattern), _keys(first)):
            raise _changed(site, pattern)
        steps.append(_Step(pattern, slice(done, done + pattern.n_queries), slice(0, pattern.n_keys)))
        done += pattern.n_queries
    return steps, _keys(first), first.values


def _grown(site: Site, patterns: Sequence[Pattern]) -> tuple[list[_Step], Tensor, Tensor | None]:
    """Steps whose keys grow by their queries; all keys and values."""
    total = sum(pattern.n_queries for pattern in patterns)
    whole = _room(_keys(patterns[0]), total)
    values = None if patterns[0].values is None else _room(patterns[0].values, total)
    done, steps = 0, []
    for pattern in patterns:
        keys, n_keys = _keys(pattern), _filled(pattern)
        n_cached = n_keys - pattern.n_queries
        if n_cached < 0 or (done == 0 and n_cached > 0):
            raise CaptureError(
                f"a sequence begins with {pattern.n_queries} queries and {n_keys} keys: its first tokens were not seen",
                site=site.name,
                hint="begin the capture before the prompt is run, and let generate() fill the cache",
            )
        start, stop = done - n_cached, done + pattern.n_queries
        if start < 0 or not equal_but_for_rounding(keys[:, :, :n_cached], whole[:, :, start:done]):
            raise _changed(site, pattern)
        whole[:, :, done:stop] = keys[:, :, n_cached:n_keys]
        if values is not None and pattern.values is not None:
            values[:, :, done:stop] = pattern.values[:, :, n_cached:n_keys]
        steps.append(_Step(pattern, slice(done, stop), slice(start, stop)))
        done = stop
    return steps, whole, values


def _room(like: Tensor, n_keys: int) -> Tensor:
    """[batch, head, key, d], not filled yet."""
    return like.new_empty(*like.shape[:2], n_keys, like.shape[3])


def _filled(pattern: Pattern) -> int:
    """How many keys there are, less the room at the end of a cache of fixed size that nothing was written to yet."""
    if pattern.n_keys <= pattern.n_queries:
        return pattern.n_keys
    seen = (pattern.seen.queries_per_key > 0).any(0).any(0).nonzero()
    return max(pattern.n_queries, int(seen[-1]) + 1 if len(seen) else 0)


def _changed(site: Site, pattern: Pattern) -> CaptureError:
    return CaptureError(
        "a step found other keys in its cache than the steps before put there",
        site=site.name,
        shape=pattern.shape,
        hint="beam search reorders the cache, assisted generation cuts it back, and a quantised one rounds; "
        "generate greedily or by sampling, with a plain cache",
    )


def _positional_rule(steps: Sequence[_Step], n: int) -> Mask | None:
    """The causal mask, with a window or without, that shows each row what it saw; None if there is no such."""
    first_seen = []
    for step in steps:
        mask = step.pattern.mask
        aligned = step.keys.start + mask.offset == step.queries.start
        by_position = mask.causal or mask.window is not None
        if mask.tensor is not None or (by_position and not aligned):
            return None
        if not mask.causal and step.pattern.n_queries > 1:
            return None
        i = torch.arange(step.queries.start, step.queries.stop)
        in_cache = torch.full_like(i, step.keys.start)
        first_seen.append(in_cache if mask.window is None else torch.maximum(in_cache, i - mask.window + 1))
    lowest, i = torch.cat(first_seen), torch.arange(n)
    if not lowest.any():
        return Mask(n, n, causal=True)
    windowed = int(lowest.nonzero()[0])
    window = windowed - int(lowest[windowed]) + 1
    fits = torch.equal(lowest, (i - window + 1).clamp(min=0))
    return Mask(n, n, causal=True, window=window) if fits else None


def _mask_of_all(steps: Sequence[_Step], n_queries: int, n_keys: int, site: Site, budget: _Budget) -> Mask:
    """What each row saw, as a tensor (additive if one of the steps' is); no tensor where every key was seen."""
    everything = slice(0, n_keys)
    if all(step.keys == everything and step.pattern.mask.visible(*step.size) is None for step in steps):
        return Mask(n_queries, n_keys)
    tensors = [step.pattern.mask.tensor for step in steps if step.pattern.mask.tensor is not None]
    dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.bool)
    n_batch, n_heads = (max((t.shape[axis] for t in tensors), default=1) for axis in (0, 1))
    budget.take(n_batch * n_heads * n_queries * n_keys * dtype.itemsize, site)
    hidden = False if dtype == torch.bool else -torch.inf
    device = steps[0].pattern.device
    whole = torch.full((n_batch, n_heads, n_queries, n_keys), hidden, dtype=dtype, device=device)
    for step in steps:
        visible = step.pattern.mask.visible(*step.size)
        seen = torch.ones((), dtype=torch.bool, device=device) if visible is None else visible.to(device)
        if dtype != torch.bool:
            added = step.pattern.mask.cut(*step.size) if step.pattern.mask.additive else None
            seen = torch.where(seen, 0.0 if added is None else added, -torch.inf).to(dtype)
        whole[:, :, step.queries, step.keys] = seen
    return Mask(n_queries, n_keys, tensor=whole)


def _placed(weights: Sequence[Tensor], steps: Sequence[_Step], shape: tuple[int, int, int, int]) -> Tensor:
    """The steps' weights in one map of that shape."""
    whole = weights[0].new_zeros(shape)
    for part, step in zip(weights, steps, strict=True):
        whole[:, :, step.queries, step.keys] = part[..., step.size[1]]
    return whole
