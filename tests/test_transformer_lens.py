"""TransformerLens' bridges: attached like any model, and the same numbers under the same names."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

import workbench
from support.tiny import FAMILIES, SPECIAL, VOCABULARY, make
from workbench.capture.transformer_lens import Cache
from workbench.kernels.gradients import GRADIENT_SUMS

BY_NAME = {family.name: family for family in FAMILIES}


def _neox() -> nn.Module:
    torch.manual_seed(0)
    return hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(
            num_hidden_layers=2, num_attention_heads=4, hidden_size=32, intermediate_size=32, vocab_size=VOCABULARY,
            **SPECIAL,
        )
    ).eval()  # fmt: skip


BUILT: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "gpt2": ("gpt2", lambda: make(BY_NAME["gpt2"])),
    "llama-gqa": ("meta-llama/Llama-3.2-1B", lambda: make(BY_NAME["llama-gqa"])),
    "neox": ("EleutherAI/pythia-70m", _neox),
    "t5": ("google-t5/t5-small", lambda: make(BY_NAME["t5"])),
}
ONE_TOWER = ["gpt2", "llama-gqa", "neox"]
IDS = BY_NAME["gpt2"].inputs()["input_ids"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of a folder, as a bridge wants it."""
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    built = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=built, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    fast.save_pretrained(folder)
    return hf.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def bridges(tokenizer: Any) -> dict[str, TransformerBridge]:
    return {
        name: TransformerBridge.boot_transformers(hub, hf_model=build(), tokenizer=tokenizer, device="cpu")
        for name, (hub, build) in BUILT.items()
    }


def inputs_of(name: str) -> dict[str, Tensor]:
    return {"decoder_input": IDS[:, :9]} if name == "t5" else {}


def assert_agree(ours: Cache, theirs: Any, expected: set[str]) -> None:
    """Every key that both have, and at least the expected hooks of them."""
    both = [name for name in ours if name in theirs]
    assert {name.rpartition(".")[2].removeprefix("hook_") for name in both} == expected
    for name in both:
        torch.testing.assert_close(
            ours[name], theirs[name], atol=1e-5, rtol=1e-5, msg=lambda m, name=name: f"{name} {m}"
        )


@pytest.mark.parametrize("name", ONE_TOWER)
def test_sites_go_by_their_names(bridges: dict[str, TransformerBridge], name: str) -> None:
    with workbench.attach(bridges[name]) as wb:
        assert [site.alias for site in wb.sites] == ["blocks.0.attn", "blocks.1.attn"]
        assert wb.sites["blocks.1.attn.hook_pattern"] is wb.sites["blocks.1.attn"] is wb.sites[1]
        sizes = [(site.n_heads, site.n_kv_heads, site.d_head) for site in wb.sites]
        assert wb.verify(IDS).raise_if_failed().ok
        assert [(site.n_heads, site.n_kv_heads, site.d_head) for site in wb.sites] == sizes
        with wb.capture(sites="blocks.1.attn.hook_pattern") as capture:
            bridges[name](IDS)
    assert [site.alias for site in capture.sites] == ["blocks.1.attn"]


@pytest.mark.parametrize("name", BUILT)
@torch.no_grad()
def test_patterns_are_those_of_its_cache(bridges: dict[str, TransformerBridge], name: str) -> None:
    bridge, more = bridges[name], inputs_of(name)
    logits, cache = bridge.run_with_cache(IDS, **more)
    with workbench.attach(bridge) as wb:
        assert wb.verify(IDS, **more).raise_if_failed().ok
        with wb.capture(["entropy"], z=True, values=True) as capture:
            observed = bridge(IDS, **more)
    assert torch.equal(observed, logits)
    ours = capture.to_cache()
    assert_agree(ours, cache, {"pattern", "v", "z"} | ({"q", "k"} if name == "t5" else set()))
    for site in capture:
        # Of T5's decoder a bridge says self_attn where the alias says attn.
        key = next(f"{a}.hook_pattern" for a in site.site.aliases if f"{a}.hook_pattern" in cache)
        torch.testing.assert_close(ours[key], cache[key], atol=1e-5, rtol=1e-5)
        entropy = -(cache[key] * cache[key].clamp(min=1e-30).log()).sum(-1)
        torch.testing.assert_close(site.entropy, entropy, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
@torch.no_grad()
def test_the_model_on_its_fast_kernel_has_the_same_cache(bridges: dict[str, TransformerBridge], name: str) -> None:
    """The same weights without a bridge, on SDPA: also queries and keys, and each head's result."""
    bridge = bridges[name]
    bridge.set_use_attn_result(True)
    _, cache = bridge.run_with_cache(IDS)
    bridge.set_use_attn_result(False)
    model = BUILT[name][1]()
    with workbench.attach(model) as wb, wb.capture([], z=True, values=True) as capture:
        model(IDS)
    ours = capture.to_cache()
    assert_agree(ours, cache, {"pattern", "v", "z", "result"} | ({"q", "k"} if name == "gpt2" else {"rot_q", "rot_k"}))
    assert all(hook in cache for hook in ours)


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_gradients_are_those_of_its_cache(bridges: dict[str, TransformerBridge], name: str) -> None:
    bridge = bridges[name]
    _, cache = bridge.run_with_cache(IDS, return_type="loss", incl_bwd=True)
    with workbench.attach(bridge) as wb, wb.capture([], gradients=True) as capture:
        bridge(IDS, return_type="loss").backward()
    bridge.zero_grad()
    ours = capture.to_cache()
    for layer, site in enumerate(capture):
        stem = f"blocks.{layer}.attn.hook_"
        torch.testing.assert_close(ours[stem + "z_grad"], cache[stem + "z_grad"], atol=1e-6, rtol=1e-5)
        product = cache[stem + "pattern"] * cache[stem + "pattern_grad"]
        want = (product.sum(-1), product.sum(-2), product.sum((-1, -2)), product.abs().sum(-2))
        for statistic, value in zip(GRADIENT_SUMS, want, strict=True):
            torch.testing.assert_close(getattr(site, statistic), value, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_our_capture_and_its_hooks_at_once(bridges: dict[str, TransformerBridge]) -> None:
    bridge = bridges["gpt2"]

    def silence(z: Tensor, hook: Any) -> Tensor:
        return z * (torch.arange(4) != 1)[:, None]

    with workbench.attach(bridge) as wb, wb.capture([], z=True) as capture:
        _, cache = bridge.run_with_cache(IDS)
        hooked = bridge.run_with_hooks(IDS, fwd_hooks=[("blocks.0.attn.hook_z", silence)])
    assert len(capture.calls) == 2
    assert_agree(capture.to_cache(), cache, {"pattern", "z"})
    assert torch.equal(capture.calls[0][0].z, capture.calls[1][0].z)  # a hook on z acts after the kernel
    assert not torch.equal(capture.calls[0][1].z, capture.calls[1][1].z)
    assert torch.equal(hooked, bridge.run_with_hooks(IDS, fwd_hooks=[("blocks.0.attn.hook_z", silence)]))
    assert "forward" not in vars(bridge)


@torch.no_grad()
@pytest.mark.parametrize("name", ONE_TOWER)
def test_interventions_equal_their_hooks(bridges: dict[str, TransformerBridge], name: str) -> None:
    bridge, n_heads = bridges[name], 6 if name == "llama-gqa" else 4
    direction = torch.linspace(-1, 1, bridge.cfg.d_model)

    def zero(z: Tensor, hook: Any) -> Tensor:
        z = z.clone().unflatten(-1, (n_heads, -1)) if z.dim() == 3 else z.clone()
        z[:, -1, 2] = 0.0
        return z

    def move(resid: Tensor, hook: Any) -> Tensor:
        return resid + 2.0 * direction

    with workbench.attach(bridge) as wb:
        with wb.ablate((1, 2), positions=-1):
            ablated = bridge(IDS)
        with wb.steer(("resid", 0), direction, scale=2.0):
            steered = bridge(IDS)
    bare = bridge(IDS)
    for got, hook in ((ablated, ("blocks.1.attn.hook_z", zero)), (steered, ("blocks.0.hook_resid_post", move))):
        torch.testing.assert_close(got, bridge.run_with_hooks(IDS, fwd_hooks=[hook]), atol=1e-4, rtol=1e-4)
        assert (got - bare).abs().max() > 5e-3


@pytest.mark.parametrize("name", ONE_TOWER)
@torch.no_grad()
def test_logit_attribution_is_that_of_its_cache(bridges: dict[str, TransformerBridge], name: str) -> None:
    """Of single heads, between two tokens. The final norms have the gain 1: `logit_attrs` leaves it out."""
    bridge = bridges[name]
    right, wrong = torch.tensor([7, 12]), torch.tensor([9, 30])
    _, cache = bridge.run_with_cache(IDS)
    stack, labels = cache.stack_head_results(layer=-1, pos_slice=-1, return_labels=True)
    theirs = cache.logit_attrs(stack, tokens=right, incorrect_tokens=wrong, pos_slice=-1)
    with workbench.attach(BUILT[name][1]()) as wb:
        ours = workbench.logit_attribution(wb, {"input_ids": IDS}, right.tolist(), contrast=wrong.tolist())
    heads = [i for i, kind in enumerate(ours.kinds) if kind == "head"]
    assert [ours.names[i] for i in heads] == list(labels)
    torch.testing.assert_close(ours.values[heads].float(), theirs.float(), rtol=1e-4, atol=1e-5)
