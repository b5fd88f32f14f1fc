"""Drawing images by the pipeline's own call."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stereoclinic.errors import Incomplete
from stereoclinic.pipelines import arguments as tree
from stereoclinic.pipelines.memory import AdaptiveBatch
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.watch import Visit, Walk
from stereoclinic.prompts.sets import Row

#: Share of pictures that may show nothing; with more, none are judged.
MOST_BLANK = 0.01
_NAMED = 5  # of them, in a message


def as_tensor(output: Any) -> Tensor:
    """The PIL images in a pipeline's output as (B, 3, H, W) uint8."""
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
    """Draw one image per row.

    Args:
        model: The pipeline.
        rows: Samples; each one's noise follows from its `prompt` and `seed`.
        steps: Of the scheduler.
        guidance: Scale.
        prompts: What each image is conditioned on; the rows' own prompts by default.
        prepare: Returns the visitor of the walk; it may have the walk encode other prompts.
        portions: How many samples fit through the denoiser together.
        blank: Called with the place of each image that shows nothing: values are not finite, or one single colour.

    Returns:
        (B, 3, H, W) uint8: images as they are saved.
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
    """Which images (B, 3, H, W) uint8 have the same colour everywhere: (B,) bool."""
    flat = pictures.flatten(2)
    return (flat.amax(2) == flat.amin(2)).all(1)


def named(row: Row, arm: str) -> str:
    """The name of an image in messages."""
    return f"{row['prompt']!r}, seed {row['seed']} ({arm})"


def check_blank(blank: Sequence[str], total: int, most: float = MOST_BLANK) -> str | None:
    """A warning about images that show nothing; None where there are none.

    Args:
        blank: Their names.
        total: Number of all images.
        most: The largest share that is accepted.

    Raises:
        Incomplete: There are more.
    """
    if not blank:
        return None
    more = f" and {len(blank) - _NAMED} more" if len(blank) > _NAMED else ""
    said = (
        f"{len(blank)} of {total} images show nothing (values that are not finite, or a single colour):"
        f" {'; '.join(blank[:_NAMED])}{more}"
    )
    if len(blank) > most * total:
        raise Incomplete(
            f"{said}; that is more than {most:.0%}, so no images are judged. Try --dtype float32 or bfloat16, or"
            " another copy of the model"
        )
    return said


@contextmanager
def _decoded(model: Model) -> Iterator[list[Tensor]]:
    """Records which images the autoencoder decodes to finite values, (n,) bool per call: as PNG, NaN would be black."""
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
