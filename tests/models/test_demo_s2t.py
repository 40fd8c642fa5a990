"""The demonstration speech model: its card, its clips, its training, and that its cross-attention follows the words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import workbench
from workbench.errors import WorkbenchError
from workbench.models import card, clips, digit_pairs, load
from workbench.models import loading as loading_module
from workbench.models.train_demo_s2t import (
    build_features,
    build_tokenizer,
    hear,
    new_model,
    targets,
    token_error,
    train,
)
from workbench.tasks import spoken_digits

FOLDER = Path(loading_module.__file__).parent / "shipped" / "demo-s2t"


def test_it_loads_ready_to_use_and_is_small() -> None:
    model, tokenizer = load("demo-s2t")
    assert not model.training
    assert model.config._attn_implementation == "sdpa"
    assert next(model.parameters()).dtype == torch.float32
    assert tokenizer.decode([3, 4, 12]) == "zero one nine"
    files = list(FOLDER.iterdir())
    assert sum(path.stat().st_size for path in files) <= 4e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}


def test_card_agrees_with_the_file() -> None:
    model, _ = load("demo-s2t")
    facts = card("demo-s2t")
    assert facts["token_error"] < 0.05
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["megabytes"] == pytest.approx((FOLDER / "model.safetensors").stat().st_size / 1e6, abs=0.01)


def test_it_writes_down_clips_of_voices_it_never_heard() -> None:
    model, _ = load("demo-s2t")
    made = spoken_digits.clips(30, seed=4321)
    assert token_error(model, made, build_features()) < 0.05


def test_clips_are_those_of_their_seed_and_their_features_those_of_the_waveforms() -> None:
    features, spoken = clips("demo-s2t")
    assert features.shape == (8, 40, 400)
    again = hear(spoken, build_features())
    assert torch.allclose(features, again, atol=2e-3)  # stored in half precision
    with pytest.raises(WorkbenchError, match="no clips ship"):
        clips("demo-lm")


def test_the_shipped_features_and_tokenizer_are_those_of_the_training() -> None:
    from transformers import AutoTokenizer, WhisperFeatureExtractor

    held = WhisperFeatureExtractor.from_pretrained(FOLDER)
    assert (held.feature_size, held.sampling_rate, held.chunk_length) == (40, spoken_digits.RATE, 4)
    assert AutoTokenizer.from_pretrained(FOLDER).get_vocab() == build_tokenizer().get_vocab()


def test_targets_are_shifted_and_padded() -> None:
    read, asked = targets([[0, 9], [5]])
    assert read.tolist() == [[1, 3, 12], [1, 8, 0]]
    assert asked.tolist() == [[3, 12, 2], [8, 2, -100]]


def test_token_error_counts_edits() -> None:
    class Writes(torch.nn.Module):
        def generate(self, input_features: torch.Tensor, **_: object) -> torch.Tensor:
            return torch.tensor([[1, 3, 4, 2], [1, 8, 2, 0]])

    said = [spoken_digits.Clip(digits, spoken_digits.clips(1)[0].waveform, ()) for digits in ((0, 1), (5, 6))]
    assert token_error(Writes(), said, build_features()) == 1 / 4


def test_training_repeats_to_the_bit() -> None:
    first, second = (new_model(3, n_layer=1, n_head=2, d_model=16) for _ in range(2))
    losses = [train(model, seed=1, steps=2, batch=2, n_voices=2) for model in (first, second)]
    assert losses[0] == losses[1]
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_cross_attention_of_the_last_layer_follows_the_words() -> None:
    model, _ = load("demo-s2t")
    features, spoken = clips("demo-s2t")
    inside = []
    with workbench.attach(model) as wb, torch.inference_mode():
        for row, clip in enumerate(spoken):
            read, _ = targets([clip.digits])
            with wb.capture(("entropy",)) as cap:
                model(input_features=features[row : row + 1], decoder_input_ids=read[:, :-1])
            # The row of the token before it is where a digit is chosen.
            rows = cap["model.decoder.layers.1.encoder_attn"].pattern.dense()[0].mean(0)
            for weights, (start, end) in zip(rows, clip.spans, strict=True):
                frames = torch.arange(len(weights)) * 0.02
                inside.append(float(weights[(frames >= start - 0.05) & (frames <= end + 0.05)].sum()))
    assert sum(inside) / len(inside) > 0.6  # a tenth of the clip, so 0.1 by chance


def test_the_circuit_of_a_digit_brings_it_over_by_the_last_cross_attention() -> None:
    model, tokenizer = load("demo-s2t")
    task = digit_pairs(12)
    assert task.accuracy(model, tokenizer) == 1
    with workbench.attach(model, tokenizer) as wb:
        patched = workbench.patch_heads(wb, task, "z", progress=False)
        best = patched.table["head"][:4].tolist()
        assert {head.rpartition(".")[0] for head in best} == {"decoder.1.cross_attn"}
        assert patched.scores[[patched.heads.index(head) for head in best]].sum() > 0.7
        circuit = workbench.find_circuit(wb, task, "eap_ig", progress=False)
        curve = workbench.faithfulness_curve(wb, circuit, task, fractions=(0.01, 0.1, 1.0), progress=False)
    assert curve.absolute[1] > 0.8 > 0.3 > curve.absolute[0]
    assert curve.absolute[2] == pytest.approx(1, abs=1e-5)
    assert circuit.n_edges <= 0.1 * circuit.graph.n_edges


def test_pairs_of_digits_stand_where_they_say() -> None:
    task = digit_pairs(3, seed=4)
    spoken = [clip for clip, _ in spoken_digits.pairs(3, seed=4)]
    for example, clip in zip(task, spoken, strict=True):
        start, end = clip.spans[1]
        assert start / 0.02 - 1 <= example.positions["word"] <= end / 0.02
    assert task[1:].positions("word") == task.positions("word")[1:]
    with pytest.raises(WorkbenchError, match="no clips ship"):
        digit_pairs(1, name="demo-lm")
