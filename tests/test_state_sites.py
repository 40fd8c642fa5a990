"""State-space mixers as sites of a whole model: captured, verified, switched off; alone and beside attention."""

from collections.abc import Callable

import pytest
import torch
import transformers as hf
from torch import nn

import workbench
from workbench.errors import AttachError, CaptureError, InterventionError
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
def test_a_capture_goes_on_where_a_state_does(model: nn.Module) -> None:
    inputs = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 2, "pad_token_id": 0}
    bare = model.generate(IDS, **inputs)
    with workbench.attach(model) as wb:
        states = [site.name for site in wb.sites if site.kind == "state"]
        missing = f"{len(states)} calls of {len(states)} sites were not recorded"
        with pytest.warns(UserWarning, match=missing), wb.capture() as capture:
            assert torch.equal(model.generate(IDS, **inputs), bare)
        assert len(capture.calls) == 2
        for name in states:
            assert str(capture.ledger[name]).startswith("1 recorded, 1 call not recorded: the mixer goes on from a")
        if any(site.kind == "self" for site in wb.sites):
            with wb.capture(sites=lambda site: site.kind == "self") as capture:
                model.generate(IDS, **inputs)
            assert capture.joined()[0].shape[2:] == (18, 18)


@torch.no_grad()
def test_a_site_that_was_asked_for_must_be_recorded_and_verify_names_what_cannot(model: nn.Module) -> None:
    cache = "past_key_values" if isinstance(model, hf.JambaForCausalLM) else "cache_params"
    begun = {cache: getattr(model(IDS, use_cache=True), cache)}
    step = {"input_ids": IDS[:, :1], "use_cache": True, **begun}
    with workbench.attach(model) as wb:
        states = {site.name for site in wb.sites if site.kind == "state"}
        verified = wb.verify(**step)
        assert verified.unrecorded.keys() == states
        assert f"{len(states)} sites not recorded" in repr(verified)
        with pytest.raises(AttachError, match="goes on from a cached state"):
            verified.raise_if_failed()
        missing = "nothing could be recorded: the mixer goes on from a cached state"
        with pytest.raises(CaptureError, match=missing), wb.capture(sites=lambda site: site.kind == "state"):
            model(**step)


class _Half(Edit):
    def __call__(self, call: object, z: torch.Tensor) -> torch.Tensor:
        return z / 2


def test_heads_of_a_state_site_can_be_edited_without_gradients(model: nn.Module) -> None:
    with workbench.attach(model) as wb:
        site = next(site.name for site in wb.sites if site.kind == "state")
        with torch.no_grad(), wb.capture(z=True, sites=site) as plain:
            bare = model(IDS, use_cache=False).logits
        with torch.no_grad(), wb.editing(_Half([site])), wb.capture(z=True, sites=site) as edited:
            changed = model(IDS, use_cache=False).logits
        torch.testing.assert_close(edited[site].z, plain[site].z / 2)
        assert not torch.equal(changed, bare)
        with pytest.raises(InterventionError, match="gradients do not flow"), wb.editing(_Half([site])):
            model(IDS, use_cache=False)


def test_gradients_of_state_sites_are_refused_by_name(model: nn.Module) -> None:
    with (
        workbench.attach(model) as wb,
        pytest.raises(CaptureError, match="gives no output per head"),
        wb.capture(gradients=True),
    ):
        model(IDS, use_cache=False)


@torch.no_grad()
def test_the_limit_counts_what_is_kept(model: nn.Module) -> None:
    with workbench.attach(model) as wb:
        with wb.capture() as capture:
            model(IDS, use_cache=False)
        with wb.capture(limit=2 * capture.nbytes):
            model(IDS, use_cache=False)
        with pytest.raises(CaptureError, match="the limit is"), wb.capture(limit=capture.nbytes // 4):
            model(IDS, use_cache=False)
