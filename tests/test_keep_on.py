"""Where queries and keys are kept: on the model's device, or in the host's memory, with a stand-in for the device."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import workbench
from support.tiny import family, make
from workbench import Capture, CaptureError
from workbench.session import call_recorder, keeping
from workbench.session.keeping import Landing

PADDED, GATED = family("llama-left-padded"), family("gpt2")
NAMES = ("entropy", "received", "induction")


class Device:
    """Copies to the host as a device does: they are begun at once, and there once they have been waited for."""

    def __init__(self) -> None:
        self.under_way: list[tuple[Tensor, Tensor]] = []
        self.n_copies = self.n_waits = 0

    def send(self, tensor: Tensor, host: Tensor) -> None:
        host.fill_(torch.nan if host.is_floating_point() else 0)
        self.under_way.append((tensor.clone(), host))
        self.n_copies += 1

    def wait(self, landing: Landing) -> None:
        self.n_waits += 1
        landing._masks.clear()
        for tensor, host in self.under_way:
            host.copy_(tensor)
        self.under_way.clear()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    found = Device()
    monkeypatch.setattr(call_recorder, "is_away", lambda device: True)
    monkeypatch.setattr(keeping, "_send", found.send)
    monkeypatch.setattr(Landing, "wait", lambda landing: found.wait(landing))
    yield found
    assert not found.under_way


def capture(model: nn.Module, *several: dict[str, Any], **how: Any) -> Capture:
    with workbench.attach(model) as wb, torch.no_grad(), wb.capture(NAMES, **how) as found:
        for inputs in several:
            model(**inputs)
            if how.get("keep_on") == "host":
                with pytest.raises(CaptureError, match="was not kept"):
                    _ = found.calls[-1][0].pattern  # it is there at the end
    return found


def assert_same(got: Capture, want: Capture) -> None:
    for a, b in zip(got.calls, want.calls, strict=True):
        for one, other in zip(a, b, strict=True):
            found = {**one.statistics, "pattern": one.pattern.dense()}
            wanted = {**other.statistics, "pattern": other.pattern.dense()}
            torch.testing.assert_close(found, wanted, atol=0, rtol=0, equal_nan=True)


def test_queries_and_keys_go_to_the_host_while_the_model_goes_on(device: Device) -> None:
    model, inputs = make(PADDED), PADDED.inputs()
    want = capture(model, inputs, inputs)
    got = capture(model, inputs, inputs, keep_on="host")
    assert device.n_waits == 1
    assert device.n_copies == 2 * (2 * 3 + 1)  # of two layers queries, keys and lse, and the mask that they share
    assert_same(got, want)
    for call in got.calls:
        first, second = (site.pattern.mask.tensor for site in call)
        assert first is second


def test_values_and_a_store(device: Device, tmp_path: Path) -> None:
    model, inputs = make(GATED), GATED.inputs()
    want = capture(model, inputs, inputs, values=True)
    with workbench.attach(model) as wb, torch.no_grad():
        with wb.capture(NAMES, values=True, keep_on="host", store=tmp_path / "kept.zarr") as got:
            model(**inputs)
            model(**inputs)
        assert device.n_waits == 2  # what is written has to be there
        names = ["value_weighted_entropy"]
        for a, b in zip(got.calls, want.calls, strict=True):
            for one, other in zip(a, b, strict=True):
                found = one.pattern.statistics(names), other.pattern.statistics(names)
                assert torch.equal(found[0][names[0]], found[1][names[0]])


def test_what_is_on_the_cpu_stays_there() -> None:
    model, inputs = make(GATED), GATED.inputs()
    with workbench.attach(model) as wb, torch.no_grad(), wb.capture(NAMES, keep_on="host") as got:
        model(**inputs)
        assert got[0].pattern.shape[1] == 4
    with workbench.attach(model) as wb, pytest.raises(CaptureError, match='keep_on is "device" or "host"'):
        wb.capture(keep_on="disk").__enter__()  # type: ignore[arg-type]


def test_a_7b_at_8k_tokens_is_estimated_beforehand() -> None:
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval().to(torch.bfloat16)
    with workbench.attach(model) as wb:
        whole, there = wb.estimate(1, 8192), wb.estimate(1, 8192, keep_on="host", where="device")
        assert wb.estimate(1, 8192, keep_on="host") == whole == wb.estimate(1, 8192, where="device")
    rows = 32 * 32 * 8192  # layers, heads, positions
    assert there == rows * 2 * 4  # entropy and received: 64 MiB
    assert whole == there + rows * (2 * 128 * 2 + 4)  # queries and keys of 128 in bfloat16, and denominators: 4 GiB


def test_what_is_kept_on_a_device_is_what_was_estimated(device: Device) -> None:
    model, inputs = make(GATED), GATED.inputs()
    batch, length = inputs["input_ids"].shape
    with workbench.attach(model) as wb, torch.no_grad():
        planned = wb.estimate(batch, length, statistics=NAMES, keep_on="host", where="device")
        with wb.capture(NAMES, keep_on="host") as got:
            model(**inputs)
            assert sum(site.nbytes for site in got) == planned
        assert got.nbytes == wb.estimate(batch, length, statistics=NAMES)
