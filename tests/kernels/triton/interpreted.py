"""Runs the cases in Triton's interpreter and prints {case: [complaints]} as JSON; `test_numerics.py` starts it.

A process of its own: the interpreter must be chosen before the kernels are imported, and then they cannot be compiled.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
from triton_cases import CASES, ROWS, compare, differ, gradients

sys.path.insert(0, str(Path(__file__).parents[2]))
from support.interpreter import patch_once
from workbench.kernels.masks import Mask
from workbench.kernels.recurrent import RecurrentPattern
from workbench.kernels.recurrent.magnitudes import Magnitudes
from workbench.kernels.softmax import SoftmaxPattern
from workbench.kernels.statistics import Options
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
    """Statistics of |A| of a recurrence: decays mild, strong and complete, shared keys, a row without weight."""
    gen = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 2, 150, 20, generator=gen) for _ in range(2))
    q[:, :, 70] = 0
    decay = -torch.rand(2, 4, 150, generator=gen) * torch.tensor([0.0, 0.01, 1.0, 5.0])[:, None]
    decay[:, :, 140] = -torch.inf
    names = (*ROWS[1:], "received", "received_mean", "signed_mass", "row_sum")
    pattern, made = RecurrentPattern(q, k, decay), Magnitudes(q, k, decay, 4)
    pattern.fused_magnitudes = lambda names, options: made.collect  # type: ignore[method-assign]
    exact = RecurrentPattern(q.double(), k.double(), decay.double()).statistics(names)
    why = [made.refusal(names[:-2], Options()), made.refusal(["top_keys"], Options())]
    found = [f"refused: {why}"] if why[0] is not None or why[1] is None else []
    if pattern.engines(names[:-2], Options()) != {"triton"}:
        found.append("it is not said who ran")
    for name, got in pattern.statistics(names).items():
        want = exact[name].to(got.dtype)
        if not torch.allclose(got, want, atol=1e-4, rtol=1e-4, equal_nan=True):
            off = (got - want).abs()
            found.append(f"{name}: {float(off[off.isfinite()].max()):.1e} off, or NaN elsewhere")
    return found


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
    found["gradients"] = output_gradients()
    found["a wrong truth"] = list(compare(CASES[2], "cpu", torch.float32, 1e-4, Mask(64, 64, causal=True, offset=-1)))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
