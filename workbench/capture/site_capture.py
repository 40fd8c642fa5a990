"""One site in one forward, and one forward: the parts of a capture."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from workbench.capture.timing import CallTimes
from workbench.errors import CaptureError, nearest
from workbench.hooks.head_shards import HeadShard
from workbench.hooks.projections import Projection
from workbench.hooks.sites import Site
from workbench.hooks.tap import StateLink
from workbench.kernels.gradients import GRADIENT_SUMS
from workbench.kernels.patterns import DENSE_LIMIT, DensePattern, Pattern
from workbench.kernels.statistics import STATISTICS, VALUE_WEIGHTED, output_names
from workbench.tokens import visible_text

PATTERN = "pattern."  # starts the names of tensors that rebuild a pattern
KEPT = {  # in files: fields
    "_z": "z", "_z_gradient": "z_gradient", "_result": "stored_result", "_weights": "weights", "_before": "before",
    "_entering": "entering",
}  # fmt: skip
_GRADIENT_HINT = "capture with gradients=True and call loss.backward() inside the `with`"


@dataclass(frozen=True, repr=False)
class SiteCapture:
    """One site in one forward. Statistics are attributes: `capture.entropy` is [batch, head, query].

    Attributes:
        site: the site, with the sizes that were seen.
        shape: (batch, head, query, key).
        statistics: name -> tensor; shapes in `workbench.kernels.statistics.STATISTICS`.
        kernel: the kernel that the model ran.
        z: [batch, query, head, d_head] output per head, if asked for.
        z_gradient: ∂L/∂z, like z, if asked for; sums of A∘∂L/∂A are among the statistics, under the names of
            `workbench.kernels.gradients.GRADIENT_SUMS`. Several backward passes add up, as in `.grad`.
        projection: where z goes; None if it was not found or not looked for.
        entering: [batch, query, head, width] what of each head enters the projection: z behind the norm, gate and skip
            of a module that has a reader, or behind the gate of an attention; None where z enters it as it is.
        stored_result: [batch, query, head, d_model], from a file that holds it.
        lazy, others: the pattern and further maps by name, if they were kept; read them by `pattern` and `patterns`.
        signed: whether weights may be negative. normalised: whether rows sum to one. Where one of them says that the
            rows are no distributions, statistics are those of |A| normalised per row.
        shard: which of the site's heads this process holds, where tensor parallelism splits them; the others are NaN
            (of integers −1), and `Capture.gathered` gives them. None: all are here.
        before: [batch, query, head, width] of z that the rows read of a state from before the call, or before the
            capture, beside A·V; None where there was none. `pattern.before_share` is its share of what a row reads.
            Rows, and statistics, are of the call's own positions: `Capture.joined` puts those of all calls together.
        state: which states a recurrence found in its cache, and left there.
        n_calls: how often the site was called in the forward; this is the call `site.call`.
        times: when the call was seen; None for what several calls were joined to, and from older files.
    """

    site: Site
    shape: tuple[int, int, int, int]
    statistics: dict[str, Tensor]
    kernel: str
    z: Tensor | None = None
    z_gradient: Tensor | None = None
    projection: Projection | None = None
    entering: Tensor | None = None
    stored_result: Tensor | None = None
    weights: Tensor | None = None
    lazy: Pattern | None = None
    held: list[tuple[Tensor, int]] = field(default_factory=list)
    signed: bool = False
    normalised: bool = True
    times: CallTimes | None = None
    others: dict[str, Pattern] = field(default_factory=dict)
    n_calls: int = 1
    shard: HeadShard | None = None
    before: Tensor | None = None
    state: StateLink = field(default_factory=StateLink)

    @property
    def marks(self) -> str:
        """What the weights are: "normalised", "signed" or "unnormalised"."""
        return "signed" if self.signed else "normalised" if self.normalised else "unnormalised"

    @property
    def pattern(self) -> Pattern:
        """The pattern: `.rows(...)`, `.dense(heads=...)`, `.statistics(...)`; parts are computed when asked for.

        Raises:
            CaptureError: queries and keys were not kept, or the model has overwritten its mask since.
        """
        if self.lazy is not None:
            self._check_held()
            return self.lazy
        if self.weights is not None:
            return DensePattern.of(self.weights, normalised=self.normalised, signed=self.signed)
        raise CaptureError(
            "the pattern was not kept",
            site=self.site.name,
            hint="capture with queries_keys=True; save with pattern=True to keep it in a file",
        )

    def by_window(self, name: str) -> Tensor:
        """A statistic, or "z", with windows as an axis of their own: [example, window, ...].

        >>> site = Site("attn", 0, "window", n_heads=4, windows=9)
        >>> capture = SiteCapture(site, (18, 4, 5, 5), {"entropy": torch.zeros(18, 4, 5)}, "sdpa")
        >>> capture.by_window("entropy").shape
        torch.Size([2, 9, 4, 5])

        Raises:
            CaptureError: it was not captured, or the site has no windows.
        """
        if not self.site.windowed or self.shape[0] % self.site.windows:
            raise CaptureError("the site has no windows", site=self.site.name, hint="read its tensors as they are")
        values = self.z if name == "z" else getattr(self, name)
        if not isinstance(values, Tensor) or values.shape[0] != self.shape[0]:
            raise CaptureError(
                f'there is no "{name}" of its examples', site=self.site.name, hint="name a statistic, or z"
            )
        return values.unflatten(0, (-1, self.site.windows))

    @property
    def patterns(self) -> dict[str, Pattern]:
        """All maps of the site by name: "pattern", which the statistics are of, and what a reader gives besides.

        Such are the factors of a composed map; see `workbench.reader`.

        >>> import workbench
        >>> with workbench.attach(torch.nn.MultiheadAttention(8, 2).eval()) as wb, wb.capture() as cap:
        ...     _ = wb.model(*[torch.randn(3, 1, 8)] * 3)
        >>> list(cap[0].patterns)
        ['pattern']
        """
        return {"pattern": self.pattern, **self.others}

    def _check_held(self) -> None:
        if any(tensor._version != seen for tensor, seen in self.held):
            raise CaptureError(
                "the model has overwritten a tensor that the pattern needs",
                site=self.site.name,
                hint="use the pattern before the next forward, or capture with pattern=True",
            )

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: what they hold is their own, and what the model has overwritten stays so."""
        stale = any(tensor._version != seen for tensor, seen in self.held)
        return {**self.__dict__, "held": [(torch.empty(0), -1)] if stale else []}

    @property
    def factors(self) -> Tensor | None:
        """[batch, head, query] of a gate, or those by which attention weighs its heads; None where they were not kept.

        Of a gate they are always kept, as "row_sum"; of attention they are a part of its pattern.
        """
        if self.site.kind == "gate":
            return self.statistics.get("row_sum")
        return None if self.lazy is None else self.lazy.gates

    @property
    def has_result(self) -> bool:
        """Whether `result` has what it needs."""
        return self.stored_result is not None or (self.z is not None and self.projection is not None)

    def result(self, heads: int | Sequence[int] | None = None, limit: int | None = DENSE_LIMIT) -> Tensor:
        """z times each head's slice of W_O, [batch, query, head, d_model]: what it writes to the residual stream.

        The sum over heads, plus the projection's bias, is the projection's output; a norm may follow in some models.
        Of a recurrence, and of attention with a gate, it is `entering` that is projected: norm, gate and skip of the
        module are those of this run, so that a head's part is not what is missing where the head is switched off and
        norms change.

        Args:
            heads: which heads; all if None.
            limit: most bytes it may take, 1 GiB by default; None for no limit.

        Raises:
            CaptureError: z was not kept, no projection is known or its weight has changed, or the limit is exceeded.
        """
        which = list(range(self.shape[1])) if heads is None else [heads] if isinstance(heads, int) else list(heads)
        bad = [h for h in which if not -self.shape[1] <= h < self.shape[1]]
        if bad:
            raise CaptureError(f"there are {self.shape[1]} heads, no head {bad[0]}", site=self.site.name)
        if self.stored_result is not None:
            return self.stored_result[:, :, which]
        z, slices = self._z_and_projection()
        first = self.site.first_head
        if self.site.here is not None and all(h % self.shape[1] in self.site.here for h in which):
            which = [h % self.shape[1] - first for h in which]
        elif self.site.here is not None:
            return self._result_in_part(which, limit)
        z = z[:, :, which]
        z = z if z.dtype == torch.float64 else z.float()
        size = z.shape[:3].numel() * slices.shape[-1] * z.element_size()
        if limit is not None and size > limit:
            raise CaptureError(
                f"the result would take {size:,} bytes, the limit is {limit:,}",
                site=self.site.name,
                hint="ask for fewer heads, or pass a larger limit=",
            )
        return torch.einsum("bqhw,hwd->bqhd", z, slices[which].to(z))

    def _result_in_part(self, which: Sequence[int], limit: int | None) -> Tensor:
        """The result with NaN for the heads that other processes hold."""
        here = self.site.here or range(0)
        held = [i for i, h in enumerate(which) if h % self.shape[1] in here]
        part = self.result([which[i] for i in held] or [here.start], limit)
        whole = part.new_full((*part.shape[:2], len(which), part.shape[-1]), torch.nan)
        whole[:, :, held] = part[:, :, : len(held)]
        return whole

    def _z_and_projection(self) -> tuple[Tensor, Tensor]:
        """z and [head, width, d_model], or the error that says which is missing."""
        name = self.site.name
        if self.z is None:
            raise CaptureError("a result needs each head's output", site=name, hint="capture with z=True")
        if self.projection is None:
            raise CaptureError(
                "the output projection of the site is not known",
                site=name,
                hint="no linear module was called with the heads' outputs, as they are or times a gate between 0 and 1 "
                "(a norm or another gate may lie between), or the capture was loaded or gathered: save or gather it "
                "with result=True",
            )
        try:
            z = self.z if self.entering is None else self.entering
            z = z if self.site.here is None else z[:, :, slice(self.site.here.start, self.site.here.stop)]
            return z, self.projection.slices(*z.shape[2:])
        except CaptureError as error:
            raise CaptureError(error.message, site=name, shape=error.shape, hint=error.hint) from None

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("__") or name in type(self).__dataclass_fields__:
            raise AttributeError(name)
        if name in self.statistics:
            return self.statistics[name]
        if name in GRADIENT_SUMS:
            raise _NoAttribute(f'"{name}" was not captured', site=self.site.name, hint=_GRADIENT_HINT)
        base = name.removeprefix(VALUE_WEIGHTED)
        outputs = {out: s for s in STATISTICS for out in output_names(s)}
        if base not in STATISTICS and base not in outputs:
            # An AttributeError too, so that hasattr and completion work on names that are no statistics.
            raise _NoAttribute(
                f'a site capture has no "{name}"',
                site=self.site.name,
                hint=nearest(base, [*STATISTICS, *GRADIENT_SUMS]),
            )
        if not self.site.has(outputs.get(base, base)):
            compared = "keys, of which a row of a gate has one" if self.site.kind == "gate" else (
                f'positions, which queries and keys of kind "{self.site.kind}" do not share'
            )  # fmt: skip
            hint = "its factor is row_sum" if self.site.kind == "gate" else None
            raise _NoAttribute(f'"{name}" compares {compared}', site=self.site.name, hint=hint)
        raise _NoAttribute(
            f'"{name}" was not captured', site=self.site.name, hint=f'capture with statistics=["{name}"]'
        )

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.statistics})

    @property
    def nbytes(self) -> int:
        """Bytes held; tensors that are shared with other sites count here too."""
        pattern = sum(one.nbytes for one in (self.lazy, *self.others.values()) if one is not None)
        kept = (*self.statistics.values(), *(getattr(self, name) for name in KEPT.values()))
        return pattern + sum(t.nbytes for t in kept if t is not None)

    def __repr__(self) -> str:
        b, h, q, k = self.shape
        names = ", ".join(self.statistics) or "no statistics"
        marks = "" if self.marks == "normalised" else f", {self.marks}"
        site = visible_text(self.site.name).replace("\n", "⏎")
        marks += f", {self.site.elsewhere}" if self.site.elsewhere else ""
        marks += "" if self.before is None else ", goes on from a state: rows are of its own positions"
        if self.n_calls > 1:
            others = (
                f'call {self.site.call} of {self.n_calls}: choose another with ["{visible_text(self.site.path)}", call]'
            )
            marks += f", {others}"
        if self.site.windowed and b % self.site.windows == 0:
            batch = f"batch {b // self.site.windows} × {self.site.windows} windows"
        else:
            batch = f"batch {b}"
        return f"SiteCapture({site}: {batch}, heads {h}, queries {q}, keys {k}{marks}; {names})"


class _NoAttribute(CaptureError, AttributeError):
    """A statistic that a site capture does not have."""


@dataclass
class Forward:
    """One forward of the model: its site captures by name, and the tokens that went in.

    Attributes:
        ids, tokens: by stream ("input", "decoder"): ids [batch, position], and their text.
        thread: number of the thread it ran in, in the order in which threads came.
        span: when it began and ended, our statistics included, in seconds of the host's clock since the capture began.
        packed: where a row held several sequences, which this one is: (row, start, stop) of its queries there.
    """

    index: int
    sites: MutableMapping[str, SiteCapture] = field(default_factory=dict)
    ids: MutableMapping[str, Tensor] = field(default_factory=dict)
    tokens: MutableMapping[str, list[list[str]]] = field(default_factory=dict)
    thread: int = 0
    span: tuple[float, float] | None = None
    packed: tuple[int, int, int] | None = None

    def stream(self, site: Site, axis: str) -> str:
        """Which token stream the queries or keys of a site are."""
        if "decoder" not in self.ids:
            return "input"
        in_encoder = "encoder" in site.name.split(".") and site.kind != "cross"
        return "input" if in_encoder or (site.kind == "cross" and axis == "key") else "decoder"

    def ids_of(self, site: Site, axis: str) -> Tensor | None:
        """[batch, position] ids of the queries or keys of a site; None when they are not tokens."""
        return self.ids.get(self.stream(site, axis))


def joined_outputs(captures: Sequence[SiteCapture]) -> dict[str, Any]:
    """z, entering and projection of calls one after another, as fields; None of what not every call has."""
    rows: dict[str, Any] = {}
    for name in ("z", "entering"):
        kept = [tensor for capture in captures if (tensor := getattr(capture, name)) is not None]
        rows[name] = torch.cat(kept, dim=1) if len(kept) == len(captures) else None
    alike = len({capture.entering is None for capture in captures}) == 1
    return rows | {"projection": Projection.of_all([one.projection for one in captures]) if alike else None}


def pack(capture: SiteCapture, *, pattern: bool, result: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A site capture as JSON facts and named tensors.

    Args:
        pattern: also what is needed to rebuild its pattern. result: also each head's result.
    """
    entry: dict[str, Any] = {"site": asdict(capture.site), "shape": list(capture.shape), "kernel": capture.kernel,
                             "signed": capture.signed, "normalised": capture.normalised}  # fmt: skip
    if capture.n_calls > 1:
        entry["n_calls"] = capture.n_calls
    if capture.state != StateLink():
        entry["state"] = asdict(capture.state)
    if capture.times is not None:
        entry["times"] = capture.times.to_json()
    parts = dict(capture.statistics)
    if result and capture.stored_result is None:
        capture = replace(capture, stored_result=capture.result())
    kept = {key: getattr(capture, name) for key, name in KEPT.items()}
    parts |= {key: tensor for key, tensor in kept.items() if tensor is not None}
    if pattern:
        for name, one in capture.patterns.items():
            facts, tensors = one.state()
            entry.setdefault("patterns", {})[name] = {"family": type(one).__name__, **facts}
            parts |= {f"{PATTERN}{name}.{key}": tensor for key, tensor in tensors.items()}
    return entry, parts
