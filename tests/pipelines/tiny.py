"""Tiny random pipelines of the text-to-image classes of diffusers, made from configurations; nothing is fetched.

    pipe = build("flux")
    pipe(prompt=["a photo of a doctor"], num_inference_steps=TINY["flux"].steps, **TINY["flux"].call)

Each has the features of the published model: norms of queries and keys, gates, modulation by pooled text, refiners.
Where a comment says nothing else, its call takes a list of prompts, a generator for each, and `output_type="latent"`.

Left out, because they need a package that the tests do not install: OmniGen (torchvision), PRX (ftfy), Kolors
(sentencepiece) and Cosmos 2 (cosmos_guardrail). GLM-Image is left out because it is two models.
"""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline

# Each enters its pipelines into the tables.
from tests.pipelines import tiny_language, tiny_refused, tiny_t5, tiny_unets, tiny_vision_language  # noqa: F401
from tests.pipelines.tiny_parts import draw
from tests.pipelines.tiny_table import REFUSED, TINY


def build(name: str) -> DiffusionPipeline:
    """Make a pipeline, always with the same weights, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = (TINY | REFUSED)[name].make()
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                draw(part.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save(name: str, folder: Path | str) -> Path:
    """Write a pipeline, so that `DiffusionPipeline.from_pretrained(folder)` opens it."""
    build(name).save_pretrained(folder)
    return Path(folder)
