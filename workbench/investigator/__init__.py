"""An investigator: it plans analyses of how a model does a task, runs them, and plans anew after each finding.

`manager` runs it, `rules` plans without a language model, `plan` is the protocol of any planner, `analyses` is what may
be run of a `subject`, `budget` keeps to forwards and minutes, `memory` has past investigations, `writing` makes the
report. `screen` has how Agent S2 chooses who finds a place on a screen.
"""

from workbench.investigator.budget import Budget, BudgetSpent
from workbench.investigator.findings import Finding, Planned, Sentence
from workbench.investigator.investigation import Investigation
from workbench.investigator.manager import InvestigationInterrupted, investigate
from workbench.investigator.memory import Memory, Remembered
from workbench.investigator.plan import ANALYSES, Plan, Step, ordered, parse

__all__ = [
    "ANALYSES",
    "Budget",
    "BudgetSpent",
    "Finding",
    "Investigation",
    "InvestigationInterrupted",
    "Memory",
    "Plan",
    "Planned",
    "Remembered",
    "Sentence",
    "Step",
    "investigate",
    "ordered",
    "parse",
]
