"""Rows of chosen heads, told at each forward: those that a capture has, and nothing of the model changes."""

import threading

import pytest
import torch
from torch import Tensor, nn

import workbench
from support.tiny import FAMILIES, Family, make, small_llama, some_ids
from workbench import InterventionError
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
