"""How far a model exaggerates a reference: whether its pictures are more one-sided than the world they stand for.

The reference is a table of shares, by prompt label and group: those that were planted in the embedded model's training
pictures, or statistics of a country's labour, as a CSV with the columns label, group, share.

    slope = sum_pk (p_pk - t_k)(r_pk - t_k) / sum_pk (r_pk - t_k)^2      1: as the reference, above: exaggerated
    excess = mean over prompts of  sum_k (|p_pk - t_k| - |r_pk - t_k|) / K    gap of the model beyond the reference's
    distance = mean over prompts of (1/2) sum_k |p_pk - r_pk|

p are the generated shares, r the reference's, t the target (uniform: parity). The slope is without the bias of an
absolute value, so its interval is the one to read; a model that leans the other way than the reference has one below 0.

References: Zhao et al., Men Also Like Shopping, EMNLP 2017 (bias amplification against the training set's shares);
Bianchi et al., Easily Accessible Text-to-Image Generation Amplifies Demographic Stereotypes at Large Scale, FAccT 2023
(against labour statistics); Seshadri et al., The Bias Amplification Paradox, NAACL 2024.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.io.reading import read_text
from stereoclinic.statistics.gaps import gap_interval
from stereoclinic.statistics.intervals import Interval
from stereoclinic.statistics.noise import noise_of
from stereoclinic.statistics.resampling import or_seeded, percentiles
from stereoclinic.statistics.shares import distribution, parity_gap, sdtv

COLUMNS = ("label", "group", "share")
Reference = Mapping[str, Mapping[str, float]]

_FLAT = 1e-12  # a reference at the target itself leaves nothing to exaggerate


@dataclass(frozen=True)
class Amplification:
    """Generated shares against a reference, each with its interval over other seeds of the same prompts."""

    slope: Interval
    excess: Interval
    distance: Interval
    labels: tuple[str, ...]


def load_reference(path: str | Path) -> dict[str, dict[str, float]]:
    """Read a CSV with the columns label, group, share: label -> group -> share.

    Raises:
        InputError: It cannot be read, a column is missing, or a row is no share or is there twice.
    """
    try:
        with io.StringIO(read_text(path, "reference"), newline="") as file:
            rows = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
            if missing:
                raise InputError(f"reference {path}: no column {', '.join(missing)}; expected {', '.join(COLUMNS)}")
            table: dict[str, dict[str, float]] = {}
            for line, row in enumerate(rows, start=2):
                label, group, text = ((row[name] or "").strip() for name in COLUMNS)
                if not label or not group or group in table.get(label, {}):
                    raise InputError(f"reference {path}, line {line}: a label or group is missing or there twice")
                table.setdefault(label, {})[group] = _share(text, f"reference {path}, line {line}")
    except csv.Error as error:
        raise InputError(f"reference {path} cannot be read: {error}") from error
    return table


def reference_shares(table: Reference, labels: Sequence[str], groups: Sequence[str]) -> Tensor:
    """The table as (P, K) shares, NaN in the rows of labels that it lacks.

    Raises:
        InputError: A label has shares of some groups alone, of others as well, or that do not sum to 1; or no label is
            in the table.
    """
    rows = torch.full((len(labels), len(groups)), torch.nan, dtype=torch.float64)
    for p, label in enumerate(labels):
        if label not in table:
            continue
        if set(table[label]) != set(groups):
            raise InputError(
                f"reference of {label!r} has groups {', '.join(table[label])}; expected {', '.join(groups)}"
            )
        own = torch.tensor([table[label][group] for group in groups], dtype=torch.float64)
        rows[p] = distribution(own, f"reference shares of {label!r}")
    if rows.isnan().all():
        raise InputError(f"the reference has none of the labels {', '.join(labels)}; it has {', '.join(table)}")
    return rows


def amplification(
    reads: Tensor,
    labels: Sequence[str],
    groups: Sequence[str],
    table: Reference,
    target: Tensor | None = None,
    hard: bool = True,
    resamples: int = 2000,
    generator: torch.Generator | None = None,
) -> Amplification:
    """Slope, excess gap and distance of generated shares against a reference; see the head of this file.

    Args:
        reads: (P, n, K) class probabilities.
        labels: P labels of the prompts; those that the table lacks are left out.
        groups: K names, in the order of the reads.
        table: Label -> group -> share.
        target: (K,) shares that leaning is counted from; uniform if None.
        hard: Count each image's top group, or average probabilities.
        resamples: Number of bootstrap draws.
        generator: Source of randomness; seeded with 0 if None.

    Raises:
        InputError: As ``reference_shares``, or the reference lies at the target throughout.
    """
    reference = reference_shares(table, labels, groups)
    known = ~reference.isnan().any(1)
    reference, reads = reference[known], reads[known]
    wanted = torch.full((len(groups),), 1 / len(groups)) if target is None else torch.as_tensor(target)
    wanted = distribution(wanted, "target shares")
    tilt = reference - wanted  # (P, K)
    if float(tilt.square().sum()) < _FLAT:
        raise InputError("the reference lies at the target for every label; there is no tilt that could be exaggerated")

    settings: dict[str, Any] = {"hard": hard, "resamples": resamples}
    gap = gap_interval(reads, parity_gap, wanted, generator=generator, **settings)
    own = float(parity_gap(reference, wanted).mean())
    return Amplification(
        _slope(reads, wanted, tilt, hard, resamples, or_seeded(generator)),
        Interval(gap.estimate - own, gap.low - own, gap.high - own),
        gap_interval(reads, sdtv, reference, generator=generator, **settings),
        tuple(label for label, there in zip(labels, known.tolist(), strict=True) if there),
    )


def _slope(
    reads: Tensor, target: Tensor, tilt: Tensor, hard: bool, resamples: int, generator: torch.Generator
) -> Interval:
    """Least squares of what the model leans by on what the reference does, with an interval of its noise."""
    noise = noise_of(reads, target, hard, False, resamples, generator)

    def slope(leans: Tensor) -> Tensor:
        return (leans * tilt).sum((-1, -2)) / tilt.square().sum()

    n, K = reads.shape[1:]
    # One image more, spread over the groups: a prompt of which all images showed one group is not taken for certain.
    around = (n * noise.shares + 1 / K) / (n + 1)
    seen = float(slope(noise.shares - target))
    low, high = percentiles(slope(noise.around(around) - around), 0.95)
    return Interval(seen, seen + low, seen + high)


def _share(text: str, where: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise InputError(f"{where}: share {text!r}; expected a number between 0 and 1")
    return share
