"""A JupyterLab of its own for a test: on a free port, with its own settings, and closed at the end."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page

from support.patience import PATIENCE

_IDLE = "jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"


@contextmanager
def jupyterlab(folder: Path, home: Path, kernels: Sequence[str]) -> Iterator[str]:
    """The address of a JupyterLab that serves `folder` and keeps everything else in `home`.

    Args:
        kernels: what runs a module in the place of `python -m`, for kernels.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = home / "labconfig"
    settings.mkdir(parents=True)
    chosen = {
        "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
        "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},  # no cell is put away
    }
    (settings / "default_setting_overrides.json").write_text(json.dumps(chosen))
    kernel = home / "data" / "kernels" / "python3" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    begin = [*kernels, "ipykernel_launcher", "--ext=ipywidgets", "-f", "{connection_file}"]
    kernel.write_text(json.dumps({"argv": begin, "display_name": "Python 3", "language": "python"}))
    tests = str(Path(__file__).parent.parent)
    path = os.pathsep.join(filter(None, [tests, os.environ.get("PYTHONPATH")]))
    own = {f"JUPYTER_{name}_DIR": str(home / name.lower()) for name in ("DATA", "CONFIG", "RUNTIME")}
    own |= {"JUPYTERLAB_SETTINGS_DIR": str(home / "user"), "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces")}
    command = [
        *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}"),
        *("--ServerApp.ip=127.0.0.1", "--IdentityProvider.token=", "--ServerApp.disable_check_xsrf=True"),
        *("--LabApp.expose_app_in_browser=True", f"--ServerApp.root_dir={folder}"),
    ]
    with (home / "log.txt").open("w") as log:
        environment = {**os.environ, **own, "PYTHONPATH": path, "IPYTHONDIR": str(home / "ipython")}
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            yield _answering(f"http://127.0.0.1:{port}", server, home / "log.txt")
        finally:
            server.terminate()
            server.wait(PATIENCE)


def _answering(address: str, server: subprocess.Popen[bytes], log: Path) -> str:
    for _ in range(4 * PATIENCE):
        if server.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"{address}/api", timeout=5).close()
            return address
        except OSError:
            time.sleep(0.25)
    raise RuntimeError(f"JupyterLab does not answer: {log.read_text()[-2000:]}")


def open_notebook(page: Page, address: str, name: str) -> None:
    """Open a notebook and wait for its kernel."""
    page.goto(f"{address}/lab/tree/{name}?reset")
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    page.wait_for_function(f"window.jupyterapp && {_IDLE}")


def open_instead(page: Page, name: str) -> None:
    """Open another notebook in place of the one that is open, and wait for its kernel."""
    page.evaluate("window.jupyterapp.shell.currentWidget.dispose()")
    command(page, "docmanager:open", path=name)
    page.wait_for_function(f"window.jupyterapp.shell.currentWidget?.context?.path === {name!r} && {_IDLE}")


def command(page: Page, name: str, **arguments: object) -> None:
    """Run one of JupyterLab's commands, and wait for it."""
    page.evaluate("([name, args]) => window.jupyterapp.commands.execute(name, args)", [name, arguments])


def run_all(page: Page) -> None:
    """Run all cells, and wait until the kernel has nothing left to do."""
    command(page, "notebook:run-all-cells")
    page.wait_for_function(f"window.jupyterapp && {_IDLE}")


def run_code(page: Page, code: str) -> None:
    """Run code in the notebook's kernel as a cell would, and wait for it."""
    kernel = "window.jupyterapp.shell.currentWidget.sessionContext.session.kernel"
    asked = f"code => {kernel}.requestExecute({{ code }}).done.then(({{ content }}) => content.status)"
    assert page.evaluate(asked, code) == "ok", code
