"""A corpus as windows of ids: texts one behind the other, each window with what the tokenizer puts around a text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.analysis.head_scores.prompts import Ids, ids_of, is_one
from workbench.errors import CaptureError
from workbench.inputs import check_text, context_length
from workbench.session.workbench import Workbench
from workbench.storage import disk

Corpus = Path | str | Iterable[Path | Ids]
_LONGEST = 256  # tokens of a window, where the model takes as many
_PROBE = "a"


@dataclass(frozen=True)
class Frame:
    """What stands around the text of each window: [CLS] and [SEP], or a beginning of text, or nothing."""

    before: tuple[int, ...] = ()
    behind: tuple[int, ...] = ()

    @classmethod
    def of(cls, wb: Workbench) -> Frame:
        """What the tokenizer puts around a text; nothing where there is no tokenizer."""
        if wb.tokenizer is None:
            return cls()
        try:
            bare = list(wb.tokenizer(_PROBE, add_special_tokens=False)["input_ids"])
            whole = list(wb.tokenizer(_PROBE)["input_ids"])
        except (TypeError, ValueError, KeyError):
            return cls()
        for start in range(len(whole) - len(bare) + 1):
            if bare and whole[start : start + len(bare)] == bare:
                return cls(tuple(whole[:start]), tuple(whole[start + len(bare) :]))
        return cls()

    def room(self, length: int) -> int:
        """How many tokens of text a window has."""
        return length - len(self.before) - len(self.behind)

    def around(self, ids: Tensor) -> Tensor:
        """[length] ids of a window with this text."""
        return torch.cat(
            [torch.tensor(self.before, dtype=torch.long), ids, torch.tensor(self.behind, dtype=torch.long)]
        )


def unknown_id(tokenizer: Any) -> int | None:
    """The id of all words that a tokenizer does not know; None where it has none of its own."""
    found = getattr(tokenizer, "unk_token_id", None)
    other = [getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "cls", "sep")]
    return found if isinstance(found, int) and found not in other else None


def length_for(wb: Workbench, frame: Frame, length: int | None) -> int:
    """How long windows are.

    Raises:
        CaptureError: longer than the model's context, or too short for two tokens of text.
    """
    most = context_length(wb.model)
    chosen = min(_LONGEST, most or _LONGEST) if length is None else length
    if most is not None and chosen > most:
        raise CaptureError(f"windows of {chosen} tokens are longer than the model's context, {most}", hint="length=")
    if frame.room(chosen) < 2:
        raise CaptureError(f"windows of {chosen} tokens have no room for two tokens of text", hint="a larger length=")
    return chosen


def windows_of(wb: Workbench, corpus: Corpus, frame: Frame, length: int) -> Iterator[Tensor]:
    """[length] ids of each window; what is left of the last text is no window.

    Raises:
        CaptureError: a text without a tokenizer, a file that cannot be read or is no UTF-8; it is named. No corpus.
    """
    room, left = frame.room(length), torch.empty(0, dtype=torch.long)
    for one in _parts(corpus):
        left = torch.cat([left, _ids(wb, one)])
        while len(left) >= room:
            yield frame.around(left[:room])
            left = left[room:]


def _parts(corpus: Corpus) -> Iterable[Path | Ids]:
    if isinstance(corpus, Path):
        return sorted(one for one in corpus.rglob("*") if one.is_file()) if corpus.is_dir() else [corpus]
    if isinstance(corpus, (str, Tensor)) or (isinstance(corpus, Sequence) and is_one(corpus)):
        return [corpus]
    if not isinstance(corpus, Iterable):
        raise CaptureError(f"a corpus is a text, a path, or several of these or of rows of ids, not {corpus!r}")
    return corpus


def _ids(wb: Workbench, one: Any) -> Tensor:
    if isinstance(one, Path):
        try:
            one = disk.text(one)
        except OSError as error:
            raise CaptureError(f"{one.name} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise CaptureError(
                f"{one.name} is no UTF-8, at byte {error.start:,}",
                hint="leave it out, or pass its text: path.read_text(encoding=…, errors=…)",
            ) from None
    if not isinstance(one, str):
        return ids_of(wb, one).cpu()
    if wb.tokenizer is None:
        raise CaptureError("no tokenizer is attached", hint="attach(model, tokenizer), or pass ids yourself")
    check_text(one)
    quiet = {"verbose": False} if hasattr(wb.tokenizer, "backend_tokenizer") else {}  # longer than the model's context
    return torch.tensor(list(wb.tokenizer(one, add_special_tokens=False, **quiet)["input_ids"]), dtype=torch.long)
