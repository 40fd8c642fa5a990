"""Triton's interpreter in less time: its language is patched once for a launch, not at every call of a function in it.

A kernel calls its functions thousands of times, and each time the interpreter looks through all of `triton.language`
for what it has replaced already; that took a third of the time.
"""

from __future__ import annotations

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
