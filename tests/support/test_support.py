"""The shared pieces themselves: a recorder that records nothing would let every test that uses it pass."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch

from support import minilm, vision
from support.folders import model_folder
from support.forks import forks
from support.unavailable import unavailable

if TYPE_CHECKING:
    from support.browser import WatchedPage


def _builder(monkeypatch: pytest.MonkeyPatch, build: object) -> ModuleType:
    monkeypatch.setattr(minilm, "PACKAGES", ("pytest",))
    monkeypatch.setattr(minilm, "build", build)
    return minilm


def test_a_folder_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    def build(folder: Path) -> None:
        built.append(folder)
        (folder / "config.json").write_text("{}")

    builder = _builder(monkeypatch, build)
    first, second = model_folder(builder, tmp_path), model_folder(builder, tmp_path)
    assert first == second
    assert [path.name for path in first.iterdir()] == ["config.json"]
    assert len(built) == 1
    assert list(tmp_path.iterdir()) == [first]


def test_a_failed_build_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(folder: Path) -> None:
        (folder / "config.json").write_text("{")
        raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        model_folder(_builder(monkeypatch, build), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_quicker_process_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = SimpleNamespace(done=False)

    def build(folder: Path) -> None:
        (folder / "mine").touch()
        if not other.done:
            other.done = True
            theirs = model_folder(minilm, tmp_path)
            (theirs / "mine").rename(theirs / "theirs")

    folder = model_folder(_builder(monkeypatch, build), tmp_path)
    assert [path.name for path in folder.iterdir()] == ["theirs"]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "PACKAGES", ("no-such-distribution",))
    with pytest.raises(PackageNotFoundError, match="no-such-distribution"):
        model_folder(minilm, tmp_path)


def test_whisper_base_is_the_trained_model(whisper_base: Path) -> None:
    from transformers import AutoTokenizer, WhisperForConditionalGeneration

    model = WhisperForConditionalGeneration.from_pretrained(whisper_base)
    tokenizer = AutoTokenizer.from_pretrained(whisper_base)
    assert sum(parameter.numel() for parameter in model.parameters()) == 72_593_920
    prompt = tokenizer.convert_tokens_to_ids(["<|startoftranscript|>", "<|en|>"])
    with torch.no_grad():
        logits = model(input_features=torch.zeros(1, 80, 3000), decoder_input_ids=torch.tensor([prompt])).logits
    # Silence has no captions, and after a language comes the task.
    assert tokenizer.convert_ids_to_tokens(logits[0].argmax(-1).tolist()) == ["<|nocaptions|>", "<|transcribe|>"]


def test_minilm_is_the_trained_model(minilm: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(minilm), AutoTokenizer.from_pretrained(minilm)
    batch = tokenizer(
        ["a cat sat down", "the kitten is sitting", "interest rates rose"], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    near, far = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert near > far + 0.3


@pytest.mark.browser
def test_a_clean_page_is_clean(page: WatchedPage, tmp_path: Path) -> None:
    file = tmp_path / "clean.html"
    file.write_text("<!doctype html><title>t</title><img src='data:,'><script>window.answer = 42</script>")
    assert page.open(file).evaluate("window.answer") == 42
    page.assert_clean()


@pytest.mark.browser
def test_errors_and_requests_are_recorded(page: WatchedPage, tmp_path: Path) -> None:
    file = tmp_path / "dirty.html"
    file.write_text(
        "<!doctype html><title>t</title><script>console.error('first')</script>"
        "<script>throw new Error('second')</script>"
        "<script src='https://workbench.invalid/a.js'></script>"
    )
    page.open(file)
    assert any("first" in error for error in page.errors)
    assert any("second" in error for error in page.errors)
    assert page.requests == ["https://workbench.invalid/a.js"]
    with pytest.raises(AssertionError, match="second"):
        page.assert_clean()


def test_timm_leaves_no_torchvision_to_be_found() -> None:
    had = find_spec("torchvision")
    try:
        vision.vision_transformer()
    except ModuleNotFoundError as error:
        unavailable(str(error))
    assert find_spec("torchvision") == had
    assert had is not None or not any(name.partition(".")[0] in ("timm", "torchvision") for name in sys.modules)


def test_forked_processes_begin_anew(tmp_path: Path) -> None:
    (tmp_path / "asked.py").write_text(
        "import os, sys\nprint(sys.argv[1:], os.getcwd(), 'json.tool' in sys.modules)\nsys.exit(3)"
    )
    with forks(tmp_path, "json.tool") as command:
        done = subprocess.run([*command, "asked", "a b"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, f"['a b'] {tmp_path} True\n"), done.stderr


def test_forked_processes_end_with_the_one_that_asked_for_them(tmp_path: Path) -> None:
    (tmp_path / "waits.py").write_text("import time\nprint('waiting', flush=True)\ntime.sleep(600)")
    asks = (
        "import subprocess, pathlib\nfrom support.forks import forks\n"
        "with forks(pathlib.Path.cwd()) as command: subprocess.run([*command, 'waits'])"
    )
    known = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen([sys.executable, "-c", asks], cwd=tmp_path, env=known, stdout=subprocess.PIPE) as asker:
        assert asker.stdout is not None
        assert asker.stdout.readline() == b"waiting\n"
        asker.kill()
        assert asker.stdout.read() == b""  # nobody holds its other end any more
