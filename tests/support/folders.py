"""Build a model folder once and keep it for later test runs, in `.cache/models` of the repository."""

import hashlib
import inspect
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

CACHE = Path(__file__).parents[2] / ".cache" / "models"


def model_folder(builder: ModuleType, cache: Path = CACHE) -> Path:
    """The folder that `builder.build` writes, from the cache when neither builder nor packages changed since.

    Several processes may ask at once: each builds in a folder of its own, and the first to finish puts it in place.

    Raises `importlib.metadata.PackageNotFoundError` when one of `builder.PACKAGES` is not installed.
    """
    versions = [f"{name}=={version(name)}" for name in builder.PACKAGES]
    key = hashlib.sha256("\n".join([inspect.getsource(builder), *versions]).encode()).hexdigest()[:12]
    folder = cache / f"{builder.__name__.rpartition('.')[2]}-{key}"
    if folder.exists():
        return folder

    cache.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".building-", dir=cache))
    try:
        builder.build(unfinished)
        unfinished.chmod(0o755)  # mkdtemp's is private
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.exists():  # otherwise another process was quicker
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder
