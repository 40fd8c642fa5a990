"""The pool of threads that the C++ library works in."""

from __future__ import annotations

import ctypes
from functools import cache


@cache
def gomp_parallel() -> ctypes.c_void_p:
    """The pool of threads that torch uses, null if it is not libgomp's; a second pool would fight it for the cores."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p)
    except (OSError, AttributeError):
        return ctypes.c_void_p(None)
