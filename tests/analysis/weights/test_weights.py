"""What heads can do by their weights: compared with whole [vocab, vocab] and [d_model, d_model] matrices in float64."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import workbench
from support.hybrid_models import hybrid
from support.kept_elsewhere import Clipped, Elsewhere, put
from support.tiny import family, make
from workbench import (
    AttachError,
    CaptureError,
    CompositionScores,
    InterventionError,
    OVCopying,
    SingularVectors,
    attach,
    composition_scores,
    ov_copying,
    singular_vectors,
)
from workbench.analysis.weights.find import find_weights


@dataclass
class Whole:
    """By hand: [head, d_model, d_model] of every layer with the norms' gains and centring, and [vocab, d_model]."""

    ov: list[Tensor]
    qk: list[Tensor]
    embedding: Tensor
    unembedding: Tensor


def _model(name: str) -> nn.Module:
    model = make(family(name))
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key.lower() or "ln_" in key or key.endswith("bias"):  # norms and biases that do something
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.double()


def _circuits(q: Tensor, k: Tensor, v: Tensor, o: Tensor, n_heads: int, turn: Tensor | None = None) -> list[Tensor]:
    """OV and QK [head, d, d] of [d, all heads · width] matrices; `turn` [width, width] stands between q and k."""
    o = o.unflatten(0, (n_heads, -1))
    width = o.shape[1]

    def cut(m: Tensor) -> Tensor:
        parts = m.unflatten(1, (-1, width)).transpose(0, 1)
        return parts.repeat_interleave(n_heads // len(parts), 0)

    q = cut(q) if turn is None else cut(q) @ turn
    return [cut(v) @ o, q @ cut(k).mT]


def _centred(m: Tensor) -> Tensor:
    """A matrix that reads what has its mean taken off."""
    return m - m.mean(0, keepdim=True)


def _gpt2(model: Any, distance: int) -> Whole:
    ov, qk = [], []
    for block in model.transformer.h:
        parts = _centred(block.ln_1.weight[:, None] * block.attn.c_attn.weight).chunk(3, -1)
        each = _circuits(*parts, block.attn.c_proj.weight, model.config.n_head)
        ov.append(each[0])
        qk.append(each[1])
    head = _centred(model.transformer.ln_f.weight[:, None] * model.lm_head.weight.T).T
    return Whole(ov, qk, model.transformer.wte.weight, head)


def _llama(model: Any, distance: int) -> Whole:
    ov, qk = [], []
    width = model.config.head_dim
    angles = distance * 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    cos, sin = torch.diag(angles.cos()), torch.diag(angles.sin())
    turn = torch.cat([torch.cat([cos, sin], 1), torch.cat([-sin, cos], 1)])  # rows: pairs i and i + width / 2
    for block in model.model.layers:
        a, gain = block.self_attn, block.input_layernorm.weight[:, None]
        parts = [gain * m.weight.T for m in (a.q_proj, a.k_proj, a.v_proj)]
        each = _circuits(*parts, a.o_proj.weight.T, model.config.num_attention_heads, turn)
        ov.append(each[0])
        qk.append(each[1])
    return Whole(ov, qk, model.model.embed_tokens.weight, model.lm_head.weight * model.model.norm.weight)


def _t5(model: Any, distance: int) -> Whole:
    ov, qk = [], []
    for block in model.decoder.block:
        a, gain = block.layer[0].SelfAttention, block.layer[0].layer_norm.weight[:, None]
        each = _circuits(*[gain * m.weight.T for m in (a.q, a.k, a.v)], a.o.weight.T, model.config.num_heads)
        ov.append(each[0])
        qk.append(each[1])
    return Whole(ov, qk, model.shared.weight, model.lm_head.weight * model.decoder.final_layer_norm.weight)


BY_HAND: dict[str, Callable[[Any, int], Whole]] = {"gpt2": _gpt2, "llama-gqa": _llama, "t5": _t5}
CLOSE = {"rtol": 2e-5, "atol": 1e-7}


def _scaled(a: Tensor) -> Tensor:
    return a / a.norm(dim=(-2, -1), keepdim=True)


@pytest.mark.parametrize("name", BY_HAND)
def test_copying_has_the_eigenvalues_of_the_whole_matrix(name: str) -> None:
    model = _model(name)
    with torch.no_grad():
        whole = BY_HAND[name](model, 0)
    with attach(model) as wb:
        found = ov_copying(wb)
    ov = torch.cat(whole.ov)
    assert found.numbers == tuple(range(len(whole.ov[0]))) * len(whole.ov)
    matrices = whole.embedding @ ov @ whole.unembedding.T  # [head, vocab, vocab]
    values = torch.view_as_complex(found.eigenvalues.contiguous())
    factor = values[0].sum().real / matrices[0].trace()  # T5 scales what it unembeds
    for power in (1, 2, 3):  # sums of powers tell a set of numbers
        truth = torch.stack([torch.linalg.matrix_power(m * factor, power).trace() for m in matrices])
        torch.testing.assert_close(values.pow(power).sum(-1).real, truth.detach(), rtol=1e-6, atol=1e-8)
    largest = torch.linalg.eigvals(matrices).abs().sum(-1)
    truth = matrices.diagonal(dim1=-2, dim2=-1).sum(-1) / largest
    torch.testing.assert_close(found.scores, truth.detach(), rtol=1e-5, atol=1e-7)


def test_planted_heads_copy_and_suppress() -> None:
    """W_V W_O of one head is a part of the identity, of the other its negative; the vocabulary is orthogonal."""
    torch.manual_seed(0)
    config = hf.GPT2Config(
        n_layer=1, n_head=2, n_embd=32, vocab_size=32, n_positions=16, bos_token_id=1, eos_token_id=2
    )
    model = hf.GPT2LMHeadModel(config).eval().double()
    with torch.no_grad():
        model.transformer.wte.weight.copy_(torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64))[0])
        attention = model.transformer.h[0].attn
        attention.c_attn.weight[:, 64:] = torch.eye(32)
        attention.c_proj.weight.copy_(torch.eye(32) * torch.tensor([1.0] * 16 + [-1.0] * 16)[:, None])
    with attach(model) as wb:
        found = ov_copying(wb)
    assert found.scores.tolist() == pytest.approx([1, -1], abs=1e-6)


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("distance", [0, 3])
def test_composition_is_that_of_the_whole_matrices(name: str, distance: int) -> None:
    model = _model(name)
    with torch.no_grad():
        whole = BY_HAND[name](model, distance)
    with attach(model) as wb:
        found = composition_scores(wb, distance=distance)
    n = len(whole.ov[0])
    later = [whole.qk[1], whole.qk[1].mT, whole.ov[1]]
    for kind, m in enumerate(later):
        for i in range(n):
            truth = (whole.ov[0][i] @ m).norm(dim=(1, 2)) / (whole.ov[0][i].norm() * m.norm(dim=(1, 2)))
            torch.testing.assert_close(found.scores[kind, i, n : 2 * n], truth.detach(), **CLOSE)
    assert found.scores[:, n:, :n].isnan().all()
    assert found.scores[:, :n, :n].isnan().all()


@pytest.mark.parametrize("name", BY_HAND)
def test_singular_vectors_are_those_of_the_whole_matrices(name: str) -> None:
    model = _model(name)
    for circuit, distance in (("ov", 0), ("qk", 0), ("qk", 2)):
        with torch.no_grad():
            whole = BY_HAND[name](model, distance)
        with attach(model) as wb:
            tower = "decoder." if name == "t5" else "blocks."
            heads = [f"{tower}0.attn.H1", f"{tower}1.attn.H2"]
            found = singular_vectors(wb, heads, circuit=circuit, vectors=2, top=4, distance=distance)
        for at, (layer, head) in enumerate([(0, 1), (1, 2)]):
            u, s, vh = torch.linalg.svd((whole.ov if circuit == "ov" else whole.qk)[layer][head].detach())
            torch.testing.assert_close(found.values[at], s[:2], **CLOSE)
            torch.testing.assert_close(found.share[at], (s.square() / s.square().sum())[:2], **CLOSE)
            for vector in range(2):
                left = whole.embedding.detach() @ u[:, vector]
                right = (whole.unembedding if circuit == "ov" else whole.embedding).detach() @ vh[vector]
                sign = 1.0 if int(left.argmax()) == int(found.left_ids[at, vector, 0, 0]) else -1.0
                for side, ids in ((left, found.left_ids), (right, found.right_ids)):
                    assert ids[at, vector, 0].tolist() == (sign * side).topk(4).indices.tolist()
                    assert ids[at, vector, 1].tolist() == (-sign * side).topk(4).indices.tolist()
                torch.testing.assert_close(found.left_scores[at, vector, 0], (sign * left).topk(4).values, **CLOSE)


def test_a_head_without_weights_has_no_directions() -> None:
    model = _model("gpt2")
    with torch.no_grad():
        model.transformer.h[0].attn.c_proj.weight.zero_()
    with attach(model) as wb:
        found = singular_vectors(wb, ["L0H1", "L1H0"], vectors=2, top=3)
        copying, composition = ov_copying(wb), composition_scores(wb)
    gone = found.table["layer"] == 0
    assert (found.table.loc[gone, ["reads", "writes"]] == "").all(axis=None)
    assert (found.table.loc[~gone, ["reads", "writes"]] != "").all(axis=None)
    assert repr(found) == "SingularVectors(ov: L0H1 is 0 and has no directions)"
    wanted = r"OVCopying\(8 heads; (L1H\d [+-]\d\.\d\d, ){4}4 that can write nothing have no score\)"
    assert re.fullmatch(wanted, repr(copying))
    assert repr(composition) == "CompositionScores(8 heads; their weights are 0, and none has a score)"


def test_rotary_queries_and_keys_give_the_scores_of_the_kernel() -> None:
    """Of the first layer, whose stream is the embeddings: x W_Q · y W_K is q · k as the kernel got them."""
    model, distance = _model("llama-gqa"), 4
    tokens = torch.tensor([[7, 20, 9, 31, 12]])
    with attach(model) as wb:
        site = find_weights(wb, qk=True, distance=distance).sites[0]
        with torch.no_grad(), wb.capture(sites=[0]) as cap:
            model(tokens)
    _, state = cap[0].pattern.state()
    x = model.model.embed_tokens(tokens)[0].detach()
    x = x * (x.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).rsqrt()
    for head in range(site.n_heads):
        mine = (x[distance] @ site.each(site.q)[head]) @ (x[0] @ site.each(site.k)[head])
        theirs = state["q"][0, head, distance] @ state["k"][0, head // (site.n_heads // len(site.k)), 0]
        torch.testing.assert_close(mine, theirs.double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [Clipped, Elsewhere])
def test_weights_that_are_not_there_are_refused_by_name(kind: type[nn.Linear]) -> None:
    said = "no matrix of floating-point" if kind is Clipped else "offloaded"
    for part, calls in (
        ("v_proj", (ov_copying, composition_scores)),
        ("o_proj", (ov_copying, composition_scores, _attribution, _circuit)),
        ("q_proj", (composition_scores, _vectors)),
    ):
        model = _model("llama-gqa").float()
        put(model, f"model.layers.1.self_attn.{part}", kind)
        with attach(model) as wb:
            for call in calls:
                with pytest.raises(AttachError, match=rf"layers\.1\.self_attn.*{said}"):
                    call(wb)
            if part == "q_proj":
                ov_copying(wb)  # needs no queries


def _vectors(wb: workbench.Workbench) -> Any:
    return singular_vectors(wb, "L0H1", circuit="qk")


def _attribution(wb: workbench.Workbench) -> Any:
    return workbench.logit_attribution(wb, {"input_ids": torch.tensor([[5, 9, 4]])}, 7)


def _circuit(wb: workbench.Workbench) -> Any:
    from workbench.analysis.circuits.model.anatomy import find_anatomy

    return find_anatomy(wb, {"input_ids": torch.tensor([[5, 9, 4]])})


def test_offloaded_weights_that_are_told_are_read() -> None:
    accelerate = pytest.importorskip("accelerate")
    with attach(_model("llama-gqa").float()) as wb:
        truth = ov_copying(wb)
    model = accelerate.cpu_offload(_model("llama-gqa").float(), execution_device=torch.device("cpu"))
    with attach(model) as wb:
        torch.testing.assert_close(ov_copying(wb).eigenvalues, truth.eigenvalues)


def test_bad_input_is_named() -> None:
    with attach(_model("qwen3")) as wb:
        ov_copying(wb)
        with pytest.raises(
            AttachError, match=r"the queries of this site are no linear function of what .*q_proj gives"
        ):
            composition_scores(wb)
    with attach(_model("gpt2")) as wb:
        for call, error, said in (
            (lambda: composition_scores(wb, distance=64), CaptureError, "a distance is at least 0"),
            (lambda: composition_scores(wb, distance=-1), CaptureError, "a distance is at least 0"),
            (lambda: singular_vectors(wb, "L0H9"), InterventionError, "L0H9|head 9|no head"),
            (lambda: singular_vectors(wb, "L0H1", circuit="vo"), CaptureError, "circuit is"),
            (lambda: singular_vectors(wb, "L0H1", vectors=9), CaptureError, "vectors is from 1 to 8"),
            (lambda: singular_vectors(wb, "L0H1", top=0), CaptureError, "top from 1"),
        ):  # fmt: skip
            with pytest.raises(error, match=said):
                call()
    with attach(_model("t5")) as wb, pytest.raises(CaptureError, match="no self-attention of the stream"):
        singular_vectors(wb, "decoder.0.cross_attn.H1")
    for name in ("vit", "whisper", "timm-vit-fused"):
        with attach(make(family(name))) as wb, pytest.raises(CaptureError, match="does not run on token ids alone"):
            ov_copying(wb)
    with attach(hybrid("qwen3-next")) as wb, pytest.raises(AttachError, match="behind a gate, norm or skip"):
        ov_copying(wb)
    with attach(_model("bert")) as wb, pytest.raises(workbench.WorkbenchError):
        ov_copying(wb)


def test_results_are_kept_and_shown(tmp_path: Path) -> None:
    model, tokenizer = workbench.models.load("demo-lm")
    with attach(model, tokenizer) as wb:
        copying, pairs = ov_copying(wb), composition_scores(wb)
        vectors = singular_vectors(wb, ["L1H6"], top=3)
    again = OVCopying.load(copying.save(tmp_path / "a.safetensors"))
    assert again.table.equals(copying.table)
    other = CompositionScores.load(pairs.save(tmp_path / "b.safetensors"))
    assert other.table.equals(pairs.table)
    third = SingularVectors.load(vectors.save(tmp_path / "c.safetensors"))
    assert third.table.equals(vectors.table)
    for result in (copying, pairs, vectors):
        assert "L1H6" in repr(result)
        assert len(result.to_png()) > 1000
        assert "<html" in str(result.to_html())
