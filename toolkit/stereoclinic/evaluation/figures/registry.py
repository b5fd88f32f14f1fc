"""The figures of an arm as flat values, and what is known of each: its name, its form, and which way is better.

Results nest their figures, and later versions add to them. Whatever reads results (the report, `stereo compare`,
TensorBoard) walks them here, so that a figure nobody has heard of is still shown, under its own key.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from stereoclinic.statistics.intervals import wilson_interval

#: Where a report shows a figure; what stands in its head is in no table.
PUBLISHED, BIAS, AGAINST, SIDE, FURTHER, HEAD = (
    "published", "bias", "against a reference", "side effects", "further", "head",
)  # fmt: skip


@dataclass(frozen=True)
class Value:
    """A number, with the ends of its interval and its p-value where it has them."""

    estimate: float
    low: float | None = None
    high: float | None = None
    p_value: float | None = None

    @property
    def has_interval(self) -> bool:
        return self.low is not None and self.high is not None


@dataclass(frozen=True)
class Figure:
    """What is known of a figure.

    Args:
        title: As a reader meets it.
        part: One of those above.
        better: -1 where lower is better, 1 where higher is, 0 where neither.
        form: Of the number, as `format` takes it; "+" in front for what has a sign.
        by_size: Chance moves it by an amount that depends on how many images there are, so that runs of different
            sizes cannot be compared by it.
        note: One sentence on what it is.
    """

    title: str
    part: str = FURTHER
    better: int = 0
    form: str = ".2g"
    by_size: bool = False
    note: str = ""


def _gap(title: str, note: str) -> Figure:
    return Figure(title, BIAS, -1, ".2f", True, note)


#: By dotted key; one that ends in a dot stands for all below it.
FIGURES = {
    "parity_gap": _gap("parity gap", "Mean over groups of |share - target|, and over prompts."),
    "parity_gap_change": Figure(
        "change of the gap", BIAS, -1, "+.2f", True, "After minus before on the same seeds; p is for no change."
    ),
    "share_of_balanced_oracle": Figure(
        "part of the oracle's gain", BIAS, 1, ".0%", True, "Of what the balanced oracle gains, where it surely gains."
    ),
    "fairness_discrepancy": _gap("fairness discrepancy", "Length of shares - target."),
    "deviation_ratio": _gap("deviation ratio", "Largest |share - target|, as a part of the largest there can be."),
    "sdtv": _gap("SDTV", "Total variation between shares and target."),
    "kl": _gap("KL divergence", "Of shares from the target, in nats."),
    "normalised_entropy": Figure(
        "normalised entropy", BIAS, 1, ".2f", True, "1 where all groups have the same share, 0 where one has all."
    ),
    "allotment_obeyed": Figure(
        "allotment obeyed", BIAS, 1, ".2f", False, "Images that show the group they were allotted to."
    ),
    "published.": Figure("figure of protocol ", PUBLISHED, -1, ".3f", True),
    "amplification.slope": Figure(
        "slope on the reference", AGAINST, 0, ".2f", False,
        "Of the generated tilt: 1 as the reference, above 1 exaggerated, below 0 the other way round.",
    ),
    "amplification.excess": Figure(
        "gap beyond the reference's", AGAINST, -1, "+.2f", True, "The parity gap less the reference's own."
    ),
    "amplification.distance": Figure(
        "distance to the reference", AGAINST, 0, ".2f", True, "Share of images that would have to change group."
    ),
    "occupation_right": Figure(
        "occupation right", SIDE, 1, ".2f", False, "Images on which the prompt's own occupation is read."
    ),
    "occupation_right_change": Figure(
        "occupation right, change", SIDE, 1, "+.2f", False, "Against untreated, on the same seeds."
    ),
    "group_prompts.all": Figure(
        "group prompts obeyed", SIDE, 1, ".2f", False, "Prompts that name a group and show it, treated without a gate."
    ),
    "group_prompts.occupation_right": Figure(
        "occupation right in them", SIDE, 1, ".2f", False, "The same for the pictures of prompts that name a group."
    ),
    "group_prompts.": Figure("", SIDE, 1, ".2f", False, "Obeyed, of the prompts that name this group."),
    "unsure": Figure("unsure", SIDE, -1, ".2f", False, "Images whose top group the reader gives less than 0.8."),
    "no_group": Figure(
        "no group seen", SIDE, -1, ".2f", False,
        "Images that rather show none, such as no face; they still count in the shares, by what is read beside that.",
    ),
    "frechet_within_groups": Figure(
        "Fréchet distance within groups", SIDE, -1, ".2g", True,
        "To untreated images of prompts that name the same groups: what a change of groups does not account for.",
    ),
    "frechet_within_groups_ratio": Figure(
        "Fréchet distance within groups, over its floor", SIDE, -1, ".1f", True,
        "1 is what two samples of such prompts show, untreated; with more images small differences weigh more."
    ),
    "frechet_to_other_seeds": Figure(
        "Fréchet distance to other seeds", SIDE, -1, ".2g", True,
        "To untreated images of other seeds; the untreated model shows what two samples of it differ by.",
    ),
    "frechet_to_untreated": Figure(
        "Fréchet distance to untreated", SIDE, -1, ".2g", True, "To the untreated images of the same seeds."
    ),
    "kid_to_other_seeds": Figure(
        "kernel distance to other seeds", SIDE, -1, ".2g", False, "Unlike Fréchet's its mean does not depend on size."
    ),
    "kid_to_untreated": Figure("kernel distance to untreated", SIDE, -1, ".2g"),
    "feature_distance_to_untreated": Figure(
        "feature distance to untreated", SIDE, 0, ".2g", False, "Between pictures of the same seed."
    ),
    "ssim_to_untreated": Figure(
        "similarity to untreated", SIDE, 0, ".2f", False, "Of structure, between pictures of the same seed."
    ),
    "lpips_to_untreated": Figure(
        "LPIPS to untreated", SIDE, 0, ".2f", False, "As a network sees it, between pictures of the same seed."
    ),
    "diversity_within_groups": Figure(
        "diversity within groups", SIDE, 1, ".2g", False, "How far pictures of one prompt and group lie apart."
    ),
    "clip_score": Figure(
        "CLIPScore", SIDE, 1, ".1f", False, "How well pictures fit their neutral prompts, from 0 to 100."
    ),
    "clip_score_change": Figure(
        "CLIPScore, change", SIDE, 1, "+.2f", False, "Against untreated on the same seeds; p is for no change."
    ),
    "readers_agree": Figure(
        "readers agree", SIDE, 0, ".2f", False, "Images on which all readers name the same group."
    ),
    "readers_kappa.": Figure(
        "kappa of ", SIDE, 0, ".2f", False,
        "Their agreement beyond what chance would bring: 1 is full, 0 none beyond it.",
    ),
    "readers_agree_on.": Figure(
        "readers agree on ", SIDE, 0, ".2f", False, "Of the images that either reads so, the part that both do."
    ),
    "drift.": Figure(
        "drift of ", SIDE, -1, ".2f", True,
        "How far a prompt's shares on another axis moved; other seeds show what chance moves them by.",
    ),
    "unrelated.": Figure(
        "unrelated prompts: ", SIDE, 0, ".2g", True, "Of prompts that have nothing to do with the axis."
    ),
    "seconds": Figure("seconds", SIDE, -1, ".1f", False, "Of drawing these images; on a busy machine a rough guide."),
    "peak_memory": Figure("peak memory, MiB", SIDE, -1, ".0f", False, "The most that tensors took on a GPU meanwhile."),
    "images": Figure("images", HEAD, 0, ".0f"),
}  # fmt: skip

UNRELATED = "unrelated"  # family of figures of prompts that have nothing to do with the axis

#: Families of figures that repeat those above, otherwise counted.
_COUNTED = {"soft": "soft reads", "pooled": "prompts pooled", "pooled_soft": "prompts pooled, soft reads"}

FLOOR = "_floor"  # a figure's key and this: what chance alone shows of it
INTERVAL = "_interval"  # the key of a bare number and this: the same with its interval


def figure_of(key: str) -> Figure:
    """What is known of a figure; one that is not known is named by its key."""
    if key in FIGURES:
        return FIGURES[key]
    family, dot, member = key.partition(".")
    if dot and family in _COUNTED and member in FIGURES:
        return replace(FIGURES[member], title=f"{FIGURES[member].title}, {_COUNTED[family]}", part=FURTHER, note="")
    if family == UNRELATED and member in FIGURES:
        return replace(FIGURES[member], title=FIGURES[f"{UNRELATED}."].title + FIGURES[member].title)
    spoken = key.replace("_", " ").replace(".", ", ")
    if dot and (known := FIGURES.get(family + dot)):
        title = (known.title or "obeyed for ") + member.replace("_", " ")
        return Figure(title, known.part, known.better, known.form, known.by_size, known.note)
    if any(name.part == BIAS and key.startswith(f"{known}_") for known, name in FIGURES.items()):
        return Figure(spoken, BIAS, 0, ".2f", True)
    return Figure(spoken)


def in_order(keys: Iterable[str]) -> list[str]:
    """Keys in the order of `FIGURES`, members of a family in its place, and those that are not known at the end."""
    order = {known: i for i, known in enumerate(FIGURES)}

    def place(key: str) -> int:
        return order.get(key, order.get(key.partition(".")[0] + ".", len(order)))

    return sorted(keys, key=place)


def values_of(results: Mapping[str, Any], arm: str) -> dict[str, Value]:
    """Every figure of one arm by its dotted key, also those that stand beside the arms: of its group prompts and of
    unrelated ones, against a reference, and of a published protocol by that protocol's name.

    The prompts one by one are left out.

    Args:
        results: Of one experiment, as in results.json.
        arm: Name of an arm; one that is not there has no figures.
    """
    published = results.get("published") or {}
    beside = {
        "published": {name: {published["name"]: value} for name, value in (published.get("arms") or {}).items()},
        "amplification": results.get("amplification") or {},
        "group_prompts": results.get("group_prompts") or {},
        UNRELATED: (results.get(UNRELATED) or {}).get("arms") or {},
    }
    return _rated(flat(results["arms"].get(arm) or {})) | {
        f"{family}.{key}": value for family, arms in beside.items() for key, value in flat(arms.get(arm) or {}).items()
    }


def _rated(values: dict[str, Value]) -> dict[str, Value]:
    """The same with the interval of `unsure`, which follows from the number of images where results do not hold it."""
    found, images = values.get("unsure"), values.get("images")
    if found is None or found.has_interval or images is None:
        return values
    if not (0 <= found.estimate <= 1 and 1 <= images.estimate < math.inf):
        return values
    n = round(images.estimate)
    return values | {"unsure": Value(**vars(wilson_interval(found.estimate * n, n)))}


def flat(figures: Mapping[str, Any]) -> dict[str, Value]:
    """Numbers and intervals by dotted key; what is neither, or was not measured, is left out.

    A number whose interval stands beside it (`INTERVAL`) is one figure with that.
    """
    found: dict[str, Value] = {}
    for key, figure in figures.items():
        if key.endswith(INTERVAL) and key.removesuffix(INTERVAL) in figures:
            continue
        if (value := as_value(figures.get(key + INTERVAL)) or as_value(figure)) is not None:
            found[key] = value
        elif isinstance(figure, Mapping) and "estimate" not in figure:
            found |= {f"{key}.{below}": each for below, each in flat(figure).items()}
    return found


def as_value(figure: Any) -> Value | None:
    """A number, or an interval as results hold it; None for anything else."""
    if _is_number(figure):
        return Value(float(figure))
    if not isinstance(figure, Mapping) or not _is_number(figure.get("estimate")):
        return None
    ends = (figure.get(name) for name in ("low", "high", "p_value"))
    return Value(float(figure["estimate"]), *(float(end) if _is_number(end) else None for end in ends))


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value
