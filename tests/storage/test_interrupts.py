"""Ctrl-C while a file is read is Ctrl-C, wherever it strikes: no reader takes it for damage."""

import sys
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from workbench.storage import files


def test_an_interrupt_at_any_call_of_a_read_stays_one(tmp_path: Path) -> None:
    path = files.write(tmp_path / "a.safetensors", "a.form", {"a": [1, "b"]}, {"x": torch.ones(2, 3)})
    before = sys.getprofile()
    for strike in count():
        left = strike

        def interrupt(frame: FrameType, event: str, argument: Any) -> None:
            nonlocal left
            if event == "call":
                left -= 1
                if left == -1:
                    raise KeyboardInterrupt

        try:
            sys.setprofile(interrupt)
            try:
                files.read(path, "a.form")
            finally:
                sys.setprofile(before)
        except KeyboardInterrupt:
            continue
        break
    assert strike > 50
    assert left >= 0


def test_tensors_that_are_read_have_storages_of_their_own(tmp_path: Path) -> None:
    held = {"a": torch.arange(5.0), "b": torch.ones(3, dtype=torch.bool), "c": torch.zeros(0, 4), "d": torch.tensor(2)}
    held["__metadata__"] = torch.ones(1)  # what safetensors call something else
    _, read = files.read(files.write(tmp_path / "a.safetensors", "a.form", {}, held), "a.form")
    for name, tensor in held.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
        assert read[name].untyped_storage().nbytes() == tensor.nbytes


def test_a_file_of_another_writer_is_read_wherever_its_numbers_lie(tmp_path: Path) -> None:
    path = files.write(tmp_path / "a.safetensors", "a.form", {}, {"x": torch.arange(3.0)})
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    path.write_bytes((length + 1).to_bytes(8, "little") + raw[8 : 8 + length] + b" " + raw[8 + length :])
    _, read = files.read(path, "a.form")
    assert read["x"].tolist() == [0, 1, 2]
    assert read["x"].data_ptr() % 4 == 0
