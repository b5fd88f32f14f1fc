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
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from stereoclinic.ddtd.lean import (
    axis_size,
    check_told_apart,
    group_directions,
    lean,
    off_axis,
    off_axis_cotangent,
    unit,
)
from stereoclinic.errors import InputError
from stereoclinic.pipelines.arguments import inner
from stereoclinic.pipelines.call import Call
from stereoclinic.pipelines.conditions import Conditions
from stereoclinic.pipelines.hooks import with_gradients
from stereoclinic.pipelines.memory import AdaptiveBatch
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.sites import SITE_KINDS, Site
from stereoclinic.pipelines.watch import Walk as Trajectory
from stereoclinic.pipelines.watch import encode_groups
from stereoclinic.prompts.axes import Axis
from stereoclinic.prompts.sets import Row
from stereoclinic.sns.factors import Damped
from stereoclinic.sns.linear import bounded_least_squares
from stereoclinic.sns.mask import in_unit

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
        sites: Module paths of sites, as file names, in place of the table of `pipelines.sites`.
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
    sites: tuple[str, ...] = ()

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

    def treated(self, timesteps: Sequence[float]) -> list[float]:
        """The timesteps that are planned; those after them are not treated, and need not be walked."""
        return [t for t in timesteps if t >= in_unit(self.until, timesteps[0])]


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

    call: Call
    untreated: Tensor  # (B, D), f
    balanced: Tensor  # (B, D)
    directions: Tensor  # (K, B, D)
    target: Tensor  # (K, B), tau
    goal: Tensor  # (K, B), what is aimed at: tau, or further
    cotangents: Tensor  # (M, B, D): K - 1 of the leans, then E others
    asked: Tensor  # (E, B), which direction each of the others is: 0 a random one, from 1 on those that are to stay


@dataclass(frozen=True)
class _Tried:
    prediction: Tensor  # (B, D)
    cost: float  # the objective
    short: float  # mean |lean - target|
    moved: float  # mean movement off the axis, in units of ||d||


class Walk:
    """One trajectory of all samples, planned on and treated step by step.

    Args:
        model: The pipeline.
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
        model: Model,
        axis: Axis,
        rows: list[Row],
        settings: Stepwise,
        sites: list[Site],
        stay: Sequence[Axis] = (),
        candidates: Tensor | None = None,
        group: int | None = None,
        ranks: Ranks | None = None,
        portions: AdaptiveBatch | None = None,
    ) -> None:
        self.model, self.rows, self.settings, self.sites = model, rows, settings, sites
        self.axis, self.others = axis, list(stay)
        self.candidates, self.group, self.ranks = candidates, group, ranks or Ranks()
        self.portions = portions or AdaptiveBatch(settings.batch_size)
        self.groups: list[Conditions] = []
        self.stay: list[list[Conditions]] = []
        self.directions, self.text = 1, False
        self.samples = len(self.ranks.gather(torch.arange(len(rows))))

    def plan(self, known: Sequence[Planned], planned: Callable[[Planned], None], steps: int) -> None:
        """Plan the treated steps, and give each to `planned`; those that are known already are only walked.

        Args:
            known: The first ones.
            planned: Takes each of the others.
            steps: How many are treated.
        """
        done: dict[float, Planned] = {}  # a mask holds one damping for a timestep, and some samplers come back to it

        def visit(call: Call) -> None:
            number = call.step
            before = known[number] if number < len(known) else done.get(call.timestep)
            unconditional = self._without_prompt(call) if call.has_unconditional else None
            if before is not None:
                call.reply = self._predict(call, None, before.factor, before.root)
            else:
                step, root = self._prepare(call, unconditional, self._asked(number))
                factor, call.reply, said = self._solve(step, root)
                before = Planned(factor, root, {"timestep": call.timestep, **said})
            if call.guided:
                call.unguided = unconditional
            done[call.timestep] = before
            if number >= len(known):
                planned(before)

        settings = self.settings
        walk = Trajectory(
            self.model, self.rows, settings.steps, settings.guidance, visit=visit, portions=self.portions, last=steps
        )
        self.groups, *self.stay = encode_groups(walk, self.rows, [self.axis, *self.others])
        # A random direction, the text itself where there is guidance, and those of the other axes.
        self.text = walk.learnt.guides
        self.directions = 1 + int(self.text) + sum(len(each) - 1 for each in self.others)
        walk.run()

    @torch.no_grad()
    def _predict(
        self, call: Call, conditions: Conditions | None, factor: Tensor | None = None, root: Tensor | None = None
    ) -> Tensor:
        """(B, D), of the model as it is or damped, for other prompts or the samples' own."""

        def predict(own: slice) -> Tensor:
            return call.predict(conditions, own)

        with nullcontext() if factor is None else Damped(inner(self.model.network), self.sites, factor, root):
            return torch.cat(self.portions.each(predict, call.count))

    @torch.no_grad()
    def _without_prompt(self, call: Call) -> Tensor:
        """(B, D)."""
        return torch.cat(
            self.portions.each(lambda own: call.run(call.without_prompt(own), own, False, False), call.count)
        )

    @torch.no_grad()
    def _means(self, call: Call, conditions: Conditions) -> Tensor:
        """(samples of all ranks, N), activations in the mean over positions."""

        def means(own: slice) -> Tensor:
            with Damped(inner(self.model.network), self.sites, torch.ones(_width(self.sites))) as watch:
                call.predict(conditions, own)
            return watch.means()

        return self.ranks.gather(torch.cat(self.portions.each(means, call.count)))

    def _asked(self, number: int) -> Tensor:
        """Which directions each sample is asked about at a step, (E, B): all of them as often, dealt out anew."""
        each = min(self.directions, max(self.settings.cotangents, -(-self.directions // self.samples)))
        dealt = torch.randperm(self.samples, generator=torch.Generator().manual_seed(number))
        dealt = dealt[[row["number"] for row in self.rows]]
        return (each * dealt + torch.arange(each)[:, None]) % self.directions

    @torch.no_grad()
    def _prepare(self, call: Call, unconditional: Tensor | None, asked: Tensor) -> tuple[_Step, Tensor | None]:
        """The groups' passes of a step: directions, targets, cotangents, and the mean activations damped toward."""
        balanced, directions = group_directions(self._compared(call, self.groups))
        untreated = self._predict(call, None)
        said = untreated if unconditional is None else torch.cat([untreated, unconditional], 1)
        check_told_apart(said, directions, self.rows, call.timestep)
        wanted = balanced if self.group is None else balanced + directions[self.group]
        target, now = lean(wanted, balanced, directions), lean(untreated, balanced, directions)
        goal = target + self.settings.overshoot * (target - now)
        towards = unit(directions[:-1])  # a lean's cotangent is its gradient
        text = None if unconditional is None else untreated - unconditional
        others = [self._others(each, call, directions, text) for each in asked]
        root = None
        if self.settings.root == "group":
            shown = self.groups if self.group is None else self.groups[self.group : self.group + 1]
            root = torch.cat([self._means(call, each) for each in shown]).mean(0)
            root = self.ranks.agree(root)
        cotangents = torch.stack([*towards, *others])
        return _Step(call, untreated, balanced, directions, target, goal, cotangents, asked), root

    def _compared(self, call: Call, every: Sequence[Conditions]) -> Tensor:
        """(K, B, D) for other prompts."""
        return torch.stack([self._predict(call, each) for each in every])

    def _others(self, asked: Tensor, call: Call, directions: Tensor, text: Tensor | None) -> Tensor:
        """The direction that each sample is asked about, off the axis and in units of ||d||: (B, D)."""
        random = off_axis_cotangent(directions, self.rows, call.timestep)
        found, first = torch.zeros_like(random), 1
        if self.text:
            found, first = found if text is None else text.clone(), 2
        for conditions in self.stay:
            here = (first <= asked) & (asked < first + len(conditions) - 1)
            if here.any():
                samples = here.nonzero().flatten().tolist()
                _, theirs = group_directions(torch.stack([self._some(call, each, samples) for each in conditions]))
                found[samples] = theirs[asked[here] - first, torch.arange(len(samples))].to(found)
            first += len(conditions) - 1
        kept = off_axis(found, directions)
        kept = kept / (kept.norm(dim=1, keepdim=True) * axis_size(directions)).clamp_min(1e-12)
        return torch.where((asked > 0)[:, None].to(random.device), kept, random)

    def _some(self, call: Call, conditions: Conditions, samples: Sequence[int]) -> Tensor:
        """(n, D) of some samples, for other prompts."""

        def predict(own: slice) -> Tensor:
            return call.predict(conditions, list(samples)[own])

        return torch.cat(self.portions.each(predict, len(samples)))

    def _solve(self, step: _Step, root: Tensor | None) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Factors (N,) of one step, the treated prediction (B, D), and what they do."""
        damping = torch.zeros(_width(self.sites), dtype=torch.float64)
        best = before = self._try(step, damping, root)
        for _ in range(self.settings.replans):
            wanted = self._step(step, damping, root)
            # Backtracking line search: the linearisation is only valid near its base point.
            for share in (1.0, 0.5, 0.25):
                nearer = damping + share * (wanted - damping)
                if (found := self._try(step, nearer, root)).cost < best.cost:
                    best, damping = found, nearer
                    break
            else:
                break
        line = {"before": before.short, "after": best.short, "off_axis": best.moved, "damping": damping.mean().item()}
        return (1 - damping).float(), best.prediction, line

    def _step(self, step: _Step, damping: Tensor, root: Tensor | None) -> Tensor:
        """The least-squares solution of the problem as it looks from the current damping, (N,)."""
        settings = self.settings
        rows, wanted, kinds = self._linearise(step, (1 - damping).float(), root)
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
    def _try(self, step: _Step, damping: Tensor, root: Tensor | None) -> _Tried:
        """What a damping does: predictions, and the objective as it is, no part of it estimated."""
        settings, leans, gather = self.settings, len(self.groups) - 1, self.ranks.gather
        found = self._predict(step.call, None, (1 - damping).float(), root)
        off = found - step.untreated
        now = lean(found, step.balanced, step.directions)
        left, short = (gather((each - now).T).double() for each in (step.goal, step.target))  # (samples, K)
        away = gather((off_axis(off, step.directions) / axis_size(step.directions)).norm(dim=1)).double()
        moves = gather((off * step.cotangents[leans:]).sum(2).T).double().square().flatten()
        asked = gather(step.asked.T).flatten()
        along = torch.zeros(self.directions, dtype=torch.float64).index_add(0, asked, moves)
        along /= asked.bincount(minlength=self.directions)
        cost = left[:, :leans].square().sum(1).mean() + settings.mu * away.square().mean()
        cost += settings.keep * along[1:].sum()
        return _Tried(found, *self.ranks.agree((cost.item(), short.abs().mean().item(), away.mean().item())))

    def _linearise(self, step: _Step, factor: Tensor, root: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """At the treated point: derivatives by the damping (M samples, N), what is wanted of each row, and its kind.

        Kinds: 0 a lean, 1 a random direction, from 2 on those that are to stay.
        """
        leans = len(self.groups) - 1

        def derivatives(own: slice) -> tuple[Tensor, Tensor]:
            network = inner(self.model.network)
            with torch.enable_grad(), with_gradients(network), Damped(network, self.sites, factor, root) as watch:
                prediction = step.call.predict(part=own)
            rows = []
            for left, cotangent in zip(range(len(step.cotangents))[::-1], step.cotangents[:, own], strict=True):
                rows.append(-watch.relevance(watch.grads(prediction, cotangent.to(prediction), left > 0)))
            return prediction.detach(), torch.stack(rows, 1)

        found = self.portions.each(derivatives, len(self.rows))
        now, rows = torch.cat([each for each, _ in found]), torch.cat([each for _, each in found])  # (B, M, N)
        if not (finite := (now.isfinite().all(1) & rows.isfinite().all(2).all(1).to(now.device))).all():
            row = self.rows[int((~finite).nonzero()[0])]
            raise InputError(
                f"at timestep {step.call.timestep:g} of {row['prompt']!r}, seed {row['seed']}, derivatives of the"
                " treated prediction are not finite; try --dtype float32 or bfloat16"
            )
        short = step.goal - lean(now, step.balanced, step.directions)  # (K, B)
        moves = ((now - step.untreated) * step.cotangents[leans:]).sum(2)  # (E, B)
        wanted = torch.cat([short[:leans], -moves])
        kinds = torch.cat([torch.zeros(leans, len(now), dtype=torch.long), 1 + step.asked])
        rows, wanted, kinds = (self.ranks.gather(each).flatten(0, 1) for each in (rows, wanted.T, kinds.T))
        return rows.double(), wanted.double(), kinds


def _width(sites: Sequence[Site]) -> int:
    return sum(site.width for site in sites)
