"""The peers that need some care to start."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent.parent / ".cache" / "peers"
"""Where `make bench` puts peers that are no dependency of the project (see peers.txt)."""


def bridge(model: Any) -> Any:
    """TransformerLens' bridge on a GPT-2 model; it turns the model to eager attention."""
    from tokenizers import Tokenizer, models
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # The bridge wants a tokenizer that came from a folder, and reads it again: the folder must outlive this function.
    folder = tempfile.TemporaryDirectory()
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    special = {"unk_token": "a", "bos_token": "b", "eos_token": "b", "pad_token": "b"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder.name)
    tokenizer = AutoTokenizer.from_pretrained(folder.name)
    found = TransformerBridge.boot_transformers("gpt2", hf_model=model, tokenizer=tokenizer, device="cpu")
    found.__dict__["_folder"] = folder
    return found


def nnsight(model: Any) -> Any:
    """nnsight's wrapper."""
    if not FOLDER.exists():
        raise SystemExit(
            "nnsight is missing: pip install --no-deps --target .cache/peers -r benchmarks/peers.txt, or `make bench`"
        )
    sys.path.append(str(FOLDER))
    from nnsight import NNsight

    return NNsight(model)
