"""Calls that a capture went on without."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from workbench.counting import count
from workbench.errors import WorkbenchError


@dataclass(frozen=True)
class Unrecorded:
    """Calls of a site that a capture does not hold.

    Attributes:
        site: its name; "" for the inputs of the model itself.
        calls: how many. reason: why the first was not recorded.
    """

    site: str
    calls: int
    reason: str

    def once_more(self) -> Unrecorded:
        """The same, with one call more."""
        return replace(self, calls=self.calls + 1)

    def __str__(self) -> str:
        what = count(self.calls, "call") if self.site else "inputs"
        return f"{what} not recorded: {self.reason}"


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device or the host had no memory left, which is no fault of the call.

    >>> is_out_of_memory(MemoryError()), is_out_of_memory(ValueError())
    (True, False)
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return type(error) is RuntimeError and "DefaultCPUAllocator" in str(error)  # which has no class of its own


def reason_of(error: Exception) -> str:
    """What a capture says of a call that it goes on without.

    >>> reason_of(ValueError("no heads"))
    'ValueError: no heads'
    """
    if isinstance(error, WorkbenchError):
        return error.message
    if is_out_of_memory(error):
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return f"out of memory in its statistics (fewer of them, queries_keys=False or a store need less): {first}"
    return f"{type(error).__name__}: {error}"
