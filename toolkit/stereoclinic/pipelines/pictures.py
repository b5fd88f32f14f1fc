"""Drawing pictures by the pipeline's own call."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stereoclinic.pipelines.memory import Portions
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.watch import Visit, Walk
from stereoclinic.prompts import Row


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
    portions: Portions | None = None,
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

    Returns:
        (B, 3, H, W) uint8: pictures as they are saved.
    """
    walk = Walk(model, rows, steps, guidance, prompts, portions=portions)
    if prepare is not None:
        walk.visit = prepare(walk)
    return as_tensor(walk.run("pil"))
