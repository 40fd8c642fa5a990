"""The maze transformer that was trained with structured trace dropping, and its modes: fast, slow and auto."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import FormatError, TaskError, WorkbenchError
from workbench.mechanisms.dualformer.mazes import Maze
from workbench.mechanisms.dualformer.tokens import BOS, EOS, PAD, Answer, Vocabulary
from workbench.storage import files

if TYPE_CHECKING:
    from transformers import T5ForConditionalGeneration

WORDS = Vocabulary(5, 5, whole=True)
"""The tokens of the models that are trained here."""
MODES = {"fast": "plan", "slow": "create", "auto": None}
SHIPPED = Path(__file__).parent / "dualformer.safetensors"
_FORM = "workbench.dualformer"
_SIZES = {"d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 128, "num_layers": 3, "num_decoder_layers": 3}
_LARGEST = {name: 48 if "layers" in name else 4096 for name in _SIZES}


def build(**sizes: int) -> T5ForConditionalGeneration:
    """A maze transformer with random weights, as torch's seed has them: an encoder reads the maze, a decoder answers.

    Args:
        sizes: of `transformers.T5Config`, in the place of those of the shipped model.
    """
    from transformers import T5Config, T5ForConditionalGeneration

    settings: dict[str, Any] = {
        **_SIZES, **sizes, "vocab_size": len(WORDS.tokens), "dropout_rate": 0.0, "feed_forward_proj": "relu",
        "relative_attention_num_buckets": 32, "relative_attention_max_distance": 96, "pad_token_id": WORDS.ids[PAD],
        "decoder_start_token_id": WORDS.ids[BOS], "eos_token_id": WORDS.ids[EOS], "bos_token_id": WORDS.ids[BOS],
    }  # fmt: skip
    config = T5Config(**settings)
    return T5ForConditionalGeneration(config).eval()


def save(model: T5ForConditionalGeneration, path: Path, facts: dict[str, Any]) -> Path:
    """Write weights in half precision, with how they were trained."""
    sizes = {name: getattr(model.config, name) for name in _SIZES}
    tensors = {name: p.detach().half().contiguous() for name, p in model.named_parameters()}
    return files.write(path, _FORM, {"sizes": sizes, "facts": facts}, tensors)


def load(path: str | Path = SHIPPED) -> T5ForConditionalGeneration:
    """A trained model: the shipped one by default, taught with `dropping.DUAL` on mazes of 5 x 5 cells.

    Raises:
        WorkbenchError: no weights ship with this version. FormatError: no such file, or weights that do not fit.
    """
    if path == SHIPPED and not SHIPPED.is_file():
        raise WorkbenchError(
            "no weights of the maze transformer ship with this version",
            hint="python -m workbench.mechanisms.dualformer.training --kind dual --folder FOLDER trains it; "
            "load(FOLDER/dual.safetensors)",
        )
    header, tensors = files.read(Path(path), _FORM)
    sizes = {name: header["sizes"][name].integer(1, _LARGEST[name]) for name in _SIZES}
    with torch.device("meta"):  # nothing is allocated by what a file says before its weights are seen to fit
        blank = dict(build(**sizes).named_parameters())
    if set(blank) != set(tensors) or any(blank[name].shape != tensors[name].shape for name in blank):
        raise FormatError(f"{Path(path).name} has other weights than a model of its sizes")
    model = build(**sizes)
    wanted = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name])
    return model


@dataclass(frozen=True)
class Thought:
    """What a model made of a maze.

    Attributes:
        maze, mode: what it was given. tokens: what it wrote, from `bos` on; `eos` is missing where it did not end.
        p_fast: probability of a plan without a trace, among the first tokens that begin one or the other.
        answer: what the tokens say; None where they do not parse, and `fault` says why.
    """

    maze: Maze
    mode: str
    tokens: tuple[str, ...]
    p_fast: float
    answer: Answer | None
    fault: str

    @property
    def solved(self) -> bool:
        """Whether the plan leads to the goal."""
        return self.answer is not None and not self.maze.fault_of(self.answer.plan)

    @property
    def optimal(self) -> bool:
        """Whether it does so in as few steps as there can be."""
        return self.answer is not None and self.maze.is_optimal(self.answer.plan)

    @property
    def n_trace(self) -> int:
        """Tokens between `bos` and the plan, or the end where there is no plan."""
        body = self.tokens[1:]
        return body.index("plan") if "plan" in body else len(body)

    @property
    def went_fast(self) -> bool:
        """Whether the plan came without a trace."""
        return len(self.tokens) > 1 and self.tokens[1] == "plan"


@torch.no_grad()
def think(
    model: torch.nn.Module,
    mazes: Sequence[Maze],
    mode: str = "auto",
    *,
    seed: int = 0,
    most: int = 220,
    size: int = 128,
) -> list[Thought]:
    """Let a model solve mazes.

    Args:
        mode: "fast" begins with the token `plan`, "slow" with `create`; in "auto" the model's own probabilities of the
            two draw one of them. All other tokens are the most probable ones.
        seed: of the draw. most: tokens that are written at most. size: mazes side by side.

    Raises:
        TaskError: an unknown mode, no mazes, or mazes of another size than the model's.
    """
    if mode not in MODES:
        raise TaskError(f"there is no mode {mode!r}", hint='"fast", "slow" or "auto"')
    if not mazes:
        raise TaskError("there is no maze", hint="training.held_out(100) gives some")
    other = next((maze for maze in mazes if (maze.width, maze.height) != (WORDS.width, WORDS.height)), None)
    if other is not None:
        raise TaskError(
            f"the model knows mazes of {WORDS.width} x {WORDS.height} cells, not {other.width} x {other.height}"
        )
    if most < 2:
        raise WorkbenchError(f"most={most}: a control token and one more are the least")
    generator, found = torch.Generator().manual_seed(seed), []
    for start in range(0, len(mazes), size):
        found += _think(model, mazes[start : start + size], mode, generator, most)
    return found


def _think(
    model: torch.nn.Module, mazes: Sequence[Maze], mode: str, generator: torch.Generator, most: int
) -> list[Thought]:
    ids, mask = prompts(mazes)
    encoded = model.get_encoder()(input_ids=ids, attention_mask=mask)  # type: ignore[operator]
    written = torch.full((len(mazes), 1), WORDS.ids[BOS])
    ended, cache, p_fast = torch.zeros(len(mazes), dtype=torch.bool), None, torch.zeros(len(mazes))
    control = torch.tensor([WORDS.ids["plan"], WORDS.ids["create"]])
    while written.shape[1] <= most and not bool(ended.all()):
        output = model(
            encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=written[:, -1:], past_key_values=cache,
            use_cache=True,
        )  # fmt: skip
        cache, logits = output.past_key_values, output.logits[:, -1]
        new = logits.argmax(-1)
        if written.shape[1] == 1:
            p_fast = logits[:, control].softmax(-1)[:, 0]
            token = MODES[mode]
            if token is None:
                drawn = torch.rand(len(mazes), generator=generator) < p_fast
                new = torch.where(drawn, control[0], control[1])
            else:
                new = torch.full_like(new, WORDS.ids[token])
        new = new.masked_fill(ended, WORDS.ids[PAD])
        written = torch.cat([written, new[:, None]], 1)
        ended |= new == WORDS.ids[EOS]
    return [_thought(maze, mode, row, float(p)) for maze, row, p in zip(mazes, written.tolist(), p_fast, strict=True)]


def _thought(maze: Maze, mode: str, ids: list[int], p_fast: float) -> Thought:
    tokens = WORDS.decode(ids)
    if EOS in tokens:
        tokens = tokens[: tokens.index(EOS) + 1]
    try:
        answer, fault = WORDS.read_answer(tokens), ""
    except TaskError as error:
        answer, fault = None, error.message
    return Thought(maze, mode, tuple(tokens), p_fast, answer, fault)


def prompts(mazes: Sequence[Maze]) -> tuple[Tensor, Tensor]:
    """Ids [maze, token] of mazes, padded on the right, and 1 where there is a token."""
    rows = [WORDS.encode(WORDS.prompt(maze)) for maze in mazes]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    return ids, mask
