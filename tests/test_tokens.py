"""Every token comes out as text that can be seen and cannot turn the page around."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.tokens import visible, visible_text


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        ("the", "the"),
        (" the", "␣the"),
        ("  ", "␣␣"),
        ("a b ", "a b␣"),
        ("", "∅"),
        ("\n", "⏎"),
        ("\r\n\t", "␍⏎⇥"),
        ("\x00", "⟨U+0000⟩"),
        ("\u202eabc", "⟨U+202E⟩abc"),
        ("\u2028", "⟨U+2028⟩"),
        ("\ud83d", "⟨U+D83D⟩"),
        ("\u200b", "⟨U+200B⟩"),
        ("\u00a0x", "⍽x"),
        ("\u3000", "⟨U+3000⟩"),
        ("\u0301", "◌\u0301"),
        ("<b>&amp;</b>", "<b>&amp;</b>"),
        ("日本", "日本"),
    ],
)
def test_tokens_are_shown_with_symbols_for_what_cannot_be_seen(token: str, shown: str) -> None:
    assert visible(token) == shown


def test_long_tokens_are_cut_and_say_so() -> None:
    assert visible("x" * 5000, longest=10) == "xxxxxxxxxx… (5,000 characters)"
    assert visible_text("x" * 5000, longest=10) == "xxxxxxxxxx… (5,000 characters)"


def test_running_text_keeps_its_lines() -> None:
    assert visible_text(" a\r\n\tb\u202e\r") == " a\n\tb⟨U+202E⟩␍"


@given(st.text(st.characters(), max_size=40))
def test_nothing_invisible_is_left(token: str) -> None:
    shown = visible(token)
    assert shown
    assert not {unicodedata.category(c) for c in shown} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    shown.encode("utf-8")
