"""Loads models by name: the ones that ship with the package, local folders, and Hugging Face names."""

from __future__ import annotations

import json
import logging
import os
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import WorkbenchError, nearest
from workbench.storage.disk import as_path

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)
_SHIPPED = Path(__file__).parent / "shipped"
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "vocab.txt", "vocab.json",
)  # fmt: skip
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
# Short names of TransformerLens for models that the hub keeps under another name; the rest have the same spelling.
_ALIASES = {
    "gpt2-small": "gpt2",
    **{f"pythia-{size}": f"EleutherAI/pythia-{size}" for size in ("14m", "31m", "70m", "160m", "410m", "1b", "1.4b")},
    **{f"gpt-neo-{size.lower()}": f"EleutherAI/gpt-neo-{size}" for size in ("125m", "1.3B", "2.7B")},
    **{f"opt-{size}": f"facebook/opt-{size}" for size in ("125m", "1.3b", "2.7b")},
    "tiny-stories-33M": "roneneldan/TinyStories-33M",
    "bert-base-cased": "google-bert/bert-base-cased",
}


class ModelError(WorkbenchError):
    """A model that cannot be found or loaded."""


def available() -> dict[str, str]:
    """Names of the models that ship with the package, each with one line on what it is.

    >>> sorted(available())
    ['demo-lm', 'demo-lm-plateau', 'demo-s2t', 'demo-vit', 'demo-vlm']
    """
    return {path.parent.name: json.loads(path.read_text(encoding="utf-8"))["summary"] for path in _cards()}


def card(name: str) -> dict[str, Any]:
    """The card of a shipped model: how it was trained and how well it does on held-out prompts.

    Raises:
        ModelError: no shipped model of that name.

    >>> card("demo-lm")["stored_as"]
    'float16 safetensors, loaded as float32'
    """
    known = {path.parent.name: path for path in _cards()}
    if name not in known:
        raise ModelError(f"no shipped model is called {name!r}", hint=nearest(name, list(known), "model"))
    found: dict[str, Any] = json.loads(known[name].read_text(encoding="utf-8"))
    return found


def load(name: str | Path) -> tuple[PreTrainedModel, Any]:
    """A model in evaluation mode, on SDPA attention where it has it, and its tokenizer.

    Args:
        name: a shipped model (see `available`), a local folder that holds a Hugging Face model, or the name of a model
            on the Hugging Face hub (TransformerLens' short names of common models too), which is fetched unless it is
            in the local cache. A `Path` is always taken as a folder; a folder wins over a name on the hub, a shipped
            model over both.

    Returns:
        The model, of the class its configuration names (so a causal language model has its head), in the precision
        it was stored in (shipped models: float32), and its tokenizer, or its processor where it has no tokenizer;
        None where it has neither, as for a model that was saved without one.

    Raises:
        ModelError: the name is not shipped, no folder, and not on the hub.

    >>> model, tokenizer = load("demo-lm")
    >>> model.training, tokenizer.decode(tokenizer("Then, Mary and John")["input_ids"])
    (False, 'Then, Mary and John')
    """
    if isinstance(name, str) and name in available():
        import torch

        return _load_from(_SHIPPED / name, dtype=torch.float32, use_safetensors=True)
    folder = as_path(name, ModelError)
    if _is_folder(folder):
        if not os.access(folder, os.R_OK | os.X_OK):
            raise ModelError(f"the folder {str(folder)!r} is closed to you", hint="check who may read it")
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"the folder {str(folder)!r} has no config.json, so it is not a Hugging Face model",
                hint="pass the folder that save_pretrained wrote",
            )
        return _load_folder(folder)
    if isinstance(name, Path) or name.startswith((".", "/", "~")):  # no owner or model on the hub begins so
        raise ModelError(f"there is no folder {str(name)!r}", hint="check the path, or pass the name of a model")
    typo = get_close_matches(name.lower().replace("_", "-"), list(available()), n=1, cutoff=0.75)
    if typo and "/" not in name:
        # So close to a shipped name, and without an owner as models on the hub have: no need to go and ask.
        raise ModelError(f"no model is called {name!r}", hint=f'did you mean "{typo[0]}"?')
    return _load_from_hub(name)


def processor(name: str | Path, reads: str) -> Any:
    """What makes a model's inputs of images or sounds.

    Args:
        name: as for `load`. reads: "image" or "audio".

    Returns:
        Its image processor, or its feature extractor.

    Raises:
        ModelError: the model comes without one.
    """
    from transformers import AutoFeatureExtractor, AutoImageProcessor

    where = str(name)
    kind: Any = {"image": AutoImageProcessor, "audio": AutoFeatureExtractor}[reads]
    if where not in available():
        try:
            return kind.from_pretrained(_ALIASES.get(where, where))
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            said = f": {_first_line(error)}"
    else:
        said = ", as it is shipped"
    raise ModelError(
        f"no {reads} processor comes with {where!r}{said}",
        hint="save one beside the model with save_pretrained, or capture it from Python with inputs of your own",
    )


def check_place(device: str | None, dtype: str | None) -> torch.dtype | None:
    """Whether there is such a device, such as "cuda", and floating-point dtype, such as "bfloat16"; None for any.

    Returns:
        The dtype of that name.

    Raises:
        ModelError: there is none.
    """
    import torch

    kinds = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
    if device is not None and device.partition(":")[0] == "meta":
        raise ModelError(f"on {device!r} a model has shapes and no values", hint='"cpu"')
    if dtype is not None and dtype not in kinds:
        raise ModelError(f"no dtype is called {dtype!r}", hint=nearest(dtype, list(kinds), "dtype"))
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise _not_placed(device, error) from error
    return None if dtype is None else kinds[dtype]


def place(model: PreTrainedModel, device: str | None, dtype: str | None) -> PreTrainedModel:
    """The model on a device and in a floating-point dtype, named as in `check_place`; None for as it is.

    Raises:
        ModelError: there is no such device or dtype, or no room.
    """
    from torch import nn

    wanted = check_place(device, dtype)
    try:
        nn.Module.to(model, device=device, dtype=wanted)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise _not_placed(device, error) from error
    return model


def _not_placed(device: str | None, error: Exception) -> ModelError:
    import torch

    there = "cuda" if torch.cuda.is_available() else "cpu"
    return ModelError(f"the model cannot be put on {device!r}: {_first_line(error)}", hint=f'"{there}"')


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # longer than any path
        return False


def _cards() -> list[Path]:
    return sorted(_SHIPPED.glob("*/card.json"))


def _load_folder(folder: Path) -> tuple[PreTrainedModel, Any]:
    from safetensors import SafetensorError

    try:
        return _load_from(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(
            f"the model in {str(folder)!r} cannot be loaded: {_first_line(error)}",
            hint="save it again with save_pretrained, weights and configuration together",
        ) from error


def _load_from_hub(name: str) -> tuple[PreTrainedModel, Any]:
    try:
        return _load_from(_ALIASES.get(name, name))
    except (OSError, ValueError) as error:
        shipped = ", ".join(available())
        if _is_offline(error):
            raise ModelError(
                f"{name!r} is neither shipped ({shipped}) nor a local folder, "
                "and the Hugging Face hub cannot be reached",
                hint=f"go online, pass a folder that holds the model, or use a shipped one: {_suggest(name)}",
            ) from error
        raise ModelError(
            f"{name!r} is neither shipped ({shipped}) nor a local folder, "
            f"nor can it be loaded from the Hugging Face hub: {_first_line(error)}",
            hint=_suggest(name),
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _suggest(name: str) -> str:
    return nearest(name.lower().replace("_", "-"), list(available()), "model")


def _is_offline(error: BaseException) -> bool:
    """Whether the hub could not be reached, as opposed to not having the model; looks along the chain of causes."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, HfHubHTTPError):
            return False
        if isinstance(seen, LocalEntryNotFoundError | OfflineModeIsEnabled | ConnectionError | TimeoutError):
            return True
        seen = seen.__cause__ or seen.__context__
    # transformers words its own OSError when it has swallowed the cause.
    return "couldn't connect" in str(error).lower() or "offline" in str(error).lower()


def _load_from(source: str | Path, **options: Any) -> tuple[PreTrainedModel, Any]:
    """Model and tokenizer from a folder or a hub name, with the errors of transformers."""
    from transformers import AutoConfig

    where = str(source)
    config = AutoConfig.from_pretrained(where)
    cls = _model_class(config)
    try:
        model = cls.from_pretrained(where, attn_implementation="sdpa", **options)
    except (ValueError, ImportError) as error:
        # The model's own refusal names SDPA; anything else is a real failure and would come again.
        if "scaled_dot_product_attention" not in str(error) and "sdpa" not in str(error).lower():
            raise
        log.warning("%s has no SDPA attention; it keeps its own default", where)
        model = cls.from_pretrained(where, **options)
    return model.eval(), _tokenizer(where)


def _model_class(config: Any) -> Any:
    """The class that the configuration names, or the base model of its type where it names none that exists."""
    import transformers

    for architecture in config.architectures or ():
        found = getattr(transformers, architecture, None)
        if found is not None:
            return found
    return transformers.AutoModel


def _tokenizer(where: str) -> Any:
    """The tokenizer, else the processor, else None for a model that was saved without either."""
    from transformers import AutoProcessor, AutoTokenizer

    folder = Path(where)
    for kind, files in ((AutoTokenizer, _TOKENIZER_FILES), (AutoProcessor, _PROCESSOR_FILES)):
        # From a folder without its files transformers makes up an empty tokenizer rather than refuse.
        if folder.is_dir() and not any((folder / file).is_file() for file in files):
            continue
        try:
            return kind.from_pretrained(where)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s has no usable %s: %s", where, kind.__name__, _first_line(error))
    return None
