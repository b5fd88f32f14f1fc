"""Agreement of two readers on the same images: Cohen's kappa and specific agreement by group.

With N[i, j] the number of images that one reads as i and the other as j, n their sum, and margins N_i., N_.j:

    raw      = sum_k N_kk / n
    chance   = sum_k N_k. N_.k / n^2                     agreement of readers who guess
    kappa    = (raw - chance) / (1 - chance)
    group k  : specific agreement 2 N_kk / (N_k. + N_.k)

Agreement says that readers are reliable, not that they are right.

References: Cohen, A Coefficient of Agreement for Nominal Scales, Educational and Psychological Measurement 1960;
Cicchetti & Feinstein, High Agreement but Low Kappa II, Journal of Clinical Epidemiology 1990 (specific agreement).
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.statistics.intervals import Interval, wilson_interval
from stereoclinic.statistics.resampling import check_draws, dirichlet, or_seeded, percentiles
from stereoclinic.statistics.shares import distribution, top_group


@dataclass(frozen=True)
class Agreement:
    """Kappa, NaN where both readers name one group throughout; specific agreement by group."""

    kappa: Interval
    specific: dict[str, Interval]


def agreement_table(one: Tensor, other: Tensor) -> Tensor:
    """Images by each reader's top group: (..., K) and (..., K) -> (K, K) float64; ties count in parts.

    Raises:
        InputError: The reads differ in images or groups, or there are no images.
    """
    if one.shape != other.shape or one.dim() < 2 or one.numel() == 0:
        raise InputError(
            f"reads have shapes {tuple(one.shape)} and {tuple(other.shape)}; expected (..., K), the same images and"
            " groups from both readers"
        )
    rows, columns = (top_group(distribution(reads, "reads")).flatten(0, -2) for reads in (one, other))
    return rows.T @ columns


def cohen_kappa(table: Tensor) -> Tensor:
    """Agreement beyond chance: counts or shares (..., K, K) -> (...), 1 at most, 0 by chance."""
    share = table.double() / table.double().sum((-1, -2), keepdim=True)
    raw = share.diagonal(dim1=-2, dim2=-1).sum(-1)
    chance = (share.sum(-1) * share.sum(-2)).sum(-1)
    return (raw - chance) / (1 - chance)


def specific_agreement(table: Tensor) -> Tensor:
    """Of the images that either reader gives a group, the part that both do: (..., K, K) -> (..., K)."""
    table = table.double()
    return 2 * table.diagonal(dim1=-2, dim2=-1) / (table.sum(-1) + table.sum(-2))


def agreement(
    one: Tensor,
    other: Tensor,
    groups: Sequence[str],
    resamples: int = 2000,
    generator: torch.Generator | None = None,
) -> Agreement:
    """Agreement of two readers, with intervals from redrawn tables.

    Args:
        one: (..., K) class probabilities by one reader.
        other: (..., K) of the same images by the other.
        groups: K names.
        resamples: Number of draws (`resampling.dirichlet`).
        generator: Source of randomness; seeded with 0 if None.

    Raises:
        InputError: As `agreement_table`, or a setting is out of range.
    """
    check_draws(resamples)
    table = agreement_table(one, other).cpu()
    if len(groups) != len(table):
        raise InputError(f"{len(groups)} names of groups for {len(table)} columns of reads; expected one for each")
    drawn = dirichlet(table.flatten(), resamples, or_seeded(generator)).unflatten(-1, table.shape)

    def interval(value: Tensor, draws: Tensor) -> Interval:
        low, high = percentiles(draws)
        seen = float(value)
        return Interval(seen, min(seen, low), max(seen, high)) if seen == seen else Interval(seen, low, high)

    specific, all_specific = specific_agreement(table), specific_agreement(drawn)
    return Agreement(
        interval(cohen_kappa(table), cohen_kappa(drawn)),
        {group: interval(specific[k], all_specific[:, k]) for k, group in enumerate(groups)},
    )


def agreement_figures(by_reader: Mapping[str, Tensor], groups: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The agreement of two or more readers as plain data, as it stands in an arm's results.

    Args:
        by_reader: Name -> (P, n, K) class probabilities, of the same images by each reader.
        groups: K names.

    Returns:
        `readers_agree`, on how many images all of them name one group; `readers_kappa` by pair ("A and B"); and of
        two readers `readers_agree_on`, their specific agreement by group.
    """
    pairs = {
        f"{one} and {other}": agreement(by_reader[one], by_reader[other], groups)
        for one, other in itertools.combinations(by_reader, 2)
    }
    top = torch.stack([reads.argmax(-1).flatten() for reads in by_reader.values()])  # (readers, P n)
    same = (top == top[0]).all(0)
    figures = {
        "readers_agree": vars(wilson_interval(float(same.sum()), len(same))),
        "readers_kappa": {pair: vars(each.kappa) for pair, each in pairs.items()},
    }
    if len(pairs) == 1:
        (only,) = pairs.values()
        figures["readers_agree_on"] = {group: vars(each) for group, each in only.specific.items()}
    return figures
