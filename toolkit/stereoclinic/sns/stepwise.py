"""The treatment planned step by step, on the trajectory as it is being treated.

A damped trajectory visits other x_t than an undamped one, and damping many neurons adds up to more than the sum of what
each does. So each step is planned where the steps before it have led, and planned again where its own damping leads:

    a_j  ->  a_j - lambda_j (a_j - r_j)                     lambda_j = 1 - s_j
    minimise over 0 <= lambda <= 1, mean over samples,
        (S(lambda) - tau)^2                                 the lean at its target
        + mu   mean_v <v, f(lambda) - f>^2                  moved off the axis, v random in units of ||d||
        + keep sum_e <e, f(lambda) - f>^2                   moved along what is to stay: other axes, the text itself

by Gauss-Newton: at the current lambda the rows dS/dlambda_j = -sum over positions (a_j - r_j) g_j come from one
backward pass a cotangent, at the treated point; then one bounded least-squares problem. tau is 0 for a balanced
prediction; for an image that is allotted to group g it is the lean of f_g, the prediction when g is asked for.

There are more neurons than samples, so a plan can fit its own samples and miss others: what counts is how many leans it
has seen. So every sample gives its leans' rows, and a row for one of v and e in turn, which the others make up for.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stereoclinic.axes import Axis
from stereoclinic.ddtd.neurons import SITE_KINDS, Site, find_sites
from stereoclinic.ddtd.target import axis_size, group_directions, lean, off_axis, off_axis_cotangent
from stereoclinic.denoisers.base import Denoiser
from stereoclinic.denoisers.sampling import guide
from stereoclinic.digest import shapes_digest, weights_digest
from stereoclinic.errors import InputError
from stereoclinic.prompts import Row, Samples, group_prompts
from stereoclinic.sns.damped import Damped
from stereoclinic.sns.mask import NeuronMask
from stereoclinic.sns.plan import bounded_least_squares

ROOTS = ("zero", "group")


@dataclass(frozen=True)
class Stepwise:
    """How a treatment is planned along its own trajectory.

    Args:
        mu: Price of the mean squared movement off the axis, in units of ||d||, against the squared lean.
        keep: Price of the squared movement along each direction that is to stay.
        overshoot: Aim so much further than the target, as a share of the way from the untreated lean.
        root: What neurons are damped toward: "zero", or "group", their mean over samples and positions when the
            allotted group (of a plain treatment: each group in turn, averaged) is asked for.
        until: Cleanest timestep that is treated.
        replans: Gauss-Newton steps at each timestep, at most; each goes as far as the objective gets smaller.
        cotangents: Rows of each sample, timestep and replan beside its leans', for v and each e in turn; each costs a
            backward pass. More where samples are too few for all of them.
        shrink: Share of the off-axis rows' Gram matrix that is replaced by its diagonal, see `treatment_plan`.
        kinds: Kinds of site to damp.
        steps: Of the scheduler.
        guidance: Scale along the trajectory.
        batch_size: Samples through the model together; changes nothing but rounding.
    """

    mu: float = 0.1
    keep: float = 1.0
    overshoot: float = 0.0
    root: str = "zero"
    until: float = 400.0
    replans: int = 3
    cotangents: int = 1
    shrink: float = 0.5
    kinds: tuple[str, ...] = tuple(SITE_KINDS)
    steps: int = 20
    guidance: float = 2.0
    batch_size: int = 36

    def __post_init__(self) -> None:
        if self.root not in ROOTS:
            raise InputError(f"root {self.root!r}: expected {' or '.join(ROOTS)}")
        for name in ("mu", "keep", "overshoot", "guidance"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise InputError(f"{name} {getattr(self, name)}: expected 0 or a positive number")
        for name in ("replans", "cotangents", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)}: expected 1 or more")
        if not 0 <= self.shrink <= 1:
            raise InputError(f"shrink {self.shrink}: expected 0 to 1")


def plan_stepwise(
    denoiser: Denoiser,
    axis: Axis,
    samples: Samples,
    settings: Stepwise,
    allocate: bool = False,
    stay: Sequence[Axis] = (),
    candidates: Tensor | None = None,
    progress: Callable[[int], None] | None = None,
) -> NeuronMask:
    """Plan a treatment along the neutral prompts' treated trajectories.

    Args:
        denoiser: The model.
        axis: The bias axis.
        samples: Calibration; results are judged on other seeds.
        settings: See `Stepwise`.
        allocate: Plan one damping a group, for images that are allotted to it; otherwise one that balances.
        stay: Other axes along whose directions the prediction is to stay where it is.
        candidates: (N,) bool, the neurons that may be damped, such as those that relevance located; None for all.
        progress: Called with the number of samples that were planned on, once a group and treated step.

    Returns:
        A mask of the conditional branch with a bin for each treated step; with `allocate` an allocating one. Its
        `metadata["selection"]["steps"]` says of each what was planned: mean |lean - target| before and after, and the
        movement off the axis in units of ||d||, all on the samples planned on.

    Raises:
        InputError: No step is treated, or the candidates are not of this model.
    """
    timesteps = denoiser.timesteps(settings.steps)
    treated = [float(t) for t in timesteps if float(t) >= settings.until]
    if not treated:
        raise InputError(f"until {settings.until:g}: no step lies above it; timesteps run from {float(timesteps[0]):g}")
    sites = find_sites(denoiser.unet, settings.kinds)
    neurons = sum(site.width for site in sites)
    if candidates is not None and candidates.shape != (neurons,):
        raise InputError(f"candidates of shape {tuple(candidates.shape)}; expected ({neurons},), the model's neurons")
    planned = [
        _Walk(denoiser, axis, list(samples), settings, sites, stay, candidates, group, progress).plan()
        for group in (range(len(axis)) if allocate else [None])
    ]
    factors, roots = torch.stack([each[0] for each in planned]), torch.stack([each[1] for each in planned])
    edges = _edges(treated, denoiser.pipe.scheduler.config.num_train_timesteps, [float(t) for t in timesteps])
    selection = {
        "method": "stepwise",
        **{name: getattr(settings, name) for name in ("mu", "keep", "overshoot", "root", "until", "replans")},
        **{name: getattr(settings, name) for name in ("cotangents", "shrink", "kinds")},
        "stay": [each.name for each in stay],
        "candidates": None if candidates is None else int(candidates.sum()),
        "steps": [each[2] for each in planned] if allocate else planned[0][2],
        "bins": _forecast(edges.tolist(), [each[2] for each in planned]),
    }
    metadata: dict[str, Any] = {
        "model": denoiser.model,
        "unet_shapes": shapes_digest(denoiser.unet),
        "unet_weights": weights_digest(denoiser.unet),
        "axis": axis.name,
        "words": list(axis.words),
        **samples.about(),
        "scheduler": type(denoiser.pipe.scheduler).__name__,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "selection": {**selection, "kinds": list(settings.kinds)},
    }
    return NeuronMask(
        sites,
        edges,
        factors if allocate else factors[0],
        None if settings.root == "zero" else roots if allocate else roots[0],
        "conditional",
        metadata,
        axis.groups if allocate else (),
    )


def _edges(treated: list[float], first: float, timesteps: list[float]) -> Tensor:
    """Bins half-way between treated steps; the last ends half-way to the first untreated one, so that finer samplers
    are treated as far as this one."""
    following = timesteps[len(treated)] if len(timesteps) > len(treated) else 0.0
    inner = [(high + low) / 2 for high, low in zip(treated, [*treated[1:], following], strict=True)]
    return torch.tensor([max(first, treated[0] + 1), *inner], dtype=torch.float64)


def _forecast(edges: list[float], planned: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """What was planned in each bin, means over groups, in the form of `treatment_plan`; leans are |lean - target|."""
    names = {"lean_before": "before", "lean_after": "after", "off_axis": "off_axis"}
    return [
        {"from": edges[t], "to": edges[t + 1]}
        | {name: sum(each[own] for each in steps) / len(steps) for name, own in names.items()}
        for t, steps in enumerate(zip(*planned, strict=True))
    ]


@dataclass(frozen=True)
class _Step:
    """What is constant while one step of a batch is planned. Sizes: K groups, B samples."""

    own: slice
    latents: Tensor  # (B, C, h, w)
    untreated: Tensor  # (B, C, h, w), f
    balanced: Tensor  # (B, C, h, w)
    directions: Tensor  # (K, B, C, h, w)
    goal: Tensor  # (K, B), tau
    cotangents: list[Tensor]  # K - 1 of the leans, then E others; (B, C, h, w) each
    asked: Tensor  # (E, B), which direction each of the others is: 0 a random one, from 1 on those that are to stay


@dataclass(frozen=True)
class _Tried:
    prediction: Tensor  # (B, C, h, w)
    cost: float  # the objective
    short: float  # mean |lean - target|
    moved: float  # mean movement off the axis, in units of ||d||


class _Walk:
    """One trajectory of all samples, planned on and treated step by step; `group` is the allotted one, or None."""

    def __init__(
        self,
        denoiser: Denoiser,
        axis: Axis,
        rows: list[Row],
        settings: Stepwise,
        sites: list[Site],
        stay: Sequence[Axis],
        candidates: Tensor | None,
        group: int | None,
        progress: Callable[[int], None] | None,
    ) -> None:
        self.denoiser, self.rows, self.settings, self.sites = denoiser, rows, settings, sites
        self.candidates, self.group, self.progress = candidates, group, progress
        self.neutral = denoiser.encode([row["prompt"] for row in rows])
        self.empty = denoiser.encode([""] * len(rows))
        self.groups, *self.stay = (_encode(denoiser, rows, each) for each in (axis, *stay))
        # A random direction, the text itself where there is guidance, and those of the other axes.
        self.directions = 1 + int(settings.guidance > 1) + sum(len(each) - 1 for each in stay)

    def parts(self) -> list[slice]:
        size = self.settings.batch_size
        return [slice(start, start + size) for start in range(0, len(self.rows), size)]

    def plan(self) -> tuple[Tensor, Tensor, list[dict[str, float]]]:
        """Factors (T, N) and roots (T, N) of the treated steps, and what each was planned to do."""
        settings, denoiser = self.settings, self.denoiser
        factors, roots, said = [], [], []
        timesteps = denoiser.timesteps(settings.steps)
        generators = denoiser.generators(self.rows)
        latents = denoiser.noise(self.rows)
        for number, timestep in enumerate(timesteps):
            if float(timestep) < settings.until:
                break  # what comes after is not treated, and need not be walked
            unconditional = self._unconditional(latents, timestep) if settings.guidance > 1 else None
            steps, root = self._prepare(latents, timestep, unconditional, self._asked(number))
            factor, prediction, line = self._solve(steps, timestep, root)
            with torch.no_grad():
                guided = guide(prediction, unconditional, settings.guidance)
                latents = denoiser.step(guided, timestep, latents, generators)
            factors.append(factor)
            roots.append(torch.zeros_like(factor) if root is None else root)
            said.append({"timestep": float(timestep), **line})
            if self.progress is not None:
                self.progress(len(self.rows))
        return torch.stack(factors), torch.stack(roots), said

    @torch.no_grad()
    def _unconditional(self, latents: Tensor, timestep: Tensor) -> Tensor:
        parts = [self.denoiser.predict(latents[own], timestep, self.empty[own]) for own in self.parts()]
        return torch.cat(parts)

    def _asked(self, number: int) -> Tensor:
        """Which directions each sample is asked about at a step, (E, samples): all of them as often, dealt out anew."""
        samples = len(self.rows)
        each = min(self.directions, max(self.settings.cotangents, -(-self.directions // samples)))
        dealt = torch.randperm(samples, generator=torch.Generator().manual_seed(number))
        return (each * dealt + torch.arange(each)[:, None]) % self.directions

    @torch.no_grad()
    def _prepare(
        self, latents: Tensor, timestep: Tensor, unconditional: Tensor | None, asked: Tensor
    ) -> tuple[list[_Step], Tensor | None]:
        """The groups' passes of a step: directions, targets, cotangents, and the mean activations damped toward."""
        settings, predict = self.settings, self.denoiser.predict
        steps, means = [], []
        untouched = torch.ones(sum(site.width for site in self.sites))
        for own in self.parts():
            x = latents[own]
            passes = []
            for k, states in enumerate(self.groups):
                with Damped(self.denoiser.unet, self.sites, untouched) as watch:
                    passes.append(predict(x, timestep, states[own]))
                if settings.root == "group" and self.group in (k, None):
                    means.append(watch.means())
            balanced, directions = group_directions(torch.stack(passes))
            untreated = predict(x, timestep, self.neutral[own])
            wanted = balanced if self.group is None else balanced + directions[self.group]
            goal, now = lean(wanted, balanced, directions), lean(untreated, balanced, directions)
            # A lean's cotangent is its gradient, d_g / ||d_g||^2.
            towards = [each / each.flatten(1).square().sum(1)[:, None, None, None] for each in directions[:-1]]
            text = None if unconditional is None else untreated - unconditional[own]
            others = [self._others(each, own, x, timestep, directions, text) for each in asked[:, own]]
            goal = goal + settings.overshoot * (goal - now)
            steps.append(_Step(own, x, untreated, balanced, directions, goal, [*towards, *others], asked[:, own]))
        return steps, torch.cat(means).mean(0) if means else None

    def _others(
        self, asked: Tensor, own: slice, x: Tensor, timestep: Tensor, directions: Tensor, text: Tensor | None
    ) -> Tensor:
        """The direction that each sample is asked about, off the axis and in units of ||d||: (B, C, h, w)."""
        random = off_axis_cotangent(directions, self.rows[own], float(timestep))
        found, first = torch.zeros_like(x), 1
        if text is not None:
            found, first = text, 2
        for states in self.stay:
            here = (first <= asked) & (asked < first + len(states) - 1)
            if here.any():
                passes = [self.denoiser.predict(x[here], timestep, each[own][here]) for each in states]
                _, theirs = group_directions(torch.stack(passes))
                found = found.clone()
                found[here] = theirs[asked[here] - first, torch.arange(int(here.sum()))]
            first += len(states) - 1
        kept = off_axis(found, directions)
        kept = kept / (kept.flatten(1).norm(dim=1)[:, None, None, None] * axis_size(directions))
        return torch.where((asked > 0)[:, None, None, None].to(x.device), kept, random)

    def _solve(
        self, steps: list[_Step], timestep: Tensor, root: Tensor | None
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Factors (N,) of one step, the treated prediction (B, C, h, w), and what they do."""
        damping = torch.zeros(sum(site.width for site in self.sites), dtype=torch.float64)
        best = before = self._try(steps, timestep, damping, root)
        for _ in range(self.settings.replans):
            wanted = self._step(steps, timestep, damping, root)
            # The rows hold near the point they were taken at: go there, half-way there, or stay.
            for share in (1.0, 0.5, 0.25):
                nearer = damping + share * (wanted - damping)
                if (found := self._try(steps, timestep, nearer, root)).cost < best.cost:
                    best, damping = found, nearer
                    break
            else:
                break
        line = {"before": before.short, "after": best.short, "off_axis": best.moved, "damping": damping.mean().item()}
        return (1 - damping).float(), best.prediction, line

    def _step(self, steps: list[_Step], timestep: Tensor, damping: Tensor, root: Tensor | None) -> Tensor:
        """The least-squares solution of the problem as it looks from the current damping, (N,)."""
        settings = self.settings
        rows, wanted, kinds = self._linearise(steps, timestep, (1 - damping).float(), root)
        price = torch.tensor([1.0, settings.mu * (1 - settings.shrink), *[settings.keep] * (self.directions - 1)])
        number = kinds.bincount(minlength=len(price))
        number[0] = len(self.rows)  # leans of K - 1 groups add up
        weight = (price.double() / number).sqrt()[kinds]
        ridge = settings.mu * settings.shrink * rows[kinds == 1].square().mean(0)
        wanted = wanted + rows @ damping
        if self.candidates is not None:
            rows = rows * self.candidates
        return bounded_least_squares(
            weight[:, None] * rows, weight * wanted, rows[:0], 1.0, ridge=ridge, iterations=400, tolerance=1e-4
        )

    @torch.no_grad()
    def _try(self, steps: list[_Step], timestep: Tensor, damping: Tensor, root: Tensor | None) -> "_Tried":
        """What a damping does: predictions, and the objective as it is, no part of it estimated."""
        settings, factor, leans = self.settings, (1 - damping).float(), len(self.groups) - 1
        predictions, costs, short, moved = [], [], [], []
        along, number = torch.zeros(2, self.directions, dtype=torch.float64)
        for step in steps:
            with Damped(self.denoiser.unet, self.sites, factor, root):
                found = self.denoiser.predict(step.latents, timestep, self.neutral[step.own])
            predictions.append(found)
            off = found - step.untreated
            left = step.goal - lean(found, step.balanced, step.directions)  # (K, B)
            away = (off_axis(off, step.directions) / axis_size(step.directions)).flatten(1).norm(dim=1)  # (B,)
            costs.append(left[:leans].square().sum(0) + settings.mu * away.square())
            for which, each in zip(step.asked, step.cotangents[leans:], strict=True):
                moves = (off * each).flatten(1).sum(1).square().double().cpu()
                along.index_add_(0, which, moves)
                number.index_add_(0, which, torch.ones_like(moves))
            short.append(left.abs().mean(0))
            moved.append(away)
        cost, miss, away = (torch.cat(each).double().mean().item() for each in (costs, short, moved))
        cost += settings.keep * (along / number)[1:].sum().item()
        return _Tried(torch.cat(predictions), cost, miss, away)

    def _linearise(
        self, steps: list[_Step], timestep: Tensor, factor: Tensor, root: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """At the treated point: rows (M, N) of derivatives by the damping, what is wanted of each, (M,), and its kind.

        Kinds: 0 a lean, 1 a random direction, from 2 on those that are to stay.
        """
        leans = len(self.groups) - 1
        rows, wanted, kinds = [], [], []
        for step in steps:
            with torch.enable_grad(), Damped(self.denoiser.unet, self.sites, factor, root) as watch:
                start = step.latents.detach().requires_grad_()
                prediction = self.denoiser.predict(start, timestep, self.neutral[step.own])
                inputs = [watch.damped[site.name] for site in self.sites]
            now = prediction.detach()
            short = step.goal - lean(now, step.balanced, step.directions)  # (K, B)
            for i, cotangent in enumerate(step.cotangents):
                last = i == len(step.cotangents) - 1
                grads = torch.autograd.grad(prediction, inputs, cotangent.to(prediction), retain_graph=not last)
                rows.append(-watch.relevance(grads).double())
                if i < leans:
                    wanted.append(short[i].double())
                else:
                    wanted.append(-((now - step.untreated) * cotangent).flatten(1).sum(1).double())
                kinds.append(1 + step.asked[i - leans] if i >= leans else torch.zeros(len(now), dtype=torch.long))
        return torch.cat(rows).cpu(), torch.cat(wanted).cpu(), torch.cat(kinds)


def _encode(denoiser: Denoiser, rows: list[Row], axis: Axis) -> Tensor:
    """(K, B, L, D)."""
    texts = [group_prompts(row, axis) for row in rows]
    return torch.stack([denoiser.encode([each[k] for each in texts]) for k in range(len(axis))])
