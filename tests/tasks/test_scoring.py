"""Answers of several tokens, and answers behind other positions than the last: each as the prompt alone has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import workbench
from support.circuits import Words, induction_model, random_task, tiny
from workbench.analysis.circuits.engine.edges import run_edges
from workbench.analysis.circuits.engine.setup import open_setup
from workbench.analysis.circuits.find import Stage
from workbench.analysis.circuits.methods.path_patching import Paths, run_paths
from workbench.analysis.circuits.repair import last_row_on
from workbench.errors import CaptureError, InterventionError, TaskError
from workbench.inputs import decoder_start
from workbench.metrics import METRICS, Scored, TaskBatch
from workbench.tasks import Task, from_inputs, from_prompts
from workbench.tasks.scoring import answer_of

RIGHT = [(11, 12), (13,), (14, 15, 16)]
WRONG = [(11, 17), (18,), (14, 19, 20)]  # they part at the second, first and second token


def spelled(ids: tuple[int, ...]) -> str:
    return "".join(f" w{i}" for i in ids)


def several(written: bool = False) -> Task:
    """Three prompts of different lengths, with answers of two, one and three tokens."""
    task = random_task(3, 6, 60, lengths=3, written=written)
    examples = [
        replace(example, answers=(spelled(right),), wrong=(spelled(wrong),))
        for example, right, wrong in zip(task, RIGHT, WRONG, strict=True)
    ]
    return replace(task, examples=tuple(examples))


@torch.no_grad()
def by_hand(model: nn.Module, example: Any, right: Sequence[int], wrong: Sequence[int], text: str) -> dict[str, Any]:
    """Each metric of one example, from one forward for each token of its answer."""
    start, words = decoder_start(model), Words()
    prompt = words(text)["input_ids"]
    logits = []
    for i in range(len(right)):
        if start is None:
            out = model(input_ids=torch.tensor([[*prompt, *right[:i]]]))
        else:
            own = [start, *words(example.written)["input_ids"], *right[:i]]
            out = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([own]))
        logits.append(out.logits[0, -1])
    logs = [row.log_softmax(-1) for row in logits]
    total = sum(float(row[i]) for row, i in zip(logs, right, strict=True))
    at = next(i for i, (a, b) in enumerate(zip(right, wrong, strict=False)) if a != b)
    return {
        "loss": -total, "probability": float(torch.tensor(total).exp()),
        "logit_diff": float(logits[at][right[at]] - logits[at][wrong[at]]),
        "accuracy": float(all(int(row.argmax()) == i for row, i in zip(logits, right, strict=True))),
        "logs": torch.stack(logs),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "t5"])
def test_metrics_of_answers_of_several_tokens(name: str) -> None:
    """In one padded batch, and in a sweep, what each prompt has with its answer written token by token."""
    model, task = tiny(name), several(written=name == "t5")
    start = decoder_start(model)
    (batch,) = task.batches(Words(), start_token=start)
    (twin,) = task.batches(Words(), start_token=start, twins=True)
    with torch.no_grad():
        outputs = [model(**each, use_cache=False) for each in (batch, twin)]
    hand = [
        [by_hand(model, e, right, wrong, text) for e, right, wrong, text in zip(task, RIGHT, WRONG, texts, strict=True)]
        for texts in (task.prompts, task.twins)
    ]
    for output, each, expected in zip(outputs, (batch, twin), hand, strict=True):
        for metric in ("loss", "probability", "logit_diff", "accuracy"):
            found = METRICS[metric](output, each)
            torch.testing.assert_close(
                found.double(), torch.tensor([one[metric] for one in expected]).double(), atol=1e-9, rtol=1e-7
            )
    moved = METRICS["kl_divergence"](outputs[1], batch, outputs[0])
    for i, (a, b) in enumerate(zip(hand[0], hand[1], strict=True)):
        mean = (a["logs"].exp() * (a["logs"] - b["logs"])).sum(-1).mean()
        assert float(moved[i]) == pytest.approx(float(mean), abs=1e-9)
    assert task.logit_diff(model, Words()).tolist() == pytest.approx([one["logit_diff"] for one in hand[0]])
    with workbench.attach(model, Words()) as wb:
        metrics = ["loss", "logit_diff", "kl_divergence"]
        head = "decoder.0.attn.H1" if name == "t5" else (0, 1)
        sweep = workbench.run_sweep(wb, [workbench.Variant(head, "zero")], [batch], metrics, progress=False)
        assert sweep.clean[0].tolist() == pytest.approx([one["loss"] for one in hand[0]])
        with wb.ablate(head, "zero"):
            edited = [by_hand(model, e, right, wrong, text)
                      for e, right, wrong, text in zip(task, RIGHT, WRONG, task.prompts, strict=True)]  # fmt: skip
        for row, metric in enumerate(metrics[:2]):
            assert sweep.values[0, row].tolist() == pytest.approx([one[metric] for one in edited], abs=1e-9)


def test_circuits_of_answers_of_several_tokens() -> None:
    model, task = tiny("gpt2"), several()
    with workbench.attach(model, Words()) as wb:
        for metric in ("logit_diff", "loss"):
            found = workbench.patch_heads(wb, task, "z", metric=metric, progress=False)
            alone = workbench.patch_heads(wb, task, "z", metric=metric, batch_size=1, progress=False)
            assert torch.allclose(found.effects, alone.effects, atol=1e-9)
            clean, twin = (next(iter(task.batches(Words(), twins=twins))) for twins in (False, True))
            with torch.no_grad():
                with wb.capture(z=True) as cap:
                    model(**clean)
                plain = METRICS[metric](model(**twin), clean)
                for row in (1, 6):
                    head = found.layers[row], found.numbers[row]
                    with wb.patch({head: cap[head[0]].z[:, :, head[1]]}):
                        expected = METRICS[metric](model(**twin), clean) - plain
                    assert torch.allclose(found.effects[row, 0], expected, atol=1e-9)
        layers = workbench.patch_layers(wb, task, positions=["early", "end", -2], progress=False)
        single = workbench.patch_layers(wb, task, positions=["early", "end", -2], batch_size=1, progress=False)
        assert torch.allclose(layers.effects, single.effects, atol=1e-9)  # ends of prompts, not of answers
        assert bool((layers.effects[1, 1] != 0).all())
        with open_setup(wb, task, batch_size=2) as setup:
            setup.measure_baselines()
            whole = run_edges(setup, torch.stack([setup.graph.exists, ~setup.graph.exists]), progress=False)
            assert torch.allclose(whole, torch.stack([setup.clean, setup.corrupted]), atol=1e-9)
        circuit = workbench.find_circuit(wb, task, "eap", n_edges=0.5, progress=False)
        assert torch.allclose(circuit.clean, setup.clean)
        stages = [Stage("logits", None), Stage("q", None), Stage("kv", None)]
        by_default, everywhere = (
            workbench.find_circuit(wb, task, stages=chosen, fraction=0.2, progress=False)
            for chosen in (None, stages[:1])
        )
        for found in (by_default, everywhere):
            assert found.stages[0]["receivers"] == ("logits",)
        assert torch.allclose(
            by_default.stages[0]["importance"], everywhere.stages[0]["importance"], atol=1e-9, equal_nan=True
        )


def behind_what_they_share(task: Task) -> Task:
    """The same questions with answers of one token: what right and wrong answers share stands in the prompts."""
    examples = []
    for example, right, wrong in zip(task, RIGHT, WRONG, strict=True):
        at = next(i for i, (a, b) in enumerate(zip(right, wrong, strict=False)) if a != b)
        shared = spelled(right[:at])
        examples.append(
            replace(example, prompt=example.prompt + shared, twin=example.twin + shared,
                    answers=(spelled(right[at : at + 1]),), wrong=(spelled(wrong[at : at + 1]),))
        )  # fmt: skip
    return replace(task, examples=tuple(examples))


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_what_reads_one_logit_reads_that_in_which_answers_part(name: str) -> None:
    task = several()
    short = behind_what_they_share(task)
    with workbench.attach(tiny(name), Words()) as wb:
        found, other = (workbench.logit_attribution(wb, each) for each in (task, short))
        assert torch.allclose(found.values, other.values, atol=1e-9)
        assert found.targets == other.targets == ("w12", "w13", "w15")
        assert torch.allclose(found.logits, task.logit_diff(wb.model, Words()), atol=1e-9)
        places = {"answer": ("early",)}
        roles, others = (workbench.head_roles(wb, each, places=places, progress=False) for each in (task, short))
        for evidence in ("to_answer", "answer_logit", "wrong_logit", "logit_diff"):
            assert torch.allclose(roles.evidence[evidence], others.evidence[evidence], atol=1e-9), evidence
        early = task[1:2].using(measured_at="early")
        at_word = workbench.logit_attribution(wb, early)
        by_hand = workbench.logit_attribution(wb, {"input_ids": torch.tensor([Words()(task[1].prompt)["input_ids"]])},
                                              13, contrast=18, position=1)  # fmt: skip
        assert torch.allclose(at_word.values, by_hand.values, atol=1e-9)
        with pytest.raises(CaptureError, match="several tokens, or are measured at"):
            workbench.logit_attribution(wb, task, position=2)


def test_a_repair_edits_the_row_behind_which_answers_part() -> None:
    task = several()
    with workbench.attach(tiny("gpt2"), Words()) as wb:
        found = workbench.repair(wb, task, ["L0H1", "L1H2"], towards=["early"], n_random=0, progress=False)
        (batch,) = task.batches(Words())
        weights = torch.zeros(batch["input_ids"].shape)
        weights[:, 1] = 1.0
        rows = torch.tensor([[len(e.prompt.split()) - 1 + at] for e, at in zip(task, (1, 0, 1), strict=True)])
        with torch.no_grad(), wb.edit_pattern(["L0H1", "L1H2"], last_row_on(weights), queries=rows):
            expected = METRICS["accuracy"](wb.model(**batch), batch)
        assert torch.equal(found.together, expected.double())
        with pytest.raises(InterventionError, match="in example 0 heads would look at tokens that come"):
            workbench.repair(wb, task[1:2].using(measured_at="early"), ["L0H1"], towards=["end"], n_random=0)


def test_right_answers_that_differ_early_are_compared_by_what_they_begin_with() -> None:
    """w11 w12, w21 and w31 w32 w33 are all right, w18 and w19 w20 wrong: they part at the first token."""
    model, task = tiny("gpt2"), random_task(2, 6, 60)
    examples = [replace(e, answers=(" w11 w12", " w21", " w31 w32 w33"), wrong=(" w18", " w19 w20")) for e in task]
    task = replace(task, examples=tuple(examples))
    (batch,) = task.batches(Words())
    with torch.no_grad():
        logits = model(**batch).logits
    right, wrong = (logits[:, -1, several].logsumexp(-1) for several in ([11, 21, 31], [18, 19]))
    assert torch.allclose(METRICS["logit_diff"](logits, batch), right - wrong)
    for metric in ("loss", "probability", "accuracy"):
        with pytest.raises(TaskError, match="right answers of example 0 part before their last token"):
            METRICS[metric](logits, batch)
    with workbench.attach(model, Words()) as wb:
        found = workbench.logit_attribution(wb, task)
        assert float(found.logits[0]) == pytest.approx(
            float(logits[0, -1, [11, 21, 31]].mean() - logits[0, -1, [18, 19]].mean())
        )
        with pytest.raises(TaskError, match="part before their last token"):
            workbench.patch_heads(wb, task, metric="probability", progress=False)
        patched = workbench.patch_heads(wb, task, progress=False)
        assert patched.clean.tolist() == pytest.approx((right - wrong).tolist())


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "bloom", "mamba"])
def test_batches_that_are_padded_on_the_left_are_as_each_alone(name: str) -> None:
    model, task = tiny(name, torch.float32), several()
    (left,) = task.batches(Words(), padding_side="left")
    (right,) = task.batches(Words())
    assert bool(left["attention_mask"][:, -1].all())
    assert left["position_ids"][:, -1].tolist() == (right["attention_mask"].sum(1) - 1).tolist()
    assert "position_ids" not in right
    with torch.no_grad():
        for metric in ("loss", "logit_diff", "probability"):
            found, other = (METRICS[metric](model(**each), each) for each in (left, right))
            alone = torch.cat([METRICS[metric](model(**each), each) for each in task.batches(Words(), 1)])
            torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(other, alone, atol=1e-4, rtol=1e-4)
        early = random_task(4, 6, 60, lengths=3).using(measured_at="early")
        (padded,) = early.batches(Words(), padding_side="left")
        torch.testing.assert_close(
            METRICS["logit_diff"](model(**padded), padded), early.logit_diff(model, Words()), atol=1e-4, rtol=1e-4
        )
    if name == "gpt2":
        with workbench.attach(model, Words()) as wb:
            variants = [workbench.Variant((1, 2), "zero")]
            sweeps = [workbench.run_sweep(wb, variants, [each], "loss", progress=False) for each in (left, right)]
            assert torch.allclose(sweeps[0].values, sweeps[1].values, atol=1e-4)
            assert torch.allclose(
                workbench.logit_attribution(wb, dict(left), 7).values,
                workbench.logit_attribution(wb, dict(right), 7).values, atol=1e-6,
            )  # fmt: skip


def test_which_side_is_padded_is_a_choice() -> None:
    class Left(Words):
        padding_side = "left"

    task = random_task(3, 6, 60, lengths=3)
    for tokenizer, side, expected in ((Words(), "left", 0), (Left(), None, 0), (Left(), "right", 1), (Left(), ..., 1)):
        how = {} if side is ... else {"padding_side": side}
        (batch,) = task.batches(tokenizer, **how)
        assert int(batch["attention_mask"][0, 0]) == expected
    (same,) = random_task(3, 6, 60).batches(Words(), padding_side="left")
    assert "position_ids" not in same  # nothing is padded
    with pytest.raises(TaskError, match="an encoder counts its positions"):
        next(iter(task.batches(Words(), padding_side="left", start_token=0)))
    with pytest.raises(TaskError, match="not 'middle'"):
        next(iter(task.batches(Words(), padding_side="middle")))


def test_a_path_to_several_logits_is_all_that_a_last_head_does() -> None:
    """Without MLPs nothing but the logits reads the heads of the last layer."""
    model, task = induction_model()
    answers = [(*map(int, [e.answer[2:]]), 3, 1) for e in task]
    examples = [
        replace(e, answers=(spelled(ids),), wrong=(f"{e.wrong[0]} w3",)) for e, ids in zip(task, answers, strict=True)
    ]
    task = replace(task, examples=tuple(examples))
    with workbench.attach(model, Words()) as wb:
        patched = workbench.patch_heads(wb, task, "z", direction="noising", metric="loss", progress=False)
        with open_setup(wb, task, "loss") as setup:
            setup.measure_baselines()
            paths = Paths(("logits",), tuple((f"a1.h{h}",) for h in range(3)), positions=None)
            found = run_paths(setup, paths, progress=False) - setup.clean
    assert torch.allclose(found, patched.effects[3:, 0], atol=1e-9)
    assert bool((found.abs() > 1e-6).any())


def test_answers_behind_other_positions() -> None:
    """A causal model says behind a word what it says when the text ends there."""
    model, task = tiny("gpt2"), random_task(4, 6, 60, lengths=2)
    early = task.using(measured_at="early")
    (batch,) = early.batches(Words())
    assert batch.scored is not None
    short = replace(
        task, examples=tuple(replace(e, prompt=" ".join(e.prompt.split()[:2]), twin=" ".join(e.twin.split()[:2]))
                             for e in task)
    )  # fmt: skip
    with torch.no_grad():
        found = METRICS["logit_diff"](model(**batch), batch)
    assert torch.allclose(found, short.logit_diff(model, Words()), atol=1e-9)
    with workbench.attach(model, Words()) as wb:
        patched = workbench.patch_layers(wb, early, positions=["early", "end"], progress=False)
        other = workbench.patch_layers(wb, short, positions=["end"], progress=False)
        assert torch.allclose(patched.effects[:, :1], other.effects, atol=1e-9)
        assert bool((patched.effects[:, 1].abs() < 1e-12).all())  # what comes later changes nothing
        sweep = workbench.run_sweep(wb, [workbench.Variant((1, 2), "zero")], [batch], "logit_diff", progress=False)
        assert torch.allclose(sweep.clean[0], found, atol=1e-9)
    with pytest.raises(TaskError, match="no position called"):
        task.using(measured_at="late")
    with pytest.raises(TaskError, match="the answer of example 0 has 2 tokens"):
        next(iter(several().using(measured_at="early").batches(Words())))
    with pytest.raises(TaskError, match="which the encoder reads"):
        next(iter(random_task(2, 6, 60, written=True).using(measured_at="early").batches(Words(), start_token=0)))


class Begun(Words):
    """Has a token for the beginning of a text, and puts it there or not."""

    bos_token_id = 1

    def __init__(self, itself: bool) -> None:
        self.itself = itself

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = super().__call__(text)["input_ids"]
        return {"input_ids": [1, *ids] if self.itself and add_special_tokens else ids}


@pytest.mark.parametrize("itself", [False, True])
def test_the_beginning_is_a_choice(itself: bool) -> None:
    task, tokenizer = random_task(3, 6, 60, lengths=2), Begun(itself)
    plain = [Words()(text)["input_ids"] for text in task.prompts]
    for chosen, begun in ((None, itself), (True, True), (False, False)):
        own = task.using(prepend_bos=chosen)
        (batch,) = own.batches(tokenizer)
        for row, mask, ids in zip(batch["input_ids"], batch["attention_mask"], plain, strict=True):
            assert row[mask.bool()].tolist() == ([1] if begun else []) + ids
        assert own.positions("early", tokenizer) == [1 + begun] * 3
    assert task.using(prepend_bos=True)[:2].prepend_bos is True
    with pytest.raises(TaskError, match="no token for the beginning"):
        next(iter(task.using(prepend_bos=True).batches(Words())))


def padded_left(rows: list[list[int]]) -> dict[str, Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_prompts_that_are_padded_on_the_left_are_as_each_alone(name: str) -> None:
    text = random_task(4, 4, 60, lengths=4)
    text = replace(text, examples=(text[3], text[1], text[0], text[2]))
    rows, others = ([Words()(t)["input_ids"] for t in texts] for texts in (text.prompts, text.twins))
    rows[1], others[1] = rows[1] * 5, others[1] * 5  # more padding before the others than a model's parts are found by
    longest = max(map(len, rows))
    right, wrong = ([int(e[0][2:]) for e in sets] for sets in ([x.answers for x in text], [x.wrong for x in text]))
    inputs, twins = padded_left(rows), padded_left(others)
    second = [longest - len(row) + 1 for row in rows]
    task = from_inputs(inputs, twins, right, wrong, positions={"early": second})
    with workbench.attach(tiny(name), Words()) as wb:
        found = workbench.patch_layers(wb, task, "attn_out", positions=["early", 1, -2, "end"], progress=False)
        assert torch.allclose(found.effects[:, 0], found.effects[:, 1], atol=1e-12)
        for i in (0, 2):
            alone = from_inputs(
                {"input_ids": torch.tensor([rows[i]])}, {"input_ids": torch.tensor([others[i]])},
                [right[i]], [wrong[i]], positions={"early": 1},
            )  # fmt: skip
            one = workbench.patch_layers(wb, alone, "attn_out", positions=["early", 1, -2, "end"], progress=False)
            assert torch.allclose(found.effects[..., i : i + 1], one.effects, atol=1e-9), i
        early = workbench.patch_layers(
            wb, task.using(measured_at="early"), "attn_out", positions=["early", "end"], progress=False
        )
        assert bool((early.effects[:, 1].abs() < 1e-12).all())
        with pytest.raises(TaskError, match="given as they are"):
            task.using(prepend_bos=True)


def texts(right: int, wrong: int) -> Any:
    return SimpleNamespace(answers=tuple(f"r{i}" for i in range(right)), wrong=tuple(f"w{i}" for i in range(wrong)))


def test_answers_that_can_be_compared_in_one_forward() -> None:
    found = answer_of(0, texts(2, 2), [(5, 6), (5, 7)], [(5, 8, 9), (5, 4)])
    assert (found.before, found.steps, found.parts) == ((5,), (((5,), ()), ((6, 7), (8, 4))), 1)
    assert answer_of(0, texts(1, 1), [(5,)], [(6, 7)]).steps == (((5,), (6,)),)
    early = answer_of(0, texts(3, 2), [(5, 6, 1), (5, 7), (5, 6, 2, 3)], [(5, 8), (5, 9, 4)])
    assert (early.before, early.steps, early.parts, early.whole) == ((5,), (((5,), ()), ((6, 7), (8, 9))), 1, False)
    for right, wrong, says in (
        ([(5, 6), (7, 8)], [(5, 9)], "differ in more than the last token"),
        ([(5,), (5, 6, 7)], [(5, 9)], "differ in more than the last token"),
        ([(5, 6)], [(5, 7), (8,)], "at different tokens"),
        ([(5, 6)], [(5,)], "do not part"),
        ([(5,)], [(5, 6)], "do not part"),
    ):
        with pytest.raises(TaskError, match=says):
            answer_of(3, texts(len(right), len(wrong)), right, wrong)


def test_a_batch_of_other_places_moves_whole() -> None:
    scored = Scored(torch.tensor([[0, 1]]), torch.tensor([0]), [[[2], [3]]], [[[], [4]]])
    batch = TaskBatch({"input_ids": torch.tensor([[1, 2]])}, answers=[[3]], wrong=[[4]], scored=scored).to("cpu")
    assert batch.scored is not None
    logits = torch.randn(1, 2, 6, generator=torch.Generator().manual_seed(0))
    assert float(METRICS["logit_diff"](logits, batch)) == pytest.approx(float(logits[0, 1, 3] - logits[0, 1, 4]))
    logs = logits.log_softmax(-1)
    assert float(METRICS["loss"](logits, batch)) == pytest.approx(-float(logs[0, 0, 2] + logs[0, 1, 3]))


def test_prompts_with_answers_of_several_words_make_a_task() -> None:
    task = from_prompts(["w9 w8"], ["w7 w8"], [" w5 w6"], [" w5 w4"])
    (batch,) = task.batches(Words())
    assert batch["input_ids"].tolist() == [[9, 8, 5]]
    assert (batch.answers, batch.wrong) == ([[6]], [[4]])
    assert batch.scored is not None
    assert batch.scored.places.tolist() == [[1, 2]]
    with pytest.raises(TaskError, match="no token"):
        next(iter(from_prompts(["w9 w8"], ["w7 w8"], [" "], [" w4"]).batches(Words())))
