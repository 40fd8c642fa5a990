"""Draw the rooms of the package into docs/architecture.md: `python docs/make_architecture.py`.

A room is a package directly under `workbench` or under `workbench.analysis`, or a module of the root. It stands one
floor above the highest room that it imports, so that imports only go down; that needs a graph without circles.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- rooms: made by docs/make_architecture.py -->", "<!-- end of rooms -->"
_UNFOLDED = ("workbench.analysis",)  # packages whose own packages are rooms
_SOURCES = {"workbench.kernels": "kernels", "workbench.hooks": "hooks"}


_PRINT_IMPORTS = """
import grimp, json
graph = grimp.build_graph("workbench", cache_dir=None)
print(json.dumps({module: sorted(graph.find_modules_directly_imported_by(module)) for module in graph.modules}))
"""


def module_imports() -> dict[str, list[str]]:
    """Which modules of the package each module imports, `kernels` and `hooks` where they are installed.

    In another process: grimp looks for the package as an import would, and here another copy may be imported already.
    """
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "workbench"
        package.mkdir()
        for source in [*(ROOT / "workbench").iterdir(), ROOT / "kernels", ROOT / "hooks"]:
            (package / source.name).symlink_to(source)
        command = [sys.executable, "-c", _PRINT_IMPORTS]
        done = subprocess.run(
            command, cwd=folder, env=os.environ | {"PYTHONPATH": folder}, capture_output=True, text=True
        )
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


def room_of(module: str) -> str | None:
    """The room that a module is in; None for the root, which offers the public names of all rooms."""
    parts = module.split(".")
    depth = 3 if ".".join(parts[:2]) in _UNFOLDED else 2
    return ".".join(parts[:depth]) if len(parts) > 1 else None


def room_imports() -> dict[str, set[str]]:
    """Which rooms each room imports."""
    found: dict[str, set[str]] = {}
    for module, imports in module_imports().items():
        room = room_of(module)
        if room is None or room in _UNFOLDED:
            continue
        found.setdefault(room, set())
        for imported in imports:
            other = room_of(imported)
            if other is not None and other != room and other not in _UNFOLDED:
                found[room].add(other)
    return found


def floors(imports: dict[str, set[str]]) -> list[list[str]]:
    """Rooms by floor, the lowest first.

    Raises:
        ValueError: rooms import each other in a circle.
    """
    level: dict[str, int] = {}
    waiting = dict(imports)
    while waiting:
        ready = [room for room, below in waiting.items() if below <= level.keys()]
        if not ready:
            raise ValueError(f"these rooms import each other in a circle: {', '.join(sorted(waiting))}")
        found = {room: 1 + max((level[other] for other in waiting[room]), default=-1) for room in ready}
        level |= found
        for room in ready:
            del waiting[room]
    return [sorted(room for room in level if level[room] == floor) for floor in range(max(level.values()) + 1)]


def purpose(room: str) -> str:
    """The first sentence of a room's docstring."""
    path = Path(*room.split("."))
    source = ROOT / _SOURCES[room] if room in _SOURCES else ROOT / path
    file = source / "__init__.py" if source.is_dir() else source.with_suffix(".py")
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def drawing() -> str:
    """The floors as a Markdown table, the highest first: rooms, what each is for, and how many rooms it imports."""
    imports = room_imports()
    by_floor = floors(imports)
    head = f"{len(imports)} rooms on {len(by_floor)} floors, and no circle; imports only go down.\n"
    lines = [head, "| Floor | Room | What it is for | Imports |", "| --- | --- | --- | --- |"]
    for number, rooms in reversed(list(enumerate(by_floor))):
        for at, room in enumerate(rooms):
            direct = _without_implied(imports[room], imports)
            names = ", ".join(f"`{_short(other)}`" for other in sorted(direct)) or "–"
            lines.append(f"| {number if at == 0 else ''} | `{_short(room)}` | {purpose(room)} | {names} |")
    return "\n".join(lines) + "\n"


def _without_implied(direct: set[str], imports: dict[str, set[str]]) -> set[str]:
    """The rooms of `direct` that no other of them imports already, directly or not."""

    def below(room: str) -> set[str]:
        found = set(imports[room])
        for other in imports[room]:
            found |= below(other)
        return found

    implied = set().union(*(below(room) for room in direct)) if direct else set()
    return direct - implied


def _short(room: str) -> str:
    return room.removeprefix("workbench.")


def page() -> str:
    """docs/architecture.md with the rooms as they are now."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{drawing()}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
