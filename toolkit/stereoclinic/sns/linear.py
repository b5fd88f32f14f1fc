"""The linear plan: how far to damp each neuron so that every lean goes down and little else moves.

    minimise over 0 <= lambda <= 1    ||S - A lambda||^2 + mu ||V lambda||^2        (s_j = 1 - lambda_j)

A holds relevance rows, S their leans, V the collateral rows: what damping moves off the axis.

`choose` makes a mask from relevance by settings, `adjusted` a weaker or narrower mask from another, `static_mask` one
that weights can hold.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.pipelines.bins import Window, bins_in
from stereoclinic.sns.mask import NeuronMask, check_not_negative, check_strength, in_unit
from stereoclinic.sns.select import Selection, mask_from, measured_bins, neurons_of, number_of, top_k

if TYPE_CHECKING:
    from stereoclinic.ddtd.relevance import Relevance

#: Share of V'V that is replaced by its diagonal. With more neurons than rows, V lambda could be made to vanish by
#: letting neurons cancel each other, and the prediction would move all the same. In one synthetic study (12 labels,
#: 1500 neurons, a known V'V) a half came within 8 % of the best share tried at each of three prices; with 0 the true
#: objective was from 3 % higher at the lowest price to half as high again at the highest.
SHRINK = 0.5

#: M, b and ridge of one bounded least-squares problem.
Problem = tuple[Tensor, Tensor, Tensor]


def treatment_plan(
    relevance: "Relevance",
    mu: float,
    overshoot: float = 0.0,
    window: Window | None = None,
    kinds: Sequence[str] | None = None,
    root: str = "zero",
    per_bin: bool = True,
    at_most: int | None = None,
) -> NeuronMask:
    """Plan the damping from stored relevance.

    A has a row for each label, group and timestep bin (a label counts once, however many groups there are), V one for
    each label, bin and sketch; `SHRINK` of V'V is replaced by its diagonal.

    Args:
        relevance: What was located.
        mu: Price of the mean squared movement off the axis, in units of ||d||, against the squared lean; 0 or more.
        overshoot: Plan to remove (1 + overshoot) times each lean. Later steps restore part of a tilt that was only just
            removed, so parity of images can need more than a lean of zero.
        window: Timesteps to damp in; None for all.
        kinds: Kinds of site to damp; None for all.
        root: What neurons are damped toward, as in `roots_for`; locate the relevance with the same.
        per_bin: Solve each timestep bin by itself; otherwise one lambda serves all bins, and can be fused.
        at_most: Largest number of damped neurons, over all bins; None for no limit. Those whose absence would cost the
            objective most are planned again without the others, halving their number each time.

    Returns:
        A mask; `metadata["selection"]["bins"]` has, for each bin, the mean absolute lean before and as planned, and the
        predicted root mean square movement off the axis in units of ||d||, computed on the rows that were planned on.
        Bins without a sample have nulls; planned by themselves they stay untouched.

    Raises:
        InputError: An argument is out of range, or no sample lies in the window.
    """
    check_not_negative(mu=mu, overshoot=overshoot)
    if at_most is not None and at_most < 1:
        raise InputError(f"at_most {at_most}: expected 1 or more neurons, or none for no limit")
    columns = neurons_of(relevance.sites, kinds)
    inside = bins_in(relevance.bin_edges, window)
    bins = measured_bins(relevance, window).nonzero().flatten().tolist()
    systems = {t: _system(relevance, t, columns) for t in bins}
    parts = [[t] for t in bins] if per_bin else [bins]
    problems = [_problem([systems[t] for t in part], len(relevance.groups), mu, overshoot) for part in parts]
    lambdas = torch.zeros(len(inside), len(columns), dtype=torch.float64)
    for part, solution in zip(parts, _solve(problems, at_most), strict=True):
        for t in part if per_bin else inside.nonzero().flatten().tolist():
            lambdas[t, columns] = solution
    edges, sketches = relevance.bin_edges, relevance.collateral.shape[2]
    forecast = [_forecast(edges, t, systems.get(t), lambdas[t, columns], sketches) for t in range(len(inside))]
    how = {"method": "plan", "mu": mu, "overshoot": overshoot, "shrink": SHRINK, "at_most": at_most, "bins": forecast}
    return mask_from(relevance, 1 - lambdas, how, root, kinds, window, per_bin)


def most_useful(relevance: "Relevance", share: float, window: Window | None, mu: float, allocate: bool) -> Tensor:
    """The neurons that a plan gains most from, by stored relevance: (N,) bool.

    One problem for each timestep bin and target is solved with no more than this share of all neurons: to turn every
    label's lean to that of each group, or to zero. Ranking by relevance alone would drop neurons whose part in the
    stereotype is for some labels and against it for others, which is how neurons of the axis itself behave.

    Args:
        relevance: What was located.
        share: Of all neurons, above 0 and up to 1.
        window: Timesteps that count; None for all.
        mu: Price as in `treatment_plan`.
        allocate: Whether images will be allotted groups; otherwise the target is zero.

    Raises:
        InputError: The share is out of range, or nothing was measured in the window.
    """
    neurons, groups = sum(site.width for site in relevance.sites), len(relevance.groups)
    number = number_of(float(share), neurons)
    targets = torch.zeros(1, groups, dtype=torch.float64)
    if allocate:  # the lean of an image of each group, as if the directions of all had the same length and angles
        targets = (torch.eye(groups, dtype=torch.float64) * groups - 1) / (groups - 1)
    problems = []
    for t in measured_bins(relevance, window).nonzero().flatten().tolist():
        A, S, V = _system(relevance, t, torch.arange(neurons))
        for target in targets:
            short = S - target.repeat(len(S) // groups)
            problems.append(_problem([(A, short, V)], groups, mu, 0.0))
    return torch.stack(_solve(problems, number)).amax(0) > 0


def _system(relevance: "Relevance", t: int, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A (P' K, n), S (P' K,) and V (P' R, n) of one bin, over the P' labels seen in it and R sketches."""
    seen = relevance.count[:, t] > 0
    n = relevance.count[seen, t].double()
    rows = relevance.relevance_sum[seen, t][..., columns].double() / n[:, None, None]
    leans = relevance.value_sum[seen, t].double() / n[:, None]
    collateral = relevance.collateral[seen, t][..., columns].double() / n.sqrt()[:, None, None]
    return rows.flatten(0, 1).cpu(), leans.flatten().cpu(), collateral.flatten(0, 1).cpu()


def _problem(systems: Sequence[tuple[Tensor, Tensor, Tensor]], groups: int, mu: float, overshoot: float) -> Problem:
    """The least-squares problem of some bins."""
    A, S, V = (torch.cat(parts) for parts in zip(*systems, strict=True))
    M = torch.cat([A / groups**0.5, mu**0.5 * ((1 - SHRINK) ** 0.5 * V)])
    b = torch.cat([(1 + overshoot) * S / groups**0.5, torch.zeros(len(V), dtype=torch.float64)])
    return M, b, mu * (SHRINK * V.square().sum(0))


def _forecast(
    edges: Tensor, t: int, system: tuple[Tensor, Tensor, Tensor] | None, x: Tensor, sketches: int
) -> dict[str, Any]:
    """What the linear model predicts for one bin: mean |lean| before and after, movement off the axis."""
    line: dict[str, Any] = {"from": edges[t].item(), "to": edges[t + 1].item()}
    if system is None:
        return {**line, "lean_before": None, "lean_after": None, "off_axis": None}
    A, S, V = system
    squared = (1 - SHRINK) * (V @ x).square() + SHRINK * V.square() @ x.square()
    return {
        **line,
        "lean_before": S.abs().mean().item(),
        "lean_after": (S - A @ x).abs().mean().item(),
        "off_axis": (squared.sum() * sketches / len(V)).sqrt().item(),
    }


def _solve(problems: Sequence[Problem], at_most: int | None) -> list[Tensor]:
    """lambda (n,) of each problem, of which no more than `at_most` are above zero in any of them."""
    solutions, worth = _solve_among(problems, torch.ones(problems[0][0].shape[1], dtype=torch.bool))
    while at_most is not None and (number := int((worth > 0).sum())) > at_most:
        kept = torch.zeros_like(worth, dtype=torch.bool)
        kept[worth.argsort(descending=True, stable=True)[: max(at_most, number // 2)]] = True
        solutions, worth = _solve_among(problems, kept)
    return solutions


def _solve_among(problems: Sequence[Problem], kept: Tensor) -> tuple[list[Tensor], Tensor]:
    """lambda of each problem with the neurons `kept` alone, (n,), and what each neuron is worth to all problems.

    A neuron is worth what the objective would grow by if its lambda became zero and nothing else changed.
    """
    solutions, worth = [], torch.zeros(len(kept), dtype=torch.float64)
    for M, b, ridge in problems:
        M, ridge = M[:, kept], ridge[kept]
        x = bounded_least_squares(M, b, ridge)
        slope = M.T @ (M @ x - b) + ridge * x
        curvature = M.square().sum(0) + ridge
        worth[kept] += x * (x * curvature - 2 * slope)
        solutions.append(torch.zeros_like(worth).masked_scatter(kept, x))
    return solutions, worth


def bounded_least_squares(
    M: Tensor, b: Tensor, ridge: Tensor, iterations: int = 2000, tolerance: float = 1e-7
) -> Tensor:
    """Minimise ||b - M lambda||^2 + sum_j ridge_j lambda_j^2 over 0 <= lambda <= 1.

    Accelerated projected gradient (FISTA, Beck and Teboulle 2009, eq. 4.1 to 4.3) with the gradient restart of
    O'Donoghue and Candes 2015 (eq. 13), in float64. It stops once the duality gap, which bounds how far the objective
    is from its minimum, is below `tolerance` times the objective at lambda = 0. `scipy.optimize.lsq_linear` needs the
    ridge as a row for each neuron, which a hundred thousand neurons do not allow.

    Args:
        M: (m, n).
        b: (m,).
        ridge: (n,), 0 or more.
        iterations: The most to make.
        tolerance: Relative duality gap.

    Returns:
        (n,) float64.
    """
    M, b, D = M.double(), b.double(), ridge.double()
    x = torch.zeros(M.shape[1], dtype=torch.float64)
    # A diagonal metric: bounds stay bounds, and columns of very different size converge alike.
    scale = (M.square().sum(0) + D).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    M, D, box = M / scale, D / scale.square(), scale
    # An upper bound of the largest eigenvalue of M'M + D; a power iteration would approach it from below.
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
    return (x / scale).clamp(0, 1)


def choose(relevance: "Relevance", selection: Selection | None = None) -> NeuronMask:
    """The mask that a selection makes from relevance; by default as `stereo locate` makes it.

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
    """A mask that damps less, or at fewer timesteps; `metadata["adjusted"]` lists all such changes, in order.

    A plan's forecast no longer holds, and is left out.

    Args:
        mask: The mask.
        strength: Scales the damping, 1 - factor, from 0 (none) to 1 (unchanged).
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


def static_mask(mask: NeuronMask) -> NeuronMask:
    """The nearest mask that acts alike on all images, at all timesteps and in both halves of guidance.

    What weights, a LoRA or (IA)^3 can hold. Its damping is the mean of that of all groups, and of the timestep bins
    where the mask damps anything, each by its width: the least-squares fit there. (The dampings of a plan's groups turn
    leans to each group in turn, so that in the linear model their mean turns leans to zero.) Where the mask damps
    nothing, below its window, it damps too. `metadata["adjusted"]` says so.

    Returns:
        A plain mask of one bin; roots are averaged with the same damping.
    """
    factors = mask.factors.double()
    offsets = None if mask.roots is None else (1 - factors) * mask.roots
    if mask.allocates:
        factors, offsets = factors.mean(0), None if offsets is None else offsets.mean(0)
    widths = mask.bin_edges[:-1] - mask.bin_edges[1:]
    share = widths * (factors < 1).any(1)
    share = share / share.sum() if share.any() else widths / widths.sum()
    factor = (share @ factors)[None].clamp(max=1).float()
    roots = None
    if offsets is not None:
        roots = torch.where(factor < 1, (share @ offsets)[None] / (1 - factor), 0.0)
    edges = torch.tensor([mask.bin_edges[0].item(), min(mask.bin_edges[-1].item(), 0.0)], dtype=torch.float64)
    done = {"strength": 1.0, "window": edges.tolist(), "static": True}
    metadata = {**mask.metadata, "adjusted": [*mask.metadata.get("adjusted", []), done]}
    if selection := metadata.get("selection"):
        metadata["selection"] = {key: value for key, value in selection.items() if key != "bins"}
    return NeuronMask(mask.sites, edges, factor, roots, "both", metadata)


def forecast(relevance: "Relevance", mask: NeuronMask) -> list[dict[str, Any]]:
    """What the linear model predicts for a plain mask in each timestep bin of the relevance it was made from.

    Returns:
        For each bin `from`, `to`, `lean_before` and `lean_after` (mean absolute leans), and `off_axis`, as
        `treatment_plan` has them; None where nothing was measured.

    Raises:
        InputError: The mask has other sites.
    """
    if mask.sites != relevance.sites:
        raise InputError("the relevance has other sites than the mask; give that which it was made from")
    neurons, found = torch.arange(mask.factors.shape[-1]), []
    for t, low in enumerate(relevance.bin_edges[1:].tolist()):
        bin_ = mask.bin_of(low)
        damping = torch.zeros(len(neurons)) if bin_ is None else mask.damping[bin_]
        system = _system(relevance, t, neurons) if (relevance.count[:, t] > 0).any() else None
        found.append(_forecast(relevance.bin_edges, t, system, damping.double(), relevance.collateral.shape[2]))
    return found
