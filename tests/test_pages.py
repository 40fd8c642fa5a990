"""The blocks of README and how-to run in a folder of their own, one after the other, as a reader would run them."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import workbench

ROOT = Path(__file__).parents[1]
README, HOW_TO = ROOT / "README.md", ROOT / "docs" / "how-to.md"


def blocks(page: Path) -> list[str]:
    """The page's blocks of Python."""
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


HUB = re.findall(r"^name = \"(.+)\"$", "".join(blocks(README)), flags=re.MULTILINE)


def _shaped_like_it(folder: Path) -> None:
    """A tiny random model at a path that reads like its name on the hub, which is not asked."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", "The", "fox", "dog"])}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=4, n_positions=32, bos_token_id=None, eos_token_id=None
    )
    GPT2LMHeadModel(config).save_pretrained(folder)


def _run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def _written(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "blocks.py").write_text(text, encoding="utf-8")
    return folder


def test_every_block_of_the_readme_runs(tmp_path: Path) -> None:
    assert len(blocks(README)) == 4
    assert len(HUB) == 1
    _shaped_like_it(tmp_path / HUB[0])
    written = _written(tmp_path, "\n".join(blocks(README)))
    done = _run(written, sys.executable, "-W", "error:::workbench", "blocks.py")  # which begins with nothing
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Verification(ok" in done.stdout
    assert "torch.Size([1, 8, 29])" in done.stdout
    for name in ("L1H6.png", "induction.html", "importance.safetensors"):
        assert (tmp_path / name).stat().st_size > 1000, name


ELSEWHERE = {"extending.md"}  # whose blocks other tests run
PREAMBLES = {
    "architecture.md": """
import workbench
model, tokenizer = workbench.models.load("demo-lm")
wb = workbench.attach(model, tokenizer)
inputs = wb.tokenize("Mary and John")
workbench.Capture.show = lambda cap: print(workbench.views.all_of(cap))  # which needs a notebook
""",
    "views.md": """
from dataclasses import dataclass
import json, pathlib
__package__ = "counting"
pathlib.Path("counting").mkdir()
pathlib.Path("counting/__init__.py").touch()
pathlib.Path("counting/counted_words.js").write_text("export function render({ model, el }) {}")
pathlib.Path("counting/counted_words.schema.json").write_text(json.dumps({"type": "object"}))
@dataclass
class Counts:
    words: list
    counts: object
""",
}
"""What the blocks of a page stand in; those of other pages begin with nothing."""
AFTERWARDS = {
    "views.md": """
import numpy
from workbench.views import of
found = of(Counts(["a", "b"], numpy.array([2, 1], numpy.int32)))
print(len(found.to_png()), len(found.to_html()))
"""
}
OTHERS = [page.name for page in sorted(ROOT.glob("docs/*.md")) if blocks(page) and page.name not in ELSEWHERE]


_STRICT = r"import warnings; warnings.filterwarnings('error', module=r'workbench\Z')"


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, forked: list[str]) -> dict[str, tuple[Path, Any]]:
    """Of each page but README the folder with what its blocks left, and the process that ran them, done."""
    folder, found = tmp_path_factory.mktemp("pages"), {}
    for name in OTHERS:
        text = [_STRICT, PREAMBLES.get(name, ""), *blocks(ROOT / "docs" / name), AFTERWARDS.get(name, "")]
        found[name] = (folder / name, _run(_written(folder / name, "\n".join(text)), *forked, "blocks"))
    return found


@pytest.mark.parametrize("name", OTHERS)
def test_every_block_of_the_other_pages_runs(ran: dict[str, tuple[Path, Any]], name: str) -> None:
    _, done = ran[name]
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_how_to_has_much_and_leaves_what_it_says(ran: dict[str, tuple[Path, Any]]) -> None:
    assert len(re.findall(r"^### .+$", HOW_TO.read_text(encoding="utf-8"), flags=re.MULTILINE)) >= 30
    assert len(blocks(HOW_TO)) > 30
    folder, done = ran[HOW_TO.name]
    assert "Verification(ok" in done.stdout
    for name in ("head.png", "head.pdf", "page.html", "prompt.safetensors", "sweep.safetensors"):
        assert (folder / name).stat().st_size > 1000, name


def test_every_analysis_has_its_line() -> None:
    page = (ROOT / "docs" / "which-analysis.md").read_text(encoding="utf-8")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    named = [cells[1].strip("`") for cells in lines if cells[1].startswith("`") and "." not in cells[1]]
    public = {name for name in workbench.__all__ if inspect.isfunction(getattr(workbench, name))}
    rooms = ("workbench.analysis.", "workbench.sweep.", "workbench.investigator.")
    assert set(named) == {name for name in public if getattr(workbench, name).__module__.startswith(rooms)}
    assert len(named) == len(set(named))
    assert all(len(cells) == 5 and all(cells) for cells in lines)


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose):
        assert link.startswith(("https://", "http://")) or (page.parent / link).exists(), link


def test_troubleshooting_has_every_error_and_no_stale_message() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    files = [file for folder in ("workbench", "hooks", "kernels") for file in (ROOT / folder).rglob("*.py")]
    source = "\n".join(file.read_text(encoding="utf-8") for file in files)
    errors = re.findall(r"^class ([A-Z]\w+)\((?:WorkbenchError|KeyboardInterrupt)\)", source, flags=re.MULTILINE)
    assert len(errors) >= 12
    for name in errors:
        assert f"## {name}\n" in page or f"`{name}`" in page, name
    said = re.sub(r'"\s*\n\s*f?"', "", source)  # texts that go on in the next line
    for message in re.findall(r"^\| `(.+?)` \|", page, flags=re.MULTILINE):
        assert message in said, message


def test_the_head_that_it_shows_is_the_one_that_copies_most() -> None:
    import torch

    import workbench

    model, tokenizer = workbench.models.load("demo-lm")
    with workbench.attach(model, tokenizer) as wb, torch.no_grad(), wb.capture(["induction"]) as cap:
        model(**wb.tokenize(workbench.tasks.induction(1, seed=0)[0].prompt))
    last = cap.stack("induction")[:, 0, :, -1]
    assert divmod(int(last.argmax()), last.shape[1]) == (1, 6)
