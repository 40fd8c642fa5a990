"""What is kept of a model does not keep the model: captures and results outlive it, and are copied and pickled."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import workbench
from support.tiny import family, make
from workbench import Capture, CaptureError, Variant, Workbench
from workbench.kernels.statistics import STATISTICS
from workbench.storage.rendering import renderer

INPUTS = family("gpt2").inputs()
COMMON = tuple(name for name in STATISTICS if name not in ("induction", "lse"))
EVERYTHING: dict[str, Any] = {"z": True, "pattern": True, "values": True, "gradients": True}


def _plain(wb: Workbench) -> Any:
    with torch.no_grad(), wb.capture() as cap:
        wb.model(**INPUTS)
    return cap


def _everything(wb: Workbench) -> Any:
    with wb.capture(tuple(STATISTICS), **EVERYTHING) as cap:
        wb.model(**INPUTS).logits.square().mean().backward()
    return cap, list(cap), cap.sites, cap.pool()


def _cache(wb: Workbench) -> Any:
    with torch.no_grad(), wb.capture(z=True) as cap:
        wb.model(**INPUTS)
    return cap.to_cache()


def _generated(wb: Workbench) -> Any:
    with torch.no_grad(), wb.capture(z=True) as cap:
        wb.model.generate(**INPUTS, max_new_tokens=3, do_sample=False)  # type: ignore[operator]
    return cap, cap.joined()


def _edited(wb: Workbench) -> Any:
    rolled = wb.edit_pattern("L1H1", lambda rows, site, head: rows.roll(1, -1))
    with wb.capture(z=True) as cap, wb.ablate("L0H1", "mean", reference=INPUTS), rolled:
        wb.model(**INPUTS)
    return cap


def _sweep(wb: Workbench) -> Any:
    variants = [Variant((0, 1)), Variant((1, 2), "mean")]
    return workbench.run_sweep(
        wb, variants, [INPUTS], lambda y, batch: y.logits.double().mean((1, 2)), progress=False
    )  # fmt: skip


def _importance(wb: Workbench) -> Any:
    return workbench.head_importance(wb, [INPUTS], metric=lambda y, batch: y.logits.mean((1, 2)), progress=False)


def _read(wb: Workbench) -> Any:
    cap = _plain(wb)
    return workbench.attention_profile(cap), workbench.pattern_atlas(cap, n_clusters=2)


def _views(wb: Workbench) -> Any:
    cap = _plain(wb)
    return renderer().all_of(cap), workbench.Report("One model").add(cap)


def _failed(wb: Workbench) -> Any:
    with pytest.raises(CaptureError) as error, wb.capture(gradients=True):
        wb.model(**INPUTS)
    return str(error.value)


KEPT: dict[str, Callable[[Workbench], Any]] = {
    "plain": _plain,
    "everything": _everything,
    "cache": _cache,
    "generated": _generated,
    "edited": _edited,
    "sweep": _sweep,
    "importance": _importance,
    "read": _read,
    "views": _views,
    "look": lambda wb: wb.look(**INPUTS),
    "verify": lambda wb: wb.verify(**INPUTS),
    "failed": _failed,
}


@pytest.mark.parametrize("what", KEPT)
def test_nothing_that_is_kept_keeps_the_model(what: str) -> None:
    wb = workbench.attach(make(family("gpt2")))
    model, weights = weakref.ref(wb.model), [weakref.ref(p) for p in wb.model.parameters()]
    kept = KEPT[what](wb)
    if what != "plain":  # an attached workbench that is let go of holds on to nothing either
        wb.detach()
    del wb
    gc.collect()
    assert kept is not None
    assert model() is None
    assert not [p for p in weights if p() is not None]


def test_what_needs_the_model_says_that_it_is_gone(tmp_path: Path) -> None:
    wb = workbench.attach(make(family("gpt2")))
    with torch.no_grad(), wb.capture(z=True) as cap:
        wb.model(**INPUTS)
    want = cap["blocks.1.attn"].result()
    kept = workbench.load_capture(cap.save(tmp_path / "kept.safetensors", result=True))
    cap = cap.calls[0]
    del wb
    gc.collect()
    with pytest.raises(CaptureError, match=r"the model is gone, and transformer.h.1.attn.c_proj.*\n.*result=True"):
        cap["blocks.1.attn"].result()
    torch.testing.assert_close(kept["blocks.1.attn"].result(), want)
    assert cap.provenance["weights_sha256"] == kept.provenance["weights_sha256"] is not None


def test_a_hash_that_nobody_asked_for_in_time_is_not_there(tmp_path: Path) -> None:
    cap = _plain(workbench.attach(make(family("gpt2"))))
    gc.collect()
    again = workbench.load_capture(cap.save(tmp_path / "late.safetensors"))
    assert again.provenance["weights_sha256"] is None
    assert "the model was gone before it was asked for" in again.provenance["weights_note"]


def test_the_hash_is_that_of_the_model_when_the_workbench_is_gone() -> None:
    model = make(family("gpt2"))
    with workbench.attach(model) as wb:
        cap, want = _plain(wb), wb.weights_hash()
    del wb
    gc.collect()
    assert cap.provenance["weights_sha256"] == want is not None


COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda cap: pickle.loads(pickle.dumps(cap)),
    "deepcopy": copy.deepcopy,
}


def assert_equal(copied: Capture, cap: Capture, folder: Path) -> None:
    """The same statistics, ledger and labels, and a file of the same bytes."""
    assert copied.ledger == cap.ledger
    assert copied.statistics == cap.statistics
    assert list(copied.sites) == list(cap.sites)
    assert repr(copied) == repr(cap)
    for one, other in zip(cap.calls, copied.calls, strict=True):
        for a, b in zip(one, other, strict=True):
            assert [a.site.label(h) for h in range(a.shape[1])] == [b.site.label(h) for h in range(b.shape[1])]
            for name, value in a.statistics.items():
                assert torch.equal(value.nan_to_num(), getattr(b, name).nan_to_num())
            assert (a.z is None) == (b.z is None)
            if a.lazy is not None:
                torch.testing.assert_close(a.pattern.dense(), b.pattern.dense())
    pattern = cap.forwards[0].sites[cap.sites[0].name].lazy is not None
    files = [each.save(folder / f"{i}.safetensors", pattern=pattern) for i, each in enumerate((cap, copied))]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", ["llama-gqa", "t5", "whisper", "bloom", "mamba", "vit"])
def test_a_copy_is_an_equal_capture(name: str, how: str, tmp_path: Path) -> None:
    model = make(family(name))
    with torch.no_grad(), workbench.attach(model) as wb:
        with wb.capture(COMMON, z=True, values=True, pattern=True) as cap:
            model(**family(name).inputs())
        wb.look(**family(name).inputs())
    assert_equal(COPIES[how](cap), cap, tmp_path)


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_what_was_joined_and_of_gradients(how: str, tmp_path: Path) -> None:
    wb = workbench.attach(make(family("gpt2")))
    _, joined = _generated(wb)
    everything = _everything(wb)[0]
    assert_equal(COPIES[how](joined), joined, tmp_path)
    copied = COPIES[how](everything)
    assert_equal(copied, everything, tmp_path)
    assert torch.equal(copied[0].z_gradient, everything[0].z_gradient)
    if how == "pickle":
        with pytest.raises(CaptureError, match="the model is gone"):
            copied[0].result()
    else:
        torch.testing.assert_close(copied[0].result(), everything[0].result())


class _Masked(nn.Module):
    """Attention with a mask that it keeps, and that may be changed."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.zeros(5, 5))
        self.num_heads, self.qkv, self.out = 2, nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_knows_what_the_model_has_overwritten(how: str) -> None:
    torch.manual_seed(0)
    model = _Masked()
    with torch.no_grad(), workbench.attach(model) as wb, wb.capture() as cap:
        model(torch.randn(1, 5, 8))
    before = COPIES[how](cap)
    want = cap[0].pattern.dense()
    model.mask.fill_(1.0)
    after = COPIES[how](cap)
    for late in (cap, after):
        with pytest.raises(CaptureError, match="has overwritten a tensor"):
            late[0].pattern  # noqa: B018
    torch.testing.assert_close(before[0].pattern.dense(), want)
