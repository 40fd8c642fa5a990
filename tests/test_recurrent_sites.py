"""Linear and recurrent layers as sites of whole models: captured, verified, edited as by hand, swept, saved."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import workbench
from test_hybrids import HYBRIDS
from workbench.hooks.sites import Site

IDS = torch.randint(3, 60, (2, 17), generator=torch.Generator().manual_seed(0))
HEAD = 1


def _rwkv() -> nn.Module:
    return hf.RwkvForCausalLM(
        hf.RwkvConfig(
            num_hidden_layers=2, hidden_size=16, attention_hidden_size=16, intermediate_size=24, vocab_size=60
        )
    )


# How to build it, the module inside a mixer that is given what the heads read, and how that is laid out.
def _rows(z: Tensor) -> Tensor:
    """[batch · position · head of 4, width], of a norm for each head."""
    return z.view(2, 17, 4, -1)


def _heads(z: Tensor) -> Tensor:
    return z


def _features(width: int) -> Callable[[Tensor], Tensor]:
    return lambda z: z.unflatten(-1, (-1, width))


def _times(z: Tensor, laid_out: Callable[[Tensor], Tensor], factor: float) -> Tensor:
    """One head of it times a factor."""
    factors = torch.ones(laid_out(z).shape[2])
    factors[HEAD] = factor
    return (laid_out(z) * factors[:, None]).view_as(z)


MODELS: dict[str, tuple[Callable[[], Any], str, Callable[[Tensor], Tensor]]] = {
    "qwen3-next": (HYBRIDS["qwen3-next"], "norm", _rows),
    "qwen3.5": (HYBRIDS["qwen3.5"], "norm", _rows),
    "olmo": (HYBRIDS["olmo"], "o_norm", _rows),
    "kimi-linear": (HYBRIDS["kimi-linear"], "o_norm", _heads),
    "minimax": (HYBRIDS["minimax"], "norm", _features(8)),
    "recurrent-gemma": (HYBRIDS["recurrent-gemma"], "linear_out", _features(1)),
    "lfm2": (HYBRIDS["lfm2"], "out_proj", _features(1)),
    "rwkv": (_rwkv, "output", _features(1)),
}  # fmt: skip
EACH = pytest.mark.parametrize("name", MODELS)


def build(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def states(wb: workbench.Workbench) -> list[Site]:
    return [site for site in wb.sites if site.kind == "state"]


@EACH
@torch.no_grad()
def test_captured_verified_and_saved(name: str, tmp_path: Path) -> None:
    model = build(name)
    bare = model(IDS, use_cache=False).logits
    with workbench.attach(model) as wb:
        found = wb.verify(input_ids=IDS, use_cache=False).raise_if_failed()
        assert {site.name for site in states(wb)} <= {check["site"] for check in found.checks}
        names = ("entropy", "received", "signed_mass")
        with wb.capture(names, z=True, pattern=True, values=True) as capture:
            assert torch.equal(model(IDS, use_cache=False).logits, bare)
        site = states(wb)[0].name
    one = capture[site]
    assert one.entropy.shape == one.pattern.shape[:3]
    torch.testing.assert_close(
        one.z.float(), one.pattern.apply(one.pattern.values).transpose(1, 2), atol=1e-4, rtol=1e-4
    )
    again = workbench.load_capture(capture.save(tmp_path / "run.safetensors"))[site]
    assert torch.equal(again.pattern.dense(), one.pattern.dense())


def by_hand(model: Any, name: str, site: str, factor: float) -> Any:
    """A hook that gives the module after the heads' output one head times a factor."""
    _, part, laid_out = MODELS[name]
    inside = model.get_submodule(f"{site}.{part}")
    return inside.register_forward_pre_hook(lambda _, given: (_times(given[0], laid_out, factor), *given[1:]))


@EACH
@torch.no_grad()
def test_a_head_is_switched_off_as_by_hand(name: str) -> None:
    model = build(name)
    bare = model(IDS, use_cache=False).logits
    with workbench.attach(model) as wb:
        site = states(wb)[0]
        handle = by_hand(model, name, site.name, 0.0)
        wanted = model(IDS, use_cache=False).logits
        handle.remove()
        with wb.ablate({(site.name, HEAD)}, how="zero"):
            ablated = model(IDS, use_cache=False).logits
        with wb.edit_pattern({(site.name, HEAD)}, lambda rows, site, head: torch.zeros_like(rows)):
            without_rows = model(IDS, use_cache=False).logits
        with wb.edit_pattern({(site.name, HEAD)}, lambda rows, site, head: rows):
            same = model(IDS, use_cache=False).logits
        with wb.patch({(site.name, HEAD): lambda z, site, head: 0 * z}):
            patched = model(IDS, use_cache=False).logits
        assert torch.equal(model(IDS, use_cache=False).logits, bare)
    assert float((wanted - bare).abs().max()) > 1e-4
    for edited in (ablated, without_rows, patched):
        torch.testing.assert_close(edited, wanted, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(same, bare, atol=2e-5, rtol=2e-5)


OUT = {"kimi-linear": "o_proj", "olmo": "o_proj", "recurrent-gemma": "linear_out", "rwkv": "output"}


@EACH
@torch.no_grad()
def test_results_are_what_each_head_writes_and_stand_in_the_cache(name: str, tmp_path: Path) -> None:
    """Columns of what the projection was given, times its own; with norm and gate as they were, edited or not."""
    model = build(name)
    with workbench.attach(model) as wb:
        site = states(wb)[0]
        out = model.get_submodule(f"{site.name}.{OUT.get(name, 'out_proj')}")
        given: list[Tensor] = []
        made: list[Tensor] = []

        def watch(module: nn.Module, args: Any, output: Tensor) -> None:
            given.append(args[0])
            made.append(output)

        out.register_forward_hook(watch)
        for edit in (nullcontext(), wb.ablate({(site.name, HEAD)}, how="zero")):
            given.clear()
            made.clear()
            with wb.capture([], z=True, sites=site.name) as cap, edit:
                model(IDS, use_cache=False)
            one, bias = cap[site.name], 0.0 if out.bias is None else out.bias
            n_heads = one.shape[1]
            heads = given[-1].unflatten(-1, (n_heads, -1)) if isinstance(edit, nullcontext) else one.entering
            want = torch.einsum("bnhw,dhw->bnhd", heads, out.weight.unflatten(1, (n_heads, -1)))
            torch.testing.assert_close(one.result(), want, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(one.result([HEAD, 0]), want[:, :, [HEAD, 0]], atol=2e-5, rtol=1e-4)
            if isinstance(edit, nullcontext):
                torch.testing.assert_close(one.result().sum(2) + bias, made[-1], atol=5e-5, rtol=1e-4)
        cache = cap.to_cache()
        assert torch.equal(cache[f"{site.alias}.hook_result"], one.result())
        assert torch.equal(cache[f"{site.alias}.hook_z"], one.z)
        assert torch.equal(cache[f"{site.alias}.hook_pattern"], one.pattern.dense())
        saved = cap.save(tmp_path / "run.safetensors", result=True)
    assert torch.equal(workbench.load_capture(saved)[site.name].result(), one.result())


def backward(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(IDS, use_cache=False).logits.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@EACH
def test_gradients_of_an_edited_model_are_those_by_hand(name: str) -> None:
    """A head is halved: in its output, and in the rows of its map."""
    model = build(name)
    with workbench.attach(model) as wb:
        site = states(wb)[0]
        handle = by_hand(model, name, site.name, 0.5)
        wanted = backward(model)
        handle.remove()
        edits = [
            wb.patch({(site.name, HEAD): lambda z, site, head: z / 2}),
            wb.edit_pattern({(site.name, HEAD)}, lambda rows, site, head: rows / 2),
        ]
        for edit in edits:
            with edit:
                found = backward(model)
            assert found.keys() == wanted.keys()
            for parameter, gradient in wanted.items():
                size = float(gradient.abs().max())
                torch.testing.assert_close(found[parameter], gradient, atol=2e-4 * size + 1e-9, rtol=1e-3)


@pytest.mark.parametrize("name", ["qwen3-next", "qwen3.5", "olmo", "kimi-linear", "minimax"])
def test_gradients_of_heads_are_those_of_what_follows_them(name: str) -> None:
    model = build(name)
    _, part, laid_out = MODELS[name]
    arrived: list[Tensor] = []
    with workbench.attach(model) as wb:
        site = states(wb)[0]
        bare = backward(model)
        inside = model.get_submodule(f"{site.name}.{part}")
        handle = inside.register_forward_pre_hook(lambda _, given: given[0].register_hook(arrived.append) and None)
        backward(model)
        handle.remove()
        with wb.capture(gradients=True, values=True) as capture:
            watched = backward(model)
    want, one = laid_out(arrived[0]), capture[site.name]
    size = float(want.abs().max())
    torch.testing.assert_close(one.z_gradient.to(want), want, atol=1e-4 * size, rtol=1e-3)
    of_weights = torch.einsum("bihw,bhjw->bhij", want.float(), one.pattern.values.float())
    truth = (one.pattern.dense() * of_weights).sum(-1)
    torch.testing.assert_close(one.query_gradient, truth, atol=1e-3 * float(truth.abs().max()), rtol=1e-2)
    assert all(torch.equal(watched[parameter], gradient) for parameter, gradient in bare.items())


@pytest.mark.parametrize("name", ["qwen3-next", "kimi-linear", "lfm2"])
@torch.no_grad()
def test_a_head_takes_another_example_s_output_as_by_hand(name: str) -> None:
    """All heads of a layer give what they gave on other input."""
    model = build(name)
    other = IDS.flip(1)
    with workbench.attach(model) as wb:
        site = states(wb)[0]
        with wb.capture(sites=site.name, z=True) as clean:
            model(other, use_cache=False)
        z = clean[site.name].z  # [batch, position, head, width]
        given: list[Tensor] = []
        handle = model.get_submodule(site.name).register_forward_hook(
            lambda module, args, output: given.append(output if isinstance(output, Tensor) else output[0])
        )
        model(other, use_cache=False)
        heads = {(site.name, head): z[:, :, head] for head in range(z.shape[2])}
        with wb.patch(heads), wb.capture(sites=site.name, z=True) as capture:
            model(IDS, use_cache=False)
        handle.remove()
    torch.testing.assert_close(capture[site.name].z, z)
    assert not torch.equal(given[0], given[1])


@pytest.mark.parametrize("name", ["qwen3-next", "kimi-linear", "minimax"])
@torch.no_grad()
def test_sweeps_take_their_heads(name: str) -> None:
    model = build(name)
    with workbench.attach(model) as wb:
        site = states(wb)[0].name
        variants = [workbench.Variant((site, head)) for head in range(4)]
        batches = [{"input_ids": IDS, "use_cache": False}]

        def weighed(output: Any, batch: Any) -> Tensor:
            return output.logits.abs().mean((1, 2))

        found = workbench.run_sweep(wb, variants, batches, weighed, progress=False)
        for head in range(4):
            with wb.ablate((site, head)):
                want = weighed(model(**batches[0]), None).double()
            torch.testing.assert_close(found.values[head, 0], want, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_profiles_and_atlases_take_them_where_they_are_asked_for() -> None:
    model = build("qwen3-next")
    with workbench.attach(model) as wb, wb.capture(["distance"]) as cap:
        model(IDS, use_cache=False)
    site, attention = (next(one.site for one in cap if (one.site.kind == "state") == state) for state in (True, False))
    assert set(workbench.attention_profile(cap).table["site"]) == {attention.name}
    both = workbench.attention_profile(cap, sites=[site, attention])
    assert set(both.table["site"]) == {site.name, attention.name}
    atlas = workbench.pattern_atlas(cap, n_clusters=2, sites=[site, attention], epochs=1, progress=False)
    assert set(atlas.sites) == {site.name, attention.name}


@pytest.mark.parametrize("name", ["qwen3-next", "recurrent-gemma", "lfm2"])
@torch.no_grad()
def test_a_row_of_several_sequences_is_shown_as_the_layer_mixes_it(name: str) -> None:
    """Attention keeps them apart, and is recorded one by one; a recurrence runs on, or resets where it says."""
    model = build(name)
    at = torch.cat((torch.arange(9), torch.arange(8)))[None]
    with workbench.attach(model) as wb:
        site = states(wb)[0].name
        with wb.capture(["entropy"], z=True, values=True) as cap:
            model(IDS[:1], position_ids=at, use_cache=False)
    assert not cap.unrecorded
    [forward] = [forward for forward in cap.forwards if site in forward.sites]
    assert forward.packed is None
    one = forward.sites[site]
    assert one.shape[2:] == (17, 17)
    torch.testing.assert_close(one.pattern.apply(one.pattern.values), one.z.transpose(1, 2).float())
    across = one.pattern.dense()[..., 9:, :9]
    assert bool((across == 0).all()) == (name == "recurrent-gemma")
