"""Interventions on every family: handing rows back unchanged changes nothing, and a head that is off is missed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import workbench
from support.tiny import ZOO, Family, make
from support.unavailable import unavailable


def numbers(output: Any) -> Tensor:
    """Every floating-point number of a model's output, in one row."""
    if isinstance(output, Tensor):
        return output.flatten().double() if output.is_floating_point() else torch.empty(0).double()
    values = output.values() if hasattr(output, "values") else output if isinstance(output, (list, tuple)) else []
    return torch.cat([torch.empty(0).double(), *(numbers(value) for value in values)])


@torch.no_grad()
@pytest.mark.parametrize("family", ZOO, ids=lambda one: one.name)
def test_the_rows_of_every_site_are_those_that_its_kernel_applies(family: Family) -> None:
    try:
        model = make(family)
    except ModuleNotFoundError as error:
        unavailable(str(error))
    inputs, sites = family.inputs(), []

    def same(rows: Tensor, site: Any, head: int) -> Tensor:
        sites.append(site)
        return rows

    with workbench.attach(model) as wb:
        heads = [(site.name, (site.n_heads or 1) - 1) for site in wb.sites]
        bare = numbers(model(**inputs))
        with wb.edit_pattern(heads, same):
            edited = numbers(model(**inputs))
        with wb.ablate(heads):
            ablated = numbers(model(**inputs))
        assert {site.name for site in sites} == {site.name for site in wb.sites}
    scale = max(1.0, bare.abs().max().item())
    assert (edited - bare).abs().max() < 1e-4 * scale
    assert (ablated - bare).abs().max() > 1e-3
