"""The vocabulary of the demonstration model and its word-level tokenizer: one token per word, mark or newline."""

from __future__ import annotations

from collections.abc import Iterable
from string import Formatter
from typing import TYPE_CHECKING

from workbench.tasks.colored_objects import COLOURS, OBJECTS, STARTS, SURFACES
from workbench.tasks.greater_than import NOUNS
from workbench.tasks.induction import WORDS
from workbench.tasks.ioi import GIFTS, NAMES, PLACES, TEMPLATES
from workbench.tasks.pieces import PIECE_PATTERN, pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, UNKNOWN = "<pad>", "<unk>"


def vocabulary() -> dict[str, int]:
    """Every word of the four tasks and every two-digit number, with its token id; padding is 0, unknown words are 1.

    >>> words = vocabulary()
    >>> words["<pad>"], words["<unk>"], "Mary" in words, "99" in words
    (0, 1, True, True)
    """
    words: dict[str, None] = dict.fromkeys([PAD, UNKNOWN, "\n", ",", ".", "?", ":"])
    words.update(dict.fromkeys(_task_words()))
    words.update(dict.fromkeys(f"{number:02d}" for number in range(100)))
    return {word: index for index, word in enumerate(words)}


def _task_words() -> Iterable[str]:
    for template in TEMPLATES.values():
        for literal, _, _, _ in Formatter().parse(template):
            yield from pieces(literal)
    yield from (*NAMES, *PLACES, *GIFTS)
    yield from pieces("Q: On the, a an and. What color is the?\nA:")
    for phrase in (*STARTS, *SURFACES):
        yield from pieces(phrase)
    yield from OBJECTS
    for colour in COLOURS:
        yield from (colour, colour.capitalize())
    yield from pieces("The lasted from the year to")
    yield from NOUNS
    yield from WORDS


def build_tokenizer(n_ctx: int) -> PreTrainedTokenizerFast:
    """A fast tokenizer that splits text as `workbench.tasks.pieces` does.

    Args:
        n_ctx: longest input of the model, in tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(vocabulary(), unk_token=UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE_PATTERN), behavior="removed", invert=True)
    # Joins with spaces and pulls commas, full stops and question marks back to the word before.
    words.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token=UNKNOWN,
        pad_token=PAD,
        eos_token=PAD,
        model_max_length=n_ctx,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
