"""Writes a store in processes that are killed one after the other: killed_writer.py FOLDER TIMES.

Prints a line for each: how many forwards it said were finished, and how many the store then holds.
"""

import os
import random
import signal
import sys
import tempfile
import time

import torch

import workbench


def model() -> torch.nn.Module:
    """A small one, the same each time."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 4, 16, batch_first=True)
    return torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def inputs(i: int) -> torch.Tensor:
    """Of the forward of that number; there are three shapes."""
    return torch.randn(2, 5 + i % 3, 16, generator=torch.Generator().manual_seed(i))


def write(path: str, start: int, told: int, most: int = 1_000_000) -> None:
    """Write forwards, and a byte when each is finished."""
    made = model()
    with workbench.attach(made) as wb, torch.no_grad(), wb.capture(("entropy", "received"), store=path):
        for i in range(start, start + most):
            made(inputs(i))
            os.write(told, b".")


def kill_once(path: str, start: int, delay: float) -> int:
    """Start a writer and kill it so long after its first forward; how many are finished."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        write(path, start, writing)
    os.close(writing)
    finished = len(os.read(reading, 1))
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while told := os.read(reading, 1 << 16):
        finished += len(told)
    os.close(reading)
    return start + finished


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:  # what is imported late is imported before the writers are made
        write(f"{scratch}/a.zarr", 0, os.open(os.devnull, os.O_WRONLY), most=1)
    draw, done = random.Random(0), 0
    for _ in range(int(sys.argv[2])):
        finished = kill_once(sys.argv[1], done, draw.uniform(0, 0.05))
        done = len(workbench.load_capture(sys.argv[1]).forwards)
        print(finished, done)
