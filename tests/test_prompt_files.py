"""Prompt files: each ending reads the same, and what holds no prompt is refused; data sets of the hub by their id."""

import json
from pathlib import Path

import pytest
from datasets import Dataset

from stereoclinic.errors import InputError
from stereoclinic.prompts.axes import load_axis
from stereoclinic.prompts.sets import (
    BUILT_IN,
    digest,
    group_prompts,
    load_plain_prompts,
    load_prompts,
    write,
)


def test_plain_prompts_of_a_file_need_no_person_and_keep_their_braces(tmp_path: Path):
    lines = ["mountains", "  a {red} car", "", "mountains", "{group}"]
    (tmp_path / "scenes.txt").write_text("\n".join(lines) + "\n")
    found = load_plain_prompts(tmp_path / "scenes.txt")
    assert [write(row) for row in found] == ["mountains", "a {red} car", "{group}"]
    assert group_prompts(found[0], load_axis("gender")) == ["mountains", "mountains"]
    with pytest.raises(InputError, match="no person found"):
        load_prompts(tmp_path / "scenes.txt")
    with pytest.raises(InputError, match=r"no built-in set \(scenes\)"):
        load_plain_prompts("nowhere")


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


def test_a_folder_and_a_missing_file_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="is a folder"):
        load_prompts(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        load_prompts(tmp_path / "missing.csv")


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

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    found = load_prompts("somebody/prompts")
    assert asked == [("somebody/prompts", {"split": "train", "streaming": True})]
    assert [write(row) for row in found] == [f"a portrait of a {each}" for each in ("poet", "judge", "chef")]
    assert len(load_prompts("somebody/prompts", limit=1)) == 1
