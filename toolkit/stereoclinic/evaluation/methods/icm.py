"""Implicit Choice-Modification: self-attention's outputs moved along what linear probes read a group from.

Reference: Zaleska et al., Attention, May I Have Your Decision? Localizing Generative Choices in Diffusion Models, 2026
(arXiv 2604.06052). The details below are those of the authors' published code. For layer l and timestep t:

    z_n     = mean over positions of self-attention's output, while the neutral prompt's image n is drawn
    y_n     = the group that a reader sees in the finished image
    theta_k = weights of a logistic regression of [y = k] on z, brought to length 1
    layers  = those whose probes are right most often on images held out (a fifth), on average over timesteps
    o      <- (o + a theta_k) ||o|| / ||o + a theta_k||       at every position, after the first steps

k is the image's allotted group. The authors' a is a number for one model (15 for Stable Diffusion 1.5); here it is
`strength` times the mean length of the layer's outputs at that timestep, so that it carries over to other models.
Where occupations and groups go together, probes learn occupations as well.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional

from stereoclinic.errors import InputError
from stereoclinic.evaluation.methods.baseline import Baseline, attended, attention_blocks, check_strength, unit
from stereoclinic.evaluation.methods.calibration import Look, Run


@dataclass(frozen=True)
class ProbeSettings:
    """Args: number of layers; share of the run left alone at its start; penalty of probes; strength."""

    layers: int = 3
    start: float = 0.1
    penalty: float = 1.0
    strength: float = 1.0

    def __post_init__(self) -> None:
        if self.layers < 1 or not 0 <= self.start < 1 or self.penalty <= 0:
            raise InputError("ICM: layers must be 1 or more, start from 0 to below 1, the penalty above 0")
        check_strength("ICM", self.strength)


class ImplicitChoice(Baseline):
    """Arguments as of `Baseline`, and the probes of the chosen layers."""

    title, source = "ICM", "Zaleska et al. 2026, arXiv 2604.06052"
    needs = "labels of own images"
    defaults: ClassVar[ProbeSettings] = ProbeSettings()
    fitted = ("theta", "lengths", "start")
    theta: dict[str, Tensor]  # layer -> (T, K, C)
    lengths: dict[str, Tensor]  # layer -> (T,), mean length of its outputs
    start: float  # share of the run that is left alone

    @classmethod
    def _fit(cls, run: Run, settings: ProbeSettings) -> Self:
        layers, timesteps = attention_blocks(run.network, cross=False, who="ICM"), run.timesteps()
        z: dict[str, Tensor] = {}  # layer -> (T, N, C)
        lengths = {name: torch.zeros(len(timesteps)) for name in layers}

        def reduce(name: str, o: Tensor) -> Tensor:
            o = attended(f"ICM: {name}", o).float()
            return torch.cat([o.mean(1), o.norm(dim=-1).mean(1, keepdim=True)], dim=1)

        def keep(samples: list[int], step: int, name: str, found: Tensor) -> None:
            if name not in z:
                z[name] = torch.zeros(len(timesteps), len(run.rows), found.shape[1] - 1)
            z[name][step, samples] = found[:, :-1]
            lengths[name][step] += found[:, -1].sum() / len(run.rows)

        y = run.read(run.draw(run.neutral, Look(layers, reduce, keep)))
        held_out = _fifth(y, run.axis.groups)
        theta, right = {}, {}
        for name, features in z.items():
            found = [probes(each, y, held_out, len(run.axis), settings.penalty) for each in features]
            theta[name] = torch.stack([each for each, _ in found])
            right[name] = sum(share for _, share in found)
        best = sorted(layers, key=lambda name: -right[name])[: settings.layers]  # stable: the first of equals
        fitted = {"theta": {name: theta[name] for name in best}, "lengths": {name: lengths[name] for name in best}}
        return cls._made(run, settings, timesteps, **fitted, start=settings.start)

    def modules(self) -> dict[str, str]:
        return {name: name for name in self.theta}

    def steer(self, name: str, x: Tensor, output: Tensor, groups: Tensor, images: Tensor) -> Tensor:
        t, lengths = self._step, self.lengths[name]
        if t < self.start * len(lengths):
            return output
        a = self.strength * float(lengths[t])
        moved = output + a * self.theta[name][t].to(output)[groups][:, None]
        lengths_kept: Tensor = unit(moved) * output.norm(dim=-1, keepdim=True)
        return lengths_kept


def _fifth(y: Tensor, groups: tuple[str, ...]) -> Tensor:
    """Every fifth image of each group: (N,) bool; raises InputError if a group is too rare for a probe."""
    held_out = torch.zeros(len(y), dtype=torch.bool)
    for k, group in enumerate(groups):
        own = (y == k).nonzero().flatten()
        if len(own) < 2:
            raise InputError(
                f"ICM: {len(own)} of {len(y)} calibration images show {group!r}; a probe needs at least 2 of each"
                " group; give more seeds"
            )
        held_out[own[4::5]] = True
    return held_out


def probes(z: Tensor, y: Tensor, held_out: Tensor, groups: int, penalty: float) -> tuple[Tensor, float]:
    """One probe for each group against the rest, at one layer and timestep.

    Args:
        z: (N, C) features.
        y: (N,) groups.
        held_out: (N,) which images they are judged on; if none, on those that they were fitted on.
        groups: K.
        penalty: Of `logistic_regression`.

    Returns:
        (K, C) weights of length 1, and the share of judgements [y = k] that are right.
    """
    judged = held_out if held_out.any() else ~held_out
    weights, right = [], []
    for k in range(groups):
        theta, bias = logistic_regression(z[~held_out], y[~held_out] == k, penalty)
        right.append((((z[judged].double() @ theta + bias) > 0) == (y[judged] == k)).double().mean().item())
        weights.append(unit(theta).float())
    return torch.stack(weights), sum(right) / groups


def logistic_regression(x: Tensor, y: Tensor, penalty: float = 1.0) -> tuple[Tensor, Tensor]:
    """The theta (C,) and bias that minimise ``sum log(1 + exp(-s (x theta + bias))) + penalty / 2 ||theta||^2``.

    Args:
        x: (n, C).
        y: (n,) bool; s is 1 where true and -1 elsewhere.
        penalty: On theta alone, above 0.
    """
    x, sign = x.double(), torch.where(y, 1.0, -1.0).double()
    theta = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    exact = {"max_iter": 200, "tolerance_grad": 1e-8, "tolerance_change": 1e-14}
    optimiser = torch.optim.LBFGS([theta, bias], **exact, line_search_fn="strong_wolfe")  # type: ignore[arg-type]

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = functional.softplus(-sign * (x @ theta + bias)).sum() + penalty / 2 * theta.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    return theta.detach(), bias.detach()
