"""Choosing neurons by relevance: its settings, and the choice by rank, which is the paper's own form."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.pipelines.bins import Window, bins_in
from stereoclinic.pipelines.sites import SITE_KINDS, STREAMS, Site
from stereoclinic.sns.mask import BRANCHES, NeuronMask, check_not_negative

if TYPE_CHECKING:
    from stereoclinic.ddtd.relevance import Relevance

METHODS = ("plan", "top-k")
#: Standard errors by which a neuron's score stays below its mean.
Z = 2.0
#: A mask lists its labels up to this number.
MOST_LABELS = 1000


@dataclass(frozen=True)
class Selection:
    """How neurons are chosen by relevance; the defaults are those of `stereo locate`.

    Args:
        select: "plan" (see `treatment_plan`) or "top-k" (see `top_k`).
        mu: plan: price of moving the prediction off the axis.
        overshoot: plan: remove this fraction more than each measured lean.
        at_most: plan: largest number of damped neurons; None for no limit.
        top: top-k: number of neurons, or their share when below 1.
        z: top-k: standard errors to stay below the mean.
        since: Noisiest timestep to damp at; None for the first there is.
        until: Cleanest timestep to damp at.
        kinds: Kinds of site to choose among; None for all.
        root: What neurons are damped toward, see `roots_for`.
        branch: Halves of a guided batch to damp.
        per_bin: Choose anew in each timestep bin, or once for all.

    Raises:
        InputError: A value is out of range.
    """

    select: str = "plan"
    mu: float = 1.0
    overshoot: float = 0.0
    at_most: int | None = None
    top: float = 0.01
    z: float = 2.0
    since: float | None = None
    until: float = 600.0
    kinds: tuple[str, ...] | None = None
    root: str = "zero"
    branch: str = "both"
    per_bin: bool = False

    def __post_init__(self) -> None:
        if self.select not in METHODS:
            raise InputError(f"select {self.select!r}: expected {' or '.join(METHODS)}")
        if self.branch not in BRANCHES:
            raise InputError(f"branch {self.branch!r}: expected {' or '.join(BRANCHES)}")
        check_not_negative(mu=self.mu, overshoot=self.overshoot)
        if not math.isfinite(self.z):
            raise InputError(f"z {self.z}: expected a number of standard errors, such as 2")

    @property
    def k(self) -> int | float:
        """`top` as `top_k` takes it: a whole number of neurons, or a share of them."""
        return int(self.top) if self.top >= 1 and float(self.top).is_integer() else self.top


def top_k(
    relevance: "Relevance",
    k: int | float,
    root: str = "zero",
    kinds: Sequence[str] | None = None,
    window: Window | None = None,
    per_bin: bool = False,
    z: float = Z,
) -> NeuronMask:
    """Silence the k neurons that most surely carry the stereotype.

    Neurons are ranked by the lower end of a confidence interval, ``mean - z * stderr`` of sign(S) R over samples, so
    that neither a large value on two prompts ranks high nor a sure but tiny one, as with a t statistic. Neurons whose
    mean is not positive are never chosen (damping them would raise the lean), so there can be fewer than k.

    Args:
        relevance: What was located.
        k: A whole number of neurons, or a fraction (a float, up to 1.0) of those of the kinds.
        root: What they are damped toward; see `roots_for`.
        kinds: Kinds of site to choose among; None for all.
        window: Timesteps to damp in; None for all.
        per_bin: Choose k in each timestep bin, rather than k for all bins together from their mean.
        z: Standard errors to stay below the mean.

    Raises:
        InputError: An argument is out of range, or no neuron's relevance is positive.
    """
    candidates = neurons_of(relevance.sites, kinds)
    number = number_of(k, int(candidates.sum()))
    measured = measured_bins(relevance, window)
    mean, stderr = _stereotype(relevance)
    if per_bin:
        candidates = candidates & measured[:, None]
    else:  # leans are normalised within a timestep already, so bins count alike
        stderr = (stderr[measured].square().sum(0).sqrt() / measured.sum()).expand_as(mean)
        mean = mean[measured].mean(0).expand_as(mean)
    eligible = candidates & (mean > 0)
    scores = torch.where(eligible, mean - z * stderr, -torch.inf)
    chosen = torch.stack([_largest(score, number) for score in scores]) & eligible
    if not chosen.any():
        raise InputError("no neuron has positive relevance here; try other kinds, timesteps or more seeds")
    how = {"method": "top_k", "k": k, "z": z, "neurons": int(chosen.any(0).sum())}
    return mask_from(relevance, (~chosen).float(), how, root, kinds, window, per_bin)


def measured_bins(relevance: "Relevance", window: Window | None) -> Tensor:
    """Which bins of a window hold a sample: (T,) bool.

    Raises:
        InputError: None does.
    """
    measured = (relevance.count.sum(0) > 0).cpu() & bins_in(relevance.bin_edges, window)
    if not measured.any():
        raise InputError("relevance holds no sample in these timesteps; widen the window or locate with more steps")
    return measured


def _stereotype(relevance: "Relevance") -> tuple[Tensor, Tensor]:
    """Mean and standard error of sign(S) R, (T, N) each; one sample has no error, which then counts as 0."""
    mean, stderr = (value.double().cpu() for value in relevance.stereotype())
    return mean, torch.where(torch.isfinite(stderr), stderr, 0.0)


def mask_from(
    relevance: "Relevance",
    factors: Tensor,
    how: dict[str, Any],
    root: str,
    kinds: Sequence[str] | None,
    window: Window | None,
    per_bin: bool,
) -> NeuronMask:
    """A mask over all of the relevance's sites, with its metadata and how neurons were chosen; `factors` is (T, N)."""
    selection = {
        **how,
        "root": root,
        "kinds": list(kinds or SITE_KINDS),
        "window": list(window) if window else None,
        "per_bin": per_bin,
    }
    mask = NeuronMask(
        relevance.sites,
        relevance.bin_edges,
        factors.float(),
        roots_for(relevance, root, per_bin),
        metadata={**relevance.metadata, **label_metadata(relevance.labels), "selection": selection},
    )
    return mask if window is None else mask.windowed(window)


def label_metadata(labels: Sequence[str]) -> dict[str, list[str]]:
    """The labels as metadata of a mask, which show what labels are held out; empty if there are too many."""
    return {"labels": list(labels)} if len(labels) <= MOST_LABELS else {}


def random_like(mask: NeuronMask, seed: int) -> NeuronMask:
    """A random mask with the same damping: each site's factors are shuffled among its neurons.

    The order is the same in all bins and for all groups, and roots stay with their neurons.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([span.start + torch.randperm(site.width, generator=generator) for site, span in mask.spans()])
    selection = {"method": "random_like", "seed": seed, "of": mask.metadata.get("selection")}
    metadata = {**mask.metadata, "selection": selection}
    return replace(mask, factors=mask.factors[..., order], metadata=metadata)


def roots_for(relevance: "Relevance", root: str, per_bin: bool = True) -> Tensor | None:
    """What neurons are damped toward, (T, N): None for zero.

    Args:
        relevance: What was located.
        root: "zero", "balanced" (the mean over the groups' passes), or a group's name (its own mean).
        per_bin: A root for each timestep bin (zeros where no sample was seen); otherwise the mean over all samples, the
            same in each bin, so that it can be folded into a bias.

    Raises:
        InputError: There is no such root.
    """
    check_root(root, relevance.groups)
    if root == "zero":
        return None
    if per_bin:
        means = torch.nan_to_num(relevance.roots(), nan=0.0)  # (K, T, N)
    else:
        total = relevance.count.sum()
        means = (relevance.root_sum.sum(1, keepdim=True) / total).expand_as(relevance.root_sum)
    return means.mean(0) if root == "balanced" else means[relevance.groups.index(root)]


def check_root(root: str, groups: Sequence[str]) -> None:
    """Refuse a name that `roots_for` does not know, with an InputError."""
    if root not in ("zero", "balanced", *groups):
        raise InputError(f"root {root!r} is not known; choose zero, balanced, or a group: {', '.join(groups)}")


def neurons_of(sites: Sequence[Site], kinds: Sequence[str] | None) -> Tensor:
    """Which neurons belong to sites of these kinds: (N,) bool.

    Args:
        sites: The sites.
        kinds: A kind of site, a stream, or both: "ff", "text", "ff:text"; None for all.

    Raises:
        InputError: A kind or stream is not known, or no site has any of them.
    """
    wanted = [set(kind.split(":")) for kind in kinds or ()]
    known = (*SITE_KINDS, "image", *STREAMS)
    for name in sorted(set().union(*wanted) - set(known)):
        raise InputError(f"site kind {name!r} is not known; choose from {', '.join(known)}")
    fits = [kinds is None or any(names <= {site.kind, site.stream} for names in wanted) for site in sites]
    chosen = torch.cat([torch.full((site.width,), fit) for site, fit in zip(sites, fits, strict=True)])
    if not chosen.any():
        present = sorted({f"{site.kind}:{site.stream}" for site in sites})
        raise InputError(f"no site has kind {', '.join(kinds or ())!r}; choose from {', '.join(present)}")
    return chosen


def number_of(k: int | float, candidates: int) -> int:
    """How many neurons `k` asks for: a whole number, or a fraction (a float) of the candidates.

    Raises:
        InputError: It is out of range.
    """
    if isinstance(k, float):
        if not 0 < k <= 1:
            raise InputError(f"k = {k:g}; a fraction goes from above 0 to 1, a number of neurons is written whole")
        return max(1, round(k * candidates))
    if not 1 <= k <= candidates:
        raise InputError(f"k = {k}; expected 1 to {candidates} neurons")
    return k


def _largest(score: Tensor, number: int) -> Tensor:
    """(n,) bool."""
    chosen = torch.zeros_like(score, dtype=torch.bool)
    chosen[score.argsort(descending=True, stable=True)[:number]] = True
    return chosen
