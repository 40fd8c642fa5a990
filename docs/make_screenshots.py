"""Draw the pictures of README and docs/views.md: what a browser shows of each view, in both themes.

python docs/make_screenshots.py [NAME ...]

`images/drawn.json` says of which code each picture is: a digest of the folder of its kind of view. A test fails where a
view is another by now.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from playwright.sync_api import sync_playwright

import workbench
from workbench import mechanisms, views
from workbench.mechanisms import rooms
from workbench.storage.json_text import json_for_html
from workbench.tasks.speech import from_features, spans_of
from workbench.tasks.spoken_digits import SECONDS
from workbench.views.base import modules
from workbench.views.base.few_colours import few_colours

FOLDER = Path(__file__).parent / "images"
DRAWN = FOLDER / "drawn.json"
VIEWS = Path(__file__).parents[1] / "workbench" / "views"
WIDTH, HEIGHT = 1280, 800
LOWEST, TALLEST = 240, 1240  # of a picture, which is as tall as its page otherwise
TALL = 1900  # of a page with several views
WIDE = {"table": 2080}  # where the whole of it is to be seen
_AS_WIDE = "for (const one of document.querySelectorAll('main, .figures > *')) one.style.maxWidth = 'none'"
COMPARED = ("sqa:mha", "aaren", "agent", "halo", "long_lora", "moh", "routing", "s2")
COLOURS = 256  # that a picture keeps, which makes it several times smaller
ADDRESSES = {
    "head-atlas": "#L1H6",
    "attention-pattern": "#L1H6",
    "head-gallery": "#L1H6",
    "saliency-map": "#L1H1,t=3",
    "head-page": "#L4H1",
    "image-attention": "#L2H1,x=3",
    "grounding": "",
    "token-strip": "#t=15",
    "run-timeline": "",
    "tensor-peek": "",
    "conditioning-curves": "",
    "figure": "",
    "overlap-matrix": "",
    "overlap": "",
    "half-lives": "#L0H2",
    "states": "#L0H2",
    "content-and-decay": "#L0H2,q=18",
    "two-mechanisms": "#L2H2,q=18",
    "table": "",
    "mechanism": "",
}
"""What is selected, where it is not a head and a query of the language model."""


def of_language() -> dict[str, views.View]:
    """Views of the language model."""
    model, tokenizer = workbench.models.load("demo-lm")
    wb = workbench.attach(model, tokenizer)
    inputs = wb.tokenize(workbench.tasks.ioi(1, seed=3)[0].prompt)
    names = ["entropy", "effective_keys", "distance", "sink", "current", "previous", "peak", "induction"]
    for _ in range(3):  # the first calls compile, which a timeline would show
        with torch.no_grad(), wb.capture(names) as cap:
            model(**inputs)
    again = wb.tokenize(workbench.tasks.induction(1, seed=0)[0].prompt)  # words that begin again at the end
    with torch.no_grad(), wb.capture(names) as copies:
        model(**again)
    ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    held = workbench.capacity(wb, [ids, *_texts(tokenizer)], repeats=16, progress=False)
    task = workbench.tasks.ioi(16, seed=3)
    found = workbench.find_circuit(wb, task, method="eap_ig", progress=False)
    roles = workbench.head_roles(wb, task, progress=False)
    share = workbench.logit_attribution(wb, task)
    other = workbench.find_circuit(wb, workbench.tasks.induction(16, seed=3), method="eap_ig", progress=False)
    colours = workbench.find_circuit(wb, workbench.tasks.colored_objects(16, seed=3), method="eap_ig", progress=False)
    received = cap[4].pattern.statistics(["received_mean"])["received_mean"][0, 1]
    texts = (cap.query_tokens(cap[4].site.name) or [[]])[0]
    pair = [views.attention_pattern(cap, site=4, heads=[head]) for head in (1, 2)]
    return {
        "head-atlas": views.head_atlas(copies, metric="induction"),
        "attention-pattern": views.attention_pattern(copies),
        "compare": views.compare(*pair, labels=("L4H1", "L4H2")),
        "head-gallery": views.head_gallery(copies, roles=roles),
        "head-page": views.head(cap, "L4H1", roles=roles, circuits=found, attribution=share),
        "token-strip": views.token_strip(texts, {"weight from L4H1, per query that sees it": received}),
        "run-timeline": views.run_timeline(cap),
        "tensor-peek": views.tensor_peek(model.transformer.h[1].attn.c_attn.weight, title="Weights of a projection"),
        "circuit-graph": circuit(wb, task, found, roles),
        "overlap-matrix": views.overlap_matrix(
            {"IOI": found.top(60), "colored objects": colours.top(60), "induction": other.top(60)}, n_null=100
        ),
        "conditioning-curves": views.conditioning_curves(
            workbench.conditioning(experiments=["blocking", "overshadowing"], trials=8, repeats=16, progress=False)
        ),
        "figure": views.all_of(share)[1],
        "capacity-curves": views.capacity_curves(held),
        "what-if": views.what_if(d_k=48, n=20, heads=4, needed=2),
        "playground": playground(wb, task[0].prompt),
        "overlap": views.overlap_graph(
            workbench.circuit_overlap(found.top(60), other.top(60), n_null=100), found.top(60), other.top(60)
        ),
    }


RECURRENT = ("half-lives", "states", "content-and-decay", "two-mechanisms")


def shown(wanted: set[str]) -> dict[str, views.View | mechanisms.Room]:
    """One view of each kind that is worth a picture, and a mechanism: all, or at least those that are wanted."""
    apart = {
        "image-attention": images,
        "grounding": answer,
        "saliency-map": speech,
        "table": lambda: views.of(rooms.matrix([mechanisms.room(name) for name in COMPARED])),
        "mechanism": lambda: mechanisms.room("moh"),
    }
    language = of_language() if not wanted or wanted - {*apart, *RECURRENT, "first-look"} else {}
    layers = recurrent() if not wanted or wanted & {*RECURRENT} else {}
    found = {name: make() for name, make in apart.items() if not wanted or name in wanted}
    return {**language, **layers, **found}


def recurrent() -> dict[str, views.View]:
    """Views of a small hybrid of gated delta rules and attention that has learnt to copy."""
    import transformers as hf

    sizes = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "linear_num_key_heads": 4,
             "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}  # fmt: skip
    config = hf.Qwen3_5TextConfig(
        vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=3, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, layer_types=["linear_attention", "linear_attention", "full_attention"], **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.Qwen3_5ForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers[:2]:
            layer.linear_attn.A_log.fill_(-3.0)  # so that they begin by remembering
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(160):
        ids = _twice(32, seed=step)
        logits = model(ids, use_cache=False).logits[:, 12:-1]
        torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 13:]).backward()
        optimiser.step()
        optimiser.zero_grad()
    with workbench.attach(model.eval()) as wb, torch.no_grad(), wb.capture(["entropy"], values=True) as cap:
        model(_twice(1, seed=-1), use_cache=False)
    delta, softmax = (views.attention_pattern(cap, site=site) for site in (1, 2))
    return {
        "half-lives": views.half_lives(cap),
        "states": views.states(cap, 0),
        "content-and-decay": views.attention_pattern(cap, apart=True, title="Content and decay").set_state(
            weights="decay"
        ),
        "two-mechanisms": views.compare(delta, softmax, labels=("delta rule", "softmax")),
    }


def _twice(n: int, seed: int) -> torch.Tensor:
    """Random tokens, and the same again."""
    once = torch.randint(3, 32, (n, 12), generator=torch.Generator().manual_seed(seed))
    return torch.cat((once, once), dim=1)


def first_look(path: Path) -> None:
    """The picture of README's first example."""
    model, tokenizer = workbench.models.load("demo-lm")
    with workbench.attach(model, tokenizer) as wb, torch.no_grad(), wb.capture(["induction"]) as cap:
        model(**wb.tokenize(workbench.tasks.induction(1, seed=0)[0].prompt))
    views.attention_pattern(cap, site=1, heads=[6]).to_png(path)


def playground(wb: workbench.Workbench, prompt: str) -> views.View:
    """A playground in which a head, a row and an edge are ablated."""
    play = views.playground(wb, prompt, selection=views.SharedSelection())
    return (
        play.ablate("L0H7")
        .ablate("L0H2", query=-1)
        .ablate("L4H1", query=15, key=3)
        .select(layer=4, heads=(1,), query=15, key=3)
    )


def circuit(wb: workbench.Workbench, task: Any, found: Any, roles: Any) -> views.View:
    """The circuit of indirect object identification, with what its sizes keep, and two nodes pinned."""
    curve = workbench.faithfulness_curve(wb, found, task, progress=False)
    return views.circuit_graph(found, curve=curve, roles=roles, names={"L4H1": "", "L3H4": ""})


def images() -> views.View:
    """What the heads of the shipped ViT look at."""
    model, _ = workbench.models.load("demo-vit")
    digits = workbench.models.examples("demo-vit")
    pixels, labels = digits.pixel_values[:8], digits.labels[:8].tolist()
    with workbench.attach(model) as wb, torch.no_grad(), wb.capture() as cap:
        model(pixel_values=pixels)
    return views.image_attention(cap, pixels, labels=labels)


def answer() -> views.View:
    """Which patch of its picture the shipped vision-language model reads when it says a colour."""
    model, tokenizer = workbench.models.load("demo-vlm")
    drawn = workbench.tasks.planted_objects(4, seed=5)
    with workbench.attach(model, tokenizer) as wb:
        return views.grounding(workbench.grounding(wb, drawn.inputs(tokenizer, [1])))


def speech() -> views.View:
    """Cross-attention beside saliency, of a clip that ships with the speech model."""
    model, tokenizer = workbench.models.load("demo-s2t")
    features, spoken = workbench.models.clips("demo-s2t")
    first = from_features(
        features[0], seconds=SECONDS, audio=spoken[0].waveform, name=spoken[0].text, reference=spoken[0].text
    )
    with workbench.attach(model, tokenizer) as wb:
        found = workbench.cross_attention_saliency(
            wb, first, n_masks=1200, granularities=(60, 80, 100), orders=(), batch_size=25
        )
    return views.cross_attention(found, spans={"said": spans_of(spoken[0].spans, found.maps[0]["special"])})[0]


def page_of(view: views.View | mechanisms.Room, path: Path) -> Path:
    """A page of the view; of a playground one that looks as a notebook does, though no kernel answers there."""
    if isinstance(view, mechanisms.Room) or view.spec.kind != "playground":
        return Path(view.to_html(path))
    spec, chosen = (json_for_html(each) for each in (view.current.to_static(), view.chosen.to_json()))
    style = f"{view.widget._css}\n{modules.asset('page.css')}"
    drawn = f"""const values = {{ spec: {spec}, selection: {chosen}, still: [], live: true, state: {{}} }};
const model = {{ get: (name) => values[name], set() {{}}, save_changes() {{}}, send() {{}}, on() {{}}, off() {{}} }};
const drawn = render({{ model, el: document.querySelector("main") }});
drawn.then(() => (document.documentElement.dataset.ready = "true"));"""
    code = view.widget._esm.replace("export default", "const { render } =")
    path.write_text(f"<!doctype html><html lang=en><meta charset=utf-8><title>Playground</title><style>{style}</style>"
                    f"<body><main></main><script>(() => {{ {code}\n{drawn} }})();</script></body></html>")  # fmt: skip
    return path


def _texts(tokenizer: Any) -> list[dict[str, torch.Tensor]]:
    """More to store than one prompt has."""
    batches = workbench.tasks.induction(16, seed=0).batches(tokenizer)
    return [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches]


def save(picture: bytes, path: Path) -> None:
    """Write a picture with few colours."""
    with Image.open(io.BytesIO(picture)) as image:
        whole = image.convert("RGB")
    few_colours(whole, COLOURS).save(path, optimize=True)


def drawing(kind: str) -> str:
    """A digest of the Python, JavaScript, schema and style of a kind of view."""
    files = sorted(path for path in (VIEWS / kind).iterdir() if path.is_file())
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()[:16]


def stale() -> list[str]:
    """Pictures whose view is another than when they were drawn."""
    drawn = json.loads(DRAWN.read_text()) if DRAWN.exists() else {}
    return [name for name, (kind, digest) in drawn.items() if digest != drawing(kind)]


def main() -> None:
    """Write the pictures, all or those named."""
    wanted = set(sys.argv[1:])
    FOLDER.mkdir(exist_ok=True)
    drawn = json.loads(DRAWN.read_text()) if DRAWN.exists() else {}
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as there:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, view in shown(wanted).items():
            if wanted and name not in wanted:
                continue
            kind, tallest = ("table", TALL) if isinstance(view, mechanisms.Room) else (view.spec.kind, TALLEST)
            drawn[name] = (kind, drawing(kind))
            page = page_of(view, Path(there) / f"{name}.html")
            for theme in ("light", "dark"):
                context = browser.new_context(
                    offline=True, color_scheme=theme, viewport={"width": WIDE.get(name, WIDTH), "height": HEIGHT}
                )
                tab = context.new_page()
                tab.goto(f"{page.as_uri()}{ADDRESSES.get(name, '#L4H1,q=15')}")
                tab.wait_for_selector("html[data-ready]")
                if name in WIDE:
                    tab.evaluate(_AS_WIDE)
                bottom = tab.evaluate("document.querySelector('main').getBoundingClientRect().bottom")
                tab.set_viewport_size(
                    {"width": WIDE.get(name, WIDTH), "height": min(tallest, max(LOWEST, round(bottom)))}
                )
                tab.wait_for_timeout(200)
                save(tab.screenshot(), FOLDER / f"{name}-{theme}.png")
                context.close()
        browser.close()
    if not wanted or "first-look" in wanted:
        first_look(FOLDER / "first-look.png")
    DRAWN.write_text(json.dumps(drawn, indent=1) + "\n")


if __name__ == "__main__":
    main()
