"""Tokens and prompts as text that can be seen: blanks, control characters and direction marks become symbols.

Token text is input from outside. It may hold anything a vocabulary holds, so nothing here is trusted to be printable,
to run from left to right, or to be valid Unicode.
"""

from __future__ import annotations

import unicodedata

LONGEST_TOKEN = 200
LONGEST_TEXT = 20_000

_SYMBOLS = {"\n": "⏎", "\r": "␍", "\t": "⇥", "\u00a0": "⍽"}
# Control, format, surrogate, private and unassigned characters, and the separators that break or hide a line.
_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


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
    shown = "␣" * start + "".join(_symbol(character, blank_is_fine=True) for character in core) + "␣" * end
    if unicodedata.category(shown[0]).startswith("M"):
        shown = "◌" + shown  # a mark on its own would sit on whatever stands before it on the page
    return shown + (f"… ({len(token):,} characters)" if len(token) > longest else "")


def visible_text(text: str, longest: int = LONGEST_TEXT) -> str:
    """Running text with its line breaks and tabs kept and everything else invisible made visible.

    >>> visible_text("two\\r\\nlines\\x00")
    'two\\nlines⟨U+0000⟩'
    """
    lines = text[:longest].replace("\r\n", "\n")
    shown = "".join(c if c in "\n\t" else _symbol(c, blank_is_fine=True) for c in lines)
    return shown + (f"… ({len(text):,} characters)" if len(text) > longest else "")


def _symbol(character: str, *, blank_is_fine: bool) -> str:
    if character in _SYMBOLS:
        return _SYMBOLS[character]
    category = unicodedata.category(character)
    if category in _INVISIBLE or (category == "Zs" and not (character == " " and blank_is_fine)):
        return f"⟨U+{ord(character):04X}⟩"
    return character
