"""Amplification: whether a model's images are more one-sided than a reference.

The reference is a table of shares by prompt label and group, such as labour statistics of a country.

    slope = sum_pk (p_pk - t_k)(r_pk - t_k) / sum_pk (r_pk - t_k)^2      1: as the reference, above: exaggerated
    excess = mean over prompts of  sum_k (|p_pk - t_k| - |r_pk - t_k|) / K    gap of the model beyond the reference's
    distance = mean over prompts of (1/2) sum_k |p_pk - r_pk|

p are the generated shares, r the reference's, t the target (uniform: parity). The slope has no bias from absolute
values, so its interval is the one to read. A model that leans the other way than the reference has a negative slope.

References: Zhao et al., Men Also Like Shopping, EMNLP 2017 (bias amplification against the training set's shares);
Bianchi et al., Easily Accessible Text-to-Image Generation Amplifies Demographic Stereotypes at Large Scale, FAccT 2023
(against labour statistics); Seshadri et al., The Bias Amplification Paradox, NAACL 2024.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.statistics.gaps import gap_interval
from stereoclinic.statistics.intervals import Interval
from stereoclinic.statistics.resampling import noise_of, or_seeded, percentiles
from stereoclinic.statistics.shares import distribution, parity_gap, sdtv

Reference = Mapping[str, Mapping[str, float]]  # label -> group -> share

_FLAT = 1e-12  # a reference at the target itself has no lean to exaggerate


@dataclass(frozen=True)
class Amplification:
    """Generated shares against a reference, with intervals over other seeds of the same prompts."""

    slope: Interval
    excess: Interval
    distance: Interval
    labels: tuple[str, ...]


def reference_shares(table: Reference, labels: Sequence[str], groups: Sequence[str]) -> Tensor:
    """The table as (P, K) shares, NaN in the rows of labels that it lacks.

    Raises:
        InputError: A label has other groups, or shares that do not sum to 1; or no label is in the table.
    """
    rows = torch.full((len(labels), len(groups)), torch.nan, dtype=torch.float64)
    for p, label in enumerate(labels):
        if label not in table:
            continue
        if set(table[label]) != set(groups):
            raise InputError(
                f"reference of {label!r} has groups {', '.join(table[label])}; expected {', '.join(groups)}"
            )
        row = torch.tensor([table[label][group] for group in groups], dtype=torch.float64)
        rows[p] = distribution(row, f"reference shares of {label!r}")
    if rows.isnan().all():
        raise InputError(f"the reference has none of the labels {', '.join(labels)}; it has {', '.join(table)}")
    return rows


def amplification(
    reads: Tensor,
    labels: Sequence[str],
    groups: Sequence[str],
    table: Reference,
    target: Tensor | None = None,
    resamples: int = 2000,
    generator: torch.Generator | None = None,
) -> Amplification:
    """Slope, excess gap and distance of generated (hard) shares against a reference; formulas above.

    Args:
        reads: (P, n, K) class probabilities.
        labels: P labels of the prompts; those that the table lacks are left out.
        groups: K names, in the order of the reads.
        table: Label -> group -> share.
        target: (K,) shares that leaning is counted from; uniform if None.
        resamples: Number of bootstrap draws.
        generator: Source of randomness; seeded with 0 if None.

    Raises:
        InputError: As `reference_shares`, or the reference lies at the target throughout.
    """
    reference = reference_shares(table, labels, groups)
    known = ~reference.isnan().any(1)
    reference, reads = reference[known], reads[known]
    wanted = torch.full((len(groups),), 1 / len(groups)) if target is None else torch.as_tensor(target)
    wanted = distribution(wanted, "target shares")
    tilt = reference - wanted  # (P, K)
    if float(tilt.square().sum()) < _FLAT:
        raise InputError("the reference equals the target for every label, so there is no tilt to exaggerate")
    gap = gap_interval(reads, parity_gap, wanted, resamples=resamples, generator=generator)
    reference_gap = float(parity_gap(reference, wanted).mean())
    return Amplification(
        _slope(reads, wanted, tilt, resamples, or_seeded(generator)),
        Interval(gap.estimate - reference_gap, gap.low - reference_gap, gap.high - reference_gap),
        gap_interval(reads, sdtv, reference, resamples=resamples, generator=generator),
        tuple(label for label, is_known in zip(labels, known.tolist(), strict=True) if is_known),
    )


def _slope(reads: Tensor, target: Tensor, tilt: Tensor, resamples: int, generator: torch.Generator) -> Interval:
    """Least-squares slope of the model's leans over the reference's."""
    noise = noise_of(reads, target, True, False, resamples, generator)

    def slope(leans: Tensor) -> Tensor:
        return (leans * tilt).sum((-1, -2)) / tilt.square().sum()

    n, K = reads.shape[1:]
    # One image more, spread over the groups, so that a prompt whose images all show one group still has noise.
    around = (n * noise.shares + 1 / K) / (n + 1)
    seen = float(slope(noise.shares - target))
    low, high = percentiles(slope(noise.around(around) - around))
    return Interval(seen, seen + low, seen + high)
