"""Deconstructed attention: what each variant gives up, equal sizes, and models in which it is laid out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import workbench
from workbench import WorkbenchError, mechanisms
from workbench.kernels.systems import taylor_features
from workbench.kernels.taylor import taylor_attention
from workbench.mechanisms import Place
from workbench.mechanisms.deconstructed import LAYOUTS, laid_out
from workbench.mechanisms.training import ByteLM, load
from workbench.mechanisms.training.__main__ import main

PLACE = Place(24, 4, 13, rotary=True)
torch.manual_seed(0)
X, OTHER = torch.randn(2, 2, 13, 24, dtype=torch.float64)
FORMS = ("standard", "mlp", "taylor", "keys", "random", "text", "embedding")


def _layer(form: str, **options: Any) -> Any:
    torch.manual_seed(1)
    return mechanisms.get("deconstructed").build(PLACE, form, **options).double().eval()


def _map(model: Any, *inputs: Tensor, layer: int = 0) -> Tensor:
    with torch.no_grad(), workbench.attach(model) as wb, wb.capture([]) as cap:
        model(*inputs)
    return cap[wb.sites[layer].name].pattern.dense()


def _model(*layers: str) -> ByteLM:
    torch.manual_seed(0)
    model = ByteLM(PLACE, [f"deconstructed:{form}" for form in layers], hidden=20).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def _ids(seed: int) -> Tensor:
    return torch.randint(1, 127, (2, 11), generator=torch.Generator().manual_seed(seed))


def test_all_seven_have_as_many_parameters() -> None:
    sizes = {form: sum(p.numel() for p in _layer(form).parameters()) for form in FORMS}
    assert sizes.pop("mlp") == pytest.approx(sizes["standard"], abs=1.5 * 24)  # to the nearest width
    assert set(sizes.values()) == {4 * 24**2 + 3 * 24}


@torch.no_grad()
def test_an_mlp_mixes_no_tokens() -> None:
    layer, changed = _layer("mlp"), X.clone()
    changed[:, [3, 8]] = OTHER[:, [3, 8]]
    same = (layer(changed) == layer(X)).all(-1).all(0)
    assert same.tolist() == [at not in (3, 8) for at in range(13)]
    assert torch.equal(_map(layer, X), torch.eye(13, dtype=X.dtype).expand(2, 1, 13, 13))


@torch.no_grad()
def test_the_polynomial_is_read_from_a_state_of_constant_size() -> None:
    q, k, v = (torch.randn(2, 3, 9, 4, dtype=torch.float64) for _ in range(3))
    phi, psi = taylor_features(q / 2, 2), taylor_features(k, 2)  # 1/√d = 1/2
    state, size = torch.zeros(2, 3, 21, 4, dtype=torch.float64), torch.zeros(2, 3, 21, dtype=torch.float64)
    whole = taylor_attention(q, k, v)
    for t in range(9):
        state, size = state + psi[:, :, t, :, None] * v[:, :, t, None], size + psi[:, :, t]
        row = (phi[:, :, t, None] @ state)[:, :, 0] / (phi[:, :, t] * size).sum(-1, keepdim=True)
        torch.testing.assert_close(row, whole[:, :, t])


@torch.no_grad()
def test_one_score_a_key_is_a_running_softmax() -> None:
    layer = _layer("keys")
    weights, (q, k, v) = _map(layer, X), layer.heads(X)
    assert torch.equal(weights[:, :, 0], torch.eye(13, dtype=X.dtype)[0].expand(2, 4, 13))
    ratio = weights[..., 3] / weights[..., 2]
    torch.testing.assert_close(ratio[..., 3:], ratio[..., -1:].expand(-1, -1, 10))
    scores = (torch.nn.functional.silu(q) * k).sum(-1) / math.sqrt(6)
    torch.testing.assert_close(ratio[..., -1], (scores[..., 3] - scores[..., 2]).exp())
    top, size, total = scores[..., 0], torch.zeros(2, 4).double(), torch.zeros(2, 4, 6).double()
    rows = []
    for t in range(13):
        higher = torch.maximum(top, scores[..., t])
        fade, new = (top - higher).exp(), (scores[..., t] - higher).exp()
        size, total, top = fade * size + new, fade[..., None] * total + new[..., None] * v[:, :, t], higher
        rows.append(total / size[..., None])
    torch.testing.assert_close(torch.stack(rows, 2), layer.mix(q, k, v, X))


@pytest.mark.parametrize("source", ["random", "text"])
def test_queries_and_keys_of_something_fixed_make_a_fixed_map_in_every_layer(source: str) -> None:
    model = _model(source, "standard", source)
    for layer in (0, 2):
        one, other = (_map(model, _ids(seed), layer=layer) for seed in (1, 2))
        assert torch.equal(one, other)
        assert torch.equal(one[0], one[1])
    assert not torch.allclose(_map(model, _ids(1), layer=1), _map(model, _ids(2), layer=1))
    first, last = (_map(model, _ids(1), layer=layer) for layer in (0, 2))
    with torch.no_grad():
        model.stack.blocks[2].mixer.load_state_dict(model.stack.blocks[0].mixer.state_dict())
        model.stack.blocks[2].norm1.load_state_dict(model.stack.blocks[0].norm1.state_dict())
    assert not torch.allclose(_map(model, _ids(1), layer=2), first)  # what it reads has passed the layers before
    assert not torch.allclose(first, last)


def test_embeddings_do_not_know_what_was_mixed_and_do_know_the_tokens() -> None:
    model = _model("embedding", "embedding")
    before = _map(model, _ids(1), layer=1)
    with torch.no_grad():
        model.stack.blocks[0].mixer.out.weight.mul_(-3)  # another hidden state for the second layer
    torch.testing.assert_close(_map(model, _ids(1), layer=1), before, atol=0, rtol=0)
    changed = _ids(1)
    changed[0, 4] += 1
    after = _map(model, changed, layer=1)
    assert not torch.allclose(after[0, :, 4:], before[0, :, 4:])
    assert torch.equal(after[1], before[1])


@torch.no_grad()
def test_what_passes_beside_does_not_change_standard_layers_and_models_are_causal() -> None:
    model = _model("text", "random", "embedding", "standard")
    ids = _ids(1)
    later = ids.clone()
    later[:, 6:] = 5
    torch.testing.assert_close(model(later)[:, :6], model(ids)[:, :6], atol=1e-12, rtol=0)
    torch.testing.assert_close(model(ids[:, :6]), model(ids)[:, :6], atol=1e-12, rtol=0)
    torch.testing.assert_close(model(ids[:1]), model(ids)[:1], atol=1e-12, rtol=0)
    with workbench.attach(model) as wb:
        assert wb.verify(ids).ok


def test_layouts_are_those_of_the_paper_for_its_24_layers() -> None:
    def stays(layout: str, n: int = 24) -> list[int]:
        layers = laid_out("deconstructed:mlp", layout, n)
        return [at for at, name in enumerate(layers, 1) if name == "deconstructed:standard"]

    assert {layout: stays(layout) for layout in LAYOUTS} == {
        "uniform": [],
        "even": list(range(2, 25, 2)),
        "odd": list(range(1, 24, 2)),
        "top": list(range(1, 13)),
        "middle": [*range(1, 7), *range(19, 25)],
        "bottom": list(range(13, 25)),
        "quarter": [4, 8, 12, 16, 20, 24],
        "first": [1],
        "last": [24],
        "bilateral": [1, 24],
    }
    assert stays("even", 3) == [2]
    for layout, n in (("quarter", 3), ("middle", 3), ("bilateral", 2), ("uniform", 0)):
        with pytest.raises(WorkbenchError, match=f'{n} layers are too few for the layout "{layout}"'):
            laid_out("deconstructed:mlp", layout, n)
    with pytest.raises(WorkbenchError, match='layout="all" is not known'):
        laid_out("deconstructed:mlp", "all", 4)


def test_the_script_trains_a_hybrid_and_its_file_gives_the_same_model(tmp_path: Path) -> None:
    path = tmp_path / "hybrid.safetensors"
    how = ["text", "--layers", "deconstructed:text", "--layout", "last", "--depth", "2", "--hidden", "0", "--quick"]
    made = main([*how, "--out", str(path)])
    assert made.model.stack.layers == ("deconstructed:text", "sqa:mha")
    assert made.model.stack.hidden == 0
    again, ids = load(path).model, _ids(1)
    assert torch.equal(again(ids), made.model(ids))
    with pytest.raises(SystemExit):
        main(["text", "--layers", "moh", "sqa", "--layout", "even", "--out", str(path)])


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(WorkbenchError, match='form="linear" is not known'):
        mechanisms.get("deconstructed").build(PLACE, form="linear")
    with pytest.raises(WorkbenchError, match='source="nowhere" is not known'):
        _layer("random", source="nowhere")
    with pytest.raises(WorkbenchError, match=r"the source must be \[1 or 2, 13, 24\]"):
        _layer("random")(X, X[:, :5])
