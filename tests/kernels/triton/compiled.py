"""What the kernels need, compiled ahead of time for one target, printed as JSON; `test_compile.py` starts it.

Usage: compiled.py TARGET, one of TARGETS, or `compiled.py keep`, which compiles all that has changed and keeps it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[2]))
from triton_targets import Build, builds

from support.triton_builds import Figures, Program, keep, needs, read
from workbench.kernels.triton.columns import columns_kernel, top_kernel
from workbench.kernels.triton.positions import LENGTHS
from workbench.kernels.triton.rows import rows_kernel

KERNELS = {"rows": rows_kernel, "columns": columns_kernel, "top": top_kernel}
INPUTS = ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "mask_ptr")
INDICES = ("peak_key_ptr", "target_ptr", "list_ptr", "count_ptr", "word_ptr", "key_ptr")
NUMBERS = ("scale", "softcap", "hidden_below")
KEPT = Path(__file__).parent / "figures.json"
METER = Build("rows", "bf16", 128, (128, 128, 4, 2), "layout")
"""Known to spill."""


def program(build: Build) -> Program:
    """A kernel with the argument types and alignments of a launch."""
    kernel, (m, n, warps, stages) = KERNELS[build.kind], build.choice
    width = build.width if build.has == "plain" else build.width - 16  # padded heads need masks on channels as well
    constants = {"D": width, "DV": width, "BD": build.width, "BDV": build.width, "EDGE": 16, "SLOTS": 16}
    constants |= {"PRECISION": build.precision, "BM": m, "BN": n, "CAUSAL": True, "STATS": True, "POOLED": True}
    constants |= {"WINDOW": build.has != "plain", "SPARSE": build.has == "layout", "OUT": build.has == "layout"}
    constants |= dict.fromkeys(("SINKS", "INDUCTION"), build.has == "shape")
    constants |= dict.fromkeys(("BIAS", "SOFTCAP"), {"shape": 1, "log": 2}.get(build.has, 0))
    constants |= {"MASK": 2 if build.has == "shape" else 0, "stride_mk": 1}
    signature, aligned = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name.endswith("_ptr"):
            signature[name] = f"*{build.dtype}" if name in INPUTS else "*i32" if name in INDICES else "*fp32"
            signature[name] = "*i64" if name == "id_ptr" else signature[name]
            signature[name] = "*fp64" if name == "bias_ptr" and build.has == "log" else signature[name]
        else:
            signature[name] = "fp32" if name in NUMBERS else "i32"
        if name.endswith("_ptr") or name.startswith("stride"):
            aligned[(place,)] = [["tt.divisibility", 16]]
        elif name not in NUMBERS:
            assert name in LENGTHS, f"{name} would be specialised on its value"
    used = {name: value for name, value in constants.items() if name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=used, attrs=aligned)
    return Program(str(build), source, warps, stages)


def of(target: str) -> Figures:
    """What every build of a target, and one that spills, needs; that one and the first of each kernel compiled anew."""
    first = {build.kind: str(build) for build in reversed(builds(target))}
    return needs(target, map(program, [*builds(target), METER]), read(KEPT)[target], {str(METER), *first.values()})


if __name__ == "__main__":
    if sys.argv[1] == "keep":
        keep(KEPT, of)
    else:
        print(json.dumps(of(sys.argv[1])))
