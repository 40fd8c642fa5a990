"""Where a number comes from: versions, model, weights, kernel. Plain JSON values, carried by captures and reports."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from typing import Any

from torch import nn

from workbench.hooks.configs import read
from workbench.hooks.weights import kinds
from workbench.storage.weights import weights_note

Provenance = dict[str, Any]
# Parameters that are tokens before the patches; registers are several.
_PREFIX = ("cls_token", "class_token", "class_embedding", "distillation_token", "dist_token", "cls_embeddings")
_REGISTERS = ("register_tokens", "reg_token")
_ROTARY = re.compile(r"[Rr]otary|RoPE|Rope(?![a-z])")


_PACKAGES = (
    "attention-workbench", "torch", "triton", "transformers", "transformer-lens", "captum", "plotly", "timm", "numpy",
)  # fmt: skip
_EPOCH = "SOURCE_DATE_EPOCH"
_LEFT_OUT = "[left out]"
_OPTION = re.compile(r"--?[A-Za-z][\w-]*(=.*)?", re.DOTALL)
# What a name of an argument or variable ends with when its value is a secret; "tokenizer" and "max-tokens" do not.
_SECRET_NAME = re.compile(
    r"(^|[-_.])(api|access|private|secret|auth|hf|my|user)?[-_.]?"
    r"(token|key|secret|password|passwd|passphrase|pass|pwd|pw|credentials?|auth|authorization|bearer|cookie|pat)"
    r"(s(?<!tokens)(?<!keys))?$",
    re.IGNORECASE,
)
_USER = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s@]+@", re.IGNORECASE)
# The forms of the secrets that services hand out: a short mark, then letters and digits without a break.
_SECRET = re.compile(
    r"\b(?:(?:hf|sk|pk|rk|gh[a-z]|github_pat|glpat|xox[a-z]|npm|pypi)[-_]|AKIA|ASIA|AIza|eyJ)[A-Za-z0-9_.-]{16,}"
    r"|(?<=[?&])(?:[\w-]*(?:token|key|secret|signature|sig|password))=[^&\s]+",
    re.IGNORECASE,
)


def describe(model: nn.Module, tokenizer: Any = None) -> Provenance:
    """What is known of a model and of the software that runs it, without reading its weights."""
    config = read(model, "config")
    parameters = list(model.parameters())
    known = {} if tokenizer is None else {"tokenizer_sha256": tokenizer_hash(tokenizer)}
    note = weights_note(model)
    if note is not None:
        known["weights_note"] = note
    return {
        "created": now(),
        "model_class": f"{type(model).__module__}.{type(model).__qualname__}",
        "model_name": _name(read(config, "name_or_path", "")) or type(model).__name__,
        "parameters": sum(p.numel() for p in parameters),
        "dtype": ", ".join(kinds(model)),
        "device": ", ".join(sorted({str(p.device) for p in parameters})),
        "attention_backend": read(config, "_attn_implementation") or "torch",
        "training": model.training,
        "patches": find_patches(model),
        "rotary": any(_ROTARY.search(type(module).__name__) for module in model.modules()),
        "versions": versions(),
        **known,
    }


def now() -> str:
    """The time in UTC as text; that of SOURCE_DATE_EPOCH where it is set, so that a run can be repeated to the byte."""
    fixed = os.environ.get(_EPOCH, "")
    when = datetime.fromtimestamp(int(fixed), UTC) if fixed.isdecimal() else datetime.now(UTC)
    return when.isoformat(timespec="seconds")


def repeatable() -> bool:
    """Whether SOURCE_DATE_EPOCH asks for the same bytes in every run."""
    return os.environ.get(_EPOCH, "").isdecimal()


def find_patches(model: nn.Module) -> Provenance | None:
    """The patches that a model cuts its images into: {"grid": [rows, columns], "prefix": tokens before them}.

    Read from a config's image_size and patch_size, from timm's patch embedding, or from attributes of those names, and
    from the parameters that are tokens. None where the model tells of no patches.
    """
    config = read(model, "config")
    embedding = getattr(model, "patch_embed", None)
    grid = getattr(embedding, "grid_size", None)
    if grid is None:
        for owner in (read(config, "vision_config"), config, model):
            image, patch = (_pair(read(owner, name)) for name in ("image_size", "patch_size"))
            if image and patch:
                grid = [size // step for size, step in zip(image, patch, strict=True)]
                break
    if grid is None or _pair(grid) is None:
        return None
    prefix = getattr(model, "num_prefix_tokens", None)
    if not isinstance(prefix, int):
        shapes = {name.rpartition(".")[2]: p.shape for name, p in model.named_parameters()}
        prefix = sum(name in _PREFIX for name in shapes)
        prefix += sum(shape[-2] for name, shape in shapes.items() if name in _REGISTERS and len(shape) > 1)
    return {"grid": _pair(grid), "prefix": prefix}


def _pair(size: Any) -> list[int] | None:
    """[height, width] of a size that is one number or two; None if it is neither."""
    both = size if isinstance(size, (tuple, list)) else (size, size)
    if len(both) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in both):
        return None
    return list(both)


def _name(name_or_path: str) -> str:
    """A hub name as it is; of a local folder only its own name, since pages are passed on."""
    return Path(name_or_path).name if name_or_path and Path(name_or_path).is_dir() else name_or_path


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on; absent packages are left out."""
    return dict(_versions())


@cache  # reading the packages' metadata takes longer than a short forward
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def tokenizer_hash(tokenizer: Any) -> str | None:
    """SHA-256 over a tokenizer: its fast form where it has one, else its vocabulary; None where it tells neither.

    >>> tokenizer_hash(object()) is None
    True
    """
    owners: list[Any] = [tokenizer, getattr(tokenizer, "tokenizer", None)]  # a processor holds one
    for owner in owners:
        backend: Any = getattr(owner, "backend_tokenizer", None)
        if hasattr(backend, "to_str"):
            return _settings_hash(backend.to_str())
        if hasattr(owner, "get_vocab"):
            text = json.dumps([type(owner).__qualname__, sorted(owner.get_vocab().items())])
        else:
            continue
        return hashlib.sha256(text.encode()).hexdigest()
    return None


@lru_cache(maxsize=4)  # every capture asks for the same text of some megabytes
def _settings_hash(text: str) -> str:
    """SHA-256 over the settings of a fast tokenizer, given as it writes them.

    Padding and truncation are those of the last call, and no part of the tokenizer.
    """
    settings = {name: one for name, one in json.loads(text).items() if name not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


@cache
def commit() -> str | None:
    """The git commit that this package is checked out at, "+ changes" where files differ from it; None elsewhere."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An environment may lie inside someone else's repository, which does not track it.
    if git("ls-files", "--error-unmatch", "provenance.py") is None:
        return None
    found = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
    return f"{found} + changes" if found and changed else found


def command_line(arguments: Sequence[str] | None = None) -> str:
    """The command that runs, paths cut to their base names: a page is passed on, and folders are nobody's business.

    Values of arguments that are named like secrets, and what looks like one, are left out.

    >>> command_line(["/home/me/bin/workbench", "report", "--text", "one two", "--out=/tmp/x/page.html"])
    "workbench report --text 'one two' --out=page.html"
    >>> command_line(["tool", "--api-key", "x1", "--hf-token=x2", "https://me:x3@host/a"])
    'tool --api-key [left out] --hf-token=[left out] https://[left out]@host/a'
    """
    given = list(sys.argv if arguments is None else arguments)
    if "ipykernel" in Path(given[0] if given else "").parts or "ipykernel_launcher" in "".join(given[:1]):
        return "a notebook"
    return " ".join(_told(given)) or "python"


def _told(arguments: Sequence[str]) -> Iterator[str]:
    """The arguments as a reader may see them."""
    value_is_secret = False
    for argument in arguments:
        name, sign, value = argument.partition("=")
        if value_is_secret and not _OPTION.fullmatch(argument):
            yield _LEFT_OUT
            value_is_secret = False
            continue
        named = _SECRET_NAME.search(name) is not None and (bool(sign) or argument.startswith("-"))
        value_is_secret = named and not sign
        if named and sign and value:
            yield f"{shlex.quote(name)}={_LEFT_OUT}"
        elif (cleaned := _SECRET.sub(_LEFT_OUT, _USER.sub(rf"\1{_LEFT_OUT}@", argument))) != argument:
            yield cleaned
        else:
            yield shlex.quote(_without_folder(argument))


def _without_folder(argument: str) -> str:
    start, sign, value = argument.rpartition("=") if argument.startswith("-") else ("", "", argument)
    mark = "@" if value.startswith("@") else ""
    path = value.removeprefix("@")
    if not path or any(c in path for c in "\r\n") or not ("/" in path or "\\" in path):
        return argument
    pure = PurePath(path.replace("\\", "/"))
    rooted = path.startswith(("/", "~", "./", "../", "\\")) or re.match(r"[A-Za-z]:[/\\]", path)
    try:
        there = not any(c.isspace() for c in path) and Path(path).parent.is_dir()
    except OSError:
        there = False
    return f"{start}{sign}{mark}{pure.name}" if rooted or there else argument
