"""Section of the demo: what the heads of demo-lm look at on prompts that it was trained for."""

from __future__ import annotations

from workbench import attach, models, tasks
from workbench.report import Report
from workbench.report.example import Example, add_example


def add(report: Report, seed: int) -> None:
    """Add one capture for each of three tasks."""
    model, tokenizer = models.load("demo-lm")
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
            expected = f"{note} Expected next: {example.answer.strip()}."
            add_example(report, wb, Example(text=example.prompt), title=title, note=expected)
