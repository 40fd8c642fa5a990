"""The maze transformer: its modes, its maps, its training, and what is shipped."""

import json
from pathlib import Path

import pytest
import torch

import workbench
from workbench import FormatError, TaskError, WorkbenchError
from workbench.mechanisms.dualformer import MIXTURES, Maze, load, model, search, study, think, training
from workbench.mechanisms.dualformer.dropping import DUAL, FULL, SOLUTION
from workbench.mechanisms.dualformer.model import WORDS, build

SMALL = {"d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 16, "num_layers": 1, "num_decoder_layers": 1}


@pytest.fixture(scope="module")
def shipped() -> torch.nn.Module:
    if not model.SHIPPED.is_file():
        pytest.skip("no weights ship")
    return load()


def tokens_of(batch: dict[str, torch.Tensor]) -> list[list[str]]:
    return [[WORDS.tokens[i] for i in row if i >= 0] for row in batch["labels"].tolist()]


def test_what_a_model_is_taught_is_what_the_mixture_says() -> None:
    for mixture, starts in ((SOLUTION, {"plan"}), (FULL, {"create"}), (DUAL, {"plan", "create"})):
        (batch, *_) = training.batches(mixture, 4, seed=0)
        rows = [row for batch in training.batches(mixture, 4, seed=0) for row in tokens_of(batch)]
        assert {row[0] for row in rows} == starts
        assert all(row[-1] == "eos" for row in rows)
        assert (batch["decoder_input_ids"][:, 0] == WORDS.ids["bos"]).all()
    for mixture in (FULL, SOLUTION):  # whole traces, and plans alone
        for batch in training.batches(mixture, 4, seed=1):
            for ids, row in zip(batch["input_ids"].tolist(), tokens_of(batch), strict=True):
                trace, plan = search(WORDS.read_prompt([WORDS.tokens[i] for i in ids if i]))
                told = (WORDS.trace(trace) if mixture is FULL else []) + WORDS.plan(plan)
                assert row == [*told, "eos"]


def test_no_training_sees_what_is_held_out() -> None:
    mazes = training.held_out(40)
    assert len(set(mazes)) == 40
    for batch in training.batches(SOLUTION, 32, seed=0):
        for ids, mask in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True):
            maze = WORDS.read_prompt(WORDS.decode(ids[: sum(mask)]))
            assert not training.is_held_out(maze)
            assert maze not in mazes


@pytest.mark.parametrize(("mode", "first"), [("fast", "plan"), ("slow", "create")])
def test_the_forced_token_is_the_first_one(mode: str, first: str) -> None:
    torch.manual_seed(0)
    for thought in think(build(**SMALL), training.held_out(3), mode, most=12):
        assert thought.tokens[:2] == ("bos", first)
        assert len(thought.tokens) <= 13
        assert thought.answer is not None or thought.fault
        assert not thought.optimal or thought.solved


def test_auto_draws_its_first_token_with_the_probability_that_it_tells() -> None:
    torch.manual_seed(1)
    network, mazes = build(**SMALL), training.held_out(400)
    thoughts = think(network, mazes, "auto", most=2)
    expected = sum(thought.p_fast for thought in thoughts) / len(thoughts)
    assert abs(sum(thought.went_fast for thought in thoughts) / len(thoughts) - expected) < 0.1
    again = think(network, mazes, "auto", most=2)
    assert [thought.tokens for thought in thoughts] == [thought.tokens for thought in again]
    other = think(network, mazes, "auto", most=2, seed=1)
    assert [thought.tokens for thought in thoughts] != [thought.tokens for thought in other]


def test_writing_with_a_cache_is_what_whole_forwards_give() -> None:
    torch.manual_seed(2)
    network, mazes = build(**SMALL), training.held_out(3)
    thoughts = think(network, mazes, "slow", most=9)
    ids, mask = model.prompts(mazes)
    for row, thought in enumerate(thoughts):
        written = WORDS.encode(thought.tokens)
        with torch.no_grad():
            logits = network(
                input_ids=ids[row, None], attention_mask=mask[row, None], decoder_input_ids=torch.tensor([written])
            ).logits
        assert logits[0, 1:-1].argmax(-1).tolist() == written[2:]


def test_a_training_that_was_stopped_goes_on_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "_SIZES", SMALL)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    one = training.train("solution", whole, steps=6, size=3, every=3)
    with monkeypatch.context() as stopped:
        stopped.setattr(training.disk, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            training.train("solution", parts, steps=6, size=3, every=3)
    two = training.train("solution", parts, steps=6, size=3, every=3)
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b), name
    again = load(whole / "solution.safetensors")
    torch.testing.assert_close(next(again.parameters()), next(one.parameters()).half().float(), rtol=0, atol=0)
    with pytest.raises(WorkbenchError, match="other settings"):
        training.train("solution", parts, steps=7, size=3)  # rates have begun to fall
    with pytest.raises(WorkbenchError, match="no training"):
        training.train("fast", parts)
    assert json.loads((whole / "solution.json").read_text())["step"] == 6
    assert set(MIXTURES) == {"dual", "full", "solution"}


def test_bad_input_is_named(tmp_path: Path) -> None:
    network = build(**SMALL)
    with pytest.raises(TaskError, match="no mode 'quick'"):
        think(network, training.held_out(1), "quick")
    with pytest.raises(TaskError, match="not 3 x 3"):
        think(network, [Maze(3, 3, frozenset(), (0, 0), (2, 2))])
    with pytest.raises(TaskError, match="no maze"):
        think(network, [])
    with pytest.raises(TaskError, match="not 'auto'"):
        study.step_task("auto")
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(FormatError):
        load(tmp_path / "x.safetensors")


def test_twins_of_the_tasks_differ_in_their_first_step_alone() -> None:
    fast, slow = study.step_task("fast", 6), study.step_task("slow", 6)
    assert torch.equal(fast.inputs["input_ids"], slow.inputs["input_ids"])
    assert fast.answer_ids == slow.answer_ids
    for i in range(6):
        for inputs, right in ((slow.inputs, slow.answer_ids), (slow.twin_inputs, slow.wrong_ids)):
            maze = WORDS.read_prompt(WORDS.decode(inputs["input_ids"][i].tolist()))
            assert [WORDS.tokens[right[i][0]]] == WORDS.cell(maze.shortest()[1])
            written = WORDS.decode(inputs["decoder_input_ids"][i].tolist())
            assert written[-3:] == ["plan", *WORDS.cell(maze.start), "plan"]
            assert written.count("create") == study.N_CREATES


def test_maps_of_the_decoder_are_causal_and_rows_of_cross_attention_sum_to_one() -> None:
    task = study.step_task("slow", 2)
    with workbench.attach(build(**SMALL)) as wb:
        inputs = {**task.inputs}
        assert wb.verify(**inputs).ok
        with torch.no_grad(), wb.capture() as cap:
            wb.model(**inputs)
        kinds = {site.site.kind: site.pattern.dense() for site in cap}
    assert set(kinds) == {"self", "cross"}
    torch.testing.assert_close(kinds["cross"].sum(-1), torch.ones(kinds["cross"].shape[:-1]))
    own = kinds["self"]  # the decoder's comes last
    assert own.shape[-1] == task.inputs["decoder_input_ids"].shape[1]
    assert not bool(own.triu(1).any())
    flow = study.token_flow(own[0], *[WORDS.decode(task.inputs["decoder_input_ids"][0].tolist())] * 2)
    assert {name for name, _ in flow} == {"bos", "create", "cell", "plan"}
    total = sum(weight for (name, _), weight in flow.items() if name == "plan")
    torch.testing.assert_close(total, torch.ones(2))


# What ships


def test_without_weights_it_says_how_to_train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(model, "SHIPPED", tmp_path / "none")
    with pytest.raises(WorkbenchError, match=r"(?s)no weights .*training --kind dual"):
        load(tmp_path / "none")


def test_the_shipped_model_is_small_and_was_trained_in_time(shipped: torch.nn.Module) -> None:
    assert model.SHIPPED.stat().st_size < 1_000_000
    facts = json.loads((model.SHIPPED.parent / "results.json").read_text())["training"]
    assert facts["dual"]["seconds"] < 20 * 60


def test_forced_tokens_give_the_wanted_grammar(shipped: torch.nn.Module) -> None:
    mazes = training.held_out(24, seed=5)
    fast, slow = (think(shipped, mazes, mode) for mode in ("fast", "slow"))
    assert all(thought.answer is not None and not thought.answer.trace for thought in fast)
    assert sum(thought.answer is not None and bool(thought.answer.trace) for thought in slow) >= 22


def test_the_residual_stream_holds_the_mode_at_the_control_token_and_then_behind_it(shipped: torch.nn.Module) -> None:
    task = study.mode_task(8)
    with workbench.attach(shipped) as wb:
        table = workbench.patch_layers(wb, task, positions=[1, 2], progress=False).table
    decoder = table[table["row"].str.startswith("decoder")]
    scores = decoder.set_index(["layer", "position"])["score"]
    assert scores[0, "1"] == pytest.approx(1, abs=1e-4)  # the control token itself
    assert scores[1, "2"] > 0.8  # from which the first block has told the token behind it
    assert abs(scores[1, "1"]) < 0.2


def test_a_file_that_claims_a_huge_model_allocates_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = build(d_model=8, d_kv=4, num_heads=2, d_ff=8, num_layers=1, num_decoder_layers=1)
    small.config.d_ff = 4096
    path, on = model.save(small, tmp_path / "a.safetensors", {}), []
    made = model.build

    def watched(**sizes: int) -> torch.nn.Module:
        one = made(**sizes)
        on.extend(parameter.device.type for parameter in one.parameters())
        return one

    monkeypatch.setattr(model, "build", watched)
    with pytest.raises(FormatError, match="other weights"):
        load(path)
    assert set(on) == {"meta"}


def test_more_mazes_than_there_are_end_and_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="such mazes were found"):
        training.held_out(400, n_walls=0)
    with pytest.raises(WorkbenchError, match="no folder"):
        training.train("dual", tmp_path / "none", steps=1)
