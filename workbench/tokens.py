"""Tokens and prompts as text that can be seen: blanks, control characters and direction marks become symbols.

Token text is input from outside. It may hold anything a vocabulary holds, so nothing here is trusted to be printable,
to run from left to right, or to be valid Unicode.
"""

from __future__ import annotations

import codecs
import html
import re
import unicodedata
from typing import Any

LONGEST_TOKEN = 200
LONGEST_TEXT = 20_000

_SYMBOLS = {"\n": "⏎", "\r": "␍", "\t": "⇥", "\u00a0": "⍽"}
# Control, format, surrogate, private and unassigned characters, and the separators that break or hide a line.
_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


_JOINERS = "\u200c\u200d"
# Beginnings of the names of letters that change their form where a joiner stands between two of them.
_JOINED = (
    "ARABIC", "SYRIAC", "NKO", "MANDAIC", "MONGOLIAN", "DEVANAGARI", "BENGALI", "GURMUKHI", "GUJARATI", "ORIYA",
    "TAMIL", "TELUGU", "KANNADA", "MALAYALAM", "SINHALA", "MYANMAR", "KHMER", "TIBETAN",
)  # fmt: skip
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_HALF = re.compile("[\ud800-\udfff]")


def _byte_alphabet() -> dict[str, int]:
    """How byte-level vocabularies write bytes: printable Latin-1 as it is, the rest from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {**{chr(b): b for b in plain}, **{chr(0x100 + i): b for i, b in enumerate(rest)}}


_BYTES = _byte_alphabet()


def piece(tokenizer: Any, token: int) -> str:
    """The text of a token id. Bytes that are only a part of a character come as hexadecimal: "⟨F0⟩⟨9F⟩".

    Args:
        tokenizer: anything with `decode`; `convert_ids_to_tokens` tells the bytes.
    """
    text: str = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if "\ufffd" not in text or not hasattr(tokenizer, "convert_ids_to_tokens"):
        return text
    raw = str(tokenizer.convert_ids_to_tokens(token))
    single = _BYTE.fullmatch(raw)
    if single:
        held = bytes([int(single[1], 16)])
    elif raw and all(character in _BYTES for character in raw):
        held = bytes(_BYTES[character] for character in raw)
    else:
        return text  # the vocabulary holds the replacement character itself
    return held.decode("utf-8", errors="workbench.hex")


def _as_hex(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "".join(f"⟨{byte:02X}⟩" for byte in error.object[error.start : error.end]), error.end


codecs.register_error("workbench.hex", _as_hex)


def utf8(text: str) -> str:
    """The text with halves of characters (lone surrogates) as their numbers: files and tables take no others.

    >>> utf8("\\ud83d a")
    '\\\\ud83d a'
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8") if _HALF.search(text) else text


def visible(token: str, longest: int = LONGEST_TOKEN) -> str:
    """The token with every character to be seen; one longer than `longest` is cut and says how long it was.

    >>> visible(" the"), visible("\\n"), visible(""), visible("a\\u202eb")
    ('␣the', '⏎', '∅', 'a⟨U+202E⟩b')
    """
    if token == "":
        return "∅"
    head = token[:longest]
    core = head.strip(" ")
    start = len(head) - len(head.lstrip(" "))
    end = len(head) - len(core) - start
    shown = "␣" * start + _symbols(core) + "␣" * end
    if unicodedata.category(shown[0]).startswith("M"):
        shown = "◌" + shown  # a mark on its own would sit on whatever stands before it on the page
    return shown + (f"… ({len(token):,} characters)" if len(token) > longest else "")


def visible_text(text: str, longest: int = LONGEST_TEXT) -> str:
    """Running text with its line breaks and tabs kept and everything else invisible made visible.

    >>> visible_text("two\\r\\nlines\\x00")
    'two\\nlines⟨U+0000⟩'
    """
    lines = text[:longest].replace("\r\n", "\n")
    shown = _symbols(lines, kept="\n\t")
    return shown + (f"… ({len(text):,} characters)" if len(text) > longest else "")


def _symbols(text: str, kept: str = "") -> str:
    """Every character to be seen; joiners stay where writing needs them, since they are seen in what they join."""
    return "".join(
        c if c in kept or (c in _JOINERS and _joins(text, i)) else _symbol(c, blank_is_fine=True)
        for i, c in enumerate(text)
    )


def _joins(text: str, at: int) -> bool:
    """Whether a joiner stands between two emoji, or between letters of a script that joins them.

    >>> [_joins(text, 1) for text in ("\u0645\u200c\u06cc", "a\u200db", "\U0001f469\u200d\U0001f680")]
    [True, False, True]
    """
    before, after = text[:at].rstrip("\ufe0f"), text[at + 1 :]
    if not before or not after:
        return False
    sides = before[-1], after[0]
    if text[at] == "\u200d" and all(unicodedata.category(c) in ("So", "Sk") for c in sides):
        return True
    return all(unicodedata.name(c, "").startswith(_JOINED) for c in sides)


def _symbol(character: str, *, blank_is_fine: bool) -> str:
    if character in _SYMBOLS:
        return _SYMBOLS[character]
    category = unicodedata.category(character)
    if category in _INVISIBLE or (category == "Zs" and not (character == " " and blank_is_fine)):
        return f"⟨U+{ord(character):04X}⟩"
    return character


_TAG = re.compile(r"</?[A-Za-z][^<>]*>")


def plotly_text(token: str, longest: int = LONGEST_TOKEN) -> str:
    """A token for any text of a plotly figure: tick labels, names, hover text, titles.

    plotly reads such text as a little HTML, so that "<b>" would be a style and "<a>" a link. Whoever builds a figure
    must pass every text from outside through here.

    >>> plotly_text(" <b>")
    '␣&lt;b&gt;'
    """
    return html.escape(visible(token, longest), quote=False)


def plain_text(text: str) -> str:
    """Text of a plotly figure as a reader sees it: without styles, and with characters in place of entities.

    >>> plain_text("<i>p</i>(&lt;b&gt;)<br>mean")
    'p(<b>) mean'
    """
    broken = re.sub(r"<br\s*/?>", " ", str(text))
    return html.unescape(_TAG.sub("", broken))
