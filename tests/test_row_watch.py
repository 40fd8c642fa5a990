"""Rows of chosen heads, told at each forward: those that a capture has, and nothing of the model changes."""

import copy
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

import workbench
from support.tiny import FAMILIES, Family, make, small_llama, some_ids
from workbench import CaptureError, InterventionError
from workbench.session.row_watch import Step


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@torch.no_grad()
def test_rows_are_those_of_a_capture(family: Family) -> None:
    model, inputs = make(family), family.inputs()
    with workbench.attach(model) as wb:
        with wb.capture(()) as cap:
            bare = model(**inputs)
        steps: list[Step] = []
        heads = [(site.site.name, head) for site in cap for head in (0, site.shape[1] - 1)]
        with wb.watch_rows(heads, steps.append):
            assert str(model(**inputs)) == str(bare)
            model(**inputs)
        assert str(model(**inputs)) == str(bare)
        assert len(steps) == 2
        labels = [site.site.label(head) for site in cap for head in (0, site.shape[1] - 1)]
        assert len(steps[1].rows) == len(labels)
        for site in cap:
            for head in (0, site.shape[1] - 1):
                label = site.site.label(head)
                row = steps[1].rows[label if labels.count(label) == 1 else f"{site.site.alias}.H{head}"]
                wanted = site.pattern.rows(-1, [head])[:, 0, 0]
                torch.testing.assert_close(row, wanted, atol=1e-6, rtol=1e-5, equal_nan=True)


@torch.no_grad()
def test_each_step_of_a_generation() -> None:
    model, steps = small_llama(), []
    with workbench.attach(model) as wb:
        with wb.watch_rows({(1, 3), "L0H1"}, steps.append):
            answer = model.generate(some_ids(2, 6), max_new_tokens=5, min_new_tokens=5, do_sample=False)
        with wb.capture(()) as cap:
            model(answer[:, :-1])
    assert [step.index for step in steps] == list(range(5))
    assert [tuple(step.ids["input"].shape) for step in steps] == [(2, 6)] + [(2, 1)] * 4
    for step in steps:
        assert list(step.rows) == ["L0H1", "L1H3"]
        n = 6 + step.index
        for label, (layer, head) in {"L0H1": (0, 1), "L1H3": (1, 3)}.items():
            wanted = cap[layer].pattern.rows(n - 1, [head])[:, 0, 0, :n]
            torch.testing.assert_close(step.rows[label], wanted, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_sequences_of_packed_rows_and_captures_beside() -> None:
    model, steps = small_llama(), []
    positions = torch.cat([torch.arange(n) for n in (4, 3, 6)])[None]
    ids = some_ids(1, 13)
    with workbench.attach(model) as wb:
        with wb.watch_rows((1, 2), steps.append), wb.capture(("entropy",)) as cap, wb.ablate((0, 1)):
            model(ids, position_ids=positions, use_cache=False)
        assert [step.packed for step in steps] == [(0, 0, 4), (0, 4, 7), (0, 7, 13)]
        for step, call in zip(steps, cap.calls, strict=True):
            wanted = call[1].pattern.rows(-1, [2])[:, 0, 0]
            torch.testing.assert_close(step.rows["L1H2"], wanted, atol=1e-6, rtol=1e-5)


class Twice(nn.Module):
    """Calls its attention twice."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(x, x, x)[0]
        out: Tensor = self.attn(x, x, x)[0]
        return out


@torch.no_grad()
def test_a_site_that_is_called_twice() -> None:
    torch.manual_seed(0)
    model, steps, x = Twice().eval(), [], torch.randn(2, 5, 8)
    with workbench.attach(model) as wb:
        with wb.watch_rows("L0H1", steps.append), wb.capture(()) as cap:
            model(x)
        for label, call in (("L0H1", 0), ("L0H1#1", 1)):
            torch.testing.assert_close(steps[0].rows[label], cap["attn", call].pattern.rows(-1, [1])[:, 0, 0])


@torch.no_grad()
def test_errors(caplog: pytest.LogCaptureFixture) -> None:
    model = small_llama()

    def broken(step: Step) -> None:
        raise ValueError("no room")

    with workbench.attach(model) as wb:
        with pytest.raises(InterventionError, match="layer"), wb.watch_rows((7, 0), print):
            pass
        with wb.watch_rows((0, 0), broken):
            with pytest.raises(ValueError, match="no room"):
                model(some_ids(1, 4))
            thread = threading.Thread(target=model, args=(some_ids(1, 4),))
            thread.start()
            thread.join()
        assert "could not be told: ValueError: no room" in caplog.text
        model(some_ids(1, 4))  # nothing is left on it


def carried(model: nn.Module) -> tuple[int, int]:
    """How many hooks modules carry, and how many the process has."""
    own = sum(len(each._forward_pre_hooks) + len(each._forward_hooks) for each in model.modules())
    return own, len(torch_module._global_forward_hooks) + len(torch_module._global_forward_pre_hooks)


@torch.no_grad()
def test_only_what_was_chosen_is_watched() -> None:
    """From the second forward on; parts that are called by themselves and captures beside are seen as ever."""
    model, ids = small_llama(), some_ids(2, 6)
    steps: list[Step] = []
    with workbench.attach(model) as wb:
        with wb.capture(()) as cap:
            bare = model(ids, use_cache=False).logits
        with wb.watch_rows({(0, 1), (1, 0), (1, 3)}, steps.append):
            assert carried(model) == (1, 2)  # the model's own, and those of the process
            model(ids)
            assert torch.equal(model(ids).logits, bare)
            assert carried(model) == (1 + 6 + 2, 0)  # on the model, its stack, the list of its layers, and two sites
            twin = copy.deepcopy(model)
            assert torch.equal(twin(ids).logits, bare)
            n = len(steps)
            hidden = model.model(ids).last_hidden_state
            model.model.layers[1](hidden, position_embeddings=model.model.rotary_emb(hidden, torch.arange(6)[None]))
            model(ids)
            every, last = ["L0H1", "L1H0", "L1H3"], ["L1H0", "L1H3"]
            assert [sorted(step.rows) for step in steps[n:]] == [every, last, every]
            with wb.capture(("entropy",)) as beside:
                model(ids)
            assert len(beside.calls) == 1
            model.model(ids, use_cache=False)
        assert carried(model) == (0, 0)
        assert [step.index for step in steps] == list(range(7))
        for step in (*steps[:3], *steps[4:]):  # the fourth is of the second layer alone
            for label, (layer, head) in {"L0H1": (0, 1), "L1H0": (1, 0), "L1H3": (1, 3)}.items():
                wanted = cap[layer].pattern.rows(-1, [head])[:, 0, 0]
                torch.testing.assert_close(step.rows[label], wanted, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_steps_of_padded_and_sliding_rows_and_of_other_numbers() -> None:
    """Whatever a step has beside products and a scale is in its rows."""
    ids = some_ids(2, 7)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for model in (
        small_llama(),
        small_llama(attn_implementation="eager"),
        small_llama().double(),
        small_llama().bfloat16(),
    ):
        steps: list[Step] = []
        with workbench.attach(model) as wb:
            with wb.watch_rows((1, 2), steps.append):
                answer = model.generate(
                    ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0
                )
            seen = torch.nn.functional.pad(mask, (0, 3), value=1)
            position_ids = (seen.cumsum(1) - 1).clamp_min(0)
            with wb.capture(()) as cap:
                model(answer[:, :-1], attention_mask=seen, position_ids=position_ids, use_cache=False)
        assert len(steps) == 4
        loose = 2e-2 if model.dtype == torch.bfloat16 else 1e-5
        for step in steps:
            row, n = step.rows["L1H2"], 7 + step.index
            assert row.dtype == (torch.float64 if model.dtype == torch.float64 else torch.float32)
            assert not row[0, :3].any()
            wanted = cap[1].pattern.rows(n - 1, [2])[:, 0, 0, :n]
            torch.testing.assert_close(row, wanted.to(row.dtype), atol=loose, rtol=loose)


@torch.no_grad()
def test_what_cannot_be_told_is_said() -> None:
    model, ids = small_llama(), some_ids(1, 4)
    attention = model.model.layers[1].self_attn
    with workbench.attach(model) as wb:
        with pytest.raises(CaptureError, match="no attention call was seen at"), wb.watch_rows((1, 0), print):
            model.lm_head(torch.zeros(1, 1, model.config.hidden_size))
        steps: list[Step] = []
        with wb.watch_rows((1, 0), steps.append):
            model(ids)
            model(ids)
            before = type(attention).forward
            attention.forward = lambda hidden_states, **_: (hidden_states, None)
            with pytest.raises(CaptureError, match="did not come the way it did before"):
                model(ids)
            del attention.forward
            assert attention.forward.__func__ is before
            model(ids)
            model.model.embed_tokens.weight.data[7] = torch.nan
            with pytest.raises(CaptureError, match=r"not finite|log-sum-exp"):
                model(torch.full_like(ids, 7)[:, :1])
        assert len(steps) == 3
