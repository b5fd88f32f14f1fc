"""Allocation: which group an image is allotted to, from its prompt and seed alone, never from its batch."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stereoclinic.errors import InputError

if TYPE_CHECKING:
    from stereoclinic.prompts.axes import Axis
    from stereoclinic.prompts.sets import Row

_GOLDEN = 0.6180339887498949
JOINT = "+"  # between the groups of several axes: "female+old"


def allotted_group(row: "Row", shares: Tensor) -> int:
    """The group of one image.

    A prompt's seeds follow an additive (golden ratio) sequence that starts at a hash of the prompt, so that any run of
    consecutive seeds meets the shares more closely than independent draws would (Niederreiter 1992, section 3.1).

    Args:
        row: The sample's `prompt` and `seed`.
        shares: (K,) adding up to 1.

    Raises:
        InputError: Shares that are negative or do not add up to 1.
    """
    if (shares < 0).any() or abs(float(shares.sum()) - 1) > 1e-6:
        raise InputError(f"shares {shares.tolist()}: expected none below 0 and a sum of 1")
    start = int.from_bytes(hashlib.sha256(row["prompt"].encode()).digest()[:8], "big") / 2**64
    point = (start + row["seed"] * _GOLDEN) % 1.0
    group = int(torch.searchsorted(shares.double().cumsum(0), torch.tensor(point, dtype=torch.float64), right=True))
    return min(group, len(shares) - 1)


def on_axis(groups: Sequence[str], axis: "Axis") -> list[int]:
    """The number of each of a mask's groups on an axis, -1 for a group of another axis.

    Examples:
        >>> from stereoclinic.prompts.axes import load_axis
        >>> on_axis(["female+old", "male+young"], load_axis("gender")), on_axis(["old", "young"], load_axis("gender"))
        ([0, 1], [-1, -1])
    """
    names = [[name for name in (group, *group.split(JOINT)) if name in axis.groups] for group in groups]
    return [axis.index(known[0]) if known else -1 for known in names]


def uniform(groups: int) -> Tensor:
    """Equal shares (K,)."""
    return torch.full((groups,), 1 / groups, dtype=torch.float64)


def shares_of(groups: Sequence[str], given: Sequence[Mapping[str, float]] = ()) -> Tensor:
    """The share of each group.

    Args:
        groups: K names; those of several axes at once are joined by "+", as `compose` names them.
        given: Shares by name: one mapping for the groups themselves, or one for each axis, whose products are the
            joint shares. An axis without a mapping is uniform.

    Returns:
        (K,) float64.

    Raises:
        InputError: A name that is not a group, a share that is missing, negative or not finite, or a sum other than 1.

    Examples:
        >>> shares_of(["female", "male"]).tolist()
        [0.5, 0.5]
        >>> shares_of(["female+old", "female+young", "male+old", "male+young"], [{"old": 0.25, "young": 0.75}]).tolist()
        [0.125, 0.375, 0.125, 0.375]
    """
    parts = [group.split(JOINT) for group in groups]
    if len({len(names) for names in parts}) > 1 or not all(name for names in parts for name in names):
        parts = [[group] for group in groups]  # an axis of its own whose names hold a "+", such as "60+"
    axes = [list(dict.fromkeys(names)) for names in zip(*parts, strict=True)]
    if len(given) == 1 and set(given[0]) == set(groups):
        _check(given[0], list(groups))
        return torch.tensor([given[0][group] for group in groups], dtype=torch.float64)
    by_axis: dict[int, Mapping[str, float]] = {}
    for shares in given:
        place = next((i for i, names in enumerate(axes) if set(shares) & set(names)), None)
        if place is None:
            unknown = next(iter(shares), "")
            raise InputError(
                f"shares: no group {unknown!r}; choose one of {', '.join(n for names in axes for n in names)}"
            )
        _check(shares, axes[place])
        if place in by_axis:
            raise InputError(f"shares of {', '.join(axes[place])} are given twice")
        by_axis[place] = shares
    marginals = [by_axis.get(i, dict.fromkeys(names, 1 / len(names))) for i, names in enumerate(axes)]
    joint = [math.prod(marginals[i][name] for i, name in enumerate(names)) for names in parts]
    return torch.tensor(joint, dtype=torch.float64)


def _check(given: Mapping[str, float], groups: list[str]) -> None:
    unknown = [name for name in given if name not in groups]
    if unknown:
        raise InputError(f"shares: no group {unknown[0]!r}; choose one of {', '.join(groups)}")
    missing = [name for name in groups if name not in given]
    if missing:
        raise InputError(f"shares: none given for {', '.join(missing)}; give one for each of {', '.join(groups)}")
    if not all(math.isfinite(share) and share >= 0 for share in given.values()):
        raise InputError(f"shares {dict(given)}: expected numbers of 0 or more")
    total = sum(given.values())
    if abs(total - 1) > 1e-6:
        raise InputError(f"shares add up to {total:g}; expected 1")
