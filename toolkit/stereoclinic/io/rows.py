"""Rows of a table of prompts in a file, read one by one: text, CSV, JSON, Parquet.

A reader returns a file's parts, each read when it is iterated. Memory is bounded: no row is longer than `MOST_ROW`
characters, and no page of Parquet unpacks to more than `MOST_PACKED` times its size. pyarrow itself has no such bound.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from stereoclinic.errors import InputError
from stereoclinic.io.reading import MOST

if TYPE_CHECKING:
    from datasets import Dataset  # takes a second to import, and many need a row's text only

#: Characters of a row, with all of its columns.
MOST_ROW = 2**20
#: Bytes, and rows, that a byte of a Parquet file may stand for; and bytes that any page may unpack to.
MOST_PACKED, MOST_PAGE = 100, 2**22
#: Columns of Parquet that are read.
_OURS = ("prompt", "occupation")

_Row = dict[str, Any]


def table(rows: Iterable[_Row]) -> "Dataset":
    """The rows as a data set."""
    from datasets import Dataset

    return Dataset.from_list(list(rows))


def _texts(path: Path) -> Iterator[_Row]:
    """A prompt a line."""
    with _opened(path) as file:
        for line in _lines(file):
            yield {"prompt": line}


def _csv(path: Path) -> Iterator[_Row]:
    """Rows of CSV, by the names in its first row.

    Raises:
        InputError: A row has more fields than the first, so that their names are unknown.
    """
    with _opened(path, newline="") as file:
        rows = _fields(csv.reader(_lines(file), strict=True))
        header = [name.strip() for name in next(rows, (0, []))[1]]
        for number, (line, row) in enumerate(rows, start=1):
            if any(field.strip() for field in row[len(header) :]):
                raise InputError(
                    f"{path}: row {number} (line {line}) has {len(row)} fields, and the first row names"
                    f' {len(header)}; put a text that holds a comma in quotes: "a doctor, smiling"'
                )
            yield dict(zip(header, row + [""] * (len(header) - len(row)), strict=False))


def _fields(table: Any) -> Iterator[tuple[int, list[str]]]:
    """The fields of each row that has any, and the number of its last line."""
    try:
        yield from ((table.line_num, row) for row in table if row)
    except csv.Error as error:
        raise ValueError(f"line {table.line_num}: {error}") from error


def _json(path: Path) -> Iterator[_Row]:
    """JSON objects: one after the other, or in a list.

    Raises:
        ValueError: It holds something else.
    """
    decode, between = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*")
    with _opened(path) as file:
        text, at, number, listed = "", 0, 1, False
        while True:
            at = between.match(text, at).end()  # type: ignore[union-attr]
            if at == len(text):
                text, at = file.read(2**16), 0
                if not text:
                    break
            elif text[at] == ("]" if listed else "[") and (listed or number == 1):
                listed, at = not listed, at + 1
            elif text[at] != "{":
                raise ValueError(f"row {number} is no JSON object: {text[at : at + 20]!r}")
            else:
                try:
                    row, at = decode(text, at)
                    yield row
                    number += 1
                except RecursionError:
                    raise ValueError(f"row {number} is nested too deep") from None
                except json.JSONDecodeError as error:  # it may only be cut off
                    more = "" if len(text) - at > MOST_ROW else file.read(max(2**16, len(text) - at))
                    if not more:
                        raise ValueError(f"row {number}: {error.msg}") from None
                    text, at = text[at:] + more, 0
        if listed:
            raise ValueError("its list does not end")


def _opened(path: Path, newline: str | None = None) -> TextIO:
    return path.open(encoding="utf-8-sig", newline=newline)


def _lines(file: TextIO) -> Iterator[str]:
    number = 0
    while line := file.readline(MOST_ROW + 1):
        number += 1
        if len(line) > MOST_ROW:
            raise ValueError(f"line {number} has more than {MOST_ROW:,} characters")
        yield line


def _parquet(path: Path) -> list[Iterator[_Row]]:
    """The rows of a Parquet file, row group by row group; only the columns in `_OURS` are read.

    A value that is there a million times is written once, and takes memory once.

    Raises:
        InputError: One of these columns holds no text, or the file unpacks to a multiple that no text packs to.
        Exception: It is damaged, or no such file; pyarrow has many errors.
    """
    from pyarrow import parquet, types

    size, wanted, blank = path.stat().st_size, list[str](), list[str]()
    with parquet.ParquetFile(path) as file:
        about = file.metadata
        for field in file.schema_arrow:
            if field.name in _OURS:
                kind = field.type.value_type if types.is_dictionary(field.type) else field.type
                if not (types.is_null(kind) or types.is_string(kind) or types.is_large_string(kind)):
                    raise InputError(f"{path}: column `{field.name}` holds no text, but {str(kind)[:40]!r}")
                (blank if types.is_null(kind) else wanted).append(field.name)
        if not wanted:
            return [iter([dict.fromkeys(file.schema_arrow.names)] if about.num_rows and not blank else [])]
    unpacked = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
    if unpacked > MOST_PACKED * size + MOST or about.num_rows > MOST_PACKED * size:
        raise InputError(f"{path}: {size:,} bytes that unpack to {unpacked:,}, in {about.num_rows:,} rows")
    return [_row_group(path, number, wanted, blank) for number in range(about.num_row_groups)]


def _row_group(path: Path, number: int, wanted: list[str], blank: list[str]) -> Iterator[_Row]:
    from pyarrow import parquet

    with parquet.ParquetFile(path, read_dictionary=wanted, pre_buffer=False) as file:
        _check_pages(path, file.metadata.row_group(number), wanted)
        none = dict.fromkeys(blank)
        for batch in file.iter_batches(batch_size=256, row_groups=[number], columns=wanted):
            columns = [batch.column(name) for name in wanted]
            for row in range(len(batch)):  # one by one: together, well-packed texts may be huge
                yield none | {name: column[row].as_py() for name, column in zip(wanted, columns, strict=True)}


def _check_pages(path: Path, group: Any, wanted: list[str]) -> None:
    """Refuse a row group in which a page unpacks to too much, by the headers of its pages, which pyarrow follows.

    Raises:
        InputError: There is such a page.
        ValueError: A header is damaged.
    """
    chunks = [group.column(i) for i in range(group.num_columns)]
    with path.open("rb") as file:
        for chunk in (each for each in chunks if each.path_in_schema in wanted):
            at, first = chunk.data_page_offset, chunk.dictionary_page_offset
            at = first if first and first < at else at
            end, values = at + chunk.total_compressed_size, 0
            while at < end and values < chunk.num_values:
                header, length = _page_header(file, at)
                packed, unpacked, listed = header.get((3,), -1), header.get((2,), 0), header.get((7, 1), 0)
                if packed < 0:
                    raise ValueError("the header of a page does not say how long it is")
                if max(unpacked, 4 * listed) > MOST_PACKED * packed + MOST_PAGE:
                    raise InputError(
                        f"{path}: a page of {packed:,} bytes that unpacks to {max(unpacked, 4 * listed):,}"
                    )
                values += max(header.get((5, 1), 0), header.get((8, 1), 0))
                at += length + packed


def _page_header(file: io.BufferedReader, start: int) -> tuple[dict[tuple[int, ...], int], int]:
    """The whole numbers in a page's header, by the path to their field, and the header's length.

    It is a struct in Thrift's compact protocol: fields with a kind and a number each, up to a zero.
    """
    for most in (2**8, 2**12, 2**20):
        file.seek(start)
        data = file.read(most)
        try:
            found = dict[tuple[int, ...], int]()
            return found, _struct(data, 0, (), found)
        except IndexError:  # it is longer
            continue
    raise ValueError("the header of a page has no end")


def _struct(data: bytes, at: int, way: tuple[int, ...], found: dict[tuple[int, ...], int]) -> int:
    last = 0
    while head := data[at]:
        kind, at = head & 15, at + 1
        if head >> 4:
            last += head >> 4
        else:
            last, at = _number(data, at)
            last = (last >> 1) ^ -(last & 1)
        if kind == 12:
            at = _struct(data, at, (*way, last), found)
        elif kind in (3, 7):
            at += 1 if kind == 3 else 8
        elif kind in (4, 5, 6, 8):
            value, at = _number(data, at)
            if kind == 8:
                at += value
            else:
                found[(*way, last)] = (value >> 1) ^ -(value & 1)
        elif kind not in (1, 2):  # the header of a page holds no lists
            raise ValueError(f"the header of a page holds a field of kind {kind}")
    return at + 1


def _number(data: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first."""
    value = 0
    for place in range(10):
        value |= (data[at] & 127) << 7 * place
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise ValueError("the header of a page holds a number of more than 64 bits")


#: Ending -> what reads the parts of such a file.
READERS: dict[str, Callable[[Path], Sequence[Iterable[_Row]]]] = {
    ".txt": lambda path: [_texts(path)],
    ".csv": lambda path: [_csv(path)],
    ".jsonl": lambda path: [_json(path)],
    ".json": lambda path: [_json(path)],
    ".parquet": _parquet,
}
