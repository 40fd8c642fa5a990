"""Processes that are forked where what takes longest to import is there already; all else of theirs begins anew."""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

_STREAMS = (0, 1, 2)
_LIFELINE = 63
"""A file descriptor that nothing else has."""


LARGE = (
    "torch", "torch._dynamo", "torch.distributed.tensor.parallel", "torch.distributed.fsdp",
    "torch.distributed.pipelining", "torch.export", "scipy.optimize", "scipy.stats", "pandas", "ipykernel.kernelapp",
    "tqdm.auto", "matplotlib.backends.backend_agg", "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama", "workbench.session", "workbench.models", "workbench.tasks",
    "workbench.mechanisms", "workbench.views",
)  # fmt: skip
"""What notebooks and parts of split models import, and what takes longest. Three ask at once where they run: tqdm finds
a kernel's modules there, Matplotlib the backend that kernels have, and ipywidgets, which finds no kernel, is told of it
later."""


@contextmanager
def forks(folder: Path, *modules: str) -> Iterator[list[str]]:
    """The command that runs a module in such a process, before the module's name and its arguments.

    Args:
        folder: where the processes are asked for. modules: what they have imported.
    """
    address = str(folder / "forks")
    command, pipe = [sys.executable, __file__, "serve", address, *modules], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as server:
        assert server.stdout is not None
        try:
            assert server.stdout.readline() == b"ready\n"
            yield [sys.executable, __file__, "run", address]
        finally:
            server.terminate()


def _end_with_the_tests() -> None:
    """End this process when the one that has begun them all is gone, and its end of the pipe with it."""

    def watch() -> None:
        os.read(_LIFELINE, 1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _serve(address: str, modules: Sequence[str]) -> None:
    os.dup2(0, _LIFELINE, inheritable=False)
    _end_with_the_tests()
    # Read when modules are imported: kernels are to watch nobody, and figures are to go into notebooks.
    os.environ |= {"JPY_PARENT_PID": "1", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    for name in modules:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what is shared stays shared
    signal.signal(signal.SIGCHLD, _reap)
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(address)
        door.listen()
        print("ready", flush=True)
        while True:
            asker, _ = door.accept()
            with asker:
                if os.fork() == 0:
                    _end_with_the_tests()
                    door.close()
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    return _answer(asker)


def _reap(*_: object) -> None:
    """Wait for those that have answered, so that their processor time counts as that of the tests."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass


def _answer(asker: socket.socket) -> None:
    """Run what is asked for in one more process, and say how it ended."""
    size, streams, _, _ = socket.recv_fds(asker, 4, len(_STREAMS))
    asked = json.loads(asker.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
    if child := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with suppress(BrokenPipeError):
            asker.sendall(code.to_bytes(2, "big", signed=True))
        return
    _end_with_the_tests()
    asker.close()
    for stream, number in zip(streams, _STREAMS, strict=True):
        os.dup2(stream, number)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.path[:1] = ["", *filter(None, asked["environment"].get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = asked["command"]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def _run(address: str, command: Sequence[str]) -> int:
    asked = {"folder": os.getcwd(), "environment": dict(os.environ), "command": list(command)}
    text = json.dumps(asked).encode()
    with socket.socket(socket.AF_UNIX) as door:
        door.connect(address)
        socket.send_fds(door, [len(text).to_bytes(4, "big")], _STREAMS)
        door.sendall(text)
        return int.from_bytes(door.recv(2, socket.MSG_WAITALL), "big", signed=True)


if __name__ == "__main__":
    what, where, *rest = sys.argv[1:]
    if what == "run":
        sys.exit(_run(where, rest))
    _serve(where, rest)
