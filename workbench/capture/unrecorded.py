"""Calls that a capture went on without."""

from __future__ import annotations

from dataclasses import dataclass, replace


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
        what = f"{self.calls} call{'s' if self.calls > 1 else ''}" if self.site else "inputs"
        return f"{what} not recorded: {self.reason}"
