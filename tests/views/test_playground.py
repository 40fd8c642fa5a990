"""The playground: ablations as by hand in float64, what is said of what cannot be run, and pressing, live."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from playwright.sync_api import Page
from torch import Tensor, nn

from support.browser import WatchedPage
from support.every_view import playground as small
from support.tiny import family, make
from workbench import attach, views
from workbench.errors import AttachError, CaptureError, InterventionError, ReportError, WorkbenchError
from workbench.views import Playground

TEXT = "3 7 11 5 9 7 4 8 6"


class Numbers:
    """A tokenizer whose tokens are numbers."""

    mask_token, mask_token_id = "[MASK]", 2

    def __call__(self, texts: Any, **_: object) -> Any:
        rows = [[self._id(word) for word in text.split()] for text in ([texts] if isinstance(texts, str) else texts)]
        if isinstance(texts, str):
            return hf.BatchEncoding({"input_ids": rows[0]})
        return {"input_ids": torch.tensor(rows).reshape(len(rows), -1)}

    def _id(self, word: str) -> int:
        return self.mask_token_id if word == self.mask_token else int(word)

    def decode(self, ids: Any, **_: bool) -> str:
        return "".join(f" {i}" for i in ids)


def of(model: nn.Module, text: str = TEXT, **more: Any) -> Playground:
    return views.playground(attach(model, Numbers()), text, **more)


def hooks_on(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


Change = Callable[[Tensor], Tensor]


@contextmanager
def heads_changed(model: Any, changes: dict[tuple[int, int], Change]) -> Iterator[None]:
    """By hand: what heads give [query, width] is changed before the output projection."""

    def hook_of(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            z = args[0].clone()
            width = z.shape[-1] // model.config.num_attention_heads
            for (at, head), change in changes.items():
                if at == layer:
                    part = slice(head * width, (head + 1) * width)
                    z[0, :, part] = change(z[0, :, part])
            return (z,)

        return hook

    found = [m for n, m in model.named_modules() if n.endswith(("c_proj", "o_proj")) and ".mlp." not in n]
    handles = [module.register_forward_pre_hook(hook_of(layer)) for layer, module in enumerate(found)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def zero(z: Tensor) -> Tensor:
    return torch.zeros_like(z)


def row(query: int) -> Change:
    def change(z: Tensor) -> Tensor:
        z = z.clone()
        z[query] = 0
        return z

    return change


def edge(weights: Tensor, values: Tensor, query: int, key: int, *, renormalise: bool = False) -> Change:
    def change(z: Tensor) -> Tensor:
        z = z.clone()
        z[query] -= weights[query, key] * values[key]
        if renormalise:
            z[query] /= 1 - weights[query, key]
        return z

    return change


@pytest.fixture(scope="module", params=["gpt2", "llama-gqa"])
def decoder(request: pytest.FixtureRequest) -> Any:
    return make(family(request.param)).double()


def test_a_head_a_row_an_edge_and_all_together_are_as_by_hand(decoder: nn.Module) -> None:
    """Probabilities and log-odds after each, in float64, for all tokens that are listed."""
    with attach(decoder, Numbers()) as wb:
        inputs = wb.tokenize(TEXT)
        with torch.no_grad(), wb.capture(values=True) as cap:
            clean = decoder(**inputs).logits[0, -1].softmax(-1)
        pattern = cap[0].pattern
        weights = pattern.dense()[0, 1]
        assert pattern.values is not None
        values = pattern.values[0, 1 * pattern.values.shape[1] // pattern.n_heads]
        cut = edge(weights, values, 8, 3)
        knocked = edge(weights, values, 8, 3, renormalise=True)
        cases: list[tuple[list[tuple[Any, ...]], bool, dict[tuple[int, int], Change]]] = [
            ([("L1H2",)], False, {(1, 2): zero}),
            ([("L0H1", 8)], False, {(0, 1): row(8)}),
            ([("L0H1", 8, 3)], False, {(0, 1): cut}),
            ([("L0H1", 8, 3)], True, {(0, 1): knocked}),
            ([("L0H1", 8, 3), ("L0H1", 4), ("L1H2",)], False, {(0, 1): lambda z: row(4)(cut(z)), (1, 2): zero}),
        ]
        play = views.playground(wb, TEXT)
        for edits, renormalise, changes in cases:
            play.clear().run(renormalise=renormalise)
            for one in edits:
                play.ablate(*one)
            with heads_changed(decoder, changes), torch.no_grad():
                wanted = decoder(**inputs).logits[0, -1].softmax(-1)
            table = play.data()
            tokens = table["id"].tolist()
            assert len(tokens) >= 10
            torch.testing.assert_close(torch.tensor(table["before"].to_numpy()), clean[tokens])
            torch.testing.assert_close(torch.tensor(table["after"].to_numpy()), wanted[tokens])
            assert float((wanted - clean).abs().max()) > 1e-5  # or nothing is compared
            odds = wanted[tokens].logit() - clean[tokens].logit()
            torch.testing.assert_close(torch.tensor(table["log-odds difference"].to_numpy()), odds)
            far = (clean * (clean / wanted).log()).sum()
            assert play.spec.blocks["divergence"][0] == pytest.approx(float(far))
        assert {int(wanted.argmax()), int(clean.argmax())} <= set(tokens)


def test_it_leaves_nothing_behind() -> None:
    model = make(family("gpt2"))
    ids = torch.tensor([[3, 7, 11, 5]])
    with torch.no_grad():
        bare, hooks = model(ids).logits, hooks_on(model)
    play = of(model).ablate(["L0H1", "L1H0"]).ablate("L0H0", 3).ablate("L0H2", 5, 1)
    assert play.data()["after"].tolist() != play.data()["before"].tolist()
    play.run("3 7")
    with pytest.raises(WorkbenchError, match="no query 9"):
        play.ablate("L0H2", 9)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, bare)
    assert hooks_on(model) == hooks
    play.clear()
    assert play.edits == ()
    assert play.data()["after"].tolist() == play.data()["before"].tolist()
    assert set(play.data()["log-odds difference"]) == {0.0}


def test_edits_that_a_prompt_has_no_place_for_are_told() -> None:
    play = of(make(family("gpt2"))).ablate("L0H1").ablate("L1H0", 7).ablate("L0H2", 2, 1)
    play.run("3 7 11 5")
    assert [repr(edit) for edit in play.edits] == [
        "transformer.h.0.attn head 1",
        "transformer.h.0.attn head 2, edge 2 → 1",
    ]
    assert any("no place" in note and "L1H0, row 7" in note for note in play.spec.notes)
    assert play.prompt == "3 7 11 5"


def test_the_heads_after_are_those_of_the_edited_model() -> None:
    play = of(make(family("gpt2"))).ablate("L0H1")
    before, after = play.spec.blocks["values"]
    n = play._wb.sites[0].n_heads
    np.testing.assert_array_equal(before[:, :n], after[:, :n])  # of the first layer only what its heads give is another
    assert not np.array_equal(before[0, n:], after[0, n:])


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("", ReportError, "the prompt is empty"),
        ("  ", CaptureError, "the input prompt is empty"),  # which the tokenizer makes nothing of
        (" ".join(["3"] * 200), CaptureError, "the model's context"),
        (None, ReportError, "takes a text"),
    ],
)
def test_prompts_that_cannot_be_run_are_refused_and_the_last_state_stays(text: Any, error: Any, said: str) -> None:
    play = of(make(family("gpt2"))).ablate("L0H1")
    before = play.spec
    with pytest.raises(error, match=said):
        views.playground(play._wb, text)
    with pytest.raises(error, match=said):
        play.answer({"ask": "run", "prompt": text, "written": "", "edits": [], "renormalise": False})
    assert play.spec is before
    assert len(play.edits) == 1


def test_what_no_view_can_show_changes_nothing() -> None:
    play = of(make(family("gpt2"))).ablate("L0H1")
    with pytest.raises(WorkbenchError, match="renormalise"):
        play.run(renormalise="yes")  # type: ignore[arg-type]
    assert play.clear().edits == ()


def test_prompts_beyond_what_a_map_shows_are_refused() -> None:
    with pytest.raises(ReportError, match="2,049 tokens, a playground shows 2,048"):
        of(make(family("llama-gqa")), " ".join(["3"] * 2049))


@pytest.mark.parametrize(
    "edits",
    [
        None,
        [3],
        [{"site": 99, "head": 0, "query": None, "key": None}],
        [{"site": 0, "head": True, "query": None, "key": None}],
        [{"site": 0, "head": 0, "query": None, "key": 1}],
        [{"site": 0, "head": 0, "query": 2.5, "key": 1}],
        [{"site": 0, "head": 99, "query": None, "key": None}],
        [{"site": 0, "head": 0, "query": 99, "key": None}],
        [{"site": 0, "head": 0, "query": 1, "key": 2}],
    ],
)
def test_edits_that_are_none_are_refused(edits: Any) -> None:
    play = small()
    before = play.spec
    with pytest.raises(WorkbenchError):
        play.answer({"ask": "run", "prompt": play.prompt, "edits": edits})
    assert play.spec is before
    with pytest.raises(WorkbenchError, match="no head of number"):
        play.answer({"ask": "pattern", "at": 77})


def test_a_model_that_was_changed_or_let_go_is_told() -> None:
    model = make(family("gpt2"))
    play = of(model)
    assert not any("weights have changed" in note for note in play.spec.notes)
    first = play.data()["before"].tolist()
    with torch.no_grad():
        model.transformer.h[0].attn.c_proj.weight.mul_(0.5)
    play.ablate("L1H0")
    assert any("weights have changed" in note for note in play.spec.notes)
    assert play.data()["before"].tolist() != first  # both runs are of the weights as they are
    model.train()
    with pytest.raises(InterventionError, match="drops out"):
        play.clear()
    model.eval()
    play._wb.detach()
    with pytest.raises(AttachError, match="detached"):
        play.answer({"ask": "run", "prompt": "3 4", "edits": []})
    assert len(play.edits) == 1


@pytest.mark.parametrize(
    ("raised", "said"), [(KeyboardInterrupt(), "interrupted"), (MemoryError("no room"), "no room")]
)
def test_a_run_that_breaks_off_is_told_and_the_next_one_runs(raised: BaseException, said: str) -> None:
    model = make(family("gpt2"))
    play = of(model).ablate("L0H1")
    before, hooks = play.spec, hooks_on(model)
    question = {"ask": "run", "prompt": TEXT, "edits": [{"site": 0, "head": 2, "query": None, "key": None}]}

    def breaks(*_: Any) -> None:
        raise raised

    handle = model.transformer.h[1].register_forward_pre_hook(breaks)
    with pytest.raises(ReportError, match=said):
        play.answer(question)
    handle.remove()
    assert play.spec is before
    assert hooks_on(model) == hooks
    play.answer(question)
    assert [edit.head for edit in play.edits] == [2]


@pytest.mark.parametrize(
    ("bad", "said"), [(float("nan"), "1 are NaN"), (float("inf"), "1 are +∞"), (-float("inf"), "")]
)
def test_logits_that_are_no_numbers_are_told(bad: float, said: str) -> None:
    model = make(family("gpt2"))

    def spoil(module: nn.Module, args: Any, logits: Tensor) -> Tensor:
        logits = logits.clone()
        logits[..., 5] = bad
        return logits

    model.lm_head.register_forward_hook(spoil)
    play = of(model).ablate("L0H1")
    place = play.spec.facts["places"][0]
    if not said:  # an impossible token is no fault
        assert place["wrong"] == [None, None]
        assert 5 not in place["ids"]
        return
    assert all(said in wrong for wrong in place["wrong"])
    assert play.data().empty
    assert play.spec.blocks["divergence"].tolist() != [0.0]
    assert play.to_png()
    assert json.dumps(play.spec.to_static(), allow_nan=False)


def test_a_masked_model_predicts_at_its_masks() -> None:
    torch.manual_seed(0)
    config = hf.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, vocab_size=60,
        max_position_embeddings=40,
    )  # fmt: skip
    model = hf.BertForMaskedLM(config).eval()
    wb = attach(model, Numbers())
    with pytest.raises(ReportError, match="no mask") as raised:
        views.playground(wb, TEXT)
    assert "[MASK]" in str(raised.value)
    play = views.playground(wb, "3 [MASK] 5 6 [MASK] 9").ablate("L1H1").ablate("L0H0", 2, 5)
    assert [place["position"] for place in play.spec.facts["places"]] == [1, 4]
    with torch.no_grad():
        wanted = model(torch.tensor([[3, 2, 5, 6, 2, 9]])).logits[0, [1, 4]].softmax(-1)
    for position, row in zip((1, 4), wanted, strict=True):
        part = play.data()[play.data()["position"] == position]
        torch.testing.assert_close(torch.tensor(part["before"].to_numpy()), row[part["id"].tolist()].double())


def test_an_encoder_decoder_goes_on_with_what_it_has_written() -> None:
    model = make(family("t5"))
    play = of(model, written="7 9")
    with torch.no_grad():
        ids = torch.tensor([[int(word) for word in TEXT.split()]])
        wanted = model(input_ids=ids, decoder_input_ids=torch.tensor([[0, 7, 9]])).logits[0, -1].softmax(-1)
    table = play.data()
    torch.testing.assert_close(torch.tensor(table["before"].to_numpy()), wanted[table["id"].tolist()].double())
    cross = next(site for site in play._wb.sites if site.kind == "cross")
    play.ablate((cross.name, 1), 2, 8)  # an edge from the decoder into the prompt
    assert play.data()["after"].tolist() != table["before"].tolist()
    with pytest.raises(ReportError, match="there is no key 9"):
        play.ablate((cross.name, 1), 2, 9)
    with pytest.raises(ReportError, match="only an encoder-decoder"):
        of(make(family("gpt2")), written="7")


@pytest.mark.parametrize(("name", "said"), [("whisper", "reads input_features, not text"), ("bert", "has no logits")])
def test_models_without_text_or_next_tokens_are_refused(name: str, said: str) -> None:
    with pytest.raises(WorkbenchError, match=said):
        of(make(family(name)))


def test_a_page_keeps_the_pattern_of_the_head_that_is_chosen() -> None:
    play = small()
    play.select(layer=1, heads=(0,))
    spec = play.current
    assert spec.facts["kept"] == 3
    wanted, (cells,) = play.answer({"ask": "pattern", "at": 3, "after": False})
    assert spec.blocks["cells:0"].tobytes() == cells
    assert wanted["shape"] == [12, 12]
    play.select(layer=None, heads=())


# Live, with the view's own answers in the place of a kernel's.

KERNEL = """
const told = {};
const values = { spec: SPEC, selection: {}, still: [], live: true, state: {} };
globalThis.values = values;
const model = {
  get: (name) => values[name], save_changes() {}, off() {},
  set: (name, value) => { values[name] = value; for (const call of told[`change:${name}`] ?? []) call(); },
  on: (name, call) => (told[name] ??= []).push(call),
  send: async (question) => {
    const { spec, bytes, ...said } = await answer(question);
    if (spec) { values.spec = spec; for (const call of told["change:spec"] ?? []) call(); }
    const buffers = bytes ? [new DataView(Uint8Array.from(bytes).buffer)] : [];
    for (const call of told["msg:custom"] ?? []) call({ number: question.number, ...said }, buffers);
  },
};
globalThis.model = model;
render({ model, el: document.getElementById("here") });
"""


def live(page: WatchedPage, view: Playground) -> Page:
    def answer(question: dict[str, Any]) -> dict[str, Any]:
        before = view.spec
        try:
            said, buffers = view.answer(question)
        except WorkbenchError as error:
            return {"error": str(error)}
        changed = {} if view.spec is before else {"spec": view.spec.to_static()}
        return {**said, **changed, **({"bytes": list(buffers[0])} if buffers else {})}

    tab = page.page
    tab.expose_function("answer", answer)
    tab.set_content("<!doctype html><html lang=en><title>live</title><body><div id=here></div></body>")
    tab.add_style_tag(content=view.widget._css)
    code = view.widget._esm.replace("export default", "const { render } =")
    spec = json.dumps(view.spec.to_static()).replace("<", "\\u003c")
    tab.add_script_tag(content=f"(() => {{ {code}\n{KERNEL.replace('SPEC', spec, 1)} }})();")
    tab.locator(".playground .matrix canvas").first.wait_for()
    return tab


def chips(tab: Page) -> list[str]:
    return [text.strip() for text in tab.locator(".edits li:not(.name) bdi").all_inner_texts()]


def press_cell(tab: Page, canvas: Any, row: int, column: int) -> None:
    data = canvas.evaluate("each => ({...each.dataset})")
    x = float(data["left"]) + (column + 0.5) * float(data["cell"])
    canvas.click(position={"x": x, "y": float(data["top"]) + (row + 0.5) * float(data["height"])})


@pytest.mark.browser
def test_pressing_ablates_heads_rows_and_edges_and_puts_them_back(page: WatchedPage) -> None:
    view = of(make(family("gpt2")))
    tab = live(page, view)
    atlas, pattern = tab.locator(".matrix canvas").nth(0), tab.locator(".matrix canvas").nth(1)
    assert tab.locator(".next thead th").all_inner_texts() == ["Token", "Probability"]
    tab.get_by_label("Pressing ablates").check()
    press_cell(tab, atlas, 1, 2)
    tab.locator(".edits bdi", has_text="L1H2").wait_for()
    press_cell(tab, pattern, 7, 4)
    tab.locator(".edits bdi", has_text="→").wait_for()
    pattern.click(
        position={"x": 8, "y": float(pattern.get_attribute("data-top") or 0) + 8}
    )  # the name of the first row
    tab.locator(".edits bdi", has_text="row").wait_for()
    assert [(e.head, e.query, e.key) for e in view.edits] == [(2, None, None), (2, 7, 4), (2, 0, None)]
    assert tab.locator(".next thead th").all_inner_texts() == ["Token", "Before", "After", "Δ p", "Δ log-odds"]
    shown = [
        float(each) for each in tab.locator(".next td.share:nth-child(3)").evaluate_all("e => e.map(o => o.title)")
    ]
    assert shown == pytest.approx(view.data()["after"].tolist(), rel=1e-3)
    tab.get_by_role("button", name="Put back L1H2", exact=True).click()
    tab.wait_for_function("document.querySelectorAll('.edits bdi').length === 2")
    assert len(view.edits) == 2
    tab.get_by_role("button", name="Clear all").click()
    tab.wait_for_function("document.querySelector('.edits').hidden")
    assert view.edits == ()
    page.assert_clean()


@pytest.mark.browser
def test_keys_and_buttons_do_what_pressing_does(page: WatchedPage) -> None:
    view = of(make(family("gpt2")))
    tab = live(page, view)
    atlas, pattern = tab.locator(".matrix canvas").nth(0), tab.locator(".matrix canvas").nth(1)
    atlas.focus()
    for key in ("ArrowDown", "Enter", "x"):
        atlas.press(key)
    tab.locator(".edits bdi", has_text="L1H0").wait_for()
    pattern.focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "e"):
        pattern.press(key)
    tab.locator(".edits bdi", has_text="edge").wait_for()
    pattern.press("Enter")
    tab.get_by_role("button", name="Ablate row").click()
    tab.wait_for_function("document.querySelectorAll('.edits bdi').length === 3")
    assert tab.get_by_role("button", name="Ablate row").get_attribute("aria-pressed") == "true"
    assert [(e.query, e.key) for e in view.edits] == [(None, None), (2, 1), (2, None)]
    assert "after" in tab.locator(".status").inner_text()
    page.assert_clean()


@pytest.mark.browser
def test_what_is_pressed_while_a_prompt_runs_is_of_that_prompt(page: WatchedPage) -> None:
    view = of(make(family("gpt2")))
    tab = live(page, view)
    tab.get_by_label("Prompt").fill("4 4 4 6")
    tab.evaluate("""() => {
      document.querySelector('.ask button').click();
      document.querySelector('.acts button').click(); // before the answer has come
    }""")
    tab.locator(".edits bdi").wait_for()
    assert (view.prompt, len(view.edits)) == ("4 4 4 6", 1)
    assert tab.get_by_label("Prompt").input_value() == "4 4 4 6"
    view.run("5 5 5 5")  # by the kernel, after which what was asked for before is past
    spec = view.spec.to_static()
    tab.evaluate("spec => model.set('spec', spec)", spec)
    tab.wait_for_function("document.querySelector('.caption').textContent.includes('5 5 5 5')")
    tab.get_by_role("button", name="Put back").click()
    tab.wait_for_function("document.querySelector('.edits').hidden")
    assert view.prompt == "5 5 5 5"
    page.assert_clean()


@pytest.mark.browser
def test_another_prompt_is_run_and_what_cannot_be_is_told(page: WatchedPage) -> None:
    view = of(make(family("gpt2"))).ablate("L1H2", 8)
    tab = live(page, view)
    prompt = tab.get_by_label("Prompt")
    assert prompt.input_value() == TEXT
    prompt.fill("4 4 4 6")
    prompt.press("Control+Enter")
    tab.wait_for_function("document.querySelector('.caption').textContent.includes('4 4 4 6')")
    assert view.prompt == "4 4 4 6"
    assert "no place" in tab.locator(".notes").inner_text()
    prompt.fill("")
    tab.get_by_role("button", name="Run").click()
    tab.get_by_role("alert").filter(has_text="the prompt is empty").wait_for()
    assert view.prompt == "4 4 4 6"
    assert "4 4 4 6" in tab.locator(".caption").first.inner_text()
    view._wb.detach()
    prompt.fill("5 5")
    tab.get_by_role("button", name="Run").click()
    tab.get_by_role("alert").filter(has_text="detached").wait_for()
    assert tab.get_by_role("button", name="Run").is_enabled()
    page.assert_clean()


@pytest.mark.browser
def test_a_page_says_that_it_stands_still(page: WatchedPage, tmp_path: Any) -> None:
    view = small()
    tab = page.open(view.to_html(tmp_path / "page.html"))  # type: ignore[arg-type]
    tab.wait_for_selector("html[data-ready]")
    assert "needs a notebook with a running kernel" in tab.locator(".playground").inner_text()
    assert tab.locator(".playground textarea, .playground .acts:not([hidden])").count() == 0
    assert len(chips(tab)) == 3
    atlas = tab.locator(".matrix canvas").first
    atlas.focus()
    atlas.press("x")
    tab.get_by_role("alert").filter(has_text="cannot run the model").wait_for()
    for key in ("ArrowDown", "ArrowRight", "Enter"):
        atlas.press(key)
    assert "L1H1" in tab.evaluate("location.hash")
    tab.get_by_text("those of other heads need a running kernel").wait_for()
    page.assert_clean()
