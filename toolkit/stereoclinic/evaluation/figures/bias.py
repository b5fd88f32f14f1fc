"""The bias figures: gaps between the groups' shares and their target, what a treatment changed, and prompt by prompt.

Gaps come from hard reads as a mean over prompts. On request they also come from soft reads, from the prompts' mean
shares, and from both (`registry.VARIANTS`).
"""

from typing import Any

import torch
from torch import Tensor

from stereoclinic.evaluation.arms import Protocol
from stereoclinic.evaluation.figures.case import Case
from stereoclinic.evaluation.figures.registry import (
    AMPLIFICATION,
    GAP,
    NATS,
    PERCENT,
    PROTOCOL,
    SHARE,
    SHARE_CHANGE,
    SLOPE,
    Figure,
    Unit,
    figure,
    register,
)
from stereoclinic.prompts.sets import write
from stereoclinic.statistics.gaps import interval_of
from stereoclinic.statistics.intervals import Interval, PairedDifference, wilson_interval
from stereoclinic.statistics.shares import GAPS, shares_from_reads, top_group
from stereoclinic.statistics.shares import normalised_entropy as entropy_of
from stereoclinic.statistics.shares import parity_gap as gap_to_parity
from stereoclinic.statistics.significance import benjamini_hochberg, holm, prompt_p_values

KL_DRAWS = 1000  # its tail is long (docs/results/intervals.md)
_DIGITS = 4  # of the soft shares of one prompt


@figure("parity gap", SHARE, "lower", part="bias", shown=True, by_size=True, variants=True)
def parity_gap(case: Case) -> Interval:
    """Mean over groups of |share - target|, averaged over prompts."""
    return interval_of(case.usual_noise, gap_to_parity)


@figure("change of the gap", SHARE_CHANGE, "lower", part="bias", shown=True, by_size=True)
def parity_gap_change(case: Case) -> PairedDifference | None:
    """After minus before on the same seeds; p is for no change."""
    return case.change


@figure("part of the oracle's gain", PERCENT, "higher", part="bias", by_size=True)
def share_of_balanced_oracle(case: Case) -> float | None:
    """Of what the balanced oracle gains, where that gain is significant."""
    if case.change is None or case.ceiling is None or case.ceiling.high >= 0:
        return None
    return case.change.estimate / case.ceiling.estimate


@figure("fairness discrepancy", GAP, "lower", part="bias", by_size=True, asked=True, variants=True)
def fairness_discrepancy(case: Case) -> Interval:
    """Euclidean length of shares - target."""
    return _gap(case, "fairness_discrepancy")


@figure("deviation ratio", GAP, "lower", part="bias", by_size=True, asked=True, variants=True)
def deviation_ratio(case: Case) -> Interval:
    """Largest |share - target|, divided by the largest there can be."""
    return _gap(case, "deviation_ratio")


@figure("SDTV", SHARE, "lower", part="bias", by_size=True, asked=True, variants=True)
def sdtv(case: Case) -> Interval:
    """Total variation distance between shares and target."""
    return _gap(case, "sdtv")


@figure("KL divergence", NATS, "lower", part="bias", by_size=True, asked=True, variants=True)
def kl(case: Case) -> Interval:
    """Of the shares from the target."""
    return interval_of(case.noise(case.target, KL_DRAWS), GAPS["kl"])


@figure(
    "normalised entropy",
    SHARE,
    "higher",
    part="bias",
    by_size=True,
    asked=True,
    variants=True,
    name="normalised_entropy",
)
def normalised_entropy(case: Case) -> Interval:
    """1 where all groups have the same share, 0 where one group has all."""
    # One minus the entropy is a gap to uniform shares, whatever the target.
    lack = interval_of(case.noise(None), lambda shares, target: 1 - entropy_of(shares))
    return Interval(1 - lack.estimate, 1 - lack.high, 1 - lack.low)


@figure("allocation followed", SHARE, "higher", part="bias")
def allotment_obeyed(case: Case) -> Interval | None:
    """Images that show the group they were allotted to."""
    allotted = case.arm.allotted
    if allotted is None or not (allotted >= 0).any():  # the gate may have left every prompt alone
        return None
    asked = allotted >= 0
    hits = top_group(case.arm.reads).gather(2, allotted.clamp_min(0)[..., None])[..., 0]
    return wilson_interval(float(hits[asked].sum()), int(asked.sum()))


register(
    Figure(
        "published.",
        "figure of protocol {}",
        "",
        Unit("gap", ".3f", 0),
        "lower",
        "published",
        by_size=True,
        on=(PROTOCOL,),
    )
)
register(
    Figure(
        "amplification.slope", "slope on the reference",
        "1 as the reference, above 1 exaggerated, below 0 reversed.",
        SLOPE, part="reference", on=(AMPLIFICATION,), kind=Interval,
    )
)  # fmt: skip
register(
    Figure(
        "amplification.excess", "gap beyond the reference's", "The parity gap minus the reference's own.",
        SHARE_CHANGE, "lower", "reference", by_size=True, on=(AMPLIFICATION,), kind=Interval,
    )
)  # fmt: skip
register(
    Figure(
        "amplification.distance", "distance to the reference", "Share of images that would have to change group.",
        SHARE, part="reference", by_size=True, on=(AMPLIFICATION,), kind=Interval,
    )
)  # fmt: skip


def _gap(case: Case, name: str) -> Interval:
    """A gap. Total variation, and with two groups all but the divergence, take the parity gap's interval."""
    target, gap = case.target, GAPS[name]
    if name != "sdtv" and len(target) > 2:
        return interval_of(case.usual_noise, gap)
    one = torch.nn.functional.one_hot(target.argmin(), len(target)).double()  # is off from any target
    unit = float(gap(one, target) / gap_to_parity(one, target))
    parity = parity_gap(case)
    return Interval(unit * parity.estimate, unit * parity.low, unit * parity.high)


def prompt_figures(case: Case, protocol: Protocol) -> list[dict[str, Any]]:
    """Prompt by prompt: shares and gap from hard and soft reads, and how sure the same seeds are of a change."""
    reads, groups = case.arm.reads, protocol.axis.groups
    images = reads.shape[1]
    shares, hits = shares_from_reads(reads, hard=True), top_group(reads).sum(1)  # (P, K)
    soft = shares_from_reads(reads, hard=False)
    rows: list[dict[str, Any]] = [
        {
            "label": row["label"],
            "prompt": write(row),
            "shares": {group: vars(wilson_interval(float(hits[p, k]), images)) for k, group in enumerate(groups)},
            "parity_gap": float(gap_to_parity(shares[p], protocol.target)),
            "soft_shares": {group: _soft_share(float(soft[p, k]), images) for k, group in enumerate(groups)},
            "soft_parity_gap": round(float(gap_to_parity(soft[p], protocol.target)), _DIGITS),
        }
        for p, row in enumerate(protocol.prompts)
    ]
    if case.paired is not None:
        for row, change in zip(rows, _prompt_changes(case.paired.reads, reads), strict=True):
            row["change"] = change
    return rows


def _soft_share(mean: float, images: int) -> dict[str, float]:
    """The mean of reads, with Wilson's interval: no numbers in [0, 1] of this mean vary more than zeros and ones do."""
    interval = wilson_interval(min(max(mean, 0.0), 1.0) * images, images)
    return {name: round(end, _DIGITS) for name, end in vars(interval).items()}


def _prompt_changes(before: Tensor, after: Tensor) -> list[dict[str, Any]]:
    """How many images of each prompt changed group, and the p-value of no change of its shares, plain and corrected."""
    moved = (before.argmax(2) != after.argmax(2)).sum(1).tolist()
    plain = prompt_p_values(before, after)
    columns = zip(moved, plain, holm(plain), benjamini_hochberg(plain), strict=True)
    names = ("moved", "p_value", "p_value_holm", "p_value_benjamini_hochberg")
    return [dict(zip(names, values, strict=True)) for values in columns]
