"""Attention against saliency: toys whose answer is known, curves, size, alignment, several utterances, refusals."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import workbench
from support.encoder_decoders import HYPOTHESIS, NAMES, encoder_decoder
from support.toy_speech import ToySpeech, identity_speech
from workbench import CrossAttentionSaliency, cross_attention_saliency, saliency
from workbench.analysis.cross_attention import comparison, progress
from workbench.analysis.cross_attention.alignment import align, disagreement
from workbench.analysis.cross_attention.correlate import correlate
from workbench.analysis.cross_attention.faithfulness import curves, plain_text, size, word_error_rate, word_errors
from workbench.analysis.cross_attention.progress import ComparisonInterrupted
from workbench.analysis.saliency import estimate
from workbench.analysis.saliency.normalising import paired_min_max, standardised
from workbench.analysis.saliency.preparing import prepare_input
from workbench.analysis.statistics.correlation import ranks
from workbench.errors import FormatError, WorkbenchError

WORDS = torch.tensor([0, 2, 0, 0])


def toy_study(model: ToySpeech, inputs: dict[str, Tensor], **options: Any) -> CrossAttentionSaliency:
    n, width = inputs["input_features"].shape[1:]
    rows = torch.arange(n)[:, None].expand(n, width).contiguous()
    given = inputs | {"labels": WORDS[: len(model.table)]}
    defaults: dict[str, Any] = {"segments": rows, "time_axis": 1, "orders": (), "progress": False, "batch_size": 256}
    with workbench.attach(model, check=False) as wb:
        return cross_attention_saliency(wb, given, **(defaults | options))


def test_an_encoder_that_mixes_frames_hides_the_input_but_not_its_output() -> None:
    frames = 9
    plain, inputs = identity_speech(frames, 4, gain=1.0)
    found = toy_study(plain, inputs)
    assert float(found.of("input")[0]) > 0.95
    assert float(found.of("encoder_output")[0]) > 0.95
    assert float(found.between[0, 0]) == pytest.approx(1, abs=1e-5)
    mixing, inputs = identity_speech(frames, 4, gain=1.0, encoder=lambda features: features.roll(4, dims=1))
    mixed = toy_study(mixing, inputs)
    assert float(mixed.of("input")[0]) < 0.6
    assert float(mixed.of("encoder_output")[0]) > 0.95
    share = mixed.coverage.set_index("aggregate").loc["all"]
    assert share["difference"] > 0.3


def test_correlation_is_that_of_the_definition_and_feels_affine_maps_only_per_token() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(3, 9, generator=generator), torch.rand(3, 9, generator=generator)
    wanted = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1]
    assert correlate(a, b, normalise="all") == pytest.approx(float(wanted))
    assert correlate(3 * a + 7, b, normalise="all") == pytest.approx(float(wanted))
    scale = torch.tensor([[1.0], [50.0], [0.1]])
    assert correlate(scale * a, b) == pytest.approx(correlate(a, b))
    assert abs(correlate(scale * a, b, normalise="all") - float(wanted)) > 0.01
    assert correlate(a.exp(), a, measure="spearman", normalise="all") == pytest.approx(1)
    ties = torch.tensor([2.0, 1.0, 2.0, 5.0])
    assert ranks(ties).tolist() == [1.5, 0.0, 1.5, 3.0]


def test_a_constant_map_has_no_correlation_and_the_result_says_so() -> None:
    _, inputs = identity_speech(8, 3)
    with pytest.raises(WorkbenchError, match="second map is constant"):
        correlate(torch.rand(2, 4), torch.ones(2, 4))
    flat = ToySpeech(torch.zeros(3, 8)).eval()
    found = toy_study(flat, inputs)
    assert any("attention map all is constant" in sentence for sentence in found.undefined)
    row = found.table.set_index("aggregate").loc["all"].iloc[0]
    assert "a map is constant" in row["note"]
    assert row["utterances"] == 0
    with pytest.raises(WorkbenchError, match="no correlation is defined"):
        _ = found.best
    deaf, inputs = identity_speech(8, 3, gain=0.0)
    assert any("input saliency is constant" in sentence for sentence in toy_study(deaf, inputs).undefined)


def test_deletion_begins_unperturbed_ends_with_nothing_and_ranks_orders() -> None:
    model, inputs = identity_speech(10, 3)
    said, ids = torch.zeros(3, dtype=torch.long), torch.tensor([[1, 0, 0]])  # what falls when its frames go
    with workbench.attach(model, check=False) as wb:
        rows = torch.arange(10)[:, None].expand(10, 10).contiguous()
        common: dict[str, Any] = {"hypothesis": said, "time_axis": 1, "progress": False, "batch_size": 128}
        found = saliency(wb, inputs, segments=rows, **common)
    subject = prepare_input(model, inputs, hypothesis=said, time_axis=1)
    fractions = [i / 10 for i in range(11)]
    oracle = found.sentence()

    def run(ranking: Tensor) -> Tensor:
        return curves(subject, ranking, fractions, decode_again=False)

    def log_p(features: Tensor) -> float:
        logits = model(features, decoder_input_ids=ids).logits[0]
        return float(logits.log_softmax(-1).gather(1, said[:, None]).mean())

    best, worst = run(oracle), run(-oracle)
    other = torch.stack(
        [run(torch.rand(10, 10, generator=torch.Generator().manual_seed(seed))) for seed in range(4)]
    ).mean(0)
    clean, nothing = log_p(inputs["input_features"]), log_p(torch.zeros(1, 10, 10))
    for found_curves in (best, worst, other):
        assert float(found_curves[0, 0, 0]) == pytest.approx(clean, abs=1e-5)
        assert float(found_curves[0, -1, 0]) == pytest.approx(nothing, abs=1e-5)
        assert float(found_curves[1, 0, 0]) == pytest.approx(nothing, abs=1e-5)
        assert float(found_curves[1, -1, 0]) == pytest.approx(clean, abs=1e-5)
        assert found_curves[..., 2].isnan().all()
    steps = torch.tensor(fractions).double()
    areas = [float(torch.trapezoid(one[0, :, 1], steps)) for one in (best, other, worst)]
    assert areas[0] < areas[1] < areas[2]
    areas = [float(torch.trapezoid(one[1, :, 1], steps)) for one in (best, other, worst)]
    assert areas[0] > areas[1] > areas[2]


def test_size_counts_the_cells_of_every_token_s_map() -> None:
    thresholds = torch.linspace(0, 1, 21, dtype=torch.float64)
    spike = torch.zeros(2, 4, 5)
    spike[0, 1, 2] = spike[1, 3, 3] = 1.0
    found = size(spike, thresholds)
    assert float(found[0]) == 100
    assert found[1:].tolist() == pytest.approx([100 / 20] * 20)
    assert not size(torch.zeros(2, 4, 5), thresholds)[1:].any()
    below = torch.tensor([[9.0, 9.0], [1.0, 9.0]])  # only the strictly lower triangle is there
    assert size(spike, thresholds, below)[1:].tolist() == pytest.approx([100 * 3 / 41] * 20)


def test_compact_maps_of_different_tokens_stay_compact_together() -> None:
    """Eight tokens with a peak each at a place of its own: small one by one, however wide their mean is."""
    thresholds = torch.linspace(0, 1, 21, dtype=torch.float64)
    maps = 0.05 * torch.rand(8, 40, 10, generator=torch.Generator().manual_seed(0))
    for k in range(8):
        maps[k, 5 * k : 5 * k + 5] += 1
    scaled = paired_min_max(standardised(maps), None)[0].double()
    by_hand = torch.tensor([float((scaled >= t).double().mean()) * 100 for t in thresholds], dtype=torch.float64)
    area = float(torch.trapezoid(size(scaled, thresholds), thresholds))
    assert area == pytest.approx(float(torch.trapezoid(by_hand, thresholds)))
    assert 13 < area < 16


def test_word_error_rates() -> None:
    assert word_error_rate("one two three four", "one two four") == pytest.approx(25)
    assert word_error_rate("one", "a b c d") == 100
    assert word_error_rate("", "") == 0
    assert word_errors("one two three four", "one too four five") == 3
    assert word_errors("", "one two") == 2
    assert plain_text("  It's FIVE,\n o'clock.") == "it's five o'clock"


class Digits:
    """A tokenizer that writes ids as numbers, and calls those from 36 on special."""

    all_special_ids: ClassVar[list[int]] = [0, 1, 2, 36, 37, 38]
    added_tokens_decoder: ClassVar[dict[int, str]] = {39: "<|0.40|>", 38: "<|nospeech|>"}

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))

    def convert_ids_to_tokens(self, index: int) -> str:
        return str(index)


def several(name: str, hypotheses: list[list[int]], **more: Any) -> list[dict[str, Any]]:
    return [
        encoder_decoder(name, seed)[1] | {"labels": torch.tensor([ids]), "name": f"u{seed}"} | more
        for seed, ids in enumerate(hypotheses)
    ]


QUICK: dict[str, Any] = {"n_masks": 20, "orders": (), "progress": False, "granularities": (100,)}


@pytest.mark.parametrize("name", ["bart", "whisper", "t5gemma", "speech-to-text"])
def test_an_utterance_without_a_word_is_left_out_before_any_mask_runs(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = encoder_decoder(name)
    ran = []
    explain = comparison.explain
    monkeypatch.setattr(comparison, "explain", lambda *given, **how: (ran.append(1), explain(*given, **how))[1])
    with workbench.attach(model, Digits()) as wb:
        words = several(name, [[7, 9, 11], [38, 39, 2], [5, 6, 2]])
        with pytest.warns(UserWarning, match="1 of 3 utterances are left out: u1: the hypothesis is empty"):
            found = cross_attention_saliency(wb, words, **QUICK)
        assert found.utterances == ("u0", "u2")
        assert len(found.skipped) == 1
        assert "1 left out" in repr(found)
        ran.clear()
        with pytest.raises(WorkbenchError, match="holds no word"):
            cross_attention_saliency(wb, words[1:2], **QUICK)
        assert not ran


@pytest.mark.parametrize("name", ["bart", "whisper"])
def test_a_comparison_goes_on_from_its_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = encoder_decoder(name)
    path = tmp_path / "study.safetensors"
    how = QUICK | {"n_masks": 40, "batch_size": 4, "orders": ("attention",), "fractions": (0, 1), "decode_again": False}
    monkeypatch.setattr(progress, "_SAVE_EVERY", 0.0)
    monkeypatch.setattr(estimate, "_SAVE_EVERY", 0.0)
    calls, stop_at = [0], [-1]

    def count(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == stop_at[0]:
            raise KeyboardInterrupt

    with workbench.attach(model) as wb:
        words = several(name, [[7, 9, 11], [5, 6, 2]])
        whole = cross_attention_saliency(wb, words, **how)
        hook = model.register_forward_pre_hook(count)
        cross_attention_saliency(wb, words, **how)
        in_all = calls[0]
        for share in (0.2, 0.7):
            calls[0], stop_at[0] = 0, int(share * in_all)
            with pytest.raises(ComparisonInterrupted, match=r"of 2 utterances are done; .* resume=path") as stopped:
                cross_attention_saliency(wb, words, resume=path, **how)
            stop_at[0] = -1
        assert stopped.value.partial is not None
        assert stopped.value.partial.utterances == ("u0",)
        calls[0] = 0
        again = cross_attention_saliency(wb, words, resume=path, **how)
        assert calls[0] < in_all / 2
        hook.remove()
        for field in ("correlations", "curves", "sizes", "pooled", "between"):
            torch.testing.assert_close(getattr(again, field), getattr(whole, field), rtol=0, atol=0, equal_nan=True)
        assert [one.name for one in tmp_path.iterdir()] == [path.name]
        calls[0] = 0
        with pytest.raises(FormatError, match="another comparison: it differs in saliency"):
            cross_attention_saliency(wb, words, resume=path, **(how | {"n_masks": 60}))
        with pytest.raises(WorkbenchError, match="no folder"):
            cross_attention_saliency(wb, words, resume=tmp_path / "none" / "a", **how)


def test_the_corpus_s_error_rate_is_that_of_all_words_against_the_references() -> None:
    model, _ = encoder_decoder("bart")
    how = QUICK | {"orders": ("attention", "random"), "decoding": {"max_new_tokens": 6}}
    with workbench.attach(model, Digits()) as wb:
        words = several("bart", [[7, 9, 11], [5, 6, 2]])
        words[0]["reference"], words[1]["reference"] = "7 9, 11!", "Five six seven eight nine ten"
        found = cross_attention_saliency(wb, words, **how)
        assert len(found.fractions) == 21
        assert found.reference_words.tolist() == [3, 6]
        table = found.corpus_areas
        errors = found.reference_errors[:, 0, 0].numpy()
        rates = [min(100.0, 100 * errors[:, step].sum() / 9) for step in range(21)]
        by_hand = sum((a + b) / 2 * 5 for a, b in pairwise(rates)) / 100  # percent times percent
        row = table.set_index(["curve", "order"]).loc[("deletion", "attention")]
        assert row["area"] == pytest.approx(by_hand)
        assert row["words"] == 9
        assert row["low"] <= row["area"] + 1e-9
        assert row["area"] <= row["high"] + 1e-9
        plain = [{key: one[key] for key in ("input_ids", "labels")} for one in words]
        for given, options, says in (
            (plain, {"fractions": (0, 1)}, "other steps"),
            (plain, {"orders": ()}, "no curves"),
            (words, {"decode_again": False}, "no utterance has a reference"),
        ):
            with pytest.raises(WorkbenchError, match=says):
                _ = cross_attention_saliency(wb, given, **(how | options)).corpus_areas


def brute_force(cost: Tensor) -> float:
    """Least cost of a monotone path through [token, position], by walking all of them."""
    n, m = cost.shape

    def walk(i: int, j: int) -> float:
        here = float(cost[i, j])
        if (i, j) == (n - 1, m - 1):
            return here
        steps = [(i + 1, j), (i, j + 1), (i + 1, j + 1)]
        return here + min(walk(a, b) for a, b in steps if a < n and b < m)

    return walk(0, 0)


@pytest.mark.parametrize(("n", "m"), [(1, 5), (3, 6), (4, 4), (5, 3)])
def test_alignment_is_the_best_monotone_path(n: int, m: int) -> None:
    from workbench.analysis.saliency.normalising import standardised

    for seed in range(5):
        maps = torch.rand(n, m, generator=torch.Generator().manual_seed(seed))
        spans = align(maps)
        assert spans[0, 0] == 0
        assert spans[-1, 1] == m - 1
        cost = -standardised(maps.double())
        along = 0.0
        for i, (first, last) in enumerate(spans.tolist()):
            assert first <= last
            along += float(cost[i, first : last + 1].sum())
            if i:
                assert first - int(spans[i - 1, 1]) in (0, 1)
        assert along == pytest.approx(brute_force(cost), abs=1e-9)
    assert disagreement(torch.tensor([[0, 3]]), torch.tensor([[1, 2]])).tolist() == [0.0]
    with pytest.raises(WorkbenchError, match="finite map"):
        align(torch.full((2, 2), math.nan))


@pytest.mark.parametrize("name", NAMES)
def test_several_utterances_of_every_kind(name: str, tmp_path: Path) -> None:
    inputs = [encoder_decoder(name, seed)[1] | {"labels": HYPOTHESIS, "name": f"u{seed}"} for seed in range(3)]
    model, _ = encoder_decoder(name)
    with workbench.attach(model) as wb:
        found = cross_attention_saliency(
            wb, inputs, n_masks=30, granularities=(100,), fractions=(0, 0.5, 1), keep=2, alignment_heads=[(1, 0)],
            progress=False,
            orders=("attention", "pooled input saliency"), batch_size=32,
        )  # fmt: skip
    assert found.utterances == ("u0", "u1", "u2")
    assert len(found.aggregates) == 2 * 4 + 2 + 4 + 1 + 1
    assert found.correlations.shape == (3, 16, 2, 2)
    assert found.correlations.abs().max() <= 1
    assert not found.undefined
    assert found.curves.shape == (3, 2, 2, 3, 3)
    torch.testing.assert_close(found.curves[:, :, 0, 0], found.curves[:, :, 1, 2])
    interval = found.interval("input")
    assert (interval[:, 0] <= found.of("input") + 1e-9).all()
    assert (found.of("input") <= interval[:, 1] + 1e-9).all()
    assert len(found.maps) == 2
    one = found.maps[0]
    assert one["attention"].shape[2:] == one["pooled_input_saliency"].shape == one["encoder_saliency"].shape
    assert len(found.table) == 16 * 2 * 2
    assert set(found.areas["order"]) == set(found.orders)
    assert len(found.size_table) == 2
    assert found.alignment_table["disagreement"].min() >= 0
    head = found.aggregates.index("L1H0")
    torch.testing.assert_close(found.of()[found.aggregates.index("alignment heads")], found.of()[head])
    assert found.by_head().shape == (2, 4)
    again = CrossAttentionSaliency.load(found.save(tmp_path / "study.safetensors"))
    assert torch.equal(again.correlations, found.correlations)
    assert repr(again) == repr(found)


def test_decoding_again_is_compared_with_the_model_s_own_hypothesis() -> None:
    model, inputs = encoder_decoder("t5")
    subject = prepare_input(model, inputs, max_new_tokens=4)
    limit = {"max_new_tokens": 4}
    found = curves(subject, torch.arange(7.0), (0, 1), decoding=limit)
    assert float(found[0, 0, 2]) == float(found[1, 1, 2]) == 0
    assert float(found[0, 1, 2]) == float(found[1, 0, 2])


def test_precomputed_saliency_and_refusals() -> None:
    model, inputs = encoder_decoder("bart")
    given = inputs | {"labels": HYPOTHESIS}
    with workbench.attach(model) as wb:
        pair = (
            saliency(wb, given, "occlusion", progress=False),
            saliency(wb, given, "occlusion", at="encoder", progress=False),
        )
        found = cross_attention_saliency(wb, given, [pair], orders=(), progress=False)
        assert found.method == "occlusion"
        assert found.interval().isnan().all()
        direct = cross_attention_saliency(wb, given, "occlusion", orders=(), progress=False)
        assert torch.equal(found.correlations, direct.correlations)
        for arguments, options, words in (
            ([given, "spess"], {}, 'did you mean "spes"'),
            ([given, "encoder_output"], {}, "no method"),
            ([[], "spes"], {}, "no utterance"),
            ([given, "spes"], {"hypothesis": "a word"}, "hypothesis is no option"),
            ([given, [pair, pair]], {}, "2 pairs"),
            ([given, [pair]], {"orders": ("atention",)}, "did you mean"),
            ([given, [pair[::-1]]], {}, "encoder's output"),
            ([given, [pair]], {"level": 1.0}, "level lies"),
            ([given, [pair]], {"fractions": (0, 2)}, "fractions lie"),
            ([given | {"labels": HYPOTHESIS.flip(0)}, [pair]], {}, "explains .* and the model says"),
            ([given, [pair]], {"pooling": "maxx"}, 'did you mean "max"'),
            ([given, [pair]], {"weighting": "none"}, "no weighting"),
        ):
            with pytest.raises(WorkbenchError, match=words):
                cross_attention_saliency(wb, *arguments, **({"progress": False} | options))
