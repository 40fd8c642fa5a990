"""What the kernels need, compiled ahead of time for one target, printed as JSON; `test_compile.py` starts it.

Usage: compiled.py TARGET, one of TARGETS, or `compiled.py keep`. Neither a GPU nor a driver is needed.

What a build needs follows from its source, its options and the compiler alone. `figures.json` keeps it beside a digest
of these, so that only what is new is compiled; `keep` compiles all that has changed and writes the file.
"""

from __future__ import annotations

import hashlib
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


KEPT = Path(__file__).parent / "figures.json"
METER = Build("rows", "bf16", 128, (128, 128, 4, 2), "layout")
"""Known to spill."""


def source_of(build: Build) -> ASTSource:
    """A kernel with the argument types and alignments of a launch."""
    kernel, (m, n, _, _) = KERNELS[build.kind], build.choice
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
    return ASTSource(fn=kernel, signature=signature, constexprs=used, attrs=aligned)


def compiled(build: Build, backend: str, arch: int | str) -> dict[str, int]:
    """What a build needs, compiled now."""
    *_, warps, stages = build.choice
    target = GPUTarget(backend, arch, 64 if backend == "hip" else 32)
    binary = triton.compile(source_of(build), target=target, options={"num_warps": warps, "num_stages": stages})
    return figures(binary, backend)


def digest(build: Build, target: str) -> str:
    """Of all that the figures of a build follow from: sources, types, constants, options, target and compiler."""
    of = (triton.__version__, source_of(build).hash(), TARGETS[target], build.choice[2:])
    return hashlib.sha256(repr(of).encode()).hexdigest()[:16]


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


def needs(target: str, kept: dict[str, Any]) -> dict[str, Any]:
    """What every build of a target, and one that spills, needs, beside the digest of what that follows from.

    The first build of each kernel, and the one that spills, are compiled every time.
    """
    backend, arch, _ = TARGETS[target]
    found, anew = {}, {METER, *{build.kind: build for build in reversed(builds(target))}.values()}
    for build in [*builds(target), METER]:
        of = digest(build, target)
        known = kept.get(str(build), {})
        if known.get("of") != of or build in anew:
            found[str(build)] = {"of": of, **compiled(build, backend, arch)}
        else:
            found[str(build)] = known
    return found


def main(name: str) -> None:
    """Print what the builds of a target need, or keep what those of all need."""
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    if name != "keep":
        print(json.dumps(needs(name, kept.get(name, {}))))
        return
    found = {target: needs(target, kept.get(target, {})) for target in TARGETS}
    lines = [
        f'"{target}": {{\n'
        + ",\n".join(f"{json.dumps(name)}: {json.dumps(one)}" for name, one in several.items())
        + "\n}"
        for target, several in found.items()
    ]
    KEPT.write_text("{" + ",\n".join(lines) + "}\n")


if __name__ == "__main__":
    main(sys.argv[1])
