"""The treatment plan: how far to damp each neuron so that every lean goes down and little else moves.

    minimise over 0 <= lambda <= 1    ||S - A lambda||^2 + mu ||V lambda||^2        (s_j = 1 - lambda_j)

A holds relevance rows, S their leans, V the collateral rows: what damping moves off the axis.

From relevance to a mask, by settings, and from one mask to another: what `stereo locate` and `stereo mask` do.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.pipelines.sites import SITE_KINDS
from stereoclinic.sns.factors import check_strength
from stereoclinic.sns.mask import BRANCHES, NeuronMask, Window, bins_in, in_unit
from stereoclinic.sns.select import mask_from, neurons_of, top_k

if TYPE_CHECKING:
    from stereoclinic.ddtd.relevance import Relevance


def treatment_plan(
    relevance: "Relevance",
    mu: float,
    target: float | Sequence[float] = 0.0,
    overshoot: float = 0.0,
    window: Window | None = None,
    kinds: Sequence[str] | None = None,
    root: str = "zero",
    per_bin: bool = True,
    smallest_factor: float = 0.0,
    shrink: float = 0.5,
    iterations: int = 2000,
    at_most: int | None = None,
) -> NeuronMask:
    """Plan the damping from stored relevance.

    A has a row for each label, group and timestep bin (a label counts once, however many groups there are), V
    one for each label, bin and sketch. With more neurons than rows, V lambda could be made to vanish by playing
    neurons off against each other, and the prediction would move all the same; `shrink` therefore replaces
    that share of V'V by its diagonal. (In one synthetic study, 12 labels and
    1500 neurons with a known V'V, a half came within 8 % of the best share tried at each of three prices;
    against 0, the true objective went from 3 % higher at the lowest price to half at the highest.)

    Args:
        relevance: What was located.
        mu: Price of the mean squared movement off the axis, in units of ||d||, against the squared lean; 0 or
            more.
        target: The lean to arrive at: 0, or K values, one for each group, to plan an allocation.
        overshoot: Plan to take away (1 + overshoot) times each lean. Later steps restore part of a tilt that was
            only just removed, so parity of images can need more than a lean of zero.
        window: Timesteps to damp in; None for all.
        kinds: Kinds of site to damp; None for all.
        root: What neurons are damped toward, as in `roots_for`; the relevance should have been located with
            the same.
        per_bin: Solve each timestep bin by itself; otherwise one lambda serves all bins, and can be fused.
        smallest_factor: No neuron is damped below this.
        shrink: 0 to 1, see above.
        iterations: At most so many of the solver's.
        at_most: Damp no more neurons than these, all bins taken together. Those whose absence would cost the
            objective most are kept and the rest planned anew without the others, halving their number each time;
            None for no limit.

    Returns:
        A mask; `metadata["selection"]["bins"]` holds, for each bin, the mean absolute lean before and as
        planned (both relative to the target), and the predicted root mean square movement off the axis in
        units of ||d||. They are judged on the rows they were planned on, hence optimistic. Bins without a
        sample have nulls; planned by themselves they stay untouched.

    Raises:
        InputError: An argument is out of range, or no sample lies in the window.
    """
    if not (math.isfinite(mu) and mu >= 0):
        raise InputError(f"mu = {mu:g}; expected 0 or a positive number")
    if not (math.isfinite(overshoot) and overshoot >= 0):
        raise InputError(f"overshoot = {overshoot:g}; expected 0 or a positive number")
    for name, value in (("smallest_factor", smallest_factor), ("shrink", shrink)):
        if not 0 <= value <= 1:
            raise InputError(f"{name} = {value:g}; expected 0 to 1")
    if iterations < 1:
        raise InputError(f"iterations = {iterations}; expected 1 or more")
    if at_most is not None and at_most < 1:
        raise InputError(f"at_most = {at_most}; expected 1 or more neurons, or none for no limit")
    columns = neurons_of(relevance.sites, kinds)
    goal = _target(target, relevance.groups)
    inside = bins_in(relevance.bin_edges, window)
    bins = (inside & (relevance.count.sum(0) > 0).cpu()).nonzero().flatten().tolist()
    if not bins:
        raise InputError("relevance holds no sample in these timesteps; widen the window or locate with more steps")

    systems = {t: _system(relevance, t, columns, goal) for t in bins}
    groups = len(relevance.groups)
    parts = [[t] for t in bins] if per_bin else [bins]
    problems = []
    for part in parts:
        A, S, V = (torch.cat(each) for each in zip(*(systems[t] for t in part), strict=True))
        ridge = shrink * V.square().sum(0)
        problems.append((A / groups**0.5, (1 + overshoot) * S / groups**0.5, (1 - shrink) ** 0.5 * V, ridge))
    solve = partial(_solve, problems, mu=mu, upper=1 - smallest_factor, iterations=iterations)
    solutions, worth = solve(torch.ones(int(columns.sum()), dtype=torch.bool))
    while at_most is not None and (number := int((worth > 0).sum())) > at_most:
        kept = torch.zeros_like(worth, dtype=torch.bool)
        kept[worth.argsort(descending=True, stable=True)[: max(at_most, number // 2)]] = True
        solutions, worth = solve(kept)
    lambdas = torch.zeros(len(inside), len(columns), dtype=torch.float64)
    for part, solution in zip(parts, solutions, strict=True):
        for t in part if per_bin else inside.nonzero().flatten().tolist():
            lambdas[t, columns] = solution
    settings: dict[str, Any] = {
        "method": "plan",
        "mu": mu,
        "target": goal.tolist(),
        "overshoot": overshoot,
        "window": list(window) if window else None,
        "kinds": list(kinds or SITE_KINDS),
        "root": root,
        "per_bin": per_bin,
        "smallest_factor": smallest_factor,
        "shrink": shrink,
        "iterations": iterations,
        "at_most": at_most,
        "bins": [
            _forecast(
                relevance.bin_edges, t, systems.get(t), lambdas[t, columns], shrink, relevance.collateral.shape[2]
            )
            for t in range(len(inside))
        ],
    }
    return mask_from(relevance, 1 - lambdas, root, per_bin, window, settings)


def bounded_least_squares(
    A: Tensor,
    S: Tensor,
    V: Tensor,
    mu: float,
    ridge: Tensor | None = None,
    upper: float = 1.0,
    iterations: int = 2000,
    tolerance: float = 1e-7,
) -> Tensor:
    """Minimise ||S - A lambda||^2 + mu (||V lambda||^2 + sum_j ridge_j lambda_j^2) over 0 <= lambda <= upper.

    Accelerated projected gradient (FISTA, Beck and Teboulle 2009, eq. 4.1 to 4.3) with the gradient restart
    of O'Donoghue and Candes 2015 (eq. 13), in float64. It stops once the duality gap, which bounds how far
    the objective is from its minimum, is below `tolerance` times the objective at lambda = 0.

    Args:
        A: (m, n).
        S: (m,).
        V: (l, n).
        mu: 0 or more.
        ridge: (n,), 0 or more; None for none.
        upper: Largest lambda.
        iterations: At most so many.
        tolerance: Relative duality gap.

    Returns:
        (n,) float64.
    """
    M = torch.cat([A.double(), mu**0.5 * V.double()])  # (m + l, n)
    b = torch.cat([S.double(), torch.zeros(len(V), dtype=torch.float64)])
    D = mu * ridge.double() if ridge is not None else torch.zeros(A.shape[1], dtype=torch.float64)
    x = torch.zeros(A.shape[1], dtype=torch.float64)
    # A diagonal metric: bounds stay bounds, and columns of very different size converge alike.
    scale = (M.square().sum(0) + D).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    M, D, box = M / scale, D / scale.square(), upper * scale
    # An upper bound of the largest eigenvalue of M'M + D, where a power iteration would approach it from
    # below.
    gram = M @ M.T if M.shape[0] < M.shape[1] else M.T @ M
    step = 1 / (torch.linalg.eigvalsh(gram)[-1] + D.max()).clamp_min(1e-12)
    goal = tolerance * b.square().sum()
    y, momentum = x, 1.0
    for i in range(iterations):
        gradient = M.T @ (M @ y - b) + D * y
        new = (y - step * gradient).clamp_min(0).minimum(box)
        if torch.dot(y - new, new - x) > 0:  # the momentum points uphill
            y, momentum = x, 1.0
            continue
        grown = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        x, y, momentum = new, new + (momentum - 1) / grown * (new - x), grown
        if i % 10 < 9:  # the gap costs as much as a step
            continue
        gradient_x = M.T @ (M @ x - b) + D * x
        # 2 max over u in the box of <gradient, x - u>
        if 2 * torch.where(gradient_x > 0, gradient_x * x, gradient_x * (x - box)).sum() <= goal:
            break
    return (x / scale).clamp(0, upper)


def _solve(
    problems: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]], kept: Tensor, mu: float, upper: float, iterations: int
) -> tuple[list[Tensor], Tensor]:
    """lambda of each problem (A, S, V, ridge) with the neurons `kept` alone, (n,), and what each is worth to them all.

    A neuron is worth what the objective would grow by, were its lambda set to zero and nothing else changed.
    """
    solutions, worth = [], torch.zeros(len(kept), dtype=torch.float64)
    for A, S, V, ridge in problems:
        A, V, ridge = A[:, kept], V[:, kept], ridge[kept]
        x = bounded_least_squares(A, S, V, mu, ridge, upper, iterations)
        slope = A.T @ (A @ x - S) + mu * (V.T @ (V @ x) + ridge * x)
        curvature = A.square().sum(0) + mu * (V.square().sum(0) + ridge)
        worth[kept] += x * (x * curvature - 2 * slope)
        solutions.append(torch.zeros_like(worth).masked_scatter(kept, x))
    return solutions, worth


def _target(target: float | Sequence[float], groups: Sequence[str]) -> Tensor:
    leans = [0.0] * len(groups) if target == 0 else target
    if isinstance(leans, (int, float)) or len(leans) != len(groups) or not all(map(math.isfinite, leans)):
        raise InputError(f"target {target}; expected 0, or one lean for each of {', '.join(groups)}")
    return torch.tensor([float(lean) for lean in leans], dtype=torch.float64)


def _system(relevance: "Relevance", t: int, columns: Tensor, goal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A (P' K, n), S (P' K,) and V (P' R, n) of one bin, over the P' labels seen in it and R sketches."""
    seen = relevance.count[:, t] > 0
    n = relevance.count[seen, t].double()
    rows = relevance.relevance_sum[seen, t][..., columns].double() / n[:, None, None]
    leans = relevance.value_sum[seen, t].double() / n[:, None] - goal.to(n.device)
    collateral = relevance.collateral[seen, t][..., columns].double() / n.sqrt()[:, None, None]
    return rows.flatten(0, 1).cpu(), leans.flatten().cpu(), collateral.flatten(0, 1).cpu()


def _forecast(
    edges: Tensor, t: int, system: tuple[Tensor, Tensor, Tensor] | None, x: Tensor, shrink: float, sketches: int
) -> dict[str, Any]:
    """What the linear model says of one bin: mean |lean| before and after, movement off the axis."""
    line: dict[str, Any] = {"from": edges[t].item(), "to": edges[t + 1].item()}
    if system is None:
        return {**line, "lean_before": None, "lean_after": None, "off_axis": None}
    A, S, V = system
    squared = (1 - shrink) * (V @ x).square() + shrink * V.square() @ x.square()
    return {
        **line,
        "lean_before": S.abs().mean().item(),
        "lean_after": (S - A @ x).abs().mean().item(),
        "off_axis": (squared.sum() * sketches / len(V)).sqrt().item(),
    }


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
