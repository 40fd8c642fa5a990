"""What Triton's kernels need, compiled ahead of time: neither a GPU nor a driver is needed.

What a program needs follows from its source, its options, the target and the compiler alone. It is kept in a file,
beside a digest of these, so that only what is new is compiled.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 166_912),
    "sm_90": ("cuda", 90, 232_448),
    "gfx942": ("hip", "gfx942", 65_536),
}
"""(backend, arch, bytes of shared memory that a program may have)."""
Figures = dict[str, dict[str, Any]]
"""By the name of a program."""


@dataclass(frozen=True)
class Program:
    """A kernel with the argument types and alignments of a launch, as triton's `ASTSource`."""

    name: str
    source: Any
    warps: int
    stages: int

    def digest(self, target: str) -> str:
        """Of all that the figures follow from."""
        import triton

        of = (triton.__version__, self.source.hash(), TARGETS[target], (self.warps, self.stages))
        return hashlib.sha256(repr(of).encode()).hexdigest()[:16]

    def compiled(self, target: str) -> dict[str, int]:
        """What it needs, compiled now."""
        import triton
        from triton.backends.compiler import GPUTarget

        backend, arch, _ = TARGETS[target]
        options = {"num_warps": self.warps, "num_stages": self.stages}
        of = GPUTarget(backend, arch, 64 if backend == "hip" else 32)
        return _figures(triton.compile(self.source, target=of, options=options), backend)


def needs(target: str, programs: Iterable[Program], kept: Figures, anew: Collection[str]) -> Figures:
    """What the programs need, each beside the digest of what that follows from.

    Args:
        kept: from another time. anew: the names of those that are compiled every time.
    """
    found = {}
    for program in programs:
        of, known = program.digest(target), kept.get(program.name, {})
        is_known = known.get("of") == of and program.name not in anew
        found[program.name] = known if is_known else {"of": of, **program.compiled(target)}
    return found


def read(path: Path) -> dict[str, Figures]:
    """What is kept, by target."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    return {target: kept.get(target, {}) for target in TARGETS}


def keep(path: Path, of: Callable[[str], Figures]) -> None:
    """Write what `of` gives for each target, a line for each program."""
    lines = [
        f'"{target}": {{\n' + ",\n".join(f"{json.dumps(name)}: {json.dumps(one)}" for name, one in of(target).items())
        for target in TARGETS
    ]
    path.write_text("{" + "\n},\n".join(lines) + "\n}}\n")


def assert_kept(path: Path, target: str, found: Figures, command: str) -> None:
    """What is kept is what compiling gave, but where it follows from something else."""
    kept = read(path)[target]
    for name, one in found.items():
        assert kept.get(name, one) == one or kept[name]["of"] != one["of"], command


def _figures(binary: Any, backend: str) -> dict[str, int]:
    """Shared memory in bytes, registers, bytes or registers spilled, and tensor-core instructions."""
    if backend == "hip":
        text = binary.asm["amdgcn"]

        def number(name: str) -> int:
            (found,) = re.findall(rf"\.{name}:\s+(\d+)", text)
            return int(found)

        spilled = number("vgpr_spill_count") + number("private_segment_fixed_size")
        registers, tensor = number("vgpr_count"), text.count("v_mfma")
    else:
        import triton

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
