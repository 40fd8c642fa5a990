"""Trains `demo-vlm`, a small vision-language model that points: `workbench.models.load("demo-vlm")`.

    python -m workbench.models.train_demo_vlm --out DIR --seed 0

A LLaVA of one layer in the vision tower and one in the language model. It is asked for the colour of one of three
objects by its shape (`workbench.tasks.planted_objects`), so that it has to find the object to answer. The attention of
the tower is held at zero: with it, patches tell each other what they show before the language model reads them, and its
heads point at the object in 61 pictures of 100 instead of 98.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.functional import cross_entropy

from workbench.storage import disk
from workbench.tasks.planted import COLOURS, IMAGE, PATCH, SHAPES, SIDE, WORDS, PlantedObjects, planted_objects

log = logging.getLogger(__name__)
VOCABULARY = ("<pad>", "<bos>", "<eos>", IMAGE, *WORDS, *SHAPES, *COLOURS)
STEPS, BATCH, RATE = 1200, 64, 5e-3
_SILENT = -100  # where there is nothing to be learnt
HELD_OUT = 1_000_003  # the seed of the pictures that it is tested on


def new_tokenizer() -> Any:
    """Words, each a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
        additional_special_tokens=[IMAGE],
    )  # fmt: skip


def new_model(seed: int, *, d_model: int = 48) -> Any:
    """A small LLaVA with random weights.

    Args:
        seed: of the weights. d_model: width of the vision tower and of the language model.
    """
    shared: dict[str, Any] = {"hidden_size": d_model, "num_hidden_layers": 1, "num_attention_heads": 4}
    shared |= {"intermediate_size": 2 * d_model, "initializer_range": d_model**-0.5}
    vision = transformers.CLIPVisionConfig(**shared, image_size=SIDE, patch_size=PATCH)
    text = transformers.LlamaConfig(
        **shared, num_key_value_heads=2, vocab_size=len(VOCABULARY), max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=VOCABULARY.index(IMAGE), vision_feature_layer=-1,
        image_seq_length=(SIDE // PATCH) ** 2, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    for name, parameter in model.named_parameters():
        if "vision_tower" in name and "self_attn.out_proj" in name:
            torch.nn.init.zeros_(parameter).requires_grad_(False)  # a patch shows itself alone
    return model


def train(model: Any, tokenizer: Any, *, seed: int, steps: int = STEPS, batch: int = BATCH) -> list[float]:
    """Train in place on new pictures of one to three objects at every step; the loss of every 40th step."""
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / 60, 0.5 + 0.5 * math.cos(math.pi * s / steps))
    )
    model.train()
    losses = []
    for step in range(steps):
        drawn = planted_objects(batch, random, objects=(1, 2, 3, 3)[step % 4])
        inputs, labels = lesson(drawn, tokenizer)
        logits = model(**inputs, logits_to_keep=labels.shape[1]).logits
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=_SILENT)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 40 == 3:
            losses.append(loss.item())
            log.info("step %d of %d: loss %.4f", step, steps, losses[-1])
    model.eval()
    return losses


def lesson(drawn: PlantedObjects, tokenizer: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The question with its answer, then the other objects of the picture with theirs: shape, colour, shape, colour.

    Returns:
        The inputs, and [picture, position] what is to be learnt at the last positions: the colour after each shape.
    """
    inputs = drawn.inputs(tokenizer)
    more = [[word for pair in zip(drawn.all_shapes[i], drawn.all_colours[i], strict=True) for word in pair][1:-1]
            for i in range(len(drawn))]  # fmt: skip
    rest = torch.tensor([tokenizer.convert_tokens_to_ids(words) for words in more]).long()
    ids = torch.cat([inputs["input_ids"], rest], 1)
    colours = torch.tensor([tokenizer.convert_tokens_to_ids(list(names)) for names in drawn.all_colours])
    labels = torch.full((len(drawn), rest.shape[1] + 1), _SILENT)
    labels[:, ::2] = colours
    return inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels


def answers(drawn: PlantedObjects, tokenizer: Any) -> torch.Tensor:
    """[picture] the ids of the right colours."""
    return torch.tensor(tokenizer.convert_tokens_to_ids(list(drawn.answers)))


@torch.inference_mode()
def accuracy(model: Any, tokenizer: Any, drawn: PlantedObjects) -> float:
    """Share of the questions that are answered rightly."""
    logits = model(**drawn.inputs(tokenizer), logits_to_keep=1).logits[:, -1]
    return float((logits.argmax(-1) == answers(drawn, tokenizer)).double().mean())


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, save the model with its card, and print the accuracy measured on the saved file."""
    parser = argparse.ArgumentParser(
        prog="python -m workbench.models.train_demo_vlm", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    asked = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    began = time.perf_counter()
    tokenizer, model = new_tokenizer(), new_model(asked.seed)
    losses = train(model, tokenizer, seed=asked.seed, steps=asked.steps)
    minutes = (time.perf_counter() - began) / 60
    asked.out.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(asked.out)
    tokenizer.save_pretrained(asked.out)
    describe(asked.out, asked.seed, asked.steps, minutes, losses)


def describe(folder: Path, seed: int, steps: int, minutes: float, losses: Sequence[float]) -> None:
    """Write the card and the page of a model that was saved, with what its file does on held-out pictures."""
    from workbench.models.loading import load

    model, tokenizer = load(folder)
    model = model.float()
    found = accuracy(model, tokenizer, planted_objects(1000, HELD_OUT))
    size = sum(p.numel() for p in model.parameters())
    megabytes = (folder / "model.safetensors").stat().st_size / 1e6
    card = {
        "model": "demo-vlm",
        "summary": "small vision-language model that names the colour of the object that it is asked for",
        "architecture": "LLaVA (CLIP of 1 layer whose attention is held at zero, 6 x 6 patches of 8 x 8 pixels; Llama "
        "of 1 layer; 4 heads, width 48)",
        "parameters": size,
        "megabytes": round(megabytes, 3),
        "stored_as": "float16 safetensors, loaded as float32",
        "seed": seed,
        "steps": steps,
        "minutes": round(minutes, 1),
        "machine": f"1 CPU core, shared, torch {torch.__version__}, transformers {transformers.__version__}",
        "command": f"python -m workbench.models.train_demo_vlm --out DIR --seed {seed}",
        "data": "workbench.tasks.planted_objects, drawn anew at every step",
        "accuracy": {"held_out": found, "chance": 1 / len(COLOURS)},
        "accuracy_measured_on": f"1000 pictures of three objects, drawn with seed {HELD_OUT}, on the saved weights",
        "loss_every_40_steps": [round(one, 4) for one in losses],
    }
    disk.write(folder / "card.json", json.dumps(card, indent=2) + "\n")
    disk.write(folder / "README.md", _page(card))
    log.info("accuracy on held-out pictures: %.4f, chance %.2f", found, 1 / len(COLOURS))


def _page(card: dict[str, Any]) -> str:
    return f"""# demo-vlm

{card["summary"].capitalize()}. {card["parameters"]:,} parameters, {card["megabytes"]} MB
({card["stored_as"]}).

{card["architecture"]}. As patches show themselves alone, the heads have to look at the object to
answer: all four together give it their largest weight in more than 9 pictures of 10.

Accuracy {card["accuracy"]["held_out"]:.3f}, by chance {card["accuracy"]["chance"]:.2f}. Measured on
{card["accuracy_measured_on"]}.

Trained from scratch: {card["steps"]} steps in {card["minutes"]} minutes on
{card["machine"]}, by

    {card["command"]}

Data: {card["data"]}. `workbench.tasks.planted_objects(n, seed).inputs(tokenizer)`
makes its inputs: an image token for each patch, then "colour of the ring"; the last row writes the colour. It knows no
other words and no other pictures.
"""


if __name__ == "__main__":
    main()
