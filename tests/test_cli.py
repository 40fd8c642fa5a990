"""The command line, as a user types it."""

from pathlib import Path

import pytest

from workbench import __version__
from workbench.cli import main
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "--model", "demo-ln", "--text", "a"], 'did you mean "demo-lm"'),
        (["report", "--model", "demo-lm", "--text", ""], "empty"),
        (["report", "--model", "demo-lm", "--text", "the " * 200], "200 tokens, the model's context 128"),
        (["report", "--model", "demo-lm", "--text", "@absent"], "there is no file absent"),
        (["report", "--model", "demo-lm", "--text", "the", "--out", "no/such/page.html"], "Hint"),
        (["check", "absent.html"], "absent.html"),
    ],
    ids=["model", "empty", "long", "file", "folder", "page"],
)
def test_errors_are_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(monkeypatch, *arguments) == 1
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown
