"""Pictures whose group is known: an imagefolder, and how often a reader is right on them.

FOLDER/GROUP/*.png                      a folder for each group, or
FOLDER/metadata.csv, metadata.jsonl     with the columns `file_name` and one of labels
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from stereoclinic.errors import InputError, first_line
from stereoclinic.evaluation.readers import Reader, groups_seen
from stereoclinic.evaluation.readers.hugging_face import columns_of
from stereoclinic.io.files import write_text
from stereoclinic.io.rows import READERS
from stereoclinic.prompts.axes import Axis
from stereoclinic.statistics.intervals import Interval, wilson_interval
from stereoclinic.statistics.shares import no_group_rate, top_group, unsure_rate

#: Endings of the files that are read as pictures.
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
Labelled = list[tuple[Path, int]]  # picture, place of its group in the axis


@dataclass(frozen=True)
class ReaderCheck:
    """How often a reader is right on labelled pictures of an axis.

    Args:
        reader: Its name.
        axis: K groups.
        counts: (K, K) pictures, rows are the groups they show and columns what was read; ties count in part.
        no_group: Group -> share of its pictures in which no group was seen; None from a reader that cannot say so.
        unsure: Group -> share of its pictures whose most likely group has a probability below 0.8.
        left_out: Label of no group -> its number of pictures, which were not read.
    """

    reader: str
    axis: Axis
    counts: Tensor
    no_group: dict[str, Interval] | None
    unsure: dict[str, Interval]
    left_out: dict[str, int]

    @property
    def right(self) -> dict[str, Interval]:
        """Group -> share of its pictures that were read as it; "all" -> share of all pictures (Wilson intervals)."""
        hits, totals = self.counts.diagonal().tolist(), [round(total) for total in self.counts.sum(1).tolist()]
        found = {group: wilson_interval(min(hits[k], totals[k]), totals[k]) for k, group in enumerate(self.axis.groups)}
        return found | {"all": wilson_interval(min(sum(hits), sum(totals)), sum(totals))}

    @property
    def data(self) -> dict[str, Any]:
        """All of it as plain data."""
        shown = {group: dict(zip(self.axis.groups, row, strict=True)) for group, row in self._rows()}
        figures = {"right": self.right, "unsure": self.unsure, "no_group": self.no_group}
        plain = {
            name: None if each is None else {group: asdict(interval) for group, interval in each.items()}
            for name, each in figures.items()
        }
        return {"reader": self.reader, "axis": self.axis.name, "counts": shown, **plain, "left_out": self.left_out}

    def save(self, path: str | Path) -> None:
        """Write the file that `--confusion` takes: columns group, read, count."""
        lines = [
            f"{_quoted(group)},{_quoted(read)},{count:.6g}"
            for group, row in self._rows()
            for read, count in zip(self.axis.groups, row, strict=True)
        ]
        write_text(path, "\n".join(["group,read,count", *lines]) + "\n")

    def _rows(self) -> Iterator[tuple[str, list[float]]]:
        return zip(self.axis.groups, self.counts.tolist(), strict=True)


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if any(each in text for each in ',"\n') else text


def measure_reader(
    reader: Reader,
    axis: Axis,
    pictures: Labelled,
    left_out: dict[str, int] | None = None,
    batch_size: int = 50,
    progress: Callable[[int], object] = lambda count: None,
) -> ReaderCheck:
    """Read labelled pictures, and count how often the reader is right.

    Args:
        reader: It can read the axis.
        axis: K groups.
        pictures: As from `labelled_pictures`.
        left_out: As from `labelled_pictures`.
        batch_size: Pictures of one size that are read together.
        progress: Called with the number of pictures that were read since.

    Raises:
        InputError: A picture cannot be read, or a group has none.
    """
    truth = torch.tensor([group for _, group in pictures])
    if lacking := [group for k, group in enumerate(axis.groups) if not bool((truth == k).any())]:
        raise InputError(f"no picture of {', '.join(lacking)}; every group of axis {axis.name!r} needs some")
    reads, none = [], []
    for batch in _batches([path for path, _ in pictures], batch_size):
        # A reader that is asked by person gets no occupation: labels say what the group is, and no more.
        persons = {"persons": ["person"] * len(batch)} if reader.by_person else {}
        each, unseen = groups_seen(reader, axis, reader.read(batch, **persons))
        reads.append(each.double())
        none.append(unseen)
        progress(len(batch))
    seen = torch.cat(reads)
    no_group = None if none[0] is None else torch.cat([each for each in none if each is not None])
    hits = top_group(seen)
    chosen = {group: truth == k for k, group in enumerate(axis.groups)}

    def rates(share: Callable[[Tensor, Tensor | None], Tensor]) -> dict[str, Interval]:
        shares = {g: float(share(seen[own], None if no_group is None else no_group[own])) for g, own in chosen.items()}
        counts = {group: int(own.sum()) for group, own in chosen.items()}
        return {group: wilson_interval(share * counts[group], counts[group]) for group, share in shares.items()}

    return ReaderCheck(
        reader.name,
        axis,
        torch.stack([hits[own].sum(0) for own in chosen.values()]),
        None if no_group is None else rates(no_group_rate),  # type: ignore[arg-type]
        rates(lambda own, unseen: unsure_rate(own, no_group=unseen)),
        left_out or {},
    )


def labelled_pictures(folder: str | Path, axis: Axis, column: str | None = None) -> tuple[Labelled, dict[str, int]]:
    """The pictures of an imagefolder that show a group of an axis.

    A label names a group by its name, its word, or one of its classes in the axis's file (`[reader.hf]`).

    Args:
        folder: A folder for each label, or a metadata.csv or metadata.jsonl with `file_name` and a column of labels.
        axis: Its groups.
        column: The column of labels; the axis's name by default, else "label".

    Returns:
        The pictures with the place of their group in the axis, and label -> number of pictures for other labels.

    Raises:
        InputError: No such folder, no pictures, no labels, or no group of the axis among them.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give a folder of labelled pictures")
    table = next((path for name in ("metadata.csv", "metadata.jsonl") if (path := root / name).is_file()), None)
    if table is None and column is not None:
        raise InputError(f"--column {column}: {root} has no metadata.csv or metadata.jsonl")
    found = _of_folders(root) if table is None else _of_table(root, table, axis, column)
    labels = sorted({label for _, label in found})
    if not labels:
        raise InputError(f"{root} holds no labelled pictures; expected {root}/GROUP/*.png, or a metadata.csv")
    columns = columns_of(axis, labels, [])
    if columns is None:
        shown = ", ".join(labels[:20]) + (", ..." if len(labels) > 20 else "")
        raise InputError(
            f"{root} has no pictures of some of {', '.join(axis.groups)}; its labels are {shown}. Rename its folders,"
            " or give an axis file whose [reader.hf] says which labels show the groups"
        )
    place = {labels[label]: k for k, own in enumerate(columns) for label in own}
    others = [label for _, label in found if label not in place]
    return [(path, place[label]) for path, label in found if label in place], {x: others.count(x) for x in set(others)}


def _of_folders(root: Path) -> list[tuple[Path, str]]:
    inside = (path for each in sorted(root.iterdir()) if each.is_dir() for path in sorted(each.rglob("*")))
    return [(p, p.relative_to(root).parts[0]) for p in inside if p.suffix.lower() in PICTURES and p.is_file()]


def _of_table(root: Path, table: Path, axis: Axis, column: str | None) -> list[tuple[Path, str]]:
    try:
        rows = [row for part in READERS[table.suffix](table) for row in part]
    except (OSError, ValueError) as error:
        raise InputError(f"{table} cannot be read: {first_line(error)}") from error
    known = set().union(*rows) if rows else set()
    column = column or next((name for name in (axis.name, "label") if name in known), axis.name)
    if missing := [name for name in ("file_name", column) if name not in known]:
        raise InputError(f"{table} has no column {missing[0]!r}; it has {', '.join(sorted(known)) or 'none'}")
    found = []
    for number, row in enumerate(rows, start=1):
        name, label = row.get("file_name"), row.get(column)
        if label is None or label == "":
            continue
        path = root / str(name)
        if not path.resolve().is_relative_to(root.resolve()):
            raise InputError(f"{table}, row {number}: {str(name)[:80]!r} is outside the folder")
        found.append((path, str(label)))
    return found


def _batches(paths: Sequence[Path], size: int) -> Iterator[Tensor]:
    """Pictures (n, 3, H, W) in [0, 1]; those that follow one another and have one size are read together."""
    for _, alike in groupby(map(read_picture, paths), key=lambda picture: picture.shape):
        waiting: list[Tensor] = []
        for picture in alike:
            waiting.append(picture)
            if len(waiting) == size:
                yield torch.stack(waiting).float() / 255
                waiting = []
        if waiting:
            yield torch.stack(waiting).float() / 255


def read_picture(path: Path) -> Tensor:
    """(3, H, W) uint8; raises InputError where the file is no picture."""
    try:
        with Image.open(path) as opened:
            upright = ImageOps.exif_transpose(opened).convert("RGB")
    except Exception as error:  # the formats have as many errors as there are formats
        raise InputError(f"{path} cannot be read as a picture: {first_line(error)}") from error
    return torch.from_numpy(np.array(upright)).permute(2, 0, 1)
