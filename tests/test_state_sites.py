"""State-space mixers as sites of a whole model: captured, verified, switched off; alone and beside attention."""

from collections.abc import Callable

import pytest
import torch
import transformers as hf
from torch import nn

import workbench
from workbench.errors import AttachError, CaptureError
from workbench.hooks.edits import Edit

IDS = torch.randint(3, 60, (2, 17), generator=torch.Generator().manual_seed(0))


def _mamba() -> nn.Module:
    return hf.MambaForCausalLM(hf.MambaConfig(num_hidden_layers=2, hidden_size=16, state_size=4, vocab_size=60))


def _mamba2() -> nn.Module:
    return hf.Mamba2ForCausalLM(
        hf.Mamba2Config(
            num_hidden_layers=2, hidden_size=16, state_size=4, vocab_size=60, num_heads=4, head_dim=8, n_groups=1,
            chunk_size=8,
        )
    )  # fmt: skip


def _jamba() -> nn.Module:
    return hf.JambaForCausalLM(
        hf.JambaConfig(
            num_hidden_layers=4, hidden_size=16, intermediate_size=16, vocab_size=60, num_attention_heads=4,
            num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_d_state=4,
            mamba_dt_rank=2, use_mamba_kernels=False,
        )
    )  # fmt: skip


@pytest.fixture(params=[_mamba, _mamba2, _jamba])
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    build: Callable[[], nn.Module] = request.param
    return build().eval()


@torch.no_grad()
def test_capture_leaves_the_output_and_marks_state_sites(model: nn.Module) -> None:
    bare = model(IDS, use_cache=False).logits
    with workbench.attach(model) as wb:
        assert wb.verify(input_ids=IDS, use_cache=False).raise_if_failed().ok
        with wb.capture(("entropy", "received", "signed_mass"), z=True) as capture:
            assert torch.equal(model(IDS, use_cache=False).logits, bare)
    for site in capture:
        state = site.site.kind == "state"
        assert site.marks == ("signed" if state else "normalised")
        assert site.pattern.grade == ("frozen" if state else "exact")
        assert site.entropy.isfinite().all()
        assert site.z.isfinite().all()


@torch.no_grad()
def test_a_generation_is_joined(model: nn.Module) -> None:
    inputs = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 3, "min_new_tokens": 3, "pad_token_id": 0}
    bare = model.generate(IDS, **inputs)
    with workbench.attach(model) as wb:
        with wb.capture() as capture:
            assert torch.equal(model.generate(IDS, **inputs), bare)
        assert capture.ledger == {site.name: 3 for site in wb.sites}
        joined = capture.joined()
        assert [one.shape[2:] for one in joined] == [(19, 19)] * len(wb.sites)
        with wb.capture() as whole:
            model(bare[:, :-1], use_cache=False)
    for one, want in zip(joined, whole, strict=True):
        torch.testing.assert_close(one.pattern.dense(), want.pattern.dense(), atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_a_step_is_verified(model: nn.Module) -> None:
    cache = "past_key_values" if isinstance(model, hf.JambaForCausalLM) else "cache_params"
    begun = {cache: getattr(model(IDS, use_cache=True), cache)}
    with workbench.attach(model) as wb:
        found = wb.verify(input_ids=IDS[:, :1], use_cache=True, **begun).raise_if_failed()
    assert not found.unrecorded


@torch.no_grad()
def test_a_site_that_was_asked_for_must_be_recorded_and_verify_names_what_cannot() -> None:
    """RWKV's state is not read."""
    torch.manual_seed(0)
    model = hf.RwkvForCausalLM(
        hf.RwkvConfig(
            num_hidden_layers=2, hidden_size=16, attention_hidden_size=16, intermediate_size=24, vocab_size=60
        )
    ).eval()
    step = {"input_ids": IDS[:, :1], "use_cache": True, "state": model(IDS, use_cache=True).state}
    with workbench.attach(model) as wb:
        states = {site.name for site in wb.sites}
        verified = wb.verify(**step)
        assert verified.unrecorded.keys() == states
        assert f"{len(states)} sites not recorded" in repr(verified)
        with pytest.raises(AttachError, match="goes on from a cached state"):
            verified.raise_if_failed()
        missing = "nothing could be recorded: the mixer goes on from a cached state"
        with pytest.raises(CaptureError, match=missing), wb.capture(sites=lambda site: site.kind == "state"):
            model(**step)
        inputs = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 2, "pad_token_id": 0}
        bare = model.generate(IDS, **inputs)
        with pytest.warns(UserWarning, match="2 calls of 2 sites were not recorded"), wb.capture() as capture:
            assert torch.equal(model.generate(IDS, **inputs), bare)
        for name in states:
            assert str(capture.ledger[name]).startswith("1 recorded, 1 call not recorded: the mixer goes on from a")


class _Half(Edit):
    def __call__(self, call: object, z: torch.Tensor) -> torch.Tensor:
        return z / 2


@torch.no_grad()
def test_heads_of_a_state_site_can_be_edited(model: nn.Module) -> None:
    with workbench.attach(model) as wb:
        site = next(site.name for site in wb.sites if site.kind == "state")
        with wb.capture(z=True, sites=site) as plain:
            bare = model(IDS, use_cache=False).logits
        with wb.editing(_Half([site])), wb.capture(z=True, sites=site) as edited:
            changed = model(IDS, use_cache=False).logits
        torch.testing.assert_close(edited[site].z, plain[site].z / 2)
        assert not torch.equal(changed, bare)


class _Same(Edit):
    def __call__(self, call: object, z: torch.Tensor) -> torch.Tensor:
        return z.clone()


def test_gradients_flow_through_edited_mixers_and_reach_heads(model: nn.Module) -> None:
    """An edit that changes nothing leaves every parameter's gradient; z's is the same with and without it."""

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(IDS, use_cache=False).logits.square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    with workbench.attach(model) as wb:
        site = next(site.name for site in wb.sites if site.kind == "state")
        bare = gradients()
        with wb.capture(gradients=True) as plain:
            watched = gradients()
        with wb.editing(_Same([site])), wb.capture(gradients=True) as edited:
            same = gradients()
        rows = wb.edit_pattern({(site, 0)}, lambda rows, site, head: rows)
        with rows:
            through_rows = gradients()
    assert bare.keys() == watched.keys() == same.keys()
    for name, want in bare.items():
        assert torch.equal(watched[name], want)
        scale = float(want.abs().max())
        for got in (same, through_rows):
            torch.testing.assert_close(got[name], want, atol=1e-4 * scale, rtol=1e-3)
    for one, other in zip(plain, edited, strict=True):
        scale = float(one.z_gradient.abs().max())
        assert scale > 0
        torch.testing.assert_close(one.z_gradient, other.z_gradient, atol=1e-4 * scale, rtol=1e-3)
        torch.testing.assert_close(one.head_gradient, other.head_gradient, atol=1e-3 * scale, rtol=1e-2)


@torch.no_grad()
def test_the_limit_counts_what_is_kept(model: nn.Module) -> None:
    with workbench.attach(model) as wb:
        with wb.capture() as capture:
            model(IDS, use_cache=False)
        with wb.capture(limit=2 * capture.nbytes):
            model(IDS, use_cache=False)
        with pytest.raises(CaptureError, match="the limit is"), wb.capture(limit=capture.nbytes // 4):
            model(IDS, use_cache=False)
