"""Files with something changed in them: damaged ones are noticed, those made to fit are read or refused, never more.

A file that someone changed and signed again may be read, if it still is one; all else is a `FormatError`. The mutations
are drawn from fixed seeds, so that a failure can be found again.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import workbench
from workbench.analysis.circuits import mib
from workbench.analysis.circuits.circuit import Circuit
from workbench.analysis.circuits.model.graph import Graph
from workbench.analysis.circuits.model.nodes import Layer
from workbench.errors import FormatError, WorkbenchError
from workbench.mechanisms import Place, get
from workbench.mechanisms.rooms.showing import losses_of
from workbench.mechanisms.training import ByteLM, TrainedModel, load
from workbench.storage import files
from workbench.storage.parts import loads
from workbench.sweep.result import Sweep

NASTY: list[Any] = [
    None, True, 0, -1, 10**30, 1e308, float("nan"), float("inf"), "", "x" * 10_000, "\ud800", "\u202e", "../../x", [],
    {}, [[]], {"tensor": "nope"}, {"tensor": None}, {"tensor": ["a"]}, {"array": "nope"}, {"tuple": 5},
    {"items": [[1]]}, {"items": [[[], 1]]}, {"items": 5}, {"": 1}, 2**63, "\x00", [None] * 50,
]  # fmt: skip
Change = Callable[[Any, dict[str, Tensor], random.Random], str | None]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from places(item, (*path, key))


def owner_of(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        value = value[key]
    return value


def put(header: Any, tensors: dict[str, Tensor], draw: random.Random) -> None:
    path = draw.choice([path for path in places(header) if path])
    owner_of(header, path)[path[-1]] = draw.choice(NASTY)


def removed(header: Any, tensors: dict[str, Tensor], draw: random.Random) -> None:
    path = draw.choice([path for path in places(header) if path])
    del owner_of(header, path)[path[-1]]


def added(header: Any, tensors: dict[str, Tensor], draw: random.Random) -> None:
    path = draw.choice([path for path in places(header) if isinstance(owner_of(header, (*path, 0)), dict)])
    owner_of(header, (*path, 0))[draw.choice(["zzz", "__class__", "tensor", "tuple", "site"])] = draw.choice(NASTY)


def deep(header: Any, tensors: dict[str, Tensor], draw: random.Random) -> str:
    path = draw.choice([path for path in places(header) if path])
    owner_of(header, path)[path[-1]] = "@"
    n = draw.choice([100, 1000, 100_000])
    return json.dumps(header).replace('"@"', "[" * n + "]" * n, 1)


def doubled(header: Any, tensors: dict[str, Tensor], draw: random.Random) -> str:
    return json.dumps(header)[:-1] + f", {json.dumps(draw.choice(list(header)))}: {json.dumps(draw.choice(NASTY))}}}"


def raw(header: Any, tensors: dict[str, Tensor], draw: random.Random) -> str:
    return draw.choice(["", "null", "[]", "5", "{", "NaN", "{}", '{"version": 2}', '{"version": null}',
                        '{"version": [2]}', '{"version": 2, "fields": 5}', "\ufeff{}", "1" * 5000])  # fmt: skip


def reshaped(header: Any, tensors: dict[str, Tensor], draw: random.Random) -> None:
    name = draw.choice(sorted(tensors))
    one = tensors[name]
    tensors[name] = draw.choice([one.flatten(), one[None], one.flatten()[:1], one.flatten()[:0], one.reshape(-1, 1)])


def recast(header: Any, tensors: dict[str, Tensor], draw: random.Random) -> None:
    name = draw.choice(sorted(tensors))
    dtypes = [torch.float64, torch.float16, torch.int64, torch.bool, torch.uint8, torch.bfloat16]
    tensors[name] = tensors[name].to(draw.choice(dtypes))


def swapped(header: Any, tensors: dict[str, Tensor], draw: random.Random) -> None:
    a, b = draw.choice(sorted(tensors)), draw.choice(sorted(tensors))
    tensors[a], tensors[b] = tensors[b], tensors[a]


def lost(header: Any, tensors: dict[str, Tensor], draw: random.Random) -> None:
    del tensors[draw.choice(sorted(tensors))]


KINDS = ("capture", "gates", "circuit", "sweep", "mechanism_model")
CHANGES: list[Change] = [put, put, put, removed, added, deep, doubled, raw, reshaped, recast, swapped, lost]


def changed(path: Path, target: Path, draw: random.Random) -> None:
    """One change, signed as one who knows the format would."""
    with safe_open(path, framework="pt") as file:
        told = file.metadata()
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    header = json.loads(told["header"])
    text = draw.choice(CHANGES)(header, tensors, draw)
    text = json.dumps(header) if text is None else text
    tensors = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}
    save_file(tensors, target, told | {"header": text, "sha256": files._digest(text, tensors)})


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Callable[[Path], Any]]]:
    """A small file of each kind, and what reads it and uses what was read."""
    folder = tmp_path_factory.mktemp("written")
    model = nn.TransformerEncoderLayer(16, 4, batch_first=True).eval()
    names = ("entropy", "received", "top_keys", "pooled_max")
    with workbench.attach(model) as wb, torch.no_grad(), wb.capture(names, z=True, values=True) as cap:
        model(torch.randn(1, 7, 16))
    graph = Graph((Layer(2, 1), Layer(2, 1)), 8)
    n, edges = len(graph.senders), (len(graph.senders), len(graph.receivers))
    torch.manual_seed(0)
    made = (torch.ones(n).bool(), graph.exists, torch.randn(n).double(), torch.randn(edges).double())
    circuit = Circuit.from_mib(mib.write(folder / "circuit.json", graph, *made))
    sweep = Sweep(
        variants=("a", "b"), metrics=("m",), values=torch.randn(2, 1, 3).double(), clean=torch.randn(1, 3).double(),
        done=torch.ones(2, 2).bool(), batch_sizes=(2, 1), mode="full", reason="", batched=True, identity={"a": [1]},
        provenance={},
    )  # fmt: skip

    def captured(path: Path) -> None:
        found = workbench.load_capture(path)
        repr(found)
        for site in [site for call in found.calls for site in call]:
            repr(site)

    def circuited(path: Path) -> None:
        found = Circuit.load(path)
        repr(found)
        assert found.table is not None

    def swept(path: Path) -> None:
        found = Sweep.load(path)
        repr(found)
        assert found.table is not None

    def trained(path: Path) -> None:
        found = load(path)
        losses_of(found)
        assert found.model.stack.layers

    torch.manual_seed(0)
    place = Place(8, 2, 6)
    learned = TrainedModel(ByteLM(place, ["moh"], 4), {"text": 1.0}, {"losses": [[1, 2.0]], "steps": 1})
    gate = get("van").build(Place(8, 1, 6, causal=False, grid=(2, 3))).eval()
    with workbench.attach(gate) as wb, torch.no_grad(), wb.capture(["row_sum"], z=True, values=True) as gates:
        gate(torch.randn(1, 6, 8))

    def read_mib(path: Path) -> None:
        found = Circuit.from_mib(path)
        repr(found)
        assert found.table is not None

    return {
        "capture": (cap.save(folder / "capture", pattern=True), captured),
        "gates": (gates.save(folder / "gates", pattern=True), captured),
        "mechanism_model": (learned.save(folder / "model"), trained),
        "circuit": (circuit.save(folder / "circuit"), circuited),
        "sweep": (sweep.save(folder / "sweep"), swept),
        "mib": (folder / "circuit.json", read_mib),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_made_to_fit_is_read_or_refused(
    written: dict[str, tuple[Path, Callable[[Path], Any]]], kind: str, tmp_path: Path
) -> None:
    path, use = written[kind]
    use(path)
    refused = 0
    for seed in range(150):
        changed(path, tmp_path / "file", random.Random(seed))
        try:
            use(tmp_path / "file")
        except FormatError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"seed {seed} gives a {type(error).__name__}") from error
    assert refused > 75


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_damaged_is_noticed(
    written: dict[str, tuple[Path, Callable[[Path], Any]]], kind: str, tmp_path: Path
) -> None:
    path, use = written[kind]
    whole = path.read_bytes()
    for seed in range(150):
        draw = random.Random(seed)
        data = bytearray(whole)
        if draw.random() < 0.2:
            data = data[: draw.randrange(len(data))]
        else:
            for _ in range(draw.choice([1, 2, 5])):
                data[draw.randrange(len(data) if draw.random() < 0.5 else 300)] ^= 1 << draw.randrange(8)
        (tmp_path / "file").write_bytes(data)
        try:
            use(tmp_path / "file")
        except FormatError:
            continue
        except Exception as error:
            raise AssertionError(f"seed {seed} gives a {type(error).__name__}") from error
        form = f"workbench.{'capture' if kind == 'gates' else kind}"
        assert files.read(tmp_path / "file", form)[0] == files.read(path, form)[0]


@pytest.mark.parametrize(
    "said",
    [
        {"place.d_model": 4_000_000}, {"place.length": 10**9}, {"place.n_heads": 10**6}, {"place.length": 7},
        {"hidden": 10**9}, {"hidden": 5}, {"layers": ["moh"] * 1000}, {"layers": ["moh"] * 2}, {"layers": []},
        {"layers": [["moh"]]}, {"work": []}, {"work": "images"}, {"place.grid": [1, 6]}, {"place.causal": 1},
        {"scores": []}, {"facts": {}}, {"facts.losses": [[1]]}, {"facts.losses": [1, 2]},
    ],
    ids=lambda said: f"{next(iter(said))}={next(iter(said.values()))!r}"[:40],
)  # fmt: skip
def test_nothing_is_made_by_the_sizes_that_a_trained_model_says(
    written: dict[str, tuple[Path, Callable[[Path], Any]]], said: dict[str, Any], tmp_path: Path
) -> None:
    header, tensors = files.read(written["mechanism_model"][0], "workbench.mechanism_model")
    told = {name: value for name, value in header.value.items() if name != "version"}
    for name, value in said.items():
        *inside, last = name.split(".")
        owner_of(told, (*inside, last))[last] = value
    with pytest.raises(FormatError):
        load(files.write(tmp_path / "file", "workbench.mechanism_model", told, tensors))


def test_a_trained_model_that_would_not_be_read_is_not_written(tmp_path: Path) -> None:
    wide = TrainedModel(ByteLM(Place(1024, 2, 2), ["moh"], 0), {}, {"losses": []})
    with pytest.raises(WorkbenchError, match="at most 32 layers"):
        wide.save(tmp_path / "file")


def test_mib_files_of_any_kind_are_read_or_refused(
    written: dict[str, tuple[Path, Callable[[Path], Any]]], tmp_path: Path
) -> None:
    path, use = written["mib"]
    text = path.read_text()
    odd = [b"", b"null", b"[]", b"5", b"\xff", b"\xef\xbb\xbf" + text.encode(),
           b'{"cfg": {}, "nodes": {}, "edges": {}}',
           b'{"cfg": ' + b"[" * 100_000, b"1" * 5000]  # fmt: skip
    for key in ("n_layers", "n_heads", "d_model", "n_key_value_heads", "parallel_attn_mlp"):
        for value in (*NASTY, 3, 7, 1000, 20_000, 10**5, 2.5, "2", 10**400):
            data = json.loads(text)
            data["cfg"][key] = value
            odd.append(json.dumps(data).encode("utf-8", "surrogatepass"))
    for seed in range(200):
        data, draw = json.loads(text), random.Random(seed)
        made = draw.choice([put, put, removed, added, deep, doubled])(data, {}, draw)
        odd.append((json.dumps(data) if made is None else made).encode("utf-8", "surrogatepass"))
    for i, raw_text in enumerate(odd):
        (tmp_path / "file").write_bytes(raw_text)
        try:
            use(tmp_path / "file")
        except FormatError:
            continue
        except Exception as error:
            raise AssertionError(f"file {i}, {raw_text[:80]!r}, gives a {type(error).__name__}") from error


def test_modules_of_any_name_can_be_kept(tmp_path: Path) -> None:
    names = ["\ud800", "é/ü", 'quote"d', "back\\slash", "\u202eback", "new\nline"]
    odd = nn.ModuleDict()
    for name in names:
        odd._modules[name] = nn.TransformerEncoderLayer(16, 4, batch_first=True).eval()

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd = odd

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.odd._modules.values():
                x = layer(x)
            return x

    with workbench.attach(Outer().eval()) as wb, torch.no_grad(), wb.capture() as cap:
        wb.model(torch.randn(1, 5, 16))
    again = workbench.load_capture(cap.save(tmp_path / "file"))
    assert [site.site.name for site in again] == [site.site.name for site in cap]
    for before, after in zip(cap, again, strict=True):
        assert torch.equal(before.entropy, after.entropy)
    for shown in (repr(again), repr(again.sites), *(repr(site) for site in again)):
        assert shown.isprintable() or all(line.isprintable() for line in shown.split("\n"))
        shown.encode()


@pytest.mark.parametrize(
    ("text", "said"),
    [("[" * 65 + "]" * 65, "nested"), ('{"a": 1, "a": 2}', "twice"), ("9" * 5000, "digit"),
     ('"\\' * 50_000, "JSON|Unterminated"),
     ('["' + "[" * 1000 + '"]', None), ("[" * 64 + "]" * 64, None)],
)  # fmt: skip
def test_json_has_bounds(text: str, said: str | None) -> None:
    if said is None:
        assert loads(text) == json.loads(text)
    else:
        with pytest.raises(ValueError, match=said):
            loads(text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda pattern: replace_mask(pattern, offset=1_000_000), "beyond its keys"),
        (lambda pattern: replace_mask(pattern, offset=-1_000_000), "beyond its keys"),
        (lambda pattern: replace_mask(pattern, causal=False), "do not belong together"),
        (lambda pattern: setattr(pattern, "scale", pattern.scale * 3), "do not belong together"),
        (lambda pattern: setattr(pattern, "lse", pattern.lse - 2), "do not belong together"),
        (lambda pattern: None, None),
    ],
    ids=["behind", "before", "not-causal", "scale", "lse", "as-it-was"],
)
def test_scores_mask_and_denominators_belong_together(
    tmp_path: Path, edit: Callable[[Any], None], said: str | None, dtype: torch.dtype
) -> None:
    config = GPT2Config(
        n_layer=1, n_head=2, n_embd=16, vocab_size=30, n_positions=32, bos_token_id=None, eos_token_id=None
    )
    model = GPT2LMHeadModel(config).eval().to(dtype)
    torch.nn.init.normal_(model.transformer.h[0].attn.c_attn.weight)
    with torch.no_grad(), workbench.attach(model) as wb, wb.capture() as cap:
        model(torch.randint(0, 30, (2, 19)))
    edit(cap[0].lazy)
    path = cap.save(tmp_path / "run.safetensors", pattern=True)
    if said is None:
        workbench.load_capture(path)
        return
    with pytest.raises(FormatError, match=said):
        workbench.load_capture(path)


def replace_mask(pattern: Any, **rules: Any) -> None:
    pattern.mask = dataclasses.replace(pattern.mask, **rules)
