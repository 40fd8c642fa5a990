"""What the host waits for: checks on a device, decays, and a step of decoding, counted by operators."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from workbench import CaptureError
from workbench.kernels import streaming
from workbench.kernels.checks import Pending, check_attention, check_finite, deferred
from workbench.kernels.lightning import LightningPattern, decays
from workbench.kernels.lightning.decay import check_decay
from workbench.kernels.masks import Mask
from workbench.kernels.neighborhood import NeighborhoodLayout, NeighborhoodPattern
from workbench.kernels.patterns import DensePattern
from workbench.kernels.recurrent import RecurrentPattern
from workbench.kernels.s2 import S2Cache
from workbench.kernels.s2.layout import S2Layout
from workbench.kernels.scan import ScanPattern
from workbench.kernels.softmax import SoftmaxPattern
from workbench.kernels.statistics import Options
from workbench.kernels.triton import engine
from workbench.kernels.triton.call import ROWS, Call
from workbench.session import keeping
from workbench.session.keeping import Masks

WAITS = {"_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal"}
NO_LAUNCH = {"empty", "unbind", "scalar_tensor"}
VIEWS = {
    "promote_types",
    "view",
    "slice",
    "select",
    "unsqueeze",
    "expand",
    "detach",
    "transpose",
    "permute",
    "_unsafe_view",
    "alias",
}


class Counted(TorchDispatchMode):
    """Counts operators by name: `launches` does work on the device, `waits` has the host wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        result = func(*args, **(kwargs or {}))
        to_host = name in ("_to_copy", "copy_") and _crosses(args, result)
        self.names["to host" if to_host else name] += 1
        return result

    @property
    def waits(self) -> int:
        return sum(n for name, n in self.names.items() if name in WAITS or name == "to host")

    @property
    def launches(self) -> int:
        return sum(n for name, n in self.names.items() if name not in VIEWS)


def _crosses(args: Any, result: Any) -> bool:
    devices = {t.device.type for t in (*args, result) if isinstance(t, Tensor)}
    return isinstance(result, Tensor) and result.device.type == "cpu" and len(devices) > 1


def on_a_device(*shape: int) -> Tensor:
    """A tensor on a GPU that is not there: whoever asks for its numbers gets an error."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return torch.empty(shape, device="cuda")


def counted(work: Callable[[], object]) -> Counted:
    with Counted() as found:
        work()
    return found


def test_checks_on_a_device_wait_for_nothing() -> None:
    q = on_a_device(1, 2, 8, 4)
    pending = Pending()
    with deferred(pending):
        assert counted(lambda: check_attention(q, q, q)).launches == 0
        found = counted(lambda: check_finite("v", q))
    assert (found.waits, found.launches) == (0, 1)
    assert counted(lambda: check_finite("v", q)).launches == 0
    q = torch.zeros(1, 1, 2, 2)
    assert counted(lambda: check_finite("q", q)).waits > 0, "the count sees what the host waits for"


def test_masks_of_compiled_code_wait_for_nothing() -> None:
    """What two layers of compiled code share is told without their numbers; else the device is asked, at the end."""
    masks, one, other = Masks(), on_a_device(2, 1, 8, 8), on_a_device(2, 1, 8, 8)
    first = masks.copy(one, ("graph", 1))
    found = counted(lambda: masks.copy(one, ("graph", 1)))
    assert (found.waits, found.launches) == (0, 0)
    assert masks.copy(one, ("graph", 1)) is first
    for mask, key in ((other, ("graph", 2)), (other, None), (one, None)):
        found = counted(lambda mask=mask, key=key: masks.copy(mask, key))
        assert found.waits == 0
        assert found.launches == 3, found.names  # a copy, and whether it is as one before


def test_masks_that_turn_out_to_be_the_same_are_kept_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "is_away", lambda device: True)
    masks, shown = Masks(), torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    first, again, other, last = (masks.copy(mask, None) for mask in (shown, shown, ~shown, ~shown))
    same = masks.settle()
    assert {at: id(kept) for at, kept in same.items()} == {id(again): id(first), id(last): id(other)}
    assert not masks.settle()


def test_what_was_deferred_is_told_at_the_end() -> None:
    pending = Pending()
    pending.add("q", torch.ones(3), "h.0")
    pending.add("v", torch.tensor([1.0, torch.inf]), "h.1")
    pending.add("v", torch.tensor([torch.nan]), "h.2")
    with pytest.raises(CaptureError, match="v held NaN or inf") as caught:
        pending.check()
    assert caught.value.site == "h.1"
    pending.check()  # it was told


def test_large_numbers_are_finite_on_a_device_too() -> None:
    pending = Pending()
    pending.add("key_bias", torch.full((8,), torch.finfo(torch.float32).min), "h.0")
    pending.check()


def test_long_captures_keep_few_tensors_on_a_device() -> None:
    pending = Pending()
    for i in range(2500):
        pending.add("q", torch.tensor([torch.inf if i == 1500 else 1.0]), f"h.{i}")
    assert len(pending._sums) < 1024
    with pytest.raises(CaptureError) as caught:
        pending.check()
    assert caught.value.site == "h.1500"


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The Triton kernels that would run: on the meta device, whose numbers nobody can ask for, as if on a GPU."""
    found: Counter[str] = Counter()
    monkeypatch.setattr(engine, "_machine_refusal", lambda device: None)
    monkeypatch.setattr(Call, "_launch", lambda self, kind, own, width: found.update([kind]))
    return found


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


_MASKS: dict[str, Callable[[], dict[str, Any]]] = {
    "causal": lambda: {"causal": True},
    "window": lambda: {"causal": True, "window": 8},
    "boolean": lambda: {"tensor": _meta(2, 1, 64, 64, dtype=torch.bool)},
    "additive": lambda: {"tensor": _meta(2, 1, 64, 64)},
    "S2": lambda: {"causal": True, "n_heads": 4, "layout": S2Layout(64, 64, 4, 2, block=16, local_blocks=2)},
}
DEFAULT, ALL = (
    ("entropy", "received"),
    (*ROWS, *("peak_key", "received", "received_mean", "sink", "current", "previous")),
)


@pytest.mark.parametrize("names", [DEFAULT, ALL], ids=["default", "all"])
@pytest.mark.parametrize("how", _MASKS)
def test_budget_of_a_captured_softmax(how: str, names: tuple[str, ...], launched: Counter[str]) -> None:
    """Layers share a mask, whatever object stands for it: from the second on, two kernels, and a few launches more."""
    rules, pending = _MASKS[how](), Pending()

    def layer() -> None:
        q, k, v = _meta(2, 4, 64, 32), _meta(2, 2, 64, 32), _meta(2, 2, 64, 32)
        check_finite("v", v)
        pattern = SoftmaxPattern(q, k, Mask(64, 64, **rules), lse=_meta(2, 4, 64, dtype=torch.float32), values=v)
        streaming.statistics(pattern, names)

    with deferred(pending):
        layer()
        launched.clear()
        found = counted(layer)
    assert launched == {"rows": 1, "columns": 1}
    assert found.waits == 0
    made = {name: n for name, n in found.names.items() if name not in VIEWS | NO_LAUNCH}
    assert sum(made.values()) <= (4 if names == DEFAULT else 30), made


@pytest.mark.parametrize("names", [DEFAULT, ALL], ids=["default", "all"])
@pytest.mark.parametrize("what", ["neighborhood", "scan", "lightning"])
def test_budget_of_other_patterns(what: str, names: tuple[str, ...], launched: Counter[str]) -> None:
    """Neighborhoods share a table; the scores of a scan, the same for all rows, are a softmax over the keys' biases.
    Magnitudes that fade are one over their logarithms.
    """
    decay, n = decays(4), 64 if what == "neighborhood" else 4096

    def layer() -> None:
        q, v = _meta(1, 4, n, 32), _meta(1, 4, n, 32)
        check_finite("v", v)
        if what == "scan":
            pattern = ScanPattern(q[:, :, :1], v)
            pattern.__dict__["scores"] = _meta(1, 4, n, dtype=torch.float32)  # autocast knows no meta device
            streaming.statistics(pattern, names)
            return
        if what == "lightning":
            streaming.statistics(LightningPattern(q, v, decay), names)
            return
        layout = NeighborhoodLayout((8, 8), 3)
        streaming.statistics(NeighborhoodPattern(q, v, layout, lse=_meta(1, 4, 64, dtype=torch.float32)), names)

    with deferred(Pending()):
        layer()
        launched.clear()
        found = counted(layer)
    assert launched == {"rows": 1, "columns": 1}
    assert found.waits == 0
    made = {name: n for name, n in found.names.items() if name not in VIEWS | NO_LAUNCH}
    assert sum(made.values()) <= (4 if names == DEFAULT else 30), made


def test_budget_where_no_kernel_gave_denominators(launched: Counter[str]) -> None:
    pattern = SoftmaxPattern(_meta(2, 4, 64, 32), _meta(2, 2, 64, 32), softcap=30.0, sinks=_meta(4))
    with deferred(Pending()):
        found = counted(lambda: streaming.statistics(pattern, DEFAULT))
    assert launched == {"rows": 1, "columns": 1}
    assert found.waits == 0


def test_a_mask_that_was_written_to_is_counted_anew() -> None:
    shown = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    rows = torch.device("cpu")
    first = Mask(4, 4, tensor=shown).summary(rows)
    assert Mask(4, 4, tensor=shown).summary(rows) is first
    shown[..., 0] = False
    again = Mask(4, 4, tensor=shown).summary(rows)
    assert again.keys_per_query.unique().tolist() == [3]
    assert Mask(4, 4, tensor=shown, causal=True).summary(rows).keys_per_query[0, 0].tolist() == [0, 1, 2, 3]


def test_numbers_that_are_none_are_told_with_their_site() -> None:
    pending, pattern = Pending(), SoftmaxPattern(_meta(1, 1, 4, 4), _meta(1, 1, 4, 4), lse=_meta(1, 1, 4).float())
    with deferred(pending), pending.at("h.3"):
        pattern.check()
        assert pattern.problem.lse is not None
    ((named, _),) = pending._sums
    assert named == ("the log-sum-exp of a row, hence its query or a key,", "h.3")


def test_decays_are_checked_once() -> None:
    decay = torch.tensor([0.5, 0.9])
    first = check_decay(decay, 2)
    again = counted(lambda: check_decay(decay, 2))
    assert not again.names
    assert check_decay(decay, 2) is first
    decay[0] = 2.0
    with pytest.raises(CaptureError, match="head 0 is 2"):
        check_decay(decay, 2)
    assert check_decay(None, 4) is check_decay(None, 4)


@pytest.mark.parametrize(("heads", "length"), [(2, 40), (8, 40), (8, 404)])
def test_a_step_of_decoding_costs_the_same_for_all_heads_and_lengths(heads: int, length: int) -> None:
    cache = S2Cache(heads, heads, block=16, local_blocks=2, vert_stride=2)
    k = torch.randn(1, heads, length, 4)
    cache.extend(k, k)

    def step() -> Tensor:
        cache.extend(k[:, :, :1], k[:, :, :1])
        return cache.attend(k[:, :, :1])

    found = counted(step)
    assert found.waits == 0
    assert found.launches <= 8, found.names


def _recurrence(of_channels: bool = False, delta: bool = False, n: int = 600) -> RecurrentPattern:
    q = _meta(1, 2, n, 8)
    decay = _meta(1, 2, n, *[8] * of_channels, dtype=torch.float32)
    return RecurrentPattern(q, q, decay, _meta(1, 2, n) if delta else None, values=q)


@pytest.mark.parametrize(
    ("pattern", "names", "why"),
    [
        (lambda: _recurrence(of_channels=True), ALL, "not of channels"),
        (lambda: _recurrence(delta=True), ("top_keys",), "no delta rule"),
        (_recurrence, ("value_weighted_received",), "weighs magnitudes by values"),
        (_recurrence, ("pooled_mean", "entropy"), "edge is a power of two"),
        (lambda: LightningPattern(_meta(1, 2, 600, 300), _meta(1, 2, 600, 300)), ("entropy",), "256 wide"),
        (lambda: SoftmaxPattern(_meta(1, 2, 600, 300), _meta(1, 2, 600, 300)), ("entropy",), "256 wide"),
        (lambda: DensePattern(_meta(1, 2, 600, 600)), DEFAULT, "knows a DensePattern"),
        (_recurrence, (*ALL, "top_keys", "pooled_max"), None),
        (lambda: LightningPattern(_meta(1, 2, 600, 8), _meta(1, 2, 600, 8)), (*ALL, "top_keys", "pooled_max"), None),
    ],
)
def test_what_no_fused_kernel_streams_says_what_it_costs(
    pattern: Callable[[], Any], names: tuple[str, ...], why: str | None, launched: Counter[str]
) -> None:
    options = Options(block=24 if "pooled_mean" in names else 16)
    said, engines = (how(pattern(), names, options) for how in (streaming.costs, streaming.engines))
    assert ("torch" in engines) == (why is not None)
    if why is None:
        assert said == []
        return
    assert why in said[0]
    assert names[0].removeprefix("value_weighted_") in " ".join(said)
    assert f"each of {6 if pattern().mask.causal else 9} tiles" in said[0]


@pytest.mark.parametrize("names", [DEFAULT, ALL], ids=["default", "all"])
@pytest.mark.parametrize("what", ["softmax", "channels", "delta"])
def test_plain_torch_takes_as_many_launches_for_a_tile_as_it_says(what: str, names: tuple[str, ...]) -> None:
    q = torch.randn(1, 2, 1024, 8, dtype=torch.float64)

    def launches(n: int) -> int:
        x = q[:, :, :n] / 8
        decay = -torch.rand(1, 2, n, *[8] * (what == "channels"))
        recurrent = RecurrentPattern(x, x, decay, torch.rand(1, 2, n) if what == "delta" else None)
        pattern = SoftmaxPattern(x, x, Mask(n, n, causal=True)) if what == "softmax" else recurrent
        assert streaming.costs(pattern, names, Options()) == []  # on a CPU nothing is launched
        return counted(lambda: streaming.statistics(pattern, names)).launches

    assert 30 <= (launches(1024) - launches(512)) / 7 <= 250  # 10 tiles of 256, and 3
