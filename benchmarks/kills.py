"""Kills a worker of Ray, the driver, or one of two processes of a split model, in the midst of each kind of work.

    python benchmarks/kills.py [--times 20] [--only worker driver rank]

Each time somewhere else. What is found in spite of it, or gone on with after it, must be what an undisturbed run gives,
to the bit; the other process of a split model must end with an error that names the one that was killed, in a minute.
Writes nothing; the cheapest of these stand in the tests.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the work is that of the tests

import workbench
from support.split_model_ranks import LENGTHS, llama, split_run
from support.work import WITH_FILES, WORK, Ends, same
from workbench import RayWorkers
from workbench.errors import CaptureError
from workbench.kernels.sequence_parallel import SplitSequence

PATIENCE = 60.0


def prepared() -> tuple[Any, Any]:
    model, tokenizer = workbench.models.load("demo-lm")
    return workbench.attach(model, tokenizer), workbench.tasks.ioi(6, seed=0)


def workers_killed(times: int) -> None:
    """A worker ends at its first, second … forward of each kind of work."""
    wb, task = prepared()
    with RayWorkers(2) as workers, tempfile.TemporaryDirectory() as folder:
        for name, work in WORK.items():
            want, before = work(wb, task, progress=False), workers.lost
            for turn in range(times):
                flag = Path(folder) / f"{name} {turn}"
                hook = wb.model.transformer.ln_f.register_forward_hook(Ends(flag, 1 + turn % 6))
                try:
                    same(want, work(wb, task, engine=workers, progress=False))
                finally:
                    hook.remove()
            print(f"worker, {name}: {workers.lost - before} of {times} killed, results the same", flush=True)


def driver(name: str, path: str, saves: int, engine: str) -> None:
    """Work that keeps everything it does, and ends without a word when it has kept so much."""
    from workbench.analysis.circuits.patching import running
    from workbench.analysis.corpus import run as corpus
    from workbench.analysis.saliency import estimate
    from workbench.storage.result import Result
    from workbench.sweep import run

    running._SAVE_EVERY = run._SAVE_EVERY = estimate._SAVE_EVERY = corpus._SAVED_EVERY = 0.0
    kept, save = 0, Result.save

    def counted(self: Result, to: Any) -> Path:
        nonlocal kept
        found, kept = save(self, to), kept + 1
        if kept == saves:
            os._exit(9)
        return found

    Result.save = counted  # type: ignore[method-assign]
    wb, task = prepared()
    WORK[name](wb, task, engine=engine, resume=path, progress=False)


def drivers_killed(times: int, engine: str) -> None:
    """The process that the analysis runs in ends; another goes on with its file."""
    wb, task = prepared()
    for name in WITH_FILES:
        want = WORK[name](wb, task, progress=False)
        killed = 0
        for turn in range(times):
            with tempfile.TemporaryDirectory() as folder:
                path = str(Path(folder) / "kept.safetensors")
                command = [sys.executable, "-W", "ignore", __file__, "--driver", name, path, str(1 + turn % 5), engine]
                killed += subprocess.run(command, capture_output=True).returncode == 9
                same(want, WORK[name](wb, task, resume=path, progress=False))
        print(f"driver on {engine}, {name}: {killed} of {times} killed, results the same", flush=True)


def one_of_two(rank: int, folder: str, kind: str, at: int) -> None:
    """A process of a split model; the second ends at some exchange."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=600)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2, timeout=wait)
    split, model, left = SplitSequence.of(LENGTHS[rank]), llama(), at
    begin = SplitSequence._begun

    def counted(self: SplitSequence, send: Any) -> Any:
        nonlocal left
        left -= 1
        if rank == 1 and left < 0:
            os._exit(9)
        return begin(self, send)

    SplitSequence._begun = counted  # type: ignore[method-assign]
    began = time.monotonic()
    try:
        with torch.no_grad(), workbench.attach(model) as wb:
            while True:
                if kind == "ablations":
                    with wb.ablate((0, 1)):
                        split_run(model, split)
                    continue
                with wb.capture(["entropy", "received"]) as cap:
                    split_run(model, split)
                cap.gathered(split=split)
    except CaptureError as error:
        named = "process 1 of the group" in str(error) and time.monotonic() - began < PATIENCE
        os._exit(0 if named else 3)


def ranks_killed(times: int) -> None:
    """One of two processes ends; the other says so, and which."""
    for kind in ("captures", "ablations"):
        for turn in range(times):
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-W", "ignore", __file__, "--one-of-two"]
                ranks = [subprocess.Popen([*command, str(r), folder, kind, str(turn)], stderr=subprocess.DEVNULL)
                         for r in (0, 1)]  # fmt: skip
                told, killed = (rank.wait(timeout=600) for rank in ranks)
                if (told, killed) != (0, 9):
                    raise SystemExit(f"{kind}, exchange {turn}: the other process ended with {told}")
        print(f"rank, {kind}: {times} of {times} killed, the other told which", flush=True)


def main() -> None:
    """Kill."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=("worker", "driver", "rank"), default=["worker", "driver", "rank"])
    parser.add_argument("--engine", default="ray", help="of drivers")
    parser.add_argument("--driver", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--one-of-two", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.driver:
        name, path, saves, engine = asked.driver
        return driver(name, path, int(saves), engine)
    if asked.one_of_two:
        rank, folder, kind, at = asked.one_of_two
        return one_of_two(int(rank), folder, kind, int(at))
    if "worker" in asked.only:
        workers_killed(asked.times)
    if "driver" in asked.only:
        drivers_killed(asked.times, asked.engine)
    if "rank" in asked.only:
        ranks_killed(asked.times)


if __name__ == "__main__":
    main()
