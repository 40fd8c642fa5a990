"""Small trained models that ship with the package, and loading of any Hugging Face model.

>>> from workbench.models import load
>>> model, tokenizer = load("demo-lm")
>>> type(model).__name__
'GPT2LMHeadModel'
"""

from workbench.models.digits import examples
from workbench.models.loading import ModelError, available, card, load
from workbench.models.speech import clips, digit_pairs

__all__ = ["ModelError", "available", "card", "clips", "digit_pairs", "examples", "load"]
