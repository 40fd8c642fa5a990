"""Runs the cases in Triton's interpreter and prints {case: [complaints]} as JSON; `test_numerics.py` starts it.

A process of its own: the interpreter must be chosen before the kernels are imported, and then they cannot be compiled.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
from triton_cases import CASES, compare

sys.path.insert(0, str(Path(__file__).parents[2]))
from support.interpreter import patch_once
from workbench.kernels.masks import Mask
from workbench.kernels.softmax import SoftmaxPattern
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
    found["a wrong truth"] = list(compare(CASES[2], "cpu", torch.float32, 1e-4, Mask(64, 64, causal=True, offset=-1)))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
