"""Compile `statistics.cpp` for this machine's own processor, once, and keep the library in the user's cache folder.

A wheel would have to settle for the oldest processor; compiling here takes about two seconds and needs no dependency
but a C++ compiler. Where there is none, plain torch does the work.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from functools import cache
from importlib.resources import files
from pathlib import Path

_FLAGS = ("-O3", "-std=c++17", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread")
_log = logging.getLogger("workbench")


@cache
def library() -> ctypes.CDLL | None:
    """The compiled library; None where it cannot be had, which is logged once.

    The environment variable `WORKBENCH_NATIVE=0` switches it off.
    """
    if os.environ.get("WORKBENCH_NATIVE") == "0":
        _log.warning("WORKBENCH_NATIVE=0 switches the C++ statistics off; plain torch takes over, about twice as slow.")
        return None
    try:
        return ctypes.CDLL(str(_compiled()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: there is no home folder
        reason = error.stderr.strip()[-500:] if isinstance(error, subprocess.CalledProcessError) else error
        _log.warning(
            "the C++ statistics cannot be built here (%s); plain torch takes over, about twice as slow. "
            "Install g++ or clang++ to have them.",
            reason,
        )
        return None


def _compiled() -> Path:
    """Path of the library, compiled if it is not in the cache yet.

    Raises:
        OSError: no compiler, or no folder that is safe to load a library from.
        subprocess.SubprocessError: the compiler failed.
    """
    source = files("workbench.kernels.native").joinpath("statistics.cpp").read_bytes()
    compiler = _compiler()
    key = hashlib.sha256()
    for part in (source, " ".join(_FLAGS).encode(), compiler.encode(), _processor()):
        key.update(part + b"\0")
    folder = _folder()
    target = folder / f"statistics-{key.hexdigest()[:24]}.so"
    if not target.exists():
        native = "-mcpu=native" if platform.machine().lower() in ("arm64", "aarch64") else "-march=native"
        compile_source(compiler, source, target, native)
    _check_owner(target)
    return target


def compile_source(compiler: str, source: bytes, target: Path, processor: str) -> None:
    """Compile the source for a processor (such as "-march=native") to a library that appears when it is complete."""
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        code, made = Path(work) / "statistics.cpp", Path(work) / "statistics.so"
        code.write_bytes(source)
        command = [compiler, *_FLAGS, processor, str(code), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        os.replace(made, target)  # in one step: other processes see all of it or nothing


def _compiler() -> str:
    wanted = os.environ.get("CXX")
    for name in (wanted.split()[0],) if wanted else ("c++", "g++", "clang++"):
        found = shutil.which(name)
        if found:
            return found
    raise OSError("no C++ compiler was found")


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
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "attention-workbench"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _check_owner(folder)
    return folder


def _check_owner(path: Path) -> None:
    """Code is loaded only from files that nobody else can have written."""
    if not hasattr(os, "getuid"):
        return
    found = path.stat()
    if found.st_uid not in (os.getuid(), 0) or found.st_mode & stat.S_IWOTH:
        raise OSError(f"{path} belongs to somebody else or can be written by everybody")
