"""Whether two readers see the same in the same pictures: raw agreement, Cohen's kappa, and both group by group.

With N[i, j] the pictures that one reads as i and the other as j, n their number, and row and column sums N_i., N_.j:

    raw      = sum_k N_kk / n
    chance   = sum_k N_k. N_.k / n^2                     what readers who look at nothing would agree on
    kappa    = (raw - chance) / (1 - chance)
    group k  : specific agreement 2 N_kk / (N_k. + N_.k), and kappa of "k or not"

Agreement says that readers are reliable, not that they are right: two that share a mistake agree on it.

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
from stereoclinic.statistics.resampling import check_settings, dirichlet, or_seeded
from stereoclinic.statistics.shares import distribution, top_group


@dataclass(frozen=True)
class GroupAgreement:
    """On one group: of the pictures that either reads so, the part that both do; and kappa of it against the rest."""

    specific: Interval
    kappa: Interval


@dataclass(frozen=True)
class Agreement:
    """Two readers on the same pictures; kappa is NaN where both name one group throughout."""

    raw: Interval
    kappa: Interval
    groups: dict[str, GroupAgreement]


def agreement_table(one: Tensor, other: Tensor) -> Tensor:
    """Pictures by what each reader's top group is: (..., K) and (..., K) -> (K, K) float64; ties count in parts.

    Raises:
        InputError: If the two are not of the same pictures and groups, or there are none.
    """
    if one.shape != other.shape or one.dim() < 2 or one.numel() == 0:
        raise InputError(
            f"reads have shapes {tuple(one.shape)} and {tuple(other.shape)}; expected (..., K), the same pictures and"
            " groups from both readers"
        )
    hits = [top_group(distribution(each, "reads")).flatten(0, -2) for each in (one, other)]
    return hits[0].T @ hits[1]


def cohen_kappa(table: Tensor) -> Tensor:
    """Agreement beyond chance: counts or shares (..., K, K) -> (...), 1 at most, 0 by chance."""
    share = table.double() / table.double().sum((-1, -2), keepdim=True)
    raw = share.diagonal(dim1=-2, dim2=-1).sum(-1)
    chance = (share.sum(-1) * share.sum(-2)).sum(-1)
    return (raw - chance) / (1 - chance)


def specific_agreement(table: Tensor) -> Tensor:
    """Of the pictures that either reader gives a group, the part that both do: (..., K, K) -> (..., K)."""
    table = table.double()
    return 2 * table.diagonal(dim1=-2, dim2=-1) / (table.sum(-1) + table.sum(-2))


def agreement(
    one: Tensor,
    other: Tensor,
    groups: Sequence[str],
    resamples: int = 2000,
    confidence: float = 0.95,
    generator: torch.Generator | None = None,
) -> Agreement:
    """Agreement of two readers with intervals: Wilson's for the raw one, and of the rest from redrawn tables.

    Args:
        one: (..., K) class probabilities by one reader.
        other: (..., K) of the same pictures by the other.
        groups: K names.
        resamples: Number of draws (``resampling.dirichlet``).
        confidence: Coverage aimed at.
        generator: Source of randomness; seeded with 0 if None.

    Raises:
        InputError: As ``agreement_table``, or a setting is out of range.
    """
    check_settings(resamples, confidence)
    table = agreement_table(one, other).cpu()
    if len(groups) != len(table):
        raise InputError(f"{len(groups)} names of groups for {len(table)} columns of reads; expected one for each")
    drawn = dirichlet(table.flatten(), resamples, or_seeded(generator)).unflatten(-1, table.shape)
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)

    def interval(value: Tensor, draws: Tensor) -> Interval:
        low, high = torch.nanquantile(draws, tails).tolist()
        seen = float(value)
        return Interval(seen, min(seen, low), max(seen, high)) if seen == seen else Interval(seen, low, high)

    specific, all_specific = specific_agreement(table), specific_agreement(drawn)
    each = {
        group: GroupAgreement(
            interval(specific[k], all_specific[:, k]),
            interval(cohen_kappa(_or_not(table, k)), cohen_kappa(_or_not(drawn, k))),
        )
        for k, group in enumerate(groups)
    }
    raw = wilson_interval(float(table.trace()), round(float(table.sum())), confidence)
    return Agreement(raw, interval(cohen_kappa(table), cohen_kappa(drawn)), each)


def agreement_figures(by_reader: Mapping[str, Tensor], groups: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The agreement of two or more readers as plain data, as it stands in an arm's results.

    Args:
        by_reader: Name -> (P, n, K) class probabilities, of the same pictures by each reader.
        groups: K names.

    Returns:
        `readers_agree`, on how many pictures all of them name one group; `readers_kappa` by pair ("A and B"); and of
        two readers `readers_agree_on`, their specific agreement by group.
    """
    found = {
        f"{one} and {other}": agreement(by_reader[one], by_reader[other], groups)
        for one, other in itertools.combinations(by_reader, 2)
    }
    top = torch.stack([reads.argmax(-1).flatten() for reads in by_reader.values()])  # (readers, P n)
    same = (top == top[0]).all(0)
    figures = {
        "readers_agree": vars(wilson_interval(float(same.sum()), len(same))),
        "readers_kappa": {pair: vars(each.kappa) for pair, each in found.items()},
    }
    if len(found) == 1:
        (both,) = found.values()
        figures["readers_agree_on"] = {group: vars(each.specific) for group, each in both.groups.items()}
    return figures


def _or_not(table: Tensor, k: int) -> Tensor:
    """The table of one group against the rest: (..., K, K) -> (..., 2, 2)."""
    both, one, other = table[..., k, k], table[..., k, :].sum(-1), table[..., :, k].sum(-1)
    neither = table.sum((-1, -2)) - one - other + both
    return torch.stack([torch.stack([both, one - both], -1), torch.stack([other - both, neither], -1)], -2)
