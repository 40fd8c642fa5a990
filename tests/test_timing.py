"""Times of a capture: in order, in saved files, and not asked of files that have none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import workbench
from workbench.capture.timing import CallTimes
from workbench.storage import files, typed
from workbench.storage.parts import parse


class _Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.MultiheadAttention(16, 4, batch_first=True) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x, x, x, need_weights=False)[0]
        return x


def _model() -> nn.Module:
    torch.manual_seed(0)
    return _Layers().eval()


def _capture(forwards: int = 2) -> workbench.Capture:
    model = _model()
    with workbench.attach(model) as wb, torch.inference_mode(), wb.capture() as cap:
        for _ in range(forwards):
            model(torch.randn(1, 5, 16))
    return cap


def test_calls_lie_within_their_forward_one_after_the_other() -> None:
    at = 0.0
    for forward in _capture().forwards:
        assert forward.span is not None
        assert at <= forward.span[0]
        at = forward.span[0]
        for site in forward.sites.values():
            times = site.times
            assert times is not None
            assert times.entered is not None
            assert at <= times.entered <= times.seen
            assert times.took >= 0
            assert times.nbytes == site.nbytes > 0
            at = times.seen + times.took
        assert at <= forward.span[1]


def test_times_are_kept_in_files(tmp_path: Path) -> None:
    cap = _capture()
    loaded = workbench.load_capture(cap.save(tmp_path / "run.safetensors"))
    for before, after in zip(cap.forwards, loaded.forwards, strict=True):
        assert after.span == before.span
        assert [c.times for c in after.sites.values()] == [c.times for c in before.sites.values()]


def test_a_file_without_times_is_read(tmp_path: Path) -> None:
    cap = _capture(1)
    (forward,) = cap.forwards
    forward.span = None
    forward.sites.update({name: replace(site, times=None) for name, site in forward.sites.items()})
    path = cap.save(tmp_path / "old.safetensors")
    header = files.read(path, "workbench.capture")[0].value
    assert "span" not in header["forwards"][0]
    assert "times" not in header["forwards"][0]["sites"][0]
    loaded = workbench.load_capture(path)
    assert loaded.forwards[0].span is None
    assert all(site.times is None for site in loaded)


def test_what_is_joined_has_no_times() -> None:
    assert all(site.times is None for site in _capture().pool())


def test_times_go_through_json() -> None:
    times = CallTimes(None, 1.5, 0.25, 100)
    assert typed.record(parse(json.dumps(times.to_json()), "times"), CallTimes) == times
