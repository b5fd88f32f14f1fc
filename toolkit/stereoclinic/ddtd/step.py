"""DDTD at one step of a batch: one pass without gradient, one under relevance, a backward pass a target.

[no prompt, groups] --one pass, no gradient--> f_u, fbar, d_g, abar
neutral prompts     --one pass, watched------> f, the lean, the target's values and cotangents
                    --backward---------------> R_j = (a_j - abar_j) g_j, and an off-axis row

Predictions are flat, (B, D): the denoiser's raw output.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from stereoclinic.ddtd.lean import Classifier, Point, Target, group_directions, lean, off_axis_cotangent
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


#: Activations, gradients, sites and roots -> rows (B, N): `neuron_relevance`, or something that appends to its rows.
Reduce = Callable[
    [Mapping[str, Tensor], Mapping[str, Tensor | None], Sequence[Site], Mapping[str, Tensor] | None], Tensor
]


@dataclass(frozen=True)
class How:
    """What is decomposed, and how, at a step. `off_axis` is what the off-axis row counts; at 0 it is left at 0."""

    propagation: Propagation
    rooted: bool
    target: Target
    classifier: Classifier | None = None
    on: str = "pictures"
    off_axis: float = 1.0
    reduce: Reduce = neuron_relevance


def measure(
    model: Model,
    call: Call,
    groups: Sequence[Conditions],
    sites: list[Site],
    rows: Sequence[Row],
    how: How,
    part: slice = slice(None),
) -> tuple[Tensor, Tensor | None, Measured]:
    """Measure some samples at one of a pipeline's steps.

    Args:
        model: The pipeline.
        call: Its denoiser's call.
        groups: Conditions of the K groups' prompts.
        sites: What is watched.
        rows: All samples of the call.
        how: What is decomposed.
        part: Which of the samples.

    Returns:
        The predictions (n, D) for the neutral prompts and without prompt (None where that was not made on the way), and
        what was measured.

    Raises:
        InputError: The model predicts the same for all groups' prompts, or the target needs what the pipeline lacks.
    """
    network, rows = tree.inner(model.network), list(rows)[part]
    halves = 2 if how.target.halves else 1
    apart = call.guided and halves == 1  # what no prompt sees travels with the groups
    predictions, means, roots = _group_passes(model, call, groups, sites, part, apart, how.rooted)
    unconditional = predictions[0] if apart else None
    balanced, directions = group_directions(predictions[int(apart) :])

    with torch.enable_grad(), with_gradients(network), Watch(network, sites) as watch:
        with how.propagation:
            if halves == 2:
                prediction = call.both(part)
                unconditional = prediction[: len(rows)].detach()
            else:
                prediction = call.predict(part=part)
        conditional = prediction[-len(rows) :].detach()
        point = Point(conditional, unconditional, balanced, directions, how.classifier, how.on, model, call, part)
        value, cotangents = how.target.values(point)
        at = {name: root.repeat(halves, *[1] * (root.ndim - 1)) for name, root in roots.items()} if how.rooted else None

        def decompose(cotangent: Tensor, last: bool) -> Tensor:
            # The pass is linear in its cotangent: one of unit size neither over- nor underflows in half precision.
            size = cotangent.square().mean(1).sqrt()
            whole = torch.where(size > 0, size, 1.0)
            unit = (cotangent / whole[:, None]).to(prediction.dtype)
            grads = watch.grads(prediction, unit, retain=not last)
            relevance = how.reduce(watch.activations, grads, sites, at) * whole[:, None]
            summed: Tensor = relevance.unflatten(0, (halves, -1)).sum(0)  # (B, N)
            return summed

        two = len(cotangents) == 2  # c_2 = -c_1, so the second value and its relevance come for free
        wanted = list(cotangents[:1] if two else cotangents)
        if how.off_axis:
            # Whatever is decomposed, it is the conditional prediction that is to stay where it is off the axis.
            off_axis = how.off_axis * off_axis_cotangent(directions, rows, call.timestep)
            wanted.append(torch.cat([torch.zeros_like(off_axis)] * (halves - 1) + [off_axis]))
        found = [decompose(each, last=i == len(wanted)) for i, each in enumerate(wanted, start=1)]
        collateral = found.pop() if how.off_axis else torch.zeros_like(found[0])
        relevance = torch.stack([found[0], -found[0]] if two else found)
        leans = lean(conditional, balanced, directions)
        if not (leans.any() or directions.any()):
            raise InputError(
                f"the model predicts the same for every group's prompt at timestep {call.timestep:g}, so the axis has"
                " no direction; check that its denoiser reads the text, and the words of the axis"
            )
        measured = Measured(call.timestep, leans, value, relevance, collateral, means)
        faults = _faults(measured, conditional, watch.activations, sites, len(rows))
    return conditional, unconditional, replace(measured, faults=faults)


@torch.no_grad()
def _group_passes(
    model: Model,
    call: Call,
    groups: Sequence[Conditions],
    sites: list[Site],
    part: slice,
    apart: bool,
    rooted: bool,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Predictions (K, B, D), the one without prompt first if `apart`; position means (K, B, N); abar by layer.

    abar is the mean over the groups' passes, or where their prompts have other lengths, of their means over positions.
    """
    kept: dict[str, list[Tensor]] = {}
    with eagerly(), Watch(tree.inner(model.network), sites) as watch:

        def collect() -> None:
            for name, activation in watch.activations.items():
                kept.setdefault(name, []).append(activation)

        predictions = call.compare(groups, part, apart, collect)
    batch = (len(groups), predictions.shape[1])
    means, roots = [], dict[str, Tensor]()
    for layer, here in by_layer(sites).items():
        calls = {key: _by_group(kept.pop(key), batch, apart) for key in calls_of(kept, layer)}
        for site, _ in here:
            every = [[site.of(own[k]) for own in calls.values()] for k in range(len(groups))]
            means.append(torch.stack([_mean(each, site, predictions[0]) for each in every]))
        if rooted:
            roots |= {key: _root(own, here[0][0]) for key, own in calls.items()}
    return predictions, torch.cat(means, 2), roots


def _by_group(passes: Sequence[Tensor], batch: tuple[int, int], apart: bool) -> Sequence[Tensor]:
    """K inputs (B, ...) of a layer, from one pass of all groups, or from one pass each."""
    if len(passes) == 1:
        both: Tensor = passes[0][-batch[0] * batch[1] :].unflatten(0, batch)
        return both.unbind(0)
    return passes[int(apart) :]


def _mean(calls: Sequence[Tensor], site: Site, like: Tensor) -> Tensor:
    """Mean over the positions of all calls of a layer in a pass: (B, C); zeros where it does not run."""
    if not calls:
        return torch.zeros(len(like), site.width, device=like.device)
    total = torch.stack([to_neurons(each, site.dim) for each in calls]).sum(0)
    return total / sum(each[0].numel() // site.width for each in calls)


def _root(groups: Sequence[Tensor], site: Site) -> Tensor:
    """abar of a layer's input: of its shape, or (B, 1, C) where the groups' prompts have other lengths."""
    wide = torch.promote_types(groups[0].dtype, torch.float32)
    if len({each.shape for each in groups}) == 1:
        return torch.stack(list(groups)).mean(0, dtype=wide)
    means = [to_neurons(each, site.dim) * (each.shape[site.dim] / each[0].numel()) for each in groups]
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
            own, layer = activations[name].unflatten(0, (-1, samples))[:, row], name.partition("#")[0]
            if not (own.isfinite().all() and measured.means[:, row, place[layer]].isfinite().all()):
                return f"activations of {layer}"
        for name in reversed([name.partition("#")[0] for name in order]):
            back = measured.relevance[:, row, place[name]], measured.collateral[row, place[name]]
            if not all(part.isfinite().all() for part in back):
                return f"relevance of {name}"
        return "the prediction"

    return {row: where(row) for row in (~finite).nonzero().flatten().tolist()}
