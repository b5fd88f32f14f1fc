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
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from stereoclinic.axes import Axis
from stereoclinic.ddtd.memory import Portions
from stereoclinic.ddtd.neurons import SITE_KINDS, Site
from stereoclinic.ddtd.target import axis_size, group_directions, lean, off_axis, off_axis_cotangent
from stereoclinic.denoisers.base import Denoiser
from stereoclinic.denoisers.sampling import guide
from stereoclinic.errors import InputError
from stereoclinic.prompts import Row, group_prompts
from stereoclinic.sns.damped import Damped
from stereoclinic.sns.plan import bounded_least_squares

T = TypeVar("T")

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

    def treated(self, timesteps: Tensor) -> list[float]:
        """The timesteps that are planned; those after them are not treated, and need not be walked."""
        return [float(t) for t in timesteps if float(t) >= self.until]


@dataclass
class Ranks:
    """What ranks that walk samples of their own tell one another; here, one alone.

    Attributes:
        first: Whether this is the first rank, which solves for all.
    """

    first: bool = True

    def gather(self, own: Tensor) -> Tensor:
        """(own samples, ...) to (all samples, ...), on the CPU, in the order of the samples."""
        return own.cpu()

    def agree(self, value: T) -> T:
        """What the first rank has, plain or on the CPU: ranks that decided by their own rounding would part."""
        return value


@dataclass(frozen=True)
class Planned:
    """One step: factors (N,), roots (N,) or None for zero, and what was planned of it on the samples planned on."""

    factor: Tensor
    root: Tensor | None
    said: dict[str, float]


@dataclass(frozen=True)
class _Step:
    """What is constant while one step is planned. Sizes: K groups, B samples of this rank, M cotangents of each."""

    latents: Tensor  # (B, C, h, w)
    untreated: Tensor  # (B, C, h, w), f
    balanced: Tensor  # (B, C, h, w)
    directions: Tensor  # (K, B, C, h, w)
    target: Tensor  # (K, B), tau
    goal: Tensor  # (K, B), what is aimed at: tau, or further
    cotangents: Tensor  # (M, B, C, h, w): K - 1 of the leans, then E others
    asked: Tensor  # (E, B), which direction each of the others is: 0 a random one, from 1 on those that are to stay


@dataclass(frozen=True)
class _Tried:
    prediction: Tensor  # (B, C, h, w)
    cost: float  # the objective
    short: float  # mean |lean - target|
    moved: float  # mean movement off the axis, in units of ||d||


class Walk:
    """One trajectory of all samples, planned on and treated step by step.

    Args:
        denoiser: The model.
        axis: The bias axis.
        rows: Samples of this rank.
        settings: See `Stepwise`.
        sites: Where neurons may be damped.
        stay: Other axes along which nothing is to move.
        candidates: (N,) bool, the neurons that may be damped; None for all.
        group: The one that images are allotted to; None for a balanced prediction.
        ranks: What other ranks there are.
        portions: How many samples go through the model together.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        axis: Axis,
        rows: list[Row],
        settings: Stepwise,
        sites: list[Site],
        stay: Sequence[Axis] = (),
        candidates: Tensor | None = None,
        group: int | None = None,
        ranks: Ranks | None = None,
        portions: Portions | None = None,
    ) -> None:
        self.denoiser, self.rows, self.settings, self.sites = denoiser, rows, settings, sites
        self.candidates, self.group, self.ranks = candidates, group, ranks or Ranks()
        self.portions = portions or Portions(settings.batch_size)
        self.neutral = denoiser.encode([row["prompt"] for row in rows])
        self.empty = denoiser.encode([""] * len(rows))
        self.groups, *self.stay = (_encode(denoiser, rows, each) for each in (axis, *stay))
        # A random direction, the text itself where there is guidance, and those of the other axes.
        self.directions = 1 + int(settings.guidance > 1) + sum(len(each) - 1 for each in stay)
        self.samples = len(self.ranks.gather(torch.arange(len(rows))))

    def plan(self, known: Sequence[Planned] = ()) -> Iterator[Planned]:
        """The treated steps, each as it is planned; those that are known already are only walked, and not given."""
        settings, denoiser = self.settings, self.denoiser
        timesteps = denoiser.timesteps(settings.steps)
        generators = denoiser.generators(self.rows)
        latents = denoiser.noise(self.rows)
        planned: dict[float, Planned] = {}  # a mask holds one damping for a timestep, and some samplers come back to it
        for number, timestep in enumerate(timesteps[: len(settings.treated(timesteps))]):
            unconditional = self._predict(latents, timestep, self.empty) if settings.guidance > 1 else None
            before = known[number] if number < len(known) else planned.get(float(timestep))
            if before is not None:
                prediction = self._predict(latents, timestep, self.neutral, before.factor, before.root)
            else:
                step, root = self._prepare(latents, timestep, unconditional, self._asked(number))
                factor, prediction, said = self._solve(step, timestep, root)
                before = Planned(factor, root, {"timestep": float(timestep), **said})
            planned[float(timestep)] = before
            if number >= len(known):
                yield before
            with torch.no_grad():
                guided = guide(prediction, unconditional, settings.guidance)
                latents = denoiser.step(guided, timestep, latents, generators)

    @torch.no_grad()
    def _predict(
        self,
        latents: Tensor,
        timestep: Tensor,
        states: Tensor,
        factor: Tensor | None = None,
        root: Tensor | None = None,
    ) -> Tensor:
        """(B, C, h, w), of the model as it is or damped."""

        def predict(own: slice) -> Tensor:
            return self.denoiser.predict(latents[own], timestep, states[own])

        with nullcontext() if factor is None else Damped(self.denoiser.unet, self.sites, factor, root):
            return torch.cat(self.portions.each(predict, len(latents)))

    @torch.no_grad()
    def _means(self, latents: Tensor, timestep: Tensor, states: Tensor) -> Tensor:
        """(samples of all ranks, N), activations in the mean over positions."""

        def means(own: slice) -> Tensor:
            with Damped(self.denoiser.unet, self.sites, torch.ones(_width(self.sites))) as watch:
                self.denoiser.predict(latents[own], timestep, states[own])
            return watch.means()

        return self.ranks.gather(torch.cat(self.portions.each(means, len(latents))))

    def _asked(self, number: int) -> Tensor:
        """Which directions each sample is asked about at a step, (E, B): all of them as often, dealt out anew."""
        each = min(self.directions, max(self.settings.cotangents, -(-self.directions // self.samples)))
        dealt = torch.randperm(self.samples, generator=torch.Generator().manual_seed(number))
        dealt = dealt[[row["number"] for row in self.rows]]
        return (each * dealt + torch.arange(each)[:, None]) % self.directions

    @torch.no_grad()
    def _prepare(
        self, latents: Tensor, timestep: Tensor, unconditional: Tensor | None, asked: Tensor
    ) -> tuple[_Step, Tensor | None]:
        """The groups' passes of a step: directions, targets, cotangents, and the mean activations damped toward."""
        passes = [self._predict(latents, timestep, states) for states in self.groups]
        balanced, directions = group_directions(torch.stack(passes))
        untreated = self._predict(latents, timestep, self.neutral)
        wanted = balanced if self.group is None else balanced + directions[self.group]
        target, now = lean(wanted, balanced, directions), lean(untreated, balanced, directions)
        goal = target + self.settings.overshoot * (target - now)
        # A lean's cotangent is its gradient, d_g / ||d_g||^2.
        towards = [each / each.flatten(1).square().sum(1)[:, None, None, None] for each in directions[:-1]]
        text = None if unconditional is None else untreated - unconditional
        others = [self._others(each, latents, timestep, directions, text) for each in asked]
        root = None
        if self.settings.root == "group":
            shown = self.groups if self.group is None else self.groups[self.group : self.group + 1]
            root = torch.cat([self._means(latents, timestep, states) for states in shown]).mean(0)
            root = self.ranks.agree(root)
        cotangents = torch.stack([*towards, *others])
        return _Step(latents, untreated, balanced, directions, target, goal, cotangents, asked), root

    def _others(
        self, asked: Tensor, latents: Tensor, timestep: Tensor, directions: Tensor, text: Tensor | None
    ) -> Tensor:
        """The direction that each sample is asked about, off the axis and in units of ||d||: (B, C, h, w)."""
        random = off_axis_cotangent(directions, self.rows, float(timestep))
        found, first = torch.zeros_like(latents), 1
        if text is not None:
            found, first = text.clone(), 2
        for states in self.stay:
            here = (first <= asked) & (asked < first + len(states) - 1)
            if here.any():
                passes = [self._predict(latents[here], timestep, each[here]) for each in states]
                _, theirs = group_directions(torch.stack(passes))
                found[here] = theirs[asked[here] - first, torch.arange(int(here.sum()))]
            first += len(states) - 1
        kept = off_axis(found, directions)
        kept = kept / (kept.flatten(1).norm(dim=1)[:, None, None, None] * axis_size(directions))
        return torch.where((asked > 0)[:, None, None, None].to(latents.device), kept, random)

    def _solve(self, step: _Step, timestep: Tensor, root: Tensor | None) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Factors (N,) of one step, the treated prediction (B, C, h, w), and what they do."""
        damping = torch.zeros(_width(self.sites), dtype=torch.float64)
        best = before = self._try(step, timestep, damping, root)
        for _ in range(self.settings.replans):
            wanted = self._step(step, timestep, damping, root)
            # The rows hold near the point they were taken at: go there, half-way there, or stay.
            for share in (1.0, 0.5, 0.25):
                nearer = damping + share * (wanted - damping)
                if (found := self._try(step, timestep, nearer, root)).cost < best.cost:
                    best, damping = found, nearer
                    break
            else:
                break
        line = {"before": before.short, "after": best.short, "off_axis": best.moved, "damping": damping.mean().item()}
        return (1 - damping).float(), best.prediction, line

    def _step(self, step: _Step, timestep: Tensor, damping: Tensor, root: Tensor | None) -> Tensor:
        """The least-squares solution of the problem as it looks from the current damping, (N,)."""
        settings = self.settings
        rows, wanted, kinds = self._linearise(step, timestep, (1 - damping).float(), root)
        if not self.ranks.first:
            return self.ranks.agree(damping)
        price = torch.tensor([1.0, settings.mu * (1 - settings.shrink), *[settings.keep] * (self.directions - 1)])
        number = kinds.bincount(minlength=len(price))
        number[0] = self.samples  # leans of K - 1 groups add up
        weight = (price.double() / number).sqrt()[kinds]
        ridge = settings.mu * settings.shrink * rows[kinds == 1].square().mean(0)
        wanted = wanted + rows @ damping
        if self.candidates is not None:
            rows = rows * self.candidates
        solution = bounded_least_squares(
            weight[:, None] * rows, weight * wanted, rows[:0], 1.0, ridge=ridge, iterations=400, tolerance=1e-4
        )
        return self.ranks.agree(solution)

    @torch.no_grad()
    def _try(self, step: _Step, timestep: Tensor, damping: Tensor, root: Tensor | None) -> _Tried:
        """What a damping does: predictions, and the objective as it is, no part of it estimated."""
        settings, leans, gather = self.settings, len(self.groups) - 1, self.ranks.gather
        found = self._predict(step.latents, timestep, self.neutral, (1 - damping).float(), root)
        off = found - step.untreated
        now = lean(found, step.balanced, step.directions)
        left, short = (gather((each - now).T).double() for each in (step.goal, step.target))  # (samples, K)
        away = gather((off_axis(off, step.directions) / axis_size(step.directions)).flatten(1).norm(dim=1)).double()
        moves = gather((off * step.cotangents[leans:]).flatten(2).sum(2).T).double().square().flatten()
        asked = gather(step.asked.T).flatten()
        along = torch.zeros(self.directions, dtype=torch.float64).index_add(0, asked, moves)
        along /= asked.bincount(minlength=self.directions)
        cost = left[:, :leans].square().sum(1).mean() + settings.mu * away.square().mean()
        cost += settings.keep * along[1:].sum()
        return _Tried(found, *self.ranks.agree((cost.item(), short.abs().mean().item(), away.mean().item())))

    def _linearise(
        self, step: _Step, timestep: Tensor, factor: Tensor, root: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """At the treated point: derivatives by the damping (M samples, N), what is wanted of each row, and its kind.

        Kinds: 0 a lean, 1 a random direction, from 2 on those that are to stay.
        """
        leans = len(self.groups) - 1

        def derivatives(own: slice) -> tuple[Tensor, Tensor]:
            with torch.enable_grad(), Damped(self.denoiser.unet, self.sites, factor, root) as watch:
                start = step.latents[own].detach().requires_grad_()
                prediction = self.denoiser.predict(start, timestep, self.neutral[own])
                inputs = [watch.damped[site.name] for site in self.sites]
            rows = []
            for left, cotangent in zip(range(len(step.cotangents))[::-1], step.cotangents[:, own], strict=True):
                grads = torch.autograd.grad(prediction, inputs, cotangent.to(prediction), retain_graph=left > 0)
                rows.append(-watch.relevance(grads))
            return prediction.detach(), torch.stack(rows, 1)

        found = self.portions.each(derivatives, len(self.rows))
        now, rows = torch.cat([each for each, _ in found]), torch.cat([each for _, each in found])  # (B, M, N)
        short = step.goal - lean(now, step.balanced, step.directions)  # (K, B)
        moves = ((now - step.untreated) * step.cotangents[leans:]).flatten(2).sum(2)  # (E, B)
        wanted = torch.cat([short[:leans], -moves])
        kinds = torch.cat([torch.zeros(leans, len(now), dtype=torch.long), 1 + step.asked])
        rows, wanted, kinds = (self.ranks.gather(each).flatten(0, 1) for each in (rows, wanted.T, kinds.T))
        return rows.double(), wanted.double(), kinds


def _width(sites: Sequence[Site]) -> int:
    return sum(site.width for site in sites)


def _encode(denoiser: Denoiser, rows: list[Row], axis: Axis) -> Tensor:
    """(K, B, L, D)."""
    texts = [group_prompts(row, axis) for row in rows]
    return torch.stack([denoiser.encode([each[k] for each in texts]) for k in range(len(axis))])
