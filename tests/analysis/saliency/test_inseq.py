"""Gradients of decoders against inseq, on the log-probability of each token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

import workbench
from support.judges import judges, missing
from support.tiny import family, make

PROMPT, SAID = [7, 3, 9, 5], [11, 4, 8]


def by_words(vocab: int) -> hf.PreTrainedTokenizerFast:
    """A tokenizer whose token i is the word "wi"; the last one is all special tokens."""
    words = {f"w{i}": i for i in range(vocab)}
    made = Tokenizer(models.WordLevel(words, unk_token=f"w{vocab - 1}"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict.fromkeys(("unk_token", "pad_token", "bos_token", "eos_token"), f"w{vocab - 1}")
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, **special)


def of_inseq(model: Any, method: str, **options: Any) -> torch.Tensor:
    """[said, position] its attributions, summed over the embedding."""
    try:
        with judges():
            import inseq
            from inseq.attr.step_functions import probability_fn

            inseq.register_step_function(lambda args: probability_fn(args).log(), "ln", overwrite=True)
            explainer = inseq.load_model(model, method, tokenizer=by_words(model.config.vocab_size))
            texts = [" ".join(f"w{i}" for i in ids) for ids in (PROMPT, PROMPT + SAID)]
            out = explainer.attribute(*texts, attributed_fn="ln", show_progress=False, **options)
    except ModuleNotFoundError as error:
        missing(error)
    found = out.sequence_attributions[0].target_attributions
    return found.sum(-1).nan_to_num(0.0)[:-1].T


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
@pytest.mark.parametrize("method", ["gradient_x_input", "integrated_gradients"])
def test_against_inseq(name: str, method: str) -> None:
    torch.manual_seed(0)
    model = make(family(name)).double()
    options = {"n_steps": 32} if method == "integrated_gradients" else {}
    theirs = of_inseq(model, {"gradient_x_input": "input_x_gradient"}.get(method, method), **options)
    embedding = model.get_input_embeddings().weight.detach()
    baseline = embedding[-1].expand(1, len(PROMPT + SAID) - 1, -1)  # inseq's: the unknown token
    with workbench.attach(model) as wb:
        ours = workbench.saliency(
            wb, {"input_ids": torch.tensor([PROMPT])}, method, hypothesis=torch.tensor(SAID), baseline=baseline,
            progress=False, **options,
        )  # fmt: skip
    assert theirs.abs().max() > 1e-3
    torch.testing.assert_close(ours.scores.double(), theirs.double(), atol=1e-6, rtol=1e-5)
