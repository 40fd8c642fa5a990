"""The kernels in Triton's interpreter against the dense float64 definitions, and what they refuse."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_cases import CASES, Case, gradients

from workbench.errors import CaptureError
from workbench.kernels import softmax_backward
from workbench.kernels.masks import Mask
from workbench.kernels.neighborhood.layout import NeighborhoodLayout
from workbench.kernels.softmax import SoftmaxPattern
from workbench.kernels.statistics import Options
from workbench.kernels.triton import engine
from workbench.kernels.triton.call import precision
from workbench.kernels.triton.tables import Tables, targets


@pytest.mark.parametrize(
    "name", [*(case.name for case in CASES), "far rows", "magnitudes", "numbers that are none", "gradients"]
)
def test_against_the_definition(name: str, printed: Callable[..., Any]) -> None:
    found = printed("interpreted.py", TRITON_INTERPRET="1")
    assert found[name] == []


def test_the_comparison_sees_a_wrong_mask(printed: Callable[..., Any]) -> None:
    complaints = printed("interpreted.py", TRITON_INTERPRET="1")["a wrong truth"]
    assert {c.split(":")[0] for c in complaints} >= {"lse", "entropy", "distance", "received", "pooled_mean", "output"}


def _pattern(d: int = 32, dtype: torch.dtype = torch.float32, n: int = 64, **how: Any) -> SoftmaxPattern:
    gen = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 2, n, d, generator=gen, dtype=torch.float64).to(dtype)
    return SoftmaxPattern(q, k, **how)


REFUSED = [
    ("float64", _pattern(dtype=torch.float64), ["entropy"], Options()),
    ("256 wide", _pattern(d=257), ["entropy"], Options()),
    ("power of two", _pattern(), ["pooled_mean"], Options(block=24)),
    ("16 top keys", _pattern(), ["top_keys"], Options(n_top=17)),
    ("16 sink keys", _pattern(), ["sink"], Options(sink_keys=tuple(range(17)))),
    (
        "too large",
        _pattern(n=20_000, mask=Mask(20_000, 20_000, layout=NeighborhoodLayout((20_000,), 9), n_heads=2)),
        ["lse"],
        Options(),
    ),
]


@pytest.mark.parametrize(("says", "pattern", "names", "options"), REFUSED, ids=[each[0] for each in REFUSED])
def test_refusal(says: str, pattern: SoftmaxPattern, names: list[str], options: Options) -> None:
    assert says in str(engine.refusal(pattern.problem, names, options))
    with pytest.raises(CaptureError, match=says) as caught:
        engine.statistics(pattern.problem, names, options)
    assert caught.value.hint


def test_refuses_a_cpu_outside_of_the_interpreter() -> None:
    pytest.importorskip("triton", reason="triton has no wheel for this system")
    assert "on a GPU" in str(engine.refusal(_pattern().problem, ["entropy"]))


@pytest.mark.parametrize("case", [case for case in CASES if case.bare and not case.half], ids=lambda case: case.name)
def test_backward_against_autograd_of_the_definition(case: Case) -> None:
    q, k, v = (x.double() for x in case.tensors("cpu", torch.float32))
    d_out, want = gradients(case, q, k, v)
    pattern = case.problem(q, k, case.mask())
    problem = replace(pattern.problem, lse=pattern.lse.clamp(min=-1e20))
    got = softmax_backward.backward(problem, v, pattern.apply(v), d_out)
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)


def test_a_mask_that_asks_for_gradients_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_machine_refusal", lambda device: None)
    q, added = torch.randn(1, 2, 8, 32), torch.zeros(1, 1, 8, 8, requires_grad=True)
    with pytest.raises(CaptureError, match="no gradient"):
        engine.attention(q, q, q, Mask(8, 8, tensor=added))


def test_values_that_do_not_fit() -> None:
    q = torch.randn(1, 2, 8, 32)
    with pytest.raises(CaptureError):
        engine.attention(q, q, q[:, :, :4])


def test_tf32_is_used_where_pytorch_may_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    assert precision(on_gpu) == "ieee"  # type: ignore[arg-type]
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert precision(on_gpu) == "tf32"  # type: ignore[arg-type]
    assert precision(SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)) == "ieee"  # type: ignore[arg-type]
    assert precision(torch.zeros(1)) == "ieee"


def test_what_tf32_leaves_of_weights() -> None:
    """As `precision` says: a score by 2⁻¹⁰ · scale · Σ|q·k| at most, and a weight by a factor of e to twice that."""
    pattern = _pattern(d=64)

    def in_tf32(x: Tensor) -> Tensor:
        return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    rounded = SoftmaxPattern(in_tf32(pattern.q), in_tf32(pattern.k))
    exact, off = (SoftmaxPattern(each.q.double(), each.k.double()).dense().log() for each in (pattern, rounded))
    bound = 2**-10 * pattern.scale * (pattern.q.abs() @ pattern.k.abs().mT).amax(-1, keepdim=True)
    assert bool(((exact - off).abs() <= 2 * bound).all())
    assert float((exact - off).abs().max()) > 1e-4  # no rounding of float32


def test_importing_the_launcher_does_not_import_triton() -> None:
    code = (
        "import sys, workbench.kernels.triton.engine, workbench.kernels.triton.configs; print('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("tile", [(16, 16), (64, 64), (128, 32)])
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.layout and case.layout[0] in (8, 16, 32, 64)], ids=lambda case: case.name
)
def test_tables_list_every_visible_tile_once(case: Case, tile: tuple[int, int]) -> None:
    mask = case.mask()
    assert mask.layout is not None
    made = Tables.of(mask, *tile, torch.device("cpu"))
    layouts = torch.arange(mask.layout.n_layouts)
    whole = slice(0, mask.n_queries), slice(0, mask.n_keys)
    blocks = mask.layout.visible(*whole, layouts)
    rule = mask.rule(*whole, torch.device("cpu"))
    shown = blocks if rule is None else blocks & rule
    for which in layouts.tolist():
        for t in range(-(-mask.n_queries // tile[0])):
            rows = shown[which, t * tile[0] : (t + 1) * tile[0]]
            needed = {j for j in range(-(-mask.n_keys // tile[1])) if rows[:, j * tile[1] : (j + 1) * tile[1]].any()}
            listed = made.key_tiles[which, t, : made.n_key_tiles[which, t]].tolist()
            assert listed == sorted(set(listed))
            assert needed <= set(listed)
            for j in listed:  # what is listed is in the other list too, so that both passes see the same tiles
                assert t in made.query_tiles[which, j, : made.n_query_tiles[which, j]].tolist()
        bit = torch.arange(mask.n_keys) % tile[1] // min(made.block, tile[1])
        words = made.words[which][torch.arange(mask.n_queries) // made.block]
        seen = (words[:, torch.arange(mask.n_keys) // tile[1]] >> bit) & 1
        assert torch.equal(seen.bool(), blocks[which])


def test_targets_outside_of_the_mask_are_none() -> None:
    mask = Mask(4, 4, causal=True, window=1)
    seen = mask.summary(torch.device("cpu"))
    found = targets(["sink", "current", "previous"], None, mask, seen, torch.device("cpu"))
    assert found[:, 0, 0].tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [-1, -1, -1, -1]]
    found = targets(["sink", "current"], (-4, 0, 2), mask, seen, torch.device("cpu"))
    assert found[:, 0, 0].tolist() == [[0, -1, -1, -1], [-1, -1, 2, -1], [0, 1, 2, 3]]
