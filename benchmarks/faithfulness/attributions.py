"""The methods of scoring neurons that are compared, on the same points of the same trajectories.

A method reads a point (a batch of samples at one timestep) and gives each sample and neuron a *score*: how much the
neuron carries the stereotype. Methods that decompose a quantity also give *rows* R_j toward each group and a collateral
row, which a treatment plan can be made from.

    LRP composites            R_j = a_j g_j, or (a_j - abar_j) g_j when rooted; g by the composite's modified backward
                              pass. Mean-rooted: abar_j averaged over positions, which is what a mask can damp toward
    gradient                  the same with the plain gradient of the lean
    integrated gradients      conductance along the text: sum over steps of dS/da_j * change of a_j, from the groups'
                              mean text state to the neutral prompt's (Dhamdhere et al. 2018, eq. 3)
    CAD                       gradient x weight of J_g = ||f(c_g) - f(c)||^2, summed over the neuron's column of
                              weights (Nguyen et al. 2025, arXiv 2412.02542); such a sum is a_j dJ/da_j
    Wanda                     ||a_j|| sum_k |w_kj| under the group's prompt minus its mean over groups, signed by the
                              lean (ConceptPrune, Chavhan et al. 2024, after Sun et al. 2023)
    |activation|, |difference|  mean |a_j|; |difference of position means between the groups' passes|
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stereoclinic.ddtd.lean import group_directions, lean, off_axis_cotangent
from stereoclinic.ddtd.propagate import propagate
from stereoclinic.pipelines import arguments as tree
from stereoclinic.pipelines.call import Call
from stereoclinic.pipelines.hooks import Watch
from stereoclinic.pipelines.intercept import Pass, announced
from stereoclinic.pipelines.learn import Learnt
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.sites import Site, neuron_relevance, to_neurons
from stereoclinic.pipelines.watch import Walk, encode_groups
from stereoclinic.prompts.axes import Axis

LRP = ("epsilon-cp", "epsilon-attnlrp", "gamma-cp", "zplus-cp")
IG_STEPS = 4


@dataclass
class Point:
    """A batch of samples at one timestep of their own undamped trajectory. Sizes: K groups, B samples."""

    rows: list[dict]
    step: int  # among the measured ones
    timestep: float
    neutral: dict[str, Any]  # what the denoiser is told of the neutral prompts, and of each group's
    groups: list[dict[str, Any]]
    prediction: Tensor  # (B, D), for the neutral prompt
    balanced: Tensor  # (B, D)
    directions: Tensor  # (K, B, D)
    learnt: Learnt

    def predict(self, network: nn.Module, told: dict[str, Any]) -> Tensor:
        """(B, D) at the same latents; hooks of masks act as in the pipeline's own call."""
        count = len(self.rows)
        with announced(network, Pass(self.step, self.timestep, tuple(range(count)), (True,) * count, True, count)):
            return self.learnt.flat(network(**told))

    def between(self, one: dict[str, Any], other: dict[str, Any], share: float) -> dict[str, Any]:
        """What is told, with the conditions on the way from one prompt's to another's."""

        def mixed(path: tree.Path, leaf: Any) -> Any:
            return torch.lerp(leaf, tree.get(other, path), share) if path in self.learnt.conditions else leaf

        return tree.changed(one, mixed, self.learnt.axes)

    @property
    def leans(self) -> Tensor:
        """(K, B)."""
        return lean(self.prediction, self.balanced, self.directions)


@torch.no_grad()
def points(model: Model, axis: Axis, rows: list[dict], steps: int, every: int, batch: int = 24) -> Iterator[Point]:
    """The samples' trajectories without guidance, every Nth step of them a point for every batch."""
    for start in range(0, len(rows), batch):
        part, found = rows[start : start + batch], list[Point]()
        walk = Walk(model, part, steps, 1.0)
        (groups,) = encode_groups(walk, part, [axis])

        def visit(call: Call, part=part, found=found, walk=walk, groups=groups) -> None:
            if call.step % every == 0:
                told = [call.arguments(each, slice(None)) for each in groups]
                balanced, directions = group_directions(torch.stack([call.predict(each) for each in groups]))
                neutral = call.arguments(None, slice(None))
                at = call.step // every, call.timestep
                found.append(Point(part, *at, neutral, told, call.own(), balanced, directions, walk.learnt))

        walk.visit = visit
        walk.run()
        yield from found


@dataclass(frozen=True)
class Attribution:
    """What a method says of one point. Sizes as in `Point`, N neurons."""

    score: Tensor  # (B, N), larger = carries more of the stereotype
    rows: Tensor | None = None  # (K, B, N)
    collateral: Tensor | None = None  # (B, N)


class Reading:
    """One point read by all methods; what they share (group passes, the plain gradient) is computed once."""

    def __init__(self, network: nn.Module, sites: list[Site], point: Point) -> None:
        self.network, self.sites, self.point = network, sites, point
        self.signs = point.leans.sign()  # (K, B)
        self.off_axis = off_axis_cotangent(point.directions, point.rows, point.timestep)
        size = point.directions.square().sum(-1, keepdim=True)
        self.towards = point.directions / size.clamp_min(1e-30)  # (K, B, D): cotangent of each lean
        self.by_group = [self._watched(told) for told in point.groups]
        count = len(self.by_group)
        self.balanced = {name: sum(each[name] for each in self.by_group) / count for name in self.by_group[0]}

        # What a mask can damp toward: a number for each neuron, the same at every position.
        self.means = {site.layer: _over_positions(self.balanced[site.layer], site) for site in sites}

    @torch.no_grad()
    def _watched(self, told: dict[str, Any]) -> dict[str, Tensor]:
        with Watch(self.network, self.sites) as watch:
            self.point.predict(self.network, told)
        return dict(watch.activations)

    def _vjp(
        self, composite: str, told: dict[str, Any], cotangents: Sequence[Tensor]
    ) -> tuple[dict[str, Tensor], list[Mapping[str, Tensor | None]]]:
        """Activations at the sites, and for each cotangent of the prediction what arrives there."""
        with torch.enable_grad(), Watch(self.network, self.sites) as watch:
            with propagate(composite, self.network):
                found = self.point.predict(self.network, told)
            grads = [watch.grads(found, each.to(found), retain=True) for each in cotangents]
        return dict(watch.activations), grads

    def signed(self, rows: Tensor) -> Tensor:
        """(K, B, N) -> (B, N): the part that makes the lean larger, whichever way it goes."""
        return (self.signs[..., None] * rows).mean(0)

    def decomposed(self, composite: str) -> dict[str, Attribution]:
        """The composite's relevance, plain and rooted: one forward and two backward passes for two groups."""
        two = len(self.towards) == 2  # d_2 = -d_1
        wanted = [self.towards[0], self.off_axis] if two else [*self.towards, self.off_axis]
        activations, grads = self._vjp(composite, self.point.neutral, wanted)
        found = {}
        kinds = [("", None), (" rooted", self.balanced), (" mean-rooted", self.means)]
        for suffix, roots in kinds if composite == LRP[0] else kinds[:2]:
            each = [neuron_relevance(activations, part, self.sites, roots) for part in grads]
            rows = torch.stack([each[0], -each[0]] if two else each[:-1])
            found[composite + suffix] = Attribution(self.signed(rows), rows, each[-1])
        return found

    def integrated(self, collateral: Tensor) -> Attribution:
        """Conductance along the text path; its collateral is the plain gradient's rooted one, there being no other."""
        assert len(self.point.groups) == 2, "the path is worked out for two groups"
        start, end = self.point.between(*self.point.groups, 0.5), self.point.neutral
        before, total = self._watched(start), 0.0
        for i in range(IG_STEPS):
            middle = self.point.between(start, end, (i + 0.5) / IG_STEPS)
            _, (grads,) = self._vjp("gradient", middle, [self.towards[0]])
            after = self._watched(self.point.between(start, end, (i + 1) / IG_STEPS))
            total = total + neuron_relevance(after, grads, self.sites, before)
            before = after
        rows = torch.stack([total, -total])
        return Attribution(self.signed(rows), rows, collateral)

    def cad(self, collateral: Tensor) -> Attribution:
        """One pass a group's prompt; J_g is taken in units of ||d_g||^2, so that steps and samples count alike."""
        rows = []
        for k, told in enumerate(self.point.groups):
            apart = self.point.balanced + self.point.directions[k] - self.point.prediction
            size = self.point.directions[k].square().sum(1, keepdim=True)
            activations, (grads,) = self._vjp("gradient", told, [2 * apart / size.clamp_min(1e-30)])
            rows.append(neuron_relevance(activations, grads, self.sites))
        return Attribution(self.signed(torch.stack(rows)), torch.stack(rows), collateral)

    def wanda(self) -> Attribution:
        modules = dict(self.network.named_modules())
        scores = []
        for activations in self.by_group:
            columns = []
            for site in self.sites:
                weight = modules[site.layer].weight  # (O, C) or (O, C, 3, 3)
                weight = weight.abs().flatten(2).sum(-1).sum(0) if weight.ndim > 2 else weight.abs().sum(0)
                columns.append(
                    to_neurons(site.of(activations[site.layer]).square(), site.dim).sqrt()
                    * weight[site.start :][: site.width]
                )
            scores.append(torch.cat(columns, dim=1))
        rows = torch.stack(scores)
        return Attribution(self.signed(rows - rows.mean(0)))

    def magnitude(self) -> Attribution:
        activations = self._watched(self.point.neutral)
        return Attribution(torch.cat([_mean(activations[site.layer].abs(), site) for site in self.sites], dim=1))

    def difference(self) -> Attribution:
        means = [torch.cat([_mean(each[site.layer], site) for site in self.sites], dim=1) for each in self.by_group]
        return Attribution((torch.stack(means) - torch.stack(means).mean(0)).abs().mean(0))

    def all(self) -> dict[str, Attribution]:
        found: dict[str, Attribution] = {}
        for composite in (*LRP, "gradient"):
            found |= self.decomposed(composite)
        rooted = found["gradient rooted"].collateral
        plain = found["gradient"].collateral
        assert rooted is not None and plain is not None
        found["integrated gradients"] = self.integrated(rooted)
        found["CAD"] = self.cad(plain)
        found["Wanda"] = self.wanda()
        found["|activation|"] = self.magnitude()
        found["|difference|"] = self.difference()
        return found


def _over_positions(x: Tensor, site: Site) -> Tensor:
    """Means over positions, of a shape that broadcasts against x."""
    return x.mean(tuple(range(2, x.ndim)) if site.dim == 1 else tuple(range(1, x.ndim - 1)), keepdim=True)


def _mean(x: Tensor, site: Site) -> Tensor:
    """(B, N) mean over positions of a site's channels."""
    x = site.of(x)
    return to_neurons(x, site.dim) / (x.numel() // (x.shape[0] * x.shape[site.dim]))


@dataclass
class Sums:
    """A method's scores and rows added up by label and measured step. Sizes: P labels, M steps, K, N."""

    score: Tensor  # (P, M, N)
    rows: Tensor | None = None  # (P, M, K, N)
    collateral: Tensor | None = None  # (P, M, sketches, N)


@dataclass
class Ledger:
    """All methods' sums over the samples of one seed set."""

    labels: list[str]
    groups: tuple[str, ...]
    steps: int
    sketches: int = 4
    count: Tensor = field(init=False)
    leans: Tensor | None = None  # (P, M, K)
    means: Tensor | None = None  # (K, M, N), of the groups' passes
    timesteps: dict[int, float] = field(default_factory=dict)
    sums: dict[str, Sums] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.count = torch.zeros(len(self.labels), self.steps, dtype=torch.float64)

    def add(self, reading: Reading, found: dict[str, Attribution]) -> None:
        point = reading.point
        index = torch.tensor([self.labels.index(row["label"]) for row in point.rows])
        sketch = torch.tensor([row["seed"] % self.sketches for row in point.rows])
        groups, m = len(point.groups), point.step
        neurons = sum(site.width for site in reading.sites)
        if self.leans is None:
            self.leans = torch.zeros(len(self.labels), self.steps, groups, dtype=torch.float64)
            self.means = torch.zeros(groups, self.steps, neurons, dtype=torch.float64)
        assert self.means is not None
        self.timesteps[m] = point.timestep
        self.count[:, m].index_add_(0, index, torch.ones(len(index), dtype=torch.float64))
        self.leans[:, m].index_add_(0, index, point.leans.double().T)
        for k, activations in enumerate(reading.by_group):
            self.means[k, m] += torch.cat([_mean(activations[s.layer], s) for s in reading.sites], 1).double().sum(0)
        for name, each in found.items():
            if name not in self.sums:
                shape = (len(self.labels), self.steps)
                self.sums[name] = Sums(torch.zeros(*shape, neurons, dtype=torch.float64))
                if each.rows is not None:
                    self.sums[name].rows = torch.zeros(*shape, groups, neurons, dtype=torch.float64)
                    self.sums[name].collateral = torch.zeros(*shape, self.sketches, neurons, dtype=torch.float64)
            sums = self.sums[name]
            sums.score[:, m].index_add_(0, index, each.score.double())
            if sums.rows is not None and sums.collateral is not None and each.rows is not None:
                sums.rows[:, m].index_add_(0, index, each.rows.double().transpose(0, 1))
                assert each.collateral is not None
                sums.collateral[:, m].index_put_((index, sketch), each.collateral.double(), accumulate=True)


def ledger(
    model: Model,
    sites: list[Site],
    axis: Axis,
    rows: list[dict],
    steps: int,
    every: int,
    read: Callable[[Reading], dict[str, Attribution]] = Reading.all,
    advance: Callable[[int], None] = lambda count: None,
) -> Ledger:
    """Read every point of the samples' trajectories by all methods."""
    labels = list(dict.fromkeys(row["label"] for row in rows))
    kept = Ledger(labels, axis.groups, len(range(0, steps, every)))
    for point in points(model, axis, rows, steps, every):
        reading = Reading(tree.inner(model.network), sites, point)
        kept.add(reading, read(reading))
        advance(len(point.rows))
    return kept
