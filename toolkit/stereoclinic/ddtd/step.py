"""DDTD at one step of a batch: one pass without gradient, one under relevance, a backward pass a target.

[unconditional, groups] --one pass, no gradient--> f_u, fbar, d_g, abar
neutral                 --one pass, watched------> f, the lean, the target's values and cotangents
                        --backward---------------> R_j = (a_j - abar_j) g_j, and an off-axis row
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from stereoclinic.ddtd import eager
from stereoclinic.ddtd.neurons import Site, Watch, neuron_relevance, spans, to_neurons
from stereoclinic.ddtd.propagate import Propagation
from stereoclinic.ddtd.target import Classifier, Point, Target, group_directions, lean, off_axis_cotangent
from stereoclinic.denoisers.base import Denoiser
from stereoclinic.denoisers.sampling import guide
from stereoclinic.errors import InputError
from stereoclinic.prompts import Row


@dataclass(frozen=True)
class Measured:
    """One measured step of a batch. Sizes: K groups, B samples, N neurons.

    `lean` is always S_g; `value` is what was decomposed, the lean itself unless another target was chosen, and
    `relevance` adds up to it, but for what biases keep. `collateral` is the off-axis row, 0 where none was asked for.
    `faults` says of samples with values that are not finite where they began.
    """

    timestep: float
    lean: Tensor  # (K, B)
    value: Tensor  # (K, B)
    relevance: Tensor  # (K, B, N)
    collateral: Tensor  # (B, N)
    means: Tensor  # (K, B, N)
    faults: dict[int, str] = field(default_factory=dict)

    @classmethod
    def joined(cls, parts: list["Measured"]) -> "Measured":
        """The parts of a batch as one."""
        if len(parts) == 1:
            return parts[0]
        faults: dict[int, str] = {}
        start = 0
        for part in parts:
            faults |= {start + row: where for row, where in part.faults.items()}
            start += part.lean.shape[1]
        joined = {
            name: torch.cat([getattr(part, name) for part in parts], dim=dim)
            for name, dim in (("lean", 1), ("value", 1), ("relevance", 1), ("collateral", 0), ("means", 1))
        }
        return cls(parts[0].timestep, **joined, faults=faults)


@dataclass(frozen=True)
class States:
    """Encoded prompts of a batch: the neutral one, the unconditional one, and each group's."""

    neutral: Tensor  # (B, L, D)
    empty: Tensor  # (B, L, D)
    groups: Tensor  # (K, B, L, D)

    def __getitem__(self, part: slice) -> "States":
        return States(self.neutral[part], self.empty[part], self.groups[:, part])


#: Activations, gradients, sites and roots -> rows (B, N): `neuron_relevance`, or something that appends to its rows.
Reduce = Callable[[Mapping[str, Tensor], Sequence[Tensor | None], Sequence[Site], Mapping[str, Tensor] | None], Tensor]


@dataclass(frozen=True)
class How:
    """What is decomposed, and how, at a step. `off_axis` is what the off-axis row counts; at 0 it is left at 0."""

    propagation: Propagation
    rooted: bool
    target: Target
    guidance: float
    classifier: Classifier | None = None
    on: str = "pictures"
    off_axis: float = 1.0
    reduce: Reduce = neuron_relevance


def measure(
    denoiser: Denoiser, sites: list[Site], rows: list[Row], latents: Tensor, timestep: Tensor, states: States, how: How
) -> tuple[Tensor, Measured]:
    """The guided prediction (B, C, h, w) of the neutral prompts, and what was measured on the way to it."""
    unet = uncompiled(denoiser.unet)
    apart = how.guidance > 1 and not how.target.halves  # the unconditional half travels with the groups
    predictions, means, roots = _group_passes(denoiser, unet, sites, latents, timestep, states, apart, how.rooted)
    unconditional = predictions[0] if apart else None
    balanced, directions = group_directions(predictions[int(apart) :])
    halves = 2 if how.target.halves else 1

    with torch.enable_grad(), Watch(unet, sites) as watch:
        with how.propagation:
            start = latents.detach().requires_grad_()
            if how.target.halves:
                both = torch.cat([states.empty, states.neutral])
                prediction = denoiser.predict(torch.cat([start, start]), timestep, both)
                unconditional = prediction[: len(rows)].detach()
            else:
                prediction = denoiser.predict(start, timestep, states.neutral)
        conditional = prediction[-len(rows) :].detach()
        point = Point(
            denoiser, latents, timestep, conditional, unconditional, balanced, directions, how.classifier, how.on
        )
        value, cotangents = how.target.values(point)
        inputs = [watch.activations[site.name] for site in sites]
        at = {name: root.repeat(halves, *[1] * (root.ndim - 1)) for name, root in roots.items()} if how.rooted else None

        def decompose(cotangent: Tensor, last: bool) -> Tensor:
            # The pass is linear in its cotangent: one of unit size neither over- nor underflows in half precision.
            size = cotangent.flatten(1).square().mean(1).sqrt()
            whole = torch.where(size > 0, size, 1.0)
            unit = (cotangent / whole[:, None, None, None]).to(prediction.dtype)
            grads = torch.autograd.grad(prediction, inputs, unit, retain_graph=not last, allow_unused=True)
            relevance = how.reduce(watch.activations, grads, sites, at) * whole[:, None]
            summed: Tensor = relevance.unflatten(0, (halves, -1)).sum(0)  # (B, N)
            return summed

        two = len(cotangents) == 2  # c_2 = -c_1, so the second value and its relevance come for free
        wanted = list(cotangents[:1] if two else cotangents)
        if how.off_axis:
            # Whatever is decomposed, it is the conditional prediction that is to stay where it is off the axis.
            off_axis = how.off_axis * off_axis_cotangent(directions, rows, float(timestep))
            wanted.append(torch.cat([torch.zeros_like(off_axis)] * (halves - 1) + [off_axis]))
        found = [decompose(each, last=i == len(wanted)) for i, each in enumerate(wanted, start=1)]
        collateral = found.pop() if how.off_axis else torch.zeros_like(found[0])
        relevance = torch.stack([found[0], -found[0]] if two else found)
        guided = guide(conditional, unconditional if how.guidance > 1 else None, how.guidance)
        leans = lean(conditional, balanced, directions)
        if not (leans.any() or directions.any()):
            raise InputError(
                f"the model predicts the same for every group's prompt at timestep {float(timestep):g}, so the axis has"
                " no direction; check that its UNet reads the text, and the words of the axis"
            )
        measured = Measured(float(timestep), leans, value, relevance, collateral, means)
        faults = _faults(measured, guided, watch.activations, sites, len(rows))
    return guided, replace(measured, faults=faults)


@torch.no_grad()
def _group_passes(
    denoiser: Denoiser,
    unet: nn.Module,
    sites: list[Site],
    latents: Tensor,
    timestep: Tensor,
    states: States,
    apart: bool,
    rooted: bool,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Predictions (K, B, C, h, w), unconditional one first if `apart`; position means (K, B, N); abar by site."""
    conditions = [states.empty, *states.groups] if apart else list(states.groups)
    with _eagerly(), Watch(unet, sites) as watch:
        predictions = denoiser.predict(torch.cat([latents] * len(conditions)), timestep, torch.cat(conditions))
        activations = watch.activations
    skip, groups = len(latents) * int(apart), len(states.groups)
    means, roots = [], {}
    for site in sites:
        activation = activations.pop(site.name)[skip:]  # (K B, ...)
        channels = 1 if site.kind == "conv" else -1
        positions = activation.numel() // (activation.shape[0] * activation.shape[channels])
        means.append(to_neurons(activation, site.kind) / positions)
        if rooted:
            wide = torch.promote_types(activation.dtype, torch.float32)
            roots[site.name] = activation.unflatten(0, (groups, -1)).mean(0, dtype=wide)
    return predictions.unflatten(0, (len(conditions), -1)), torch.cat(means, 1).unflatten(0, (groups, -1)), roots


def _faults(
    measured: Measured, guided: Tensor, activations: dict[str, Tensor], sites: list[Site], samples: int
) -> dict[int, str]:
    """Where each sample's values first cease to be finite: on the way forward, or else on the way back."""
    finite = guided.isfinite().flatten(1).all(1)
    for value in (measured.lean, measured.value):
        finite = finite & value.isfinite().all(0)
    for value in (measured.relevance, measured.means, measured.collateral[None]):
        finite = finite & value.isfinite().all(2).all(0)
    if finite.all():
        return {}
    place = {site.name: span for site, span in spans(sites)}
    order = list(activations)  # as the sites ran

    def where(row: int) -> str:
        for name in order:
            own = activations[name].unflatten(0, (-1, samples))[:, row]
            if not (own.isfinite().all() and measured.means[:, row, place[name]].isfinite().all()):
                return f"activations of {name}"
        for name in reversed(order):
            back = measured.relevance[:, row, place[name]], measured.collateral[row, place[name]]
            if not all(part.isfinite().all() for part in back):
                return f"relevance of {name}"
        return "the prediction"

    return {row: where(row) for row in (~finite).nonzero().flatten().tolist()}


def uncompiled(unet: nn.Module) -> nn.Module:
    """The module itself, where `torch.compile` wrapped it: sites are named by its paths, and hooks belong on it."""
    return getattr(unet, "_orig_mod", unet)


@contextmanager
def _eagerly() -> Iterator[None]:
    """Compiled code does not see hooks set after its first call."""
    eager.enter()
    try:
        yield
    finally:
        eager.leave()
