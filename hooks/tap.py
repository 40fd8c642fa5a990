"""What an attention call is, whichever tap saw it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from workbench.errors import CaptureError
from workbench.hooks.head_shards import HeadShard
from workbench.hooks.packing import Rule, Segment, block_mask
from workbench.hooks.proofs.axes import Bound
from workbench.kernels.masks import Mask, as_four, hidden_below
from workbench.kernels.patterns import DensePattern, Pattern
from workbench.kernels.softmax import SoftmaxPattern

Kind = Literal["self", "cross", "window", "halo", "channel", "pooled", "memory", "state", "gate"]
"""What a site mixes."""


class Unshown(CaptureError):
    """A call of which no map can show what it does: a capture goes on without it, and lists it."""


@dataclass(frozen=True)
class Block:
    """Which part of its site's map a call is, where several calls of one site make one map.

    Attributes:
        number, of: which of how many. queries, keys: positions of its rows and keys. n_keys: of the whole map.
    """

    number: int
    of: int
    queries: slice
    keys: slice
    n_keys: int


@dataclass(frozen=True)
class StateLink:
    """How a call of a recurrence hangs together with others: the states that it found in its cache and left there.

    Attributes:
        found, left: for each batch entry a number that tells states apart, to the bit; None for no state.
    """

    found: tuple[int, ...] | None = None
    left: tuple[int, ...] | None = None

    @classmethod
    def between(cls, found: Mapping[str, Tensor] | None, left: Mapping[str, Tensor] | None) -> StateLink:
        """From the tensors [batch, ...] themselves, by name."""
        return cls(*(None if each is None else _told_apart(each.values()) for each in (found, left)))


_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _told_apart(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    total: Tensor | None = None
    for tensor in tensors:
        bits = tensor.detach().contiguous().flatten(1).view(_OF_SIZE[tensor.element_size()]).long()
        factors = torch.arange(1, bits.shape[1] + 1, device=bits.device) * 0x2545F4914F6CDD1D  # it wraps around
        mixed = (bits + 1) * (factors | 1)
        found = (mixed ^ (mixed >> 29)).sum(1)
        total = found if total is None else total * 31 + found
    return () if total is None else tuple(total.tolist())


@dataclass(frozen=True)
class AttentionCall:
    """One call of an attention kernel, at the kernel's boundary; the tensors are the model's own.

    Attributes:
        site: name of the module that made the call.
        module: that module.
        q: [batch, head, query, d_head]; k: [batch, kv head, key, d_head]; None where only `weights` are known.
        v: [batch, kv head, key, width].
        output: what the kernel gave: each head's output, its axes as `layout` says, unless `finish` is set.
        kernel: name of the kernel that ran.
        tap: which tap saw the call.
        backend: Hugging Face's name of the attention backend, "" elsewhere.
        mask: as given, boolean (True: may see) or additive, or None.
        is_causal: query row i sees keys j <= i + offset.
        offset: absolute position of the first query; None: 0 if `is_causal` or across sequences, else as `place` says.
        place: tells where the first query stands among the keys, None where nothing shows it; by default at the end.
        window: a query sees less than this many positions back; None for no such limit.
        scale: factor on q kᵀ; None means 1/√d_head.
        softcap: scores become softcap · tanh(score / softcap).
        sinks: [head] logits that join the softmax's denominator only.
        bias: added to the scores besides the mask, [batch or 1, head or 1, query, key].
        dropout: probability with which the kernel dropped weights.
        lse: [batch, head, query] natural log of the softmax denominator, if the kernel gave it.
        weights: [batch, head, query, key] that the model computed itself, before dropout, with their autograd history.
        layout: axes of `output`, of b, h, q and d.
        axes: what the axes of `output` are made of, where no such order says it; None for `layout`.
        finish: maps A·V to `output`, for kernels that go on past A·V; None if `output` is A·V.
        build: makes the call's pattern, for kernels that are no softmax; None for those that are.
        build_others: makes further maps of the call by name, beside the factors of its pattern.
        replay: the call happens again in a backward pass (gradient checkpointing).
        windows: how many entries of its batch each of the model's examples has, such as windows of an image.
        block: it is a part of its site's map only; None if it is all of it. joined: how many calls it was made of.
        shard: which heads of the whole model these are, where other processes hold the rest; None: all of them.
        segments: where the kernel was told that the first row holds several sequences, which.
        state: of a module that has a reader, what it found in its cache and left there.
        compiled: of a call in compiled code, "kept" where only what a fused kernel takes and gives was read, so that
            its graph is as it was; "changed" where the compiler may have merged less.
        joins: path and module of the linear layer that takes what the heads give, where a compiled graph shows it.
        mask_key: of a call in compiled code, what tells its mask: equal only where masks are, while they are held.
        part: of a call on packed rows, the sequence that this one is; only `output` is still that of all.
    """

    site: str
    module: nn.Module
    q: Tensor | None
    k: Tensor | None
    v: Tensor
    output: Tensor
    kernel: str
    tap: str
    backend: str = ""
    mask: Tensor | None = None
    is_causal: bool = False
    offset: int | None = None
    place: Callable[[], int | None] | None = None
    window: int | None = None
    scale: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None
    dropout: float = 0.0
    lse: Tensor | None = None
    weights: Tensor | None = None
    layout: str = "bhqd"
    axes: Bound | None = None
    finish: Callable[[Tensor], Tensor] | None = None
    build: Callable[[], Pattern] | None = None
    build_others: Callable[[], dict[str, Pattern]] = dict
    replay: bool = False
    shard: HeadShard | None = None
    segments: tuple[Segment, ...] = ()
    part: Segment | None = None
    windows: int = 1
    block: Block | None = None
    joined: int = 1
    state: StateLink = field(default_factory=StateLink)
    compiled: Literal["", "kept", "changed"] = ""
    joins: tuple[str, nn.Module] | None = None
    mask_key: Hashable | None = None

    @property
    def has_halo(self) -> bool:
        """Whether its windows read keys beyond their own queries, so that the two are numbered apart."""
        n_queries, n_keys = self.heads_of(self.output).shape[2] if self.finish is None else 1, self.v.shape[-2]
        apart = self.windows > 1 and n_queries != n_keys and (n_queries > 1 or self.axes is not None)
        return apart and self.tap in ("sdpa", "written_out") and not self.is_causal

    @property
    def lengths(self) -> tuple[int, int]:
        """(queries, keys)."""
        of_queries = self.q if self.weights is None else self.weights
        return (1 if of_queries is None else of_queries.shape[-2]), self.v.shape[-2]

    @property
    def is_apart(self) -> bool:
        """Whether nothing shows where its queries stand among its keys, so that their positions cannot be compared."""
        return self.has_halo or (self.place is not None and self.place() is None)

    def standing(self, place: Callable[[], int | None]) -> AttentionCall:
        """The call with its first query where `place` says."""
        return replace(self, offset=None, place=place)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(heads, kv heads, d_head)."""
        if self.weights is not None:
            return self.weights.shape[1], self.v.shape[1], self.v.shape[-1]
        if self.q is None or self.k is None or self.q.dim() != 4:
            if self.build is None:
                return 1, 1, self.v.shape[-1]
            return self.build().n_heads, self.v.shape[1], self.v.shape[-1]
        # A state-space mixer's queries and keys are shared by groups of heads; its values never are.
        return max(self.q.shape[1], self.v.shape[1]), self.k.shape[1], self.q.shape[-1]

    @property
    def sizes_of_all(self) -> tuple[int, int, int]:
        """The sizes, with the heads that other processes hold."""
        if self.shard is None:
            return self.sizes
        return self.shard.n_heads, self.shard.n_kv_heads, self.sizes[2]

    @cached_property
    def mixed(self) -> Tensor:
        """Each head's output [batch, head, query, width]; where the kernel went on past it, it is computed anew."""
        return self.z() if self.finish is None else self.pattern().outputs(self.v)

    def z(self) -> Tensor:
        """Each head's output A·V [batch, head, query, width]: a view of `output`, with its autograd history.

        Raises:
            CaptureError: the kernel went on past A·V.
        """
        if self.finish is not None:
            raise CaptureError(f"the kernel {self.kernel} does not give A·V", site=self.site)
        return self.heads_of(self.output)

    def heads_of(self, output: Tensor) -> Tensor:
        """An output of the kernel, or its gradient, as [batch, head, query, width]; a view where there is one."""
        if self.axes is not None:
            return self.own(self.axes.heads(output))
        return self.own(output.permute([self.layout.index(axis) for axis in "bhqd"]))

    def own(self, heads: Tensor) -> Tensor:
        """Of what all heads give [batch, head, query, ...] the part that this call is; a view."""
        part = self.part
        return heads if part is None else heads[part.row : part.row + 1, :, part.start : part.stop]

    def of_sequence(self, one: Segment, rule: Rule) -> AttentionCall:
        """The call as if one of the sequences that its rows hold had been alone."""
        row, queries = slice(one.row, one.row + 1), slice(one.start, one.stop)
        keys = slice(one.key_start, one.key_stop)

        def cut(tensor: Tensor | None, *along: slice) -> Tensor | None:
            return None if tensor is None else tensor[(row if len(tensor) > 1 else slice(None), slice(None), *along)]

        values, bias = cut(self.v, keys), None if self.bias is None else as_four(self.bias)
        assert values is not None
        return replace(
            self,
            q=cut(self.q, queries),
            k=cut(self.k, keys),
            v=values,
            weights=cut(self.weights, queries, keys),
            lse=cut(self.lse, queries),
            bias=cut(bias, queries if bias is not None and bias.shape[2] > 1 else slice(None), keys),
            mask=rule.mask,
            is_causal=rule.causal,
            window=rule.window,
            offset=(one.key_stop - one.key_start) - (one.stop - one.start),
            segments=(),
            part=one,
        )

    def as_output(self, z: Tensor) -> Tensor:
        """What the kernel gives when its heads give `z` [batch, head, query, width]."""
        if self.finish is not None:
            return self.finish(z)
        if self.axes is not None:
            return self.axes.output(z)
        return z.permute(["bhqd".index(axis) for axis in self.layout])

    def pattern(self, *, cross: bool = False) -> Pattern:
        """The lazy pattern of the call, on the model's own tensors.

        Args:
            cross: queries and keys are positions of different sequences, so that they are not aligned at the end.
        """
        if self.build is not None:
            return self.build()
        if self.weights is not None:
            return self._written_out(cross)
        if self.q is None or self.k is None or self.q.dim() != 4:
            shape = None if self.q is None else self.q.shape
            raise CaptureError("queries are not [batch, head, query, d]", site=self.site, shape=shape)
        q, k, v = self.q, self.k, self.v
        n_q, n_k = q.shape[2], k.shape[2]
        apart = bool(self.segments) and self.mask is None  # then the tensor has the rules of each sequence in it
        mask = Mask(
            n_q,
            n_k,
            causal=self.is_causal and not apart,
            offset=self.first_position(cross=cross),
            window=None if apart else self.window,
            tensor=self._mask_tensor(),
        )
        return SoftmaxPattern(
            q, k, mask, scale=self.scale, lse=self.lse, values=v.detach(), softcap=self.softcap, sinks=self.sinks
        )

    @property
    def hiding(self) -> Tensor | None:
        """The mask; where sequences are packed without one, what keeps them apart [1, 1, query, key]."""
        if self.mask is not None or not self.segments or self.q is None or self.k is None:
            return self.mask
        return block_mask(
            self.segments, self.q.shape[2], self.k.shape[2],
            causal=self.is_causal, window=self.window, device=self.q.device,
        )  # fmt: skip

    def first_position(self, *, cross: bool = False) -> int:
        """Absolute position of the first query among the keys; `cross` as in `pattern`."""
        if cross and not self.is_causal:
            return 0
        if self.offset is not None:
            return self.offset
        if self.is_causal:
            return 0
        found = None if self.place is None else self.place()
        if found is not None:
            return found
        n_queries, n_keys = self.lengths
        return n_keys - n_queries

    def _mask_tensor(self) -> Tensor | None:
        """Mask and bias as one tensor of four dimensions."""
        given = self.hiding
        if given is None:
            return None if self.bias is None else self.bias.detach()
        mask = as_four(given.detach())
        if self.bias is None:
            return mask
        bias = self.bias.detach()
        if mask.dtype == torch.bool:
            return torch.where(mask, bias, -torch.inf)
        return torch.where(mask <= hidden_below(mask.dtype), -torch.inf, bias + mask)

    def _written_out(self, cross: bool) -> Pattern:
        """A map that the model computed itself. A weight of zero in every head is taken for a key that is hidden."""
        weights = self.weights
        assert weights is not None
        weights = weights.detach()
        n_q, n_k = weights.shape[-2:]
        visible = (weights != 0).any(1, keepdim=True)
        mask = Mask(n_q, n_k, offset=self.first_position(cross=cross), tensor=None if bool(visible.all()) else visible)
        sums = weights.sum(-1, dtype=torch.float32)
        normalised = bool(((sums - 1).abs() < 0.01).logical_or(sums == 0).all())
        pattern = DensePattern.of(weights, mask, normalised=normalised)
        pattern.values = self.v.detach()
        return pattern
