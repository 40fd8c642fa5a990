"""The kernels in Triton's interpreter against the dense float64 definitions, and what they refuse."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from triton_cases import CASES, Blocks, Case

from workbench.errors import CaptureError
from workbench.kernels.masks import Mask, padding
from workbench.kernels.softmax import SoftmaxPattern
from workbench.kernels.statistics import Options
from workbench.kernels.triton import engine
from workbench.kernels.triton.tables import Tables, targets


@pytest.mark.parametrize("name", [*(case.name for case in CASES), "far rows"])
def test_against_the_definition(name: str, printed: Callable[..., Any]) -> None:
    found = printed("interpreted.py", TRITON_INTERPRET="1")
    assert found[name] == []


def test_the_comparison_sees_a_wrong_mask(printed: Callable[..., Any]) -> None:
    complaints = printed("interpreted.py", TRITON_INTERPRET="1")["a wrong truth"]
    assert {c.split(":")[0] for c in complaints} >= {"lse", "entropy", "distance", "received", "pooled_mean", "output"}


def _pattern(d: int = 32, dtype: torch.dtype = torch.float32, **how: Any) -> SoftmaxPattern:
    gen = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 2, 64, d, generator=gen, dtype=torch.float64).to(dtype)
    return SoftmaxPattern(q, k, **how)


class Tokens(Blocks):
    """A layout that says nothing of whole blocks."""

    exact = False


REFUSED = [
    ("float64", _pattern(dtype=torch.float64), ["entropy"], Options()),
    ("256 wide", _pattern(d=257), ["entropy"], Options()),
    ("power of two", _pattern(), ["pooled_mean"], Options(block=24)),
    ("16 top keys", _pattern(), ["top_keys"], Options(n_top=17)),
    ("mask tensors", _pattern(mask=padding([64], 64)), ["entropy"], Options()),
    ("softcap", _pattern(softcap=30.0), ["entropy"], Options()),
    ("sinks", _pattern(sinks=torch.zeros(2)), ["entropy"], Options()),
    ("key_bias", _pattern(key_bias=torch.zeros(1, 2, 64)), ["entropy"], Options()),
    ("given keys", _pattern(), ["sink"], Options(sink_keys=(0,))),
    ("induction", _pattern(), ["induction"], Options()),
    (
        "single tokens",
        _pattern(mask=Mask(64, 64, layout=Tokens(torch.ones(1, 4, 4) > 0, 16), n_heads=2)),
        ["lse"],
        Options(),
    ),
    (
        "layout blocks",
        _pattern(mask=Mask(64, 64, layout=Blocks(torch.ones(1, 2, 2) > 0, 48), n_heads=2)),
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


def test_values_that_do_not_fit() -> None:
    q = torch.randn(1, 2, 8, 32)
    with pytest.raises(CaptureError):
        engine.attention(q, q, q[:, :, :4])


def test_importing_the_launcher_does_not_import_triton() -> None:
    code = (
        "import sys, workbench.kernels.triton.engine, workbench.kernels.triton.configs; print('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("tile", [(16, 16), (64, 64), (128, 32)])
@pytest.mark.parametrize("case", [case for case in CASES if case.layout], ids=lambda case: case.name)
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
    found = targets(["sink", "current", "previous"], mask, seen, torch.device("cpu"))
    assert found[:, 0].tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [-1, -1, -1, -1]]
