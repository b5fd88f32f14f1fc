"""The tables of tiny pipelines, how a function enters one, and the sizes that they share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline
from tests.pipelines.tiny_parts import TEXT_LENGTH


@dataclass(frozen=True)
class Tiny:
    """A tiny pipeline and how to call it.

    Attributes:
        name: Short name.
        make: Makes the pipeline; `build` then draws its weights.
        steps: Number of steps that suits it.
        guidance: Guidance scale at which the class's own guidance runs. None: do not pass `guidance_scale`.
        call: Further options of its call.
    """

    name: str
    make: Callable[[], DiffusionPipeline]
    steps: int
    guidance: float | None
    call: Mapping[str, Any]


TINY: dict[str, Tiny] = {}
REFUSED: dict[str, Tiny] = {}  # what is not one denoiser from texts to pictures

Make = Callable[[], DiffusionPipeline]


def tiny(
    name: str, guidance: float | None = 3.0, steps: int = 2, table: dict[str, Tiny] = TINY, **call: Any
) -> Callable[[Make], Make]:
    """Enter a function that makes a pipeline into a table."""

    def enter(make: Make) -> Make:
        table[name] = Tiny(name, make, steps, guidance, call)
        return make

    return enter


SMALL = {"height": 16, "width": 16}
EIGHTH = {"height": 64, "width": 64}  # for pipelines that divide by eight whatever their autoencoder does
TEXT = {"max_sequence_length": TEXT_LENGTH}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
ROPE = {"axes_dims_rope": (4, 6, 6)}
DOUBLE_AND_SINGLE = {"num_layers": 1, "num_single_layers": 1}
PACKED = {"in_channels": 16, **DOUBLE_AND_SINGLE, **HEADS, **ROPE}  # FLUX.1 and its kin: 2 x 2 latents are a token
