"""Build the documentation site into .cache/site/html, with warnings as errors: `make site`.

Its pages are README.md, the pages at the root and in docs/, the notebooks with the pictures that they hold, and a
reference that is made of the docstrings and signatures of the public names. They are put together in .cache/site/pages,
in the folders that they have in the repository, so that links are the same in both; `mkdocs.yml` says the rest.
"""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import latex2mathml.converter
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
SITE = ROOT / ".cache" / "site"
PAGES, SOURCE = SITE / "pages", SITE / "source"

NAMESPACES = ("mechanisms", "metrics", "tasks", "models", "views")
"""Public modules with public names of their own, `workbench.tasks.ioi`."""
GIVEN_BACK = (
    "workbench.capture.capture.Forward",
    "workbench.capture.transformer_lens.Cache",
    "workbench.hooks.sites.Site",
    "workbench.hooks.sites.Sites",
    "workbench.hooks.sites.Unread",
    "workbench.kernels.patterns.Pattern",
    "workbench.kernels.statistics.Statistic",
    "workbench.session.verification.Verification",
    "workbench.storage.result.Result",
)
"""Classes that a user meets in what public names give, and does not make."""


def main() -> None:
    """Put the pages together and build the site."""
    shutil.rmtree(SITE, ignore_errors=True)
    copy_pages()
    write_gallery()
    write_notebooks()
    write_reference()
    link_sources()
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # what the theme says of mkdocs' future at each build
    done = subprocess.run([sys.executable, "-P", "-m", "mkdocs", "build"], cwd=ROOT, env=environment, check=False)
    sys.exit(done.returncode)


def copy_pages() -> None:
    """README and the other pages at the root, docs/, and what they show and link."""
    for source in [*ROOT.glob("*.md"), ROOT / "LICENSE", *(ROOT / "docs").rglob("*")]:
        to = PAGES / source.relative_to(ROOT)
        if source.suffix == ".md":
            _write(to, source.read_text(encoding="utf-8"))
        elif source.is_file() and source.suffix not in {".py", ".mjs"}:
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, to)


def write_gallery() -> None:
    """Each picture of a view in docs/images, in the reader's theme, with what docs/views.md says of the view."""
    rows = re.findall(
        r"^\| ([A-Z][^|]+?) \| (`views[^|]+?) \| ([^|]+?) \|$", (ROOT / "docs/views.md").read_text(), re.MULTILINE
    )
    said = {name.lower().replace(" ", "-"): (name, made, shows) for name, made, shows in rows}
    page = [
        "# Gallery",
        "What a browser shows of each view, on the models that ship with the package; `docs/make_screenshots.py` "
        "makes the pictures. [Views](views.md) says more.",
    ]
    for picture in sorted((ROOT / "docs" / "images").glob("*-light.png")):
        stem = picture.stem.removesuffix("-light")
        name, made, shows = said.get(stem, (stem.replace("-", " ").capitalize(), "", ""))
        page += [f"## {name}", f"{made}: {shows}." if made else ""]
        page.append("\n".join(f"![{name}](images/{stem}-{theme}.png#only-{theme})" for theme in ("light", "dark")))
    _write(PAGES / "docs" / "gallery.md", "\n\n".join(page) + "\n")


def write_notebooks() -> None:
    """Each notebook as a page, with the outputs that it holds."""
    exporter = MarkdownExporter()
    for source in sorted((ROOT / "notebooks").glob("*.ipynb")):
        outputs = {"output_files_dir": f"{source.stem}_outputs", "unique_key": source.stem}
        text, found = exporter.from_filename(str(source), resources=outputs)
        _write(PAGES / "notebooks" / f"{source.stem}.md", text)
        for name, data in found.get("outputs", {}).items():
            picture = PAGES / "notebooks" / name
            picture.parent.mkdir(exist_ok=True)
            picture.write_bytes(data)


def _write(to: Path, text: str) -> None:
    """Write a page: links to notebooks lead to their pages, formulas are MathML, which browsers draw by themselves."""
    text = re.sub(r"(\]\([^)\s]+)\.ipynb(?=[)#])", r"\1.md", text)
    text = re.sub(r"\$`(.+?)`\$", lambda found: latex2mathml.converter.convert(found[1]), text)
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(text, encoding="utf-8")


def write_reference() -> None:
    """A page for each room of the package that has public names, and one with all names."""
    index = [
        "# Reference",
        "Made of the docstrings and signatures of the public names. Where a name is written "
        "`workbench.name`, `import workbench` is all that it takes.",
    ]
    for room, names in public_names().items():
        index += [
            f"## [{room}]({room}.md)",
            f"{_line(import_module(f'workbench.{room}'))}",
            "| Name | |\n| --- | --- |",
        ]
        page = [f"# {room}", f"{_line(import_module(f'workbench.{room}'))}"]
        for name, thing in names.items():
            index[-1] += f"\n| [`{name}`]({room}.md#{name}) | {_line(thing)} |"
            page.append(f"::: {name}" + _options(thing))
        _write(PAGES / "reference" / f"{room}.md", "\n\n".join(page) + "\n")
    _write(PAGES / "reference" / "README.md", "\n\n".join(index) + "\n")


def public_names() -> dict[str, dict[str, Any]]:
    """By room of the package, the paths by which public things are imported, and the things."""
    rooms: dict[str, dict[str, Any]] = {}
    for path, thing in _public():
        home = path.rpartition(".")[0] if path.count(".") > 1 else getattr(thing, "__module__", "workbench")
        rooms.setdefault(home.split(".")[1], {})[path] = thing
    return {room: dict(sorted(names.items(), key=lambda one: one[0].lower())) for room, names in sorted(rooms.items())}


def _public() -> Iterator[tuple[str, Any]]:
    for module in (import_module("workbench"), *(import_module(f"workbench.{name}") for name in NAMESPACES)):
        for name in module.__all__:
            thing = getattr(module, name)
            if not isinstance(thing, ModuleType):
                yield f"{module.__name__}.{name}", thing
    for path in GIVEN_BACK:
        module, _, name = path.rpartition(".")
        yield path, getattr(import_module(module), name)


def _options(thing: Any) -> str:
    """Members of a base class that has no entry of its own are shown with the class."""
    documented = {id(other) for _, other in _public()}
    bases = inspect.getmro(thing)[1:] if inspect.isclass(thing) else ()
    if not any(base.__module__.startswith("workbench.") and id(base) not in documented for base in bases):
        return ""
    return "\n    options:\n      inherited_members: true"


def _line(thing: Any) -> str:
    """The first line of what a thing's docstring says."""
    if not (inspect.ismodule(thing) or inspect.isclass(thing) or inspect.isroutine(thing)):
        return f"`{type(thing).__name__}`"
    return (inspect.getdoc(thing) or "").partition("\n")[0].replace("|", r"\|")


def link_sources() -> None:
    """The package as it is when installed, `kernels` and `hooks` in it, for the reference's generator to read."""
    package = SOURCE / "workbench"
    package.mkdir(parents=True)
    for source in [*(ROOT / "workbench").iterdir(), ROOT / "kernels", ROOT / "hooks"]:
        (package / source.name).symlink_to(source)


if __name__ == "__main__":
    main()
