"""ConceptPrune: weights of the feed-forward layers that a group excites are set to zero.

Reference: Chavhan, Li and Hospedales, ConceptPrune: Concept Editing in Diffusion Models via Skilled Neuron Pruning,
ICLR 2025 (arXiv 2405.19237), after Sun et al., A Simple and Effective Pruning Approach for Large Language Models
(Wanda), ICLR 2024. The details below are those of the authors' published code.

    a_j   = norm of hidden unit j over samples and positions, each position's vector brought to length 1
    S_ij  = |W_ij| ||a_j||                          Wanda score of a weight of the layer that follows (`ff.net.2`)
    M_ij  = S_ij among the top k % of row i under the target prompts, and larger than under the base prompts
    M     = weights in M at any step (union over time);     W_ij <- 0 where M_ij

The target prompts name the group that is to be erased, the base prompts are neutral. The paper erases one concept from
a checkpoint. Here each group has its own pruned weights, and a prompt is drawn with those of the group that its own
calibration images show too often: our choice, in the method's favour. A prompt that is balanced, or was not
calibrated on, is left alone. Taking norms from the conditional half is our choice as well.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from stereoclinic.errors import InputError
from stereoclinic.evaluation.methods.base import Batch
from stereoclinic.evaluation.methods.baseline import Baseline, check_strength
from stereoclinic.evaluation.methods.calibration import Look, Run
from stereoclinic.pipelines.model import network_of
from stereoclinic.pipelines.sites import Site, find_sites, layer_at
from stereoclinic.prompts.sets import Row, write


@dataclass(frozen=True)
class PruneSettings:
    """Args: fraction of each row that may be pruned; strength up to 1.

    The authors' fraction is 0.01; of 0.01 to 0.3, 0.1 moved most on the embedded model.
    """

    fraction: float = 0.1
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise InputError(f"ConceptPrune: fraction {self.fraction}; expected above 0, up to 1")
        check_strength("ConceptPrune", self.strength, 1)


class ConceptPrune(Baseline):
    """Arguments as of `Baseline`, and the pruned weights."""

    title, source = "ConceptPrune", "Chavhan et al. 2025, arXiv 2405.19237"
    needs = "group prompts, labels of own images"
    defaults: ClassVar[PruneSettings] = PruneSettings()
    fitted = ("masks", "over")
    both = True
    by_prompt = True
    masks: dict[str, Tensor]  # site -> (K, O, C) bool
    over: dict[str, int]  # neutral prompt -> group that it shows too often

    def __init__(self, *common: Any, **fitted: Any) -> None:
        super().__init__(*common, **fitted)
        self._pruned: dict[tuple[str, int], Tensor] = {}

    @classmethod
    def _fit(cls, run: Run, settings: PruneSettings) -> Self:
        sites = _linear_sites(run.network)
        modules = {site.name: run.network.get_submodule(site.layer) for site in sites}
        of = {site.name: site.of for site in sites}
        steps = len(run.timesteps())
        squares: list[dict[str, Tensor]] = []  # of each kind of prompt: site -> (steps, C)

        def reduce(name: str, a: Tensor) -> Tensor:
            return functional.normalize(of[name](a).double(), dim=-1).square().flatten(1, -2).sum(1)

        def keep(samples: list[int], step: int, name: str, square: Tensor) -> None:
            squares[-1][name][step] += square.sum(0)

        def record(prompts: list[str]) -> Tensor:
            squares.append({site.name: torch.zeros(steps, site.width).double() for site in sites})
            return run.draw(prompts, Look(modules, reduce, keep, inputs=True))

        shares = run.shares(run.read(record(run.neutral)))
        for k in range(len(run.axis)):
            record(run.group(k))
        neutral, *groups = squares

        def mask(site: Site, group: dict[str, Tensor]) -> Tensor:
            target, base = group[site.name].sqrt(), neutral[site.name].sqrt()
            return skilled(_weight(run.network, site), target, base, settings.fraction)

        masks = {site.name: torch.stack([mask(site, group) for group in groups]) for site in sites}
        over = {prompt: int((p - run.target).argmax()) for prompt, p in shares.items() if (p - run.target).max() > 1e-6}
        return cls._made(run, settings, masks=masks, over=over)

    def modules(self) -> dict[str, str]:
        self._pruned.clear()
        return {name: self._site(name).layer for name in self.masks}

    def _site(self, name: str) -> Site:
        return Site(name, "ff", self.masks[name].shape[-1])

    def begin(self, rows: list[Row]) -> Batch:
        self._groups = torch.tensor([self.over.get(write(row), -1) for row in rows])
        return Batch([row["prompt"] for row in rows])

    def steer(self, name: str, x: Tensor, output: Tensor, groups: Tensor, images: Tensor) -> Tensor:
        pruned, site = output.clone(), self._site(name)
        for k in groups.unique().tolist():
            if (name, k) not in self._pruned:
                weight = _weight(network_of(self.model), site)
                self._pruned[name, k] = weight * self.masks[name][k].to(weight.device)
            rows = groups == k
            pruned[rows] -= self.strength * functional.linear(site.of(x)[rows], self._pruned[name, k].to(x.dtype))
        return pruned


def _linear_sites(network: nn.Module) -> list[Site]:
    """Raises InputError where there is none."""
    sites = [site for site in find_sites(network) if site.kind == "ff"]
    sites = [site for site in sites if isinstance(layer_at(network, site.layer), nn.Linear)]
    if not sites:
        raise InputError(f"ConceptPrune: no feed-forward block of this {type(network).__name__} ends in a linear layer")
    return sites


def _weight(network: nn.Module, site: Site) -> Tensor:
    """(O, C), of the site's channels."""
    layer: Any = layer_at(network, site.layer)
    return site.of(layer.get_parameter("weight").detach())


def wanda(weight: Tensor, norm: Tensor) -> Tensor:
    """Scores S_ij = |W_ij| ||a_j|| (Sun et al. 2024, eq. 1): weight (O, C), norm (..., C) -> (..., O, C)."""
    return weight.abs().to(norm) * norm[..., None, :]


def skilled(weight: Tensor, target: Tensor, base: Tensor, fraction: float) -> Tensor:
    """The weights that the target prompts excite, at any step.

    Args:
        weight: (O, C).
        target: (T, C) norms of the hidden units under the target prompts.
        base: (T, C), under the base prompts.
        fraction: Of each row; at least one weight.

    Returns:
        (O, C) bool.
    """
    found = torch.zeros(weight.shape, dtype=torch.bool)
    k = max(1, int(fraction * weight.shape[1]))
    for wanted, other in zip(target, base, strict=True):  # step by step: (T, O, C) need not fit in memory
        score, against = wanda(weight.cpu(), wanted), wanda(weight.cpu(), other)
        top = torch.zeros_like(found).scatter_(1, score.topk(k, dim=1).indices, True)
        found |= top & (score > against)
    return found
