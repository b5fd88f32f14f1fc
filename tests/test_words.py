"""Words are found whatever their case and Unicode form, and as whole words where a script has spaces."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stereoclinic.io.text import any_of, folded, whole_word

FORMS = ("NFC", "NFD", "NFKC", "NFKD")


@given(st.text(max_size=20), st.sampled_from(FORMS))
def test_forms_of_a_text_are_folded_to_one(text: str, form: str):
    text = unicodedata.normalize("NFC", text)
    assert folded(unicodedata.normalize(form, text))[0] == folded(text)[0]
    assert folded(folded(text)[0])[0] == folded(text)[0]


@given(st.text(max_size=20))
def test_every_place_is_one_of_the_text_and_in_order(text: str):
    found, places = folded(text)
    assert len(places) == len(found) + 1 and places[-1] == len(text)
    assert list(places) == sorted(places) and (not text or places[0] >= 0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("une M\u00c9DECIN", "m\u00e9decin"),
        ("a \uff57\uff4f\uff4d\uff41\uff4e", "woman"),
        ("STRASSE", "stra\u00dfe"),
        ("\uc5ec\uc131 \uc758\uc0ac", "\uc5ec\uc131"),
        ("a wo\u00adman", "woman"),
        ("\u3060\u3093\u305b\u3044\u306e\u533b\u8005", "\u3060\u3093\u305b\u3044"),
    ],
)
def test_a_word_is_found_in_every_form(form: str, text: str, phrase: str):
    found = folded(unicodedata.normalize(form, text))[0]
    assert whole_word(phrase, found) and any_of((phrase,)).search(found)


@pytest.mark.parametrize(
    ("text", "phrase", "found"),
    [
        ("a woman", "man", False),
        ("caf\u00e9", "cafe", False),
        ("cafe\u0301s", "caf\u00e9", False),
        ("\u4e00\u4f4d\u5973\u533b\u751f", "\u5973\u533b\u751f", True),
        ("male\u533b\u751f", "male", True),  # another script ends a word
        ("female\u533b\u751f", "male", False),
        ("\u304c\u3044", "\u304b", False),  # the same letter with a sign on it is another
        ("\uc5ec\uc131\uc2a4\ub7fd\ub2e4", "\uc5ec\uc131", False),  # Korean has spaces
        ("c++", "c++", True),
        ("c", "c++", False),
    ],
)
def test_where_a_word_ends(text: str, phrase: str, found: bool):
    assert bool(whole_word(phrase, folded(text)[0])) is found
    assert bool(any_of((phrase,)).search(folded(text)[0])) is (found or text == "cafe\u0301s")


def test_no_phrase_is_found_nowhere():
    for phrases in ((), ("",), ("\u200b",), (" - ",)):
        assert not any_of(phrases).search("a - b")
    assert whole_word("", "a") is None and whole_word("\u200b ", "a") is None


@given(st.text("abA \n\u00e9\u0301\u533b\uff41-", max_size=12), st.text("ab \u00e9\u533b", min_size=1, max_size=3))
def test_what_is_found_is_the_phrase_and_has_ends(text: str, phrase: str):
    whole, places = folded(text)
    if (found := whole_word(phrase, whole)) is None:
        return
    start, end = (places[at] for at in found)
    assert folded(text[start:end])[0].strip() == folded(phrase)[0].strip()
    for before, after in ((text[:start][-1:], phrase.strip()[0]), (text[end:][:1], phrase.strip()[-1])):
        assert not before.isalnum() or "\u533b" in (before, after)
