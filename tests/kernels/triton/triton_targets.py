"""What is compiled, for which targets: the very lists that the launcher lets autotuning choose from."""

from __future__ import annotations

from dataclasses import dataclass

from support.triton_builds import TARGETS
from workbench.kernels.triton.configs import WIDTHS, Choice, Kind, choices


@dataclass(frozen=True)
class Build:
    """One compilation: what a causal mask needs for statistics alone ("plain"), with a window, a layout and the output
    ("layout"), with a window, an additive mask, biases, softcap, sinks and induction ("shape"), or for logarithms of
    magnitudes that fade ("log").
    """

    kind: Kind
    dtype: str
    width: int
    choice: Choice
    has: str
    precision: str = "ieee"

    def __str__(self) -> str:
        m, n, warps, stages = self.choice
        dtype = self.dtype if self.precision == "ieee" else self.precision
        return f"{self.kind} {dtype} {self.width} {m}x{n} {warps} warps {stages} stages {self.has}"


def builds(target: str) -> list[Build]:
    """Every tile of every kernel, at the widest heads that it is for.

    float16 compiles to what bfloat16 does, so that one width does for it; and what everything fits with, a part of it
    fits with, so that the plain kernel is compiled at one width too.
    """
    backend, arch, _ = TARGETS[target]
    found = []
    for dtype, widths in (("bf16", WIDTHS), ("fp16", (64,)), ("fp32", WIDTHS)):
        for kind in ("rows", "columns", "top"):
            for width in widths:
                more = [] if dtype == "fp16" else ["shape"]
                if width == 128 and kind == "rows":
                    more += ["plain"]
                if dtype != "fp16":
                    more += ["log"]
                for has in ("layout", *more):
                    for choice in choices(kind, backend, arch, dtype != "fp32", width, has in ("shape", "log")):
                        found.append(Build(kind, dtype, width, choice, has))
                        if dtype == "fp32" and has == "shape":
                            found.append(Build(kind, dtype, width, choice, has, "tf32"))
    return found
