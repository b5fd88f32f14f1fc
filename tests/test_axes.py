"""Bias axes: every shipped one is whole, and a user's file is as good as ours."""

import json
from pathlib import Path

import pytest

from stereoclinic.errors import InputError
from stereoclinic.prompts.axes import WATCHED, Axis, gate_words, known_axes, load_axis, made_for
from stereoclinic.sns.policy import named_groups

HEADWEAR = """
name = "headwear"
groups = ["covered", "bare", "hat"]
[words]
covered = "veiled"
bare = "bare-headed"
hat = "hatted"
"""
ALSO = 'name = "x"\ngroups = ["a", "b"]\n[words]\na = "a"\nb = "b"\n[also]\n{}'
CLIP = 'name = "x"\ngroups = ["a", "b"]\n[words]\na = "a"\nb = "b"\n[reader.clip]\n{}'
HF = CLIP.replace("clip", "hf")


@pytest.mark.parametrize("name", known_axes())
def test_shipped_axes_are_whole(name):
    axis = load_axis(name)
    assert axis.name == name
    assert len(axis) == len(axis.groups) == len(axis.words) >= 2
    assert ("portraits" in axis.reader) == (name in WATCHED)
    assert [axis.index(group) for group in axis.groups] == list(range(len(axis)))
    assert set(axis.also) == set(axis.groups)
    for words in (*axis.also.values(), axis.unless):
        assert len(set(words)) == len(words)


def test_gender_skin_and_age_ship():
    assert {"gender", "skin", "age"} == set(WATCHED) < set(known_axes())


def test_a_users_file_is_read_in_its_own_order(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text(HEADWEAR)
    axis = load_axis(path)
    assert (axis.name, axis.groups) == ("headwear", ("covered", "bare", "hat"))
    assert axis.words == ("veiled", "bare-headed", "hatted")
    assert axis.reader == {}
    assert (axis.also, axis.unless) == ({}, ())


def test_a_file_may_say_how_readers_tell_the_groups_apart(tmp_path: Path):
    path = tmp_path / "mine.toml"
    tables = (
        '[reader]\nportraits = "hat"\n[reader.clip]\nhat = ["a person in a hat"]\ntemplates = ["a photo of {group}"]\n'
    )
    path.write_text("race = false\n" + HEADWEAR + tables + '[reader.hf]\nhat = ["Wearing_Hat"]\n')
    axis = load_axis(path)
    assert axis.reader == {"portraits": "hat"}
    assert axis.phrases == {"hat": ("a person in a hat",)}
    assert axis.templates == ("a photo of {group}",)
    assert axis.classes == {"hat": ("Wearing_Hat",)}
    assert axis.race is False


def test_a_file_may_list_further_words_and_exceptions(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text('unless = ["hat trick"]\n' + HEADWEAR + '[also]\nhat = ["hat", "cap"]\n')
    axis = load_axis(path)
    assert axis.also == {"hat": ("hat", "cap")}
    assert axis.unless == ("hat trick",)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('name = "x"\ngroups = ["a"]\n[words]\na = "a"', "needs two or more"),
        ('name = "x"\ngroups = ["a", "a"]\n[words]\na = "a"', "twice"),
        ('name = "x"\ngroups = ["a", "b"]\n[words]\na = "a"', "no word for 'b'"),
        ('name = "x"\ngroups = ["a", "b\\nc"]\n[words]\na = "a"', r"no word for 'b\\nc'"),
        ('name = "x"\ngroups = ["a", "b"]\n[words]\na = "a"\nb = " "', "one word or phrase"),
        ('name = "x"\ngroups = ["a", "b"]', "words is missing"),
        ('groups = ["a", "b"]\n[words]\na = "a"\nb = "b"', "name is missing"),
        ('name = "x"\ngroups = 2\n[words]\na = "a"', "groups = 2: expected a valid tuple"),
        ('name = "x"\ngroups = [["a"], "b"]\n[words]\na = "a"\nb = "b"', r"groups.1 = .'a'.: expected a valid string"),
        (ALSO.format('c = ["d"]'), "no group 'c', named in \\[also\\]; it has a, b"),
        (ALSO.format('b = "d"'), "also.b = 'd': expected a valid tuple"),
        (ALSO.format('b = ["d", 3]'), "also.b.2 = 3: expected a valid string"),
        (ALSO.format('b = ["-"]'), "\\[also\\] b holds something that is not a word"),
        (
            'also = ["c"]\nname = "x"\ngroups = ["a", "b"]\n[words]\na = "a"\nb = "b"',
            "also = .*: expected",
        ),
        ('unless = [" "]\nname = "x"\ngroups = ["a", "b"]\n[words]\na = "a"\nb = "b"', "unless holds something"),
        (
            'unless = "c"\nname = "x"\ngroups = ["a", "b"]\n[words]\na = "a"\nb = "b"',
            "unless = 'c': expected",
        ),
        ('name = "x"\nreader = 3\ngroups = ["a", "b"]\n[words]\na = "a"\nb = "b"', "reader"),
        (
            'race = "yes"\nname = "x"\ngroups = ["a", "b"]\n[words]\na = "a"\nb = "b"',
            "race = 'yes': expected",
        ),
        (CLIP.format('c = ["d"]'), "no group 'c', named in \\[reader.clip\\]; it has a, b"),
        (CLIP.format('b = "d"'), "reader.clip.b = 'd': expected a valid tuple"),
        (CLIP.format('templates = "d"'), "reader.clip.templates = 'd': expected a valid tuple"),
        (CLIP.format('templates = ["d"]'), "template 'd' needs {group} in it, once"),
        (CLIP.format('b = ["-"]'), "\\[reader.clip\\] b holds something that is not a word"),
        (HF.format('c = ["d"]'), "no group 'c', named in \\[reader.hf\\]; it has a, b"),
        (HF.format('b = "d"'), "reader.hf.b = 'd': expected a valid tuple"),
        ("name = ", "axis file"),
        ("\x00\xff", "axis file"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path: Path, text: str, says: str):
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=says):
        load_axis(path)


def test_unknown_names_say_what_there_is():
    with pytest.raises(InputError, match=r"unknown axis 'sex'; choose one of .*gender"):
        load_axis("sex")
    with pytest.raises(InputError, match=r"no group 'other'; it has female, male"):
        load_axis("gender").index("other")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path):
    (tmp_path / "folder.toml").mkdir()
    for name in ("missing.toml", "folder.toml"):
        with pytest.raises(InputError, match="axis file"):
            load_axis(tmp_path / name)


def test_groups_and_words_must_match():
    with pytest.raises(InputError, match="one word or phrase for each group"):
        Axis("x", ("a", "b"), ("a",))


def own_axis(name: str = "gender") -> Axis:
    return Axis(
        name, ("f", "m"), ("female", "male"), also={"f": ("diva",), "m": ("lad", "bloke")}, unless=("lad bible",)
    )


@pytest.mark.parametrize("name", ["gender", "mine"])
def test_what_a_mask_keeps_of_an_axis_is_enough_for_the_gate(name: str):
    axis = own_axis(name)
    found = made_for(json.loads(json.dumps({"axis": name, "words": list(axis.words), **gate_words(axis)})))
    assert found is not None and found.name == name
    for prompt in ("a diva at work", "the lads", "the lad bible", "a woman", "a female judge", "a judge"):
        assert len(named_groups(prompt, found)) == len(named_groups(prompt, axis)), prompt


@pytest.mark.parametrize("name", known_axes())
def test_of_an_axis_that_ships_a_mask_keeps_its_name(name: str):
    axis = load_axis(name)
    assert gate_words(axis) == {}
    assert made_for({"axis": name, "words": list(axis.words)}) == axis


@pytest.mark.parametrize(
    "gate",
    [
        [], "x", {}, {"also": [], "unless": []}, {"also": [[], []]}, {"also": ["ab", "c"], "unless": []},
        {"also": [[1], []], "unless": []}, {"also": [[], []], "unless": [" "]},
        {"also": [["a" * 201], []], "unless": []},
        {"also": [["a"] * 10_001, []], "unless": []}, {"also": {"female": ["a"]}, "unless": []},
    ],
)  # fmt: skip
def test_words_of_a_stranger_s_mask_are_looked_at_first(gate: object):
    with pytest.raises(InputError, match=r"the mask was made for axis 'gender', whose words cannot be read; .* --axis"):
        made_for({"axis": "gender", "words": ["female", "male"], "gate": gate})


def test_a_mask_that_says_nothing_of_its_axis():
    for metadata in ({}, {"axis": "gender"}, {"axis": "mine"}, {"axis": "mine", "words": "ab"}, {"words": ["a"]}):
        assert (made_for(metadata) is not None) == (metadata == {"axis": "gender"})
    found = made_for({"axis": "gender", "words": ["agender", "bigender"]})
    assert found is not None and found.groups == ("agender", "bigender") and not any(found.also.values())
