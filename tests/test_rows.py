"""Rows of files: every format reads the same table, row by row; what could be read in two ways is refused."""

import csv
import json
import random
from pathlib import Path

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from stereoclinic.errors import InputError
from stereoclinic.io import rows
from stereoclinic.io.rows import MOST_PAGE, MOST_ROW, READERS

cell = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=8)


def read(path: Path) -> list[dict]:
    return [row for part in READERS[path.suffix](path) for row in part]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table=st.lists(st.fixed_dictionaries({"prompt": cell, "occupation": cell, "note": cell}), max_size=4))
def test_every_format_holds_the_same(tmp_path: Path, table: list[dict]):
    with (tmp_path / "t.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "occupation", "note"])
        writer.writeheader()
        writer.writerows(table)
    assert read(tmp_path / "t.csv") == table
    for mark in ("utf-8", "utf-8-sig"):
        (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, table)), encoding=mark)
        assert read(tmp_path / "t.jsonl") == table
        (tmp_path / "t.json").write_text(json.dumps(table, indent=1), encoding=mark)
        assert read(tmp_path / "t.json") == table
    if table:
        parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "t.parquet", row_group_size=2)
        assert read(tmp_path / "t.parquet") == [{name: row[name] for name in ("prompt", "occupation")} for row in table]


def test_objects_longer_than_what_is_read_at_once(tmp_path: Path):
    table = [{"prompt": "y" * 70_000, "n": i} for i in range(5)]
    for text in (json.dumps(table), "\n\n".join(map(json.dumps, table))):
        (tmp_path / "t.json").write_text(text)
        assert read(tmp_path / "t.json") == table


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.json", '[{"prompt": "a"}', "its list does not end"),
        ("t.json", '[{"prompt": "a"}, ["b"]]', "row 2 is no JSON object: '\\[\"b\"\\]\\]'"),
        ("t.jsonl", '{"prompt": "a"}\nb', "row 2 is no JSON object"),
        ("t.jsonl", '{"prompt": "a', "row 1: Unterminated string"),
        ("t.jsonl", '{"prompt": ' + "[" * 100_000, "row 1 is nested too deep"),
        ("t.json", "[" * 100_000, "row 1 is no JSON object"),
        ("t.csv", 'prompt\n"a" b', "line 2: "),
        ("t.csv", 'prompt\na\n"b', "line 3: unexpected end of data"),
        ("t.csv", "prompt\n" + "a" * (MOST_ROW + 1), "line 2 has more than 1,048,576 characters"),
        ("t.txt", "a" * (MOST_ROW + 1), "line 1 has more than 1,048,576 characters"),
    ],
)
def test_what_is_no_table(tmp_path: Path, name: str, content: str, says: str):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=says):
        read(tmp_path / name)


def test_a_row_of_more_fields_than_names(tmp_path: Path):
    path = tmp_path / "t.csv"
    path.write_text('prompt\n"a photo of a doctor, smiling"\na photo of a judge,,\na photo of a nurse, smiling\n')
    with pytest.raises(InputError, match=r"row 3 \(line 4\) has 2 fields, and the first row names 1; put .* in quotes"):
        read(path)
    path.write_text("prompt,occupation\na photo of a judge,judge,,\n,,\na photo of a nurse\n")
    found = read(path)
    assert [row["prompt"] for row in found] == ["a photo of a judge", "", "a photo of a nurse"]
    assert [row["occupation"] for row in found] == ["judge", "", ""]


# --- Parquet


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string()])
@pytest.mark.parametrize("dictionary", [True, False])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("codec", ["none", "snappy", "zstd"])
def test_every_way_to_write_texts_is_read(tmp_path: Path, kind, dictionary: bool, version: str, codec: str):
    draw = random.Random(0)
    texts = [f"a photo of a doctor {draw.randrange(500)} \u00e9" if draw.random() < 0.9 else None for _ in range(3000)]
    table = pyarrow.table({"prompt": pyarrow.array(texts, kind), "n": list(range(3000))})
    how = {"use_dictionary": dictionary, "data_page_version": version, "compression": codec, "data_page_size": 3000}
    parquet.write_table(table, tmp_path / "t.parquet", row_group_size=1100, **how)
    parts = READERS[".parquet"](tmp_path / "t.parquet")
    assert len(parts) == 3
    assert [row["prompt"] for part in parts for row in part] == texts


def test_the_headers_of_pages_are_read_as_they_were_written(tmp_path: Path):
    path = tmp_path / "t.parquet"
    parquet.write_table(pyarrow.table({"prompt": [f"{i:05}" * 20 for i in range(1000)]}), path, compression="none")
    chunk = parquet.ParquetFile(path).metadata.row_group(0).column(0)
    with path.open("rb") as file:
        header, length = rows._page_header(file, chunk.dictionary_page_offset)
    assert header[(7, 1)] == 1000 and header[(2,)] == header[(3,)] == 1000 * 104
    assert chunk.dictionary_page_offset + length + header[(3,)] == chunk.data_page_offset


def test_columns_that_are_not_ours_are_not_read(tmp_path: Path):
    path = tmp_path / "t.parquet"
    many = pyarrow.array([[["x" * 1000] * 50_000]] * 2)
    parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "many": many}), path)
    assert read(path) == [{"prompt": "a"}, {"prompt": "b"}]
    parquet.write_table(pyarrow.table({"prompt": many}), path)
    with pytest.raises(InputError, match="column `prompt` holds no text, but 'list<"):
        read(path)


@pytest.mark.parametrize("codec", ["gzip", "zstd", "brotli"])
def test_a_page_that_unpacks_to_too_much_whatever_the_footer_says(tmp_path: Path, codec: str, monkeypatch):
    path = tmp_path / "t.parquet"
    table = pyarrow.table({"prompt": ["a" * 4 * MOST_PAGE]})
    parquet.write_table(table, path, compression=codec, use_dictionary=False, write_statistics=False)
    monkeypatch.setattr(rows, "MOST", 2**40)  # as if the footer told less
    with pytest.raises(InputError, match=r"a page of .* bytes that unpacks to 16,777,2"):
        read(path)


def test_a_damaged_page_header_has_an_end(tmp_path: Path):
    for content in (b"", b"\x15", b"\x15" + b"\xff" * 300, b"\x19\xff", b"\x1c" * 5000, b"\x18\xff\xff\xff\xff\x7f"):
        (tmp_path / "p").write_bytes(content)
        with (tmp_path / "p").open("rb") as file, pytest.raises((ValueError, RecursionError)):
            rows._page_header(file, 0)
