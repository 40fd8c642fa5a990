"""Prompt sets with counterfactual twins and the positions that matter; `workbench.metrics` measures them.

>>> from workbench.tasks import ioi
>>> task = ioi(100, seed=0)
>>> len(task), task[0].answer in task[0].prompt
(100, True)
"""

from workbench.metrics import TaskBatch
from workbench.tasks.base import Example, Split, Task
from workbench.tasks.colored_objects import colored_objects
from workbench.tasks.custom import from_prompts
from workbench.tasks.docstring import docstring
from workbench.tasks.greater_than import greater_than
from workbench.tasks.induction import induction
from workbench.tasks.ioi import ioi
from workbench.tasks.mqar import mqar, mqar_tokens
from workbench.tasks.pieces import pieces, token_positions
from workbench.tasks.planted import PlantedObjects, planted_objects
from workbench.tasks.tensors import InputTask, from_inputs

__all__ = [
    "Example",
    "InputTask",
    "PlantedObjects",
    "Split",
    "Task",
    "TaskBatch",
    "colored_objects",
    "docstring",
    "from_inputs",
    "from_prompts",
    "greater_than",
    "induction",
    "ioi",
    "mqar",
    "mqar_tokens",
    "pieces",
    "planted_objects",
    "token_positions",
]
