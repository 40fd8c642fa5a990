"""How a map that is made of others keeps them in its own state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from workbench.kernels import families
from workbench.kernels.patterns import Pattern


def taken_apart(parts: Mapping[str, Pattern]) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """JSON facts of the parts, in order, and their tensors as "part.tensor"; values belong to the whole."""
    facts, tensors = [], dict[str, Tensor]()
    for name, part in parts.items():
        own, held = part.state()
        facts.append({"name": name, "family": type(part).__name__, "facts": own})
        tensors |= {f"{name}.{key}": tensor for key, tensor in held.items() if key != "values"}
    return facts, tensors


def put_together(facts: list[dict[str, Any]], tensors: Mapping[str, Tensor]) -> dict[str, Pattern]:
    """The parts from what `taken_apart` gave.

    Raises:
        FormatError: a part is of no known family, or is not whole.
    """
    parts = {}
    for each in facts:
        lead = f"{each['name']}."
        own = {key.removeprefix(lead): tensor for key, tensor in tensors.items() if key.startswith(lead)}
        parts[each["name"]] = families.rebuild(each["family"], each["facts"], own)
    return parts
