"""Prompts: articles agree, the group's word goes before the person, and noise follows from prompt and seed alone."""

import json
from pathlib import Path

import pytest
import torch
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
    noise,
    occupation_prompts,
    with_seeds,
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


def test_plain_prompts_of_a_file_need_no_person_and_keep_their_braces(tmp_path: Path):
    lines = ["mountains", "  a {red} car", "", "mountains", "{group}"]
    (tmp_path / "scenes.txt").write_text("\n".join(lines) + "\n")
    found = load_plain_prompts(tmp_path / "scenes.txt")
    assert [write(row) for row in found] == ["mountains", "a {red} car", "{group}"]
    assert group_prompts(found[0], GENDER) == ["mountains", "mountains"]
    with pytest.raises(InputError, match="no person found"):
        load_prompts(tmp_path / "scenes.txt")
    with pytest.raises(InputError, match=r"no built-in set \(scenes\)"):
        load_plain_prompts("nowhere")


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


def test_each_ending_reads_the_same(tmp_path: Path):
    texts = ["a photo of a doctor", "a photo of a nurse"]
    (tmp_path / "p.txt").write_text("\n".join(texts))
    (tmp_path / "p.csv").write_text("prompt\n" + "\n".join(texts))
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in texts))
    Dataset.from_dict({"prompt": texts}).to_parquet(tmp_path / "p.parquet")
    found = {digest(load_prompts(tmp_path / f"p.{ending}")) for ending in ("txt", "csv", "jsonl", "parquet")}
    assert len(found) == 1


def test_blank_lines_are_passed_over_and_the_limit_counts_prompts(tmp_path: Path):
    path = tmp_path / "p.txt"
    path.write_text("a photo of a doctor\n\n  \na photo of a nurse\na photo of a judge\n")
    assert load_prompts(path, limit=2)["label"] == ["doctor", "nurse"]
    assert load_prompts("portraits", limit=3)["label"] == BUILT_IN["portraits"][:3]


def test_reading_stops_at_the_limit(tmp_path: Path):
    """What lies behind it may be a whole data set on the hub; here it is a row that would be refused."""
    rows = [{"prompt": "a photo of a doctor"}, {"prompt": "nobody here"}]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert load_prompts(path, limit=1)["label"] == ["doctor"]
    with pytest.raises(InputError, match="no person found"):
        load_prompts(path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.txt", "", "empty"),
        ("p.txt", "\n  \n", "no prompts in it"),
        ("p.txt", "a sunset", "no person found"),
        ("p.txt", "a {group} doctor and a {group} nurse", "has {group} more than once"),
        ("p.txt", "a photo of a {group}", "nothing follows"),
        ("p.csv", "text\nhello", "no column `prompt`; it has text"),
        ("p.csv", "prompt,occupation\na photo of a doctor,nurse", "does not name its occupation 'nurse'"),
        ("p.jsonl", '{"prompt": 3}', "where text is expected"),
        ("p.jsonl", '{"prompt": "a photo of a doctor", "occupation": 3}', "where text is expected"),
        ("p.jsonl", "{", "cannot be read"),
        ("p.csv", "prompt\na photo of a doctor, in the style of a master", r"row 1 \(line 2\) has 2 fields.*in quotes"),
        ("p.csv", "prompt,occupation\n,nurse", "prompt 1 has the occupation 'nurse' and no prompt"),
        ("p.txt", "a photo of a doctor\na photo of a nurse\x07", r"prompt 2 holds the control character '\\x07'"),
        ("p.csv", "occupation\nnurse\x1b", r"prompt 1 holds the control character '\\x1b'"),
        ("p.json", '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}", "row 1 is nested too deep"),
        ("p.jsonl", '{"prompt": "a", "x": ' + '{"x": ' * 100_000 + "1" + "}" * 100_001, "row 1 is nested too deep"),
        ("p.parquet", "not parquet", "cannot be read"),
        ("p.md", "a photo of a doctor", "unknown ending '.md'"),
    ],
)
def test_files_that_hold_no_prompts_are_refused(tmp_path: Path, name: str, content: str, says: str):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=says):
        load_prompts(tmp_path / name)


@pytest.mark.parametrize("name", ["p[1].csv", "a*b.csv", "p[1].txt", "p?.jsonl", "p[1].json", "p[1].parquet"])
def test_a_file_s_name_is_no_pattern(tmp_path: Path, name: str):
    path = tmp_path / name
    for wrong in ("p1", "axb", "px"):
        Dataset.from_dict({"prompt": ["a photo of a nurse"]}).to_parquet(tmp_path / f"{wrong}.parquet")
        for ending in (".csv", ".txt", ".jsonl", ".json"):
            (tmp_path / f"{wrong}{ending}").write_text("not this one")
    if path.suffix == ".parquet":
        Dataset.from_dict({"prompt": ["a photo of a doctor"]}).to_parquet(tmp_path / "q.parquet")
        (tmp_path / "q.parquet").rename(path)
    else:
        whole = {".csv": "prompt\na photo of a doctor", ".txt": "a photo of a doctor"}
        path.write_text(whole.get(path.suffix, '{"prompt": "a photo of a doctor"}'))
    assert load_prompts(path)["label"] == ["doctor"]


@pytest.mark.parametrize("ending", [".txt", ".csv", ".jsonl", ".json"])
def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path, ending: str):
    path = tmp_path / f"p{ending}"
    text = {".csv": "prompt\na photo of a doctor", ".txt": "a photo of a doctor"}.get(ending)
    path.write_text(text or '{"prompt": "a photo of a doctor"}', encoding="utf-8-sig")
    assert [write(row) for row in load_prompts(path)] == ["a photo of a doctor"]


def test_blank_rows_are_passed_over_and_white_space_in_a_label_is_one_space(tmp_path: Path):
    path = tmp_path / "p.csv"
    path.write_text(
        'prompt,occupation\n,,\n" ",\na photo of a tax  collector,"tax\ncollector"\n\n"a photo\nof a doctor",\n,\n'
    )
    rows = load_prompts(path)
    assert rows["label"] == ["tax collector", "doctor"]
    assert [write(row) for row in rows] == ["a photo of a tax  collector", "a photo\nof a doctor"]
    path.write_text("occupation\ntax \t collector\n")
    assert write(load_prompts(path)[0]) == "a photo of a tax collector"


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


def test_a_folder_and_a_missing_file_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="is a folder"):
        load_prompts(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        load_prompts(tmp_path / "missing.csv")


def test_every_prompt_meets_every_seed():
    samples = with_seeds(load_prompts("portraits", 2), 5, 3)
    assert [row["seed"] for row in samples] == [5, 5, 6, 6, 7, 7]
    assert [row["prompt"] for row in samples] == ["a photo of a doctor", "a photo of a nurse"] * 3
    assert [row["number"] for row in samples] == list(range(len(samples)))
    assert all(set(COLUMNS) <= set(row) for row in samples)
    assert samples[-1] == samples[5] and samples[2:4] == [samples[2], samples[3]]
    left = samples.without([0, 4])
    assert list(left) == [samples[number] for number in (1, 2, 3, 5)] and left.labels == samples.labels
    with pytest.raises(IndexError):
        samples[6]


def test_noise_follows_from_prompt_and_seed_alone():
    samples = with_seeds(load_prompts("portraits", 2), 0, 2)
    whole = [noise(row, (2, 4, 4)) for row in samples]
    backwards = [noise(row, (2, 4, 4)) for row in reversed(list(samples))]
    assert all(torch.equal(a, b) for a, b in zip(whole, reversed(backwards), strict=True))
    torch.manual_seed(3)
    bare = {"prompt": samples[0]["prompt"], "seed": samples[0]["seed"]}
    assert torch.equal(noise(bare, (2, 4, 4)), whole[0])  # no other column matters
    assert not any(torch.equal(whole[i], whole[j]) for i in range(4) for j in range(i))
    assert not torch.equal(noise(bare, (2, 4, 4), "another purpose"), whole[0])


def test_noise_is_the_same_whatever_the_default_dtype():
    row = {"prompt": "p", "seed": 1}
    expected = noise(row, (8,))
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(noise(row, (8,)), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_noise_is_standard_normal():
    values = noise({"prompt": "p", "seed": 1}, (100_000,))
    assert abs(values.mean()) < 0.02
    assert abs(values.std() - 1) < 0.02


def test_noise_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    noise({"prompt": "p", "seed": 1}, (4,))
    assert torch.equal(torch.get_rng_state(), before)


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


def test_a_list_of_occupations_asks_for_a_photo_of_each(tmp_path: Path):
    path = tmp_path / "jobs.csv"
    path.write_text("occupation\nengineer\nhousekeeper\n\n")
    rows = load_prompts(path)
    assert [write(row) for row in rows] == ["a photo of an engineer", "a photo of a housekeeper"]
    assert list(rows["label"]) == ["engineer", "housekeeper"]
    assert write(rows[0], "female") == "a photo of a female engineer"
    with pytest.raises(InputError, match="no column `prompt`; it has occupation"):
        load_plain_prompts(path)


def test_a_data_set_of_the_hub_is_read_by_its_id(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def load_dataset(name: str, **how: object):
        asked.append((name, how))
        rows = [{"prompt": f"a portrait of a {each}", "source": "x"} for each in ("poet", "judge", "poet", "chef")]
        return Dataset.from_list(rows).to_iterable_dataset(num_shards=2)

    monkeypatch.setattr("stereoclinic.prompts.sets.load_dataset", load_dataset)
    found = load_prompts("somebody/prompts")
    assert asked == [("somebody/prompts", {"split": "train", "streaming": True})]
    assert [write(row) for row in found] == [f"a portrait of a {each}" for each in ("poet", "judge", "chef")]
    assert len(load_prompts("somebody/prompts", limit=1)) == 1
