"""What is shown of a text: its printable signs as they are, the others as escapes that can be read back."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stereoclinic.io.text import printable


@given(st.text(st.characters(exclude_characters="\\")))
@example("\x1b]8;;http://x\x07a\x1b[2J\r\u202e\u2028\x85\x7f\udce9")
def test_what_is_shown_is_printable_and_says_what_was_there(text: str) -> None:
    shown = printable(text)
    assert all(sign.isprintable() or sign in "\u200c\u200d" for sign in shown)
    assert shown.encode("raw_unicode_escape", "surrogatepass").decode("unicode_escape") == text
    assert printable(shown) == shown


@given(st.text(st.characters(codec="utf-8")).filter(str.isprintable))
def test_what_is_printable_stays(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", r"\x1b[31mred"),
        ("a\rb\nc", r"a\rb\nc"),
        ("\u202eevil", r"\u202eevil"),
        ("\u06cc\u200c\u062e", "\u06cc\u200c\u062e"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_as_python_writes_it(text: str, shown: str) -> None:
    assert printable(text) == shown
