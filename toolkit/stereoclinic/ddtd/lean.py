"""What is decomposed: the lean of a neutral prompt's prediction toward each group, or another target.

    fbar = mean_g f_g                        the balanced prediction
    d_g  = f_g - fbar                        group direction, held constant
    S_g  = <f - fbar, d_g> / <d_g, d_g>      the lean

The sum or the norm of a noise prediction is no target: its signs follow the noise. The lean's sign means something.

Predictions are flat, (B, D): a denoiser's raw output, whatever its shape.

A target turns one step into values (K, B) and cotangents (K, B, D) of the prediction; the relevance pass is then one
modified vector-Jacobian product for each group. To add a target, add a row to `TARGETS`.

    lean         S_g
    contrast     <f - fbar, d_g>                          weighs a step by how far the groups differ in it
    guidance     <f_c - f_u, d_g> / <d_g, d_g>            conditional minus unconditional: the lean that guidance adds
    classifier   logit_g - mean over groups               of the clean image that the prediction amounts to
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.pipelines.clean import clean_latents, decode_with_grad

if TYPE_CHECKING:
    from stereoclinic.pipelines.call import Call
    from stereoclinic.pipelines.model import Model
    from stereoclinic.prompts.sets import Row


NO_DIRECTION = (
    "the model predicts the same for every group's prompt, so the axis has no direction; check that its denoiser reads"
    " the text, and the words of the axis"
)

#: Images (B, 3, H, W) in [0, 1], or clean latents (B, C, h, w) -> logits (B, K), differentiable, one row a sample.
Classifier = Callable[[Tensor], Tensor]


def group_directions(predictions: Tensor) -> tuple[Tensor, Tensor]:
    """fbar (B, D) and d (K, B, D) of the groups' predictions (K, B, D).

    In float32 or wider, as the groups' predictions differ in late digits.
    """
    predictions = _wide(predictions)
    balanced = predictions.mean(0)
    return balanced, predictions - balanced


def lean(prediction: Tensor, balanced: Tensor, directions: Tensor) -> Tensor:
    """S_g of each sample: 0 is balanced, 1 is as if g had been asked for. Returns (K, B), in float32 or wider.

    Where d_g vanishes, as for a model that does not know the groups, the lean is 0. Of NaN it is NaN.
    """
    size = _wide(directions).square().sum(-1)
    overlap = contrast(prediction, balanced, directions)
    return torch.where(size == 0, 0.0, overlap / size.clamp_min(torch.finfo(size.dtype).tiny))


def check_told_apart(prediction: Tensor, directions: Tensor, rows: "Sequence[Row]", timestep: float) -> None:
    """Refuse predictions that are not finite or are the same for all groups.

    Args:
        prediction: (B, D), the neutral prompts'.
        directions: (K, B, D).
        rows: The samples; an error names the first that is refused.
        timestep: Of this step.
    """
    finite = prediction.isfinite().all(1) & directions.isfinite().all(2).all(0)
    good = finite & (_wide(directions).square().sum(2) > 0).any(0)
    if good.all():
        return
    place = int((~good).nonzero()[0])
    what = "predictions are not finite; try --dtype float32 or bfloat16, or another copy of the model"
    what = NO_DIRECTION if finite[place] else what
    raise InputError(f"at timestep {timestep:g} of {rows[place]['prompt']!r}, seed {rows[place]['seed']}, {what}")


def contrast(prediction: Tensor, balanced: Tensor, directions: Tensor) -> Tensor:
    """<f - fbar, d_g> of each sample: (K, B), in float32 or wider."""
    return (_wide(directions) * (_wide(prediction) - _wide(balanced))).sum(-1)


@dataclass(frozen=True)
class Point:
    """One step of a batch, as a target sees it: nothing requires grad. The last five are for the classifier."""

    conditional: Tensor  # (B, D), for the neutral prompts
    unconditional: Tensor | None  # (B, D), without prompt, if there is one
    balanced: Tensor  # (B, D)
    directions: Tensor  # (K, B, D)
    classifier: Classifier | None = None
    on: str = "pictures"  # or "latents"
    model: "Model | None" = None
    call: "Call | None" = None
    part: slice = field(default_factory=lambda: slice(None))  # of the call's samples


@dataclass(frozen=True)
class Target:
    """A named target: of a step, values (K, B) and cotangents (K, B, D).

    With `halves` the unconditional prediction is decomposed too, and a neuron's relevance is the sum. Cotangents are
    then (K, 2 B, D), those of the prediction without prompt first.
    """

    values: Callable[[Point], tuple[Tensor, Tensor]]
    halves: bool = False


def _guidance(point: Point) -> tuple[Tensor, Tensor]:
    """The conditional's lean minus the unconditional's (fbar cancels)."""
    assert point.unconditional is not None
    towards = unit(point.directions)
    return lean(point.conditional, point.unconditional, point.directions), torch.cat([-towards, towards], dim=1)


def _classifier(point: Point) -> tuple[Tensor, Tensor]:
    """Centred logits of the predicted clean image; their gradients at the prediction are the cotangents."""
    if point.classifier is None or point.model is None or point.call is None:
        raise InputError("target 'classifier' needs a classifier: pass one that gives a logit for each group")
    groups, batch = point.directions.shape[:2]
    with torch.enable_grad():
        prediction = _wide(point.conditional).detach().requires_grad_()
        seen = clean_latents(point.model, point.call, prediction, point.part)
        if point.on == "pictures":
            seen = decode_with_grad(point.model, seen).clamp(0, 1)
        logits = point.classifier(seen)
        if logits.shape != (batch, groups):
            raise InputError(
                f"the classifier gave logits of shape {tuple(logits.shape)} for {batch} samples; expected"
                f" {(batch, groups)}, one logit for each group in the axis' order"
            )
        if not logits.requires_grad:
            raise InputError("the classifier gave logits without a gradient; it must not run under torch.no_grad")
        centred = (_wide(logits) - _wide(logits).mean(1, keepdim=True)).T  # (K, B)
        # Centred logits add up to zero, so the last one's gradient is what the others leave.
        rows = [torch.autograd.grad(logit.sum(), prediction, retain_graph=True)[0] for logit in centred[:-1]]
    towards = _wide(torch.stack(rows))
    return centred.detach(), torch.cat([towards, -towards.sum(0, keepdim=True)])


TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        "lean": Target(lambda p: (lean(p.conditional, p.balanced, p.directions), unit(p.directions))),
        "contrast": Target(lambda p: (contrast(p.conditional, p.balanced, p.directions), p.directions)),
        "guidance": Target(_guidance, halves=True),
        "classifier": Target(_classifier),
    }
)


def get_target(name: str) -> Target:
    """The target of that name; refuses a name that is not known."""
    if name not in TARGETS:
        raise InputError(f"target {name!r} is not known; choose one of {', '.join(TARGETS)}")
    return TARGETS[name]


def off_axis(vectors: Tensor, directions: Tensor) -> Tensor:
    """Vectors (B, D) without their part in the span of the K directions (K, B, D): (B, D), in float32 or wider."""
    wide, axes = _wide(vectors), _wide(directions).transpose(0, 1)  # (B, D), (B, K, D)
    basis: Tensor = torch.linalg.qr(axes[:, :-1].transpose(1, 2)).Q  # (B, D, K - 1); directions sum to zero
    return wide - (basis @ (basis.transpose(1, 2) @ wide[..., None]))[..., 0]


def axis_size(directions: Tensor) -> Tensor:
    """||d||, the mean length of the group directions: (K, B, D) -> (B, 1)."""
    sizes: Tensor = _wide(directions).norm(dim=2)  # (K, B)
    return sizes.mean(0)[:, None]


def off_axis_cotangent(directions: Tensor, rows: "Sequence[Row]", timestep: float) -> Tensor:
    """A random cotangent (B, D) orthogonal to every group direction, in units of the group directions' size.

    For v of independent standard normals the mean of <v, x>^2 is ||x||^2, so a backward pass of v estimates how far
    damping moves the prediction off the axis, relative to ||d||. It depends on the samples' prompts and seeds and on
    the timestep alone. Directions are (K, B, D).
    """
    drawn = []
    for row in rows:
        key = f"off-axis\0{row['prompt']}\0{row['seed']}\0{timestep:.6g}"
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1)
        drawn.append(torch.randn(directions.shape[2], generator=generator, dtype=torch.float32))
    random, size = off_axis(torch.stack(drawn).to(directions), directions), axis_size(directions)
    return torch.where(size > 0, random / size.clamp_min(1e-12), 0.0).to(directions.dtype)


def unit(directions: Tensor) -> Tensor:
    """d_g / <d_g, d_g>, the gradient of the lean: (K, B, D); 0 where d_g vanishes."""
    size = directions.square().sum(-1, keepdim=True)
    return torch.where(size > 0, directions / size.clamp_min(torch.finfo(size.dtype).tiny), 0.0)


def _wide(x: Tensor) -> Tensor:
    """In float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
