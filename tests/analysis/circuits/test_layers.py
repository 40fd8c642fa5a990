"""Patching by layer and position: against hooks by hand, and against TransformerLens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import workbench
from support.circuits import Words, induction_model, random_task, task_for, tiny
from support.patched_by_hand import after, before, before_in_place, by_hand
from workbench.analysis.circuits.patching import running
from workbench.errors import AttachError, FormatError, InterventionError, TaskError
from workbench.inputs import decoder_start
from workbench.metrics import logit_diff

RESIDS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


def points(model: nn.Module, name: str) -> dict[str, list[tuple[nn.Module, Any]]]:
    """For each activation the module and kind of hook of every block, by the names of the model's own code."""
    if name == "t5":
        found: dict[str, list[tuple[nn.Module, Any]]] = {}
        for tower in (model.encoder, model.decoder):
            for block in tower.block:
                parts = block.layer
                for what, module, how in (
                    ("resid_pre", block, before), ("resid_mid", parts[0], after), ("resid_post", block, after),
                    ("attn_out", parts[0].SelfAttention, after), ("mlp_out", parts[-1].DenseReluDense, after),
                    ("cross_attn_out", getattr(parts[1], "EncDecAttention", None), after),
                    ("resid_mid_cross", parts[1] if len(parts) == 3 else None, after),
                ):  # fmt: skip
                    if module is not None:
                        found.setdefault(what, []).append((module, how))
        return found
    if name == "falcon-h1":
        blocks = model.model.layers
        return {
            "resid_mid": [(block.pre_ff_layernorm, before_in_place) for block in blocks],
            "attn_out": [(module, after) for block in blocks for module in (block.mamba, block.self_attn)],
            "mlp_out": [(block.feed_forward, after) for block in blocks],
        }
    if name in ("llama-gqa", "granite"):
        blocks = model.model.layers
        attention, norm = "self_attn", "post_attention_layernorm"
    elif name == "gpt2":
        blocks, attention, norm = model.transformer.h, "attn", "ln_2"
    else:
        blocks, attention, norm = model.gpt_neox.layers, "attention", ""
    return {
        "resid_pre": [(block, before) for block in blocks],
        "resid_mid": [(getattr(block, norm), before_in_place) for block in blocks] if norm else [],
        "resid_post": [(block, after) for block in blocks],
        "attn_out": [(getattr(block, attention), after) for block in blocks],
        "mlp_out": [(block.mlp, after) for block in blocks],
    }


BOTH_WAYS = [("gpt2", "denoising"), ("gpt2", "noising"), ("llama-gqa", "denoising"),
    ("granite", "noising"), ("falcon-h1", "noising"), ("t5", "noising"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "direction"), [*BOTH_WAYS, ("gpt-neox", "denoising")])
def test_it_is_what_hooks_by_hand_give(name: str, direction: str) -> None:
    model, task = tiny(name), task_for(name, 3)
    start = decoder_start(model)
    clean, twin = (next(iter(task.batches(Words(), 3, twins=twins, start_token=start))) for twins in (False, True))
    into, out_of = (clean, twin) if direction == "noising" else (twin, clean)
    with torch.no_grad():
        plain, other = (logit_diff(model(**batch, use_cache=False), clean) for batch in (into, out_of))
    span = float((plain - other).mean()) * (1 if direction == "noising" else -1)
    expected = points(model, name)
    close = 1e-6 if name in ("granite", "falcon-h1") else 1e-9  # where a factor has to be taken out again
    with workbench.attach(model, Words()) as wb:
        for activation, where in expected.items():
            if not where:
                continue
            found = workbench.patch_layers(wb, task, activation, direction=direction, progress=False)
            columns = [int(place.rpartition(" ")[2]) for place in found.places]
            only = found.streams[0] if len(set(found.streams)) == 1 else ""  # its places go without its name
            of = [place.rpartition(" ")[0] or only for place in found.places]
            assert len(found.rows) == len(where)
            lengths = [of.count(stream) for stream in found.streams]
            hand = by_hand(model, where, into, out_of, lengths)
            seen = 0
            for row, stream in enumerate(found.streams):
                for j, column in enumerate(columns):
                    if of[j] != stream:
                        assert bool(found.effects[row, j].isnan().all())
                        continue
                    moved = hand[row, column] - plain
                    assert torch.allclose(found.effects[row, j], moved, atol=close), (activation, row, column)
                    way = -1 if direction == "noising" else 1
                    share = way * float(moved.mean()) / span
                    assert float(found.scores[row, j]) == pytest.approx(share, abs=10 * close)
                    seen += 1
            assert seen == len(hand)
            assert len(found.table) == seen
    assert {key for key, where in expected.items() if not where} == ({"resid_mid"} if name == "gpt-neox" else set())


@pytest.mark.parametrize(
    ("name", "direction"), [("gpt2", "noising"), ("llama-gqa", "denoising"), ("gpt-neox", "noising")]
)
def test_everything_is_one_and_nothing_is_zero(name: str, direction: str) -> None:
    task = random_task(4, 6, 60)
    with workbench.attach(tiny(name), Words()) as wb:
        for activation in ("resid_pre", "resid_post", *([] if name == "gpt-neox" else ["resid_mid"])):
            how: dict[str, Any] = {"direction": direction, "progress": False}
            whole = workbench.patch_layers(wb, task, activation, by_position=False, **how)
            assert whole.places == ("all",)
            assert torch.allclose(whole.scores, torch.ones(2, 1).double(), atol=1e-12)
            found = workbench.patch_layers(wb, task, activation, **how)
            assert bool((found.effects[:, 0] == 0).all())  # nothing differs before the first word that does
        first = workbench.patch_layers(wb, task, "resid_pre", **how)
        changed = torch.tensor([False, True, False, False, True, False])
        assert bool((first.effects[0, ~changed] == 0).all())
        assert bool((first.effects[0, changed] != 0).any())


def test_the_planted_circuit_stands_where_it_was_put() -> None:
    """The first word of the pair is changed: it is read one token later, noted there, and looked up from the end."""
    model, task = induction_model()
    with workbench.attach(model, Words()) as wb:
        found = workbench.patch_layers(wb, task, "resid_post", progress=False)
        assert float(found.scores[0, 6]) == pytest.approx(0, abs=0.05)
        assert float(found.scores[1, 6]) == pytest.approx(1, abs=1e-12)
        together = workbench.patch_layers(wb, task, "resid_post", positions=[2, 4], by_position=False, progress=False)
        assert float(together.scores[0, 0]) == pytest.approx(1, abs=0.05)
        assert together.places == ("[2, 4]",)
        with pytest.raises(InterventionError, match=r"no mlp_out: no block has an MLP"):
            workbench.patch_layers(wb, task, "mlp_out", progress=False)
        with pytest.raises(InterventionError, match=r"no resid_mid: blocks\.0 has no MLP"):
            workbench.patch_layers(wb, task, "resid_mid", progress=False)


@pytest.fixture(scope="module")
def bridge() -> Any:
    import tempfile

    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from test_transformer_lens import BUILT

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(60)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with tempfile.TemporaryDirectory() as folder:
        PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2").save_pretrained(
            folder
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
        hub, _ = BUILT["gpt2"]
        yield TransformerBridge.boot_transformers(
            hub, hf_model=tiny("gpt2", torch.float32), tokenizer=tokenizer, device="cpu"
        )


@pytest.mark.parametrize("activation", ["resid_pre", "resid_mid", "attn_out", "mlp_out", "z"])
def test_it_is_what_transformer_lens_gives(bridge: Any, activation: str) -> None:
    from transformer_lens import patching

    names = {"z": "attn_head_out_by_pos"}
    theirs = getattr(patching, f"get_act_patch_{names.get(activation, activation)}")
    task = random_task(3, 6, 60)
    clean, twin = (next(iter(task.batches(Words(), 3, twins=twins))) for twins in (False, True))
    _, cache = bridge.run_with_cache(clean["input_ids"])
    with torch.no_grad():
        plain = logit_diff(bridge(twin["input_ids"]), clean).mean()
        expected = theirs(bridge, twin["input_ids"], cache, lambda logits: logit_diff(logits, clean).mean()) - plain
    with workbench.attach(tiny("gpt2", torch.float32), Words()) as wb:
        if activation == "z":
            heads = workbench.patch_heads(wb, task, "z", by_position=True, progress=False)
            ours = heads.effects.mean(-1).unflatten(0, (2, -1)).transpose(1, 2)
        else:
            ours = workbench.patch_layers(wb, task, activation, progress=False).effects.mean(-1)
    assert float(expected.abs().max()) > 1e-3
    torch.testing.assert_close(ours.float(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "t5"])
def test_prompts_of_other_lengths_are_as_each_alone(name: str) -> None:
    task = random_task(5, 6, 60, lengths=3, written=name == "t5")
    where = ["early", -2, "end", 0]
    with workbench.attach(tiny(name), Words()) as wb:
        how: dict[str, Any] = {"positions": where, "progress": False}
        padded = workbench.patch_layers(wb, task, "attn_out", **how)
        alone = workbench.patch_layers(wb, task, "attn_out", batch_size=1, **how)
        assert torch.allclose(padded.effects, alone.effects, atol=1e-9, equal_nan=True)
        assert bool((padded.effects[:, 1].nan_to_num() != 0).any())
        at_end = workbench.patch_layers(wb, task, "attn_out", positions=range(-2, 0), progress=False)
        assert at_end.places == ("-2", "-1")
        assert torch.allclose(at_end.effects, padded.effects[:, 1:3], atol=1e-9, equal_nan=True)
        message = "prompts of 6 to 8 tokens have no" if name != "t5" else "inputs of the encoder of 6 to 8"
        with pytest.raises(InterventionError, match=message):
            workbench.patch_layers(wb, task, progress=False)
        with pytest.raises(InterventionError, match="position 6 lies beyond prompt 0, which has 6 tokens"):
            workbench.patch_layers(wb, task, positions=[6], progress=False)
        with pytest.raises(InterventionError, match="position -7 lies beyond prompt 0"):
            workbench.patch_layers(wb, task, positions=-7, progress=False)


def test_bad_questions_are_named() -> None:
    task = random_task(3, 6, 60)
    with workbench.attach(tiny("gpt2"), Words()) as wb:
        for asked, says in (
            ({"activation": "resid_pr"}, "no activation .resid_pr"),
            ({"activation": "resid_mid_cross"}, "no block has cross-attention"),
            ({"direction": "both"}, "the direction is"),
            ({"positions": [1.5]}, "names or whole numbers"),
            ({"positions": []}, "the list is empty"),
        ):
            with pytest.raises(InterventionError, match=says):
                workbench.patch_layers(wb, task, progress=False, **asked)
        with pytest.raises(TaskError, match="no position called"):
            workbench.patch_layers(wb, task, positions="early on", progress=False)
    with (
        workbench.attach(tiny("gpt-neox"), Words()) as wb,
        pytest.raises(InterventionError, match=r"gpt_neox\.layers\.0 read the same stream"),
    ):
        workbench.patch_layers(wb, task, "resid_mid", progress=False)
    with (
        workbench.attach(nn.TransformerEncoderLayer(16, 4, batch_first=True).eval(), Words()) as wb,
        pytest.raises(AttachError, match="in no block"),
    ):
        workbench.patch_layers(wb, task, progress=False)


class Breaking:
    """A metric that is interrupted at its n-th call."""

    def __init__(self, after: int = 10**9, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.calls, self.after, self.error = 0, after, error

    def of(self) -> Any:
        def difference(output: Any, batch: Any) -> Tensor:
            self.calls += 1
            if self.calls > self.after:
                raise self.error("stop")
            return logit_diff(output, batch)

        return difference


def test_it_goes_on_from_its_file_to_the_same_bits(tmp_path: Path) -> None:
    task = random_task(5, 6, 60)

    def patch(wb: Any, metric: Breaking, **more: Any) -> Any:
        how = {"metric": metric.of(), "batch_size": 3, "progress": False, "memory": 1 << 17} | more
        return workbench.patch_layers(wb, task, "resid_post", **how)

    with workbench.attach(tiny("gpt2", torch.float32), Words()) as wb:
        counted = Breaking()
        whole = patch(wb, counted)
        path = tmp_path / "patching.safetensors"
        first = 4  # the baselines of two batches
        for after in (first + 2, first + 3):  # the batch as it is, and one chunk of patches or two
            with pytest.raises(workbench.PatchingInterrupted, match="go on with resume") as stopped:
                patch(wb, Breaking(after), resume=path)
            assert 0 < int(stopped.value.partial.done.sum()) < stopped.value.partial.done.numel()
            assert "done" in repr(workbench.Patching.load(path))
        again = Breaking()
        assert torch.equal(patch(wb, again, resume=path).effects, whole.effects)
        assert again.calls < counted.calls
        held = workbench.Patching.load(path)
        assert held.complete
        assert held.table["done"].eq(1).all()
        last = Breaking()
        assert torch.equal(patch(wb, last, resume=path).effects, whole.effects)
        assert last.calls == first
        with pytest.raises(FormatError, match="is of another patching: it differs in direction"):
            patch(wb, Breaking(), resume=path, direction="noising")
        with pytest.raises(FormatError, match="places"):
            patch(wb, Breaking(), resume=path, positions=[0, 1])
        other = tmp_path / "other.safetensors"
        with pytest.raises(ZeroDivisionError) as failed:
            patch(wb, Breaking(counted.calls // 2, ZeroDivisionError), resume=other)
        assert "resume=" in failed.value.__notes__[0]
        assert torch.equal(patch(wb, Breaking(), resume=other).effects, whole.effects)


def test_only_what_differs_runs_and_no_layer_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks run for the patches of their layer and those below; a position that is the same runs for none."""
    model, task = tiny("gpt2"), random_task(2, 6, 60)
    rows: list[Any] = []
    with workbench.attach(model, Words()) as wb, monkeypatch.context() as patched:
        run = running._chunks
        patched.setattr(running, "_chunks", lambda *args: rows.extend(found := run(*args)) or found)
        workbench.patch_layers(wb, task, "resid_pre", progress=False)
    assert rows == [[(0, 1), (0, 4)], [(1, place) for place in range(1, 6)]]


def test_its_file_and_its_views(tmp_path: Path) -> None:
    from views.test_results import shown
    from workbench.views import all_of

    for name in ("gpt2", "t5"):
        with workbench.attach(tiny(name), Words()) as wb:
            found = workbench.patch_layers(wb, task_for(name, 1), "resid_pre", progress=False)
        assert found.tokens[1].startswith("w")
        several = all_of(found)
        assert len(several) == (2 if name == "t5" else 1)
        (trace,) = several[0]._whole["data"]
        there = [j for j, place in enumerate(found.places) if not place.startswith("decoder")]
        torch.testing.assert_close(torch.tensor(trace["z"]), found.scores[:2, there], check_dtype=False)
        shown(found, tmp_path)
        assert "resid_pre" in repr(found)
