"""Tile sizes that autotuning may choose from, by kernel, backend, dtype and head width.

tests/kernels/triton/test_compile.py compiles these very lists: no entry may spill registers or outgrow shared memory.
This module imports triton only when it is asked about the machine.
"""

from __future__ import annotations

from typing import Any, Literal

Kind = Literal["rows", "columns", "top"]
Choice = tuple[int, int, int, int]
"""(queries, keys, warps, stages) of a tile."""
WIDTHS = (64, 128, 256)

# Row statistics keep several numbers per score alive at once, so their tiles are smaller than those of plain attention.
# Products of float32 run on the vector units ("ieee"): TF32 would lose what the statistics are exact to.
_CUDA: dict[tuple[Kind, bool], tuple[list[Choice], ...]] = {
    ("rows", True): (
        [(64, 64, 4, 2), (128, 64, 8, 2), (64, 32, 4, 3)],
        [(64, 64, 8, 2), (128, 32, 8, 2)],
        [(32, 32, 8, 2)],
    ),
    ("rows", False): ([(32, 32, 4, 2)], [(64, 32, 8, 2)], [(16, 16, 4, 2)]),
    ("columns", True): (
        [(64, 64, 4, 2), (128, 64, 8, 2)],
        [(64, 64, 4, 2), (128, 64, 8, 2)],
        [(64, 64, 8, 1), (64, 32, 4, 1)],
    ),
    ("columns", False): ([(64, 32, 8, 2), (32, 32, 8, 2)], [(64, 32, 8, 2), (32, 32, 8, 2)], [(64, 32, 8, 2)]),
    ("top", True): (
        [(128, 64, 8, 2), (64, 32, 4, 2)],
        [(128, 64, 8, 2), (64, 32, 4, 2)],
        [(64, 64, 8, 1), (64, 32, 4, 1)],
    ),
    ("top", False): (
        [(64, 32, 8, 2), (32, 32, 8, 2)],
        [(64, 32, 8, 2), (32, 32, 8, 2)],
        [(64, 32, 8, 2), (32, 32, 8, 2)],
    ),
}
_HIP: dict[tuple[Kind, bool], tuple[list[Choice], ...]] = {
    ("rows", True): ([(64, 64, 4, 2)], [(64, 32, 4, 2), (64, 64, 4, 2)], [(64, 32, 4, 1), (32, 32, 4, 1)]),
    ("rows", False): ([(64, 32, 4, 2), (32, 32, 4, 2)], [(32, 32, 4, 2)], [(32, 32, 4, 1)]),
    ("columns", True): ([(64, 64, 4, 2), (128, 64, 4, 2)], [(64, 64, 4, 2)], [(64, 32, 4, 1), (32, 32, 4, 1)]),
    ("columns", False): ([(32, 32, 4, 2)], [(32, 32, 4, 2)], [(32, 32, 4, 1)]),
    ("top", True): ([(64, 64, 4, 2)], [(64, 64, 4, 2), (64, 32, 4, 2)], [(64, 32, 4, 1), (32, 32, 4, 1)]),
    ("top", False): ([(64, 32, 4, 2), (32, 32, 4, 2)], [(32, 32, 4, 2)], [(32, 32, 4, 1)]),
}  # fmt: skip
# What shapes scores takes registers: where the tiles above would spill, these do not.
_SHAPED: dict[tuple[str, Kind, bool, int], list[Choice]] = {
    ("cuda", "rows", False, 128): [(32, 32, 8, 2)],
    ("cuda", "columns", True, 64): [(64, 64, 8, 2)],
    ("cuda", "columns", True, 128): [(64, 64, 8, 2), (64, 32, 4, 2)],
    ("cuda", "columns", False, 128): [(32, 32, 8, 2)],
    ("cuda", "top", False, 64): [(32, 32, 4, 2)],
    ("cuda", "top", False, 128): [(32, 32, 4, 2)],
    ("cuda", "top", True, 64): [(64, 64, 8, 2), (64, 32, 4, 2)],
    ("cuda", "top", True, 128): [(64, 64, 8, 2), (64, 32, 4, 2)],
    ("cuda", "top", True, 256): [(64, 32, 8, 1), (32, 32, 4, 1)],
    ("hip", "rows", True, 256): [(32, 32, 8, 1), (32, 16, 4, 1)],
}
_INTERPRETED: Choice = (32, 32, 1, 1)
_FLAGS = ("D", "DV", "CAUSAL", "WINDOW", "SPARSE", "MASK", "BIAS", "SOFTCAP", "SINKS", "STATS", "INDUCTION", "OUT",
          "POOLED", "EDGE", "PRECISION")  # fmt: skip


def choices(kind: Kind, backend: str, arch: int | str, half: bool, width: int, shaped: bool) -> list[Choice]:
    """The tiles for a kernel on `backend` ("cuda" with arch 80, 90, ... or "hip"), 16 bit or not, padded to `width`.

    Args:
        shaped: whether more than products and positions make the scores: a mask's tensor, biases, a cap.
    """
    if shaped and (backend, kind, half, max(width, WIDTHS[0])) in _SHAPED:
        return list(_SHAPED[backend, kind, half, max(width, WIDTHS[0])])
    at = WIDTHS.index(max(width, WIDTHS[0]))
    if backend == "cuda" and kind == "rows" and width == 256 and half and arch == 90:
        return [(64, 32, 8, 2), (32, 32, 8, 2)]
    if backend == "cuda" and kind == "rows" and width == 256 and not half and arch == 80:
        return [(32, 32, 8, 2)]
    return list((_CUDA if backend == "cuda" else _HIP)[kind, half][at])


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 before the first import), on CPU tensors."""
    import triton

    from workbench.kernels.triton.rows import rows_kernel

    return not isinstance(rows_kernel, triton.JITFunction)


def padded(width: int) -> int:
    """The power of two, at least 32, that a tile holds for a head width.

    >>> padded(80)
    128
    """
    return max(32, 1 << (width - 1).bit_length())


def tiles(kind: Kind, half: bool, width: int, sparse: bool, shaped: bool) -> list[Choice]:
    """The tiles for this machine. With a layout all are of one size, since its tables are made for one size."""
    from triton.runtime import driver

    if interpreted():
        return [_INTERPRETED]
    target = driver.active.get_current_target()
    found = choices(kind, target.backend, target.arch, half, width, shaped)
    return [each for each in found if each[:2] == found[0][:2]] if sparse else found


_tuned: dict[tuple[Any, ...], Any] = {}


def tuned(kernel: Any, among: list[Choice]) -> Any:
    """The kernel, autotuned among these tiles once per dtype and set of constexpr flags; lengths share a choice."""
    import triton

    at = (kernel, *among)
    if at not in _tuned:
        configs = [
            triton.Config({"BM": m, "BN": n}, num_warps=warps, num_stages=stages) for m, n, warps, stages in among
        ]
        flags = [name for name in _FLAGS if name in kernel.arg_names]
        _tuned[at] = triton.autotune(configs=configs, key=flags)(kernel)
    return _tuned[at]
