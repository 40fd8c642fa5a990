"""What a capture cannot record is listed; in a thread that did not open it, it never breaks the forward."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import workbench
from workbench import CaptureError, InterventionError
from workbench.hooks.paged import PagedKeys
from workbench.hooks.tap import Unshown
from workbench.kernels import streaming


class Averaging(nn.Module):
    """Each position becomes the mean of all."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1, keepdim=True).expand_as(x)


@workbench.reader(Averaging, kind="self")
def _broken(run: Any) -> Any:
    """A reader with a fault of its own."""
    return run.inputs["x"] / (0 // 0)


class Attention(nn.Module):
    num_heads = 2

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        z = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(z.transpose(1, 2).flatten(2))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Attention(), Averaging(), Attention()).eval()


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


def _in_thread(run: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    """What a function gives, or raises, in a thread of its own."""
    found: list[Any] = [None, None]

    def work() -> None:
        try:
            with torch.no_grad():  # which is each thread's own
                found[0] = run()
        except BaseException as error:
            found[1] = error

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[0], found[1]


@torch.no_grad()
def test_a_fault_of_ours_is_raised_at_home_and_listed_elsewhere(model: nn.Module, tmp_path: Path) -> None:
    bare = _in_thread(lambda: model(X))[0]
    with workbench.attach(model) as wb:
        with pytest.raises(ZeroDivisionError), wb.capture():
            model(X)
        with pytest.warns(UserWarning, match="1 calls of 1 sites were not recorded"), wb.capture() as cap:
            output, error = _in_thread(lambda: model(X))
    assert error is None
    assert torch.equal(output, bare)
    assert cap.ledger["1"] == "0 recorded, 1 call not recorded: ZeroDivisionError: integer division or modulo by zero"
    assert cap.ledger["0"] == cap.ledger["2"] == 1
    assert "1 call not recorded" in repr(cap)
    again = workbench.load_capture(cap.save(tmp_path / "cap.safetensors"))
    assert again.unrecorded == cap.unrecorded
    assert again.ledger == cap.ledger
    page = workbench.Report("Limits").add(again).write(tmp_path / "page.html").read_text()
    assert "1: 1 call not recorded: ZeroDivisionError" in page


@torch.no_grad()
@pytest.mark.parametrize("error", [None, torch.OutOfMemoryError("CUDA out of memory.\nOf 1 GiB"), MemoryError()])
def test_memory_that_runs_out_in_a_statistic(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    model = nn.Sequential(model[0], model[2])
    bare, statistics = model(X), streaming.statistics

    def short(pattern: Any, *given: Any) -> Any:
        short.calls += 1  # type: ignore[attr-defined]
        if short.calls == 2:  # type: ignore[attr-defined]
            if error is not None:
                raise error
            torch.empty(1 << 60, dtype=torch.uint8)  # what the host's allocator says of that
        return statistics(pattern, *given)

    short.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(streaming, "statistics", short)
    with workbench.attach(model) as wb:
        with pytest.warns(UserWarning, match="1 calls of 1 sites"), wb.capture(z=True) as cap:
            assert torch.equal(model(X), bare)
        assert cap.ledger["0"] == 1
        assert "out of memory in its statistics" in str(cap.ledger["1"])
        short.calls = 1  # type: ignore[attr-defined]
        with pytest.raises(CaptureError, match="out of memory"), wb.capture(sites="0"):
            assert torch.equal(model(X), bare)


@torch.no_grad()
def test_what_was_asked_for_by_name_must_be_recorded(model: nn.Module) -> None:
    with workbench.attach(model) as wb:
        nothing = pytest.raises(CaptureError, match="nothing could be recorded: ZeroDivisionError")
        with nothing as caught, wb.capture(sites="1"):
            assert _in_thread(lambda: model(X))[1] is None
        assert caught.value.site == "1"
        with wb.capture(sites=["0", "2"]) as cap:  # nobody asked for the other
            model(X)
        assert not cap.unrecorded


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_in_another_thread_go_on(model: nn.Module) -> None:
    model = nn.Sequential(model[0])

    def run() -> Tensor:
        return torch.func.vmap(lambda x: model(x[None])[0])(X)

    bare = _in_thread(run)[0]
    with workbench.attach(model) as wb:
        nothing = pytest.raises(CaptureError, match="nothing could be recorded: the model runs inside a transform")
        with nothing, wb.capture():
            output, error = _in_thread(run)
        assert error is None
        assert torch.equal(output, bare)
        with pytest.raises(CaptureError, match="inside a transform"), wb.capture():
            run()


def test_an_edit_that_fails_is_raised_in_every_thread(model: nn.Module) -> None:
    """A request that should have been edited is not served unedited."""
    model = nn.Sequential(model[0])
    with workbench.attach(model) as wb, wb.capture():
        model(X)
        with pytest.raises(InterventionError, match="never fired"), wb.patch({(0, 0): torch.zeros(7)}):
            error = _in_thread(lambda: model(X))[1]
    assert isinstance(error, InterventionError)


def test_pages_that_a_kernel_reads_by_itself_are_not_shown() -> None:
    class Cache:
        layer = 3

        def update(self, keys: Tensor, values: Tensor, layer_idx: int, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
            kwargs["cu_seq_lens_k"] = torch.tensor([0, 4, 9])
            return keys, values

    cache, keys = Cache(), torch.randn(1, 2, 9, 4)
    given = {"cache": cache, "cu_seq_lens_q": torch.tensor([0, 1, 2]), "read_index": []}
    for table, shown in ((None, True), (torch.zeros(2, 2), False)):
        paged = PagedKeys.within(given)
        assert paged is not None
        assert isinstance(paged.cache, Cache)
        with pytest.raises(Unshown):
            paged.read("attn")  # nothing was read yet
        paged.cache.update(keys, keys + 1, layer_idx=0, kwargs={"block_table": table})
        if shown:
            found = paged.read("attn")
            assert found[0] is keys
            assert torch.equal(found[1], keys + 1)
            assert found[2].tolist() == [0, 4, 9]
        else:
            with pytest.raises(Unshown, match="paged cache that the kernel reads by itself"):
                paged.read("attn")
    assert "update" not in vars(cache)  # the user's own is as it was
    assert PagedKeys.within({"cache": cache}) is None
