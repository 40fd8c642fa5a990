"""Saliency of real architectures: against one plain forward per mask, and captum's methods against definitions."""

from __future__ import annotations

from itertools import product
from typing import Any, ClassVar

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

import workbench
from support.encoder_decoders import HYPOTHESIS, NAMES, encoder_decoder
from workbench import Saliency, saliency
from workbench.analysis.saliency.masks import Masks
from workbench.analysis.saliency.segments import superpixels


def explained(name: str, method: str = "spes", **options: Any) -> tuple[Saliency, nn.Module, dict[str, Tensor]]:
    model, inputs = encoder_decoder(name)
    with workbench.attach(model) as wb:
        found = saliency(
            wb, inputs, method, **({"hypothesis": HYPOTHESIS, "progress": False, "batch_size": 32} | options)
        )
    return found, model, inputs


def decoder_ids(model: nn.Module) -> Tensor:
    return torch.tensor([[int(model.config.decoder_start_token_id), *HYPOTHESIS[:-1].tolist()]])


def kl(clean: Tensor, found: Tensor) -> Tensor:
    """[token] in float64."""
    p, q = clean.double().log_softmax(-1), found.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def conditional_means(masks: list[Tensor], scores: list[Tensor]) -> Tensor:
    """[token, segment] plain mean of the scores of the masks that hide a segment."""
    z, s = torch.stack(masks).double(), torch.stack(scores)
    return torch.stack([s[z[:, j] > 0].mean(0) for j in range(z.shape[1])], 1)


@torch.no_grad()
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_text_is_explained_token_by_token(name: str) -> None:
    found, model, inputs = explained(name)
    assert found.exact
    assert found.kind == "tokens"
    ids = decoder_ids(model)
    table = model.get_encoder().embed_tokens
    embedded = table(inputs["input_ids"])
    clean = model(**inputs, decoder_input_ids=ids).logits[0]
    masks, scores = [], []
    for mask in product([0, 1], repeat=7):
        z = torch.tensor(mask)
        masks.append(z)
        hidden = embedded * (1 - z)[None, :, None]
        scores.append(kl(clean, model(inputs_embeds=hidden, decoder_input_ids=ids).logits[0]))
    torch.testing.assert_close(found.scores.double(), conditional_means(masks, scores), atol=2e-6, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("baseline", ["zero", "mean"])
def test_the_encoder_output_is_explained_without_running_the_encoder(name: str, baseline: str) -> None:
    model, inputs = encoder_decoder(name)
    runs = []
    handle = model.get_encoder().register_forward_hook(lambda *_: runs.append(1))
    with workbench.attach(model) as wb:
        found = saliency(
            wb, inputs, "encoder_output", hypothesis=HYPOTHESIS, baseline=baseline, n_masks=60, exact=False,
            batch_size=16, progress=False,
        )  # fmt: skip
    handle.remove()
    assert found.details["cached"], "the decoder's cached keys and values were not used"
    assert len(runs) <= 3, "the encoder ran with the masks"
    ids = decoder_ids(model)
    output = model(**inputs, decoder_input_ids=ids)
    states = output.encoder_last_hidden_state
    empty = torch.zeros_like(states[:, :1]) if baseline == "zero" else states.mean(1, keepdim=True)
    masks, scores = [], []
    for m in range(60):
        z = Masks((states.shape[1],), 0.5, 0).at(m).hidden[0]
        masks.append(z)
        hidden = torch.where(z[None, :, None], empty, states)
        perturbed = model(encoder_outputs=BaseModelOutput(hidden), decoder_input_ids=ids)
        scores.append(kl(output.logits[0], perturbed.logits[0]))
    truth = conditional_means(masks, scores)
    torch.testing.assert_close(found.scores.double(), truth, atol=5e-6, rtol=1e-4)
    z, s = torch.stack(masks), torch.stack(scores)
    error = torch.stack([s[z[:, j]].std(0) / z[:, j].sum().sqrt() for j in range(z.shape[1])], 1)
    torch.testing.assert_close(found.standard_error.double(), error, atol=1e-5, rtol=1e-3)


@torch.no_grad()
def test_spectrograms_pool_all_granularities() -> None:
    found, model, inputs = explained("whisper", granularities=(100, 200), n_masks=40, batch_size=8, sigma=0.0)
    features = inputs["input_features"]
    maps = superpixels(features[0].T, (100, 200), sigma=0.0)
    assert all(torch.equal(a, b) for a, b in zip(maps, found.segments, strict=True))
    stream = Masks(tuple(int(one.max()) + 1 for one in maps), 0.5, 0)
    ids = decoder_ids(model)
    clean = model(**inputs, decoder_input_ids=ids).logits[0]
    total, mass = torch.zeros(4, 40, 8).double(), torch.zeros(40, 8).double()
    for m in range(40):
        z = stream.at(m).hidden[0][maps[m % 2]].double()  # [time, frequency]
        score = kl(clean, model(features * (1 - z.T.float())[None], decoder_input_ids=ids).logits[0])
        total += z * score[:, None, None]
        mass += z
    torch.testing.assert_close(found.scores.double(), total / mass, atol=2e-6, rtol=1e-4)
    assert found.picture is not None
    assert torch.equal(found.picture, features[0].T)


def test_the_number_of_superpixels_follows_the_length() -> None:
    generator = torch.Generator().manual_seed(0)
    for frames, target, wanted in ((500, 100, 100), (250, 100, 50), (1000, 100, 150), (3, 100, 1)):
        (found,) = superpixels(torch.randn(frames, 20, generator=generator), (target,), sigma=0.0, compactness=10.0)
        assert 0.6 * wanted <= int(found.max()) + 1 <= 1.4 * wanted + 1
        assert found.unique().numel() == int(found.max()) + 1


def test_images_are_explained_patch_by_patch() -> None:
    found, model, inputs = explained("captioner")
    assert (found.kind, found.grid, found.exact) == ("patches", (2, 2), True)
    ids, pixels = decoder_ids(model), inputs["pixel_values"]
    with torch.no_grad():
        clean = model(pixel_values=pixels, decoder_input_ids=ids).logits[0]
        masks, scores = [], []
        for mask in product([0, 1], repeat=4):
            z = torch.tensor(mask)
            masks.append(z)
            cells = z.view(2, 2).repeat_interleave(8, 0).repeat_interleave(8, 1)
            scores.append(kl(clean, model(pixel_values=pixels * (1 - cells), decoder_input_ids=ids).logits[0]))
    torch.testing.assert_close(found.scores.double(), conditional_means(masks, scores), atol=2e-6, rtol=1e-4)


def test_padding_is_left_alone() -> None:
    model, inputs = encoder_decoder("whisper")
    mask = torch.zeros(1, 40, dtype=torch.long)
    mask[:, :21] = 1
    with workbench.attach(model) as wb:
        given = inputs | {"attention_mask": mask}
        own = saliency(wb, given, hypothesis=HYPOTHESIS, n_masks=12, granularities=(100,), progress=False)
        theirs = saliency(wb, given, "encoder_output", hypothesis=HYPOTHESIS, n_masks=12, progress=False)
    assert own.scores.shape == (4, 21, 8)
    assert theirs.scores.shape == (4, 11)
    assert (own.length, theirs.length) == (40, 20)


def test_previous_tokens_are_explained_below_the_diagonal() -> None:
    found, _, _ = explained("bart", p_tokens=0.4, n_masks=300, batch_size=50)
    assert found.token_scores is not None
    assert not found.token_scores.triu().any()
    below = found.token_scores.tril(-1)[torch.ones(4, 4).tril(-1) > 0]
    assert (below > 0).all()
    maps, tokens = found.normalised()
    assert tokens is not None
    causal = torch.ones(4, 4, dtype=torch.bool).tril(-1)
    for k in range(4):
        both = torch.cat([maps[k].flatten(), tokens[k][causal[k]]])
        assert float(both.min()) == 0
        assert float(both.max()) == pytest.approx(1)


def log_prob(model: nn.Module, states: Tensor) -> Tensor:
    """[token] log-probabilities of the hypothesis from encoder outputs."""
    output = model(encoder_outputs=BaseModelOutput(states), decoder_input_ids=decoder_ids(model))
    return output.logits[0].log_softmax(-1).gather(1, HYPOTHESIS[:, None])[:, 0]


@pytest.mark.parametrize("name", NAMES)
def test_captum_at_the_encoder_keeps_to_its_definitions(name: str) -> None:
    common = {"at": "encoder", "n_segments": 100}
    model, inputs = encoder_decoder(name)
    states = model(**inputs, decoder_input_ids=decoder_ids(model)).encoder_last_hidden_state.detach()
    n = states.shape[1]
    with workbench.attach(model) as wb:

        def run(method: str, **options: Any) -> Tensor:
            return saliency(
                wb, inputs, method, hypothesis=HYPOTHESIS, progress=False, **(common | options)
            ).scores.double()

        own = states.clone().requires_grad_()
        for k in range(4):
            (gradient,) = torch.autograd.grad(log_prob(model, own)[k], own)
            wanted = (gradient * states)[0].sum(-1).double()
            torch.testing.assert_close(run("gradient_x_input")[k], wanted, atol=1e-5, rtol=1e-3)
        with torch.no_grad():
            clean = log_prob(model, states)
            drops = []
            for j in range(n):
                without = states.clone()
                without[:, j] = 0
                drops.append(clean - log_prob(model, without))
            wanted = torch.stack(drops, 1).double()
        torch.testing.assert_close(run("occlusion"), wanted, atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(run("feature_ablation"), wanted, atol=1e-5, rtol=1e-3)
        complete = run("integrated_gradients", n_steps=100).sum(1)
        whole = (clean - log_prob(model, torch.zeros_like(states))).detach().double()
        torch.testing.assert_close(complete, whole, atol=0.05, rtol=0.02)


def test_kernel_shap_is_additive_and_states_its_spread() -> None:
    found, model, inputs = explained("bart", "kernel_shap", n_masks=240)
    assert found.standard_error.shape == found.scores.shape
    assert (found.standard_error > 0).all()
    ids = decoder_ids(model)
    with torch.no_grad():
        embedded = model.get_encoder().embed_tokens(inputs["input_ids"])
        logits = [
            model(inputs_embeds=one, decoder_input_ids=ids).logits[0] for one in (embedded, torch.zeros_like(embedded))
        ]
    own, empty = (one.log_softmax(-1).gather(1, HYPOTHESIS[:, None])[:, 0] for one in logits)
    torch.testing.assert_close(found.scores.sum(1), own - empty, atol=0.05, rtol=0.02)


def test_a_perturbing_method_runs_once_for_all_tokens() -> None:
    found, _, _ = explained("bart", "feature_ablation")
    assert found.details["evaluations"] == 7 + 1


def test_decodes_when_no_hypothesis_is_given() -> None:
    model, inputs = encoder_decoder("t5")
    model.generation_config.max_new_tokens = 4
    with workbench.attach(model) as wb:
        found = saliency(wb, inputs, "gradient_x_input", decoding={"max_new_tokens": 4}, progress=False)
    told = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, 1:]
    assert list(found.target_ids) == told.tolist()


def test_autocast_is_kept_in_mind() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found, _, _ = explained("bart", "encoder_output", n_masks=20)
    assert found.details["autocast"] == "bfloat16"
    assert explained("bart", "encoder_output", n_masks=20)[0].details["autocast"] is None


def test_processors_make_features_and_look_at_recordings() -> None:
    extractor = hf.WhisperFeatureExtractor(feature_size=8, chunk_length=1, hop_length=400)  # 40 frames
    model, _ = encoder_decoder("whisper")

    class Processor:
        feature_extractor = extractor

    time = torch.arange(8000) / 16_000
    audio = 0.3 * torch.sin(2 * torch.pi * 300 * time)
    with workbench.attach(model, Processor()) as wb:

        def run(**inputs: Any) -> Saliency:
            return saliency(wb, inputs, "encoder_output", hypothesis=HYPOTHESIS, n_masks=10, progress=False)

        found = run(audio=audio, sampling_rate=16_000)
        assert found.seconds_per_position == pytest.approx(0.05)
        assert found.scores.shape == (4, 10)
        for inputs, words in (
            ({"audio": audio, "sampling_rate": 8000}, "8000 samples per second, the model wants 16000"),
            ({"audio": audio}, "rate is not known"),
            ({"audio": torch.zeros(8000), "sampling_rate": 16_000}, "silent"),
            ({"audio": audio.repeat(3), "sampling_rate": 16_000}, "lasts 1.5 s, the model takes 1 s"),
            ({"audio": audio[None], "sampling_rate": 16_000}, "one channel"),
            ({"audio": audio * 32768, "sampling_rate": 16_000}, "goes far beyond ±1: its loudest sample is 9.83e"),
            ({"audio": (audio * 32768).short(), "sampling_rate": 16_000}, "of type int16"),
            ({"audio": audio / audio, "sampling_rate": 16_000}, "not finite"),
        ):
            with pytest.raises(workbench.WorkbenchError, match=words):
                run(**inputs)


def test_a_spectrogram_that_ends_in_padding_needs_its_mask() -> None:
    model, inputs = encoder_decoder("whisper")
    features = inputs["input_features"].clone()
    features[..., 23:] = features.min()
    how: dict[str, Any] = {"hypothesis": HYPOTHESIS, "n_masks": 10, "progress": False}
    with workbench.attach(model) as wb:
        with pytest.raises(workbench.WorkbenchError, match=r"last 17 of 40 frames.*\n?.*frames=: 23 without them, 40"):
            saliency(wb, {"input_features": features}, "encoder_output", **how)
        mask = (torch.arange(40) < 23).long()[None]
        by_mask = saliency(wb, {"input_features": features, "attention_mask": mask}, "encoder_output", **how)
        by_number = saliency(wb, {"input_features": features}, "encoder_output", frames=23, **how)
        assert torch.equal(by_mask.scores, by_number.scores)
        assert by_mask.positions == 12
        assert saliency(wb, {"input_features": features}, "encoder_output", frames=40, **how).positions == 20


def test_time_stamps_are_no_words() -> None:
    class Tokenizer:
        all_special_ids: ClassVar[list[int]] = [0, 1, 2]
        added_tokens_decoder: ClassVar[dict[int, str]] = {50: "<|0.00|>", 52: "<|1.40|>"}  # not special, as Whisper's

        def decode(self, ids: list[int], **_: Any) -> str:
            return " ".join(map(str, ids))

        def convert_ids_to_tokens(self, index: int) -> str:
            return str(index)

    model, inputs = encoder_decoder("whisper")
    with workbench.attach(model, Tokenizer()) as wb:
        said = torch.tensor([50, 7, 9, 52, 2])
        found = saliency(wb, inputs, "encoder_output", hypothesis=said, n_masks=10, progress=False)
        assert found.special == (True, False, False, True, True)

    class Short(Tokenizer):
        added_tokens_decoder: ClassVar[dict[int, str]] = {}

        def __len__(self) -> int:
            return 50  # it has no time stamps

    with workbench.attach(model, Short()) as wb:
        found = saliency(wb, inputs, "encoder_output", hypothesis=said, n_masks=10, progress=False)
        assert found.special == (True, False, False, True, True)
    model.generation_config.no_timestamps_token_id = 49  # what Whisper's own configuration says
    with workbench.attach(model) as wb:
        found = saliency(wb, inputs, "encoder_output", hypothesis=said, n_masks=10, progress=False)
        assert found.special == (True, False, False, True, True)


def _with_norms(kind: str) -> nn.Module:
    """A T5 and a T5Gemma (shared keys), whose RMS norms take embeddings of zero and those near it for very different
    ones; and a BART, whose layer norms and positions do not."""
    torch.manual_seed(0)
    if kind == "t5":
        model: nn.Module = hf.T5ForConditionalGeneration(
            hf.T5Config(vocab_size=40, d_model=16, d_kv=8, num_layers=2, num_heads=2, d_ff=32, decoder_start_token_id=0)
        )
    else:
        return encoder_decoder(kind)[0]
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize("kind", ["t5", "t5gemma", "bart"])
def test_integrated_gradients_say_how_far_they_are_from_complete(kind: str) -> None:
    model, ids = _with_norms(kind), torch.tensor([[5, 9, 13, 7, 21, 30]])
    with workbench.attach(model) as wb:
        how: dict[str, Any] = {"hypothesis": torch.tensor([8, 11, 4, 17]), "progress": False, "batch_size": 32}

        def run(method: str = "integrated_gradients", **options: Any) -> Saliency:
            return saliency(wb, {"input_ids": ids}, method, **(how | options))

        if kind == "bart":
            zero = run()
            assert zero.details["completeness_gap"] < 0.05
        else:
            with pytest.warns(UserWarning, match=r'miss \d+% of what they should sum to.*baseline="pad"'):
                zero = run()
            assert zero.details["completeness_gap"] > 0.5
        change, off = (torch.tensor(zero.details[name]) for name in ("change", "convergence_delta"))
        torch.testing.assert_close(zero.scores.sum(1), change + off, atol=1e-4, rtol=1e-4)
        assert f"sums miss {zero.details['completeness_gap']:.1%}" in repr(zero)
        for baseline in ("pad", "mean"):
            found = run(baseline=baseline, n_steps=128)  # warns of nothing
            assert found.details["completeness_gap"] < 0.03
        embeddings = model.get_input_embeddings().weight
        tensor = embeddings[model.config.pad_token_id].expand(1, 6, -1) if kind == "t5" else None
        if tensor is not None:
            given = run(baseline=tensor.detach(), n_steps=128)
            torch.testing.assert_close(given.scores, run(baseline="pad", n_steps=128).scores)
        assert "completeness_gap" in run("gradient_x_input").details
