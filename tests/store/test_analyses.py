"""Analyses, views and reports take a store as they take a capture, and give the same to the bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import workbench
from support.tiny import VOCABULARY, small_llama
from workbench import Capture
from workbench.views.base.view import View


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Capture, Capture]:
    """A capture in memory, and the same from a store."""
    model = small_llama()
    path = tmp_path_factory.mktemp("stores") / "a.zarr"
    several = [torch.randint(5, VOCABULARY, (2, n)) for n in (17, 17, 9)]
    names = ["entropy", "received", "induction", "peak", "distance"]
    with workbench.attach(model) as wb, torch.no_grad():
        with wb.capture(names, z=True, values=True) as plain:
            for ids in several:
                model(ids)
        with wb.capture(names, z=True, values=True, store=path):
            for ids in several:
                model(ids)
    return plain, workbench.load_capture(path)


def assert_same(a: Any, b: Any) -> None:
    """Tensors, arrays, and what is made of them."""
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(b + 0 if b.dtype != torch.bool else b, a, rtol=0, atol=0, equal_nan=True)
    elif isinstance(a, np.ndarray):
        np.testing.assert_array_equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    else:
        assert a == b or (a != a and b != b)


def assert_same_views(a: list[View], b: list[View]) -> None:
    """Their facts, numbers and tables; where they come from differs in time."""
    assert [one.spec.kind for one in a] == [one.spec.kind for one in b]
    for one, other in zip(a, b, strict=True):
        assert_same(one.spec.facts, other.spec.facts)
        assert_same(dict(one.spec.blocks), dict(other.spec.blocks))
        assert_same(one.spec.caption, other.spec.caption)


def test_analyses(both: tuple[Capture, Capture]) -> None:
    plain, stored = both
    profiles = [workbench.attention_profile(cap) for cap in both]
    assert profiles[0].table.equals(profiles[1].table)
    atlases = [workbench.pattern_atlas(cap, 2, size=8, width=4, epochs=2, progress=False) for cap in both]
    assert atlases[0].table.equals(atlases[1].table)
    for forward in range(3):
        caches = [cap.to_cache(forward) for cap in both]
        results = {name for name in caches[0] if name.endswith("hook_result")}  # they need the model's projection
        assert set(caches[0]) == set(caches[1]) | results
        for name in caches[1]:
            assert_same(caches[0][name], caches[1][name])
    for a, b in zip(plain.calls, stored.calls, strict=True):
        for x, y in zip(a, b, strict=True):
            names = ("value_weighted_received", "top_keys", "pooled_max")
            assert_same(x.pattern.statistics(names), y.pattern.statistics(names))
            assert_same(x.pattern.rows([-1, 2], heads=[3]), y.pattern.rows([-1, 2], heads=[3]))


def test_views(both: tuple[Capture, Capture]) -> None:
    views = workbench.views
    for make in (
        views.all_of,
        lambda cap: [views.attention_pattern(cap.calls[1], site=1, heads=[2])],
        lambda cap: [views.head_atlas(cap)],
        lambda cap: views.all_of(cap.calls[2]),
    ):
        assert_same_views(*(make(cap) for cap in both))


def test_a_report(both: tuple[Capture, Capture], tmp_path: Path) -> None:
    pages = [workbench.Report("Heads").add(cap.calls[0]).write(tmp_path / f"{i}.html") for i, cap in enumerate(both)]
    sizes = [page.stat().st_size for page in pages]
    assert abs(sizes[0] - sizes[1]) < 2000  # what they say of times and the weights' hash
