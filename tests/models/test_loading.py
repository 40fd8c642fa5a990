"""Loading by name: shipped models against their cards, local folders of several classes, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from workbench.errors import WorkbenchError
from workbench.models import ModelError, available, card, load
from workbench.models import loading as loading_module
from workbench.models.training.formats import held_out
from workbench.models.training.vocabulary import vocabulary

SHIPPED = Path(loading_module.__file__).parent / "shipped"
NAMES = ("demo-lm", "demo-lm-plateau")


@pytest.fixture(scope="module", params=NAMES)
def shipped(request: pytest.FixtureRequest) -> tuple[str, Any, Any]:
    return request.param, *load(request.param)


def test_available_lists_the_shipped_models() -> None:
    assert sorted(available()) == sorted([*NAMES, "demo-s2t", "demo-vit", "demo-vlm"])
    assert all(len(summary) > 20 for summary in available().values())


def test_shipped_model_is_ready_to_use(shipped: tuple[str, Any, Any]) -> None:
    _, model, tokenizer = shipped
    assert not model.training
    assert model.dtype == torch.float32
    assert model.config._attn_implementation == "sdpa"
    assert len(tokenizer) == model.config.vocab_size
    assert set(vocabulary()) <= set(tokenizer.get_vocab())
    assert tokenizer.model_max_length == model.config.n_positions
    assert type(model).__name__ == "GPT2LMHeadModel"


@pytest.mark.parametrize("name", NAMES)
def test_files_are_small_and_hold_no_pickle(name: str) -> None:
    files = list((SHIPPED / name).iterdir())
    assert sum(path.stat().st_size for path in files) <= 6e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}


def test_card_agrees_with_the_file(shipped: tuple[str, Any, Any]) -> None:
    name, model, _ = shipped
    facts = card(name)
    assert facts["model"] == name
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["megabytes"] == pytest.approx((SHIPPED / name / "model.safetensors").stat().st_size / 1e6, abs=0.01)


def test_accuracy_on_fresh_held_out_prompts_is_near_the_card(shipped: tuple[str, Any, Any]) -> None:
    name, model, tokenizer = shipped
    stated = card(name)["accuracy"]
    for task_name, task in held_out(150, seed=4242).items():
        assert task.accuracy(model, tokenizer) == pytest.approx(stated[task_name], abs=0.12), task_name


def test_demo_model_does_all_four_tasks() -> None:
    accuracy = card("demo-lm")["accuracy"]
    assert accuracy["ioi"] >= 0.95
    assert accuracy["colored_objects"] >= 0.95
    assert accuracy["induction"] >= 0.9
    assert accuracy["greater_than"] >= 0.9


def test_plateau_model_lacks_colored_objects_only() -> None:
    accuracy = card("demo-lm-plateau")["accuracy"]
    assert 0.2 <= accuracy["colored_objects"] <= 0.45
    assert min(accuracy[name] for name in ("ioi", "induction", "greater_than")) >= 0.9


def test_text_survives_the_tokenizer(shipped: tuple[str, Any, Any]) -> None:
    _, _, tokenizer = shipped
    text = "Then, Mary and John went to the store. John gave a drink to"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    ids = tokenizer("color is the cup?\nA:")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["color", "is", "the", "cup", "?", "\n", "A", ":"]
    assert tokenizer("Zanzibar")["input_ids"] == [tokenizer.unk_token_id]


def test_induction_reaches_as_far_as_the_card_says(shipped: tuple[str, Any, Any]) -> None:
    name, model, _ = shipped
    copies = [torch.randperm(300, generator=torch.Generator().manual_seed(seed))[:64] + 10 for seed in range(30)]
    ids = torch.stack([torch.cat([copy, copy]) for copy in copies])
    with torch.inference_mode():
        hits = (model(ids).logits[:, 64:127].argmax(-1) == ids[:, 65:128]).float()
    stated = card(name)["induction_by_position_of_earlier_copy"]
    for place, share in stated.items():
        start = int(place.split("-")[0])
        assert hits[:, start : start + 8].mean() == pytest.approx(share, abs=0.15), place
    assert min(stated["0-7"], stated["8-15"], stated["16-23"]) >= 0.95


# Local folders


def _bert(folder: Path, *, name_class: bool = True) -> Path:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        architectures=["BertModel"] if name_class else None,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


def test_folder_gives_the_class_its_configuration_names(tmp_path: Path) -> None:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    model, tokenizer = load(_bert(tmp_path / "bert"))
    assert type(model).__name__ == "BertModel"
    assert model.config._attn_implementation == "sdpa"
    assert not model.training
    assert tokenizer is None

    whisper = WhisperConfig(
        vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, max_source_positions=20,
        max_target_positions=20, num_mel_bins=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    WhisperForConditionalGeneration(whisper).save_pretrained(tmp_path / "whisper")
    assert type(load(str(tmp_path / "whisper"))[0]).__name__ == "WhisperForConditionalGeneration"


def test_folder_without_sdpa_keeps_the_default_attention(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import DebertaV2Config, DebertaV2Model

    config = DebertaV2Config(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    DebertaV2Model(config).save_pretrained(tmp_path)
    with caplog.at_level("WARNING", logger="workbench.models.loading"):
        model, _ = load(tmp_path)
    assert type(model).__name__ == "DebertaV2Model"
    assert "SDPA" in caplog.text


def test_folder_without_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        load(tmp_path)


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (_bert(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(tmp_path)


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    weights = _bert(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(tmp_path)


def test_missing_path_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", str(tmp_path / "nowhere"), "./nowhere"):
        with pytest.raises(ModelError, match=r"there is no folder '.*nowhere'"):
            load(path)


# Names


@pytest.mark.parametrize("name", ["demo-lmm", "demo_lm", "Demo-LM-plateu"])
def test_a_slip_in_a_shipped_name_is_answered_with_the_right_one(name: str) -> None:
    with pytest.raises(ModelError, match='did you mean "demo-lm'):
        load(name)


def test_hub_name_without_network_says_what_ships(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(source: object, **options: object) -> None:
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr(loading_module, "_load_from", unreachable)
    with pytest.raises(
        WorkbenchError, match=r"demo-lm, demo-lm-plateau, demo-s2t, demo-vit, demo-vlm.*cannot be reached"
    ) as caught:
        load("gpt2-small")
    assert caught.value.hint is not None
    assert "go online" in caught.value.hint


def test_name_the_hub_does_not_know_says_what_ships(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(source: object, **options: object) -> None:
        raise OSError("nobody/nothing is not a valid model identifier\nmore lines")

    monkeypatch.setattr(loading_module, "_load_from", unknown)
    with pytest.raises(ModelError, match=r"nor can it be loaded.*not a valid model identifier"):
        load("nobody/nothing")


def test_short_names_become_hub_names(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(loading_module, "_load_from", asked.append)
    for name in ("gpt2-small", "gpt2", "pythia-70m"):
        load(name)
    assert asked == ["gpt2", "gpt2", "EleutherAI/pythia-70m"]


def test_unknown_card_names_the_nearest() -> None:
    with pytest.raises(ModelError, match="demo-lm"):
        card("demo-l")
