"""The command line: `workbench demo`, `report`, `verify`, `check` and `--version`."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench import __version__
from workbench.errors import CaptureError, ReportError, WorkbenchError

if TYPE_CHECKING:
    from workbench.report import Report
    from workbench.session import Workbench

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Look at every attention head of a PyTorch model that stays on its fast kernel.",
)

_STATISTICS = ("entropy", "effective_keys", "distance", "sink", "current", "previous", "peak", "received")
_NEW_TOKENS = 32


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
    """Capture the language model that ships with the package on prompts it was trained for, and write a page."""
    from workbench import attach, models, tasks
    from workbench.report import Report

    model, tokenizer = models.load("demo-lm")
    seed = 3
    report = Report(
        "The heads of demo-lm",
        question="What does each attention head of the small language model that ships with the package look at?",
        seeds=[seed],
    )
    with attach(model, tokenizer) as wb:
        for title, task, note in (
            (
                "Colored Objects",
                tasks.colored_objects(1, seed=seed),
                "One solved example, then a question about a new scene.",
            ),
            (
                "Indirect object identification",
                tasks.ioi(1, seed=seed),
                "The name that is not repeated comes next.",
            ),
            ("Induction", tasks.induction(1, seed=seed), "A random sequence, then its beginning again."),
        ):
            example = task[0]
            _add(report, wb, example.prompt, f"{note} Expected next: {example.answer.strip()}.", title)
    _write(report, out)


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

    prompt = _prompt(text)
    loaded, tokenizer = models.load(model)
    page = Report(f"The heads of {Path(model).name}")
    with attach(loaded, tokenizer) as wb:
        _add(page, wb, prompt, None)
    _write(page, out, allow_large=allow_large)


@app.command()
def verify(
    model: Annotated[str, typer.Option(help="A shipped model, a Hugging Face folder, or a Hugging Face name.")],
    text: Annotated[str, typer.Option(help="The prompt; @FILE reads it from a file.")] = "The cat sat on the mat .",
) -> None:
    """Check on a text that every site fires, outputs stay the same to the bit, and A·V is the kernel's output."""
    import torch

    from workbench import attach, models

    loaded, tokenizer = models.load(model)
    with attach(loaded, tokenizer) as wb, torch.inference_mode():
        found = wb.verify(**_inputs(wb, _prompt(text)))
    typer.echo(found.table.to_string(index=False))
    typer.echo(repr(found))
    found.raise_if_failed()


@app.command()
def check(file: Annotated[Path, typer.Argument(help="A page that was written by a report.")]) -> None:
    """Check an exported page: nothing is loaded from elsewhere, and it is as it was written."""
    from workbench.report import check as check_page

    problems = check_page(file)
    for problem in problems:
        typer.echo(problem)
    if problems:
        raise ReportError(f"{file} has {len(problems)} problem(s)")
    typer.echo(f"{file}: sound, {file.stat().st_size / 1e6:.2f} MB")


def _prompt(text: str) -> str:
    if not text.startswith("@"):
        return text
    path = Path(text[1:])
    if not path.is_file():
        raise CaptureError(f"there is no file {path}", hint="--text @FILE reads the prompt from a file")
    return path.read_text(encoding="utf-8")


def _inputs(wb: Workbench, text: str) -> dict[str, Any]:
    """Model inputs for a text; an encoder-decoder also gets the tokens that it generates itself."""
    model: Any = wb.model
    takes = getattr(model, "main_input_name", "input_ids")
    if takes != "input_ids":
        raise CaptureError(f"the model takes {takes}, not text", hint="attach and capture it from Python")
    inputs: dict[str, Any] = dict(wb.tokenize(text))
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = model.generate(**inputs, max_new_tokens=_NEW_TOKENS, do_sample=False)
    return inputs


def _add(report: Report, wb: Workbench, text: str, note: str | None, title: str | None = None) -> None:
    """Verify, capture and add one prompt."""
    import torch

    with torch.inference_mode():
        inputs = _inputs(wb, text)
        verification = wb.verify(**inputs).raise_if_failed()
        names = [*_STATISTICS, "induction"] if "decoder_input_ids" not in inputs else list(_STATISTICS)
        with wb.capture(names) as capture:
            wb.model(**inputs)
    report.add(capture, title=title, text=text, verification=verification, note=note)


def _write(report: Report, out: Path, *, allow_large: bool = False) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        path = report.write(out, allow_large=allow_large)
    for warning in said:
        typer.secho(str(warning.message), fg=typer.colors.YELLOW, err=True)
    typer.echo(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
