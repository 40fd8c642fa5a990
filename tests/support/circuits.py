"""Small models whose circuits are known, and tasks on random models."""

from __future__ import annotations

import torch
from torch import nn
from transformers import GraniteConfig, GraniteForCausalLM, MBartConfig, MBartForConditionalGeneration

from support.encoder_decoders import captioner
from support.hybrid_models import SUMS, hybrid
from support.tiny import VOCABULARY, family, make
from workbench.models.planted import SlotModel
from workbench.models.planted import Words as Words
from workbench.tasks import Task, from_inputs, from_prompts


def random_task(n: int, length: int, vocabulary: int, seed: int = 0, lengths: int = 1, written: bool = False) -> Task:
    """Random words, twins with one or two of them replaced, random answers; `lengths` different lengths.

    With `written` a decoder has written one or two words.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(size: int) -> list[int]:
        return torch.randint(3, vocabulary, (size,), generator=generator).tolist()

    prompts, twins, answers, wrong = [], [], [], []
    for i in range(n):
        words = draw(length + i % lengths)
        other = list(words)
        other[1] = 3 + (words[1] - 2) % (vocabulary - 3)
        other[-2] = 3 + (words[-2] - 2) % (vocabulary - 3)
        prompts.append(" ".join(f"w{word}" for word in words))
        twins.append(" ".join(f"w{word}" for word in other))
        first = draw(1)[0]
        answers.append(f" w{first}")
        wrong.append(f" w{3 + (first - 2) % (vocabulary - 3)}")
    texts = ["w9 w8" if lengths > 1 and i % 2 else "w7" for i in range(n)] if written else None
    return from_prompts(prompts, twins, answers, wrong, name="random", positions={"early": 1}, written=texts)


def random_clips(n: int, seed: int = 0) -> Task:
    """Random spectrograms for the tiny Whisper, in which one sound or another is heard, and two words written."""
    generator = torch.Generator().manual_seed(seed)
    clips = torch.randn(n, 8, 40, generator=generator, dtype=torch.float64)
    twins = clips.clone()
    one, other = 4 * torch.randn(2, 8, 12, generator=generator, dtype=torch.float64)
    clips[:, :, 10:22] += one
    twins[:, :, 10:22] += other
    ids = torch.tensor([[3, 9, 5]]).repeat(n, 1)
    return from_inputs(
        {"input_features": clips, "decoder_input_ids": ids}, {"input_features": twins, "decoder_input_ids": ids},
        [7] * n, [20] * n, name="clips", positions={"early": 6},
    )  # fmt: skip


def random_images(n: int, seed: int = 0) -> Task:
    """Random images for the tiny captioner, whose upper half shows one thing or another, and two words written."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, 16, 16, generator=generator, dtype=torch.float64)
    twins = images.clone()
    one, other = 2 * torch.randn(2, 3, 8, 16, generator=generator, dtype=torch.float64)
    images[:, :, :8] += one
    twins[:, :, :8] += other
    ids = torch.tensor([[1, 9, 5]]).repeat(n, 1)
    return from_inputs(
        {"pixel_values": images, "decoder_input_ids": ids}, {"pixel_values": twins, "decoder_input_ids": ids},
        [7] * n, [20] * n, name="images", positions={"early": 1},
    )  # fmt: skip


ENCODER_DECODERS = ("t5", "mbart", "whisper", "captioner")


def task_for(name: str, n: int, lengths: int = 1) -> Task:
    """A random task for a tiny model of that name."""
    if name in ("whisper", "captioner"):
        return random_clips(n) if name == "whisper" else random_images(n)
    return random_task(n, 6, 60, lengths=lengths, written=name in ENCODER_DECODERS)


def tiny(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A tiny random model of the zoo, or a hybrid; mBART, which is BART with its norms first; or a captioner."""
    others = {"mbart": _mbart, "granite": _granite, "captioner": captioner}
    others |= {each: lambda each=each: hybrid(each) for each in SUMS}
    model = (others[name]() if name in others else make(family(name))).to(dtype)
    if name in ("t5", "mbart", "whisper"):  # large weights, so that what the encoder reads matters to the logits
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(3)
    return model


def _mbart() -> nn.Module:
    torch.manual_seed(0)
    config = MBartConfig(
        encoder_layers=2, decoder_layers=2, d_model=32, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=2, init_std=0.1,
    )  # fmt: skip
    return MBartForConditionalGeneration(config).eval()


def _granite() -> nn.Module:
    """Llama with shared keys, in which 0.37 of what heads and MLPs give is added to the stream."""
    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, embedding_multiplier=3.0, residual_multiplier=0.37, logits_scaling=4.0,
        attention_multiplier=0.4, initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    return GraniteForCausalLM(config).eval()


def induction_model() -> tuple[SlotModel, Task]:
    """L0H1 notes the token before; L1H2 looks for the present token among these notes, and copies the token there.

    In the twin the first words of two pairs change places, so that the answer comes from the other pair.
    """
    model = SlotModel()
    n, p = model.vocabulary, model.positions
    token, place = torch.eye(n, model.d_head), torch.eye(p, model.d_head)
    before = torch.zeros(p, model.d_head)
    before[torch.arange(1, p), torch.arange(p - 1)] = 1
    model.wire(0, 1, {"q": ("position", 12 * before), "k": ("position", place), "v": ("token", token)}, "note")
    note = torch.eye(model.slots["note"].stop - model.slots["note"].start, model.d_head)
    model.wire(1, 2, {"q": ("token", 3 * token), "k": ("note", note), "v": ("token", token)}, "output")
    prompts, twins, answers, wrong = [], [], [], []
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        a, b, c, d, e = torch.randperm(n, generator=generator)[:5].tolist()
        for texts, words in ((prompts, (e, a, b, c, d, e, a)), (twins, (e, c, b, a, d, e, a))):
            texts.append(" ".join(f"w{word}" for word in words))
        answers.append(f" w{b}")
        wrong.append(f" w{d}")
    return model, from_prompts(prompts, twins, answers, wrong, name="planted induction")


INDUCTION_EDGES = ("input->a0.h1<v>", "a0.h1->a1.h2<k>", "a1.h2->logits")


def mover_model() -> tuple[SlotModel, Task]:
    """L0H2 brings the cue at the start to the end; L1H0 there looks at the place that the cue names, and copies it."""
    model = SlotModel()
    n, p = model.vocabulary, model.positions
    token, place = torch.eye(n, model.d_head), torch.eye(p, model.d_head)
    first = torch.zeros(p, model.d_head)
    first[:, 0] = 12
    model.wire(0, 2, {"q": ("position", first), "k": ("position", place), "v": ("token", token)}, "note")
    note = torch.eye(model.slots["note"].stop - model.slots["note"].start, model.d_head)
    model.wire(1, 0, {"q": ("note", 4 * note), "k": ("position", place), "v": ("token", token)}, "output")
    prompts, twins, answers, wrong = [], [], [], []
    generator = torch.Generator().manual_seed(0)
    for i in range(6):
        x, y, z = (5 + torch.randperm(n - 5, generator=generator)[:3]).tolist()
        for texts, cue in ((prompts, 1 + i % 2), (twins, 2 - i % 2)):
            texts.append(f"w{cue} w{x} w{y} w{z}")
        right, other = (x, y) if i % 2 == 0 else (y, x)
        answers.append(f" w{right}")
        wrong.append(f" w{other}")
    return model, from_prompts(prompts, twins, answers, wrong, name="planted mover")
