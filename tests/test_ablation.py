"""What ablations take their reference from, and what they say when it does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import workbench
from support.tiny import FAMILIES, make
from workbench.errors import InterventionError
from workbench.session.workbench import Workbench

BY_NAME = {family.name: family for family in FAMILIES}
HEAD = (1, 2)
MEANS = ["mean", "mean_positional"]
REFERENCED = [*MEANS, "resample"]


@pytest.fixture
def wb() -> Iterator[Workbench]:
    with workbench.attach(make(BY_NAME["gpt2"])) as wb:
        yield wb


def ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 60, (batch, length), generator=torch.Generator().manual_seed(seed))


def z_of(wb: Workbench, inputs: dict[str, Any], head: tuple[int, int] = HEAD) -> Tensor:
    """[batch, position, d_head] of a head as the model gives it now."""
    with torch.no_grad(), wb.capture(z=True) as capture:
        wb.model(**inputs)
    z = capture[head[0]].z
    assert z is not None
    return z[:, :, head[1]]


def padded(side: str) -> dict[str, Tensor]:
    given = {"input_ids": ids(3, 9), "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    given["attention_mask"][1, slice(-4, None) if side == "right" else slice(0, 4)] = 0
    return given


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("how", MEANS)
def test_a_capture_gives_the_same_means_as_its_inputs(wb: Workbench, how: Any, side: str) -> None:
    inputs = [padded(side), {"input_ids": ids(2, 12, seed=1), "attention_mask": torch.ones(2, 12)}]
    with torch.no_grad(), wb.capture(z=True) as capture:
        for batch in inputs:
            wb.model(**batch)
    found = []
    for reference in (inputs, capture):
        with wb.ablate(HEAD, how, reference=reference):
            found.append(z_of(wb, {"input_ids": ids(2, 9)}))
    torch.testing.assert_close(*found)
    assert found[0].std() > 0


def test_padding_does_not_count_whatever_it_holds(wb: Workbench) -> None:
    inputs = padded("right")
    clean = z_of(wb, inputs)[inputs["attention_mask"].bool()].mean(0)
    inputs["position_ids"] = torch.arange(9).where(inputs["attention_mask"].bool(), 63)
    with wb.ablate(HEAD, "mean", reference=inputs):
        torch.testing.assert_close(z_of(wb, {"input_ids": ids(1, 4)}), clean.expand(1, 4, -1))


def test_one_batch_and_examples_of_several_lengths(wb: Workbench) -> None:
    batches = [{"input_ids": ids(1, 5)}, {"input_ids": ids(2, 8, seed=1)}]
    each = [z_of(wb, batch) for batch in batches]
    with wb.ablate(HEAD, "mean", reference=batches):
        found = z_of(wb, {"input_ids": ids(3, 30)})
    torch.testing.assert_close(found, torch.cat([z.flatten(0, 1) for z in each]).mean(0).expand_as(found))
    with wb.ablate(HEAD, "mean_positional", reference=(batch for batch in batches)):
        found = z_of(wb, {"input_ids": ids(1, 8)})[0]
    torch.testing.assert_close(found[:5], (each[0][0] + each[1][0, :5] + each[1][1, :5]) / 3)
    torch.testing.assert_close(found[5:], (each[1][0, 5:] + each[1][1, 5:]) / 2)
    with wb.ablate(HEAD, "resample", reference=batches):
        found = z_of(wb, {"input_ids": ids(5, 4)})
    torch.testing.assert_close(found, each[0][0, [0, 1, 3, 4]].expand(5, -1, -1))  # the nearest length, stretched


def test_resampled_heads_come_from_one_example_and_stay_with_it(wb: Workbench) -> None:
    reference = {"input_ids": ids(7, 6, seed=4)}
    inputs = {"input_ids": torch.cat((ids(3, 6), reference["input_ids"][5:6]))}
    first, second = z_of(wb, reference, (0, 1)), z_of(wb, reference, HEAD)

    def run(seed: int, draw: int = 0) -> list[int]:
        with wb.ablate([(0, 1), HEAD], "resample", reference=reference, seed=seed, draw=draw):
            once, twice = (z_of(wb, inputs, (0, 1)) for _ in range(2))
            other = z_of(wb, inputs, HEAD)
        assert torch.equal(once, twice)
        order = [next(i for i in range(7) if torch.equal(first[i], z)) for z in once]
        assert torch.equal(other, second[order])
        return order

    orders = [run(seed) for seed in range(6)]
    assert orders[0] == run(0)
    assert len({tuple(order) for order in orders}) > 1
    assert all(order[3] != 5 for order in orders)  # itself
    draws = [run(0, draw) for draw in range(6)]
    assert sorted(draw[0] for draw in draws) != sorted([draws[0][0]] * 6)
    assert all(len({draw[i] for draw in draws}) == 6 for i in range(4))
    with pytest.raises(InterventionError, match="has 6 donors, there is no draw 6"):
        run(0, 6)


def test_resampling_needs_another_example_and_the_models_inputs(wb: Workbench) -> None:
    one = {"input_ids": ids(1, 6)}
    with pytest.raises(InterventionError, match="no other that differs"), wb.ablate(HEAD, "resample", reference=one):
        wb.model(**one)
    with wb.ablate(HEAD, "resample", reference=one):
        wb.model(input_ids=ids(2, 6, seed=1))
    with torch.no_grad(), wb.capture(z=True) as capture:
        wb.model(**one)
    with pytest.raises(InterventionError, match="does not say which examples"):
        wb.ablate(HEAD, "resample", reference=capture).__enter__()


@pytest.mark.parametrize("how", REFERENCED)
def test_the_reference_runs_unedited_and_unseen(wb: Workbench, how: Any) -> None:
    reference, inputs = {"input_ids": ids(2, 9, seed=1)}, {"input_ids": ids(2, 9)}
    with wb.ablate(HEAD, how, reference=reference):
        want = z_of(wb, inputs)
    grown = torch.full((8,), 9.0)
    with (
        torch.no_grad(),
        wb.capture(z=True) as capture,
        wb.steer((0, 0), grown),
        wb.ablate(HEAD, how, reference=reference),
    ):
        wb.model(**inputs)
    assert len(capture.calls) == 1
    torch.testing.assert_close(capture[1].z[:, :, HEAD[1]], want)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("how", REFERENCED)
@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
def test_a_reference_made_without_autograd_serves_with_it(wb: Workbench, how: Any, context: Any) -> None:
    with context():
        intervention = wb.ablate(HEAD, how, reference={"input_ids": ids(2, 9, seed=1)})
        intervention.__enter__()
    wb.model(input_ids=ids(2, 9)).logits.sum().backward()
    intervention.__exit__(None, None, None)
    assert wb.model.transformer.h[0].attn.c_attn.weight.grad.abs().sum() > 0


def test_masks_of_an_encoder_and_a_decoder(wb: Workbench) -> None:
    family = BY_NAME["t5"]
    with workbench.attach(make(family)) as wb:
        inputs = family.inputs()  # the encoder's mask hides four positions of the first example
        inputs["decoder_attention_mask"] = torch.ones(2, 9, dtype=torch.long)
        inputs["decoder_attention_mask"][1, -2:] = 0
        with torch.no_grad(), wb.capture(z=True) as capture:
            wb.model(**inputs)
        for name, mask in (("encoder.0.attn", "attention_mask"), ("decoder.1.attn", "decoder_attention_mask"),
                           ("decoder.1.cross_attn", "decoder_attention_mask")):  # fmt: skip
            want = capture[name].z[:, :, 3][inputs[mask].bool()].mean(0)
            with torch.no_grad(), wb.ablate((name, 3), "mean", reference=inputs), wb.capture(z=True) as edited:
                wb.model(**inputs)
            torch.testing.assert_close(edited[name].z[:, :, 3], want.expand_as(edited[name].z[:, :, 3]))
        with torch.no_grad(), wb.ablate(("decoder.1.attn", 0), "mean", reference=family.inputs()):
            wb.model(**inputs)  # no decoder mask: all of it counts


def with_position_padded() -> dict[str, Tensor]:
    given = padded("right")
    given["attention_mask"][:, -1] = 0
    return given


@pytest.mark.parametrize(
    ("how", "reference", "message"),
    [
        ("mean", None, 'how="mean" needs a reference'),
        ("resample", None, 'how="resample" needs a reference'),
        ("median", {"input_ids": ids(1, 3)}, 'there is no ablation "median"'),
        ("means", None, 'did you mean "mean"'),
        ("mean", [], "the reference has no batch"),
        ("mean", [ids(1, 3)], "not Tensor"),
        ("mean", ids(1, 3), "not Tensor"),
        ("mean", 7, None),
        ("mean", {"input_ids": ids(1, 99)}, "in the reference, the input prompt has 99 tokens"),
        ("mean", {"input_ids": ids(1, 3).to("meta")}, "in the reference, an input is on meta"),
        ("mean", {"input_ids": ids(1, 3), "attention_mask": torch.zeros(1, 3)}, "nothing but padding"),
        ("mean_positional", {"input_ids": ids(2, 4)}, "the reference has 4 positions, the input 9"),
        ("resample", {"input_ids": ids(1, 9)}, "example 0 cannot be resampled: among 1 there is no other that differs"),
        ("mean_positional", with_position_padded(), "position 8 is padding in every reference example"),
    ],
    ids=str,
)
def test_references_that_do_not_fit(wb: Workbench, how: Any, reference: Any, message: str | None) -> None:
    bare = wb.model(input_ids=ids(2, 9)).logits
    with pytest.raises(InterventionError) as caught, wb.ablate(HEAD, how, reference=reference):
        wb.model(input_ids=ids(2, 9))
    assert (message or "not int") in str(caught.value)
    assert torch.equal(wb.model(input_ids=ids(2, 9)).logits, bare)
    wb.check_idle()


def test_captures_that_do_not_fit(wb: Workbench) -> None:
    inputs = {"input_ids": ids(2, 9)}
    with torch.no_grad():
        with wb.capture() as without:
            wb.model(**inputs)
        with wb.capture(z=True, sites=[0]) as elsewhere:
            wb.model(**inputs)
        with pytest.raises(workbench.CaptureError), wb.capture(z=True) as empty:
            pass
    for capture, message in ((without, "has not kept z"), (elsewhere, "has not seen the site"), (empty, "no forward")):
        with pytest.raises(InterventionError, match=message), wb.ablate(HEAD, "mean", reference=capture):
            pass


@torch.no_grad()
def test_a_cache_shifts_positions(wb: Workbench) -> None:
    first, last = ids(2, 9), ids(2, 1, seed=2)
    past = wb.model(first, use_cache=True).past_key_values
    with wb.capture(z=True) as steps:
        again = wb.model(first, use_cache=True).past_key_values
        wb.model(last, past_key_values=again)
    for how in ("mean_positional", "resample"):
        with (
            pytest.raises(InterventionError, match=r"1 queries look at 1[01] keys"),
            wb.ablate(HEAD, how, reference={"input_ids": ids(2, 12)}),
        ):
            wb.model(last, past_key_values=past)
        says = "does not say which examples" if how == "resample" else "in the reference, 1 queries"
        with pytest.raises(InterventionError, match=says):
            wb.ablate(HEAD, how, reference=steps).__enter__()
    with wb.ablate(HEAD, "mean", reference=steps), wb.capture(z=True) as capture:
        wb.model(last)
    z = torch.cat([call[1].z[:, :, HEAD[1]] for call in steps.calls], dim=1)
    torch.testing.assert_close(capture[1].z[:, 0, HEAD[1]], z.flatten(0, 1).mean(0).expand(2, -1))


def test_a_site_that_is_called_several_times_has_no_reference() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = self.attn(x, x, x, need_weights=False)[0]
            return x

    torch.manual_seed(0)
    x = torch.randn(2, 5, 16)
    with torch.no_grad(), workbench.attach(Twice().eval()) as wb:
        with wb.capture(z=True) as capture:
            wb.model(x)
        for reference in ({"x": x}, capture):
            with (
                pytest.raises(InterventionError, match="several times in one forward"),
                wb.ablate((0, 1), "mean", reference=reference),
            ):
                pass
        with wb.ablate((0, 1)), wb.capture(z=True) as edited:  # at both calls
            wb.model(x)
    for z in (edited["attn"].z, edited["attn#1"].z):
        assert not z[:, :, 1].any()
        assert z[:, :, 0].all()


def test_a_mask_that_fits_nothing(wb: Workbench) -> None:
    reference = {"input_ids": ids(2, 6), "attention_mask": torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()}
    with pytest.raises(InterventionError, match=r"attention_mask \[2, 1, 6, 6\] does not fit"):
        wb.ablate(HEAD, "mean", reference=reference).__enter__()


def test_a_reference_that_does_not_reach_the_site() -> None:
    family = BY_NAME["whisper"]
    model = make(family).model

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, input_features: Tensor, decode: bool) -> Any:
            encoded = self.parts.encoder(input_features)
            return self.parts.decoder(torch.ones(2, 3).long(), encoder_hidden_states=encoded[0]) if decode else encoded

    features = family.inputs()["input_features"]
    with workbench.attach(Encoder()) as wb:
        reference = {"input_features": features, "decode": False}
        with (
            pytest.raises(InterventionError, match="does not reach the site on the reference"),
            wb.ablate(("decoder.0.attn", 0), "mean", reference=reference),
        ):
            pass
        with wb.ablate(("decoder.0.attn", 0), "mean", reference=reference | {"decode": True}):
            wb.model(features, True)
