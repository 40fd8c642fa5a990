"""Every public function that takes a capture takes a store, and gives the same to the bit."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import workbench
from support import every_view, sight
from support.tiny import VOCABULARY, small_llama
from workbench import Capture
from workbench.capture.store.writing import open_writer
from workbench.storage.result import Result
from workbench.views.base.view import View

views = workbench.views


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


def stored(cap: Capture, path: Path) -> Capture:
    """A capture that was made in memory, written to a store and opened."""
    assert cap.settings is not None
    with open_writer(path, cap.settings, dict(cap.provenance), {}) as writer:
        writer.say(cap.model_sites)
        for forward in cap.forwards:
            writer.add(forward, {})
    return workbench.load_capture(path)


def assert_same(a: Any, b: Any) -> None:
    """Tensors, arrays, results, views, and what is made of them; where they come from differs in time."""
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
    elif isinstance(a, View):
        assert_same([a.spec.kind, a.spec.facts, dict(a.spec.blocks), a.spec.caption], [
            b.spec.kind, b.spec.facts, dict(b.spec.blocks), b.spec.caption,
        ])  # fmt: skip
    elif isinstance(a, Result):
        for field in fields(a):  # type: ignore[arg-type]
            if field.name != "provenance":
                assert_same(getattr(a, field.name), getattr(b, field.name))
    else:
        assert a == b or (a != a and b != b)


@dataclass(frozen=True)
class Case:
    """A function on a capture; `of` gives the capture where it takes one of a model of another kind."""

    run: Callable[[Capture], Any]
    of: Callable[[], Capture] | None = None


@cache
def _gated() -> Capture:
    from workbench.mechanisms import Place, get

    torch.manual_seed(0)
    module = get("van").build(Place(4, 2, 12, causal=False, grid=(3, 4))).eval()
    with workbench.attach(module) as wb, torch.no_grad(), wb.capture() as found:
        module(torch.randn(3, 12, 4, generator=torch.Generator().manual_seed(0)))
    return found


@cache
def _pictured() -> tuple[Capture, Any]:
    """A capture of a model that sees, and where its pictures stand."""
    one = sight.SIGHTS[0]
    model, images = sight.built(one), sight.pictures(one)
    inputs = sight.made(model, one, images)
    with workbench.attach(model) as wb, torch.no_grad():
        places = workbench.image_places(wb, inputs, images, one.processor(), **one.settings)
        with wb.capture(()) as found:
            model(**inputs)
    return found, places


CASES = {
    "attention_profile": Case(workbench.attention_profile),
    "eviction": Case(lambda cap: workbench.eviction(cap.calls[0], "streaming", sinks=1, recent=4)),
    "gate_profile": Case(lambda cap: workbench.gate_profile(cap, (3, 4)), _gated),
    "pattern_atlas": Case(lambda cap: workbench.pattern_atlas(cap, 2, size=8, width=4, epochs=2, progress=False)),
    "attention_pattern": Case(lambda cap: views.attention_pattern(cap.calls[1], site=1, heads=[2])),
    "grounding": Case(lambda cap: views.grounding(cap, _pictured()[1]), lambda: _pictured()[0]),
    "half_lives": Case(views.half_lives, every_view.hybrid_capture),
    "head": Case(lambda cap: views.head(cap.calls[0], "L1H2")),
    "head_atlas": Case(views.head_atlas),
    "image_attention": Case(
        lambda cap: views.image_attention(cap, every_view.image_capture()[1]), lambda: every_view.image_capture()[0]
    ),
    "overview": Case(views.overview),
    "run_timeline": Case(views.run_timeline, every_view.capture),
    "states": Case(lambda cap: views.states(cap, 0), every_view.hybrid_capture),
}


def _that_take_captures() -> Iterator[str]:
    for home in (workbench, views):
        for name in home.__all__:
            found = getattr(home, name)
            if inspect.isfunction(found):
                taken = inspect.signature(found).parameters.values()
                if any("Capture" in str(one.annotation) for one in taken):
                    yield name


def test_none_is_left_out() -> None:
    assert sorted(CASES) == sorted(_that_take_captures())


@pytest.mark.parametrize("name", CASES)
def test_on_a_store(name: str, both: tuple[Capture, Capture], tmp_path: Path) -> None:
    case = CASES[name]
    plain, opened = both
    if case.of is not None:
        plain = case.of()
        opened = stored(plain, tmp_path / "a.zarr")
    assert_same(case.run(plain), case.run(opened))


def test_what_a_capture_gives_itself(both: tuple[Capture, Capture]) -> None:
    plain, opened = both
    for forward in range(3):
        caches = [cap.to_cache(forward) for cap in both]
        results = {name for name in caches[0] if name.endswith("hook_result")}  # they need the model's projection
        assert set(caches[0]) == set(caches[1]) | results
        for name in caches[1]:
            assert_same(caches[0][name], caches[1][name])
    for a, b in zip(plain.calls, opened.calls, strict=True):
        for x, y in zip(a, b, strict=True):
            names = ("value_weighted_received", "top_keys", "pooled_max")
            assert_same(x.pattern.statistics(names), y.pattern.statistics(names))
            assert_same(x.pattern.rows([-1, 2], heads=[3]), y.pattern.rows([-1, 2], heads=[3]))
    assert_same(views.all_of(plain), views.all_of(opened))


def test_every_statistic(both: tuple[Capture, Capture]) -> None:
    """Of all that are registered: from stored queries, keys and values."""
    from workbench.kernels.statistics import STATISTICS

    for x, y in zip(both[0].calls[0], both[1].calls[0], strict=True):
        known = [name for name in STATISTICS if _has(x.pattern, name)]
        assert len(known) > 10
        assert_same(x.pattern.statistics(known), y.pattern.statistics(known))


def _has(pattern: Any, name: str) -> bool:
    try:
        pattern.statistics((name,))
    except workbench.WorkbenchError:
        return False
    return True


def test_a_report(both: tuple[Capture, Capture], tmp_path: Path) -> None:
    pages = [workbench.Report("Heads").add(cap.calls[0]).write(tmp_path / f"{i}.html") for i, cap in enumerate(both)]
    sizes = [page.stat().st_size for page in pages]
    assert abs(sizes[0] - sizes[1]) < 2000  # what they say of times and the weights' hash
