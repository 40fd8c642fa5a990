"""The command line, as a user types it."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from workbench import Report, __version__
from workbench.cli import app, main
from workbench.report import check


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Exit code of `workbench ARGUMENTS`."""
    monkeypatch.setattr("sys.argv", ["workbench", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.strip() == f"attention-workbench {__version__}"


def test_demo_writes_a_sound_page(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "demo.html"
    assert run(monkeypatch, "demo", "--out", page) == 0
    assert check(page) == []
    assert page.stat().st_size < 6_000_000
    text = page.read_text(encoding="utf-8")
    assert "flash_attention_for_cpu" in text
    assert str(Path.cwd()) not in text
    assert run(monkeypatch, "check", page) == 0
    assert "sound" in capsys.readouterr().out


def test_report_on_a_local_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, minilm: Path) -> None:
    page, prompt = tmp_path / "minilm.html", tmp_path / "prompt.txt"
    prompt.write_text("A man is eating <b>food</b> & drinking.", encoding="utf-8")
    assert run(monkeypatch, "report", "--model", minilm, "--text", f"@{prompt}", "--out", page) == 0
    assert check(page) == []


def test_verify(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "verify", "--model", "demo-lm", "--text", "When Mary and John went to the store") == 0
    assert "6/6 sites fired, output identical to the bit" in capsys.readouterr().out


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small random ViT, its image processor, and a picture."""
    folder = tmp_path_factory.mktemp("vit")
    size = {"height": 32, "width": 32}
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size=size).save_pretrained(folder)
    Image.effect_mandelbrot((48, 40), (-2, -1, 1, 1), 20).save(folder / "picture.png")
    return folder


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small random Whisper, its feature extractor, and a sound."""
    folder = tmp_path_factory.mktemp("whisper")
    config = WhisperConfig(
        vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_source_positions=50, num_mel_bins=8,
        max_target_positions=40, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        suppress_tokens=[], begin_suppress_tokens=[],
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    model.generation_config.update(pad_token_id=0, eos_token_id=2, decoder_start_token_id=1, max_length=None)
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(folder)
    soundfile.write(folder / "voice.wav", 0.5 * np.sin(np.arange(12_000) / 9), 16_000)
    return folder


def test_report_on_an_image(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, vit: Path) -> None:
    page = tmp_path / "vit.html"
    chosen = ["--layers", "0,2", "--statistics", "entropy, distance", "--dtype", "float64"]
    given = ["--model", vit, "--image", vit / "picture.png", "--out", page]
    assert run(monkeypatch, "report", *given, *chosen) == 0
    assert check(page) == []
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r'"layer": ?(\d)', text)) == {"0", "2"}
    assert "Effective keys" not in text
    assert "1 more site of the model not asked for" in text
    assert "never fired" not in text
    assert "On the image" in text
    assert '"images":["picture.png"]' in text


def test_verify_on_a_sound(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], whisper: Path) -> None:
    assert run(monkeypatch, "verify", "--model", whisper, "--audio", whisper / "voice.wav") == 0
    assert "3/3 sites fired, output identical to the bit" in capsys.readouterr().out


def test_a_sound_that_would_be_cut_off_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], whisper: Path
) -> None:
    soundfile.write(tmp_path / "long.wav", 0.5 * np.sin(np.arange(32_000) / 9), 16_000)
    assert run(monkeypatch, "verify", "--model", whisper, "--audio", tmp_path / "long.wav") == 1
    assert "lasts 2.0 s, the model takes 1 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "a cat"], "takes pixel_values, not text"),
        (["--image", "config.json"], "config.json is no image"),
        (["--image", "absent.png"], "there is no file"),
        (["--image", "picture.png", "--text", "a cat"], "there is text and image"),
        (["--image", "picture.png", "--dtype", "bfloat61"], 'did you mean "bfloat16"'),
        (["--image", "picture.png", "--device", "cupboard"], "cannot be put on 'cupboard'"),
        (["--image", "picture.png", "--layers", "3"], "there is no layer 3"),
        (["--image", "picture.png", "--layers", "first"], "are no layers"),
        (["--image", "picture.png", "--statistics", "entropi"], 'did you mean "entropy"'),
    ],
    ids=["text", "no-image", "absent", "two", "dtype", "device", "layer", "layers", "statistic"],
)
def test_what_a_model_cannot_take_is_one_message(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    vit: Path,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(vit)
    assert run(monkeypatch, "report", "--model", vit, *arguments) == 1
    shown = capsys.readouterr().err
    assert message in shown
    assert "Hint" in shown or "there is no file" in shown or "no image" in shown
    assert not (vit / "report.html").exists()


ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
SHELL = "\n".join(
    block for page in PAGES for block in re.findall(r"```sh\n(.*?)```", page.read_text(), flags=re.DOTALL)
)
EXAMPLES = [
    *re.findall(r"^workbench .+$", SHELL, flags=re.MULTILINE),
    *(line for each in (*app.registered_commands, app.info) for line in str(each.epilog).split("\n\n")),
]


def test_commands_of_readme_docs_and_help_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, vit: Path, whisper: Path
) -> None:
    assert len(EXAMPLES) >= 10
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(["?", "The", "quick", "fox"])}, unk_token="?"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(tmp_path / "my-gpt2")
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=4, n_positions=32, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "my-gpt2")
    for name, link in {"my-vit": vit, "my-whisper": whisper}.items():
        (tmp_path / name).symlink_to(link)
    (tmp_path / "cat.png").symlink_to(vit / "picture.png")
    (tmp_path / "voice.wav").symlink_to(whisper / "voice.wav")
    Report("A page").add("A sentence.").write(tmp_path / "demo.html")
    monkeypatch.chdir(tmp_path)
    for line in dict.fromkeys(EXAMPLES):
        program, *arguments = shlex.split(line)
        if arguments[0] not in ("demo", "investigate"):  # which have tests of their own
            assert (program, run(monkeypatch, *arguments)) == ("workbench", 0), line


def test_every_command_has_an_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("demo", "gallery", "report", "verify", "check"):
        assert run(monkeypatch, command, "--help") == 0
        assert capsys.readouterr().out.count(f"workbench {command}") > 1
    assert run(monkeypatch, "--help") == 0
    assert "workbench report --model" in capsys.readouterr().out


def test_what_is_under_way_is_said_and_nothing_else(tmp_path: Path, whisper: Path) -> None:
    program = [sys.executable, "-c", "from workbench.cli import main; main()"]
    command = [*program, "verify", "--model", whisper, "--audio", whisper / "voice.wav"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == [f"loading {whisper} …", "verifying 3 sites …"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "--model", "demo-ln", "--text", "a"], 'did you mean "demo-lm"'),
        (["report", "--model", "demo-lm", "--text", ""], "empty"),
        (["report", "--model", "demo-lm", "--text", "the " * 200], "200 tokens, the model's context 128"),
        (["report", "--model", "demo-lm", "--text", "@absent"], "there is no file absent"),
        (["report", "--model", "demo-lm", "--text", "@" + "x" * 5000], "cannot be read"),
        (["report", "--model", "x" * 5000, "--text", "a"], "nor a local folder"),
        (["report", "--model", "demo-lm", "--text", "the", "--layers", "9" * 5000], "are no layers"),
        (["report", "--model", "demo-lm", "--text", "the", "--device", "meta"], "no values"),
        (["investigate", "--model", "absent", "--out", "no/such/page.html"], "there is no folder no/such"),
        (["check", "absent.html"], "absent.html"),
        (
            ["report", "--model", "demo-vlm", "--text", "colour"],
            "reads an image beside its text, in model.vision_tower",
        ),
    ],
    ids=["model", "empty", "long", "file", "path", "name", "digits", "device", "folder", "page", "picture"],
)
def test_errors_are_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(monkeypatch, *arguments) == 1
    shown = capsys.readouterr().err
    assert message in shown
    assert "Hint: " in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "--statistics", "entropi"], 'did you mean "entropy"'),
        (["report", "--image", "absent.png"], "there is no file absent.png"),
        (["report", "--image", "prompt.txt"], "prompt.txt is no image"),
        (["verify", "--audio", "absent.wav"], "there is no file absent.wav"),
        (["verify", "--audio", "x" * 5000], "cannot be read"),
        (["verify", "--device", "cupboard"], "cannot be put on 'cupboard'"),
        (["verify", "--dtype", "bfloat61"], 'did you mean "bfloat16"'),
        (["investigate", "--task", "ioi", "--known", "ioi"], "'ioi' cannot be compared with itself"),
        (["investigate", "--known", "induction,induction"], "called 'induction'"),
        (["investigate", "--prompts", "7"], "7 prompts are too few"),
        pytest.param(
            ["report", "--text", "a", "--out", "/proc/page.html"],
            "'/proc/page.html' cannot be written",
            marks=pytest.mark.skipif(not Path("/proc/self").exists(), reason="Linux's folder of processes"),
        ),
    ],
    ids=lambda each: each if isinstance(each, str) else " ".join(each)[:40],
)
def test_what_is_known_before_is_said_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("workbench.models.loading.load", lambda name: pytest.fail("a model was loaded"))
    monkeypatch.chdir(tmp_path)
    Path("prompt.txt").write_text("a cat")
    text = ["--text", "a"] if "--statistics" in arguments else []
    assert run(monkeypatch, *arguments, "--model", "demo-lm", *text) == 1
    shown = capsys.readouterr().err
    assert message in shown
    assert "Hint: " in shown


def test_a_prompt_that_is_no_utf8_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_bytes(b"cat \xff")
    assert run(monkeypatch, "verify", "--model", "demo-lm", "--text", f"@{prompt}") == 1
    assert "no text in UTF-8: byte 4" in capsys.readouterr().err


def test_investigate_keeps_to_its_budget_and_writes_a_page(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    given = ("--model", "demo-lm", "--task", "ioi", "--prompts", 8, "--forwards", 60, "--out", page)
    assert run(monkeypatch, "investigate", *given, "--resume", tmp_path / "run") == 0
    assert check(page) == []
    said = capsys.readouterr().out
    assert "undecided" in said
    assert "of 60 forwards" in said
    assert (tmp_path / "run" / "investigation.json").is_file()
    assert run(monkeypatch, "investigate", "--model", "demo-lm", "--task", "greater_then") == 1
    assert 'did you mean "greater_than"?' in capsys.readouterr().err
