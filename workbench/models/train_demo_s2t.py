"""Trains the demonstration speech-to-text model that ships with the package, on digits spoken by a formula.

    python -m workbench.models.train_demo_s2t --out DIR --seed 0

A small Whisper reads log-mel spectrograms of four seconds and writes one token per digit. The voices of its training
are drawn once; the digits, pauses, loudness and noise of every clip are new in every step. Clips of one to three digits
come first: with short strings the decoder soon learns where to look, with long ones it guesses for long.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from workbench.models.loading import load
from workbench.models.speech import N_CLIPS, save_clips
from workbench.storage import disk
from workbench.tasks.spoken_digits import MOST, RATE, SECONDS, WORDS, Clip, Voice, clips, say, word

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)
N_MELS = 40
PAD, START, END = "<pad>", "<start>", "<end>"
N_VOICES = 300
BATCH = 32
STEPS = 2400
SHORT_STEPS = 700
RATE_OF_LEARNING = 1e-3
WARM_UP = 100
HELD_OUT_SEED = 777
N_CARD = 500


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per digit's word, and padding, start and end."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate((PAD, START, END, *WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=PAD, bos_token=START, eos_token=END)


def build_features() -> WhisperFeatureExtractor:
    """Whisper's log-mel features with fewer bands and clips of four seconds: [clip, 40, 400]."""
    return WhisperFeatureExtractor(feature_size=N_MELS, sampling_rate=RATE, chunk_length=int(SECONDS))


def new_model(seed: int, *, n_layer: int = 2, n_head: int = 4, d_model: int = 128) -> WhisperForConditionalGeneration:
    """A small Whisper.

    Args:
        seed: of the weights.
        n_layer: blocks of encoder and decoder. n_head: heads in a block. d_model: width; the MLPs are twice as wide.
    """
    config = WhisperConfig(
        vocab_size=3 + len(WORDS), num_mel_bins=N_MELS, d_model=d_model, encoder_layers=n_layer, decoder_layers=n_layer,
        encoder_attention_heads=n_head, decoder_attention_heads=n_head, encoder_ffn_dim=2 * d_model,
        decoder_ffn_dim=2 * d_model, max_source_positions=int(SECONDS * 50), max_target_positions=MOST + 2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None,
        begin_suppress_tokens=None, dropout=0.0, init_std=0.05,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = WhisperForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    made = model.generation_config
    made.suppress_tokens = made.begin_suppress_tokens = None
    made.max_length = MOST + 2
    return model


def targets(texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """What the decoder reads and what it should say, [clip, token]; −100 where nothing is asked."""
    longest = max(map(len, texts)) + 1
    read = torch.zeros(len(texts), longest, dtype=torch.long)
    asked = torch.full((len(texts), longest), -100)
    for row, digits in enumerate(texts):
        tokens = torch.tensor([digit + 3 for digit in digits])
        read[row, 0] = 1
        read[row, 1 : len(tokens) + 1] = tokens
        asked[row, : len(tokens)] = tokens
        asked[row, len(tokens)] = 2
    return read, asked


def record_voices(n: int, seed: int) -> list[tuple[Voice, dict[int, np.ndarray]]]:
    """Voices, each with the ten digits as it says them."""
    made = []
    for number in range(n):
        random = np.random.default_rng([seed, 1, number])
        voice = Voice.draw(random)
        made.append((voice, {digit: word(digit, voice, random) for digit in range(10)}))
    return made


def train(model: Any, *, seed: int, steps: int = STEPS, batch: int = BATCH, n_voices: int = N_VOICES) -> list[float]:
    """Train in place with AdamW, a short warm-up and a cosine decay to 0; the mean loss of every hundred steps."""
    voices = record_voices(n_voices, seed)
    random = np.random.default_rng([seed, 2])
    features = build_features()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE_OF_LEARNING, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min((s + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * max(0, s - WARM_UP) / max(1, steps - WARM_UP))),
    )
    model.train()
    losses: list[float] = []
    recent: list[float] = []
    for step in range(steps):
        most = 3 if step < SHORT_STEPS else MOST
        made = []
        for _ in range(batch):
            voice, words = voices[random.integers(len(voices))]
            made.append(say(random.integers(0, 10, random.integers(1, most + 1)).tolist(), voice, random, words=words))
        read, asked = targets([clip.digits for clip in made])
        logits = model(input_features=hear(made, features), decoder_input_ids=read).logits
        loss = cross_entropy(logits.flatten(0, 1), asked.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent.append(loss.item())
        if len(recent) == 100 or step + 1 == steps:
            losses.append(sum(recent) / len(recent))
            recent = []
            log.info("step %d of %d: loss %.4f", step + 1, steps, losses[-1])
    model.eval()
    return losses


def hear(made: Sequence[Clip], features: WhisperFeatureExtractor) -> Tensor:
    """Log-mel features [clip, band, frame] of clips."""
    heard: Tensor = features([c.waveform for c in made], sampling_rate=RATE, return_tensors="pt")["input_features"]
    return heard


@torch.inference_mode()
def token_error(model: Any, made: Sequence[Clip], features: WhisperFeatureExtractor) -> float:
    """Edits between what was said and what the model writes, per digit said."""
    edits = said = 0
    for first in range(0, len(made), 50):
        part = made[first : first + 50]
        written = model.generate(input_features=hear(part, features), max_new_tokens=MOST + 1, do_sample=False)
        for clip, row in zip(part, written.tolist(), strict=True):
            tokens = [token - 3 for token in row if token >= 3]
            edits += _edits(clip.digits, tokens)
            said += len(clip.digits)
    return edits / said


def _edits(said: Sequence[int], written: Sequence[int]) -> int:
    """Levenshtein distance: the fewest insertions, deletions and substitutions from one to the other."""
    row = list(range(len(written) + 1))
    for i, a in enumerate(said, 1):
        above, row = row, [i]
        for j, b in enumerate(written, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    return row[-1]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, save the model with clips and card, and print the error measured on the saved file."""
    parser = argparse.ArgumentParser(
        prog="python -m workbench.models.train_demo_s2t", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)

    model = new_model(args.seed)
    begun = time.perf_counter()
    losses = train(model, seed=args.seed, steps=args.steps)
    seconds = time.perf_counter() - begun

    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    model.half().save_pretrained(args.out)
    build_tokenizer().save_pretrained(args.out)
    features = build_features()
    features.save_pretrained(args.out)
    held_out = clips(N_CARD, seed=HELD_OUT_SEED)
    save_clips(args.out, held_out[:N_CLIPS], hear(held_out[:N_CLIPS], features), HELD_OUT_SEED)
    saved = load(args.out)[0].float()
    error = token_error(saved, held_out, features)
    card = make_card(args.out, saved, error, losses, seconds, seed=args.seed, steps=args.steps)
    print(
        f"token error {error:.4f} on {N_CARD} clips; {card['parameters']:,} parameters, "
        f"{card['megabytes']} MB, {card['minutes']} minutes"
    )


def make_card(
    folder: Path, model: Any, error: float, losses: list[float], seconds: float, *, seed: int, steps: int
) -> dict[str, Any]:
    """Write what a saved model is to card.json and README.md."""
    config = model.config
    card = {
        "model": "demo-s2t",
        "summary": "small Whisper that writes down strings of synthetic spoken digits",
        "architecture": f"Whisper ({config.encoder_layers} + {config.decoder_layers} layers, "
        f"{config.encoder_attention_heads} heads, width {config.d_model}, MLP {config.encoder_ffn_dim}, "
        f"{config.num_mel_bins} mel bands, {config.max_source_positions} encoder frames of 20 ms)",
        "parameters": sum(p.numel() for p in model.parameters()),
        "megabytes": round((folder / "model.safetensors").stat().st_size / 1e6, 2),
        "stored_as": "float16 safetensors, loaded as float32",
        "seed": seed,
        "steps": f"{steps} of {BATCH} clips",
        "minutes": round(seconds / 60, 1),
        "machine": f"{os.cpu_count()} CPU cores ({torch.get_num_threads()} used), torch "
        f"{torch.__version__.split('+')[0]}, transformers {transformers.__version__}",
        "command": f"python -m workbench.models.train_demo_s2t --out DIR --seed {seed}",
        "data": f"made while training by workbench.tasks.spoken_digits: {N_VOICES} voices, 1 to {MOST} digits in "
        f"{SECONDS:.0f} s, pauses, loudness and noise at random",
        "token_error": round(error, 4),
        "token_error_measured_on": f"{N_CARD} clips of 3 to {MOST} digits, of other voices (seed {HELD_OUT_SEED}), "
        "on the saved weights, greedy decoding",
        "loss_by_hundred_steps": [round(loss, 4) for loss in losses],
    }
    disk.write(folder / "card.json", json.dumps(card, indent=2) + "\n")
    disk.write(folder / "README.md", _readme(card))
    return card


def _readme(card: dict[str, Any]) -> str:
    """The card as a page for people."""
    return f"""# {card["model"]}

{card["summary"][0].upper()}{card["summary"][1:]}. {card["architecture"]}; {card["parameters"]:,} parameters,
{card["megabytes"]} MB ({card["stored_as"]}).

Token error {card["token_error"]:.2%}, measured on {card["token_error_measured_on"]}.

Trained from scratch in {card["minutes"]} minutes on {card["machine"]}, by

    {card["command"]}

Data: {card["data"]}. Nobody's voice was recorded, and people's voices were not trained: what it writes of them means
nothing.

`workbench.models.clips("demo-s2t")` has {N_CLIPS} of the held-out clips with their features, waveforms and the time of
every word. Inputs are `input_features` [clip, {N_MELS}, {int(SECONDS * 100)}], made by the feature extractor in this
folder; the decoder starts with `{START}` and ends with `{END}`.
"""


if __name__ == "__main__":
    main()
