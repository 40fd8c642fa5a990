"""How often an algorithm must go over the keys: cascades of tensor equations as data, and the counter (FuseMax).

A cascade is the equations of one row of attention in their order. Whatever is looped, tiled or fused, a key is read
again by what must know a value that depends on all keys (arXiv 2406.10491). The counter finds these passes from which
tensor reads which, and along what each lies: the keys, blocks of keys, or the row as a whole.

>>> {name: cascade.passes for name, cascade in CASCADES.items()}
{'three passes': 3, 'deferred division': 2, 'two passes': 2, 'one pass': 1}
>>> CASCADES["one pass"].also("entropy").passes, CASCADES["one pass"].also("received").passes
(1, 2)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from workbench.errors import CaptureError
from workbench.kernels.statistics.record import known

if TYPE_CHECKING:
    import pandas as pd

Along = Literal["keys", "blocks", "row"]
INPUTS: Mapping[str, Along] = MappingProxyType({"q": "row", "k": "keys", "v": "keys"})
"""What a row of attention is given, and along what it lies."""


@dataclass(frozen=True)
class Equation:
    """One tensor of a cascade.

    Attributes:
        name: what others read it by.
        along: what its entries lie along. Of a block it is complete when the block was read; a running value, which
            reads itself, is one of the blocks so far. Of the row it is complete when all keys were read.
        reads: names of inputs and tensors.
        says: the equation, for people.
    """

    name: str
    along: Along
    reads: tuple[str, ...]
    says: str


@dataclass(frozen=True)
class _When:
    """In which pass a tensor is made, from which one on its entries can be read as they come, and all of it."""

    made: int
    entries: int
    whole: int


@dataclass(frozen=True)
class Cascade:
    """The equations of an algorithm in their order, for one row.

    Attributes:
        name: of the algorithm. equations: in an order in which they can be computed. used_by: where it is found.

    Raises:
        CaptureError: an equation that reads what is not there before it, or a name that is there twice.
    """

    name: str
    equations: tuple[Equation, ...]
    used_by: str = ""

    def __post_init__(self) -> None:
        there = set(INPUTS)
        for each in self.equations:
            if each.name in there:
                raise CaptureError(f'"{each.name}" is there twice in the cascade "{self.name}"')
            own = {each.name} if each.along == "blocks" else set()
            if missing := [name for name in each.reads if name not in there | own]:
                raise CaptureError(
                    f'"{each.name}" reads "{missing[0]}", which is not there before it',
                    hint="equations stand in the order in which they can be computed; running values lie along blocks",
                )
            there.add(each.name)

    @cached_property
    def _along(self) -> dict[str, Along]:
        return {**INPUTS, **{each.name: each.along for each in self.equations}}

    @cached_property
    def _when(self) -> dict[str, _When]:
        found = {name: _When(1, 1, 1) for name in INPUTS}
        for each in self.equations:
            reads = [name for name in each.reads if name != each.name]
            starts = max((found[name].entries for name in reads), default=1)
            if any(self._along[name] == "keys" for name in reads):  # it goes over the keys
                found[each.name] = _When(starts, starts + (each.along == "row"), starts + 1)
            else:
                whole = max((found[name].whole for name in reads), default=1)
                found[each.name] = _When(starts, whole if each.along == "row" else starts, whole)
        return found

    def goes_over_keys(self, name: str) -> bool:
        """Whether making this tensor reads something that lies along the keys."""
        return any(self._along[read] == "keys" for each in self.equations if each.name == name for read in each.reads)

    @property
    def passes(self) -> int:
        """How many times every key is read, at least."""
        return max((self._when[e.name].made for e in self.equations if self.goes_over_keys(e.name)), default=0)

    def made_in(self, name: str) -> int:
        """The pass in which a tensor is made; one that goes over no keys is made before that pass, or after the last.

        Raises:
            CaptureError: there is no such tensor.
        """
        if name not in self._when:
            raise CaptureError(f'the cascade "{self.name}" has no "{name}"', hint=", ".join(self._along))
        return self._when[name].made

    @property
    def kept(self) -> list[str]:
        """Tensors along the keys that a later pass reads: they are held whole, or made again. Inputs are not listed."""
        found = []
        for each in self.equations:
            readers = [other for other in self.equations if each.name in other.reads]
            if each.along == "keys" and any(self.made_in(r.name) > self.made_in(each.name) for r in readers):
                found.append(each.name)
        return found

    def also(self, *statistics: str) -> Cascade:
        """The cascade with statistics of a capture as further equations, on whichever weights it has.

        One of rows is collected from weights on a running scale. One that adds up rows must know each weight as it is
        in the end, and so the row's denominator.

        Raises:
            CaptureError: unknown name, or a cascade without weights.
        """
        added: list[Equation] = []
        for name in statistics:
            second = known(name).needs_denominators
            if second and "a" not in {e.name for e in (*self.equations, *added)}:
                added.append(
                    Equation(
                        "a",
                        "keys",
                        (self._weights, self._denominator),
                        "a_j = weight_j / denominator, both on the last scale",
                    )
                )
            reads = "a" if second else self._weights
            added.append(Equation(name, "row", (reads,), f"{name} = Σ over {reads}"))
        return Cascade(" and ".join((self.name, *statistics)), (*self.equations, *added), self.used_by)

    def _first(self, names: Sequence[str], what: str) -> str:
        found = next((name for name in names if name in self._along), None)
        if found is None:
            raise CaptureError(f'the cascade "{self.name}" has no {what}', hint=f"one of {', '.join(names)}")
        return found

    @property
    def _weights(self) -> str:
        return self._first(("a", "weight"), "weights")

    @property
    def _denominator(self) -> str:
        return self._first(("denominator", "running_denominator"), "denominator")

    @property
    def table(self) -> pd.DataFrame:
        """One row for each equation: the tensor, what it lies along, the equation, and the pass that makes it."""
        import pandas as pd

        rows = [
            {"tensor": e.name, "along": e.along, "equation": e.says, "pass": self.made_in(e.name)}
            for e in self.equations
        ]
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        several = "" if self.passes == 1 else "es"
        kept = f", keeps {', '.join(self.kept)} or makes it again" if self.kept else ""
        head = f"Cascade({self.name}: {self.passes} pass{several} over the keys{kept})"
        return f"{head}\n{self.table.to_string(index=False)}"


_Written = tuple[str, Along, str, str]  # name, along, what it reads, the equation


def _cascade(name: str, used_by: str, *equations: _Written) -> Cascade:
    return Cascade(
        name, tuple(Equation(n, along, tuple(reads.split()), says) for n, along, reads, says in equations), used_by
    )


_SCORE: _Written = ("score", "keys", "q k", "score_j = q·k_j")
_TOP: _Written = ("top", "row", "score", "top = max_j score_j")
_WEIGHT: _Written = ("weight", "keys", "score top", "weight_j = exp(score_j − top)")
_DENOMINATOR: _Written = ("denominator", "row", "weight", "denominator = Σ_j weight_j")

CASCADES: Mapping[str, Cascade] = MappingProxyType({
    each.name: each
    for each in (
        _cascade(
            "three passes", "softmax as it is written: PyTorch's math kernel, FLAT",
            _SCORE, _TOP, _WEIGHT, _DENOMINATOR,
            ("a", "keys", "weight denominator", "a_j = weight_j / denominator"),
            ("z", "row", "a v", "z = Σ_j a_j v_j"),
        ),
        _cascade(
            "deferred division", "three passes, divided in the end",
            _SCORE, _TOP, _WEIGHT, _DENOMINATOR,
            ("numerator", "row", "weight v", "numerator = Σ_j weight_j v_j"),
            ("z", "row", "numerator denominator", "z = numerator / denominator"),
        ),
        _cascade(
            "two passes", "TileFlow",
            _SCORE,
            ("block_top", "blocks", "score", "block_top_b = max_{j in b} score_j"),
            ("block_weight", "keys", "score block_top", "block_weight_j = exp(score_j − block_top_b)"),
            ("block_sum", "blocks", "block_weight", "block_sum_b = Σ_{j in b} block_weight_j"),
            ("top", "row", "block_top", "top = max_b block_top_b"),
            ("correction", "blocks", "block_top top", "correction_b = exp(block_top_b − top)"),
            ("denominator", "row", "correction block_sum", "denominator = Σ_b correction_b · block_sum_b"),
            ("weight", "keys", "block_weight correction", "weight_j = block_weight_j · correction_b"),
            ("a", "keys", "weight denominator", "a_j = weight_j / denominator"),
            ("z", "row", "a v", "z = Σ_j a_j v_j"),
        ),
        _cascade(
            "one pass", "FlashAttention, FuseMax, and the statistics of rows here",
            _SCORE,
            ("block_top", "blocks", "score", "block_top_b = max_{j in b} score_j"),
            ("running_top", "blocks", "running_top block_top", "running_top_b = max(running_top_{b−1}, block_top_b)"),
            ("weight", "keys", "score running_top", "weight_j = exp(score_j − running_top_b)"),
            ("correction", "blocks", "running_top", "correction_b = exp(running_top_{b−1} − running_top_b)"),
            ("running_denominator", "blocks", "running_denominator correction weight",
             "running_denominator_b = correction_b · running_denominator_{b−1} + Σ_{j in b} weight_j"),
            ("running_numerator", "blocks", "running_numerator correction weight v",
             "running_numerator_b = correction_b · running_numerator_{b−1} + Σ_{j in b} weight_j v_j"),
            ("denominator", "row", "running_denominator", "denominator = running_denominator of the last block"),
            ("numerator", "row", "running_numerator", "numerator = running_numerator of the last block"),
            ("z", "row", "numerator denominator", "z = numerator / denominator"),
        ),
    )
})  # fmt: skip
"""The algorithms of attention by the passes that they make."""


def compare(statistics: Sequence[str] = ()) -> pd.DataFrame:
    """Passes over the keys of each algorithm, alone and with each statistic, and what it keeps along the keys.

    Raises:
        CaptureError: unknown name.
    """
    import pandas as pd

    rows = []
    for cascade in CASCADES.values():
        found = {"algorithm": cascade.name, "passes": cascade.passes}
        with_each = {name: cascade.also(name).passes for name in statistics}
        rows.append(found | with_each | {"kept": ", ".join(cascade.kept), "used by": cascade.used_by})
    return pd.DataFrame(rows)
