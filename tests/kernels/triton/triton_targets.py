"""What is compiled, for which targets: the very lists that the launcher lets autotuning choose from."""

from __future__ import annotations

from dataclasses import dataclass

from workbench.kernels.triton.configs import Choice, Kind, choices

TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 166_912),
    "sm_90": ("cuda", 90, 232_448),
    "gfx942": ("hip", "gfx942", 65_536),
}
"""(backend, arch, bytes of shared memory that a program may have)."""


@dataclass(frozen=True)
class Build:
    """One compilation. A plain one is what a causal mask needs for statistics alone, the other has everything on."""

    kind: Kind
    dtype: str
    width: int
    choice: Choice
    plain: bool

    def __str__(self) -> str:
        m, n, warps, stages = self.choice
        extent = "plain" if self.plain else "all"
        return f"{self.kind} {self.dtype} {self.width} {m}x{n} {warps} warps {stages} stages {extent}"


def builds(target: str) -> list[Build]:
    """Every tile of every kernel; float16 compiles to what bfloat16 does, so that two widths do for it."""
    backend, arch, _ = TARGETS[target]
    found = []
    for dtype, widths in (("bf16", (32, 64, 128, 256)), ("fp16", (64, 128)), ("fp32", (32, 64, 128, 256))):
        for kind in ("rows", "columns", "top"):
            for width in widths:
                for choice in choices(kind, backend, arch, dtype != "fp32", width):
                    found.append(Build(kind, dtype, width, choice, False))
                    if kind == "rows" and dtype != "fp16":
                        found.append(Build(kind, dtype, width, choice, True))
    return found
