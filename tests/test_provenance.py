"""Hashes and command lines: the same for the same thing, and silent about folders."""

from pathlib import Path
from typing import Any

import pytest

from workbench.models import load
from workbench.storage import provenance
from workbench.storage.provenance import command_line, commit, now, tokenizer_hash


def test_paths_in_a_command_line_lose_their_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    arguments = ["/usr/bin/workbench", "report", "--model", "~/models/gpt2", "--text", f"@{tmp_path}/p.txt"]
    arguments += ["--out", "out/page.html", f"--other={tmp_path}/x y", "C:\\Users\\me\\a.txt"]
    assert command_line(arguments) == (
        "workbench report --model gpt2 --text @p.txt --out page.html '--other=x y' a.txt"
    )


@pytest.mark.parametrize("argument", ["openai/gpt2", "and/or so they say", "a=b", "@name", "50%"])
def test_what_is_no_path_stays(argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert argument in command_line(["workbench", argument])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--token", "S3CRET"], ["--token=S3CRET"], ["-token", "S3CRET"], ["--api-key", "S3CRET"], ["--apikey=S3CRET"],
        ["--api_key", "S3CRET"], ["--API-KEY", "S3CRET"], ["HF_TOKEN=S3CRET"], ["--hf_token", "S3CRET"],
        ["--password", "S3CRET"], ["--db-passwd=S3CRET"], ["--client-secret", "S3CRET"], ["--model.auth=S3CRET"],
        ["--credentials", "S3CRET"], ["--secret=a=S3CRET"], ["--token", "-S3CRET!"], ["--cookie", "a=S3CRET; b"],
        ["https://me:S3CRET@host/x"], ["--url=postgres://me:S3CRET@host/x"], ["https://host/x?token=S3CRET&a=1"],
        ["hf_S3CRETabcdefghijklmnop"], ["--other", "sk-S3CRETabcdefghijklmnop"], ["AKIAS3CRETABCDEFGHIJ"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_secrets_are_left_out(arguments: list[str]) -> None:
    told = command_line(["tool", *arguments, "--last"])
    assert "S3CRET" not in told
    assert "[left out]" in told
    assert told.endswith("--last")


@pytest.mark.parametrize(
    "arguments",
    [["--tokenizer", "gpt2"], ["--max-tokens=5"], ["--tokens", "a b"], ["--keys", "3"], ["--monkey", "x1"],
     ["--compass=north"], ["a=b"], ["--text", "the key is here"], ["--token", "--verbose"],
     ["skeleton-of-a-longer-name"]],
    ids=" ".join,
)  # fmt: skip
def test_what_is_no_secret_stays(arguments: list[str]) -> None:
    assert "[left out]" not in command_line(["tool", *arguments])


def test_a_notebook_has_no_command_line() -> None:
    assert command_line(["/x/site-packages/ipykernel_launcher.py", "-f", "/root/kernel-1.json"]) == "a notebook"


class _Slow:
    """A tokenizer without a fast form."""

    def __init__(self, words: dict[str, int]) -> None:
        self.words = words

    def get_vocab(self) -> dict[str, int]:
        return self.words


def test_tokenizers_have_hashes() -> None:
    _, tokenizer = load("demo-lm")
    before = tokenizer_hash(tokenizer)
    tokenizer(["Then", "Then, Mary"], padding=True)  # changes its settings, not what it does
    assert before == tokenizer_hash(tokenizer) == tokenizer_hash(load("demo-lm")[1])
    read = provenance._settings_hash.cache_info().misses
    assert tokenizer_hash(tokenizer) == before
    assert provenance._settings_hash.cache_info().misses == read  # its text is not taken apart again
    holder: Any = type("Processor", (), {"tokenizer": tokenizer})()
    assert tokenizer_hash(holder) == before
    tokenizer.add_tokens(["another"])
    assert tokenizer_hash(tokenizer) != before
    assert tokenizer_hash(_Slow({"a": 0, "b": 1})) == tokenizer_hash(_Slow({"b": 1, "a": 0}))
    assert tokenizer_hash(_Slow({"a": 0})) != tokenizer_hash(_Slow({"b": 0}))
    assert tokenizer_hash(object()) is None


def test_the_time_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    assert now() == "1970-01-01T00:00:00+00:00"


def test_the_commit_is_a_commit() -> None:
    found = commit()
    assert found is None or len(found.split(" ")[0]) == 40
