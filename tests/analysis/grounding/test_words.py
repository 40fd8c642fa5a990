"""Words in the pictures of diffusion models: equal to a softmax written out, over steps and resolutions."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import workbench
from support.judges import judges, missing
from workbench.errors import WorkbenchError

Made = tuple[nn.Module, dict[str, Any]]
WORDS: dict[str, int | list[int]] = {"cat": 2, "red hat": [4, 5]}


def _unet(diffusers: Any) -> Made:
    model = diffusers.UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=16,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), block_out_channels=(32, 64), layers_per_block=1,
        sample_size=8, in_channels=4, out_channels=4, cross_attention_dim=32, attention_head_dim=8,
    )  # fmt: skip
    inputs = {"sample": torch.randn(2, 4, 8, 12), "encoder_hidden_states": torch.randn(2, 7, 32)}
    return model, inputs | {"timestep": torch.tensor(3)}


def _flux(diffusers: Any) -> Made:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    y, x = torch.meshgrid(torch.arange(3), torch.arange(5), indexing="ij")
    at = torch.stack([torch.zeros(15), y.flatten(), x.flatten()], -1)
    inputs = {
        "hidden_states": torch.randn(1, 15, 4), "encoder_hidden_states": torch.randn(1, 7, 32), "img_ids": at,
        "pooled_projections": torch.randn(1, 32), "timestep": torch.tensor([0.5]), "txt_ids": torch.zeros(7, 3),
    }  # fmt: skip
    return model, inputs


def _sd3(diffusers: Any) -> Made:
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32, out_channels=4,
        pos_embed_max_size=8,
    )  # fmt: skip
    inputs = {"hidden_states": torch.randn(2, 4, 6, 8), "encoder_hidden_states": torch.randn(2, 7, 32)}
    return model, inputs | {"pooled_projections": torch.randn(2, 32), "timestep": torch.tensor([3.0, 3.0])}


def build(make: Callable[[Any], Made]) -> Made:
    torch.manual_seed(0)
    with judges():
        try:
            import diffusers
        except ModuleNotFoundError as error:
            missing(error)
        model, inputs = make(diffusers)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # gates that begin at zero would shut blocks off
    return model.eval(), inputs


def written_out(model: nn.Module, inputs: dict[str, Any], sites: set[str]) -> dict[str, Tensor]:
    """The softmax of the attention calls of these modules."""
    fused, found, inside = nn.functional.scaled_dot_product_attention, dict[str, Tensor](), list[str]()
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: inside.append(name)) for name in sites
    ]

    def record(query: Tensor, key: Tensor, value: Tensor, *args: Any, **how: Any) -> Tensor:
        if inside:
            found[inside.pop()] = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
        return fused(query, key, value, *args, **how)

    with mock.patch.object(nn.functional, "scaled_dot_product_attention", record), torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "text_first", "grids"),
    [(_unet, None, {(8, 12), (4, 6)}), (_flux, True, {(3, 5)}), (_sd3, False, {(3, 4)})],
    ids=["unet", "flux", "sd3"],
)
def test_maps_of_words_are_the_columns_of_attention(
    make: Callable[[Any], Made], text_first: bool | None, grids: set[tuple[int, int]]
) -> None:
    model, inputs = build(make)
    steps = [inputs, inputs | {"timestep": inputs["timestep"] * 0 + 0.1}]

    def run() -> None:
        for one in steps:
            model(**one)

    with workbench.attach(model) as wb:
        found = workbench.word_grounding(wb, inputs, WORDS, run=run)
    maps = [written_out(model, one, set(found.sites)) for one in steps]
    wanted = []
    for site in dict.fromkeys(found.sites):
        calls = [each[site] for each in maps]
        n = calls[0].shape[-1]
        picture = slice(None) if text_first is None else slice(7, None) if text_first else slice(0, n - 7)
        start = 0 if text_first is not False else n - 7
        both = torch.stack([each[-1][:, picture] for each in calls]).mean(0)  # [head, patch, key]
        for head in both:
            wanted.append([head[:, [start + 2]].sum(-1), head[:, [start + 4, start + 5]].sum(-1)])
    assert len(wanted) == len(found.labels)
    assert {tuple(grid) for grid in found.grids.tolist()} == grids
    for h, both in enumerate(wanted):
        for word in range(2):
            mine = found.weights[word, h]
            here = mine[mine != 0]
            torch.testing.assert_close(here, both[word] / len(both[word]), atol=1e-6, rtol=1e-4)
            assert float(found.masses[word, h, 0]) == pytest.approx(float(both[word].mean()), rel=1e-4)
    torch.testing.assert_close(found.masses.sum(-1), torch.ones(2, len(wanted)), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.weights.sum(-1), found.masses[..., 0], atol=1e-5, rtol=1e-4)
    assert found.calls == 2
    assert found.tokens == ("cat", "red hat")
    drawn = found.map(0, row=0)
    assert float(drawn.sum()) == pytest.approx(float(found.pooled()[0].sum()), rel=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_what_does_not_fit_is_refused() -> None:
    model, inputs = build(_unet)
    with workbench.attach(model) as wb:
        for words, more, message in [
            ({"cat": 7}, {}, "stands at .7., and the text has 7 tokens"),
            ({}, {}, "no word is given"),
            ({"cat": 1}, {"grid": (5, 5)}, "patches are no 5 x 5"),
            ({"cat": 1}, {"example": 2}, "no example 2"),
        ]:
            with pytest.raises(WorkbenchError, match=message):
                workbench.word_grounding(wb, inputs, words, **more)
        with pytest.raises(WorkbenchError, match="no encoder_hidden_states"):
            workbench.word_grounding(wb, {"sample": inputs["sample"]}, {"cat": 1})
