"""Drawing pictures by the pipeline's own call.

The clean picture that a prediction amounts to, for targets that look at it.
"""

import copy
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stereoclinic.errors import Incomplete, InputError
from stereoclinic.pipelines import arguments as tree
from stereoclinic.pipelines import schedulers
from stereoclinic.pipelines.call import Call
from stereoclinic.pipelines.memory import AdaptiveBatch
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.watch import Visit, Walk
from stereoclinic.prompts.sets import Row

#: Of all pictures: where more show nothing, none of them are judged.
MOST_BLANK = 0.01
_NAMED = 5  # of them, in a message


def as_tensor(output: Any) -> Tensor:
    """The PIL pictures in a pipeline's output as (B, 3, H, W) uint8."""
    images = output[0] if isinstance(output, tuple) else next(iter(output.values()))
    return torch.stack([torch.from_numpy(np.array(each.convert("RGB"))) for each in images]).permute(0, 3, 1, 2)


@torch.no_grad()
def draw(
    model: Model,
    rows: Sequence[Row],
    steps: int,
    guidance: float,
    prompts: Sequence[str] | None = None,
    prepare: Callable[[Walk], Visit] | None = None,
    portions: AdaptiveBatch | None = None,
    blank: Callable[[int], None] = lambda place: None,
) -> Tensor:
    """Draw one picture a row.

    Args:
        model: The pipeline.
        rows: Samples; each one's noise follows from its `prompt` and `seed`.
        steps: Of the scheduler.
        guidance: Scale.
        prompts: What each picture is conditioned on; the rows' own prompts by default.
        prepare: Gives what changes predictions on the way, see `Walk`; it may have the walk encode other prompts.
        portions: How many samples fit through the denoiser together.
        blank: Told the place of each picture that shows nothing: values are not finite, or it is of a single colour.

    Returns:
        (B, 3, H, W) uint8: pictures as they are saved.
    """
    walk = Walk(model, rows, steps, guidance, prompts, portions=portions)
    if prepare is not None:
        walk.visit = prepare(walk)
    with _decoded(model) as finite:
        pictures = as_tensor(walk.run("pil"))
    shown = ~of_one_colour(pictures)
    if finite:
        decoded = torch.cat(finite)
        shown &= decoded if len(decoded) == len(shown) else decoded.all()
    for place in (~shown).nonzero().flatten().tolist():
        blank(place)
    return pictures


def of_one_colour(pictures: Tensor) -> Tensor:
    """Which pictures (B, 3, H, W) uint8 have the same colour everywhere: (B,) bool."""
    flat = pictures.flatten(2)
    return (flat.amax(2) == flat.amin(2)).all(1)


def named(row: Row, arm: str) -> str:
    """A picture, as it is told to the user."""
    return f"{row['prompt']!r}, seed {row['seed']} ({arm})"


def check_blank(blank: Sequence[str], total: int, most: float = MOST_BLANK) -> str | None:
    """What to say of pictures that show nothing; None where there are none.

    Args:
        blank: They, each by prompt and seed.
        total: Number of all pictures.
        most: The largest share of them that is borne.

    Raises:
        Incomplete: They are more.
    """
    if not blank:
        return None
    more = f" and {len(blank) - _NAMED} more" if len(blank) > _NAMED else ""
    said = (
        f"{len(blank)} of {total} pictures show nothing (values that are not finite, or a single colour):"
        f" {'; '.join(blank[:_NAMED])}{more}"
    )
    if len(blank) > most * total:
        raise Incomplete(
            f"{said}; more than {most:.0%}, so none are judged. Try --dtype float32 or bfloat16, or another copy"
            " of the model"
        )
    return said


@contextmanager
def _decoded(model: Model) -> Iterator[list[Tensor]]:
    """See which pictures an autoencoder decodes to finite values, (n,) bool a call: at eight bits NaN is black."""
    found: list[Tensor] = []

    def watched(decode: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(decode)
        def decoded(*args: Any, **kwargs: Any) -> Any:
            output = decode(*args, **kwargs)
            found.append(tree.stacked(tree.sample_of(output)).detach().isfinite().flatten(1).all(1).cpu())
            return output

        return decoded

    with ExitStack() as undo:
        for part in model.pipe.components.values():
            decode: Any = getattr(part, "decode", None)
            if isinstance(part, nn.Module) and decode is not None:
                undo.callback(_restore, part, vars(part).get("decode"))
                part.__dict__["decode"] = watched(decode)
        yield found


def _restore(part: nn.Module, decode: Any) -> None:
    if decode is None:
        del part.__dict__["decode"]
    else:
        part.__dict__["decode"] = decode


#: Latent positions decoded together: four pictures of 512 x 512, one of 1024 x 1024.
POSITIONS = 4 * 64 * 64
#: Autoencoder -> the same in float32.
_WIDE: "weakref.WeakKeyDictionary[nn.Module, Any]" = weakref.WeakKeyDictionary()


def clean_latents(model: Model, call: Call, prediction: Tensor, part: slice = slice(None)) -> Tensor:
    """The clean latents (n, C, h, w) that predictions (n, D) amount to, differentiable in them.

    Raises:
        InputError: The pipeline packs its latents, changes the prediction before the scheduler gets it, or has a
            scheduler that does not say how clean latents follow.
    """
    latents, sign = call.latents(part), call.sign
    if not isinstance(latents, Tensor) or latents.ndim != 4 or latents[0].numel() != prediction.shape[1] or not sign:
        raise InputError(
            f"target classifier: {type(model.pipe).__name__} packs its latents, so the picture that a prediction"
            " amounts to cannot be had; use another target"
        )
    timestep = torch.tensor(call.timestep)
    return schedulers.clean(model.pipe.scheduler, sign * prediction.view(latents.shape), timestep, latents)


def decode_with_grad(model: Model, latents: Tensor) -> Tensor:
    """Pictures (B, 3, H, W), about [0, 1] but not clamped, differentiable in the latents.

    A few are decoded at a time, and decoded again in the backward pass, so that memory does not grow with the batch.

    Raises:
        InputError: The autoencoder does not say how its latents are scaled.
    """
    vae = _in_range(model.pipe.vae)
    config = vae.config
    if config.get("scaling_factor") is None:
        raise InputError(f"target classifier: the {type(vae).__name__} of this model names no scaling_factor")

    def decode(part: Tensor) -> Tensor:
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is not None and std is not None:
            mean, std = (torch.tensor(each).view(1, -1, 1, 1).to(part) for each in (mean, std))
            part = part * std / config.scaling_factor + mean
        else:
            part = part / config.scaling_factor + (config.get("shift_factor") or 0.0)
        pictures: Tensor = vae.decode(part, return_dict=False)[0]
        return pictures.float() / 2 + 0.5

    parts = latents.to(vae.dtype).split(max(1, POSITIONS // (latents.shape[-2] * latents.shape[-1])))
    if not (torch.is_grad_enabled() and latents.requires_grad):
        return torch.cat([decode(part) for part in parts])
    return torch.cat([checkpoint(decode, part, use_reentrant=False) for part in parts])


def _in_range(vae: Any) -> Any:
    """The autoencoder, or its copy in float32 where it overflows in half precision, as its pipeline upcasts it."""
    if vae.dtype != torch.float16 or not vae.config.get("force_upcast"):
        return vae
    if vae not in _WIDE:
        _WIDE[vae] = copy.deepcopy(vae).float()
    return _WIDE[vae].to(vae.device)
