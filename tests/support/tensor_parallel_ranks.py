"""What one process of two does in the tests of tensor parallelism: `python -m support.tensor_parallel_ranks 0 FOLDER`.

Both hold the whole model beside their part of it. Each case compares the two; what it found wrong goes, by its name,
into `FOLDER/0.json`.
"""

import copy
import datetime
import json
import os
import pickle
import re
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import workbench
from support.circuits import Words, random_task
from support.patience import PATIENCE
from workbench import AttachError, Capture, CaptureError, Variant, WorkbenchError
from workbench.kernels.statistics import STATISTICS
from workbench.storage.rendering import renderer

RANKS = 2
IDS = torch.randint(3, 60, (3, 11), generator=torch.Generator().manual_seed(0))
SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
                         "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
                         "eos_token_id": 2}  # fmt: skip
COMMON = tuple(name for name in STATISTICS if name != "lse")  # which those that write their attention out do not have
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}


def models() -> dict[str, Any]:
    """Whole models whose libraries know how to split them."""
    torch.manual_seed(0)
    return {
        "llama": hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, **HEADS)),
        "neox": hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SIZES, num_attention_heads=4)),
        "gemma2": hf.Gemma2ForCausalLM(hf.Gemma2Config(**SIZES, **HEADS, head_dim=12, query_pre_attn_scalar=12)),
        "qwen3": hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES, **HEADS, head_dim=12)),
    }


class Attention(nn.Module):
    """Attention as people write it who split their models by hand."""

    def __init__(self, n_heads: int = 4) -> None:
        super().__init__()
        self.n_heads, self.width = n_heads, 8
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.width)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(out.transpose(1, 2).flatten(2))


class Written(Attention):
    """The same, with its attention written out."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.width)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        weights = (q @ k.transpose(-1, -2) / self.width**0.5).softmax(-1)
        return self.wo((weights @ v).transpose(1, 2).flatten(2))


class Block(Attention):
    """Attention and an MLP in one module, of which only the MLP is split; its part is as wide as all heads together."""

    def __init__(self, n_heads: int = 4) -> None:
        super().__init__(n_heads)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = x + super().forward(x)
        return self.down(self.up(x).relu())


class Stack(nn.Module):
    """Two blocks of attention."""

    def __init__(self, kind: type[Attention]) -> None:
        super().__init__()
        self.embed, self.places, self.blocks, self.head = (
            nn.Embedding(64, 32),
            nn.Embedding(64, 32),
            nn.ModuleList(kind() for _ in range(2)),
            nn.Linear(32, 64),
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) + self.places.weight[: input_ids.shape[1]]
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def by_hand(kind: type[Attention], *, counts_its_own: bool, mesh: Any = None) -> tuple[nn.Module, nn.Module]:
    """A whole model and its part; `counts_its_own`: the part's modules state the number of heads that they have."""
    torch.manual_seed(0)
    whole = Stack(kind).eval()
    part = copy.deepcopy(whole)
    mesh = mesh or init_device_mesh("cpu", (RANKS,))
    plan: dict[str, Any] = {name: ColwiseParallel() for name in ("wq", "wk", "wv")} | {"wo": RowwiseParallel()}
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()} if kind is Block else plan
    for block in part.blocks:
        parallelize_module(block, mesh, plan)
        block.n_heads //= RANKS if counts_its_own else 1
    return whole, part


def recurrent() -> tuple[nn.Module, nn.Module]:
    """A state-space model, and one of which the first layer's output projection is split."""
    torch.manual_seed(0)
    config = hf.MambaConfig(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=2)
    whole = hf.MambaForCausalLM(config).eval()
    part = copy.deepcopy(whole)
    plan = {"out_proj": RowwiseParallel(input_layouts=Replicate())}
    parallelize_module(part.backbone.layers[0].mixer, init_device_mesh("cpu", (RANKS,)), plan)
    return whole, part


@dataclass
class Pair:
    """The whole model and this process's part of it."""

    rank: int
    whole: Any
    part: Any

    @property
    def here(self) -> list[int]:
        """The heads of this process."""
        return [2 * self.rank, 2 * self.rank + 1]


def logits(output: Any) -> Tensor:
    found = getattr(output, "logits", output)
    return found.full_tensor() if hasattr(found, "full_tensor") else found


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4, equal_nan=True)


def captured(model: Any, run: Callable[[Any], Any] = lambda model: model(IDS), **options: Any) -> Capture:
    asked = {"statistics": COMMON, "z": True, "values": True, "pattern": True, "n_top": 3} | options
    with torch.no_grad(), workbench.attach(model) as wb, wb.capture(**asked) as cap:
        run(model)
    return cap


def same(a: Capture, b: Capture) -> None:
    """Two captures of whole models."""
    assert [str(site) for site in a.sites] == [str(site) for site in b.sites]
    for one, other in zip(a, b, strict=True):
        assert one.shape == other.shape
        assert one.statistics.keys() == other.statistics.keys()
        for name, value in one.statistics.items():
            close(value.double(), other.statistics[name].double())
        close(one.z, other.z)
        close(one.weights, other.weights)
        close(one.pattern.dense(), other.pattern.dense())
    assert a.table("entropy").drop(columns="entropy").equals(b.table("entropy").drop(columns="entropy"))
    assert a.ledger == b.ledger


def each_heads_own_numbers(pair: Pair) -> None:
    """Statistics, z, rows of tables and results of the heads here are under the whole model's numbers."""
    whole, part = captured(pair.whole), captured(pair.part)
    elsewhere = [h for h in range(4) if h not in pair.here]
    for want, got in zip(whole, part, strict=True):
        assert got.shape == want.shape
        assert (got.site.n_heads, got.site.n_kv_heads) == (want.site.n_heads, want.site.n_kv_heads)
        for name, value in want.statistics.items():
            close(got.statistics[name][:, pair.here].double(), value[:, pair.here].double())
            hidden = got.statistics[name][:, elsewhere]
            assert bool((hidden.isnan() if hidden.is_floating_point() else hidden == -1).all())
        close(got.z[:, :, pair.here], want.z[:, :, pair.here])
        for heads in (None, pair.here, pair.here[0], [3, 0]):
            chosen = list(range(4)) if heads is None else [heads] if isinstance(heads, int) else heads
            result, held = got.result(heads), [i for i, h in enumerate(chosen) if h in pair.here]
            close(result[:, :, held], want.result(heads)[:, :, held])
            assert bool(result[:, :, [i for i in range(len(chosen)) if i not in held]].isnan().all())
        close(got.pattern.dense(heads=pair.here), want.pattern.dense(heads=pair.here))
        close(got.pattern.statistics(["entropy"])["entropy"], got.entropy)
    table, all_rows = part.table("entropy"), whole.table("entropy")
    assert sorted(set(table["head"])) == pair.here
    close(
        torch.tensor(table["entropy"].to_numpy()),
        torch.tensor(all_rows[all_rows["head"].isin(pair.here)]["entropy"].to_numpy()),
    )


def what_is_elsewhere_is_said(pair: Pair) -> None:
    """In the sites, the ledger, representations, and errors."""
    with workbench.attach(pair.part) as wb:
        with torch.no_grad(), wb.capture() as cap:
            pair.part(IDS)
        text = f"{pair.here[0]} to {pair.here[1]}"
        assert text in repr(wb.sites)
        assert text in wb.sites._repr_html_()
        assert f"heads {text} of 4 here" in repr(cap)
        assert f"heads {text} of 4 here" in repr(cap[0])
        assert any(f"heads {text} of 4 here" in line for line in cap.ledger)
        assert "of this rank's shards" in cap.provenance["weights_note"]
        fails(lambda: cap[0].pattern.dense(), CaptureError, "cap.gathered()")
        assert len([view.to_html() for view in renderer().all_of(cap)]) >= 2  # the heads here, and what they look at
        fails(lambda: wb.ablate((0, 4)).__enter__(), WorkbenchError, "4 heads, 0 to 3")
        fails(lambda: workbench.prune_heads(pair.part, "L0H1"), WorkbenchError, "cut over several processes")
    copied = pickle.loads(pickle.dumps(cap))
    with tempfile.TemporaryDirectory() as folder:
        loaded = workbench.load_capture(cap.save(Path(folder) / "part.safetensors", pattern=True))
    for again in (copied, loaded):
        assert repr(again) == repr(cap)
        assert again.ledger == cap.ledger
        torch.testing.assert_close(again[1].pattern.dense(heads=pair.here), cap[1].pattern.dense(heads=pair.here))
        fails(again.gathered, CaptureError, "saved")


def fails(act: Callable[[], Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=re.escape(text)):
        act()


def gathered_is_the_whole(pair: Pair) -> None:
    """Every process has the capture of the whole model, which is saved and loaded like one."""
    whole, part = captured(pair.whole), captured(pair.part)
    made = part.gathered(result=True)
    same(made, whole)
    for want, got in zip(whole, made, strict=True):
        close(got.result(), want.result())
    assert made.gathered() is made
    assert "here" not in repr(made.sites)


def generations_are_joined(pair: Pair) -> None:
    """The steps of `generate()`, each of them split, put together."""

    def run(model: Any) -> Any:
        return model.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)

    whole, part = (captured(model, run).joined() for model in (pair.whole, pair.part))
    same(part.gathered(), whole)


def gradients_are_gathered(pair: Pair) -> None:
    caps = []
    for model in (pair.whole, pair.part):
        with workbench.attach(model) as wb, wb.capture(gradients=True, z=True) as cap:
            logits(model(IDS)).square().mean().backward()
        caps.append(cap)
        model.zero_grad()
    whole, part = caps[0], caps[1].gathered()
    for want, got in zip(whole, part, strict=True):
        close(got.z_gradient, want.z_gradient)
        close(got.head_gradient, want.head_gradient)


def interventions_are_those_of_the_whole(pair: Pair) -> None:
    """Each kind, on heads of both processes."""
    torch.manual_seed(1)
    width = captured(pair.whole, statistics=())[0].z.shape[-1]
    z, direction, inputs = torch.randn(3, 11, width), torch.randn(32), {"input_ids": IDS.flip(0)}
    asked: list[int] = []

    def patched(old: Tensor, site: Any, head: int) -> Tensor:
        asked.append(head)
        return old.roll(1, 1) * 0.5

    edits: dict[str, Callable[[Any], Any]] = {
        **{f"zero {i, h}": lambda wb, i=i, h=h: wb.ablate((i, h)) for i in (0, 1) for h in range(4)},
        "both": lambda wb: wb.ablate({(0, 0), (0, 3), "L1H1"}),
        "mean": lambda wb: wb.ablate({(0, 0), (1, 3)}, "mean", reference=inputs),
        "mean_positional": lambda wb: wb.ablate([(0, 2), (1, 1)], "mean_positional", reference=inputs, positions=-1),
        "resample": lambda wb: wb.ablate({(0, 1), (0, 2)}, "resample", reference=inputs),
        "patch": lambda wb: wb.patch({(0, 1): z, (0, 2): z[0], (1, 0): patched}),
        "pattern": lambda wb: wb.edit_pattern({(0, 1), (1, 2)}, lambda rows, site, head: rows.roll(1, -1), [3, 5]),
        "steer": lambda wb: wb.steer({(0, 3)}, z[0, 0], 2.0, positions=[1, 2]),
        "residual stream": lambda wb: wb.steer(("resid", 0), direction, positions=2),
    }
    with torch.no_grad(), workbench.attach(pair.whole) as one, workbench.attach(pair.part) as other:
        bare = logits(pair.whole(IDS))
        close(logits(pair.part(IDS)), bare)
        for name, edit in edits.items():
            with edit(one):
                want = logits(pair.whole(IDS))
            del asked[:]
            with edit(other):
                got = logits(pair.part(IDS))
            assert not asked or pair.here == [0, 1], "a function was asked for a head that is elsewhere"
            assert (want - bare).abs().max() > 1e-4, name
            close(got, want)
        for wb in (one, other):
            fails(lambda wb=wb: wb.ablate((0, 4)).__enter__(), WorkbenchError, "4 heads")
        if one.sites[0].n_kv_heads == 2:
            with one.ablate("L0KV1"), other.ablate("L0KV1"):
                close(logits(pair.part(IDS)), logits(pair.whole(IDS)))
    kept = captured(pair.whole), captured(pair.part)
    with (
        torch.no_grad(),
        workbench.attach(pair.whole) as one,
        workbench.attach(pair.part) as other,
        one.ablate((1, 3), "mean", reference=kept[0]),
        other.ablate((1, 3), "mean", reference=kept[1]),
    ):
        close(logits(pair.part(IDS)), logits(pair.whole(IDS)))


def analyses_are_those_of_the_whole(pair: Pair) -> None:
    """Sweeps and the importance of heads."""
    found = []
    for model in (pair.whole, pair.part):
        with workbench.attach(model) as wb:
            with torch.no_grad(), wb.capture():
                model(IDS)
            variants = [Variant((s.name, h)) for s in wb.sites for h in range(4)] + [Variant((0, 2), "mean")]

            def metric(output: Any, batch: Any) -> Tensor:
                return logits(output)[:, -1].square().mean(-1)

            batches = [{"input_ids": IDS}, {"input_ids": IDS[:1, :7]}]
            sweep = workbench.run_sweep(wb, variants, batches, metric, progress=False)
            methods = ("ablation", "gradient", "attention_gradient")
            scores = workbench.head_importance(wb, batches, metric=metric, methods=methods, progress=False)
            found.append((sweep.values, scores.table.select_dtypes("number").to_numpy()))
    (values, table), (split_values, split_table) = found
    close(split_values, values)
    close(torch.tensor(split_table.astype(float)), torch.tensor(table.astype(float)))


def verified(pair: Pair) -> None:
    reports = []
    for model in (pair.whole, pair.part):
        with workbench.attach(model) as wb:
            reports.append(wb.verify(IDS).raise_if_failed())
    assert [check["shape"] for check in reports[0].checks] == [check["shape"] for check in reports[1].checks]
    assert reports[0].complete == reports[1].complete


def one_process_may_capture_alone(pair: Pair) -> None:
    """Nothing is sent for a capture: nobody waits for those that do not capture."""
    with torch.no_grad():
        if pair.rank == 0:
            assert len(captured(pair.part)) == 2
        else:
            pair.part(IDS)


def stored_in_parts(pair: Pair) -> None:
    """FSDP has whole weights while a module runs, so that all heads are here; results need them too."""
    part = copy.deepcopy(pair.whole)
    for module in (*part.model.layers, part):
        fully_shard(module, mesh=init_device_mesh("cpu", (RANKS,)))
    cap, whole = captured(part), captured(pair.whole)
    same(cap, whole)
    with workbench.attach(part) as one, workbench.attach(pair.whole) as other, torch.no_grad():
        with one.ablate((0, 3)), other.ablate((0, 3)):
            close(logits(part(IDS)), logits(pair.whole(IDS)))
        one.verify(IDS).raise_if_failed()
    fails(cap[0].result, CaptureError, "unshard()")
    part.model.layers[0].unshard()
    close(cap[0].result(), whole[0].result())


def no_heads_are_elsewhere(pair: Pair) -> None:
    """Only the MLP is split."""
    same(captured(pair.part), captured(pair.whole))


def different_captures_are_not_gathered(pair: Pair) -> None:
    """Every process learns of it."""
    names = ("entropy",) if pair.rank == 0 else ("entropy", "peak")
    cap = captured(pair.part, statistics=names)
    fails(cap.gathered, CaptureError, "captured something else")
    cap = captured(pair.part, lambda model: model(IDS + pair.rank))
    fails(cap.gathered, CaptureError, "captured something else")
    cap = captured(pair.part)
    if pair.rank == 1:
        with torch.no_grad():
            pair.part.model.layers[0].self_attn.o_proj.weight.mul_(1.0)
    fails(lambda: cap.gathered(result=True), CaptureError, "in process 1 of the group, the weight of")


def circuits_and_logits_say_what_they_need(pair: Pair) -> None:
    """A stream whose heads are in several processes is no sum that one of them can take."""
    task, batch = random_task(2, 6, 60), {"input_ids": IDS[:1]}
    asked: dict[str, Callable[[Any], Any]] = {
        **{
            method: lambda wb, method=method: workbench.find_circuit(wb, task, method=method)
            for method in ("eap", "path_patching")
        },
        "attribution": lambda wb: workbench.logit_attribution(wb, batch, 5),
    }
    with workbench.attach(pair.part, Words()) as wb:
        for ask in asked.values():
            fails(lambda ask=ask: ask(wb), AttachError, "all heads are needed in one process")
    with torch.no_grad(), workbench.attach(pair.whole) as one, workbench.attach(pair.part) as other:
        whole, part = (workbench.logit_lens(wb, batch) for wb in (one, other))  # reads the stream, which is here
    close(part.divergence, whole.divergence)


def readers_say_what_they_need(pair: Pair) -> None:
    """A mixer that is read from weights of which other processes have a part is refused, and the model goes on."""
    with torch.no_grad():
        bare = pair.part(IDS).logits
        close(bare, pair.whole(IDS).logits)
        said = "cannot be read from weights of which other processes hold a part"
        fails(lambda: captured(pair.part), CaptureError, said)
        with workbench.attach(pair.part) as wb:
            split, other = (site.name for site in wb.sites)
            with wb.capture(sites=other) as cap:
                assert torch.equal(pair.part(IDS).logits, bare)
            close(cap[other].entropy, captured(pair.whole, statistics=("entropy",), z=False)[other].entropy)
            with wb.ablate((other, 0)):
                assert not torch.equal(pair.part(IDS).logits, bare)
            with pytest.raises(WorkbenchError, match=said), wb.ablate((split, 0)):
                pair.part(IDS)
        assert torch.equal(pair.part(IDS).logits, bare)


def told(act: Callable[[], Any]) -> str:
    """What an error says."""
    try:
        act()
    except CaptureError as error:
        return str(error)
    return ""


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        each_heads_own_numbers, what_is_elsewhere_is_said, gathered_is_the_whole, generations_are_joined,
        gradients_are_gathered, interventions_are_those_of_the_whole, analyses_are_those_of_the_whole, verified,
        one_process_may_capture_alone, different_captures_are_not_gathered, stored_in_parts, no_heads_are_elsewhere,
        circuits_and_logits_say_what_they_need, readers_say_what_they_need,
    )
}  # fmt: skip
BY_HAND = {
    "states the whole": (Attention, False),
    "states its own": (Attention, True),
    "written out": (Written, True),
    "only the MLP": (Block, False),
}
CASES = [
    f"{name}: {scenario}"
    for name, scenarios in {
        "llama": [name for name in SCENARIOS if name not in ("no_heads_are_elsewhere", "readers_say_what_they_need")],
        "neox": ["each_heads_own_numbers", "gathered_is_the_whole", "interventions_are_those_of_the_whole"],
        "gemma2": ["each_heads_own_numbers", "gathered_is_the_whole", "verified"],
        "qwen3": ["each_heads_own_numbers", "interventions_are_those_of_the_whole"],
        **{
            name: ["each_heads_own_numbers", "gathered_is_the_whole", "verified", "gradients_are_gathered"]
            for name in BY_HAND
        },
        "written out": ["each_heads_own_numbers", "gathered_is_the_whole"],
        "only the MLP": ["no_heads_are_elsewhere"],
        "mamba": ["readers_say_what_they_need"],
    }.items()
    for scenario in scenarios
]


def main(rank: int, folder: Path, only: str = "") -> None:
    """Run every case, and write what was wrong."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    wait = datetime.timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", f"file://{folder}/meeting", world_size=RANKS, rank=rank, timeout=wait)
    found: dict[str, str] = {}
    pairs: dict[str, Pair] = {}
    for case in (case for case in CASES if only in case):
        name, scenario = case.split(": ")
        try:
            if name not in pairs:
                if name in BY_HAND:
                    kind, own = BY_HAND[name]
                    whole, part = by_hand(kind, counts_its_own=own)
                elif name == "mamba":
                    whole, part = recurrent()
                else:
                    load = hf.AutoModelForCausalLM.from_pretrained
                    backend = {"attn_implementation": "eager"} if name == "gemma2" else {}
                    whole = load(folder / name, **backend).eval()
                    part = load(folder / name, tp_plan="auto", **backend).eval()
                pairs[name] = Pair(rank, whole, part)
            SCENARIOS[scenario](pairs[name])
            found[case] = ""
        except Exception:
            found[case] = traceback.format_exc()
        (folder / f"{rank}.json").write_text(json.dumps(found))
    cap = captured(pairs["llama"].part, statistics=("entropy",)) if "llama" in pairs else None
    dist.barrier()
    if rank == 0 and cap is not None:
        found["told"] = told(cap.gathered)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    os._exit(0)  # the group cannot be left in good order any more


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
