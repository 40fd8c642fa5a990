"""One site in one forward, and one forward: the parts of a capture."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from workbench.errors import CaptureError, nearest
from workbench.hooks.sites import Site
from workbench.kernels.families import rebuild
from workbench.kernels.patterns import DensePattern, Pattern
from workbench.kernels.statistics import STATISTICS, VALUE_WEIGHTED, output_names

_PATTERN = "pattern."  # starts the names of tensors that rebuild a pattern


@dataclass(frozen=True, repr=False)
class SiteCapture:
    """One site in one forward. Statistics are attributes: `capture.entropy` is [batch, head, query].

    Attributes:
        site: the site, with the sizes that were seen.
        shape: (batch, head, query, key).
        statistics: name -> tensor; shapes in `workbench.kernels.statistics.STATISTICS`.
        kernel: the kernel that the model ran.
        z: [batch, query, head, d_head] output per head, if asked for.
        signed: whether weights may be negative. normalised: whether rows sum to one. Where one of them says that the
            rows are no distributions, statistics are those of |A| normalised per row.
    """

    site: Site
    shape: tuple[int, int, int, int]
    statistics: dict[str, Tensor]
    kernel: str
    z: Tensor | None = None
    weights: Tensor | None = None
    lazy: Pattern | None = None
    held: list[tuple[Tensor, int]] = field(default_factory=list)
    signed: bool = False
    normalised: bool = True

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
            if any(tensor._version != seen for tensor, seen in self.held):
                raise CaptureError(
                    "the model has overwritten a tensor that the pattern needs",
                    site=self.site.name,
                    hint="use the pattern before the next forward, or capture with pattern=True",
                )
            return self.lazy
        if self.weights is not None:
            return DensePattern(self.weights)
        raise CaptureError(
            "the pattern was not kept",
            site=self.site.name,
            hint="capture with queries_keys=True; save with pattern=True to keep it in a file",
        )

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("__") or name in type(self).__dataclass_fields__:
            raise AttributeError(name)
        if name in self.statistics:
            return self.statistics[name]
        base = name.removeprefix(VALUE_WEIGHTED)
        outputs = {out: s for s in STATISTICS for out in output_names(s)}
        if base not in STATISTICS and base not in outputs:
            # An AttributeError too, so that hasattr and completion work on names that are no statistics.
            raise _NoAttribute(
                f'a site capture has no "{name}"', site=self.site.name, hint=nearest(base, list(STATISTICS))
            )
        if STATISTICS[outputs.get(base, base)].positional and self.site.kind == "cross":
            raise _NoAttribute(
                f'"{name}" compares positions, which cross-attention does not share', site=self.site.name
            )
        raise _NoAttribute(
            f'"{name}" was not captured', site=self.site.name, hint=f'capture with statistics=["{name}"]'
        )

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.statistics})

    @property
    def nbytes(self) -> int:
        """Bytes held; tensors that are shared with other sites count here too."""
        pattern = 0 if self.lazy is None else self.lazy.nbytes
        return pattern + sum(t.nbytes for t in (*self.statistics.values(), self.z, self.weights) if t is not None)

    def __repr__(self) -> str:
        b, h, q, k = self.shape
        names = ", ".join(self.statistics) or "no statistics"
        marks = "" if self.marks == "normalised" else f", {self.marks}"
        return f"SiteCapture({self.site.name}: batch {b}, heads {h}, queries {q}, keys {k}{marks}; {names})"


class _NoAttribute(CaptureError, AttributeError):
    """A statistic that a site capture does not have."""


@dataclass
class Forward:
    """One forward of the model: its site captures by name, and the tokens that went in.

    Attributes:
        ids, tokens: by stream ("input", "decoder"): ids [batch, position], and their text.
        thread: number of the thread it ran in, in the order in which threads came.
    """

    index: int
    sites: dict[str, SiteCapture] = field(default_factory=dict)
    ids: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, list[list[str]]] = field(default_factory=dict)
    thread: int = 0

    def stream(self, site: Site, axis: str) -> str:
        """Which token stream the queries or keys of a site are."""
        if "decoder" not in self.ids:
            return "input"
        in_encoder = "encoder" in site.name.split(".") and site.kind != "cross"
        return "input" if in_encoder or (site.kind == "cross" and axis == "key") else "decoder"

    def ids_of(self, site: Site, axis: str) -> Tensor | None:
        """[batch, position] ids of the queries or keys of a site; None when they are not tokens."""
        return self.ids.get(self.stream(site, axis))


def pack(capture: SiteCapture, *, pattern: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A site capture as JSON facts and named tensors; with `pattern`, also what is needed to rebuild its pattern."""
    entry: dict[str, Any] = {"site": asdict(capture.site), "shape": list(capture.shape), "kernel": capture.kernel,
                             "signed": capture.signed, "normalised": capture.normalised}  # fmt: skip
    parts = dict(capture.statistics)
    if capture.z is not None:
        parts["_z"] = capture.z
    if capture.weights is not None:
        parts["_weights"] = capture.weights
    if pattern:
        lazy = capture.pattern
        facts, tensors = lazy.parts()
        entry["pattern"] = {"family": type(lazy).__name__, **facts}
        parts |= {_PATTERN + name: tensor for name, tensor in tensors.items()}
    return entry, parts


def unpack(entry: dict[str, Any], parts: dict[str, Tensor]) -> SiteCapture:
    """The site capture that `pack` took apart; uses up `parts`."""
    lazy = None
    if "pattern" in entry:
        facts = dict(entry["pattern"])
        held = {name.removeprefix(_PATTERN): parts.pop(name) for name in list(parts) if name.startswith(_PATTERN)}
        lazy = rebuild(facts.pop("family"), facts, held)
    return SiteCapture(
        site=Site(**entry["site"]),
        shape=tuple(entry["shape"]),
        kernel=entry["kernel"],
        signed=entry["signed"],
        normalised=entry["normalised"],
        z=parts.pop("_z", None),
        weights=parts.pop("_weights", None),
        statistics=parts,
        lazy=lazy,
    )
