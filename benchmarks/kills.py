"""Kills a worker of Ray, the driver, or one of two processes of a split model, in the midst of each kind of work.

    python benchmarks/kills.py [KEPT] [--times 20] [--only rank driver worker] [--address …]

Each time somewhere else. What is found in spite of it, or gone on with after it, must be what an undisturbed run gives,
to the bit; the other process of a split model must end with an error within a minute. KEPT is a file that gets a line
for each time; those that it has are not done again, so that a run may be broken off. What it has goes into
docs/benchmarks.md. Processes are forked, since most of the time they would import.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")  # a busy machine starts slowly

import ray  # noqa: F401  # here, so that forked processes need not import it
import torch
import torch.distributed as dist
from ray.cluster_utils import Cluster
from shared.measuring import say, table, write_section

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the work is that of the tests

from shared.killed import DIED, RANKS, RESUMED, save_always

import workbench
from support.work import WITH_FILES, WORK, Ends, same
from workbench import RayWorkers

HEADING = "Killed in the midst of work"
PATIENCE, STUCK = 60.0, 600.0
NAMED, TOLD = 10, 11
Killed = dict[str, Any]


def forked(work: Callable[..., int], *given: Any) -> int:
    """A process that does the work and ends with what it gives."""
    pid = os.fork()
    if pid:
        return pid
    try:
        code = work(*given)
    except BaseException:
        traceback.print_exc()
        code = 3
    os._exit(code)


def ended(*pids: int) -> list[int]:
    """How processes ended; those that are stuck are killed."""
    codes, until = {}, time.monotonic() + STUCK
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    codes[pid] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > until:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[pid] for pid in pids]


def prepared() -> tuple[Any, Any]:
    model, tokenizer = workbench.models.load("demo-lm")
    return workbench.attach(model, tokenizer), workbench.tasks.ioi(6, seed=0)


# Workers


def workers_killed(work: dict[str, range], address: str | None) -> Iterator[Killed]:
    """A worker ends at its first, second … forward of each kind of work; the work goes on without it."""
    wb, task = prepared()
    with RayWorkers(2, address=address) as workers, tempfile.TemporaryDirectory() as folder:
        for name, left in work.items():
            want = WORK[name](wb, task, progress=False)
            for turn in left:
                at = 1 if name == "corpus" else 1 + turn % 4  # of two windows, a worker may see but one
                before, ends = workers.lost, Ends(Path(folder, f"{name} {turn}"), at)
                hook = wb.model.transformer.ln_f.register_forward_hook(ends)
                try:
                    same(want, WORK[name](wb, task, engine=workers, progress=False))
                finally:
                    hook.remove()
                yield {"work": name, "killed": workers.lost - before, "same": 1}


# Drivers


def driver(wb: Any, task: Any, name: str, path: str, at: int | None, address: str) -> int:
    """Work on a cluster that keeps everything it does; it ends in the midst of a save, or behind it."""
    from workbench.storage.result import Result

    save_always()
    kept, save = 0, Result.save

    def counted(self: Result, to: Any) -> Path:
        nonlocal kept
        kept += 1
        if at is not None and kept == 1 + at // 2 and at % 2 == 0:
            os._exit(DIED)
        found = save(self, to)
        if at is not None and kept == 1 + at // 2:
            os._exit(DIED)
        return found

    Result.save = counted  # type: ignore[method-assign]
    with RayWorkers(1, address=address) as workers:
        WORK[name](wb, task, engine=workers, resume=path, progress=False)
    Path(f"{path}.saves").write_text(str(kept))
    return 0


@contextmanager
def cluster_of_its_own() -> Iterator[str]:
    """The address of a cluster that another process holds: one that has spoken to a cluster cannot be forked safely."""

    def hold(told: Path) -> int:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
        signal.signal(signal.SIGTERM, lambda *_: (cluster.shutdown(), os._exit(0)))
        told.with_suffix(".part").write_text(cluster.address)
        told.with_suffix(".part").rename(told)
        while True:
            signal.pause()

    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder, "address")
        pid = forked(hold, told)
        try:
            while not told.exists():
                if os.waitpid(pid, os.WNOHANG)[0]:
                    raise SystemExit("the cluster did not start")
                time.sleep(0.1)
            yield told.read_text()
        finally:
            os.kill(pid, signal.SIGTERM)
            ended(pid)


def drivers_killed(work: dict[str, range], address: str | None) -> Iterator[Killed]:
    """The process that an analysis runs in ends; another goes on with its file, without the cluster."""
    wb, task = prepared()
    with nullcontext(address) if address else cluster_of_its_own() as address:
        for name, left in work.items():
            want, saves = WORK[name](wb, task, progress=False), 0
            for turn in (None, *left):  # the first is left alone, and tells how often it saves
                with tempfile.TemporaryDirectory() as folder:
                    path, at = f"{folder}/kept.safetensors", None if turn is None else turn % (2 * saves)
                    [code] = ended(forked(driver, wb, task, name, path, at, address))
                    if turn is None:
                        saves = int(Path(f"{path}.saves").read_text())
                        continue
                    same(want, WORK[name](wb, task, resume=path, progress=False))
                yield {"work": name, "killed": int(code == DIED), "same": 1}


# Processes of a split model


def one_of_two(kind: str, rank: int, folder: Path, at: int | None) -> int:
    """A process of a split model; how it ended."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what torch says of lost connections
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group(
        "gloo", f"file://{folder}/meet {at}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=STUCK)
    )
    began = time.monotonic()
    try:
        RANKS[kind](rank, folder, at)
    except Exception as error:
        if at is None or time.monotonic() - began > PATIENCE:
            (folder / f"{rank}.error").write_text(traceback.format_exc())
            return 3
        return NAMED if "process 1 of the group" in str(error) else TOLD
    return 0


def two(kind: str, folder: Path, at: int | None) -> list[int]:
    return ended(*(forked(one_of_two, kind, rank, folder, at) for rank in (0, 1)))


def succeeded(kind: str, codes: list[int], folder: str) -> None:
    if codes != [0, 0]:
        raise SystemExit(f"{kind}: {codes}\n" + "\n".join(p.read_text() for p in Path(folder).glob("*.error")))


def ranks_killed(work: dict[str, range], address: str | None) -> Iterator[Killed]:
    """One of two processes ends; the other says so, and both go on from their files."""
    for kind, left in work.items():
        with tempfile.TemporaryDirectory() as whole:
            codes = two(kind, Path(whole), None)
            succeeded(kind, codes, whole)
            for turn in left:
                found: Killed = {"work": kind, "killed": 1}
                with tempfile.TemporaryDirectory() as folder:
                    told, killed = two(kind, Path(folder), turn)
                    if killed != DIED or told not in (NAMED, TOLD):
                        raise SystemExit(f"{kind}, {turn}: the processes ended with {told} and {killed}")
                    found["named"] = int(told == NAMED)
                    if kind in RESUMED:
                        succeeded(kind, two(kind, Path(folder), None), folder)
                        for rank in ("0.safetensors", "1.safetensors"):
                            same(*(workbench.Sweep.load(Path(each) / rank) for each in (whole, folder)))
                        found["same"] = 1
                yield found


# What is written

WHO = {
    "rank": (ranks_killed, list(RANKS)), "driver": (drivers_killed, list(WITH_FILES)),
    "worker": (workers_killed, list(WORK)),
}  # fmt: skip


def report(kept: list[Killed]) -> None:
    """The section of docs/benchmarks.md."""
    rows = []
    for who, (_, kinds) in WHO.items():
        for kind in kinds:
            mine = [one for one in kept if (one["who"], one["work"]) == (who, kind)]
            if not mine:
                continue
            counts = [sum(one[what] for one in mine) if what in mine[0] else None
                      for what in ("killed", "same", "named")]  # fmt: skip
            rows.append([f"{who}, {kind}", str(len(mine)), *("–" if n is None else str(n) for n in counts)])
    note = (
        "At different places: a worker of Ray in a forward; the driver, before what it keeps is "
        "written or behind it; one of two processes of a split model (gloo), at an exchange or in a forward. Same: "
        "what was found in spite of it, or gone on with from the files, is what an undisturbed run gives, to the bit. "
        "Named: the other process ended within a minute with an error that names the lost one.\n\n"
    )
    write_section(HEADING, note + table(["killed, in", "times", "killed", "same", "named"], rows))


def main() -> None:
    """Kill."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kept", type=Path, nargs="?", default=Path(__file__).parents[1] / ".cache" / "kills.jsonl")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=list(WHO), default=list(WHO))
    parser.add_argument("--address", help="of a cluster that runs already, for drivers and workers")
    asked = parser.parse_args()
    asked.kept.parent.mkdir(exist_ok=True)
    torch.set_num_threads(1)

    def kept() -> list[Killed]:
        lines = asked.kept.read_text().splitlines() if asked.kept.exists() else []
        return [json.loads(line) for line in lines]

    for who in asked.only:
        kill, kinds = WHO[who]
        done = Counter(one["work"] for one in kept() if one["who"] == who)
        left = {kind: range(done[kind], asked.times) for kind in kinds if done[kind] < asked.times}
        for found in kill(left, asked.address) if left else ():
            say(f"{who}, {found}")
            with asked.kept.open("a") as file:
                file.write(json.dumps({"who": who, **found}) + "\n")
    report(kept())


if __name__ == "__main__":
    main()
