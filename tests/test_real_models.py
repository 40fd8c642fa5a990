"""Real trained models, out of PyPI packages: Whisper base and MiniLM verify, and equal their eager selves."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import workbench
from support.against_eager import COLUMNS, ROWS, assert_equal_to_eager
from support.tiny import ENCODER_DECODER, ONE_TOWER, eager_attentions


@pytest.fixture(scope="module")
def speech_inputs(whisper_base: Path) -> dict[str, torch.Tensor]:
    """Two seconds of a rising tone in noise as features, and a teacher-forced transcript."""
    rate, seconds = 16_000, 2
    time = torch.arange(rate * seconds) / rate
    wave = 0.3 * torch.sin(2 * torch.pi * (200 + 200 * time) * time)
    wave += 0.01 * torch.randn(len(wave), generator=torch.Generator().manual_seed(0))
    extract = hf.WhisperFeatureExtractor.from_pretrained(whisper_base)
    features = extract(wave.numpy(), sampling_rate=rate, return_tensors="pt").input_features
    tokenizer = hf.AutoTokenizer.from_pretrained(whisper_base)
    ids = tokenizer("The quick brown fox jumps over the lazy dog.", add_special_tokens=False).input_ids
    return {"input_features": features, "decoder_input_ids": torch.tensor([[50258, 50259, 50359, 50363, *ids]])}


def _of_three_seconds(model: Any) -> Any:
    """Whisper with the first 150 of its encoder's 1,500 positions: all else is as it was trained."""
    short = copy.deepcopy(model)
    encoder = short.model.encoder
    short.config.max_source_positions = encoder.config.max_source_positions = encoder.max_source_positions = 150
    encoder.embed_positions = torch.nn.Embedding.from_pretrained(encoder.embed_positions.weight[:150])
    return short


@pytest.mark.slow
@torch.no_grad()
def test_whisper_base(whisper_base: Path, speech_inputs: dict[str, torch.Tensor]) -> None:
    model, _ = workbench.models.load(whisper_base)
    bare = model(**speech_inputs).logits
    with workbench.attach(model) as wb:
        assert [wb.sites[i].kind for i in (0, 6, 7)] == ["self", "self", "cross"]
        assert len(wb.sites) == 18
        with wb.capture((*ROWS, *COLUMNS)) as capture:
            observed = model(**speech_inputs).logits
    assert torch.equal(bare, observed)
    # Verifying takes some thirty forwards: of three seconds, whose every row is looked at.
    with workbench.attach(_of_three_seconds(model)) as wb:
        found = wb.verify(**speech_inputs | {"input_features": speech_inputs["input_features"][..., :300]})
    assert len(found.checks) == 18
    assert found.ok, found.table
    eager = eager_attentions(model, [site.name for site in capture.sites], speech_inputs)
    for layer in range(1, 5):
        seen = capture[f"encoder.{layer}.self_attn"].pattern.dense()
        torch.testing.assert_close(seen, eager["encoder_attentions"][layer], atol=1e-5, rtol=1e-5)
    # Statistics in float64 on maps of 1500 x 1500 are made of the first and the last layer.
    assert assert_equal_to_eager(capture, eager, ENCODER_DECODER, {"encoder_attentions": (0, 5)}) == 14
    cross = capture["decoder.5.cross_attn"]
    assert cross.shape[-1] == 1500


@torch.no_grad()
def test_minilm(minilm: Path) -> None:
    model, tokenizer = workbench.models.load(minilm)
    texts = [
        "A man is eating food.",
        "Attention heads of a sentence encoder, looked at one by one, are a strange crowd.",
    ]
    with workbench.attach(model, tokenizer) as wb:
        inputs = wb.tokenize(texts)
        bare = model(**inputs).last_hidden_state
        found = wb.verify(**inputs)
        with wb.capture((*ROWS, *COLUMNS)) as capture:
            observed = model(**inputs).last_hidden_state
    assert found.ok, found.table
    assert torch.equal(bare, observed)
    eager = eager_attentions(model, [site.name for site in capture.sites], inputs)
    assert assert_equal_to_eager(capture, eager, ONE_TOWER) == 6
    tokens = capture.query_tokens("blocks.0.attn")
    assert tokens is not None
    assert tokens[0][:4] == ["[CLS]", "a", "man", "is"]
