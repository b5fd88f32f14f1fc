"""Settings of the two ways to make a mask: from stored relevance, or planned step by step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stereoclinic.errors import InputError
from stereoclinic.pipelines.sites import SITE_KINDS
from stereoclinic.sns.mask import BRANCHES, in_unit

METHODS = ("plan", "top-k")
ROOTS = ("zero", "group")


@dataclass(frozen=True)
class Selection:
    """How neurons are chosen by relevance; the defaults are those of `stereo locate`.

    Args:
        select: "plan" (see `treatment_plan`) or "top-k" (see `top_k`).
        mu: plan: price of moving the prediction off the axis.
        overshoot: plan: remove this fraction more than each measured lean.
        at_most: plan: largest number of damped neurons; None for no limit.
        top: top-k: number of neurons, or their share when below 1.
        z: top-k: standard errors to stay below the mean.
        since: Noisiest timestep to damp at; None for the first there is.
        until: Cleanest timestep to damp at.
        kinds: Kinds of site to choose among; None for all.
        root: What neurons are damped toward, see `roots_for`.
        branch: Halves of a guided batch to damp.
        per_bin: Choose anew in each timestep bin, or once for all.

    Raises:
        InputError: A value is out of range.
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
        check_not_negative(mu=self.mu, overshoot=self.overshoot)
        if not math.isfinite(self.z):
            raise InputError(f"z {self.z}: expected a number of standard errors, such as 2")

    @property
    def k(self) -> int | float:
        """`top` as `top_k` takes it: a whole number of neurons, or a share of them."""
        return int(self.top) if self.top >= 1 and float(self.top).is_integer() else self.top


@dataclass(frozen=True)
class Stepwise:
    """Settings of a stepwise plan.

    Args:
        mu: Price of the mean squared movement off the axis, in units of ||d||, against the squared lean.
        keep: Price of the squared movement along each direction to keep.
        overshoot: Aim beyond the target by this fraction of the way from the untreated lean.
        root: What neurons are damped toward: "zero", or "group", their mean over samples and positions for the prompts
            of the allotted group (without allocation: of all groups, averaged).
        until: Cleanest timestep to damp at.
        replans: Gauss-Newton steps at each timestep, at most; each is shortened until the objective decreases.
        kinds: Kinds of site to damp.
        steps: Of the scheduler.
        guidance: Scale along the trajectory.
        batch_size: Samples through the model together; changes only rounding.
        sites: Patterns of the sites' module paths, as file names, instead of the table of `pipelines.sites`.
    """

    mu: float = 0.1
    keep: float = 1.0
    overshoot: float = 0.0
    root: str = "zero"
    until: float = 400.0
    replans: int = 3
    kinds: tuple[str, ...] = tuple(SITE_KINDS)
    steps: int = 20
    guidance: float = 2.0
    batch_size: int = 36
    sites: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.root not in ROOTS:
            raise InputError(f"root {self.root!r}: expected {' or '.join(ROOTS)}")
        check_not_negative(mu=self.mu, keep=self.keep, overshoot=self.overshoot, guidance=self.guidance)
        for name in ("replans", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)}: expected 1 or more")

    def treated(self, timesteps: Sequence[float]) -> list[float]:
        """The timesteps that are planned: the first ones, down to `until`."""
        return [t for t in timesteps if t >= in_unit(self.until, timesteps[0])]


def check_not_negative(**values: float) -> None:
    """Raises InputError for a value that is negative or not finite."""
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"{name} {value}: expected 0 or a positive number")
