"""Files are whole or not there: full disks, rights, interrupts, killed processes; the umask decides the mode."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import workbench
from workbench.analysis.circuits import mib
from workbench.analysis.circuits.circuit import Circuit
from workbench.analysis.circuits.model.graph import Graph
from workbench.analysis.circuits.model.nodes import Layer
from workbench.analysis.corpus.headvis import read_headvis
from workbench.capture.store.writing import open_writer
from workbench.errors import FileError, FormatError, ReportError, WorkbenchError
from workbench.report.check import check
from workbench.storage import disk, files
from workbench.storage.resumable import file_of
from workbench.views import token_strip

Write = Callable[[Path], Any]
posix = pytest.mark.skipif(os.name != "posix", reason="POSIX's file modes and limits")


@pytest.fixture(scope="module")
def writers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Write]:
    """Everything of the package that writes a file."""
    model = torch.nn.TransformerEncoderLayer(16, 4, batch_first=True).eval()
    with workbench.attach(model) as wb, torch.no_grad(), wb.capture(z=True) as cap:
        model(torch.randn(1, 40, 16))
    view = token_strip(["a", "b"], [0.1, 0.2])
    graph = Graph((Layer(2, 1), Layer(2, 1)), 8)
    n, edges = len(graph.senders), (len(graph.senders), len(graph.receivers))
    made = tmp_path_factory.mktemp("mib") / "circuit.json"
    mib.write(made, graph, torch.ones(n).bool(), graph.exists, torch.randn(n).double(), torch.randn(edges).double())
    circuit = Circuit.from_mib(made)
    return {
        "capture": lambda path: cap.save(path, pattern=True),
        "result": circuit.save,
        "mib": circuit.to_mib,
        "report": workbench.Report("t").add(cap).write,
        "page": view.to_html,
        "picture": view.to_png,
    }


NAMES = ["capture", "result", "mib", "report", "page", "picture"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("said", [errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EDQUOT, errno.EIO])
def test_every_writer_leaves_the_old_file_whole(
    writers: dict[str, Write], name: str, said: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def fail(descriptor: int) -> None:
        raise OSError(said, os.strerror(said))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(FileError, match="cannot be written: "):
        writers[name](target)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


@posix
def test_a_real_limit_on_the_size_of_files(tmp_path: Path) -> None:
    """In a process of its own, where the kernel refuses what is above the limit in the middle of a file."""
    target = tmp_path / "file"
    target.write_bytes(b"old")
    script = (
        "import resource, signal, sys\n"
        "from workbench.errors import FileError\n"
        "from workbench.storage import disk\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try: disk.write(sys.argv[1], (bytes(3000) for _ in range(20)))\n"
        "except FileError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(target)], capture_output=True, text=True, cwd=tmp_path)
    assert "File too large" in done.stdout, done.stderr
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    target = disk.write(tmp_path / "file", "old")

    def pieces() -> Iterator[bytes]:
        yield b"new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        disk.write(target, pieces())
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@posix
def test_what_a_killed_process_left_is_removed_and_what_another_one_writes_is_not(tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "from workbench.storage import disk\n"
        "def pieces():\n"
        "    yield b'begun'\n"
        "    print('begun', flush=True)\n"
        "    time.sleep(600)\n"
        "disk.write(sys.argv[1], pieces())\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "theirs")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "begun\n"
        (unfinished,) = tmp_path.iterdir()
        assert unfinished.suffix == ".part"
        disk.write(tmp_path / "ours", "x")
        assert unfinished.exists()
        other.send_signal(signal.SIGKILL)
    mine = tmp_path / "mine.part"
    mine.write_text("a file of the user's")
    disk.write(tmp_path / "ours", "y")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.part", "ours"]


@posix
@pytest.mark.parametrize("name", NAMES)
def test_the_umask_decides_the_mode_of_a_new_file(writers: dict[str, Write], name: str, tmp_path: Path) -> None:
    for mask, mode in [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)]:
        before = os.umask(mask)
        try:
            path = tmp_path / f"file{mask}"
            writers[name](path)
        finally:
            os.umask(before)
        assert stat.S_IMODE(path.stat().st_mode) == mode


@posix
def test_a_file_that_is_replaced_keeps_its_mode(tmp_path: Path) -> None:
    path = disk.write(tmp_path / "file", "old")
    path.chmod(0o600)
    disk.write(path, "new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@posix
def test_links_are_followed_and_devices_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link"
    link.symlink_to("real/file")
    disk.write(link, "through")
    assert link.is_symlink()
    assert (tmp_path / "real" / "file").read_text() == "through"
    os.mkfifo(tmp_path / "pipe")
    for path in (Path(os.devnull), tmp_path / "pipe"):
        with pytest.raises(FileError, match="a device or a pipe"):
            disk.write(path, "x")
    assert not Path(os.devnull).is_file()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nowhere/file", "there is no folder"),
        ("folder", "is a folder"),
        ("file/inside", "there is no folder"),
        ("a\x00b", "cannot be written: embedded null byte"),
        ("x" * 300, "cannot be written: File name too long"),
        ("\ud800", "cannot be written: "),
    ],
)
def test_a_wrong_path_is_one_error(writers: dict[str, Write], name: str, path: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileError, match=said) as found:
        writers[name](tmp_path / path)
    assert found.value.hint


@pytest.mark.parametrize("path", [None, 5, b"file", "x" * 5000, "a\x00b"], ids=repr)
def test_what_no_path_is_is_not_read(path: Any) -> None:
    with pytest.raises(FormatError):
        read_headvis(path)
    settings: Any = None
    if not isinstance(path, str):
        with pytest.raises(WorkbenchError, match="is no path"):
            workbench.models.load(path)
        with pytest.raises(FileError, match="is no path"), open_writer(path, settings, {}, {}):
            pass
    with pytest.raises(FormatError, match=r"is no path|cannot be read|there is no file"):
        workbench.load_capture(path)
    with pytest.raises(FileError, match=r"is no path|cannot be written"):
        disk.write(path, "x")


@pytest.mark.parametrize(
    "path", [None, 5, b"file", "x" * 5000, "a\x00b", "\ud800", "no/such/folder", "file/x"], ids=repr
)
def test_where_nothing_can_be_kept_is_said_before_the_work(
    path: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    for door in (disk.folder, file_of):
        if path is not None or door is disk.folder:
            with pytest.raises(FileError, match=r"is no path|cannot be written|there is no folder"):
                door(path)
    assert [one.name for one in tmp_path.iterdir()] == ["file"]
    assert file_of(None) is None


def test_another_writer_in_the_folder_leaves_what_is_about_to_get_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace(source: Path, target: Path, last: Callable[..., None] = os.replace) -> None:
        monkeypatch.setattr(os, "replace", last)
        disk.write(tmp_path / "theirs", "x")
        last(source, target)

    monkeypatch.setattr(os, "replace", replace)
    disk.write(tmp_path / "ours", "y")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["ours", "theirs"]


def test_a_file_that_is_replaced_while_it_is_read_is_read_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(n: int) -> Path:
        return files.write(tmp_path / "file", "workbench.test", {"n": n}, {"a": torch.full((n,), n)})

    def told(*args: Any, last: Callable[..., Any] = files._told) -> Any:
        found = last(*args)
        write(3)
        return found

    write(2000)
    monkeypatch.setattr(files, "_told", told)
    header, tensors = files.read(tmp_path / "file", "workbench.test")
    assert header["n"].integer() == 2000
    assert tensors["a"].tolist() == [2000] * 2000


@posix
def test_a_pipe_is_not_waited_for_and_a_device_not_read_to_its_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        with pytest.raises(FormatError, match="cannot be read: it is no file"):
            Circuit.from_mib(tmp_path / name)


@posix
@pytest.mark.parametrize(
    "read",
    [workbench.load_capture, workbench.Investigation.load, workbench.Memory, workbench.models.load],
    ids=["load_capture", "Investigation", "Memory", "models"],
)
def test_a_folder_that_is_closed_is_one_error(
    read: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # who is root may read all
    with pytest.raises(WorkbenchError, match=r"Permission denied|closed to you"):
        read(tmp_path)


def test_a_header_says_no_more_than_safetensors(tmp_path: Path) -> None:
    path = files.write(tmp_path / "file", "workbench.test", {}, {"a": torch.zeros(2)})
    length = int.from_bytes(path.read_bytes()[:8], "little")
    head, body = path.read_bytes()[8 : 8 + length], path.read_bytes()[8 + length :]
    more = head.replace(b'"shape"', b'"x":NaN,"shape"')
    path.write_bytes(len(more).to_bytes(8, "little") + more + body)
    with pytest.raises(FormatError, match="of 'a' it says more than safetensors do"):
        files.read(path, "workbench.test")


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    name = "x" * 255
    assert disk.write(tmp_path / name, "x").name == name


def test_the_error_is_one_of_ours() -> None:
    assert issubclass(FileError, WorkbenchError)
    assert workbench.FileError is FileError


@pytest.mark.parametrize("name", NAMES)
def test_the_same_content_gives_the_same_bytes(
    writers: dict[str, Write], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    made = set()
    for i in range(8):
        path = tmp_path / str(i)
        writers[name](path)
        made.add(path.read_bytes())
    assert len(made) == 1


def test_a_capture_saved_again_from_its_file_is_the_same_file(writers: dict[str, Write], tmp_path: Path) -> None:
    writers["capture"](tmp_path / "a")
    workbench.load_capture(tmp_path / "a").save(tmp_path / "b", pattern=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    writers["mib"](tmp_path / "c")
    assert json.loads((tmp_path / "c").read_text())


def test_a_file_of_another_result_and_a_folder_are_named(tmp_path: Path) -> None:
    files.write(tmp_path / "one.safetensors", "workbench.capacity", {}, {})
    with pytest.raises(FormatError, match=r"no.* workbench\.capture file, but a workbench\.capacity file\nHint: load"):
        files.read(tmp_path / "one.safetensors", "workbench.capture")
    files.write(tmp_path / "two.safetensors", "workbench.\n\x1b[31m", {}, {})
    with pytest.raises(
        FormatError, match=r"two\.safetensors is not a workbench\.capture file\nHint: it was not written"
    ):
        files.read(tmp_path / "two.safetensors", "workbench.capture")
    with pytest.raises(FormatError, match="is a folder, and no file"):
        files.read(tmp_path, "workbench.capture")
    with pytest.raises(ReportError, match="is a folder, and no page"):
        check(tmp_path)
