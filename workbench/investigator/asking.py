"""Asking for a plan: of the rules, or of a callable that may answer nonsense, fail, or never answer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from workbench.errors import FormatError
from workbench.investigator.plan import Plan, parse, prompt_of
from workbench.investigator.rules import plan_by_rules

Planner = Callable[[str], Any]
RULES = "rules"
_TRIES = 2


class Asked:
    """Gives the next plan, and keeps what was refused.

    Args:
        planner: `planner(prompt)` that returns JSON; None for the rules. seconds: how long an answer may take.

    Attributes:
        silent: whether the planner once did not answer in time; it is not asked again then.
    """

    def __init__(self, planner: Planner | None, seconds: float) -> None:
        self.planner, self.seconds, self.silent = planner, seconds, False

    def plan(self, state: Mapping[str, Any], n_findings: int, most_seconds: float) -> tuple[Plan, str, list[str]]:
        """A plan, who made it, and why answers were refused.

        Args:
            state: what the planner is told. most_seconds: what the budget leaves.
        """
        refused: list[str] = []
        if self.planner is not None and not self.silent:
            question = prompt_of(state)
            for _ in range(_TRIES):
                try:
                    answer = self._answer(question, min(self.seconds, most_seconds))
                    return parse(answer, n_findings), "planner", refused
                except _Silent as error:
                    self.silent = True
                    refused.append(str(error))
                    break
                except FormatError as error:
                    refused.append(error.message)
                    question = f"{prompt_of(state)}\n\nYour last answer was refused: {error.message}"
                except Exception as error:  # whatever a planner raises is its own; the investigation goes on
                    refused.append(f"it raised {type(error).__name__}: {str(error)[:200]}")
        return parse(plan_by_rules(state), n_findings), RULES, refused

    def _answer(self, question: str, seconds: float) -> Any:
        """What the planner answers.

        Raises:
            _Silent: nothing, in that time. The thread that waits for it is left behind.
        """
        box: list[Any] = []

        def run() -> None:
            try:
                assert self.planner is not None
                box.append((True, self.planner(question)))
            except BaseException as error:
                box.append((False, error))

        thread = threading.Thread(target=run, daemon=True, name="planner")
        thread.start()
        thread.join(max(0.0, seconds))
        if not box:
            raise _Silent(f"it did not answer within {seconds:.0f} s, and is not asked again")
        good, value = box[0]
        if good:
            return value
        if isinstance(value, Exception):
            raise value
        raise FormatError(f"the planner stopped with {type(value).__name__}")


class _Silent(Exception):
    """A planner that does not answer."""
