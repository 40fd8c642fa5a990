"""What processes tell each other that run one model together: on parts of a sequence, or with parts of its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.hooks import registry
from workbench.hooks.cut_weights import mesh_of
from workbench.kernels.sequence_parallel.split import SplitSequence


def told_together(model: nn.Module, mine: Any) -> list[Any]:
    """What each process has to say, in their order; `[mine]` where this one runs the model alone.

    Args:
        mine: a small value of JSON. All of the processes call it at once.

    Raises:
        CaptureError: another process ended, hangs, or does not call it.
    """
    split, mesh = getattr(registry.around(), "split", None), mesh_of(model)
    if isinstance(split, SplitSequence):
        return split.told(mine)
    told = [mine]
    for axis in range(0 if mesh is None else mesh.ndim):
        told = [one for some in SplitSequence.of(1, mesh.get_group(axis), mesh.device_type).told(told) for one in some]
    return told


def done_by_all(model: nn.Module, done: Tensor) -> Tensor:
    """[…] bool: which parts of the work every process has done, so that all of them go on with the same."""
    told = told_together(model, done.tolist())
    return done if len(told) == 1 else torch.tensor(told, dtype=torch.bool).view(-1, *done.shape).all(0)


def check_as_far(model: nn.Module, done: int) -> None:
    """Refuse to go on where files of several processes are not equally far.

    Raises:
        WorkbenchError: in every process, as said.
    """
    told = told_together(model, done)
    if len(set(told)) > 1:
        raise WorkbenchError(
            f"the files to go on from are not equally far: {', '.join(map(str, told))} are done in processes 0, 1 …",
            hint="give every process the file of the same one",
        )
