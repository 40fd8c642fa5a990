"""Every mixer of tokens is a site, or stands in `sites.unread`, in models of many families; docs/models.md has them."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import workbench
from support.survey.judge import mixers
from support.survey.models import SURVEY
from support.survey.surveyed import Surveyed
from support.unavailable import unavailable
from workbench.hooks.sites import Sites

DOCS = Path(__file__).parents[1] / "docs"
SITES: dict[str, Sites] = {}
"""By label, those of the models that the tests below have looked at."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("one", SURVEY, ids=lambda one: one.label)
def test_every_mixer_is_a_site_or_listed(one: Surveyed) -> None:
    try:
        model = one.make()
    except ModuleNotFoundError as error:
        unavailable(f"{error}: make .cache/judges/.ready")
    inputs = one.inputs()
    seen = mixers(model, inputs, one.lengths)
    with torch.no_grad(), workbench.attach(model, check=False) as wb:
        found = wb.verify(**inputs)
        sites = wb.sites
    SITES[one.label] = sites
    assert seen
    assert found.identical
    assert not found.checks or found.ok, found.table
    assert sites.looked, sites
    named = {site.name for site in sites} | {each.name for each in sites.unread}
    whole = [site.name for site in sites if site.kind == "state"] + [each.name for each in sites.unread]
    missing = {
        name: why for name, why in seen.items()
        if name not in named
        and not any(name.startswith(f"{outer}.") for outer in whole)
        and not (isinstance(model.get_submodule(name), nn.Softmax) and name.rpartition(".")[0] in named)
    }  # fmt: skip
    assert not missing, sites


@pytest.mark.filterwarnings("ignore")
def test_the_page_of_models_is_what_its_script_makes() -> None:
    script = runpy.run_path(str(DOCS / "make_models.py"))
    try:
        page = script["page"](lambda one: SITES[one.label] if one.label in SITES else script["looked_at"](one))
    except ModuleNotFoundError as error:
        unavailable(str(error))
    assert len({one.label for one in SURVEY}) == len(SURVEY)
    assert page == (DOCS / "models.md").read_text(), "run docs/make_models.py"


class _Own(nn.Module):
    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.before, self.mix, self.after = nn.Linear(8, 8), mix, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.mix(self.before(x)))


class _Around(nn.Module):
    """A module around a mixer, which may mix by itself too."""

    def __init__(self, inner: nn.Module, shift: int = 0) -> None:
        super().__init__()
        self.inner, self.shift = inner, shift

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x).roll(self.shift, 1)


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (_Own(lambda x: x.cumsum(1)), {""}),
        (_Own(torch.relu), set()),
        (_Own(lambda x: x - x.mean(1, keepdim=True)), {""}),
        (_Around(_Own(lambda x: x.softmax(1))), {"inner"}),
        (_Around(_Own(lambda x: x.softmax(1)), 1), {"", "inner"}),
        (_Around(_Own(torch.tanh), 1), {""}),
        (nn.Sequential(nn.Linear(8, 8), nn.LSTM(8, 8, batch_first=True)), {"1"}),
    ],
)  # fmt: skip
def test_the_judge_puts_mixing_down_to_the_module_that_does_it(model: nn.Module, names: set[str]) -> None:
    torch.manual_seed(0)
    named: dict[str, Any] = {"x": torch.randn(2, 13, 8)}
    if isinstance(model, nn.Sequential):
        named = {"input": named["x"]}
    assert set(mixers(model.eval(), named, (13,))) == names
