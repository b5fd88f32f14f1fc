"""Plans a mask step by step, along the trajectory that the mask itself changes.

A damped trajectory visits other x_t than an undamped one, and many damped neurons change more than the sum of what each
does. So each step is planned where the earlier steps have led, and planned again where its own damping leads:

    a_j  ->  a_j - lambda_j (a_j - r_j)                     lambda_j = 1 - s_j
    minimise over 0 <= lambda <= 1, mean over samples,
        (S(lambda) - tau)^2                                 the lean at its target
        + mu   mean_v <v, f(lambda) - f>^2                  moved off the axis, v random in units of ||d||
        + keep sum_e <e, f(lambda) - f>^2                   moved along directions to keep: other axes, the text

by Gauss-Newton: at the current lambda the rows dS/dlambda_j = -sum over positions (a_j - r_j) g_j come from one
backward pass a cotangent, at the treated point; then one bounded least-squares problem. tau is 0 for a balanced
prediction; for an image that is allotted to group g it is the lean of f_g, the prediction for g's prompt.

With more neurons than samples a plan can fit its own samples and miss others, so it should see many leans: every sample
gives the rows of its leans, and a row for only one of v and e, in turn.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

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
from stereoclinic.pipelines.watch import Walk, encode_groups
from stereoclinic.prompts.axes import Axis
from stereoclinic.prompts.sets import Row, Samples
from stereoclinic.runtime.predict import Ranks
from stereoclinic.sns.linear import SHRINK, bounded_least_squares
from stereoclinic.sns.mask import check_not_negative, in_unit
from stereoclinic.sns.trial import TrialDamping


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
        sites: Patterns of module paths, such as `blocks.*.proj`, instead of the usual sites.
    """

    mu: float = 1.0
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
        if self.root not in ("zero", "group"):
            raise InputError(f"root {self.root!r}: expected zero or group")
        check_not_negative(mu=self.mu, keep=self.keep, overshoot=self.overshoot, guidance=self.guidance)
        for name in ("replans", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)}: expected 1 or more")

    def treated(self, timesteps: Sequence[float]) -> list[float]:
        """The timesteps down to `until`."""
        return [t for t in timesteps if t >= in_unit(self.until, timesteps[0])]


@dataclass(frozen=True)
class PlanTask:
    """What is planned, and on what samples."""

    model: Model
    axis: Axis
    samples: Samples  # all of them, on every rank
    settings: Stepwise
    sites: list[Site]  # where neurons may be damped
    stay: Sequence[Axis] = ()  # other axes along which predictions should not move
    candidates: Tensor | None = None  # (N,) bool, the neurons that may be damped; None for all

    def __post_init__(self) -> None:
        if self.candidates is not None and self.candidates.shape != (self.neurons,):
            shape = tuple(self.candidates.shape)
            raise InputError(f"candidates of shape {shape}; expected ({self.neurons},), the model's neurons")

    @property
    def neurons(self) -> int:
        return sum(site.width for site in self.sites)


@dataclass(frozen=True)
class PlannedStep:
    """One step: factors (N,), roots (N,) or None for zero, and figures measured on the samples planned on."""

    factor: Tensor
    root: Tensor | None
    figures: dict[str, float]


@dataclass(frozen=True)
class _Problem:
    """What is constant while one step is planned. Sizes: K groups, B samples of this rank, M cotangents of each."""

    call: Call
    untreated: Tensor  # (B, D), f
    balanced: Tensor  # (B, D)
    directions: Tensor  # (K, B, D)
    target: Tensor  # (K, B), tau
    goal: Tensor  # (K, B), the target plus overshoot
    cotangents: Tensor  # (M, B, D): K - 1 of the leans, then E others
    asked: Tensor  # (E, B), which direction each of the others is: 0 a random one, from 1 on those to keep
    root: Tensor | None  # (N,)


@dataclass(frozen=True)
class _Outcome:
    prediction: Tensor  # (B, D)
    cost: float  # the objective
    distance: float  # mean |lean - target|
    moved: float  # mean movement off the axis, in units of ||d||


class StepPlanner:
    """Plans along one trajectory: for a group that images are allotted to, or None for a balanced prediction.

    `rows` are the samples of this rank; `portions` are how many of them go through the model together.
    """

    def __init__(self, task: PlanTask, rows: list[Row], group: int | None, ranks: Ranks, portions: AdaptiveBatch):
        self.task, self.settings, self.sites = task, task.settings, task.sites
        self.rows, self.group, self.ranks, self.portions = rows, group, ranks, portions
        self.network = inner(task.model.network)
        self.columns = slice(None) if task.candidates is None else task.candidates
        self.groups: list[Conditions] = []
        self.stay: list[list[Conditions]] = []
        self.directions, self.text = 1, False

    def plan(self, known: Sequence[PlannedStep], planned: Callable[[PlannedStep], None], steps: int) -> None:
        """Plan the first `steps` steps, and give each to `planned`; the known first ones are only applied."""
        done: dict[float, PlannedStep] = {}  # a mask has one damping for a timestep, and some samplers repeat one

        def visit(call: Call) -> None:
            step = known[call.step] if call.step < len(known) else done.get(call.timestep)
            unconditional = self._without_prompt(call) if call.has_unconditional else None
            if step is not None:
                call.reply = self._predict(call, factor=step.factor, root=step.root)
            else:
                step, call.reply = self._solve(self._problem(call, unconditional))
            if call.guided:
                call.unguided = unconditional
            done[call.timestep] = step
            if call.step >= len(known):
                planned(step)

        task, how = self.task, self.settings
        walk = Walk(task.model, self.rows, how.steps, how.guidance, visit=visit, portions=self.portions, last=steps)
        self.groups, *self.stay = encode_groups(walk, self.rows, [task.axis, *task.stay])
        # A random direction, the text itself where there is guidance, and those of the other axes.
        self.text = walk.learnt.guides
        self.directions = 1 + int(self.text) + sum(len(conditions) - 1 for conditions in self.stay)
        walk.run()

    @torch.no_grad()
    def _predict(
        self,
        call: Call,
        conditions: Conditions | None = None,
        factor: Tensor | None = None,
        root: Tensor | None = None,
        samples: Sequence[int] | None = None,
    ) -> Tensor:
        """(n, D), damped by `factor` if there is one, for other prompts or the samples' own, of all samples or some."""
        chosen = list(range(call.count)) if samples is None else list(samples)
        with nullcontext() if factor is None else TrialDamping(self.network, self.sites, factor, root):
            return torch.cat(self.portions.each(lambda part: call.predict(conditions, chosen[part]), len(chosen)))

    @torch.no_grad()
    def _without_prompt(self, call: Call) -> Tensor:
        """(B, D)."""
        parts = self.portions.each(lambda part: call.run(call.without_prompt(part), part, False, False), call.count)
        return torch.cat(parts)

    @torch.no_grad()
    def _means(self, call: Call, conditions: Conditions) -> Tensor:
        """(samples of all ranks, N), means of the activations over positions."""

        def means(part: slice) -> Tensor:
            with TrialDamping(self.network, self.sites, torch.ones(self.task.neurons)) as watch:
                call.predict(conditions, part)
            return watch.means()

        return self.ranks.gather(torch.cat(self.portions.each(means, call.count)))

    @torch.no_grad()
    def _problem(self, call: Call, unconditional: Tensor | None) -> _Problem:
        """Directions, targets and cotangents of a step, and the mean activations damped toward."""
        balanced, directions = group_directions(torch.stack([self._predict(call, group) for group in self.groups]))
        untreated = self._predict(call)
        predictions = untreated if unconditional is None else torch.cat([untreated, unconditional], 1)
        check_told_apart(predictions, directions, self.rows, call.timestep)
        wanted = balanced if self.group is None else balanced + directions[self.group]
        target, now = lean(wanted, balanced, directions), lean(untreated, balanced, directions)
        goal = target + self.settings.overshoot * (target - now)
        asked = self._asked(call.step)
        text = None if unconditional is None else untreated - unconditional
        others = [self._direction(row, call, directions, text) for row in asked]
        cotangents = torch.stack([*unit(directions[:-1]), *others])  # a lean's cotangent is its gradient
        root = None
        if self.settings.root == "group":
            shown = self.groups if self.group is None else self.groups[self.group : self.group + 1]
            root = self.ranks.agree(torch.cat([self._means(call, group) for group in shown]).mean(0))
        return _Problem(call, untreated, balanced, directions, target, goal, cotangents, asked, root)

    def _asked(self, step: int) -> Tensor:
        """Which directions each sample has rows for at a step, (E, B): each equally often, shuffled at every step."""
        samples = len(self.task.samples)
        number = max(1, -(-self.directions // samples))
        order = torch.randperm(samples, generator=torch.Generator().manual_seed(step))
        order = order[[row["number"] for row in self.rows]]
        return (number * order + torch.arange(number)[:, None]) % self.directions

    def _direction(self, asked: Tensor, call: Call, directions: Tensor, text: Tensor | None) -> Tensor:
        """The direction that each sample has a row for, off the axis and in units of ||d||: (B, D)."""
        random = off_axis_cotangent(directions, self.rows, call.timestep)
        chosen, first = torch.zeros_like(random), 1
        if self.text:
            chosen, first = chosen if text is None else text.clone(), 2
        for groups in self.stay:
            mine = (first <= asked) & (asked < first + len(groups) - 1)
            if mine.any():
                samples = mine.nonzero().flatten().tolist()
                predictions = torch.stack([self._predict(call, group, samples=samples) for group in groups])
                _, theirs = group_directions(predictions)
                chosen[samples] = theirs[asked[mine] - first, torch.arange(len(samples))].to(chosen)
            first += len(groups) - 1
        kept = off_axis(chosen, directions)
        kept = kept / (kept.norm(dim=1, keepdim=True) * axis_size(directions)).clamp_min(1e-12)
        return torch.where((asked > 0)[:, None].to(random.device), kept, random)

    def _solve(self, problem: _Problem) -> tuple[PlannedStep, Tensor]:
        """The plan of one step, and the treated prediction (B, D)."""
        damping = torch.zeros(self.task.neurons, dtype=torch.float64)
        best = before = self._judge(problem, problem.untreated)
        for _ in range(self.settings.replans):
            wanted = self._gauss_newton(problem, damping)
            # Backtracking line search: the linearisation is only valid near its base point.
            for share in (1.0, 0.5, 0.25):
                nearer = damping + share * (wanted - damping)
                treated = self._predict(problem.call, factor=(1 - nearer).float(), root=problem.root)
                if (outcome := self._judge(problem, treated)).cost < best.cost:
                    best, damping = outcome, nearer
                    break
            else:
                break
        figures = {"timestep": problem.call.timestep, "before": before.distance, "after": best.distance}
        figures |= {"off_axis": best.moved, "damping": damping.mean().item()}
        return PlannedStep((1 - damping).float(), problem.root, figures), best.prediction

    def _gauss_newton(self, problem: _Problem, damping: Tensor) -> Tensor:
        """The solution (N,) of the least-squares problem that is linearised at the current damping."""
        settings, samples = self.settings, len(self.task.samples)
        rows, wanted, kinds = self._linearise(problem, (1 - damping).float())
        if not self.ranks.first:
            return self.ranks.agree(damping)
        price = torch.tensor([1.0, settings.mu * (1 - SHRINK), *[settings.keep] * (self.directions - 1)])
        number = kinds.bincount(minlength=len(price))
        number[0] = samples  # leans of K - 1 groups add up
        weight = (price.double() / number).sqrt()[kinds]
        ridge = settings.mu * SHRINK * rows[kinds == 1].square().mean(0)
        b, solution = weight * (wanted + rows @ damping[self.columns]), torch.zeros_like(damping)
        M = rows.mul_(weight[:, None])  # in place: rows of many samples and neurons fill the memory
        solution[self.columns] = bounded_least_squares(M, b, ridge, iterations=400, tolerance=1e-4)
        return self.ranks.agree(solution)

    @torch.no_grad()
    def _judge(self, problem: _Problem, prediction: Tensor) -> _Outcome:
        """The exact objective of a treated prediction (B, D)."""
        settings, leans, gather = self.settings, len(self.groups) - 1, self.ranks.gather
        change = prediction - problem.untreated
        now = lean(prediction, problem.balanced, problem.directions)
        to_goal, to_target = (gather((level - now).T).double() for level in (problem.goal, problem.target))
        away = gather((off_axis(change, problem.directions) / axis_size(problem.directions)).norm(dim=1)).double()
        moves = gather((change * problem.cotangents[leans:]).sum(2).T).double().square().flatten()
        asked = gather(problem.asked.T).flatten()
        along = torch.zeros(self.directions, dtype=torch.float64).index_add(0, asked, moves)
        along /= asked.bincount(minlength=self.directions)
        cost = to_goal[:, :leans].square().sum(1).mean() + settings.mu * away.square().mean()
        cost += settings.keep * along[1:].sum()
        figures = self.ranks.agree((cost.item(), to_target.abs().mean().item(), away.mean().item()))
        return _Outcome(prediction, *figures)

    def _linearise(self, problem: _Problem, factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """At the treated point: derivatives by the damping (M samples, N'), what is wanted of each row, and its kind.

        Kinds: 0 a lean, 1 a random direction, from 2 on those to keep.
        """
        leans = len(self.groups) - 1

        def derivatives(part: slice) -> tuple[Tensor, Tensor]:
            watch = TrialDamping(self.network, self.sites, factor, problem.root)
            with torch.enable_grad(), with_gradients(self.network), watch:
                prediction = problem.call.predict(part=part)
            rows, last = [], len(problem.cotangents) - 1
            for i, cotangent in enumerate(problem.cotangents[:, part]):
                relevance = watch.relevance(watch.grads(prediction, cotangent.to(prediction), retain=i < last))
                rows.append(-relevance[:, self.columns])
            return prediction.detach(), torch.stack(rows, 1)

        predictions, derived = zip(*self.portions.each(derivatives, len(self.rows)), strict=True)
        now, rows = torch.cat(predictions), torch.cat(derived)  # (B, D), (B, M, N)
        if not (finite := (now.isfinite().all(1) & rows.isfinite().all(2).all(1).to(now.device))).all():
            row = self.rows[int((~finite).nonzero()[0])]
            raise InputError(
                f"at timestep {problem.call.timestep:g} of {row['prompt']!r}, seed {row['seed']}, derivatives of the"
                " treated prediction are not finite; try --dtype float32 or bfloat16"
            )
        short = problem.goal - lean(now, problem.balanced, problem.directions)  # (K, B)
        moves = ((now - problem.untreated) * problem.cotangents[leans:]).sum(2)  # (E, B)
        wanted = torch.cat([short[:leans], -moves])
        kinds = torch.cat([torch.zeros(leans, len(now), dtype=torch.long), 1 + problem.asked])
        rows, wanted, kinds = (self.ranks.gather(x).flatten(0, 1) for x in (rows, wanted.T, kinds.T))
        return rows.double(), wanted.double(), kinds
