"""When attention calls were seen, by the host's clock, and what recording them took and keeps."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class CallTimes:
    """One attention call. Seconds of the host's clock since the capture began.

    Nothing waits for a device: on a GPU these say when the host went on, not how long kernels ran.

    Attributes:
        entered: the site's module began, its projections included; None where no module of that name was seen.
        seen: the call had returned to the host.
        took: how long our statistics, checks and copies took after that.
        nbytes: what was kept of the call; tensors that are shared with other sites count here too.
    """

    entered: float | None
    seen: float
    took: float
    nbytes: int

    def to_json(self) -> dict[str, Any]:
        """JSON values, by the names of the fields."""
        return asdict(self)
