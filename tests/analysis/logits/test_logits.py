"""Logit attribution and the logit lens, compared with the same by hand in float64, and with the model's own logits."""

from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import workbench
from support.hybrid_models import hybrid
from support.tiny import family, make
from support.zoo.family import ids
from workbench import AttachError, CaptureError, LogitAttribution, LogitLens, TaskError, attach
from workbench import logit_attribution as attribute


def _model(name: str) -> nn.Module:
    model = make(family(name))
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or "ln_" in key or key.endswith("bias"):  # norms and biases that do something
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.double()


def _inputs(name: str) -> dict[str, Tensor]:
    found = {"input_ids": ids(2, 11) % 40}
    return found | ({"decoder_input_ids": ids(2, 6, 1) % 40} if name.startswith("t5") else {})


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "t5", "gpt-neox", "gemma2", "qwen3"])
def test_shares_sum_to_the_logit_of_the_model(name: str) -> None:
    model, inputs = _model(name), _inputs(name)
    with attach(model) as wb:
        for position in (-1, 2):
            found = attribute(wb, inputs, 7, contrast=[9, 11], position=position)
            with torch.no_grad():
                logits = model(**inputs).logits[:, position]
            truth = logits[:, 7] - logits[[0, 1], [9, 11]]
            torch.testing.assert_close(found.capped, truth, rtol=1e-9, atol=1e-9)
            # Norms of all but GPT-2's kind are computed in float32, whatever the model's dtype.
            close = 1e-10 if name in ("gpt2", "gpt-neox") else 2e-5
            assert float(found.rounding.abs().max()) < close * float(found.values.abs().sum(0).max())
            assert (found.cap is not None) == (name == "gemma2")
            assert {"head", "mlp", "embedding"} <= set(found.kinds)
            if found.cap is None:
                torch.testing.assert_close(found.logits, truth)


def test_a_head_of_gpt2_by_hand() -> None:
    model, inputs = _model("gpt2"), _inputs("gpt2")
    body, kept = model.transformer, {}
    handles = [
        block.attn.c_proj.register_forward_pre_hook(lambda _, args, i=i: kept.__setitem__(i, args[0]))
        for i, block in enumerate(body.h)
    ]
    handles.append(body.ln_f.register_forward_pre_hook(lambda _, args: kept.__setitem__("end", args[0])))
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    with attach(model) as wb:
        found = attribute(wb, inputs, 7, contrast=9)
    end, n = kept["end"][:, -1], model.config.n_head
    sigma = (end.var(-1, correction=0, keepdim=True) + body.ln_f.eps).sqrt()
    direction = (model.lm_head.weight[7] - model.lm_head.weight[9]) * body.ln_f.weight
    width = end.shape[-1] // n
    for layer in range(len(body.h)):
        for head in range(n):
            cut = slice(head * width, (head + 1) * width)
            written = kept[layer][:, -1, cut] @ body.h[layer].attn.c_proj.weight[cut]
            truth = ((written - written.mean(-1, keepdim=True)) / sigma) @ direction
            at = found.names.index(f"L{layer}H{head}")
            torch.testing.assert_close(found.values[at], truth.detach(), rtol=1e-8, atol=1e-10)
    names = [name for name, kind in zip(found.names, found.kinds, strict=True) if kind == "embedding"]
    assert names == ["transformer.wte", "transformer.wpe"]


def test_a_planted_head_has_all_of_the_logit() -> None:
    """Tokens are axes of the stream; one head writes 3 along token 7's, the rest nothing."""
    config = hf.GPT2Config(
        n_layer=1, n_head=2, n_embd=32, vocab_size=32, n_positions=16, bos_token_id=1, eos_token_id=2
    )
    model = hf.GPT2LMHeadModel(config).eval().double()
    with torch.no_grad():
        for parameter in model.transformer.h.parameters():
            parameter.zero_()
        model.transformer.wpe.weight.zero_()
        model.transformer.wte.weight.copy_(torch.eye(32))
        attention = model.transformer.h[0].attn
        attention.c_attn.bias[64 + 16] = 3  # the first value of the second head, whatever it attends to
        attention.c_proj.weight[16, 7] = 1
    with attach(model) as wb:
        found = attribute(wb, {"input_ids": torch.tensor([[4, 20, 11]])}, 7, contrast=9)
    sigma = (10 / 32 - (4 / 32) ** 2 + 1e-5) ** 0.5  # of a stream with 1 along token 11 and 3 along token 7
    for name, value in zip(found.names, found.values[:, 0].tolist(), strict=True):
        assert value == pytest.approx(3 / sigma if name == "L0H1" else 0, abs=1e-12), name
    assert float(found.logits) == pytest.approx(3 / sigma)


@pytest.mark.parametrize("name", ["llama-gqa", "t5"])
def test_heads_of_rms_norms_by_hand(name: str) -> None:
    """Also behind shared keys, and in cross-attention."""
    model, inputs = _model(name), _inputs(name)
    joins = {n: m for n, m in model.named_modules() if n.endswith((".o_proj", ".o")) and not n.startswith("encoder")}
    norm = model.model.norm if name == "llama-gqa" else model.decoder.final_layer_norm
    kept: dict[str, Tensor] = {}
    handles = [
        m.register_forward_pre_hook(lambda _, args, n=n: kept.__setitem__(n, args[0].detach()))
        for n, m in {**joins, "end": norm}.items()
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    with attach(model) as wb:
        found = attribute(wb, inputs, 7)
    end = kept["end"][:, -1]
    eps = norm.variance_epsilon
    factor = model.config.d_model**-0.5 if name == "t5" and model.config.tie_word_embeddings else 1.0
    direction = model.lm_head.weight[7].detach() * norm.weight.detach() * factor
    direction = direction / (end.square().mean(-1, keepdim=True) + eps).sqrt()
    of_site: dict[str, list[int]] = {}
    for i, (site, kind) in enumerate(zip(found.sites, found.kinds, strict=True)):
        if kind == "head":
            of_site.setdefault(site, []).append(i)
    assert len(of_site) == len(joins)
    for site, members in of_site.items():
        out = next(n for n in joins if n.startswith(f"{site}."))
        width = kept[out].shape[-1] // len(members)
        for head, member in enumerate(members):
            cut = slice(head * width, (head + 1) * width)
            truth = ((kept[out][:, -1, cut] @ joins[out].weight[:, cut].detach().T) * direction).sum(-1)
            torch.testing.assert_close(found.values[member], truth, rtol=1e-4, atol=1e-6)


FINAL = {"qwen3-next": ("norm", 1), "bamba": ("final_layernorm", 0), "recurrent-gemma": ("final_norm", 1)}


@pytest.mark.parametrize("name", FINAL)
def test_heads_of_recurrences_and_behind_gates_by_hand(name: str) -> None:
    """Each writes its columns of what its projection was given: behind norm, gate and skip as they were."""
    model, inputs = hybrid(name).double(), {"input_ids": ids(2, 11) % 40}
    norm, one = model.get_submodule(f"model.{FINAL[name][0]}"), FINAL[name][1]
    joins = {n: m for n, m in model.named_modules() if n.endswith((".out_proj", ".o_proj", ".linear_out"))}
    kept: dict[str, Tensor] = {}
    handles = [
        m.register_forward_pre_hook(lambda _, args, n=n: kept.__setitem__(n, args[0].detach()[:, -1]))
        for n, m in {**joins, "end": norm}.items()
    ]
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[:, -1]
    for handle in handles:
        handle.remove()
    with attach(model) as wb:
        kinds = {site.kind for site in wb.sites}
        found = attribute(wb, inputs, 7)
    eps = getattr(norm, "eps", None) or norm.variance_epsilon
    scale = (kept["end"].square().mean(-1, keepdim=True) + eps).rsqrt()
    direction = model.lm_head.weight[7].detach() * (norm.weight.detach() + one) * scale
    of_site: dict[str, list[int]] = {}
    for i, (site, kind) in enumerate(zip(found.sites, found.kinds, strict=True)):
        if kind == "head":
            of_site.setdefault(site, []).append(i)
    assert len(of_site) == len(joins)
    assert kinds == {"self", "state"}
    for site, members in of_site.items():
        out = next(n for n in joins if n.startswith(f"{site}."))
        width = kept[out].shape[-1] // len(members)
        for head, member in enumerate(members):
            cut = slice(head * width, (head + 1) * width)
            truth = ((kept[out][:, cut] @ joins[out].weight[:, cut].detach().T) * direction).sum(-1)
            torch.testing.assert_close(found.values[member], truth, rtol=1e-4, atol=1e-6)
    total = float(found.values.abs().sum(0).max())
    assert float(found.rounding.abs().max()) < 1e-4 * total
    torch.testing.assert_close(found.capped, logits[:, 7], rtol=1e-4, atol=1e-5)


def _granite() -> nn.Module:
    torch.manual_seed(0)
    common = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = hf.GraniteConfig(
        **common, num_key_value_heads=2, num_hidden_layers=2, embedding_multiplier=3.0, residual_multiplier=0.37,
        logits_scaling=4.0, pad_token_id=0,
    )  # fmt: skip
    model = hf.GraniteForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double()


def test_what_is_scaled_before_it_is_added_by_hand() -> None:
    """Granite: 0.37 of what heads and MLPs give, and a quarter of the logits."""
    model, inputs = _granite(), {"input_ids": ids(2, 11) % 40}
    kept: dict[str, Tensor] = {}
    joins = {f"model.layers.{i}.self_attn": layer.self_attn.o_proj for i, layer in enumerate(model.model.layers)}
    handles = [
        m.register_forward_pre_hook(lambda _, args, n=n: kept.__setitem__(n, args[0].detach()[:, -1]))
        for n, m in {**joins, "end": model.model.norm}.items()
    ]
    with torch.no_grad():
        logits = model(**inputs).logits[:, -1]
    for handle in handles:
        handle.remove()
    with attach(model) as wb:
        found = [attribute(wb, inputs, 7) for _ in range(2)][1]
    scale = (kept["end"].square().mean(-1, keepdim=True) + model.model.norm.variance_epsilon).rsqrt()
    direction = model.lm_head.weight[7].detach() * model.model.norm.weight.detach() * scale / 4
    for layer, (site, out) in enumerate(joins.items()):
        for head in range(4):
            cut = slice(head * 8, (head + 1) * 8)
            truth = 0.37 * ((kept[site][:, cut] @ out.weight[:, cut].detach().T) * direction).sum(-1)
            torch.testing.assert_close(found.values[found.names.index(f"L{layer}H{head}")], truth, rtol=1e-4, atol=1e-7)
    assert float(found.rounding.abs().max()) < 2e-5 * float(found.values.abs().sum(0).max())
    torch.testing.assert_close(found.logits, logits[:, 7])


def test_mlps_that_see_all_examples_in_one_axis() -> None:
    """OPT's read [example · position, width], of prompts of several lengths."""
    torch.manual_seed(0)
    config = hf.OPTConfig(
        vocab_size=60, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    model, inputs = hf.OPTForCausalLM(config).eval().double(), {"input_ids": 3 + ids(3, 11) % 40}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][1, 8:] = 0
    seen: list[Tensor] = []
    handle = model.model.decoder.layers[1].fc2.register_forward_hook(lambda _, args, y: seen.append(y.view(3, 11, -1)))
    with torch.no_grad():
        logits = model(**inputs).logits
    handle.remove()
    with attach(model) as wb:
        found = attribute(wb, inputs, 7, position=5)
    torch.testing.assert_close(found.logits, logits[:, 5, 7])
    assert float(found.rounding.abs().max()) < 1e-12
    with attach(model) as wb:
        doubled = attribute(wb, inputs, 7, contrast=9, position=5)
    norm = model.model.decoder.final_layer_norm
    direction = (model.lm_head.weight[7] - model.lm_head.weight[9]) * norm.weight
    kept: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda _, args: kept.append(args[0][:, 5]))
    with torch.no_grad():
        model(**inputs)
        handle.remove()
        sigma = (kept[0].var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
        written = seen[0][:, 5]
        truth = ((written - written.mean(-1, keepdim=True)) / sigma) @ direction
    torch.testing.assert_close(doubled.values[doubled.names.index("m1")], truth, rtol=1e-9, atol=1e-12)


def test_blocks_without_attention_are_parts_too() -> None:
    """Nemotron-H: a mixer, an MLP or attention in a block of its own; one of them is the last."""
    torch.manual_seed(0)
    common = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = hf.NemotronHConfig(
        **common, num_key_value_heads=2, head_dim=8, hybrid_override_pattern="-M*-", num_hidden_layers=4,
        mamba_num_heads=4, mamba_head_dim=16, n_groups=2, ssm_state_size=4, chunk_size=8, use_cache=False,
    )  # fmt: skip
    model, inputs = hf.NemotronHForCausalLM(config).eval(), {"input_ids": ids(2, 11) % 40}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        logits = model(**inputs).logits
    with attach(model) as wb:
        found = attribute(wb, inputs, 7)
        lens = workbench.logit_lens(wb, {"input_ids": inputs["input_ids"][:1]})
    layers = {kind: {n for n, k in zip(found.layers, found.kinds, strict=True) if k == kind} for kind in found.kinds}
    assert (layers["head"], layers["mlp"]) == ({1, 2}, {0, 3})
    assert float(found.rounding.abs().max()) < 1e-4 * float(found.values.abs().sum(0).max())
    torch.testing.assert_close(found.logits, logits[:, -1, 7].double(), rtol=1e-4, atol=1e-5)
    assert len(lens.rows) == 5
    assert float(lens.divergence[-1].abs().max()) < 1e-9


def test_half_precision_sums_within_its_roundings() -> None:
    model, inputs = _model("llama-gqa").bfloat16(), _inputs("llama-gqa")
    with attach(model) as wb:
        found = attribute(wb, inputs, 7)
    assert found.precision == "bfloat16"
    assert float(found.rounding.abs().max()) < 0.05 * float(found.values.abs().sum(0).max())


def test_padding_does_not_move_a_position() -> None:
    model, tokens = _model("gpt2"), ids(1, 9)
    longer = {"input_ids": torch.cat([tokens, torch.zeros(1, 4, dtype=torch.long)], 1)}
    longer["attention_mask"] = torch.tensor([[1] * 9 + [0] * 4])
    with attach(model) as wb:
        alone, padded = attribute(wb, {"input_ids": tokens}, 7), attribute(wb, longer, 7)
        torch.testing.assert_close(alone.values, padded.values)
        with pytest.raises(CaptureError, match="position 9 lies beyond prompt 0, which has 9 tokens"):
            attribute(wb, longer, 7, position=9)


def test_bad_input_is_named() -> None:
    model, inputs = _model("gpt2"), _inputs("gpt2")
    with attach(model) as wb:
        for target, contrast, said in ((60, None, "outside of the vocabulary"), (-1, None, "outside of the vocabulary"),
                                       (5, 5, "its target"), ([5], None, "1 targets for 2 prompts")):  # fmt: skip
            with pytest.raises(TaskError, match=said):
                attribute(wb, inputs, target, contrast=contrast)
        with pytest.raises(CaptureError, match="beyond prompt"):
            attribute(wb, inputs, 5, position=-12)
        with pytest.raises(CaptureError, match="one prompt"):
            workbench.logit_lens(wb, inputs)
        with pytest.raises(TaskError, match="outside of the vocabulary"):
            workbench.logit_lens(wb, {"input_ids": ids(1, 5)}, 60)
    post = _model("bart")
    with attach(post) as wb, pytest.raises(AttachError, match="goes through"):
        attribute(wb, _inputs("t5"), 5)
    odd = _model("gpt2")
    odd.transformer.ln_f = nn.Sequential(nn.Linear(odd.config.n_embd, odd.config.n_embd).double(), nn.Tanh())
    with attach(odd) as wb, pytest.raises(AttachError, match="is no linear map"):
        attribute(wb, inputs, 5)


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "t5", "gemma2"])
def test_the_lens_by_hand(name: str) -> None:
    model = _model(name)
    inputs = {key: value[:1] for key, value in _inputs(name).items()}
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    with attach(model) as wb:
        lens = workbench.logit_lens(wb, inputs, 7, top=3)
    states = output.decoder_hidden_states if name == "t5" else output.hidden_states
    final = output.logits[0].double().log_softmax(-1)
    norm = {"gpt2": lambda: model.transformer.ln_f, "t5": lambda: model.decoder.final_layer_norm}.get(
        name, lambda: model.model.norm
    )()
    for row in range(len(states)):
        if row + 1 < len(states):  # the last of the hidden states is normed already
            with torch.no_grad():
                stream = norm(states[row][0])
        else:
            stream = states[row][0]
        scaled = name == "t5" and model.config.tie_word_embeddings
        logits = model.lm_head(stream * (model.config.d_model**-0.5 if scaled else 1)).detach()
        if name == "gemma2":
            cap = model.config.final_logit_softcapping
            logits = cap * torch.tanh(logits / cap)
        logs = logits.log_softmax(-1)
        torch.testing.assert_close(lens.probability[row], logs[:, 7].exp(), rtol=1e-5, atol=1e-8)
        assert torch.equal(lens.top_ids[row, :, 0], logs.argmax(-1))
        truth = (final.exp() * (final - logs)).sum(-1)
        torch.testing.assert_close(lens.divergence[row], truth.detach(), rtol=1e-4, atol=1e-6)
    assert float(lens.divergence[-1].abs().max()) < 1e-5


def test_a_norm_and_a_projection_in_one_module() -> None:
    plain, joined = _model("gpt2"), _model("gpt2")
    joined.load_state_dict(plain.state_dict())
    head = nn.Sequential(joined.transformer.ln_f, nn.Linear(*joined.lm_head.weight.shape[::-1], bias=False))
    head[1].weight = joined.lm_head.weight
    joined.transformer.ln_f, joined.lm_head = nn.Identity(), head
    with attach(plain) as one, attach(joined) as other:
        want, found = (attribute(wb, _inputs("gpt2"), 5, contrast=7) for wb in (one, other))
    torch.testing.assert_close(found.values, want.values, atol=1e-5, rtol=1e-5)
    assert found.norm == "lm_head.0, LayerNorm, its scale frozen"


@torch.no_grad()
def test_a_lens_through_a_narrower_projection_without_a_final_norm() -> None:
    """OPT-350m: norms behind the sums, and a projection to fewer numbers before the logits."""
    sides = {"hidden_size": 32, "ffn_dim": 16, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 20}
    config = hf.OPTConfig(**sides, word_embed_proj_dim=16, do_layer_norm_before=False)
    model = hf.OPTForCausalLM(config).eval()
    states = model(inputs := torch.tensor([[5, 6, 7]]), output_hidden_states=True).hidden_states
    with attach(model) as wb:
        lens = workbench.logit_lens(wb, {"input_ids": inputs}, 7)
    logits = model.lm_head(model.model.decoder.project_out(states[1][0]))
    torch.testing.assert_close(lens.probability[1], logits.double().softmax(-1)[:, 7], rtol=1e-5, atol=1e-8)


def test_results_are_kept_and_shown(tmp_path: Path) -> None:
    model, tokenizer = workbench.models.load("demo-lm")
    task = workbench.tasks.ioi(4, seed=0)
    with attach(model, tokenizer) as wb:
        found, lens = attribute(wb, task), workbench.logit_lens(wb, task[0].prompt)
    torch.testing.assert_close(found.logits, task.logit_diff(model, tokenizer).double(), rtol=1e-4, atol=1e-4)
    assert float(found.rounding.abs().max()) < 1e-3
    again = LogitAttribution.load(found.save(tmp_path / "a.safetensors"))
    assert torch.equal(again.values, found.values)
    assert again.names == found.names
    other = LogitLens.load(lens.save(tmp_path / "l.safetensors"))
    assert torch.equal(other.top_ids, lens.top_ids)
    assert other.words == lens.words
    for result in (found, lens):
        assert len(result.table)
        assert "Logit" in repr(result)
        assert len(result.to_png()) > 1000
        assert "<html" in str(result.to_html())
