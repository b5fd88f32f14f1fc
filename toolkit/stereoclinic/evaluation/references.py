"""What is known beside the pictures: shares that they should reflect, and how often their reader is wrong.

Both come from files of the user's own, and give each arm of an experiment further figures.
"""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.evaluation.arms import Experiment
from stereoclinic.io.reading import read_text
from stereoclinic.prompts.occupations import planted_shares
from stereoclinic.statistics.amplification import Reference, amplification, load_reference
from stereoclinic.statistics.reader_error import corrected_intervals

PLANTED = "planted"
CONFUSION_COLUMNS = ("group", "read", "count")


def reference_named(source: str, axis: str) -> Reference:
    """A CSV with the columns label, group, share; or "planted", the shares of the embedded model's world.

    Raises:
        InputError: It cannot be read, or that world has no such axis.
    """
    return planted_shares(axis) if source == PLANTED else load_reference(source)


def amplified(experiment: Experiment, table: Reference) -> dict[str, Any]:
    """How far each arm exaggerates a reference, see `amplification`: arm -> its figures as plain data."""
    protocol = experiment.protocol
    labels, groups = list(protocol.prompts["label"]), protocol.axis.groups
    return {
        arm.name: asdict(amplification(arm.reads, labels, groups, table, protocol.target)) for arm in experiment.neutral
    }


def load_confusion(path: str | Path, groups: Sequence[str]) -> Tensor:
    """Read a CSV with the columns group, read, count: how often pictures of a group were read as each: (K, K) counts.

    Raises:
        InputError: It cannot be read, a column is missing, a row names no group or no count, a group has no picture, or
            the groups are hardly told apart.
    """
    counts = torch.zeros(len(groups), len(groups), dtype=torch.float64)
    try:
        with io.StringIO(read_text(path, "confusion"), newline="") as file:
            rows = csv.DictReader(file)
            if missing := [name for name in CONFUSION_COLUMNS if name not in (rows.fieldnames or ())]:
                expected = ", ".join(CONFUSION_COLUMNS)
                raise InputError(f"confusion {path}: no column {', '.join(missing)}; expected {expected}")
            for line, row in enumerate(rows, start=2):
                group, read, text = ((row[name] or "").strip() for name in CONFUSION_COLUMNS)
                if group not in groups or read not in groups or not re.fullmatch("[0-9]{1,15}", text):
                    raise InputError(
                        f"confusion {path}, line {line}: expected two of {', '.join(groups)} and a whole number"
                    )
                counts[groups.index(group), groups.index(read)] += int(text)
    except csv.Error as error:
        raise InputError(f"confusion {path} cannot be read: {error}") from error
    if lacking := [group for group, total in zip(groups, counts.sum(1).tolist(), strict=True) if total == 0]:
        raise InputError(f"confusion {path}: no picture of {', '.join(lacking)}")
    corrected_intervals(torch.eye(len(groups)), counts)  # refused here if it hardly tells the groups apart
    return counts


def corrected(experiment: Experiment, confusion: Tensor) -> dict[str, Any]:
    """Shares without the reader's error, of each prompt: arm -> one {group: interval} a prompt, as plain data."""
    groups = experiment.protocol.axis.groups
    return {
        arm.name: [
            dict(zip(groups, map(asdict, corrected_intervals(reads, confusion)), strict=True)) for reads in arm.reads
        ]
        for arm in experiment.neutral
    }
