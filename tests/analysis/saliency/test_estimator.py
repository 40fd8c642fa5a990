"""The masking estimator on models whose saliency is known: closed forms, errors, chunking, interruption, resumption."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import workbench
from support.toy_speech import ToySpeech, identity_speech, planted_speech
from workbench import Saliency, saliency
from workbench.analysis.saliency.masks import Masks
from workbench.analysis.saliency.normalising import standardised
from workbench.analysis.saliency.sums import Sums
from workbench.errors import WorkbenchError

WORDS = torch.tensor([0, 2, 0])


def explained(model: ToySpeech, inputs: dict[str, Any], method: str = "spes", **options: Any) -> Saliency:
    """Saliency of a toy, whose frames are its segments."""
    n = inputs["input_features"].shape[1]
    given: dict[str, Any] = {"hypothesis": WORDS[: len(model.table)], "progress": False, "time_axis": 1} | options
    if method == "spes":
        rows = torch.arange(n)[:, None].expand(inputs["input_features"].shape[1:])
        given = {"segments": rows.contiguous()} | given
    with workbench.attach(model, check=False) as wb:
        return saliency(wb, inputs, method, **given)


def naive(model: ToySpeech, inputs: dict[str, Any], p: float, n_tokens: int) -> Tensor:
    """[token, frame] by all masks of frames, one forward each, in float64."""
    features = inputs["input_features"].double()
    ids = torch.tensor([[1, *WORDS[: n_tokens - 1].tolist()]])
    model = model.double()
    clean = model(features, decoder_input_ids=ids).logits[0].log_softmax(-1)
    n = features.shape[1]
    total, mass = torch.zeros(n_tokens, n).double(), torch.zeros(n).double()
    for mask in product([0.0, 1.0], repeat=n):
        z = torch.tensor(mask).double()
        found = model(features * (1 - z)[None, :, None], decoder_input_ids=ids).logits[0].log_softmax(-1)
        kl = (clean.exp() * (clean - found)).sum(-1)
        weight = p ** z.sum() * (1 - p) ** (n - z.sum())
        total += weight * kl[:, None] * z
        mass += weight * z
    model.float()
    return total / mass


@pytest.mark.parametrize("method", ["spes", "encoder_output"])
@pytest.mark.parametrize("p", [0.5, 0.2])
def test_enumeration_is_the_closed_form(method: str, p: float) -> None:
    model, inputs = identity_speech(7, 3)
    found = explained(model, inputs, method, p=p)
    assert found.exact
    assert found.stopped == "enumerated"
    assert found.n_masks == 2**7 - 1
    assert not found.standard_error.any()
    scores = found.scores[..., 0] if method == "spes" else found.scores
    torch.testing.assert_close(scores.double(), naive(model, inputs, p, 3), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("p", [0.5, 0.3])
def test_sampling_reaches_the_closed_form_within_its_stated_error(p: float) -> None:
    model, inputs = identity_speech(9, 3)
    truth = explained(model, inputs, "encoder_output", p=p).scores
    spread = []
    for seed in range(5):
        found = explained(model, inputs, "encoder_output", p=p, exact=False, n_masks=600, batch_size=100, seed=seed)
        assert not found.exact
        spread.append((found.scores - truth) / found.standard_error)
    off = torch.stack(spread)
    assert float(off.abs().max()) < 4.5
    assert 0.75 < float(off.square().mean().sqrt()) < 1.3  # the error is neither flattered nor overstated


def test_error_falls_with_the_root_of_the_masks() -> None:
    model, inputs = identity_speech(20, 2)
    few, many = (
        explained(model, inputs, "encoder_output", n_masks=n, batch_size=200, exact=False) for n in (400, 6400)
    )
    ratio = few.standard_error.mean() / many.standard_error.mean()
    assert 3.6 < float(ratio) < 4.4


def test_one_cell_that_matters() -> None:
    frames, at = 6, (2, 4)
    only = torch.zeros(frames, frames)
    only[at] = 1.0

    def encoder(features: Tensor) -> Tensor:
        return (features * only).sum((1, 2), keepdim=True).expand(-1, frames, frames)

    model = ToySpeech(torch.zeros(2, frames), encoder=encoder).eval()
    features = torch.rand(1, frames, frames, generator=torch.Generator().manual_seed(1)) + 0.5
    cells = torch.arange(9).view(3, 3).repeat_interleave(2, 0).repeat_interleave(2, 1)
    found = explained(model, {"input_features": features}, segments=cells)
    planted = cells == cells[at]
    assert (found.scores[:, planted] > found.scores[:, ~planted].amax(1, keepdim=True)).all()
    rest = found.scores[:, ~planted]
    torch.testing.assert_close(rest, rest[:, :1].expand_as(rest))  # the mean score, the same everywhere
    assert (standardised(found.scores)[:, ~planted] <= 0).all()


def test_nothing_masked_and_nothing_to_find() -> None:
    model, inputs = identity_speech(20, 2)
    found = explained(model, inputs, "encoder_output", p=0.0, n_masks=64)
    assert not found.scores.any()
    assert found.standard_error.isinf().all()
    deaf, inputs = identity_speech(20, 2, gain=0.0)
    found = explained(deaf, inputs, "encoder_output", n_masks=64)
    assert not found.scores.any()
    assert not found.standard_error.any()
    model, inputs = identity_speech(8, 2, seed=3)
    assert (explained(model, inputs).scores >= 0).all()


@pytest.mark.parametrize("method", ["spes", "encoder_output"])
def test_batches_and_chunks_change_nothing(method: str) -> None:
    model, inputs = identity_speech(16, 3)
    runs = [explained(model, inputs, method, n_masks=90, batch_size=size) for size in (1, 7, 90)]
    for other in runs[1:]:
        torch.testing.assert_close(other.scores, runs[0].scores, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(other.standard_error, runs[0].standard_error, atol=1e-6, rtol=1e-4)


def test_the_order_of_masks_changes_nothing() -> None:
    masks = Masks((13, 17), 0.4, 5)
    draws = [one for chunk in masks.chunks(0, 40, 1) for one in chunk]
    scores = torch.rand(40, 1, 3, generator=torch.Generator().manual_seed(0)).double()
    segments = (torch.arange(13), torch.arange(17)[:13])
    found = []
    for order in (range(40), range(39, -1, -1)):
        sums = Sums.empty(3, (13, 17))
        for i in order:
            sums.add(draws[i], scores[i])
        found.append(sums.maps(segments, exact=False))
    torch.testing.assert_close(found[0], found[1])


def test_masks_depend_on_seed_and_number_alone() -> None:
    masks = Masks((40, 50), 0.5, 3)
    whole = [one for chunk in masks.chunks(0, 12, 12) for one in chunk]
    for granularity, draw in enumerate(whole):
        alone = torch.cat([masks.at(m).hidden for m in range(12) if m % 2 == granularity])
        assert torch.equal(draw.hidden, alone)
    assert not torch.equal(masks.at(0).hidden, Masks((40, 50), 0.5, 4).at(0).hidden)
    share = torch.cat([Masks((1000,), 0.3, 0).at(m).hidden for m in range(20)]).double().mean()
    assert float(share) == pytest.approx(0.3, abs=0.015)


def test_interrupted_and_resumed_is_the_same_as_never_interrupted(tmp_path: Path) -> None:
    model, inputs = identity_speech(16, 3)
    whole = explained(model, inputs, "encoder_output", n_masks=60, batch_size=10)
    model.fail_at = model.calls + 6  # subject takes two forwards, the search for a cache at most three
    part = explained(model, inputs, "encoder_output", n_masks=60, batch_size=10)
    assert part.partial
    assert part.stopped == "interrupted"
    assert 0 < part.n_masks < 60
    assert "interrupted" in repr(part)
    model.fail_at = -1
    again = explained(model, inputs, "encoder_output", n_masks=60, batch_size=10, resume=part)
    assert not again.partial
    assert torch.equal(again.scores, whole.scores)
    assert torch.equal(again.standard_error, whole.standard_error)
    stored = part.save(tmp_path / "part.safetensors")
    assert torch.equal(
        explained(model, inputs, "encoder_output", n_masks=60, batch_size=10, resume=stored).scores, whole.scores
    )
    more = explained(model, inputs, "encoder_output", n_masks=90, batch_size=10, resume=whole)
    assert more.n_masks == 90
    with pytest.raises(WorkbenchError, match="of another run: seed differ"):
        explained(model, inputs, "encoder_output", n_masks=90, resume=whole, seed=1)


def test_interrupted_before_the_first_mask_is_interrupted() -> None:
    model, inputs = identity_speech(16, 2)
    explained(model, inputs, "encoder_output", n_masks=10, batch_size=10)
    needed = model.calls
    model.calls, model.fail_at = 0, needed
    with pytest.raises(KeyboardInterrupt):
        explained(model, inputs, "encoder_output", n_masks=10, batch_size=10)


def test_stops_at_a_precision_or_says_that_masks_are_too_few() -> None:
    model, inputs = identity_speech(16, 2)
    found = explained(model, inputs, "encoder_output", n_masks=20_000, precision=0.25, batch_size=64)
    assert found.stopped == "precision"
    assert 128 <= found.n_masks < 20_000
    assert float(found.noise.max()) <= 0.25
    with pytest.raises(workbench.PrecisionError, match="too few for a precision") as failed:
        explained(model, inputs, "encoder_output", n_masks=200, precision=0.01)
    kept = failed.value.result
    assert kept.n_masks == 200
    assert explained(model, inputs, "encoder_output", n_masks=300, resume=kept).n_masks == 300


def test_stops_after_seconds() -> None:
    model, inputs = identity_speech(16, 2)
    found = explained(model, inputs, "encoder_output", n_masks=10**6, seconds=0.0, batch_size=8)
    assert found.stopped == "seconds"
    assert found.partial
    assert found.n_masks == 8


def test_sums_do_not_grow_with_masks() -> None:
    model, inputs = identity_speech(16, 2)
    sizes = []
    for n in (64, 640):
        state = explained(model, inputs, "encoder_output", n_masks=n).state
        tensors = [t for name in ("counts", "scores", "squares") for t in state[name]]
        sizes.append(sum(t.numel() for t in tensors))
    assert sizes[0] == sizes[1] == 16 + 2 * (2 * 16)


def test_save_and_load(tmp_path: Path) -> None:
    model, inputs = identity_speech(5, 2)
    found = explained(model, inputs)
    again = Saliency.load(found.save(tmp_path / "map.safetensors"))
    assert torch.equal(again.scores, found.scores)
    assert again.target_ids == found.target_ids
    assert len(found.table) == 2 * 5


@pytest.mark.parametrize("at", [0, 3, 7])
@pytest.mark.parametrize(
    "method", ["spes", "integrated_gradients", "gradient_x_input", "occlusion", "feature_ablation", "kernel_shap"]
)
@pytest.mark.parametrize("where", ["input", "encoder"])
def test_every_method_finds_a_planted_frame(method: str, where: str, at: int) -> None:
    model, inputs = planted_speech(8, at)
    options: dict[str, Any] = {"n_masks": 300} if method in ("spes", "kernel_shap") else {}
    if method in ("feature_ablation", "kernel_shap") and where == "input":
        options["segments"] = torch.arange(8)[:, None].expand(8, 8).contiguous()
    if method == "occlusion":
        options["window"] = (1, 8) if where == "input" else (1,)
    if method == "spes" and where == "encoder":
        found = explained(model, inputs, "encoder_output")
    else:
        found = explained(model, inputs, method, at=where, **options)
    frames = found.scores.abs().flatten(2).sum(2) if found.scores.dim() > 2 else found.scores.abs()
    assert frames.argmax(1).tolist() == [at] * 2
