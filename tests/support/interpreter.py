"""Triton's interpreter in less time: what it would make anew at every step of a kernel is kept.

A kernel calls its functions thousands of times, and each time the interpreter looks through all of `triton.language`
for what it has replaced already; that took a third of the time. Another third is types: each number and each block of
them makes one, and whatever it is asked of is found out again. Of what was left, a third went into sums of integers
that are done again in 64 bits for an assertion, which only kernels that are debugged make.

`python -m support.interpreter SCRIPT ARGUMENTS` runs a script so.
"""

from __future__ import annotations

import os
import runpy
import sys
from typing import Any


def patch_once() -> None:
    """For this process, in which kernels are interpreted: TRITON_INTERPRET=1."""
    from triton import language
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, {}

    def once(function: Any) -> Any:
        """What undoes it: of the kernel's own patches, when the launch ends."""
        seen = function.__globals__.values()
        of = tuple(module in seen for module in (language, language.core))
        if of in patched:
            return patched[of]
        is_kernel = not patched
        scope = patched[of] = patch(function)
        if is_kernel:
            restore = scope.restore

            def restored() -> None:
                patched.clear()
                restore()

            scope.restore = restored
        return scope

    interpreter._patch_lang = once
    _keep_types()
    _leave_out_what_is_not_used()


def _leave_out_what_is_not_used() -> None:
    """Checks of integers whose assertion is not made, and the shape that two blocks of one shape have."""
    from triton.language.semantic import TritonSemantic

    check, broadcast = TritonSemantic.binary_op_sanitize_overflow_impl, TritonSemantic.broadcast_impl_value

    def checked(self: Any, lhs: Any, rhs: Any, operation: Any) -> None:
        if self.builder.options.debug:
            check(self, lhs, rhs, operation)

    def broadcasted(self: Any, lhs: Any, rhs: Any) -> Any:
        one, two = lhs.type, rhs.type
        same = one.shape is two.shape if one.is_block() and two.is_block() else not (one.is_block() or two.is_block())
        return (lhs, rhs) if same else broadcast(self, lhs, rhs)

    TritonSemantic.binary_op_sanitize_overflow_impl, TritonSemantic.broadcast_impl_value = checked, broadcasted


def _keep_types() -> None:
    """What follows from a type's name or shape is found out once."""
    from triton.language import core
    from triton.runtime import interpreter

    of_numpy, of_block, of_tensor = interpreter._get_np_dtype, core.block_type.__init__, core.tensor.__init__
    dtypes: dict[str, Any] = {}
    blocks: dict[tuple[Any, ...], tuple[Any, dict[str, Any]]] = {}
    shapes: dict[tuple[Any, ...], Any] = {}
    sizes: dict[int, tuple[Any, Any]] = {}  # by the shape's identity, as those in `blocks` stay; 0: of single numbers

    def dtype(of: Any) -> Any:
        if of.name not in dtypes:
            dtypes[of.name] = of_numpy(of)
        return dtypes[of.name]

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        key = id(element_ty), *(n.value if isinstance(n, core.constexpr) else n for n in shape)
        if key not in blocks:
            of_block(self, element_ty, shape)
            self.shape = shapes.setdefault(key[1:], self.shape)
            blocks[key] = element_ty, dict(vars(self))
            made = object.__new__(core.tensor)
            of_tensor(made, None, self)
            sizes[id(self.shape)] = made.numel, made.shape
        vars(self).update(blocks[key][1])

    def tensor(self: Any, handle: Any, type: Any) -> None:
        size = id(type.shape) if type.is_block() else 0
        if size in sizes:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.numel, self.shape = sizes[size]
        else:
            of_tensor(self, handle, type)
            if not size:
                sizes[0] = self.numel, self.shape

    interpreter._get_np_dtype, core.block_type.__init__, core.tensor.__init__ = dtype, block, tensor


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    patch_once()
    sys.argv = sys.argv[1:]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
