"""Classical conditioning experiments as schedules of trials, and their run on a memory of any rule.

A trial shows some cues together and then an outcome, or none. Each experiment has a test cue, an experimental group
and a control group; its contrast says how far the two differ at the end, above zero where animals show the effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from workbench.analysis.conditioning.memories import memory
from workbench.errors import WorkbenchError, nearest

CUES = ("A", "B", "C", "D")
NOTHING = "-"  # outcome of a trial in which nothing follows
OUTCOME = "+"


class Trial(NamedTuple):
    """Cues that are shown together, and what follows: "+", "-", or another cue."""

    cues: tuple[str, ...]
    outcome: str


@dataclass(frozen=True)
class Schedule:
    """One experiment.

    Attributes:
        name, test: of the experiment, and the cue that is asked for.
        experimental, control: the groups' trials. sign: +1 for a contrast experimental − control, −1 for the reverse.
        what: what animals do. silent: where the linear theory has no answer, or "".
        readings: how often the memory is read; 2 feeds what the first reading gave back as a query.
    """

    name: str
    test: str
    experimental: tuple[Trial, ...]
    control: tuple[Trial, ...]
    sign: int
    what: str
    silent: str = ""
    readings: int = 1


def _trials(text: str, times: int) -> tuple[Trial, ...]:
    """Trials from "A+ AB-": each is repeated in turn."""
    one = [Trial(tuple(word[:-1]), word[-1]) for word in text.split()]
    return tuple(one * times)


def schedules(trials: int = 8) -> dict[str, Schedule]:
    """The seven experiments, with `trials` trials in each phase.

    >>> schedules(1)["blocking"].experimental
    (Trial(cues=('A',), outcome='+'), Trial(cues=('A', 'B'), outcome='+'))
    """
    if trials < 1:
        raise WorkbenchError(f"a phase needs at least one trial, not {trials}")

    def phases(*texts: str) -> tuple[Trial, ...]:
        return tuple(trial for text in texts for trial in _trials(text, trials))

    def second_order(first: str) -> tuple[Trial, ...]:
        return phases("A+") + (Trial((first,), "A"),) * trials

    listed = (
        Schedule("acquisition", "A", phases("A+"), phases("C+"), 1, "a cue that the outcome followed predicts it"),
        Schedule(
            "extinction", "A", phases("A+", "A-"), phases("A+", "C-"), -1, "trials without the outcome undo it",
        ),
        Schedule(
            "blocking", "B", phases("A+", "AB+"), phases("C+", "AB+"), -1,
            "a cue adds nothing beside one that predicts the outcome already",
        ),
        Schedule("overshadowing", "A", phases("AB+"), phases("A+"), -1, "two cues share what one would have had"),
        Schedule(
            "overexpectation", "A", phases("A+ B+", "AB+"), phases("A+ B+", "CD-"), -1,
            "two good cues together predict too much, and both lose",
        ),
        Schedule(
            "second_order", "B", second_order("B"), second_order("C"), 1,
            "a cue that was followed by a good cue predicts the outcome",
            "one layer has no second order: its contrast is 0 under every linear rule; shown is a memory read twice, "
            "as two layers would",
            readings=2,
        ),
        Schedule(
            "latent_inhibition", "A", phases("A-", "A+"), phases("C-", "A+"), -1,
            "a cue that was shown alone before is slower to learn",
            "writing a value of 0 into an empty memory changes nothing, and no rate depends on a cue's past",
        ),
    )  # fmt: skip
    return {one.name: one for one in listed}


SCHEDULES = tuple(schedules(1))


def choose(names: Any, trials: int) -> list[Schedule]:
    """Schedules by name; all if None.

    Raises:
        WorkbenchError: there is no such experiment, or none was chosen.
    """
    known = schedules(trials)
    chosen = list(known) if names is None else [names] if isinstance(names, str) else list(names)
    for name in chosen:
        if name not in known:
            raise WorkbenchError(f'there is no experiment "{name}"', hint=nearest(str(name), list(known)))
    if not chosen:
        raise WorkbenchError("no experiment was chosen", hint=", ".join(known))
    return [known[name] for name in chosen]


DEFAULT_OPTIONS: dict[str, dict[str, Any]] = {
    "delta": {"rate": 0.3}, "gated_delta": {"rate": 0.3, "decay": 0.98}, "decay": {"decay": 0.95},
    "oja": {"rate": 0.1}, "softmax": {"scale": 8.0},
}  # fmt: skip


def run_rule(
    rule: str, trials: tuple[Trial, ...], test: str, *, d: int = 64, repeats: int = 64, readings: int = 1,
    seed: int = 0, options: Mapping[str, Any] | None = None,
) -> Tensor:  # fmt: skip
    """[repeat, trial + 1] strength of the test cue's association before the first trial and after each.

    Cues and the outcome are random unit vectors of R^d; a compound of cues is their sum. The strength is the part of
    the retrieval along the outcome: 1 for a cue that predicts it exactly.
    """
    generator = torch.Generator().manual_seed(seed)
    names = (*CUES, OUTCOME)
    drawn = torch.randn(repeats, len(names), d, generator=generator, dtype=torch.float64)
    vectors = dict(zip(names, torch.nn.functional.normalize(drawn, dim=-1).unbind(1), strict=True))
    vectors[NOTHING] = torch.zeros(repeats, d, dtype=torch.float64)
    given = DEFAULT_OPTIONS.get(rule, {}) | dict(options or {})
    held = memory(rule, d, d, (repeats,), dtype=torch.float64, **given)
    strengths = []
    for trial in (None, *trials):
        if trial is not None:
            held.write(torch.stack([vectors[cue] for cue in trial.cues]).sum(0), vectors[trial.outcome])
        reading = held.read(vectors[test])
        total = reading
        for _ in range(readings - 1):
            reading = held.read(reading)
            total = total + reading
        strengths.append((total * vectors[OUTCOME]).sum(-1))
    return torch.stack(strengths, dim=-1)
