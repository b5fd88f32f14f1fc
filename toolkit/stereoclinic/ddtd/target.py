"""What is decomposed: the lean of a neutral prompt's prediction toward each group.

    fbar = mean_g f_g                        the balanced prediction
    d_g  = f_g - fbar                        group direction, held constant
    S_g  = <f - fbar, d_g> / <d_g, d_g>      the lean

The sum or the norm of a noise prediction is no target: its signs follow the noise. The lean's sign means something.
"""

import hashlib

import torch
from torch import Tensor


def group_directions(predictions: Tensor) -> tuple[Tensor, Tensor]:
    """Balanced prediction and group directions.

    Args:
        predictions: (K, B, C, h, w), one pass for each group's prompt.

    Returns:
        fbar (B, C, h, w) and d (K, B, C, h, w), in float32 or wider: the groups' predictions differ in late digits.
    """
    predictions = predictions.to(torch.promote_types(predictions.dtype, torch.float32))
    balanced = predictions.mean(0)
    return balanced, predictions - balanced


def lean(prediction: Tensor, balanced: Tensor, directions: Tensor) -> Tensor:
    """S_g of each sample: 0 is balanced, 1 is as if g had been asked for. Returns (K, B), in float32 or wider.

    A model that does not know the groups apart has no lean: where d_g vanishes the lean is 0.
    """
    wide = torch.promote_types(prediction.dtype, torch.float32)
    tilt = (prediction - balanced).to(wide).flatten(1)  # (B, D)
    towards = directions.to(wide).flatten(2)  # (K, B, D)
    size = towards.square().sum(-1)
    overlap = (towards * tilt).sum(-1)
    return torch.where(size > 0, overlap / size.clamp_min(torch.finfo(wide).tiny), 0.0)


def off_axis_cotangent(directions: Tensor, rows: list[dict], timestep: float) -> Tensor:
    """A random cotangent orthogonal to every group direction, in units of the group directions' size.

    For v of independent standard normals the mean of <v, x>^2 is ||x||^2, so a backward pass of v estimates how far
    damping moves the prediction off the axis, relative to ||d||. It depends on the sample and timestep alone.

    Args:
        directions: (K, B, C, h, w).
        rows: The samples' `prompt` and `seed`.
        timestep: Of this step.

    Returns:
        (B, C, h, w).
    """
    drawn = []
    for row in rows:
        key = f"off-axis\0{row['prompt']}\0{row['seed']}\0{timestep:.6g}".encode()
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1)
        drawn.append(torch.randn(directions.shape[2:], generator=generator, dtype=torch.float32))
    random = torch.stack(drawn).to(directions)
    flat, axes = random.flatten(1), directions.flatten(2).transpose(0, 1)  # (B, D), (B, K, D)
    # The K directions sum to zero, so only K - 1 of them span the axis.
    basis, _ = torch.linalg.qr(axes[:, :-1].transpose(1, 2).float())  # (B, D, K - 1)
    flat = flat - (basis @ (basis.transpose(1, 2) @ flat.float()[..., None]))[..., 0]
    size = axes.float().norm(dim=2).mean(1, keepdim=True)  # (B, 1)
    return torch.where(size > 0, flat / size.clamp_min(1e-12), 0.0).view_as(random)
