"""The compiled library in the cache: only what is whole and this user's alone is loaded, and damage is mended."""

import logging
import os
import random
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from workbench.kernels.masks import causal
from workbench.kernels.native import build, cached
from workbench.kernels.softmax import SoftmaxPattern
from workbench.kernels.statistics import Options


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a whole library, which is built once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("made")))
        first = build._compiled()
        stamp = first.stat().st_mtime_ns
        assert build._compiled() == first
        assert first.stat().st_mtime_ns == stamp
        assert [path.name for path in first.parent.iterdir()] == [first.name]
        return first.read_bytes()


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: bytes) -> Iterator[Path]:
    """A cache with that library, for this test alone; what is compiled anew is a copy of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "compile_source", lambda compiler, source, target, processor: target.write_bytes(made))
    build.library.cache_clear()
    yield build._compiled()
    build.library.cache_clear()


def damages(whole: bytes) -> list[bytes]:
    """Truncated, with a flipped bit, with a page of zeros, with something after the end, another file."""
    rng = random.Random(0)
    found = [whole[: rng.randrange(len(whole))] for _ in range(8)] + [b"", whole + b"\0", b"#!/bin/sh\n"]
    for _ in range(8):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        zeros = bytearray(whole)
        at = rng.randrange(0, len(whole) - 4096) // 4096 * 4096
        zeros[at : at + 4096] = bytes(4096)
        found += [bytes(flipped), bytes(zeros)]
    return [damaged for damaged in found if damaged != whole]


def test_damage_is_seen_before_anything_is_loaded(kept: Path, made: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    for damaged in damages(made):
        kept.write_bytes(damaged)
        with pytest.raises(OSError, match="damaged"):
            cached.load(kept)
        assert build._compiled().read_bytes() == made
        assert [path.name for path in kept.parent.iterdir()] == [kept.name]


def test_a_damaged_library_gives_right_numbers(kept: Path, made: bytes) -> None:
    kept.write_bytes(made[: len(made) // 2])
    gen = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 2, 70, 8, generator=gen)
    pattern = SoftmaxPattern(q, k, causal(70))
    assert pattern.engines(["entropy"], Options()) == {"native"}
    want = torch.special.entr(pattern.dense().double()).sum(-1)
    torch.testing.assert_close(pattern.statistics(["entropy"])["entropy"].double(), want, atol=1e-5, rtol=1e-5)
    assert kept.read_bytes() == made


@pytest.mark.skipif(os.name != "posix", reason="permissions are those of POSIX")
@pytest.mark.parametrize(("bit", "says"), [(stat.S_IWGRP, "its group"), (stat.S_IWOTH, "everybody")])
@pytest.mark.parametrize("of_folder", [False, True])
def test_what_others_can_write_is_not_loaded(
    kept: Path, bit: int, says: str, of_folder: bool, caplog: pytest.LogCaptureFixture
) -> None:
    path = kept.parent if of_folder else kept
    path.chmod(path.stat().st_mode | bit)
    with caplog.at_level(logging.WARNING, "workbench"):
        assert build.library() is None
    assert f"can be written by {says}" in caplog.text
    assert "plain torch takes over" in caplog.text


def test_what_belongs_to_somebody_else_is_not_loaded(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = list(kept.stat())
    for owner, refused in ((os.getuid(), False), (0, False), (os.getuid() + 4242, True)):
        found[stat.ST_UID] = owner
        if refused:
            with pytest.raises(OSError, match="somebody else"):
                cached.check_owner(kept, os.stat_result(found))
        else:
            cached.check_owner(kept, os.stat_result(found))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes and links")
@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_what_is_no_file_is_not_loaded(kept: Path, kind: str, tmp_path: Path, made: bytes) -> None:
    kept.unlink()
    if kind == "pipe":
        os.mkfifo(kept, 0o600)
    elif kind == "link":
        (tmp_path / "elsewhere.so").write_bytes(made)
        kept.symlink_to(tmp_path / "elsewhere.so")
    else:
        kept.mkdir()
    assert build.library() is None


def test_a_swap_after_the_check_changes_nothing(kept: Path, made: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(os, "memfd_create"):
        pytest.skip("this system has no private copies")
    read = cached._bytes

    def swapped(path: Path) -> bytes:
        content = read(path)
        path.write_bytes(b"not a library")
        return content

    monkeypatch.setattr(cached, "_bytes", swapped)
    assert cached.load(kept).workbench_strip() > 0


def test_a_killed_build_leaves_nothing_for_good(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left, fresh = (kept.parent / f"building-{name}" for name in ("old", "new"))
    for folder in (left, fresh):
        folder.mkdir()
        (folder / "statistics.so").write_bytes(b"half")
    os.utime(left, (0, 0))
    kept.unlink()
    build._compiled()
    assert not left.exists()
    assert fresh.exists()


def test_a_failed_build_keeps_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("the disk is full")))
    monkeypatch.setattr(build, "compile_source", lambda compiler, source, target, how: target.write_bytes(b"half"))
    with pytest.raises(OSError, match="disk is full"):
        build._compiled()
    assert list((tmp_path / "attention-workbench").iterdir()) == []


def compiler(path: Path, log: Path) -> Path:
    """A compiler that writes down how it was called."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\necho "$1" >> "{log}"\nfor last; do :; done\necho made > "$last"\n')
    path.chmod(0o755)
    return path


@pytest.mark.skipif(os.name != "posix", reason="scripts are those of POSIX")
@pytest.mark.parametrize("shape", ["{path}", "{path} -first", "'{path}' -first", '"{path}" -first', "  {path}  "])
@pytest.mark.parametrize("folder", ["plain", "with blanks", "bytes-\udcff"])
def test_the_compiler_of_the_environment(
    shape: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = compiler(tmp_path / folder / "c++", tmp_path / "log")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", shape.format(path=path))
    if folder == "with blanks" and shape == "{path} -first":
        with pytest.raises(OSError, match="no compiler that can be run"):
            build._compiled()
        return
    assert build._compiled().read_bytes() == b"made\n"
    assert (tmp_path / "log").read_text().split() == ["-first" if "-first" in shape else "-O3"]


@pytest.mark.parametrize("value", ["nowhere++", "'unfinished", "\udcff\udcfe", "-O3", "''"])
def test_a_compiler_that_cannot_be_run_is_said(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", value)
    build.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "workbench"):
            assert build.library() is None
        assert "CXX=" in caplog.text
        caplog.text.encode()
    finally:
        build.library.cache_clear()


def test_what_a_compiler_complains_of_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "c++"
    path.write_text("#!/bin/sh\nprintf 'no \\377 space' >&2\nexit 1\n")
    path.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(path))
    build.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "workbench"):
            assert build.library() is None
        assert "space" in caplog.text
    finally:
        build.library.cache_clear()
