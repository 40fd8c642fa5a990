"""The command line: `workbench demo`, `report`, `verify`, `check` and `--version`."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workbench import __version__
from workbench.errors import CaptureError, ReportError, WorkbenchError

if TYPE_CHECKING:
    from workbench.report import Report

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Look at every attention head of a PyTorch model that stays on its fast kernel.",
)


def main() -> None:
    """Run the command line; an error of ours ends it with one message and exit code 1."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        app()
    except WorkbenchError as error:
        typer.secho(f"{type(error).__name__}: {error}", fg=typer.colors.RED, err=True)
        sys.exit(1)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"attention-workbench {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(out: Annotated[Path, typer.Option(help="The page to write.")] = Path("demo.html")) -> None:
    """Show on the small models that ship with the package what the workbench finds, and write a page."""
    from workbench.demo import build

    _write(build(progress=True), out)


@app.command()
def report(
    model: Annotated[str, typer.Option(help="A shipped model, a Hugging Face folder, or a Hugging Face name.")],
    text: Annotated[str, typer.Option(help="The prompt; @FILE reads it from a file.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    allow_large: Annotated[bool, typer.Option("--allow-large", help="Write it even above 50 MB.")] = False,
) -> None:
    """Attach to a model, verify it, capture it on a text, and write one self-contained page."""
    from workbench import attach, models
    from workbench.report import Report
    from workbench.report.prompt import add_prompt

    prompt = _prompt(text)
    loaded, tokenizer = models.load(model)
    page = Report(f"The heads of {Path(model).name}")
    with attach(loaded, tokenizer) as wb:
        add_prompt(page, wb, prompt)
    _write(page, out, allow_large=allow_large)


@app.command()
def verify(
    model: Annotated[str, typer.Option(help="A shipped model, a Hugging Face folder, or a Hugging Face name.")],
    text: Annotated[str, typer.Option(help="The prompt; @FILE reads it from a file.")] = "The cat sat on the mat .",
) -> None:
    """Check on a text that every site fires, outputs stay the same to the bit, and A·V is the kernel's output."""
    import torch

    from workbench import attach, models
    from workbench.report.prompt import inputs

    loaded, tokenizer = models.load(model)
    with attach(loaded, tokenizer) as wb, torch.inference_mode():
        found = wb.verify(**inputs(wb, _prompt(text)))
    typer.echo(found.table.to_string(index=False))
    typer.echo(repr(found))
    found.raise_if_failed()


@app.command()
def check(file: Annotated[Path, typer.Argument(help="A page that was written by a report.")]) -> None:
    """Check an exported page: it is, to the byte, what this version of the package makes of the data in it."""
    from workbench.report.check import PROVES, PROVES_NOT
    from workbench.report.check import check as check_page

    problems = check_page(file)
    for problem in problems:
        typer.echo(problem)
    if problems:
        raise ReportError(f"{file} has {len(problems)} problem(s): it is not a page of this version as it was written")
    typer.echo(f"{file}: sound, {file.stat().st_size / 1e6:.2f} MB")
    typer.echo(f"Shown: {PROVES}.\nNot shown: {PROVES_NOT}.")


def _prompt(text: str) -> str:
    if not text.startswith("@"):
        return text
    path = Path(text[1:])
    if not path.is_file():
        raise CaptureError(f"there is no file {path}", hint="--text @FILE reads the prompt from a file")
    return path.read_text(encoding="utf-8")


def _write(report: Report, out: Path, *, allow_large: bool = False) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        path = report.write(out, allow_large=allow_large)
    for warning in said:
        typer.secho(str(warning.message), fg=typer.colors.YELLOW, err=True)
    typer.echo(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
