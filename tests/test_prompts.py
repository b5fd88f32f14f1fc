"""Prompts: articles agree, the group's word goes before the person, and the person is found or asked for."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from stereoclinic.errors import InputError
from stereoclinic.prompts.axes import Axis, known_axes, load_axis
from stereoclinic.prompts.sets import (
    BUILT_IN,
    BUILT_IN_PLAIN,
    COLUMNS,
    TEMPLATES,
    digest,
    group_prompts,
    load_plain_prompts,
    load_prompts,
    occupation_prompts,
    write,
)
from stereoclinic.sns.policy import is_neutral

GENDER = load_axis("gender")


def from_text(folder: Path, *lines: str) -> Dataset:
    path = folder / "prompts.txt"
    path.write_text("\n".join(lines) + "\n")
    return load_prompts(path)


def from_table(folder: Path, *rows: dict) -> Dataset:
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return load_prompts(path)


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_sets(name: str):
    prompts = load_prompts(name)
    assert tuple(prompts.column_names) == COLUMNS
    assert prompts["label"] == BUILT_IN[name]
    how = "successful " if "successful" in TEMPLATES[name] else ""
    for row in prompts:
        vowel = (how or row["label"])[0].lower() in "aeiou"
        assert write(row) == f"a photo of {'an' if vowel else 'a'} {how}{row['label']}"
        expected = [f"a photo of a {how}{group} {row['label']}" for group in ("female", "male")]
        assert group_prompts(row, GENDER) == expected
    assert len(set(prompts["label"])) == len(prompts)


@pytest.mark.parametrize("name", BUILT_IN_PLAIN)
def test_built_in_sets_without_a_person_are_taken_as_they_are_and_name_no_group(name: str):
    prompts = load_plain_prompts(name)
    assert tuple(prompts.column_names) == COLUMNS
    assert [write(row) for row in prompts] == list(prompts["label"]) == BUILT_IN_PLAIN[name]
    assert len(set(prompts["label"])) == len(prompts) > 10
    assert all(is_neutral(prompt, load_axis(axis)) for prompt in prompts["label"] for axis in known_axes())
    assert load_plain_prompts(name, 3)["label"] == BUILT_IN_PLAIN[name][:3]


def test_the_36_occupations_of_winobias_share_none_with_those_to_train_on():
    judged, held_out = load_prompts("winobias")["label"], load_prompts("winobias-train")["label"]
    assert (len(judged), len(held_out)) == (36, 30)
    assert not {each.casefold() for each in judged} & {each.casefold() for each in held_out}
    assert load_prompts("winobias-successful")["label"] == judged
    assert digest(load_prompts("winobias-successful")) != digest(load_prompts("winobias"))


def test_occupations_meet_every_template():
    templates = [
        "A painting of a {group} {occupation}",
        "a {group} {occupation} at work",
        "Photo of {group} {occupation}",
    ]
    rows = occupation_prompts(["attendant", "cook"], templates)
    assert rows["label"] == ["attendant"] * 3 + ["cook"] * 3
    assert [write(row) for row in rows] == [
        "A painting of an attendant",
        "an attendant at work",
        "Photo of attendant",
        "A painting of a cook",
        "a cook at work",
        "Photo of cook",
    ]
    assert write(rows[1], "female") == "a female attendant at work"
    assert write(rows[3], "old") == "A painting of an old cook"
    assert write(rows[5], "old") == "Photo of old cook"


@pytest.mark.parametrize("template", ["a photo", "a photo of a {occupation}", "a {group}", "a {occupation} {group}"])
def test_templates_without_a_place_are_refused(template: str):
    with pytest.raises(InputError, match=r"needs '\{group\} \{occupation\}' in it, once"):
        occupation_prompts(["cook"], [template])


@pytest.mark.parametrize(
    ("prompt", "word", "expected"),
    [
        ("a photo of a doctor", "old", "a photo of an old doctor"),
        ("a photo of an engineer", "young", "a photo of a young engineer"),
        ("a portrait of the judge", "female", "a portrait of the female judge"),
        ("a photo of doctors", "old", "a photo of old doctors"),
        ("a photo of a doctor", "European", "a photo of a European doctor"),
        ("a photo of a doctor", "unhappy", "a photo of an unhappy doctor"),
        ("a photo of a doctor", "unisex", "a photo of a unisex doctor"),
        ("a photo of a doctor", "honest", "a photo of an honest doctor"),
        ("a photo of a doctor", "one-armed", "a photo of a one-armed doctor"),
        ("A PHOTO OF A DOCTOR", "OLD", "A PHOTO OF An OLD DOCTOR"),
        ("a photo of a chief of police", "male", "a photo of a male chief of police"),
        ("a {strange} photo of a doctor", "male", "a {strange} photo of a male doctor"),
        ("a photo of a doctor {x}", "male", "a photo of a male doctor {x}"),
    ],
)
def test_articles_agree_with_the_word_that_follows(tmp_path: Path, prompt: str, word: str, expected: str):
    (row,) = from_text(tmp_path, prompt)
    assert write(row) == prompt  # as it was written, to the letter
    assert write(row, word) == expected


@pytest.mark.parametrize("prompt", ["a photo of a university dean", "a photo of an herb seller", "photo of An Actor"])
def test_the_neutral_prompt_is_the_users_own(tmp_path: Path, prompt: str):
    assert write(from_text(tmp_path, prompt)[0]) == prompt


@pytest.mark.parametrize(
    ("prompt", "neutral", "old"),
    [
        ("a {group} doctor at work", "a doctor at work", "an old doctor at work"),
        ("an {group} doctor at work", "a doctor at work", "an old doctor at work"),
        ("A {group} engineer", "An engineer", "An old engineer"),
        ("the {group} engineer", "the engineer", "the old engineer"),
        ("portrait: {group} engineer", "portrait: engineer", "portrait: old engineer"),
        ("an extra {group} engineer", "an extra engineer", "an extra old engineer"),
    ],
)
def test_the_place_of_the_group_can_be_marked(tmp_path: Path, prompt: str, neutral: str, old: str):
    (row,) = from_text(tmp_path, prompt)
    assert (write(row), write(row, "old")) == (neutral, old)


def test_a_column_of_occupations_finds_the_person_anywhere(tmp_path: Path):
    rows = from_table(
        tmp_path,
        {"prompt": "A Nurse stands in a ward, a photo of care", "occupation": "nurse"},
        {"prompt": "in the hall an actor sings", "occupation": "actor"},
    )
    assert rows["label"] == ["nurse", "actor"]
    assert [write(row) for row in rows] == ["A Nurse stands in a ward, a photo of care", "in the hall an actor sings"]
    assert write(rows[0], "old") == "An old Nurse stands in a ward, a photo of care"
    assert write(rows[1], "male") == "in the hall a male actor sings"


@given(word=st.sampled_from(["female", "old", "light-skinned"]), person=st.from_regex(r"[a-z]{2,8}", fullmatch=True))
def test_taking_the_word_out_gives_the_neutral_prompt(word: str, person: str):
    row = {"label": person, "pattern": "a photo of {person}, outdoors", "article": "a", "person": person}
    assert write(row, word).replace(f"{word} ", "").replace(" an ", " a ") == write(row)


@pytest.mark.parametrize(
    ("prompt", "occupation", "group"),
    [
        ("a photo of a C++ developer (senior)", "C++ developer (senior)", "a photo of an old C++ developer (senior)"),
        ("a photo of a C++ developer (senior), smiling", "developer (senior)", None),
        ("a vet (small animals) at work", "Vet (small animals)", "an old vet (small animals) at work"),
        (
            "\u4e00\u4f4d\u533b\u751f\u7684\u7167\u7247",
            "\u533b\u751f",
            "\u4e00\u4f4dold \u533b\u751f\u7684\u7167\u7247",
        ),
        ("a photo of a ma\u00eetre d", "mai\u0302tre d", "a photo of an old ma\u00eetre d"),
        ("a photo of a mai\u0302tre d", "ma\u00eetre d", "a photo of an old mai\u0302tre d"),
        ("a photo of a \uff4e\uff55\uff52\uff53\uff45", "nurse", "a photo of an old \uff4e\uff55\uff52\uff53\uff45"),
    ],
)
def test_an_occupation_is_found_in_any_form(tmp_path: Path, prompt: str, occupation: str, group: str | None):
    (row,) = from_table(tmp_path, {"prompt": prompt, "occupation": occupation})
    assert write(row) == prompt and row["label"] == occupation
    assert write(row, "old") == (group or prompt.replace("C++ ", "C++ old "))


@pytest.mark.parametrize("prompt", ["a photo of a midwife", "a photo of a caf\u00e9", "a photo of wives"])
@pytest.mark.parametrize("occupation", ["wife", "cafe", "photo of", "\u200b"])
def test_an_occupation_is_a_whole_word(tmp_path: Path, prompt: str, occupation: str):
    if occupation == "photo of":
        prompt = prompt.replace("photo of", "photo  offer of")
    with pytest.raises(InputError, match="does not name its occupation"):
        from_table(tmp_path, {"prompt": prompt, "occupation": occupation})


@pytest.mark.parametrize(
    ("prompt", "first", "second"),
    [
        ("a photo of the face of a doctor", "face", "a doctor"),
        ("a photo of the smiling face of an old-school doctor", "smiling face", "an old-school doctor"),
        ("a photo of the hands of nurses", "hands", "nurses"),
        ("a photo of a group of doctors", "group", "doctors"),
        ("a close-up of a portrait of the judge, outdoors", "portrait", "the judge, outdoors"),
    ],
)
def test_a_prompt_in_which_two_may_be_the_person_asks_which(tmp_path: Path, prompt: str, first: str, second: str):
    with pytest.raises(InputError, match=f"is the person '{first}' or '{second}'.*{{group}}.*column `occupation`"):
        from_text(tmp_path, prompt)
    noun = second.split()[-1] if "judge" not in second else "judge"
    assert from_table(tmp_path, {"prompt": prompt, "occupation": noun})["label"] == [noun]


@pytest.mark.parametrize(
    "person",
    [
        "chief of police", "secretary of state", "doctor in front of a house", "nurse taking care of a patient",
        "judge, in the style of a master", "chef with a picture of a cake", "pilot on the wing of the plane",
    ],
)  # fmt: skip
def test_a_person_may_be_described_with_an_of(tmp_path: Path, person: str):
    (row,) = from_text(tmp_path, f"a photo of a {person}")
    assert write(row, "old") == f"a photo of an old {person}"


def test_a_row_without_its_prompt_is_no_occupation_alone(tmp_path: Path):
    with pytest.raises(InputError, match="prompt 2: no column `prompt`; it has prmpt, occupation"):
        from_table(tmp_path, {"prompt": "a photo of a judge"}, {"prmpt": "a photo of a nurse", "occupation": "nurse"})


def test_the_digest_tells_sets_apart():
    assert digest(load_prompts("portraits")) == digest(load_prompts("portraits"))
    assert digest(load_prompts("portraits")) != digest(load_prompts("portraits", 11))


def test_group_prompts_keep_the_order_of_the_axis():
    axis = Axis("x", ("b", "a", "c"), ("blue", "amber", "crimson"))
    assert group_prompts(load_prompts("portraits", 1)[0], axis) == [
        "a photo of a blue doctor",
        "a photo of an amber doctor",
        "a photo of a crimson doctor",
    ]
