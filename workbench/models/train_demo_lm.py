"""Trains the demonstration language models that ship with the package.

    python -m workbench.models.train_demo_lm --out DIR --seed 0
    python -m workbench.models.train_demo_lm --out DIR --seed 0 --resume
    python -m workbench.models.train_demo_lm --out DIR --seed 0 --curriculum plateau

Four tasks are learnt: indirect object identification, Colored Objects, induction, and greater-than. Three of them come
by themselves. Colored Objects does not: trained on all formats at once, a model finds an uninformed answer (one of the
colours of the scene) and stays there. What gets past that point:

1. Bare lookups first ("a red pencil, a blue cup, ... : pencil Red cup Blue"), beside repeated random words. Both need
   a head that looks at the previous word.
2. Many things in a scene, colours and questions drawn with replacement. With few things of different colours, each
   asked once, elimination pays and hides that nothing was looked up: the same small model took twice the steps or more.
3. Muon for the matrices of the blocks. In the same time AdamW had barely begun with induction.
4. Rows that start at a random position. Positions are learnt one by one, and without this a model that answered about
   the first scene of a prompt stayed at chance for the second as long as it was trained.
5. A loss on predictable words only, every format with the same weight.

Then the same lookups in the words of the task, and at last the task's own prompts. The "plateau" curriculum leaves the
random positions out, on purpose, and stops before the learning rate falls: its model does the other three tasks and
single scenes, and guesses among the three colours of the query scene.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel

from workbench.models.loading import load
from workbench.models.training.formats import held_out, repeats, to_tensors
from workbench.models.training.loop import Progress, Stage, Trainer
from workbench.models.training.vocabulary import build_tokenizer
from workbench.storage import disk

N_CTX = 128
EASY = {"ioi": 12, "years": 12}
MORE_EASY = {"ioi": 24, "years": 24}
CURRICULA: Mapping[str, tuple[Stage, ...]] = {
    "demo": (
        Stage("lookups", {"lookups": 32, "short_repeats": 32}, steps=800, goal=("train/lookups", 0.95)),
        Stage(
            "scenes",
            {"scenes": 16, "full_prompts": 8, "lookups": 12, "repeats": 8, **EASY},
            steps=1500,
            goal=("colored_objects", 0.8),
            shifted=("scenes", "full_prompts", "lookups"),
        ),
        Stage(
            "prompts",
            {"full_prompts": 24, "scenes": 8, "lookups": 8, "repeats": 8, **EASY},
            steps=400,
            decay=True,
        ),
    ),
    "plateau": (
        Stage("lookups", {"lookups": 32, "short_repeats": 32}, steps=700),
        Stage("scenes", {"scenes": 24, "lookups": 12, "repeats": 16, **MORE_EASY}, steps=300),
        Stage("prompts", {"full_prompts": 32, "scenes": 8, "lookups": 8, "repeats": 16, **MORE_EASY}, steps=400),
    ),
}
SUMMARIES = {
    "demo": "small GPT-2 that does IOI, Colored Objects, induction and greater-than",
    "plateau": "the same architecture stuck at a plateau: Colored Objects at chance, the other three tasks done",
}
N_CARD = 1000
CARD_SEED = 777


def new_model(vocab_size: int, seed: int, *, n_layer: int = 6, n_head: int = 8, d_model: int = 128) -> GPT2LMHeadModel:
    """A GPT-2 with untied embeddings and weights drawn wider than usual.

    Args:
        vocab_size: number of tokens.
        seed: of the weights.
        n_layer: blocks.
        n_head: heads in a block.
        d_model: width; the MLPs are twice as wide.
    """
    config = GPT2Config(
        vocab_size=vocab_size, n_positions=N_CTX, n_embd=d_model, n_layer=n_layer, n_head=n_head, n_inner=2 * d_model,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.05, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=0, pad_token_id=0, use_cache=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel._from_config(config, attn_implementation="sdpa")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, save the model with its tokenizer and card, and print the accuracies measured on the saved file."""
    parser = argparse.ArgumentParser(
        prog="python -m workbench.models.train_demo_lm", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoints and the finished model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--curriculum", choices=sorted(CURRICULA), default="demo")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the folder")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)

    tokenizer = build_tokenizer(N_CTX)
    model = new_model(len(tokenizer), args.seed)
    trainer = Trainer(model, tokenizer, CURRICULA[args.curriculum], args.out / "training", seed=args.seed)
    if args.resume:
        trainer.resume()
    progress = trainer.run()

    finished = args.out / "model"
    save_finished(model, tokenizer, finished)
    card = make_card(finished, progress, args.curriculum, args.seed)
    for name, value in card["accuracy"].items():
        print(f"{name:16} {value:.3f}")
    print(
        f"{card['parameters']:,} parameters, {card['megabytes']} MB, {progress.step} steps, {card['minutes']} minutes"
    )


def save_finished(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write weights in half precision, configuration and tokenizer to a folder, replacing what is there."""
    shutil.rmtree(folder, ignore_errors=True)
    half = GPT2LMHeadModel(model.config)
    half.load_state_dict(model.state_dict())
    half.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_card(folder: Path, progress: Progress, curriculum: str, seed: int) -> dict[str, Any]:
    """Measure a saved model on held-out prompts and write what it is to card.json."""
    model, tokenizer = load(str(folder))
    accuracy = {
        name: round(task.accuracy(model, tokenizer, size=100), 4)
        for name, task in held_out(N_CARD, seed=CARD_SEED).items()
    }
    stages: dict[str, int] = {}
    for entry in progress.history:
        stages[entry["stage"]] = entry["step"]
    card = {
        "model": "demo-lm" if curriculum == "demo" else "demo-lm-plateau",
        "summary": SUMMARIES[curriculum],
        "architecture": "GPT-2 (6 layers, 8 heads, width 128, MLP 256, 128 positions, embeddings not tied)",
        "parameters": sum(p.numel() for p in model.parameters()),
        "megabytes": round((folder / "model.safetensors").stat().st_size / 1e6, 2),
        "stored_as": "float16 safetensors, loaded as float32",
        "curriculum": curriculum,
        "stages_end_at_step": stages,
        "seed": seed,
        "steps": progress.step,
        "minutes": round(progress.seconds / 60, 1),
        "machine": f"{os.cpu_count()} CPU cores, torch {torch.__version__.split('+')[0]}, "
        f"transformers {transformers.__version__}",
        "command": f"python -m workbench.models.train_demo_lm --out DIR --seed {seed} --curriculum {curriculum}",
        "accuracy": accuracy,
        "accuracy_measured_on": f"{N_CARD} held-out prompts per task, seed {CARD_SEED}, argmax over all "
        f"{model.config.vocab_size} tokens, on the saved half-precision weights",
        "induction_by_position_of_earlier_copy": _reach_of_induction(model, tokenizer),
        "held_out": {
            "ioi": "ordered pairs of names (IO, S) that no training prompt has",
            "colored_objects": "sets of three objects that no training prompt has in one scene of three",
            "induction": "fresh random sequences; two runs never share one",
            "greater_than": "combinations of noun, century and year that no training prompt has",
        },
        "history": progress.history,
    }
    disk.write(folder / "card.json", json.dumps(card, indent=2) + "\n")
    disk.write(folder / "README.md", _readme(card))
    return card


def _reach_of_induction(model: Any, tokenizer: Any) -> dict[str, float]:
    """Accuracy on 64 random words said twice, by the positions of the earlier copy: how far the context reaches."""
    ids = tokenizer.get_vocab()
    words = sorted(set(ids) - set(tokenizer.all_special_tokens))
    inputs, _ = to_tensors(repeats(100, random.Random(CARD_SEED), words, 64, 64), ids)
    with torch.inference_mode():
        hits = model(inputs).logits[:, 64:127].argmax(-1) == inputs[:, 65:128]
    return {f"{i}-{i + 7}": round(hits[:, i : i + 8].float().mean().item(), 3) for i in range(0, 63, 8)}


def _readme(card: Mapping[str, Any]) -> str:
    """The card as a page for people."""
    rows = "\n".join(f"| {name} | {card['accuracy'][name]:.3f} | {what} |" for name, what in card["held_out"].items())
    stages = ", ".join(f"{name} until step {step}" for name, step in card["stages_end_at_step"].items())
    reach = ", ".join(f"{at}: {share:.2f}" for at, share in card["induction_by_position_of_earlier_copy"].items())
    notes = f" {card['notes']}" if card.get("notes") else ""
    return f"""# {card["model"]}

{card["summary"][0].upper()}{card["summary"][1:]}. {card["architecture"]}; {card["parameters"]:,} parameters,
{card["megabytes"]} MB ({card["stored_as"]}).

| task | accuracy | held out |
|---|---|---|
{rows}

Measured on {card["accuracy_measured_on"]}.

Trained from scratch on generated prompts: {card["steps"]} steps in {card["minutes"]} minutes on {card["machine"]}, by

    {card["command"]}

Stages: {stages}. The loss was taken on predictable words only. `card.json` has the accuracies along the way.{notes}

The vocabulary is that of the four tasks and all two-digit numbers; any other word becomes `<unk>`. Texts unlike the
prompts were not trained, so what follows them means nothing. Inputs are at most 128 tokens, and the tasks' own prompts
at most 62. Long contexts were seen seldom. Accuracy of induction on 64 random words said twice, by the position of
the earlier copy: {reach}.
"""


if __name__ == "__main__":
    main()
