"""From relevance to a mask, by settings, and from one mask to another: what `stereo locate` and `stereo mask` do."""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from stereoclinic.errors import InputError
from stereoclinic.sns.factors import check_strength
from stereoclinic.sns.mask import BRANCHES, NeuronMask, Window, in_unit
from stereoclinic.sns.plan import treatment_plan
from stereoclinic.sns.select import top_k

if TYPE_CHECKING:
    from stereoclinic.ddtd.relevance import Relevance

METHODS = ("plan", "top-k")


@dataclass(frozen=True)
class Selection:
    """How neurons are chosen; the defaults are those of `stereo locate`, chosen by benchmarks/mitigation.

    Args:
        select: "plan" (see `treatment_plan`) or "top-k" (see `top_k`).
        mu: plan: the price of moving the prediction off the axis.
        overshoot: plan: take away so much more than each lean.
        at_most: plan: damp no more neurons than these; None for no limit.
        top: top-k: how many neurons, or which share of them when below 1.
        z: top-k: standard errors to stay below the mean.
        since: Noisiest timestep to damp at; None for the first there is.
        until: Cleanest timestep to damp at.
        kinds: Kinds of site to choose among; None for all.
        root: What neurons are damped toward, see `roots_for`.
        branch: Halves of a guided batch to damp.
        per_bin: Choose anew in each timestep bin, or once for all.

    Raises:
        InputError: A name is not known.
    """

    select: str = "plan"
    mu: float = 1.0
    overshoot: float = 0.0
    at_most: int | None = None
    top: float = 0.01
    z: float = 2.0
    since: float | None = None
    until: float = 600.0
    kinds: tuple[str, ...] | None = None
    root: str = "zero"
    branch: str = "both"
    per_bin: bool = False

    def __post_init__(self) -> None:
        if self.select not in METHODS:
            raise InputError(f"select {self.select!r}: expected {' or '.join(METHODS)}")
        if self.branch not in BRANCHES:
            raise InputError(f"branch {self.branch!r}: expected {' or '.join(BRANCHES)}")
        for name in ("mu", "overshoot"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise InputError(f"{name} {getattr(self, name)}: expected 0 or a positive number")
        if not math.isfinite(self.z):
            raise InputError(f"z {self.z}: expected a number of standard errors, such as 2")

    @property
    def k(self) -> int | float:
        """`top` as `top_k` takes it: a whole number of neurons, or a share of them."""
        return int(self.top) if self.top >= 1 and float(self.top).is_integer() else self.top


def choose(relevance: "Relevance", selection: Selection | None = None) -> NeuronMask:
    """The mask of a selection; by default that of `stereo locate`.

    Raises:
        InputError: The selection does not fit the relevance: a root, a kind, a number or a window.
    """
    selection = selection or Selection()
    first = float(relevance.bin_edges[0])
    high = first if selection.since is None else in_unit(selection.since, first)
    until = in_unit(selection.until, first)
    if until >= min(first, high):
        last = float(relevance.bin_edges[-1])
        raise InputError(
            f"from {high:g} until {until:g}: nothing is left to damp; timesteps run from {first:g} down to {last:g}"
        )
    window, kinds, root = (high, until), selection.kinds, selection.root
    if selection.select == "plan":
        mask = treatment_plan(
            relevance, selection.mu, overshoot=selection.overshoot, window=window, kinds=kinds, root=root,
            per_bin=selection.per_bin, at_most=selection.at_most,
        )  # fmt: skip
    else:
        mask = top_k(
            relevance, selection.k, root=root, kinds=kinds, window=window, per_bin=selection.per_bin, z=selection.z
        )
    return replace(mask, branch="both" if selection.branch == "both" else "conditional")


def adjusted(mask: NeuronMask, strength: float = 1.0, window: Window | None = None) -> NeuronMask:
    """A mask that damps less, or at fewer timesteps; `metadata["adjusted"]` lists what was done to it, in order.

    What a plan forecast holds no longer, and is left out.

    Args:
        mask: The mask.
        strength: Scales the damping, 1 - factor, from 0 (none) to 1 (as it is).
        window: Timesteps to damp in; None for all.

    Raises:
        InputError: The strength is out of range, or the window meets no bin.
    """
    check_strength(strength)
    if strength == 1 and window is None:
        return mask
    done = {"strength": strength, "window": list(window) if window else None}
    metadata = {**mask.metadata, "adjusted": [*mask.metadata.get("adjusted", []), done]}
    if selection := metadata.get("selection"):
        metadata["selection"] = {key: value for key, value in selection.items() if key != "bins"}
    narrowed = mask if window is None else mask.windowed(window)
    # 1 - (1 - s) is not s to the last bit.
    factors = narrowed.factors if strength == 1 else 1 - strength * narrowed.damping
    return replace(narrowed, factors=factors, metadata=metadata)
