"""DDTD at one step of a batch: a pass without gradient, a pass under relevance rules, a backward pass for each group.

[no prompt, groups] --one pass, no gradient--> f_u, fbar, d_g, abar
neutral prompts     --one pass, watched------> f, the lean, the target's values and cotangents
                    --backward---------------> R_j = (a_j - abar_j) g_j, and an off-axis row

Predictions are flat, (B, D): the denoiser's raw output.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from stereoclinic.ddtd.lean import NO_DIRECTION, Classifier, Point, Target, group_directions, lean, off_axis_cotangent
from stereoclinic.ddtd.propagate import Propagation, eagerly
from stereoclinic.errors import InputError
from stereoclinic.pipelines import arguments as tree
from stereoclinic.pipelines.call import Call
from stereoclinic.pipelines.conditions import Conditions
from stereoclinic.pipelines.hooks import Watch, with_gradients
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.sites import Site, by_layer, calls_of, neuron_relevance, spans, to_neurons
from stereoclinic.prompts.sets import Row


@dataclass(frozen=True)
class Measured:
    """One measured step of a batch. Sizes: K groups, B samples, N neurons."""

    timestep: float
    lean: Tensor  # (K, B), S_g
    value: Tensor  # (K, B), what was decomposed: the lean, unless another target was chosen
    relevance: Tensor  # (K, B, N), adds up to the value, but for the share of biases
    collateral: Tensor  # (B, N), the off-axis row; 0 where it was not measured
    means: Tensor  # (K, B, N), activations in the groups' passes
    faults: dict[int, str] = field(default_factory=dict)  # sample -> where its values cease to be finite

    @classmethod
    def joined(cls, parts: list["Measured"]) -> "Measured":
        """The parts of a batch as one."""
        if len(parts) == 1:
            return parts[0]
        starts = accumulate((part.lean.shape[1] for part in parts), initial=0)
        faults = {start + row: where for start, part in zip(starts, parts) for row, where in part.faults.items()}  # noqa: B905
        dims = {"lean": 1, "value": 1, "relevance": 1, "collateral": 0, "means": 1}
        joined = {name: torch.cat([getattr(part, name) for part in parts], dim=dim) for name, dim in dims.items()}
        return cls(parts[0].timestep, **joined, faults=faults)


#: Activations, gradients, sites and roots -> rows (B, N): `neuron_relevance`, or something that appends to its rows.
Reduce = Callable[
    [Mapping[str, Tensor], Mapping[str, Tensor | None], Sequence[Site], Mapping[str, Tensor] | None], Tensor
]


@dataclass(frozen=True)
class StepSettings:
    """What is decomposed at a step, and how; `Settings.for_step` makes it."""

    propagation: Propagation
    rooted: bool  # R_j = (a_j - abar_j) g_j in place of a_j g_j
    target: Target
    classifier: Classifier | None = None
    on: str = "pictures"  # what the classifier sees, or "latents"
    off_axis: float = 1.0  # weight of the off-axis row; with 0 it is not measured
    reduce: Reduce = neuron_relevance


def measure(
    model: Model,
    call: Call,
    groups: Sequence[Conditions],
    sites: list[Site],
    rows: Sequence[Row],
    settings: StepSettings,
    part: slice = slice(None),
) -> tuple[Tensor, Tensor | None, Measured]:
    """Measure some samples at one of a pipeline's steps.

    Args:
        model: The pipeline.
        call: Its denoiser's call.
        groups: Conditions of the K groups' prompts.
        sites: What is watched.
        rows: All samples of the call.
        settings: What is decomposed.
        part: Which of the samples.

    Returns:
        Predictions (n, D) for the neutral prompts and without prompt (None where not needed), and the measured step.

    Raises:
        InputError: The model predicts the same for all groups' prompts, or the target needs what the pipeline lacks.
    """
    network, rows = tree.inner(model.network), list(rows)[part]
    both = settings.target.halves
    alone = call.guided and not both  # the pass without prompt is made with the groups'
    predictions, means, roots = _group_passes(model, call, groups, sites, part, alone, settings.rooted)
    unconditional = predictions[0] if alone else None
    balanced, directions = group_directions(predictions[int(alone) :])

    with torch.enable_grad(), with_gradients(network), Watch(network, sites) as watch:
        with settings.propagation:
            prediction = call.both(part) if both else call.predict(part=part)
        unconditional = prediction[: len(rows)].detach() if both else unconditional
        conditional = prediction[-len(rows) :].detach()
        seen = conditional, unconditional, balanced, directions
        value, cotangents = settings.target.values(Point(*seen, settings.classifier, settings.on, model, call, part))
        two = len(cotangents) == 2  # c_2 = -c_1, so the second value and its relevance come for free
        wanted = list(cotangents[:1] if two else cotangents)
        if settings.off_axis:
            # Whatever is decomposed, it is the conditional prediction that is to stay where it is off the axis.
            off_axis = settings.off_axis * off_axis_cotangent(directions, rows, call.timestep)
            wanted.append(torch.cat([torch.zeros_like(off_axis), off_axis]) if both else off_axis)
        found = _decompose(watch, prediction, wanted, sites, roots if settings.rooted else None, settings)
        collateral = found.pop() if settings.off_axis else torch.zeros_like(found[0])
        relevance = torch.stack([found[0], -found[0]] if two else found)
        leans = lean(conditional, balanced, directions)
        if not (leans.any() or directions.any()):
            raise InputError(f"at timestep {call.timestep:g}, {NO_DIRECTION}")
        measured = Measured(call.timestep, leans, value, relevance, collateral, means)
        faults = _faults(measured, conditional, watch.activations, sites, len(rows))
    return conditional, unconditional, replace(measured, faults=faults)


def _decompose(
    watch: Watch,
    prediction: Tensor,
    cotangents: list[Tensor],
    sites: list[Site],
    roots: dict[str, Tensor] | None,
    settings: StepSettings,
) -> list[Tensor]:
    """Relevance (B, N) of each cotangent; with both halves in the prediction a neuron's is the sum over them."""
    halves = 2 if settings.target.halves else 1
    if roots is not None:
        roots = {name: root.repeat(halves, *[1] * (root.ndim - 1)) for name, root in roots.items()}
    found: list[Tensor] = []
    for i, cotangent in enumerate(cotangents, start=1):
        # The pass is linear in its cotangent: one of unit size neither over- nor underflows in half precision.
        size = cotangent.square().mean(1).sqrt()
        size = torch.where(size > 0, size, 1.0)[:, None]
        grads = watch.grads(prediction, (cotangent / size).to(prediction.dtype), retain=i < len(cotangents))
        relevance = settings.reduce(watch.activations, grads, sites, roots) * size
        found.append(relevance.unflatten(0, (halves, -1)).sum(0))
    return found


@torch.no_grad()
def _group_passes(
    model: Model,
    call: Call,
    groups: Sequence[Conditions],
    sites: list[Site],
    part: slice,
    alone: bool,
    rooted: bool,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Predictions (K, B, D), the one without prompt first if `alone`; position means (K, B, N); abar by layer.

    abar is the mean over the groups' passes; where their prompts differ in length, of their means over positions.
    """
    kept: dict[str, list[Tensor]] = {}
    with eagerly(), Watch(tree.inner(model.network), sites) as watch:

        def collect() -> None:
            for name, activation in watch.activations.items():
                kept.setdefault(name, []).append(activation)

        predictions = call.compare(groups, part, alone, collect)
    batch = (len(groups), predictions.shape[1])
    means, roots = [], dict[str, Tensor]()
    for layer, placed in by_layer(sites).items():
        calls = {key: _by_group(kept.pop(key), batch, alone) for key in calls_of(kept, layer)}
        for site, _ in placed:
            inputs = [[site.of(by_group[k]) for by_group in calls.values()] for k in range(len(groups))]
            means.append(torch.stack([_mean(of_group, site, predictions[0]) for of_group in inputs]))
        if rooted:
            roots |= {key: _root(by_group, placed[0][0]) for key, by_group in calls.items()}
    return predictions, torch.cat(means, 2), roots


def _by_group(passes: Sequence[Tensor], batch: tuple[int, int], alone: bool) -> Sequence[Tensor]:
    """K inputs (B, ...) of a layer, from one pass of all groups, or from one pass each."""
    if len(passes) == 1:
        both: Tensor = passes[0][-batch[0] * batch[1] :].unflatten(0, batch)
        return both.unbind(0)
    return passes[int(alone) :]


def _mean(calls: Sequence[Tensor], site: Site, like: Tensor) -> Tensor:
    """Mean over the positions of all calls of a layer in a pass: (B, C); zeros where it does not run."""
    if not calls:
        return torch.zeros(len(like), site.width, device=like.device)
    total = torch.stack([to_neurons(x, site.dim) for x in calls]).sum(0)
    return total / sum(x[0].numel() // site.width for x in calls)


def _root(groups: Sequence[Tensor], site: Site) -> Tensor:
    """abar of a layer's input: of its shape, or (B, 1, C) where the groups' prompts differ in length."""
    if len({x.shape for x in groups}) == 1:
        return torch.stack(list(groups)).mean(0, dtype=torch.promote_types(groups[0].dtype, torch.float32))
    means = [to_neurons(x, site.dim) * (x.shape[site.dim] / x[0].numel()) for x in groups]
    return torch.stack(means).mean(0).unsqueeze(1)


def _faults(
    measured: Measured, prediction: Tensor, activations: dict[str, Tensor], sites: list[Site], samples: int
) -> dict[int, str]:
    """Where each sample's values first cease to be finite: on the way forward, or else on the way back."""
    finite = prediction.isfinite().all(1)
    for value in (measured.lean, measured.value):
        finite = finite & value.isfinite().all(0)
    for value in (measured.relevance, measured.means, measured.collateral[None]):
        finite = finite & value.isfinite().all(2).all(0)
    if finite.all():
        return {}
    place: dict[str, slice] = {}
    for site, span in spans(sites):
        place[site.layer] = slice(place.get(site.layer, span).start, span.stop)
    order = list(activations)  # as the sites ran

    def where(row: int) -> str:
        for name in order:
            x, layer = activations[name].unflatten(0, (-1, samples))[:, row], name.partition("#")[0]
            if not (x.isfinite().all() and measured.means[:, row, place[layer]].isfinite().all()):
                return f"activations of {layer}"
        for name in reversed([name.partition("#")[0] for name in order]):
            back = measured.relevance[:, row, place[name]], measured.collateral[row, place[name]]
            if not all(part.isfinite().all() for part in back):
                return f"relevance of {name}"
        return "the prediction"

    return {row: where(row) for row in (~finite).nonzero().flatten().tolist()}
