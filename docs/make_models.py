"""Write docs/models.md from the models of the tests: `python docs/make_models.py`."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))

import workbench  # noqa: E402
from support.survey.models import SURVEY  # noqa: E402
from support.survey.surveyed import Surveyed  # noqa: E402
from support.tiny import ZOO, Family, make  # noqa: E402
from support.zoo.refusals import REFUSALS  # noqa: E402
from workbench.hooks.sites import Sites  # noqa: E402

BACKENDS = {
    "sdpa": "sdpa",
    "eager": "eager",
    "flex_attention": "flex",
    "flash_attention_2": "flash 2",
    "flash_attention_3": "flash 3",
    "some-org/flash-attn3": "hub",
}
PATTERNS = {
    "SoftmaxPattern": "rebuilt from q and k",
    "DensePattern": "the model's own weights",
    "SelectivePattern": "rebuilt from the scan",
    "DualPattern": "rebuilt from the scan",
}

HEAD = """# Models

Made by `docs/make_models.py` from the models of the tests; a test checks that this page is what it makes.

Each row is a tiny random model of the architecture. On every backend named, the tests check that the model's output is
the same to the bit with and without a capture, that every statistic of every site equals the dense definition on the
weights that an eager copy of the model computes (of state-space layers, that the map gives what the recurrence gives),
and that `wb.verify` holds. A row stands for its architecture: other sizes and checkpoints run the same code, and many
other models of `transformers` share it. `wb.verify(**inputs)` says whether a capture of your model tells the truth.

- **Sites**: kinds of the places where tokens mix.
- **Pattern**: where the weights come from. *Rebuilt from q and k*: exact, any part on demand, in memory that grows with
  the length alone. *The model's own weights*: the model writes its attention out, and that is kept. *Rebuilt
  from the scan*: of a state-space layer; *frozen* says that it is exact with the gates that this input gave, *signed*
  that weights may be negative, so that statistics are those of |A| normalised per row. *Unnormalised*: rows do not sum
  to one.
- **Backends**: of Hugging Face's `attn_implementation`. *Flex* runs on the CPU in these tests. *Flash 2*, *flash 3* and
  *hub* (a kernel from the hub, registered under its name) need a GPU; the tests put a float64 stand-in with the
  package's signature in its place, so that all of `transformers`' own path runs. *Own*: the model has no choice of
  backends.
"""

EVERY_MIXER = """
## Every mixer of tokens

What `wb.look(**inputs)` says of tiny random models of more architectures: how many places are read, by kind, and which
modules mix tokens and are not read. Both stand in `wb.sites`. A test has a judge of its own, which changes
one position of what each module is given, and fails where a module that mixes tokens is neither. `attach` needs
`check=False` where nothing is read.

Sites of the kind *state* are state spaces and the linear and recurrent mixers: delta rules (Qwen3-Next, Qwen3.5, OLMo
Hybrid; with a decay for each channel Kimi Linear and Ling), lightning attention (MiniMax), RG-LRU (RecurrentGemma),
gated short convolutions (LFM2), xLSTM's mLSTM, RWKV's time mixing, and of flash-linear-attention gated linear attention
(GLA), retention (RetNet) and RWKV-7. The efficient attention of diffusion U-Nets is *self*. Layers *as published* are
those of the tests, with the parts of the packages' own. Where values pass a short convolution or a token
shift before they are mixed, the map is that of what comes out of it.

| Model | Package | Sites | Unread |
| --- | --- | --- | --- |
"""

NOTES = """
## Where backends of `transformers` differ

The capture shows what the model computes, also where that depends on the backend:

- Falcon with ALiBi on `eager` adds the ALiBi twice; on `sdpa` once.
- On flash backends, a decoder with cross-attention to an encoder input that is padded on the right loses rows:
  `transformers` takes the last columns of the encoder's mask for the decoder's padding. Those rows see no key, and
  their statistics are NaN.
- Flash backends do not compute rows of padding; they see no key either.
- T5 on `flex_attention` fails in `transformers` for batches of more than one; flex refuses dropout, and sink logits on
  the CPU. GPT-2 on flash fails in `transformers` in float32; in bfloat16 the tests check it with `wb.verify`.
- Swin hides what a shifted window must not see with −100 on the scores, not with −∞; such keys count as visible, with
  weights near zero.
- Rows that hold several sequences are captured one by one on every backend; so are the requests of `generate_batch`.
- `generate()` is captured whole, and joined, on every hybrid that the tests have: Jamba, Bamba, Zamba2, Falcon-H1,
  Granite 4, Nemotron-H, LFM2, Qwen3-Next, Qwen3.5, OLMo Hybrid, Kimi Linear, MiniMax, RecurrentGemma. Only RWKV has a
  map of the prompt alone; its later steps stand in the ledger.

## Split over processes

With `tp_plan="auto"` on two processes, the tests compare Llama, GPT-NeoX, Gemma 2 and Qwen3 with the unsplit models:
every statistic, output and result of a head, every kind of intervention, sweeps and the importance of heads, and
captures of `generate()`. The same holds of attention that is split by hand with PyTorch's `parallelize_module`. FSDP
and `accelerate`'s offloading leave heads whole.

## What cannot be captured

Nothing is captured wrongly or as empty: what follows ends in an error.

"""


def rows() -> Iterator[str]:
    """The lines of the table."""
    labels: dict[str, list[Family]] = {}
    for one in ZOO:
        labels.setdefault(one.label, []).append(one)
    yield "| Model | Attention | Sites | Pattern | Backends |"
    yield "| --- | --- | --- | --- | --- |"
    for label, members in labels.items():
        kinds, patterns = found(members)
        notes = "; ".join(dict.fromkeys(one.note for one in members if one.note))
        backends = [BACKENDS[name] for name in BACKENDS if any(name in one.backends for one in members)]
        own = ", ".join(backends) or "own"
        yield f"| {label} | {notes} | {', '.join(kinds)} | {'; '.join(patterns)} | {own} |"


def found(members: list[Family]) -> tuple[list[str], list[str]]:
    """Kinds of sites and patterns that captures of these models hold."""
    kinds: dict[str, None] = {}
    patterns: dict[str, None] = {}
    for one in members:
        model = make(one)
        with torch.no_grad(), workbench.attach(model) as wb, wb.capture() as capture:
            model(**one.inputs())
        for site in capture:
            name, grade = type(site.pattern).__name__, site.pattern.grade
            how = PATTERNS.get(name, name) + ("" if grade == "exact" else f", {grade}")
            marks = "" if site.marks == "normalised" else f", {site.marks}"
            kinds[site.site.kind] = None
            patterns[how + marks] = None
    return list(kinds), list(patterns)


def looked_at(one: Surveyed) -> Sites:
    """The sites of a model of the survey, and its unread mixers."""
    with torch.no_grad(), workbench.attach(one.make(), check=False) as wb:
        return wb.look(**one.inputs())


def mixers(sites_of: Callable[[Surveyed], Sites]) -> Iterator[str]:
    """A line for each model of the survey: its sites, and its unread mixers by class."""
    for one in SURVEY:
        sites = sites_of(one)
        kinds = Counter(site.kind for site in sites)
        classes = Counter(each.cls for each in sites.unread)
        read = ", ".join(f"{n} {kind}" for kind, n in kinds.items()) or "none"
        unread = ", ".join(name if n == 1 else f"{n} {name}" for name, n in classes.items())
        yield f"| {one.label} | {one.library} | {read} | {unread} |"


def refused() -> Iterator[str]:
    """A line for each case that is refused, with the error."""
    for refusal in REFUSALS:
        yield f"- {refusal.what} `{refusal.error.__name__}`: “{refusal.message} …”"


def page(sites_of: Callable[[Surveyed], Sites] = looked_at) -> str:
    """The text of docs/models.md. `sites_of`: what is known already of a model of the survey."""
    read = "\n".join((HEAD, *rows()))
    return read + "\n" + EVERY_MIXER + "\n".join(mixers(sites_of)) + "\n" + NOTES + "\n".join(refused()) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "models.md").write_text(page())
