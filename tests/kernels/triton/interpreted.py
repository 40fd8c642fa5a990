"""Runs the cases in Triton's interpreter and prints {case: [complaints]} as JSON; `test_numerics.py` starts it.

A process of its own: the interpreter must be chosen before the kernels are imported, and then they cannot be compiled.
"""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from triton_cases import CASES, COLUMNS, ROWS, compare, differ, gradients, statistic

sys.path.insert(0, str(Path(__file__).parents[2]))
from support.interpreter import patch_once
from workbench.kernels import streaming
from workbench.kernels.lightning import LightningPattern
from workbench.kernels.lightning.naive import naive_pattern
from workbench.kernels.masks import Mask
from workbench.kernels.plan import Pass
from workbench.kernels.recurrent import RecurrentPattern
from workbench.kernels.recurrent.naive import naive_recurrent_pattern
from workbench.kernels.softmax import SoftmaxPattern
from workbench.kernels.statistics import Options, dense
from workbench.kernels.triton import engine


def far_rows() -> list[str]:
    """Distances of two neighbouring keys 200,000 positions away: a mean of 200,000 and a variance of a fraction."""
    n_keys, far = 4, 200_000
    keys = torch.eye(n_keys, 32)[None, None]
    wanted = torch.tensor([0.7, 0.2, 0.1, 1e-9]).double().log().float()
    q = torch.zeros(1, 1, 1, 32)
    q[..., :n_keys] = wanted * 32**0.5
    got = engine.statistics(SoftmaxPattern(q, keys, Mask(1, n_keys, True, far)).problem, ["distance", "distance_var"])
    p = torch.tensor([0.7, 0.2, 0.1]).double()
    j = torch.arange(3).double()
    mean = (p * j).sum()
    var = (p * (j - mean) ** 2).sum()
    found = []
    if abs(float(got["distance"]) - float(far - mean)) > 0.02:
        found.append(f"mean {float(got['distance'])}")
    if abs(float(got["distance_var"]) - float(var)) > 1e-4:
        found.append(f"variance {float(got['distance_var'])}, not {float(var)}")
    return found


def magnitudes() -> list[str]:
    """Statistics of |A| of recurrences whose heads fade, over several tiles: against the definition in float64.

    Decays are mild, strong and complete, keys shared, a row without weight; those of Lightning are constant.
    """
    gen, found = torch.Generator().manual_seed(0), list[str]()
    q, k = torch.randn(2, 2, 70, 20, generator=gen), torch.randn(2, 2, 70, 20, generator=gen)
    q[:, :, 50] = 0
    decay = -torch.rand(2, 4, 70, generator=gen) * torch.tensor([0.0, 0.01, 1.0, 5.0])[:, None]
    decay[:, :, 45] = -torch.inf
    wide = q.double().repeat_interleave(2, 1), k.double().repeat_interleave(2, 1)
    recurrent = RecurrentPattern(q, k, decay), naive_recurrent_pattern(*wide, decay.double())
    rates = torch.tensor([1.0, 0.3, 1e-60, 0.999], dtype=torch.float64)
    queries = q[:1].repeat_interleave(2, 1) * 1e3
    lightning = LightningPattern(queries, k[:1], rates), naive_pattern(queries.double(), wide[1][:1], rates)
    names = [*ROWS[1:], "induction", *COLUMNS]
    tokens = torch.randint(0, 5, (2, 70), generator=gen)
    for pattern, exact in (recurrent, lightning):
        made, options = pattern.magnitudes(), Options(tokens=tokens[: len(exact)], n_top=3, block=8)
        type(pattern).fused_magnitudes = lambda self, made=made: made  # type: ignore[method-assign]
        why = made.refusal(names, options)
        if why is not None or pattern.engines(names, options) != {"triton"}:
            found.append(f"refused: {why}")
        want = dense(exact, names, pattern.mask, options=options, by_magnitude=True)
        weights = exact.abs() / exact.abs().sum(-1, keepdim=True).clamp(min=1e-300)
        got = streaming.statistics(pattern, names, options)
        for name in got:
            found += (f"{type(pattern).__name__}: {each}" for each in statistic(name, got[name], want, weights, 1e-4))
        sums = pattern.statistics(["signed_mass", "row_sum"])
        for name, value in dense(exact, ["signed_mass", "row_sum"], pattern.mask, by_magnitude=True).items():
            found += differ(name, sums[name] / value.abs().max(), value / value.abs().max(), 1e-5)
    return found


def numbers_that_are_none() -> list[str]:
    """A query that is NaN makes its row's denominator NaN, which a capture asks for at its end."""
    q = torch.ones(1, 1, 40, 8)
    q[:, :, 35] = torch.nan
    of_magnitudes = RecurrentPattern(torch.ones_like(q), torch.ones_like(q)).magnitudes()
    with warnings.catch_warnings(action="ignore"):
        of_softmax = engine.statistics(SoftmaxPattern(q, torch.ones_like(q)).problem, ["lse"])["lse"]
        fades = replace(of_magnitudes, q=q).collect(Pass((), True), Options(), None)["lse"]
    wrong = [int(each.isnan().sum()) for each in (of_softmax, fades)]
    return [] if wrong == [1, 1] else [f"{wrong} rows are NaN"]


def output_gradients() -> list[str]:
    """Of the fused forward, with shared keys and rows that see none."""
    found = list[str]()
    for case in CASES:
        if case.name in ("keys from a cache", "dead rows"):
            leaves = [x.requires_grad_() for x in case.tensors("cpu", torch.float32)]
            d_out, want = gradients(case, *leaves)
            output, rows = engine.attention(*leaves, case.mask())
            for name, got, exact in zip("qkv", torch.autograd.grad(output, leaves, d_out.float()), want, strict=True):
                found += differ(f"{case.name}: {name}", got, exact, 1e-4)
            if any(each.requires_grad for each in rows.values()):
                found.append("statistics ask for gradients")
    return found


def main() -> None:
    """Every case, the far rows, and a case held against a mask that it does not have."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    patch_once()
    found = {}
    for case in CASES:
        dtype, tolerance = (torch.float16, 2e-3) if case.half else (torch.float32, 1e-4)
        try:
            found[case.name] = list(compare(case, "cpu", dtype, tolerance))
        except Exception as error:
            found[case.name] = [f"{type(error).__name__}: {error} ({error.__cause__!r})"]
    found["far rows"] = far_rows()
    found["magnitudes"] = magnitudes()
    found["numbers that are none"] = numbers_that_are_none()
    found["gradients"] = output_gradients()
    found["a wrong truth"] = list(compare(CASES[2], "cpu", torch.float32, 1e-4, Mask(64, 64, causal=True, offset=-1)))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
