"""The README's blocks run in a folder of their own, one after the other, as a reader would run them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
HUB = re.findall(r"^name = \"(.+)\"$", "".join(BLOCKS), flags=re.MULTILINE)


def _shaped_like_it(folder: Path) -> None:
    """A tiny random model at a path that reads like its name on the hub, which is not asked."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", "The", "fox", "dog"])}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=4, n_positions=32, bos_token_id=None, eos_token_id=None
    )
    GPT2LMHeadModel(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which all blocks ran, in one fresh process."""
    folder = tmp_path_factory.mktemp("readme")
    for name in HUB:
        _shaped_like_it(folder / name)
    (folder / "blocks.py").write_text("\n".join(BLOCKS), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error:::workbench", "blocks.py"],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    (folder / "said.txt").write_text(done.stdout, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_every_block_runs(made: Path) -> None:
    assert len(BLOCKS) == 4
    assert len(HUB) == 1
    said = (made / "said.txt").read_text(encoding="utf-8")
    assert "Verification(ok" in said
    assert "torch.Size([1, 8, 29])" in said


def test_they_write_what_they_say(made: Path) -> None:
    for name in ("L1H6.png", "induction.html", "importance.safetensors"):
        assert (made / name).stat().st_size > 1000, name


def test_its_links_lead_somewhere() -> None:
    text = README.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (README.parent / link).exists(), link


def test_the_head_that_it_shows_is_the_one_that_copies_most() -> None:
    import torch

    import workbench

    model, tokenizer = workbench.models.load("demo-lm")
    with workbench.attach(model, tokenizer) as wb, torch.no_grad(), wb.capture(["induction"]) as cap:
        model(**wb.tokenize(workbench.tasks.induction(1, seed=0)[0].prompt))
    last = cap.stack("induction")[:, 0, :, -1]
    assert divmod(int(last.argmax()), last.shape[1]) == (1, 6)
