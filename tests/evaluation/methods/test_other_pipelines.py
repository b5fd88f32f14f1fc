"""Baselines of other pipelines than Stable Diffusion's, and what they say such a pipeline lacks."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tests.evaluation.methods.conftest import AXIS, SMALL, draw, untreated
from tests.pipelines.tiny import TINY, build

from stereoclinic.errors import InputError
from stereoclinic.evaluation.methods import (
    baseline_class,
)
from stereoclinic.io.digest import weights_digest
from stereoclinic.pipelines.model import Model


@pytest.fixture(scope="module")
def tiny_model() -> Callable[[str], Model]:
    made: dict[str, Model] = {}

    def make(name: str) -> Model:
        if name not in made:
            made[name] = Model(build(name), name, call=dict(TINY[name].call))
        return made[name]

    return make


@pytest.mark.parametrize(
    ("kind", "name"),
    [("pixart-sigma", name) for name in ("conceptprune", "uce", "equisteer", "icm")]
    + [("sdxl", name) for name in ("uce", "h-space")]  # told sizes and pooled text beside the states
    + [("flux2-klein", "conceptprune"), ("flux", "conceptprune")],  # guides in two calls; has layers that kinds share
)
def test_baselines_of_other_pipelines(tiny_model, calibration, kind: str, name: str):
    model, guidance = tiny_model(kind), TINY[kind].guidance
    prompts = [f"a photo of a {person}" for person in ("doctor", "nurse")]
    samples = [{"prompt": p, "pattern": "a photo of {person}", "article": "a", "person": p.split()[-1], "seed": seed}
               for seed in (7, 8, 9) for p in prompts]  # fmt: skip
    rows = samples[:2]
    how = replace(calibration, guidance=guidance)
    digest, before = weights_digest(model.network), untreated(model, rows, guidance)
    made = baseline_class(name).fit(model, AXIS, samples, how, settings=SMALL.get(name))
    if name == "conceptprune":
        made.over = {prompts[0]: 0}
    elif name == "equisteer":
        made.thresholds = torch.full_like(made.thresholds, 1e9)  # the gate is open
    inside = draw(model, made, rows, guidance)
    assert inside.isfinite().all() and not torch.equal(inside[0], before[0])
    assert torch.equal(inside[1], before[1]) == (name == "conceptprune")
    assert torch.equal(untreated(model, rows, guidance), before) and weights_digest(model.network) == digest
    scale = before.abs().max()
    alone = torch.cat([draw(model, made, [row], guidance) for row in rows])
    for other in (alone, draw(model, made, rows, guidance, most=1)):
        assert torch.allclose(inside, other, atol=1e-4 * scale)


@pytest.mark.parametrize(
    ("kind", "name", "says"),
    [
        ("flux", "h-space", "h-space: this FluxTransformer2DModel has no mid_block to add a vector at"),
        (
            "flux",
            "uce",
            "UCE needs separate cross-attention, which this FluxTransformer2DModel .* ends in attn2",
        ),
        ("flux", "equisteer", "EquiSteer needs separate cross-attention"),
        (
            "flux",
            "icm",
            "ICM needs separate self-attention, which this FluxTransformer2DModel .* ends in attn1",
        ),
        (
            "sd3",
            "equisteer",
            "EquiSteer needs separate cross-attention",
        ),  # its attn2 is not that
        ("sana", "conceptprune", "ConceptPrune: no feed-forward block of this SanaTransformer2DModel ends in a linear"),
        ("kandinsky3", "h-space", "h-space: this Kandinsky3UNet has no mid_block"),
        ("cogview4", "icm", r"ICM: .*\.attn1 has no row for each of the"),  # of text and image together
        ("lumina", "icm", r"ICM: .*\.attn1 gives .*; expected rows, positions and channels"),
        ("lumina", "uce", "UCE: the blocks of this LuminaNextDiT2DModel read different text states"),
    ],
)
def test_baselines_say_what_a_pipeline_lacks(tiny_model, samples, calibration, kind: str, name: str, says: str):
    how = replace(calibration, guidance=TINY[kind].guidance)
    with pytest.raises(InputError, match=says):
        baseline_class(name).fit(tiny_model(kind), AXIS, samples, how)
