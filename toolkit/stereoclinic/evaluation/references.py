"""Knowledge from a user's files: shares that images should reflect, and how often their reader is wrong.

Each gives the arms of an experiment further figures.
"""

import csv
import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.evaluation.arms import Experiment
from stereoclinic.io.reading import read_text
from stereoclinic.prompts.occupations import planted_shares
from stereoclinic.statistics.amplification import Reference, amplification
from stereoclinic.statistics.reader_error import corrected_intervals

PLANTED = "planted"


def reference_named(source: str, axis: str) -> Reference:
    """A CSV with the columns label, group, share; or "planted", the shares of the embedded model's world.

    Raises:
        InputError: It cannot be read, or that world has no such axis.
    """
    return planted_shares(axis) if source == PLANTED else load_reference(source)


def load_reference(path: str | Path) -> dict[str, dict[str, float]]:
    """Read a CSV with the columns label, group, share: label -> group -> share.

    Raises:
        InputError: It cannot be read, a column is missing, or a row is not a share or is there twice.
    """
    table: dict[str, dict[str, float]] = {}
    for where, (label, group, share) in _csv_rows(path, "reference", ("label", "group", "share")):
        if not label or not group or group in table.get(label, {}):
            raise InputError(f"{where}: a label or group is missing or there twice")
        try:
            value = float(share)
        except ValueError:
            value = math.nan
        if not 0 <= value <= 1:
            raise InputError(f"{where}: share {share!r}; expected a number between 0 and 1")
        table.setdefault(label, {})[group] = value
    return table


def load_confusion(path: str | Path, groups: Sequence[str]) -> Tensor:
    """Read a CSV with the columns group, read, count: how often images of a group were read as each: (K, K) counts.

    Raises:
        InputError: It cannot be read, a column is missing, a row names no group or no count, a group has no image, or
            the reader confuses the groups too often to be corrected.
    """
    counts = torch.zeros(len(groups), len(groups), dtype=torch.float64)
    for where, (group, read, count) in _csv_rows(path, "confusion", ("group", "read", "count")):
        if group not in groups or read not in groups or not re.fullmatch(r"[0-9]{1,15}(\.[0-9]{1,9})?", count):
            raise InputError(f"{where}: expected two of {', '.join(groups)} and a number of images")
        counts[groups.index(group), groups.index(read)] += float(count)
    if lacking := [group for group, total in zip(groups, counts.sum(1).tolist(), strict=True) if total == 0]:
        raise InputError(f"confusion {path}: no image of {', '.join(lacking)}")
    corrected_intervals(torch.eye(len(groups)), counts)  # refuses a matrix that cannot be inverted
    return counts


def _csv_rows(path: str | Path, what: str, columns: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """For each row where it stands, as messages begin, and its fields in the order of `columns`."""
    try:
        with io.StringIO(read_text(path, what), newline="") as file:
            rows = csv.DictReader(file)
            if missing := [name for name in columns if name not in (rows.fieldnames or ())]:
                raise InputError(f"{what} {path}: no column {', '.join(missing)}; expected {', '.join(columns)}")
            for line, row in enumerate(rows, start=2):
                yield f"{what} {path}, line {line}", [(row[name] or "").strip() for name in columns]
    except csv.Error as error:
        raise InputError(f"{what} {path} cannot be read: {error}") from error


def amplified(experiment: Experiment, table: Reference) -> dict[str, Any]:
    """How far each arm exaggerates a reference, see `amplification`: arm -> its figures as plain data."""
    protocol = experiment.protocol
    labels, groups = list(protocol.prompts["label"]), protocol.axis.groups
    return {
        arm.name: asdict(amplification(arm.reads, labels, groups, table, protocol.target)) for arm in experiment.neutral
    }


def corrected(experiment: Experiment, confusion: Tensor) -> dict[str, Any]:
    """Shares without the reader's error, of each prompt: arm -> one {group: interval} a prompt, as plain data."""
    groups = experiment.protocol.axis.groups
    return {
        arm.name: [
            dict(zip(groups, map(asdict, corrected_intervals(reads, confusion)), strict=True)) for reads in arm.reads
        ]
        for arm in experiment.neutral
    }
