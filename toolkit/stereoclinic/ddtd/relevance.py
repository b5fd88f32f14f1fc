"""Relevance as it is accumulated (a torchmetrics metric of float64 sums) and as it is kept (a file).

Every state is a sum over samples, so ranks and batches add up exactly, and its size does not grow with
the number of prompts: rows are kept per label (an occupation) and timestep bin, not per sample.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric

from stereoclinic.ddtd.neurons import Site
from stereoclinic.errors import InputError
from stereoclinic.files import load_tensors, save_tensors

KIND = "relevance"
VERSION = 1
SKETCHES = 4  # independent sums of off-axis rows by label and bin; more of them estimate ||V lambda||^2 better
STATES = (
    "count",
    "lean_sum",
    "lean_sq",
    "relevance_sum",
    "stereotype_sum",
    "stereotype_sq",
    "collateral",
    "root_sum",
)


class RelevanceSums(Metric):
    """Sums of leans, relevance, collateral and group activations.

    Args:
        labels: P, the number of row labels.
        bins: T, the number of timestep bins.
        groups: K.
        neurons: N.
    """

    full_state_update = False

    def __init__(self, labels: int, bins: int, groups: int, neurons: int) -> None:
        super().__init__()
        shapes = {
            "count": (labels, bins),
            "lean_sum": (labels, bins, groups),
            "lean_sq": (labels, bins, groups),
            "relevance_sum": (labels, bins, groups, neurons),
            "stereotype_sum": (labels, bins, neurons),
            "stereotype_sq": (bins, neurons),
            "collateral": (labels, bins, SKETCHES, neurons),
            "root_sum": (groups, bins, neurons),
        }
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self,
        labels: Tensor,
        seeds: Tensor,
        bin_: int,
        lean: Tensor,
        relevance: Tensor,
        collateral: Tensor,
        means: Tensor,
    ) -> None:
        """Add one step of a batch.

        Args:
            labels: (B,) row of each sample.
            seeds: (B,) seed of each sample, which says into which sketch its off-axis row is summed.
            bin_: Timestep bin of the step.
            lean: (K, B).
            relevance: (K, B, N), R_j of each group's lean.
            collateral: (B, N), a_j g_j of the off-axis cotangent, whose random signs let a sum stand for all samples.
            means: (K, B, N), position means of the activations in each group's pass.
        """
        lean, relevance = (
            lean.double().transpose(0, 1),
            relevance.double().transpose(0, 1),
        )  # (B, K), (B, K, N)
        tilt = (lean.sign()[..., None] * relevance).mean(1)  # (B, N): carries "more stereotyped", whichever way
        self.count[:, bin_].index_add_(0, labels, torch.ones_like(lean[:, 0]))
        self.lean_sum[:, bin_].index_add_(0, labels, lean)
        self.lean_sq[:, bin_].index_add_(0, labels, lean.square())
        self.relevance_sum[:, bin_].index_add_(0, labels, relevance)
        self.stereotype_sum[:, bin_].index_add_(0, labels, tilt)
        self.stereotype_sq[bin_] += tilt.square().sum(0)
        self.collateral[:, bin_].index_put_((labels, seeds % SKETCHES), collateral.double(), accumulate=True)
        self.root_sum[:, bin_] += means.double().sum(1)

    def compute(self) -> dict[str, Tensor]:
        return {name: getattr(self, name).clone() for name in STATES}

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Module:
        """Follow the module to a device, never to a dtype: sums stay float64 whatever the precision of the run."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), exclude_state)


@dataclass(frozen=True)
class Relevance:
    """What `stereo locate` found. Sizes: P labels, T timestep bins, K groups, N neurons.

    Args:
        sites: The layers, in the order their neurons are concatenated.
        groups: K names.
        labels: P names, such as occupations.
        bin_edges: (T + 1,) descending timesteps; bin i holds edges[i] > t >= edges[i + 1].
        count: (P, T) number of (sample, step) summed. The other tensors are as in `RelevanceSums`.
        metadata: Plain data: model, digests, axis, composite, steps, seeds, versions.
    """

    sites: list[Site]
    groups: tuple[str, ...]
    labels: list[str]
    bin_edges: Tensor
    count: Tensor
    lean_sum: Tensor
    lean_sq: Tensor
    relevance_sum: Tensor
    stereotype_sum: Tensor
    stereotype_sq: Tensor
    collateral: Tensor
    root_sum: Tensor
    metadata: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in STATES:
            if not torch.isfinite(getattr(self, name)).all():
                raise InputError(f"relevance: {name} is not finite; was the model run in too low a precision?")
        neurons = sum(site.width for site in self.sites)
        labels, bins = len(self.labels), len(self.bin_edges) - 1
        for name, expected in (
            ("relevance_sum", (labels, bins, len(self.groups), neurons)),
            ("stereotype_sum", (labels, bins, neurons)),
        ):
            if (found := tuple(getattr(self, name).shape)) != expected:
                raise InputError(f"relevance: {name} of shape {found}, expected {expected}; locate again")

    @property
    def prompts(self) -> list[str]:
        return self.labels

    def lean(self) -> Tensor:
        """Mean lean by label, bin and group: (P, T, K); NaN where nothing was measured."""
        return self.lean_sum / self.count[..., None]

    def lean_stderr(self) -> Tensor:
        """Standard error of `lean`: (P, T, K).

        Every measured step counts as an observation of its own. Steps of one sample resemble each other, so this is a
        lower bound where a bin holds several.
        """
        n = self.count[..., None]
        variance = (self.lean_sq / n - self.lean().square()).clamp_min(0) * n / (n - 1)
        return (variance / n).sqrt()

    def rows(self) -> Tensor:
        """Mean relevance by label, bin and group: (P, T, K, N)."""
        return self.relevance_sum / self.count[..., None, None]

    def stereotype(self) -> tuple[Tensor, Tensor]:
        """sign(S) R averaged over groups and samples, and its standard error: (T, N) each.

        The error is clustered by label: what is asked is whether other occupations would agree, and samples of one
        occupation, let alone steps of one sample, are no independent witnesses of that. With m_p the mean of label p,
        and as many samples of each of P labels, it is std(m_p) / sqrt(P). A bin that holds a single label has only
        the spread over its samples and steps to go by, which is a lower bound.
        """
        n = self.count.sum(0)[:, None]  # (T, 1)
        mean = self.stereotype_sum.sum(0) / n
        labels = (self.count > 0).sum(0)[:, None]  # (T, 1), P
        left = self.stereotype_sum - self.count[..., None] * mean  # (P, T, N), n_p (m_p - mean)
        clustered = left.square().sum(0) * labels / (labels - 1) / n.square()
        variance = (self.stereotype_sq / n - mean.square()).clamp_min(0) * n / (n - 1)
        return mean, torch.where(labels > 1, clustered, variance / n).sqrt()

    def roots(self) -> Tensor:
        """Mean activation in each group's passes: (K, T, N)."""
        return self.root_sum / self.count.sum(0)[:, None]

    def save(self, path: str | Path) -> None:
        """Write .safetensors (or .pt), sums in float32: their own sampling error is far larger than rounding."""
        tensors = {name: getattr(self, name).float() for name in STATES if name != "count"}
        tensors |= {"count": self.count, "bin_edges": self.bin_edges.double()}
        head = {
            "sites": [[site.name, site.kind, site.width] for site in self.sites],
            "groups": list(self.groups),
            "labels": self.labels,
            **self.metadata,
        }
        save_tensors(path, KIND, VERSION, tensors, head)

    @classmethod
    def load(cls, path: str | Path) -> "Relevance":
        """Read what `save` wrote.

        Raises:
            InputError: As `stereoclinic.files.load_tensors`, or a part is missing.
        """
        tensors, head = load_tensors(path, KIND, VERSION)
        try:
            sites = [Site(str(name), str(kind), int(width)) for name, kind, width in head.pop("sites")]
            groups, labels = tuple(head.pop("groups")), list(head.pop("labels"))
            sums = {name: tensors[name].double() for name in STATES}
            return cls(sites, groups, labels, tensors["bin_edges"], **sums, metadata=head)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: not a complete relevance file ({error})") from error
