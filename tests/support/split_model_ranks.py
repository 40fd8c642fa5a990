"""What one process does in the tests of split models: `python -m support.split_model_ranks RANK FOLDER`.

Two processes hold the same small Llama: with a part of the sequence each, cut by FSDP2, or with a stage of its layers
each. What each found wrong goes, by case, into `FOLDER/RANK.json`. In the end the first ends without a word, and the
other says what it is told.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers as hf
from torch import Tensor, nn

import workbench
from support.circuits import Words, random_task
from support.hanging_ranks import by_layers, hangs_or_is_stopped, is_elsewhere, told
from support.patience import PATIENCE
from workbench.capture.capture import Capture
from workbench.errors import WorkbenchError
from workbench.hooks.together import check_as_far
from workbench.kernels.sequence_parallel import SplitSequence

RANKS = 2
LENGTHS = (13, 6)
IDS = torch.randint(3, 50, (2, sum(LENGTHS)), generator=torch.Generator().manual_seed(5))
ROWS = ["entropy", "peak", "distance", "sink", "previous", "top_keys", "received", "received_mean"]


def llama(seed: int = 0, backend: str = "sdpa") -> nn.Module:
    torch.manual_seed(seed)
    config = hf.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation=backend,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).eval()


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a.double(), b.double(), atol=1e-6, rtol=1e-5, equal_nan=True)


def split_run(model: nn.Module, split: SplitSequence) -> Tensor:
    at = torch.arange(split.here.start, split.here.stop)
    with workbench.split_over(split):
        return model(input_ids=IDS[:, at], position_ids=at[None], use_cache=False).logits


def whole_capture(model: nn.Module, **asked: Any) -> Capture:
    with torch.no_grad(), workbench.attach(model) as wb, wb.capture(ROWS, n_top=3, **asked) as cap:
        model(input_ids=IDS, use_cache=False)
    return cap


def same(one: Capture, two: Capture) -> None:
    assert list(one.sites) == list(two.sites), f"{one.sites}\n{two.sites}"
    for want, got in zip(one, two, strict=True):
        assert got.shape == want.shape
        assert got.statistics.keys() == want.statistics.keys()
        for name, value in want.statistics.items():
            close(got.statistics[name], value)
    a, b = (cap.table("entropy") for cap in (one, two))
    assert a.drop(columns="entropy").equals(b.drop(columns="entropy"))


def a_sequence_in_parts(rank: int) -> None:
    """Outputs, statistics, bytes as estimated; edits; nothing stays behind."""
    split, model = SplitSequence.of(LENGTHS[rank]), llama()
    here = slice(split.here.start, split.here.stop)
    with torch.no_grad():
        whole = model(input_ids=IDS).logits
        close(split_run(model, split), whole[:, here])
        with workbench.attach(model) as wb:
            with wb.capture(ROWS, n_top=3) as cap:
                bare = split_run(model, split)
            close(bare, whole[:, here])
            split.sent.clear()
            made = cap.gathered(split=split)
            words = sum(1 for _ in range(2))  # of the few words: their length, and they themselves
            assert split.sent.calls["all_gather"] == words + sum(
                1 for site in cap for name in site.statistics if not name.startswith("received")
            ) + len(cap._forwards[0].ids)
            told = cap.bytes_to_gather(split)
            assert 0 <= sum(split.sent.n_bytes.values()) - told < 4000, (split.sent, told)
            for heads in ({(0, 1), (2, 3)}, "L1KV1"):
                with wb.ablate(heads):
                    edited = split_run(model, split)
                    want = model(input_ids=IDS).logits
                assert (want - whole).abs().max() > 1e-3
                close(edited, want[:, here])
            with wb.ablate((1, 2), "mean", reference={"input_ids": IDS}):
                edited, want = split_run(model, split), model(input_ids=IDS).logits
            close(edited, want[:, here])
    same(whole_capture(model), made)
    assert torch.equal(made._forwards[0].ids["input"], IDS)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, whole)


def sweeps_go_on_with_what_all_have_done(rank: int) -> None:
    """A sweep of the parts is that of the whole; files that are not equally far are gone on from together."""
    split, model = SplitSequence.of(LENGTHS[rank]), llama()
    here = torch.arange(split.here.start, split.here.stop)
    batch = {"input_ids": IDS[:, here], "position_ids": here.expand(len(IDS), -1)}
    variants = [workbench.Variant((layer, head)) for layer in range(2) for head in (0, 3)]

    def sweep(wb: workbench.Workbench, batch: dict[str, Tensor], at: int, **how: Any) -> workbench.Sweep:
        found = [batch, batch]
        return workbench.run_sweep(
            wb, variants, found, lambda y, b: y.logits[:, at, 7], batched=False, progress=False, **how
        )

    with workbench.attach(model) as wb, tempfile.TemporaryDirectory() as folder:
        want = sweep(wb, {"input_ids": IDS}, split.here.stop - 1)
        with workbench.split_over(split):
            whole = sweep(wb, batch, -1)
            close(whole.values, want.values)
            done = torch.zeros_like(whole.done)
            done[: rank + 1, 0] = True
            path = replace(whole, done=done, values=whole.values.masked_fill(~done[:, :1, None], 9.0)).save(
                Path(folder) / "sweep.safetensors"
            )
            again = sweep(wb, batch, -1, resume=path)
            assert torch.equal(again.values, whole.values)
            says("not equally far: 0, 1", lambda: check_as_far(model, rank))


def gradients_of_parts(rank: int) -> None:
    split, models = SplitSequence.of(LENGTHS[rank]), (llama(), llama())
    weight = torch.randn(2, sum(LENGTHS), 64, generator=torch.Generator().manual_seed(1))
    (models[0](input_ids=IDS).logits * weight).sum().backward()
    (split_run(models[1], split) * weight[:, split.here.start : split.here.stop]).sum().backward()
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(split.summed(other.grad), one.grad, atol=1e-4, rtol=1e-4, msg=name)


def what_cannot_be_split_is_said(rank: int) -> None:
    split = SplitSequence.of(LENGTHS[rank])
    model = llama()
    at = torch.arange(split.here.start, split.here.stop)
    mask = torch.ones(2, len(at), dtype=torch.long)
    mask[0, 0] = 0
    with torch.no_grad(), workbench.split_over(split):
        says("padding", lambda: model(input_ids=IDS[:, at], position_ids=at[None], attention_mask=mask))
        says("positions, and process", lambda: model(input_ids=IDS[:, :3]))
    wide = hf.MistralForCausalLM(hf.MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4,
    )).eval()  # fmt: skip
    says("window", lambda: split_run(wide, split))
    with torch.no_grad(), workbench.attach(model) as wb:
        with wb.capture(["pooled_mean"]) as cap:
            split_run(model, split)
        says("added up", lambda: cap.gathered(split=split))
        with wb.capture() as other:
            model(input_ids=IDS[:, at])
        says("split_over", lambda: other.gathered(split=split))


def ranks_that_disagree_are_named(rank: int) -> None:
    split = SplitSequence.of(LENGTHS[rank])
    with torch.no_grad():
        for model, names in ((llama(rank), ["entropy"]), (llama(), ["entropy", "sink"][: rank + 1])):
            with workbench.attach(model) as wb, wb.capture(names) as cap:
                split_run(model, split)
            says("process 1 of the group has something else", lambda cap=cap: cap.gathered(split=split))
        model = llama()
        with workbench.attach(model) as wb:
            with wb.capture(["entropy"]) as cap:
                for _ in range(rank + 1):
                    split_run(model, split)
            if rank == 0:  # the other one's second forward has to be answered
                split_run(model, split)
        says("2 forwards and not 1", lambda: cap.gathered(split=split))


def says(text: str, act: Callable[[], Any]) -> None:
    try:
        act()
    except WorkbenchError as error:
        assert text in str(error), error  # noqa: PT017
    else:
        raise AssertionError(f"nothing was said of {text}")


def fully_sharded(rank: int) -> None:
    """FSDP2: every process captures, edits and sweeps as one with the whole model."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    whole, part = llama(), llama()
    for layer in part.model.layers:
        fully_shard(layer)
    fully_shard(part)
    same(whole_capture(whole), whole_capture(part))
    batches = [{"input_ids": IDS}]
    found = []
    for model in (whole, part):
        with workbench.attach(model) as wb, torch.no_grad():
            with wb.capture(["entropy"], z=True) as cap:
                model(input_ids=IDS)
            with wb.patch({(0, 1): cap[0].z[:, :, 1] * 0.5}), wb.ablate((1, 0)):
                edited = model(input_ids=IDS).logits
            variants = [workbench.Variant((layer, 2)) for layer in range(3)]
            swept = workbench.run_sweep(wb, variants, batches, lambda y, b: y.logits[:, -1, 7], progress=False)
            sharded = isinstance(model.model.layers[1], FSDPModule)
            if sharded:
                says("unshard()", lambda: cap[1].result([0]))
                model.model.layers[1].unshard()
            result = cap[1].result([0])
            if sharded:
                model.model.layers[1].reshard()
        found.append((edited, swept.values, result, *analyses(model)))
    for one, other in zip(*found, strict=True):
        close(one, other)


def analyses(model: nn.Module) -> Iterator[Tensor]:
    """Importance of heads, masks, the stream patched, and a corpus."""
    with workbench.attach(model, Words()) as wb:
        scores = workbench.head_importance(
            wb, [{"input_ids": IDS}], lambda y, b: y.logits[:, -1, 7], heads={(0, 1), (2, 3)}, progress=False
        )
        yield torch.from_numpy(scores.table.select_dtypes("number").to_numpy(float))
        asked = {"hypothesis": [7], "progress": False}
        getattr(model, "reshard", lambda: None)()  # a table of embeddings is looked up before the model runs
        yield workbench.saliency(wb, {"input_ids": IDS[:1]}, "gradient_x_input", **asked).scores
        yield workbench.saliency(wb, {"input_ids": IDS[:1]}, n_masks=8, exact=False, progress=False).scores
        yield workbench.patch_layers(wb, random_task(3, 5, 60), metric="kl_divergence", progress=False).effects
        atlas = workbench.head_atlas_over(wb, [IDS.flatten()], tokens=None, length=9, progress=False)
        numbers = atlas.table.drop(columns="copying").select_dtypes("number")  # which is read from whole weights
        yield torch.from_numpy(numbers.to_numpy(float))


def stages_of_a_pipeline(rank: int) -> None:
    """Each process has some of the layers; put together they are the whole model's capture."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    want = whole_capture(llama())
    stage = Stage(llama(), rank)
    pipe = PipelineStage(stage, rank, RANKS, torch.device("cpu"))
    schedule = ScheduleGPipe(pipe, 1)
    given = [IDS] if rank == 0 else []
    with torch.no_grad(), workbench.attach(stage) as wb:
        schedule.step(*given)  # the first time stages also run to find the shapes of what they send
        with wb.capture(ROWS, n_top=3) as cap:
            schedule.step(*given)
    made = cap.gathered(stages=SplitSequence.of(1))
    same(want, made)


class Stage(nn.Module):
    """The first layers of a Llama with its embedding, or the last with its head, under their names."""

    def __init__(self, whole: Any, rank: int) -> None:
        super().__init__()
        self.model, self.lm_head, self.rank = whole.model, whole.lm_head, rank
        layers = whole.model.layers
        self.model.layers = nn.ModuleDict({str(i): layers[i] for i in range(3) if (i == 2) == (rank == 1)})
        if rank == 1:
            del self.model.embed_tokens
        else:
            del self.model.norm, self.lm_head

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.model.embed_tokens(x) if self.rank == 0 else x
        at = torch.arange(hidden.shape[1])[None]
        rotary = self.model.rotary_emb(hidden, at)
        for layer in self.model.layers.values():
            hidden = layer(hidden, position_embeddings=rotary, position_ids=at, attention_mask=None)
        return hidden if self.rank == 0 else self.lm_head(self.model.norm(hidden))


CASES = {
    case.__name__: case
    for case in (
        a_sequence_in_parts, sweeps_go_on_with_what_all_have_done, gradients_of_parts, what_cannot_be_split_is_said,
        ranks_that_disagree_are_named, fully_sharded, stages_of_a_pipeline, hangs_or_is_stopped, is_elsewhere,
    )
}  # fmt: skip


def main(rank: int, folder: Path, only: str = "") -> None:
    """All cases."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group(
        "gloo", f"file://{folder}/meet", rank=rank, world_size=RANKS, timeout=datetime.timedelta(seconds=PATIENCE)
    )
    wrong: dict[str, str] = {}
    for name, case in CASES.items():
        if only and only != name:
            continue
        try:
            case(rank)
            wrong[name] = ""
        except Exception:
            wrong[name] = traceback.format_exc()
        dist.barrier()
    path = folder / f"{rank}.json"
    split, model, staged = SplitSequence.of(LENGTHS[rank]), llama(), by_layers(rank, dist.new_group())
    dist.barrier()
    if rank == 0:
        path.write_text(json.dumps({"wrong": wrong, "told": {}}))
        os._exit(0)
    with torch.no_grad():
        lost = {"positions": told(lambda: split_run(model, split)), "layers": told(staged)}
    path.write_text(json.dumps({"wrong": wrong, "told": lost}))
    os._exit(0)  # the group cannot be left in good order any more


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
