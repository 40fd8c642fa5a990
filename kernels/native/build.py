"""Compile the C++ sources for this machine's own processor, once, and keep the library in the user's cache folder.

A wheel would have to settle for the oldest processor; compiling here takes about two seconds and needs no dependency
but a C++ compiler. Where there is none, plain torch does the work. What is loaded was checked before: see `cached.py`.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

from workbench.kernels.native import cached

SOURCES = ("vectors.hpp", "statistics.cpp", "blocks.cpp")
"""Files that are compiled one behind the other."""
_FLAGS = ("-O3", "-std=c++17", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread")
_log = logging.getLogger("workbench")


@cache
def library() -> ctypes.CDLL | None:
    """The compiled library; None where it cannot be built, which is logged once.

    The environment variable `WORKBENCH_NATIVE=0` switches it off.
    """
    if os.environ.get("WORKBENCH_NATIVE") == "0":
        _log.warning("WORKBENCH_NATIVE=0 switches the C++ kernels off; plain torch takes over, about twice as slow.")
        return None
    try:
        return cached.load(_compiled())
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        _log.warning(
            "the C++ kernels cannot be built here (%s); plain torch takes over, about twice as slow. "
            "Install g++ or clang++ to have them.",
            _reason(error),
        )
        return None


def _reason(error: Exception) -> str:
    """What went wrong, in characters that every terminal shows."""
    said = error.stderr if isinstance(error, subprocess.CalledProcessError) else None
    text = said.decode(errors="replace") if isinstance(said, bytes) else said or str(error)
    return text.strip()[-500:].encode("ascii", "backslashreplace").decode()


def _compiled() -> Path:
    """Path of the library, compiled if it is not in the cache yet, or is damaged there.

    Raises:
        OSError: no compiler, or no folder that is safe to load a library from.
        subprocess.SubprocessError: the compiler failed.
    """
    code, compiler = source(), _compiler()
    key = hashlib.sha256()
    for part in (code, *(os.fsencode(word) for word in (*_FLAGS, *compiler)), _processor()):
        key.update(part + b"\0")
    folder = _folder()
    name = f"statistics-{key.hexdigest()[:24]}"
    found = cached.find(folder, name)
    if found is not None:
        return found
    native = "-mcpu=native" if platform.machine().lower() in ("arm64", "aarch64") else "-march=native"
    with cached.building(folder) as work:
        compile_source(compiler, code, work / "statistics.so", native)
        return cached.keep(work / "statistics.so", folder, name)


def source() -> bytes:
    """What is compiled."""
    folder = files("workbench.kernels.native")
    return b"\n".join(folder.joinpath(name).read_bytes() for name in SOURCES)


def compile_source(compiler: Sequence[str], source: bytes, target: Path, processor: str) -> None:
    """Compile the source for a processor (such as "-march=native") to a library."""
    code = target.with_suffix(".cpp")
    code.write_bytes(source)
    command = [*compiler, *_FLAGS, processor, str(code), "-o", str(target)]
    subprocess.run(command, check=True, capture_output=True, timeout=1800)  # long enough for a loaded machine


def _compiler() -> list[str]:
    """The compiler and its arguments: `CXX`, as a path or as a shell would read it, or the first that is there.

    Raises:
        OSError: there is none.
    """
    wanted = os.environ.get("CXX", "").strip()
    if not wanted:
        for name in ("c++", "g++", "clang++"):
            if found := shutil.which(name):
                return [found]
        raise OSError("no C++ compiler was found")
    if found := shutil.which(wanted):  # a path with blanks in it
        return [found]
    try:
        words = shlex.split(wanted)
    except ValueError as error:
        raise OSError(f"CXX={wanted!r} cannot be read: {error}") from None
    if words and (found := shutil.which(words[0])):
        return [found, *words[1:]]
    raise OSError(f"CXX={wanted!r} is no compiler that can be run")


def _processor() -> bytes:
    """What tells processors apart, since a home folder may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
        return b"".join(sorted({line for line in lines if line.startswith((b"model name", b"flags", b"Features"))}))
    except OSError:
        if sys.platform == "darwin":
            brand = ("sysctl", "-n", "machdep.cpu.brand_string")
            return subprocess.run(brand, check=True, capture_output=True, timeout=30).stdout
        return platform.platform().encode() + platform.processor().encode()


def _folder() -> Path:
    """The cache folder, made for its user alone."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "attention-workbench"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    cached.check_owner(folder, folder.stat())
    return folder
