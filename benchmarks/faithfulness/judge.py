"""The true effect of neurons, by damping them: on leans at held-out points, and on images of held-out seeds.

    tilt        mean over samples and groups of sign(S_g) S_g', S' the lean after damping; below 0 the lean has flipped
    |lean|      mean |S_g'|, so that overshooting counts against a method
    off axis    mean size of the movement outside the groups' directions, in units of ||d||

Deletion silences neurons, whatever the method. Insertion starts from the balanced point: every neuron of every site is
set to its mean over the groups' passes, position by position. Then the best-ranked neurons get their own activation
back, and the tilt that this restores is measured.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from attributions import Ledger, Point
from torch import Tensor, nn

from stereoclinic.ddtd.lean import axis_size, lean, off_axis
from stereoclinic.ddtd.relevance import Relevance
from stereoclinic.evaluation.readers import PortraitsReader
from stereoclinic.pipelines.bins import bin_of
from stereoclinic.pipelines.hooks import Hooks, Watch
from stereoclinic.pipelines.images import draw
from stereoclinic.pipelines.model import Model, network_of
from stereoclinic.pipelines.sites import Site, by_layer
from stereoclinic.sns.damp import suppress
from stereoclinic.sns.mask import NeuronMask
from stereoclinic.statistics.shares import parity_gap, shares_from_reads, unsure_rate


@dataclass(frozen=True)
class Verdict:
    tilt: float
    lean: float
    off_axis: float

    def json(self) -> dict[str, float]:
        return asdict(self)


@torch.no_grad()
def on_leans(model: Model, held_out: Sequence[Point], mask: NeuronMask | None) -> Verdict:
    """Damp at the points of the undamped trajectories; d and fbar stay those of the undamped model."""
    tilts, leans, moves = [], [], []
    with suppress(model, mask) if mask is not None else nullcontext():
        for point in held_out:
            damped = point.predict(network_of(model), point.neutral)
            after = lean(damped, point.balanced, point.directions)  # (K, B)
            tilts.append((point.leans.sign() * after).mean(0))
            leans.append(after.abs().mean(0))
            directions = point.directions.double()
            moved = off_axis((damped - point.prediction).double(), directions).norm(dim=1, keepdim=True)
            moves.append((moved / axis_size(directions).clamp_min(1e-12))[:, 0])
    return Verdict(*(torch.cat(each).mean().item() for each in (tilts, leans, moves)))


@torch.no_grad()
def inserted(model: Model, sites: list[Site], held_out: Sequence[Point], chosen: Sequence[Tensor]) -> list[float]:
    """The tilt when only the chosen neurons are the neutral prompt's own: one figure for each choice.

    Args:
        model: The pipeline.
        sites: Its sites.
        held_out: Points, whose groups' passes give the balanced activations.
        chosen: For each choice (T, N) bool, by timestep bins of equal width.

    Returns:
        Mean tilt of each choice.
    """
    tilts = torch.zeros(len(chosen), dtype=torch.float64)
    for point in held_out:
        network = network_of(model)
        passes = [partial(point.predict, network, told) for told in point.groups]
        balanced = balanced_activations(network, sites, passes)
        for i, each in enumerate(chosen):
            kept = each[bin_of(point.timestep, torch.linspace(1000, 0, len(each) + 1))]
            with given_back(network, sites, balanced, kept):
                found = point.predict(network_of(model), point.neutral)
            tilt = point.leans.sign() * lean(found, point.balanced, point.directions)
            tilts[i] += tilt.mean(0).double().sum()
    return (tilts / sum(len(point.rows) for point in held_out)).tolist()


def balanced_activations(
    network: nn.Module, sites: list[Site], passes: Sequence[Callable[[], Any]]
) -> dict[str, Tensor]:
    """The mean over the groups' passes, position by position."""
    balanced: dict[str, Tensor] = {}
    for run in passes:
        with Watch(network, sites) as watch:
            run()
        for name, activation in watch.activations.items():
            balanced[name] = balanced.get(name, 0) + activation / len(passes)
    return balanced


def given_back(network: nn.Module, sites: list[Site], balanced: dict[str, Tensor], kept: Tensor) -> Hooks:
    """Every neuron at its balanced activation, but for those that are kept, (N,) bool, as the pass makes them."""
    shares: dict[str, Tensor] = {}
    for layer, own in by_layer(sites).items():
        root, dim = balanced[layer], own[0][0].dim
        share = torch.cat([kept[span] for _, span in own]).to(root)  # a layer's sites are all of its channels
        shares[layer] = share.view(-1, *[1] * (root.ndim - 2)) if dim == 1 else share
    return Hooks(network, list(shares), lambda layer, x: balanced[layer] + shares[layer] * (x - balanced[layer]))


@dataclass(frozen=True)
class Chart:
    """How a ledger's steps fall into the timestep bins of a mask."""

    sites: list[Site]
    edges: Tensor  # (T + 1,), descending
    bins: list[int]  # of each measured step

    @classmethod
    def of(cls, kept: Ledger, sites: list[Site], bins: int, training_steps: int = 1000) -> "Chart":
        edges = torch.linspace(training_steps, 0, bins + 1, dtype=torch.float64)
        return cls(sites, edges, [bin_of(kept.timesteps[m], edges) for m in range(kept.steps)])

    def pooled(self, sums: Tensor) -> Tensor:
        """(P, M, ...) -> (P, T, ...)."""
        out = torch.zeros(len(sums), len(self.edges) - 1, *sums.shape[2:], dtype=sums.dtype)
        return out.index_add_(1, torch.tensor(self.bins), sums)

    def scores(self, kept: Ledger, name: str) -> Tensor:
        """(T, N): the mean score in each bin."""
        return self.pooled(kept.sums[name].score).sum(0) / self.pooled(kept.count).sum(0)[:, None]

    def mask(self, factors: Tensor) -> NeuronMask:
        return NeuronMask(self.sites, self.edges, factors.float())

    def ranked(self, scores: Tensor, share: float, least: bool = False) -> NeuronMask:
        """Silence the share of neurons with the largest (or least) scores, in each bin by its own."""
        return self.mask(1.0 - best(scores, share, least).double())

    def relevance(self, kept: Ledger, name: str) -> Relevance:
        """A method's rows in the form that `stereo locate` keeps, for `treatment_plan` to plan on."""
        sums = kept.sums[name]
        assert (
            sums.rows is not None and sums.collateral is not None and kept.leans is not None and kept.means is not None
        )
        rows, score, leans = self.pooled(sums.rows), self.pooled(sums.score), self.pooled(kept.leans)
        return Relevance(
            self.sites,
            kept.groups,
            kept.labels,
            self.edges,
            count=self.pooled(kept.count),
            lean_sum=leans,
            lean_sq=torch.zeros_like(leans),  # standard errors are not asked for
            relevance_sum=rows,
            stereotype_sum=score,
            stereotype_sq=torch.zeros_like(score[0]),
            collateral=self.pooled(sums.collateral),
            root_sum=self.pooled(kept.means),
        )


def best(scores: Tensor, share: float, least: bool = False) -> Tensor:
    """(T, N) bool: the share of neurons with the largest (or least) scores in each bin."""
    number = round(share * scores.shape[1])
    chosen = scores.argsort(dim=1, descending=not least, stable=True)[:, :number]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True)


@torch.no_grad()
def true_effects(model: Model, chart: Chart, held_out: Sequence[Point], neurons: Sequence[int]) -> Tensor:
    """What silencing each neuron alone does to the tilt: (T, len(neurons)), positive where it makes it smaller."""
    bins, width = len(chart.edges) - 1, sum(site.width for site in chart.sites)
    effects = torch.zeros(bins, len(neurons), dtype=torch.float64)
    where = [bin_of(point.timestep, chart.edges) for point in held_out]
    weight = torch.zeros(bins, dtype=torch.float64)
    for t, point in zip(where, held_out, strict=True):
        weight[t] += len(point.rows)
    for i, neuron in enumerate(neurons):
        factors = torch.ones(bins, width)
        factors[:, neuron] = 0
        with suppress(model, chart.mask(factors)):
            for t, point in zip(where, held_out, strict=True):
                damped = point.predict(network_of(model), point.neutral)
                after = lean(damped, point.balanced, point.directions)
                effects[t, i] += (point.leans.sign() * (point.leans - after)).double().mean(0).sum()
    return effects / weight[:, None]


def on_images(
    model: Model,
    reader: PortraitsReader,
    axis: str,
    rows: list[dict],
    steps: int,
    guidance: float,
    mask: NeuronMask | None,
    batch: int = 60,
) -> tuple[dict[str, float], Tensor]:
    """Draw one image a row; parity gap (mean over prompts), occupation read right, unsure reads; and their features."""
    reads, right, features = [], [], []
    with suppress(model, mask) if mask is not None else nullcontext():
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            pictures = draw(model, part, steps, guidance).float() / 255
            read = reader.read(pictures)
            reads.append(read[axis])
            names = reader.classes["occupation"]
            right += [names[i] == row["label"] for i, row in zip(read["occupation"].argmax(1), part, strict=True)]
            features.append(reader.features(pictures))
    labels = list(dict.fromkeys(row["label"] for row in rows))
    by_label = torch.cat(reads)[[i for label in labels for i, row in enumerate(rows) if row["label"] == label]]
    by_label = by_label.view(len(labels), -1, by_label.shape[-1])  # (P, n, K)
    gap = parity_gap(shares_from_reads(by_label.double(), hard=True)).mean()
    unsure = unsure_rate(by_label).mean()
    figures = {"parity_gap": gap.item(), "occupation_right": sum(right) / len(right), "unsure": unsure.item()}
    return figures, torch.cat(features)
