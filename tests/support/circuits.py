"""Small models whose circuits are known, a tokenizer of words for them, and tasks on random models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GraniteConfig, GraniteForCausalLM, MBartConfig, MBartForConditionalGeneration

from support.encoder_decoders import captioner
from support.hybrid_models import SUMS, hybrid
from support.tiny import VOCABULARY, family, make
from workbench.tasks import Task, from_inputs, from_prompts


class Words:
    """A tokenizer that knows the words w0, w1, … and gives them these numbers."""

    is_fast = False
    unk_token_id = None
    padding_side = "right"

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [int(word.removeprefix("w")) for word in text.split()]}

    def decode(self, ids: list[int], **settings: bool) -> str:
        return " ".join(f"w{i}" for i in ids)


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


class SlotAttention(nn.Module):
    """Causal attention whose matrices are written by hand."""

    def __init__(self, d_model: int, n_heads: int, d_head: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.q, self.k, self.v = (nn.Linear(d_model, n_heads * d_head, bias=False) for _ in "qkv")
        self.o = nn.Linear(n_heads * d_head, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        z = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
        return self.o(z.transpose(1, 2).flatten(2))


class SlotBlock(nn.Module):
    """Attention on the residual stream, without norm and MLP."""

    def __init__(self, d_model: int, n_heads: int, d_head: int) -> None:
        super().__init__()
        self.attn = SlotAttention(d_model, n_heads, d_head)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(x)


class SlotModel(nn.Module):
    """An attention-only model whose residual stream has slots: token, position, note, and output.

    All weights are small noise until `wire` writes a head.
    """

    def __init__(self, vocabulary: int = 12, positions: int = 10, layers: int = 2, heads: int = 3, noise: float = 0.01):
        super().__init__()
        self.vocabulary, self.positions = vocabulary, positions
        sizes = {"token": vocabulary, "position": positions, "note": max(vocabulary, positions), "output": vocabulary}
        self.slots, start = {}, 0
        for name, size in sizes.items():
            self.slots[name] = slice(start, start + size)
            start += size
        self.d_head = max(vocabulary, positions)
        self.embed, self.place = nn.Embedding(vocabulary, start), nn.Embedding(positions, start)
        self.blocks = nn.ModuleList(SlotBlock(start, heads, self.d_head) for _ in range(layers))
        self.unembed = nn.Linear(start, vocabulary, bias=False)
        torch.manual_seed(0)
        with torch.no_grad():
            for block in self.blocks:
                for part in block.attn.children():
                    part.weight.normal_(std=noise)
            self.embed.weight.zero_()[:, self.slots["token"]] = torch.eye(vocabulary)
            self.place.weight.zero_()[:, self.slots["position"]] = torch.eye(positions)
            self.unembed.weight.zero_()[:, self.slots["output"]] = torch.eye(vocabulary)
        self.double().eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        x = self.embed(input_ids) + self.place(torch.arange(input_ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return SimpleNamespace(logits=self.unembed(x))

    def wire(self, layer: int, head: int, reads: dict[str, tuple[str, Tensor]], writes: str, gain: float = 1.0) -> None:
        """Write one head: for q, k and v a slot and a map [slot width, head width]; and the slot it writes its v to."""
        attention = self.blocks[layer].attn
        rows = slice(head * self.d_head, (head + 1) * self.d_head)
        with torch.no_grad():
            for part, (slot, matrix) in reads.items():
                weight = getattr(attention, part).weight[rows]
                weight.zero_()[: matrix.shape[1], self.slots[slot]] = matrix.T.to(weight.dtype)
            out = self.slots[writes]
            attention.o.weight[:, rows] = 0
            attention.o.weight[out, rows] = gain * torch.eye(out.stop - out.start, self.d_head, dtype=torch.float64)


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
