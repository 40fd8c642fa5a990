"""Every token comes out as text that can be seen and cannot turn the page around."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.hostile import HOSTILE
from workbench.tokens import piece, plain_text, plotly_text, visible, visible_text


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


class ByteLevel:
    """A byte-level vocabulary of a few pieces, decoded as such tokenizers do."""

    pieces = ("Ġthe", "ðŁ", "ĺĢ", "é", "Ã©", "aðŁ", "\ufffd", "<0xF0>")

    def decode(self, ids: list[int], **_: bool) -> str:
        from tokenizers import decoders

        if self.pieces[ids[0]].startswith("<0x"):
            return "\ufffd"
        return decoders.ByteLevel().decode([self.pieces[i] for i in ids])

    def convert_ids_to_tokens(self, token: int) -> str:
        return self.pieces[token]


def test_parts_of_characters_are_shown_as_bytes() -> None:
    tokenizer = ByteLevel()
    shown = [piece(tokenizer, i) for i in range(len(tokenizer.pieces))]
    assert shown == [" the", "⟨F0⟩⟨9F⟩", "⟨98⟩⟨80⟩", "⟨E9⟩", "é", "a⟨F0⟩⟨9F⟩", "\ufffd", "⟨F0⟩"]


@pytest.mark.parametrize(("token", "shown"), HOSTILE.items(), ids=ascii)
def test_hostile_tokens_come_out_as_agreed(token: str, shown: str) -> None:
    assert visible(token) == shown


@pytest.mark.parametrize("token", HOSTILE)
def test_text_of_plotly_reads_as_the_token_is_shown(token: str) -> None:
    text = plotly_text(token)
    assert not {"<", ">"} & set(text)
    assert plain_text(text) == HOSTILE[token]


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        ("\U0001f469\u200d\U0001f680", "\U0001f469\u200d\U0001f680"),  # one emoji of two
        ("\u2764\ufe0f\u200d\U0001f525", "\u2764\ufe0f\u200d\U0001f525"),
        ("\u0645\u06cc\u200c\u062e", "\u0645\u06cc\u200c\u062e"),  # Persian
        ("\u0915\u094d\u200d\u0937", "\u0915\u094d\u200d\u0937"),  # Devanagari
        ("pass\u200dword", "pass⟨U+200D⟩word"),
        ("a\u200cb", "a⟨U+200C⟩b"),
        ("\u200d", "⟨U+200D⟩"),
        ("\u0645\u200d", "\u0645⟨U+200D⟩"),
        ("\U0001f469\u200c\U0001f680", "\U0001f469⟨U+200C⟩\U0001f680"),
    ],
)
def test_joiners_stay_where_writing_needs_them(token: str, shown: str) -> None:
    assert visible(token) == visible_text(token) == shown
