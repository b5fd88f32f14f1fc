"""What an experiment leaves on disk.

    FOLDER/results.json             every figure and where it came from
    FOLDER/images/.../*.png         every image, with metadata.jsonl, so that `datasets` reads it as an imagefolder
    FOLDER/before_after*.png        the same seeds untreated and treated, one sheet a mask
    FOLDER/report.html              all of it as one page
    FOLDER/README.md                a card, by which `datasets` and the hub read the folder as a data set

Everything is written to a temporary folder and moved at the end. A run that is stopped before leaves what was there;
one that is killed while moving leaves the rest to the next run (`files.whole_results`).
"""

import json
import math
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from torch import Tensor

from stereoclinic.ddtd.relevance import Relevance
from stereoclinic.errors import InputError
from stereoclinic.evaluation.arms import OTHER, SCHEMA, UNTREATED, Drawn, Experiment
from stereoclinic.io.files import plain, whole_results, write_image, write_text
from stereoclinic.io.text import is_own_card, slug
from stereoclinic.prompts.sets import write
from stereoclinic.report.card import dataset_card, sheets
from stereoclinic.report.page import build_page
from stereoclinic.report.pictures import font, grids, lettered
from stereoclinic.report.summary import lean_summary, mask_summary
from stereoclinic.sns.hub import README
from stereoclinic.sns.mask import NeuronMask

IMAGES, METADATA = "images", "metadata.jsonl"

_TILE = 128  # pixels of a picture on a sheet: the embedded model's 64, twice
_GAP, _BETWEEN, _MARGIN = 4, 24, 12
_LABEL, _TITLE = 18, 20
#: Letters of a line of a label, letters of a title for each pixel of its half, and rows of a sheet.
_LETTERS, _PER_PIXEL, _ROWS = 26, 0.085, 250


def write_results(
    folder: str | Path,
    experiments: Sequence[Experiment],
    provenance: dict[str, Any],
    masks: Mapping[str, NeuronMask] | None = None,
    relevance: Relevance | None = None,
) -> None:
    """Write figures, images, the before-and-after sheets and the report.

    Args:
        folder: Made if it does not exist; its earlier results are replaced.
        experiments: One for each guidance scale, of one axis.
        provenance: Plain data: model and digests, masks, versions, settings.
        masks: Those that were judged; the report shows where their neurons are.
        relevance: What they were chosen from; the report shows its leans.

    Raises:
        InputError: It cannot be written there, or holds images that are not ours.
    """
    folder = Path(folder)
    check_folder(folder)
    places = {name: mask_summary(mask) for name, mask in (masks or {}).items()}
    leans = None if relevance is None else lean_summary(relevance)
    figures = [experiment.results for experiment in experiments]
    data = plain({"schema": SCHEMA, "provenance": provenance, "experiments": figures})
    with whole_results(folder / IMAGES) as temporary:
        with ImageFolder(temporary) as images:
            for experiment in experiments:
                for entry, picture in _pictures(experiment):
                    images.add(entry, picture)
        for i, name, file in sheets(figures):
            write_image(temporary / file, before_after(experiments[i], name))
        write_text(temporary / "results.json", json.dumps(data, indent=2, allow_nan=False))
        write_text(temporary / README, dataset_card(figures))
        write_text(temporary / "report.html", build_page(data, grids(experiments), places, leans))


def check_folder(folder: str | Path) -> None:
    """Refuse, before any work is done, a folder that results cannot go to.

    Raises:
        InputError: It is a file, cannot be written, or holds `images` or a README.md that are not of an earlier run.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; results go to a folder")
    ours = folder / IMAGES
    if ours.exists() and not (ours / METADATA).is_file():
        raise InputError(f"{ours} is there already and holds no {METADATA} of an earlier run; choose another folder")
    if (card := folder / README).exists() and not (card.is_file() and is_own_card(card)):
        raise InputError(f"{card} is there already and is not of an earlier run; choose another folder")
    above = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"{folder} cannot be made: {above} is not a folder that can be written to")


class ImageFolder:
    """Writes FOLDER/images, with its metadata.jsonl when the context is left.

    Args:
        folder: Where nothing is yet, such as the temporary folder of `whole_results`.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / IMAGES
        self._lines: list[str] = []

    def __enter__(self) -> "ImageFolder":
        self.path.mkdir(parents=True)
        return self

    def add(self, entry: dict[str, Any], picture: Tensor) -> None:
        """Add an image (3, H, W) uint8 as `entry["file_name"]`, and the entry to the metadata."""
        path = self.path / entry["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        to_image(picture).save(path, format="PNG")
        self._lines.append(json.dumps(plain(entry), allow_nan=False))

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            write_text(self.path / METADATA, "\n".join(self._lines) + "\n")


def _pictures(experiment: Experiment) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Every image of an experiment with its line of metadata."""
    protocol = experiment.protocol
    groups, rows = protocol.axis.groups, list(enumerate(protocol.prompts))
    named = list(zip(groups, protocol.axis.words, strict=True))
    # By part: the arms, and of each of their prompts its label, text, the group it names, and the name of its files.
    parts: dict[str, tuple[list[Drawn], list[tuple[str, str, str | None, str]]]] = {
        "neutral": (experiment.neutral, [(row["label"], write(row), None, f"{p:03d}") for p, row in rows]),
        "group": (
            experiment.grouped,
            [
                (row["label"], write(row, word), group, f"{p:03d}-{slug(group)}")
                for p, row in rows
                for group, word in named
            ],
        ),
        "unrelated": (
            experiment.unrelated,
            [(row["label"], write(row), None, f"{p:03d}") for p, row in enumerate(protocol.unrelated or [])],
        ),
    }
    # Masks may differ in what a file name cannot hold, hence the number.
    names = dict.fromkeys(arm.name for arms, _ in parts.values() for arm in arms)
    folders = {name: f"{i:02d}-{slug(name)}" for i, name in enumerate(names)}
    for part, (arms, prompts) in parts.items():
        for arm in arms:
            seeds = arm.seeds_from(protocol.seed + (arm.images.shape[1] if arm.name == OTHER else 0))
            for p, (label, prompt, wanted, name) in enumerate(prompts):
                for i, seed in enumerate(seeds):
                    path = f"guidance-{protocol.guidance:g}/{part}/{folders[arm.name]}/{name}-{slug(label)}-{seed}.png"
                    entry = {
                        "file_name": path,
                        "arm": arm.name,
                        "guidance": protocol.guidance,
                        "part": part,
                        "label": prompt if part == "unrelated" else label,
                        "prompt": prompt,
                        "seed": seed,
                        "wanted_group": wanted,
                    }
                    read = _read(arm, groups, p, i)
                    # An unrelated picture shows nobody, whatever the reader sees in it.
                    yield entry | (dict.fromkeys(read) if part == "unrelated" else read), arm.images[p, i]


def _read(arm: Drawn, groups: Sequence[str], p: int, i: int) -> dict[str, Any]:
    """What the reader sees in an image."""
    reads = [round(probability, 4) for probability in arm.reads[p, i].tolist()]
    best = int(arm.reads[p, i].argmax())
    read = {
        "group": groups[best],
        "probability": reads[best],
        "probabilities": dict(zip(groups, reads, strict=True)),
    }
    if arm.no_group is not None:
        read["no_group"] = round(float(arm.no_group[p, i]), 4)
    return read if arm.remarks is None else read | {"remark": arm.remarks[p, i]}


def before_after(experiment: Experiment, name: str, seeds: int = 6) -> Image.Image:
    """The same seeds untreated and by one arm, one row for each prompt."""
    before, after = experiment.arm(UNTREATED), experiment.arm(name)
    rows = [
        SheetRow(label, list(before.images[p, :seeds]), list(after.images[p, :seeds]))
        for p, label in enumerate(experiment.protocol.prompts["label"])
    ]
    return side_by_side(rows, ("untreated", f"mask {name}" if name in experiment.results["masks"] else name))


@dataclass(frozen=True)
class SheetRow:
    """One labelled row of a sheet: images (3, H, W) uint8, in the same order on both sides."""

    label: str
    left: list[Tensor]
    right: list[Tensor]


def side_by_side(rows: Sequence[SheetRow], titles: tuple[str, str]) -> Image.Image:
    """A sheet with two halves under their titles and the label left of each row.

    Images are shown 128 pixels high; small ones are enlarged without smoothing. Labels have lines of 26 letters.
    At most 250 rows are drawn.

    Args:
        rows: One or more; all sides have the same number of images.
        titles: Of the left and the right half.
    """
    label_font, title_font = font(_LABEL), font(_TITLE)
    columns, left_out, rows = len(rows[0].left), len(rows) - _ROWS, rows[:_ROWS]
    tile = _tile_size(rows[0].left[0])
    half = columns * (tile[0] + _GAP) - _GAP
    labels = [_wrapped(row.label, max(1, tile[1] // (_LABEL + 6))) for row in rows]
    gutter = math.ceil(max(label_font.getlength(line) for lines in labels for line in lines)) + _MARGIN
    top = _MARGIN + _TITLE + 12
    bottom = top + len(rows) * (tile[1] + _GAP) - _GAP + _MARGIN
    size = (_MARGIN + gutter + 2 * half + _BETWEEN + _MARGIN, bottom + (_TITLE + _MARGIN) * (left_out > 0))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    starts = (_MARGIN + gutter, _MARGIN + gutter + half + _BETWEEN)
    for title, x in zip(titles, starts, strict=True):
        text = lettered(title, max(16, int(_PER_PIXEL * half)))
        draw.text((x + half / 2, _MARGIN + _TITLE / 2), text, fill="black", font=title_font, anchor="mm")
    for r, row in enumerate(rows):
        y = top + r * (tile[1] + _GAP)
        text = "\n".join(labels[r])
        draw.multiline_text((_MARGIN, y + tile[1] / 2), text, fill="black", font=label_font, anchor="lm")
        for pictures, x in zip((row.left, row.right), starts, strict=True):
            for i, picture in enumerate(pictures):
                sheet.paste(_sized(picture, tile), (x + i * (tile[0] + _GAP), y))
    middle = starts[1] - _BETWEEN // 2
    draw.line([(middle, top), (middle, bottom - _MARGIN)], fill="grey", width=1)
    if left_out > 0:
        draw.text((_MARGIN, bottom), f"{left_out} more rows are in the folder images", fill="black", font=label_font)
    return sheet


def to_image(picture: Tensor) -> Image.Image:
    """(3, H, W) uint8 -> RGB."""
    return Image.fromarray(picture.permute(1, 2, 0).contiguous().cpu().numpy())


def _tile_size(picture: Tensor) -> tuple[int, int]:
    _, height, width = picture.shape
    scale = max(1, _TILE // height) if height <= _TILE else _TILE / height
    return round(width * scale), round(height * scale)


def _sized(picture: Tensor, size: tuple[int, int]) -> Image.Image:
    image = to_image(picture)
    enlarges = size[1] >= image.height
    return image.resize(size, Image.Resampling.NEAREST if enlarges else Image.Resampling.LANCZOS)


def _wrapped(text: str, most: int) -> list[str]:
    """A label as at most this many lines."""
    whole = lettered(" ".join(text.split()), _LETTERS * most)
    return textwrap.wrap(whole, _LETTERS, max_lines=most, placeholder="...") or [""]
