"""Compiles the kernels ahead of time for one target and prints what each needs as JSON; `test_compile.py` starts it.

Usage: compiled.py TARGET, one of TARGETS. Neither a GPU nor a driver is needed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_targets import TARGETS, Build, builds

from workbench.kernels.triton.columns import columns_kernel, top_kernel
from workbench.kernels.triton.positions import LENGTHS
from workbench.kernels.triton.rows import rows_kernel

KERNELS = {"rows": rows_kernel, "columns": columns_kernel, "top": top_kernel}
INPUTS = ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "mask_ptr")
INDICES = ("peak_key_ptr", "target_ptr", "list_ptr", "count_ptr", "word_ptr", "key_ptr")
NUMBERS = ("scale", "softcap", "hidden_below")


def compiled(build: Build, backend: str, arch: int | str) -> Any:
    """The binary of a kernel, with the argument types and alignments of a launch."""
    kernel, (m, n, warps, stages) = KERNELS[build.kind], build.choice
    width = build.width if build.has == "plain" else build.width - 16  # padded heads need masks on channels as well
    constants = {"D": width, "DV": width, "BD": build.width, "BDV": build.width, "EDGE": 16, "SLOTS": 16}
    constants |= {"PRECISION": build.precision, "BM": m, "BN": n, "CAUSAL": True, "STATS": True, "POOLED": True}
    constants |= {"WINDOW": build.has != "plain", "SPARSE": build.has == "layout", "OUT": build.has == "layout"}
    constants |= dict.fromkeys(("BIAS", "SOFTCAP", "SINKS", "INDUCTION"), build.has == "shape")
    constants |= {"MASK": 2 if build.has == "shape" else 0, "stride_mk": 1}
    signature, aligned = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name.endswith("_ptr"):
            signature[name] = f"*{build.dtype}" if name in INPUTS else "*i32" if name in INDICES else "*fp32"
            signature[name] = "*i64" if name == "id_ptr" else signature[name]
        else:
            signature[name] = "fp32" if name in NUMBERS else "i32"
        if name.endswith("_ptr") or name.startswith("stride"):
            aligned[(place,)] = [["tt.divisibility", 16]]
        elif name not in NUMBERS:
            assert name in LENGTHS, f"{name} would be specialised on its value"
    used = {name: value for name, value in constants.items() if name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=used, attrs=aligned)
    warp = 64 if backend == "hip" else 32
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget(backend, arch, warp), options=options)


def figures(binary: Any, backend: str) -> dict[str, int]:
    """Shared memory in bytes, registers, bytes or registers spilled, and tensor-core instructions."""
    if backend == "hip":
        text = binary.asm["amdgcn"]

        def number(name: str) -> int:
            (found,) = re.findall(rf"\.{name}:\s+(\d+)", text)
            return int(found)

        spilled = number("vgpr_spill_count") + number("private_segment_fixed_size")
        registers, tensor = number("vgpr_count"), text.count("v_mfma")
    else:
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            text = subprocess.run(
                [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
        usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        spilled, registers = usage["STACK"] + usage["LOCAL"], usage["REG"]
        tensor = binary.asm["ptx"].count("mma.sync") + binary.asm["ptx"].count("wgmma.mma_async")
    return {"shared": binary.metadata.shared, "registers": registers, "spilled": spilled, "tensor": tensor}


def main(name: str) -> None:
    """Every build of a target, and one that is known to spill."""
    backend, arch, _ = TARGETS[name]
    meter = Build("rows", "bf16", 128, (128, 128, 4, 2), "layout")
    found = {str(build): figures(compiled(build, backend, arch), backend) for build in [*builds(name), meter]}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
