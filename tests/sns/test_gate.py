"""The gate: every group prompt is seen, every built-in neutral one passes, what text cannot tell is written down."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stereoclinic.prompts.axes import Axis, known_axes, load_axis
from stereoclinic.prompts.occupations import BUILT_IN
from stereoclinic.prompts.sets import group_prompts, load_prompts, write
from stereoclinic.sns.policy import is_neutral, named_groups

#: (axis, prompt, the groups that a person would say it names). Whoever listed the words wrote these too, hard cases on
#: purpose, so rates over them are no estimate for anyone's prompts.
PROMPTS = [
    ("gender", "a photo of a female firefighter", "female"),
    ("gender", "a photo of a male nurse", "male"),
    ("gender", "A PHOTO OF A FEMALE DOCTOR", "female"),
    ("gender", "two women repairing an engine", "female"),
    ("gender", "portrait of a woman pilot, 85mm", "female"),
    ("gender", "a lady judge", "female"),
    ("gender", "a girl's portrait", "female"),
    ("gender", "the chef and her kitchen", "female"),
    ("gender", "a businesswoman in an office", "female"),
    ("gender", "a mother reading to a class", "female"),
    ("gender", "policemen at a crossing", "male"),
    ("gender", "an executive; he wears a grey suit", "male"),
    ("gender", "a teacher, gentleman of the old school", "male"),
    ("gender", "a female-presenting mechanic", "female"),
    ("gender", "a man and a woman at a desk", "female male"),
    ("gender", "the farmer\u2019s wives", "female"),
    ("gender", "males only: a barber shop", "male"),
    ("gender", "a bearded doctor", "male"),
    ("gender", "Maria, a nurse", "female"),
    ("gender", "une femme m\u00e9decin", "female"),
    ("gender", "a photo of a femal doctor", "female"),
    ("gender", "a photo of a doctor", ""),
    ("gender", "a human being in a lab coat", ""),
    ("gender", "a German manager", ""),
    ("gender", "a midwife at work", ""),
    ("gender", "a manager with a mango", ""),
    ("gender", "a herbalist in a shed", ""),
    ("gender", "a chef with herbs and a theme", ""),
    ("gender", "this historian, smiling", ""),
    ("gender", "a mechanic by a man-made lake", ""),
    ("gender", "a firefighter, a salesperson and a chairperson", ""),
    ("gender", "an engineer holding a motherboard", ""),
    ("gender", "a cleaner making a king-size bed", ""),
    ("gender", "a cashier at Burger King", ""),
    ("gender", "a clerk with a women's magazine", ""),
    ("skin", "a photo of a dark-skinned doctor", "dark"),
    ("skin", "a photo of a dark skinned doctor", "dark"),
    ("skin", "a Light-Skinned teacher", "light"),
    ("skin", "a pilot with dark skin", "dark"),
    ("skin", "a Black woman at a desk", "dark"),
    ("skin", "two white men in a court", "light"),
    ("skin", "a fair\u2011skinned judge", "light"),
    ("skin", "a photo of a Black doctor", "dark"),
    ("skin", "a photo of a Nigerian doctor", "dark"),
    ("skin", "a doctor in a white coat", ""),
    ("skin", "a black and white photo of a judge", ""),
    ("skin", "a chef in dark light", ""),
    ("skin", "a farmer with a black cat", ""),
    ("skin", "a nurse, light background", ""),
    ("age", "a photo of an old doctor", "old"),
    ("age", "a photo of a young judge", "young"),
    ("age", "an elderly librarian", "old"),
    ("age", "a 70-year-old farmer", "old"),
    ("age", "a teacher in her sixties", "old"),
    ("age", "a teenage chef", "young"),
    ("age", "an old photograph of an old doctor", "old"),
    ("age", "a child dressed as a pilot", "young"),
    ("age", "a 20-year-old farmer", "young"),
    ("age", "a grey-haired judge", "old"),
    ("age", "a photo of a doctor", ""),
    ("age", "an old photograph of a doctor", ""),
    ("age", "old-fashioned portrait of a nurse", ""),
    ("age", "a librarian holding a golden book", ""),
    ("age", "a senior executive", ""),
    ("age", "a chef, bold colours, soldering iron", ""),
    ("age", "a mechanic in front of an old, rusty car", ""),
    ("age", "a photo of a kidney specialist", ""),
]

#: What the gate says of those of them that it gets wrong.
WRONG = {
    # missed: what is implied, another language, a misspelling, a colour that may be anything's
    "a bearded doctor": "",
    "Maria, a nurse": "",
    "une femme m\u00e9decin": "",
    "a photo of a femal doctor": "",
    "a photo of a Black doctor": "",
    "a photo of a Nigerian doctor": "",
    "a grey-haired judge": "",
    # false alarms: words used otherwise
    "a cashier at Burger King": "male",
    "a clerk with a women's magazine": "female",
    "a mechanic in front of an old, rusty car": "old",
    # left alone, as it should be, for the wrong group
    "a 20-year-old farmer": "old",
}


@pytest.mark.parametrize(("axis", "prompt", "groups"), PROMPTS)
def test_prompts_by_hand(axis, prompt, groups):
    assert " ".join(named_groups(prompt, load_axis(axis))) == WRONG.get(prompt, groups)


def test_the_rates_over_these_prompts_are_what_is_said_of_them():
    missed = [prompt for axis, prompt, groups in PROMPTS if groups and is_neutral(prompt, load_axis(axis))]
    alarms = [prompt for axis, prompt, groups in PROMPTS if not groups and not is_neutral(prompt, load_axis(axis))]
    naming = sum(bool(groups) for _, _, groups in PROMPTS)
    assert (len(missed), naming, len(alarms), len(PROMPTS) - naming) == (7, 40, 3, 27)
    assert set(missed) | set(alarms) == {prompt for prompt in WRONG if prompt != "a 20-year-old farmer"}


@pytest.mark.parametrize("name", known_axes())
@pytest.mark.parametrize("prompts", BUILT_IN)
def test_every_group_prompt_names_its_group_alone_and_no_neutral_one_names_any(name, prompts):
    axis = load_axis(name)
    for row in load_prompts(prompts):
        assert is_neutral(write(row), axis)
        assert [named_groups(text, axis) for text in group_prompts(row, axis)] == [(group,) for group in axis.groups]


@pytest.mark.parametrize("name", known_axes())
def test_every_listed_word_names_its_group_and_every_exception_none(name):
    axis = load_axis(name)
    for group, words in axis.also.items():
        for word in words:
            for text in (f"a {word}.", word.upper(), f"the {word}'s desk", f"the {word}\u2019s desk", f'"{word}s"'):
                assert group in named_groups(text, axis), text
    for phrase in axis.unless:
        assert is_neutral(f"a doctor with an {phrase}", axis), phrase
        assert is_neutral(f"a doctor with {phrase.replace(' ', '-')}s", axis), phrase


@given(st.sampled_from(["female", "male"]), st.text("abcxyz", min_size=1, max_size=4))
def test_no_word_is_found_inside_another(word, letters):
    axis = Axis("gender", ("female", "male"), ("female", "male"))
    assert named_groups(f"a {letters}{word} doctor", axis) in ((), ("female",) if letters + word == "female" else ())
    assert named_groups(f"a {word}{letters} doctor", axis) == ()


def test_a_phrase_is_found_in_any_spelling_of_its_gaps():
    axis = Axis("x", ("a", "b"), ("dark-skinned", "c++"), also={"b": ("very light",)})
    for text in ("dark skinned", "dark-skinned", "dark  skinned", "Dark\u2010Skinned", "darkskinned", "dark_skinned"):
        assert named_groups(f"a {text} pilot", axis) == ("a",)
    assert named_groups("a darkly skinned pilot", axis) == ()
    assert named_groups("a (c++) pilot", axis) == ("b",)  # nothing in a word is read as a pattern
    assert named_groups("a cc pilot", axis) == ()
    assert named_groups("a dark-skinned and a very light pilot", axis) == ("a", "b")


ABROAD = Axis(
    "gender", ("f", "m"), ("\u5973", "\u7537"),
    also={
        "f": (
            "femme m\u00e9decin", "\u5973\u6027", "\u0e1c\u0e39\u0e49\u0e2b\u0e0d\u0e34\u0e07",
            "\u304a\u3070\u3042\u3055\u3093",
        ),
        "m": ("\u0e1c\u0e39\u0e49\u0e0a\u0e32\u0e22", "gar\u00e7on"),
    },
    unless=("\u7537\u88c5",),
)  # fmt: skip


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
@pytest.mark.parametrize(
    ("prompt", "groups"),
    [
        ("\u4e00\u4f4d\u5973\u533b\u751f\u7684\u7167\u7247", ("f",)),
        ("\u4e00\u4f4d\u533b\u751f\u7684\u7167\u7247", ()),
        ("\u7537\u88c5\u7684\u5e97", ()),
        (
            "\u0e20\u0e32\u0e1e\u0e41\u0e1e\u0e17\u0e22\u0e4c\u0e1c\u0e39\u0e49\u0e2b\u0e0d\u0e34\u0e07\u0e22\u0e34\u0e49\u0e21",
            ("f",),
        ),
        ("\u533b\u8005\u306e\u304a\u3070\u3042\u3055\u3093\u306e\u5199\u771f", ("f",)),
        ("une FEMME M\u00c9DECIN", ("f",)),
        ("un gar\u00e7on", ("m",)),
        ("un garcon", ()),
    ],
)
def test_words_of_every_script_in_every_unicode_form(form, prompt, groups):
    assert named_groups(unicodedata.normalize(form, prompt), ABROAD) == groups


@pytest.mark.parametrize("name", known_axes())
def test_wide_letters_capitals_and_counts_hide_no_group(name):
    axis = load_axis(name)
    for group, words in axis.also.items():
        for word in (axis.words[axis.index(group)], *words):
            wide = "".join(chr(ord(sign) + 0xFEE0) if "!" <= sign <= "~" else sign for sign in word)
            for text in (wide, wide.upper(), f"1{word}", f"solo, 2{word}s, smiling"):
                assert group in named_groups(text, axis), text


@pytest.mark.parametrize("prompt", ["1girl, doctor", "2boys", "doctor,1GIRL", "10men at a desk", "1\u5973"])
def test_a_count_stands_before_a_word(prompt):
    assert not is_neutral(prompt, ABROAD if "\u5973" in prompt else load_axis("gender"))


@pytest.mark.parametrize("prompt", ["a x1man mask", "4manual workers", "unit b2boys", "mp3her0"])
def test_a_number_within_a_word_does_not(prompt):
    assert is_neutral(prompt, load_axis("gender"))


def test_an_axis_of_ones_own_has_its_words_alone():
    axis = Axis("gender", ("f", "m"), ("female", "male"))
    assert is_neutral("a woman", axis)
    assert not is_neutral("a female", axis)
