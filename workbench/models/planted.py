"""Small models whose circuits were written into their weights by hand, so that what finds circuits can be judged.

Their residual stream has a slot for each thing that can be known at a token, and a wired head reads some slots and
writes into another, as in Elhage et al., A mathematical framework for transformer circuits.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import WorkbenchError, nearest
from workbench.tasks import Task, from_prompts

_HOT = 12.0  # scores of a wired head before the softmax, which is then nearly one-hot


class Words:
    """A tokenizer that knows the words w0, w1, … and gives them these numbers."""

    is_fast = False
    unk_token_id = None
    padding_side = "right"

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [int(word.removeprefix("w")) for word in text.split()]}

    def decode(self, ids: list[int], **settings: bool) -> str:
        """The words of ids."""
        return " ".join(f"w{i}" for i in ids)


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
        out: Tensor = self.o(z.transpose(1, 2).flatten(2))
        return out


class SlotBlock(nn.Module):
    """Attention on the residual stream, without norm and MLP."""

    def __init__(self, d_model: int, n_heads: int, d_head: int) -> None:
        super().__init__()
        self.attn = SlotAttention(d_model, n_heads, d_head)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.attn(x)
        return out


class SlotModel(nn.Module):
    """An attention-only model whose residual stream has slots: token, position, notes, and output; in float64.

    All weights are small noise until `wire` writes a head.

    Args:
        vocabulary, positions: how many there are. layers, heads: of each layer. noise: standard deviation of weights.
        notes: how many slots there are for what heads tell each other: "note", "note2", …
        seed: of the noise.
    """

    def __init__(
        self, vocabulary: int = 12, positions: int = 10, layers: int = 2, heads: int = 3, noise: float = 0.01,
        notes: int = 1, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.vocabulary, self.positions = vocabulary, positions
        width = max(vocabulary, positions)
        named = {("note" if i == 0 else f"note{i + 1}"): width for i in range(notes)}
        sizes = {"token": vocabulary, "position": positions, **named, "output": vocabulary}
        self.slots: dict[str, slice] = {}
        start = 0
        for name, size in sizes.items():
            self.slots[name] = slice(start, start + size)
            start += size
        self.d_head = width
        self.embed, self.place = nn.Embedding(vocabulary, start), nn.Embedding(positions, start)
        self.blocks = nn.ModuleList(SlotBlock(start, heads, self.d_head) for _ in range(layers))
        self.unembed = nn.Linear(start, vocabulary, bias=False)
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.blocks.parameters():
                parameter.normal_(std=noise, generator=random)
            self.embed.weight.zero_()[:, self.slots["token"]] = torch.eye(vocabulary)
            self.place.weight.zero_()[:, self.slots["position"]] = torch.eye(positions)
            self.unembed.weight.zero_()[:, self.slots["output"]] = torch.eye(vocabulary)
        self.double().eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        """Logits [batch, token, vocabulary], in an object that has them as `logits`."""
        from transformers.modeling_outputs import CausalLMOutput

        x = self.embed(input_ids) + self.place(torch.arange(input_ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return CausalLMOutput(logits=self.unembed(x))

    def wire(self, layer: int, head: int, reads: dict[str, tuple[str, Tensor]], writes: str, gain: float = 1.0) -> None:
        """Write one head: for q, k and v a slot and a map [slot width, head width]; and the slot it writes its v to."""
        attention: Any = self.blocks[layer].attn
        rows = slice(head * self.d_head, (head + 1) * self.d_head)
        with torch.no_grad():
            for part, (slot, matrix) in reads.items():
                weight = getattr(attention, part).weight[rows]
                weight.zero_()[: matrix.shape[1], self.slots[slot]] = matrix.T.to(weight.dtype)
            out = self.slots[writes]
            attention.o.weight[:, rows] = 0
            attention.o.weight[out, rows] = gain * torch.eye(out.stop - out.start, self.d_head, dtype=torch.float64)

    def slot(self, name: str, gain: float = 1.0) -> tuple[str, Tensor]:
        """What a head reads that takes a slot as it is, times a factor."""
        width = self.slots[name].stop - self.slots[name].start
        return name, gain * torch.eye(width, self.d_head)

    def at(self, position: int) -> tuple[str, Tensor]:
        """A query that looks at one position from everywhere."""
        found = torch.zeros(self.positions, self.d_head)
        found[:, position] = _HOT
        return "position", found

    def before(self) -> tuple[str, Tensor]:
        """A query that looks at the position before its own."""
        found = torch.zeros(self.positions, self.d_head)
        found[torch.arange(1, self.positions), torch.arange(self.positions - 1)] = _HOT
        return "position", found


@dataclass(frozen=True)
class Planted:
    """A model, the task that it was made for, and what was written into it.

    Attributes:
        kind: one of `KINDS`. heads: labels of the heads that do the task; none where no head does.
    """

    kind: str
    model: SlotModel
    task: Task
    heads: tuple[str, ...]
    tokenizer: Words


def planted(kind: str, seed: int = 0, n: int = 24) -> Planted:
    """A model with a planted circuit, at places that the seed draws, beside a head that does something else.

    Args:
        kind: "copy", one head brings the token at a place; "pair", two heads do so together; "induction", one notes the
            token before, one looks for what is there now; "mover", one fetches a cue, one looks where it points;
            "chain", a third one looks where that points. Without a circuit: "noise", nothing is wired; "direct", the
            last token itself says the answer; "decoy", a head is wired to what the task does not ask for.
        seed: of places, noise and prompts. n: prompts.

    Raises:
        WorkbenchError: an unknown kind.

    >>> made = planted("mover", seed=1)
    >>> len(made.heads), made.task.accuracy(made.model, made.tokenizer)
    (2, 1.0)
    """
    if kind not in KINDS:
        raise WorkbenchError(f"there is no kind {kind!r}", hint=nearest(kind, list(KINDS), "kind"))
    source = random.Random(f"{kind} {seed}")
    model = SlotModel(layers=3, heads=4, notes=3, seed=seed)
    free = [(layer, head) for layer in range(3) for head in range(4)]
    places = sorted(source.sample(free, 3))
    while len({layer for layer, _ in places}) < 3:
        places = sorted(source.sample(free, 3))
    spare = source.choice([place for place in free if place not in places])
    used, rows = KINDS[kind](model, places, source, n)
    model.wire(*spare, {"q": model.before(), "k": model.slot("position"), "v": model.slot("token")}, "note3")
    lists = [[row[i] for row in rows] for i in range(4)]
    task = from_prompts(*lists, name=f"planted {kind}")
    return Planted(kind, model, task, tuple(f"L{layer}H{head}" for layer, head in used), Words())


Row = tuple[str, str, str, str]
Places = list[tuple[int, int]]


def _text(*words: int) -> str:
    return " ".join(f"w{word}" for word in words)


def _copy(model: SlotModel, places: Places, source: random.Random, n: int) -> tuple[Places, list[Row]]:
    used = places[:1]
    model.wire(*used[0], {"q": model.at(1), "k": model.slot("position"), "v": model.slot("token")}, "output")
    return used, _copied(model, source, n)


def _pair(model: SlotModel, places: Places, source: random.Random, n: int) -> tuple[Places, list[Row]]:
    for place in places[:2]:
        model.wire(*place, {"q": model.at(1), "k": model.slot("position"), "v": model.slot("token")}, "output", 0.5)
    return places[:2], _copied(model, source, n)


def _copied(model: SlotModel, source: random.Random, n: int) -> list[Row]:
    rows = []
    for _ in range(n):
        a, x, y, b, c = source.sample(range(model.vocabulary), 5)
        rows.append((_text(a, x, b, c), _text(a, y, b, c), f" w{x}", f" w{y}"))
    return rows


def _induction(model: SlotModel, places: Places, source: random.Random, n: int) -> tuple[Places, list[Row]]:
    first, second = source.choice([places[:2], places[1:], places[::2]])
    model.wire(*first, {"q": model.before(), "k": model.slot("position"), "v": model.slot("token")}, "note")
    model.wire(*second, {"q": model.slot("token", _HOT), "k": model.slot("note"), "v": model.slot("token")}, "output")
    rows = []
    for _ in range(n):
        a, b, c, d, e = source.sample(range(model.vocabulary), 5)
        rows.append((_text(e, a, b, c, d, e, a), _text(e, c, b, a, d, e, a), f" w{b}", f" w{d}"))
    return [first, second], rows


def _fetched(model: SlotModel, place: tuple[int, int], note: str) -> None:
    """A head that notes everywhere which token stands first."""
    model.wire(*place, {"q": model.at(0), "k": model.slot("position"), "v": model.slot("token")}, note)


def _mover(model: SlotModel, places: Places, source: random.Random, n: int) -> tuple[Places, list[Row]]:
    first, second = source.choice([places[:2], places[1:], places[::2]])
    _fetched(model, first, "note")
    model.wire(
        *second, {"q": model.slot("note", _HOT), "k": model.slot("position"), "v": model.slot("token")}, "output"
    )
    rows = []
    for _ in range(n):
        cue, other = source.sample((1, 2), 2)
        x, y, z = source.sample(range(5, model.vocabulary), 3)
        right, wrong = (x, y) if cue == 1 else (y, x)
        rows.append((_text(cue, x, y, z), _text(other, x, y, z), f" w{right}", f" w{wrong}"))
    return [first, second], rows


def _chain(model: SlotModel, places: Places, source: random.Random, n: int) -> tuple[Places, list[Row]]:
    first, second, third = places
    _fetched(model, first, "note")
    model.wire(*second, {"q": model.slot("note", _HOT), "k": model.slot("position"), "v": model.slot("token")}, "note2")
    model.wire(
        *third, {"q": model.slot("note2", _HOT), "k": model.slot("position"), "v": model.slot("token")}, "output"
    )
    rows = []
    for _ in range(n):
        cue, other = source.sample((1, 2), 2)
        p, q = source.sample((3, 4), 2)
        x, y, z = source.sample(range(5, model.vocabulary), 3)
        at = {3: x, 4: y}
        right, wrong = at[(p, q)[cue - 1]], at[(p, q)[other - 1]]
        rows.append((_text(cue, p, q, x, y, z), _text(other, p, q, x, y, z), f" w{right}", f" w{wrong}"))
    return places, rows


def _noise(model: SlotModel, places: Places, source: random.Random, n: int) -> tuple[Places, list[Row]]:
    return [], _copied(model, source, n)


def _direct(model: SlotModel, places: Places, source: random.Random, n: int) -> tuple[Places, list[Row]]:
    names = list(range(model.vocabulary))
    source.shuffle(names)
    with torch.no_grad():
        model.embed.weight[:, model.slots["output"]] = torch.eye(model.vocabulary, dtype=torch.float64)[names]
    rows = []
    for _ in range(n):
        a, b, x, y = source.sample(range(model.vocabulary), 4)
        rows.append((_text(a, b, x), _text(a, b, y), f" w{names[x]}", f" w{names[y]}"))
    return [], rows


def _decoy(model: SlotModel, places: Places, source: random.Random, n: int) -> tuple[Places, list[Row]]:
    model.wire(*places[0], {"q": model.at(0), "k": model.slot("position"), "v": model.slot("token")}, "output")
    return [], _copied(model, source, n)


KINDS: dict[str, Callable[[SlotModel, Places, random.Random, int], tuple[Places, list[Row]]]] = {
    "copy": _copy, "pair": _pair, "induction": _induction, "mover": _mover, "chain": _chain,
    "noise": _noise, "direct": _direct, "decoy": _decoy,
}  # fmt: skip
WITHOUT = ("noise", "direct", "decoy")
"""Kinds without a circuit."""
