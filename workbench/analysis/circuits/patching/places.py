"""Where patches are put: named or numbered positions, in the residual streams that have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from workbench.analysis.circuits.engine.prompts import Where
from workbench.analysis.circuits.engine.setup import Setup
from workbench.errors import InterventionError
from workbench.tokens import piece


@dataclass(frozen=True)
class Place:
    """Positions that are patched together.

    Attributes:
        name: for tables. where: a name or number, several of them, or None for all.
        streams: the residual streams that have it; in the others nothing is patched.
    """

    name: str
    where: Where
    streams: frozenset[int]


def find_places(setup: Setup, positions: Where | Sequence[Where], by_position: bool) -> list[Place]:
    """The places of a patching: one of all positions, or each for itself.

    A decoder has no places that are named in the prompt. Numbers count a prompt's own tokens, from 0, or from −1 at its
    end; of two streams those have one in which every example reaches so far.

    Raises:
        InterventionError: a position beyond a prompt; prompts of different lengths, whose positions do not correspond.
    """
    if by_position and positions is None:
        return _every(setup)
    given = [positions] if isinstance(positions, (str, int)) or positions is None else list(positions)
    if not given:
        raise InterventionError("positions choose nothing: the list is empty", hint="None chooses all")
    streams = {repr(one): _streams(setup, one) for one in given}
    if by_position:
        return [Place(str(one), one, streams[repr(one)]) for one in given]
    name = "all" if positions is None else str(positions)
    return [Place(name, positions, frozenset.intersection(*streams.values()))]  # type: ignore[arg-type]


def tokens_at(setup: Setup, places: Sequence[Place]) -> tuple[str, ...]:
    """The token of each place where it is one token, and the same in all prompts; else ""."""
    found = []
    for place in places:
        single = isinstance(place.where, (str, int)) and len(place.streams) == 1
        found.append(_token(setup, place, min(place.streams)) if single else "")
    return tuple(found)


def _token(setup: Setup, place: Place, stream: int) -> str:
    tokenizer = setup.wb.tokenizer
    name = ("input_ids", "decoder_input_ids")[stream]
    ids = set()
    for pair in setup.pairs:
        index = setup.positions(pair, place.where, stream)
        if tokenizer is None or name not in pair.clean or index is None:
            return ""
        ids |= set(pair.clean[name].gather(1, index).flatten().tolist())
    return piece(tokenizer, ids.pop()) if len(ids) == 1 else ""


def _every(setup: Setup) -> list[Place]:
    """Each position of each stream."""
    names = setup.graph.streams
    found = []
    for stream, name in enumerate(names):
        lengths = {n for each in _lengths(setup, stream) for n in each}
        if len(lengths) > 1:
            raise InterventionError(
                f"{'prompts' if not name else f'inputs of the {name}'} of {min(lengths)} to {max(lengths)} tokens have "
                "no common positions",
                hint='name the positions, positions=["S2", "end"], or count from the end: positions=range(-4, 0)',
            )
        front = f"{name} " if len(names) > 1 else ""
        found += [Place(f"{front}{i}", i, frozenset({stream})) for i in range(lengths.pop())]
    return found


def _streams(setup: Setup, one: Any) -> frozenset[int]:
    """The streams that have a place."""
    every = range(len(setup.graph.streams))
    if one is None or one == "end":
        return frozenset(every)
    if isinstance(one, str):
        return frozenset({0})
    if isinstance(one, bool) or not isinstance(one, int):
        raise InterventionError(f"positions are names or whole numbers, not {one!r}")
    reach = -one if one < 0 else one + 1
    found = frozenset(s for s in every if min(min(each) for each in _lengths(setup, s)) >= reach)
    if not found:
        longest = max(every, key=lambda s: min(min(each) for each in _lengths(setup, s)))
        several = [n for each in _lengths(setup, longest) for n in each]
        short = next(i for i, n in enumerate(several) if n < reach)
        raise InterventionError(
            f"position {one} lies beyond prompt {short}, which has {several[short]} tokens",
            hint="positions count from 0, or from -1 at the end",
        )
    return found


def _lengths(setup: Setup, stream: int) -> list[list[int]]:
    """For each batch the tokens of each example, without padding."""
    return [setup.real(pair, stream).sum(1).tolist() for pair in setup.pairs]
