"""What heads read from patches: equal to eager attention, patch by patch, with several pictures, tiles and windows."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import workbench
from support import sight
from support.sight import SIGHTS, Sight
from support.zoo.twins import eager_modules
from workbench.analysis.grounding.result import PARTS
from workbench.errors import CaptureError, WorkbenchError

sights = pytest.mark.parametrize("one", SIGHTS, ids=lambda one: one.name)


def truth(model: Any, inputs: dict[str, Any]) -> Tensor:
    """[head, query, key] of the language model's heads, from its eager twin."""
    stack = next(name for name, module in model.named_modules() if module is model.get_decoder())
    maps = eager_modules(stack)(model, inputs)[stack]
    return torch.cat([each[0] for each in maps])


def by_name(name: str) -> Sight:
    return next(one for one in SIGHTS if one.name == name)


def ready(one: Sight) -> tuple[Any, dict[str, Any], list[np.ndarray[Any, Any]]]:
    model, images = sight.built(one), sight.pictures(one)
    return model, sight.made(model, one, images), images


@sights
def test_maps_equal_eager_attention_patch_by_patch(one: Sight) -> None:
    model, inputs, images = ready(one)
    with workbench.attach(model) as wb:
        found = workbench.grounding(wb, inputs, images, one.processor(), at=[-1, -3], sinks="kept", **one.settings)
        places = workbench.image_places(wb, inputs, images, one.processor(), **one.settings)
    eager = truth(model, inputs)
    n = eager.shape[-1]
    assert found.positions == (n - 1, n - 3)
    assert found.weights.shape == (2, len(eager), len(found.places))
    for i, row in enumerate(found.positions):
        for j, position in enumerate(found.places.tolist()):
            torch.testing.assert_close(found.weights[i, :, j], eager[:, row, position], atol=2e-6, rtol=0)
            tile, down, across = places.tile_of(position) or (-1, -1, -1)
            assert (found.tile[j], *found.cells[j].tolist()) == (tile, down, across)
    torch.testing.assert_close(found.masses.sum(-1), torch.ones(2, len(eager)), atol=1e-5, rtol=0)
    images_alone = torch.isin(torch.arange(n), torch.tensor([*found.places.tolist(), *places.others]))
    on_images = found.masses[..., 0] + found.masses[..., PARTS.index("other image tokens")]
    rows = eager[:, list(found.positions)]
    torch.testing.assert_close(on_images, rows[..., images_alone].sum(-1).T, atol=1e-5, rtol=0)
    assert len(found.names) == 2
    torch.testing.assert_close(found.on_pictures().sum(-1), found.masses[..., 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.on_tiles().sum(-1), found.masses[..., 0], atol=1e-5, rtol=0)


@sights
def test_pixels_hold_the_mass_of_the_patches_on_them(one: Sight) -> None:
    model, inputs, images = ready(one)
    with workbench.attach(model) as wb:
        found = workbench.grounding(wb, inputs, images, one.processor(), sinks="kept", **one.settings)
    for picture, size in enumerate(one.sizes):
        drawn = found.map(picture)
        assert drawn.shape == size
        by_hand = torch.zeros(size, dtype=torch.float64)
        for j in (found.picture_of == picture).nonzero()[:, 0].tolist():
            x0, y0, x1, y1 = found.boxes[j].tolist()
            if not np.isfinite(x0):
                continue
            x = np.clip(np.minimum(np.arange(size[1]) + 1, x1) - np.maximum(np.arange(size[1]), x0), 0, None)
            y = np.clip(np.minimum(np.arange(size[0]) + 1, y1) - np.maximum(np.arange(size[0]), y0), 0, None)
            by_hand += float(found.pooled()[0, j]) * torch.from_numpy(np.outer(y, x) / ((x1 - x0) * (y1 - y0)))
        torch.testing.assert_close(drawn.double(), by_hand, atol=1e-7, rtol=1e-4)


def test_without_a_processor_pictures_are_what_the_tower_saw() -> None:
    one = by_name("llava-next")
    model, inputs, _ = ready(one)
    with workbench.attach(model) as wb:
        found = workbench.grounding(wb, inputs)
    assert found.names[:2] == ("image 0, tile 0", "image 0, tile 1")
    assert len(found.names) == len(found.tile_names) == 20
    seen = inputs["pixel_values"][0, 3]
    wanted = ((seen - seen.min()) / (seen.max() - seen.min()) * 255).round().permute(1, 2, 0)
    assert (found.pictures[3].float() - wanted).abs().max() <= 1


def test_patches_of_a_flat_grid_are_put_together_to_what_the_tower_saw() -> None:
    one = by_name("qwen3-vl")
    model, inputs, images = ready(one)
    with workbench.attach(model) as wb:
        found = workbench.grounding(wb, inputs)
    assert found.sizes.tolist() == [[32, 48], [32, 16]]
    from PIL import Image

    resized = np.asarray(Image.fromarray(images[0]).resize((48, 32), Image.Resampling.BICUBIC)).astype(float)
    for channel in range(3):
        seen = found.pictures[0][..., channel].numpy()
        assert np.corrcoef(resized[..., channel].ravel(), seen.ravel())[0, 1] > 0.999


def video(kind: str) -> tuple[Any, dict[str, Any]]:
    one = by_name(kind)
    model = sight.built(one)
    if kind.startswith("qwen"):
        grid = torch.tensor([[2, 4, 6]])
        pixels = torch.randn(48, 96, generator=torch.Generator().manual_seed(0))
        given = {"pixel_values_videos": pixels, "video_grid_thw": grid}
        return model, sight.prompt([12], sight.VIDEO) | given
    pixels = torch.randn(1, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    inputs = sight.prompt([13], sight.VIDEO) | {"pixel_values_videos": pixels}
    inputs.pop("mm_token_type_ids")
    return model, inputs


@pytest.mark.parametrize("kind", ["qwen2.5-vl", "llava-onevision"])
def test_frames_of_a_video(kind: str) -> None:
    model, inputs = video(kind)
    with workbench.attach(model) as wb:
        found = workbench.grounding(wb, inputs, sinks="kept")
    frames = {"qwen2.5-vl": ("video 0, frames 0 to 1", "video 0, frames 2 to 3"),
              "llava-onevision": ("video 0, frame 0", "video 0, frame 1", "video 0, frame 2")}  # fmt: skip
    assert found.names == frames[kind]
    eager = truth(model, inputs)
    torch.testing.assert_close(found.weights[0], eager[:, -1, found.places], atol=2e-6, rtol=0)
    assert len(found.places) == 12


def test_rows_that_wrote_an_answer_are_those_of_one_forward_over_it() -> None:
    one = by_name("llava")
    model, inputs, images = ready(one)
    with workbench.attach(model) as wb:
        found = workbench.grounding(wb, inputs, images, one.processor(), new_tokens=3, sinks="kept")
        written = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    start = inputs["input_ids"].shape[1]
    assert found.positions == (start - 1, start, start + 1)[: written.shape[1] - start]
    longer = inputs | {"input_ids": written, "attention_mask": torch.ones_like(written)}
    eager = truth(model, longer)
    for i, row in enumerate(found.positions):
        torch.testing.assert_close(found.weights[i], eager[:, row, found.places], atol=2e-6, rtol=0)


def test_the_second_prompt_of_a_batch() -> None:
    one = by_name("qwen2.5-vl")
    model, images = sight.built(one), sight.pictures(one)
    several = [sight.made(model, one, [image]) for image in images]
    n = max(each["input_ids"].shape[1] for each in several)
    pad = [n - each["input_ids"].shape[1] for each in several]
    batch = {}
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        rows = [torch.nn.functional.pad(each[name], (by, 0)) for by, each in zip(pad, several, strict=True)]
        batch[name] = torch.cat(rows)
    batch |= {name: torch.cat([each[name] for each in several]) for name in ("pixel_values", "image_grid_thw")}
    with workbench.attach(model) as wb:
        found = workbench.grounding(wb, batch, [images[1]], one.processor(), example=1, sinks="kept")
    torch.testing.assert_close(found.weights[0], eager_of(model, batch)[:, -1, found.places], atol=2e-6, rtol=0)
    assert found.sizes.tolist() == [list(one.sizes[1])]


def eager_of(model: Any, batch: dict[str, Any]) -> Tensor:
    stack = "model.language_model"
    return torch.cat([each[1] for each in eager_modules(stack)(model, batch)[stack]])


def test_sinks_are_left_out_with_the_weight_that_they_had() -> None:
    """Two patches are made to draw weight and to give nothing, one to draw weight and to give."""
    one = by_name("llava")
    model, inputs, images = ready(one)
    layer = model.model.language_model.layers[1].self_attn
    with workbench.attach(model) as wb:
        places = workbench.image_places(wb, inputs, images, one.processor())
        chosen = places.positions[[3, 20, 9]].tolist()

        def pull(module: Any, args: Any, output: Tensor) -> Tensor:
            """Keys of these patches lie along what all queries share."""
            return output.index_copy(1, torch.tensor(chosen), 400 * torch.ones(1, 3, output.shape[-1]))

        def still(module: Any, args: Any, output: Tensor) -> Tensor:
            return output.index_fill(1, torch.tensor(chosen[:2]), 1e-3)

        def ones(module: Any, args: Any, output: Tensor) -> Tensor:
            return torch.ones_like(output) + 0.01 * output

        hooks = [layer.k_proj.register_forward_hook(pull), layer.v_proj.register_forward_hook(still),
                 layer.q_proj.register_forward_hook(ones)]  # fmt: skip
        try:
            found = workbench.grounding(wb, inputs, images, one.processor(), sites=[layer_name(wb)])
            kept = workbench.grounding(wb, inputs, images, one.processor(), sites=[layer_name(wb)], sinks="kept")
            given = workbench.grounding(wb, inputs, images, one.processor(), sites=[layer_name(wb)], sinks=chosen[2:])
        finally:
            for hook in hooks:
                hook.remove()
    assert torch.equal(found.weights, kept.weights)
    where = found.sinks.any(0).nonzero()[:, 0].tolist()
    assert where
    assert {int(found.places[i]) for i in where} <= set(chosen[:2])
    torch.testing.assert_close(found.removed, (kept.weights * found.sinks).sum(-1), atol=0, rtol=0)
    torch.testing.assert_close(found.removed + found.kept.sum(-1), found.masses[..., 0], atol=1e-6, rtol=0)
    assert float(found.removed.max()) > 0.1
    assert float(found.map(0).sum() + found.map(1).sum()) < float(kept.map(0).sum() + kept.map(1).sum())
    assert not kept.sinks.any()
    assert given.places[given.sinks.any(0)].tolist() == chosen[2:]


def layer_name(wb: workbench.Workbench) -> str:
    return next(site.name for site in wb.sites if site.name.endswith("language_model.layers.1.self_attn"))


def test_a_result_is_kept_in_a_file(tmp_path: Any) -> None:
    one = by_name("gemma3")
    model, inputs, images = ready(one)
    with workbench.attach(model) as wb:
        found = workbench.grounding(wb, inputs, images, one.processor(), at=[-2, -1], **one.settings)
    again = workbench.Grounding.load(found.save(tmp_path / "found.safetensors"))
    assert torch.equal(again.weights, found.weights)
    assert repr(again) == repr(found)
    assert again.table.equals(found.table)
    assert len(found.table) == 2 * len(found.labels)
    best = found.top(1).iloc[0]
    assert best["weight"] == pytest.approx(float(found.pooled()[-1].max()))


def test_a_capture_of_ones_own() -> None:
    one = by_name("idefics3")
    model, inputs, images = ready(one)
    with workbench.attach(model) as wb:
        places = workbench.image_places(wb, inputs, images, one.processor())
        with torch.no_grad(), wb.capture([], values=True) as cap:
            model(**inputs)
        found = workbench.analysis.grounding.grounding_of(cap, places)
        whole = workbench.grounding(wb, inputs, images, one.processor())
        with torch.no_grad(), wb.capture([]) as other:
            model(**inputs | {"input_ids": inputs["input_ids"].roll(1, 1)})
        with pytest.raises(CaptureError, match="of another prompt"):
            workbench.analysis.grounding.grounding_of(other, places)
    assert torch.equal(found.weights, whole.weights)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("qwen2.5-vl", lambda i: i | {"image_grid_thw": i["image_grid_thw"][:1]}, "image_grid_thw counts 96 patches"),
        ("qwen2.5-vl", lambda i: i | {"image_grid_thw": i["image_grid_thw"].flip(0)}, "lays image 0 of 50 x 33 out"),
        ("qwen2.5-vl", lambda i: {k: v for k, v in i.items() if k != "pixel_values"}, "no image is among the inputs"),
        ("qwen2.5-vl", lambda i: {k: v for k, v in i.items() if k != "image_grid_thw"}, "cannot be told without"),
        ("qwen2.5-vl", lambda i: i | {"input_ids": i["input_ids"].clamp(max=50)}, "no token of the prompt stands for"),
        ("qwen2.5-vl", lambda i: i | {"input_ids": i["input_ids"][:, :-12]}, "make 48 features, and"),
        ("qwen2.5-vl", lambda i: {k: v for k, v in i.items() if k != "input_ids"}, "no input_ids"),
        ("llava", lambda i: i | {"pixel_values": i["pixel_values"][:1]}, "4 x 4 patches and 32 tokens"),
        ("llava", lambda i: i | {"pixel_values": i["pixel_values"][[0, 1, 1]]}, "32 tokens stand for 3 tiles"),
        ("internvl", lambda i: i | {"pixel_values": i["pixel_values"][:2]}, "tokens: how patches become tokens"),
        ("llava-next", lambda i: i | {"image_sizes": i["image_sizes"][:1]}, "there are 2 images"),
    ],
)
def test_what_does_not_fit_is_refused(kind: str, change: Any, message: str) -> None:
    one = by_name(kind)
    model, inputs, images = ready(one)
    if message == "make 48 features, and":
        inputs["input_ids"] = inputs["input_ids"].flip(1)
    with workbench.attach(model) as wb, pytest.raises(WorkbenchError, match=message):
        workbench.image_places(wb, change(inputs), images, one.processor(), **one.settings)


def test_images_that_are_not_those_of_the_prompt_are_refused() -> None:
    one = by_name("internvl")
    model, inputs, images = ready(one)
    refused = [
        (images[:1], {}, "the prompt has more"),
        ([*images, images[0]], {}, "and the inputs have 0"),
        (images[::-1], {"max_patches": 1}, "the prompt has more|and the inputs have"),
        ([images[0], images[1].astype(float) * 3], {}, "outside of 0 to 255"),
        ([images[0], images[1][..., :2]], {}, "image 1 is no picture"),
    ]
    with workbench.attach(model) as wb:
        for given, more, message in refused:
            with pytest.raises(WorkbenchError, match=message):
                workbench.image_places(wb, inputs, given, one.processor(), **one.settings | more)
        with pytest.raises(WorkbenchError, match="pass processor= too"):
            workbench.image_places(wb, inputs, images)
        with pytest.raises(WorkbenchError, match="position 999 lies beyond"):
            workbench.grounding(wb, inputs, at=999)
        with pytest.raises(WorkbenchError, match="position 0 is no patch"):
            workbench.grounding(wb, inputs, sinks=[0])
        with pytest.raises(WorkbenchError, match="there is no head 'L9H9'"):
            workbench.grounding(wb, inputs).map(heads="L9H9")
        with pytest.raises(WorkbenchError, match="no picture 7"):
            workbench.grounding(wb, inputs).map(7)


def captioner() -> Any:
    """A ViT that a GPT-2 reads by cross-attention."""
    import transformers as hf

    tower = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16}
    eyes = hf.ViTConfig(**tower, image_size=24, patch_size=8)
    words = hf.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=40, n_positions=32, add_cross_attention=True,
                          is_decoder=True, bos_token_id=0, eos_token_id=0)  # fmt: skip
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(eyes, words)
    torch.manual_seed(0)
    return hf.VisionEncoderDecoderModel(config).eval()


def test_an_encoder_decoder_reads_patches_by_cross_attention() -> None:
    from support.zoo.twins import eager_twin

    model = captioner()
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    inputs = {"pixel_values": pixels, "decoder_input_ids": torch.tensor([[0, 5, 6, 7, 8], [0, 9, 3, 4, 1]])}
    with workbench.attach(model) as wb:
        found = workbench.grounding(wb, inputs, at=[1, -1], example=1, sinks="kept")
        with pytest.raises(WorkbenchError, match="no example 2"):
            workbench.grounding(wb, inputs, example=2)
        with pytest.raises(WorkbenchError, match="cannot be told"):
            workbench.grounding(wb, {"decoder_input_ids": inputs["decoder_input_ids"]})
    with torch.no_grad():
        crossed = eager_twin(model)(**inputs, output_attentions=True).cross_attentions
    eager = torch.cat([each[1] for each in crossed])
    assert found.positions == (1, 4)
    assert found.places.tolist() == list(range(1, 10))  # behind the class token
    for i, row in enumerate(found.positions):
        torch.testing.assert_close(found.weights[i], eager[:, row, 1:], atol=2e-6, rtol=0)
        torch.testing.assert_close(found.masses[i, :, 1], eager[:, row, 0], atol=2e-6, rtol=0)
