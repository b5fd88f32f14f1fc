"""Models of few steps: guidance off or embedded, steps that the scheduler allows, bins that follow what there is."""

from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, EulerAncestralDiscreteScheduler
from tests.ddtd.conftest import AXIS, measured, rows
from tests.pipelines.test_recognise import recognised, same, watched
from tests.pipelines.tiny import TINY, build

from stereoclinic.ddtd.trajectory import Settings, bin_of
from stereoclinic.errors import InputError
from stereoclinic.io.digest import shapes_digest, weights_digest
from stereoclinic.pipelines.images import as_tensor, draw
from stereoclinic.pipelines.learn import learnt_of
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.schedule import schedule_of
from stereoclinic.pipelines.sites import find_sites
from stereoclinic.prompts.sets import generator
from stereoclinic.sns.compat import has_other_weights
from stereoclinic.sns.damp import suppress
from stereoclinic.sns.mask import NeuronMask

ROWS = rows(2, 1)


def turbo() -> DiffusionPipeline:
    """As SDXL-Turbo is published: its scheduler starts from the noisiest timestep, and draws noise at each step."""
    pipe = build("sdxl")
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    return pipe


def model_of(name: str) -> Model:
    pipe, options = (turbo(), TINY["sdxl"].call) if name == "turbo" else (build(name), TINY[name].call)
    return Model(pipe, name, call=dict(options))


#: Name, steps, guidance, and whether the scale is an argument of the denoiser.
FEW = [
    ("turbo", 1, 0.0, False),
    ("turbo", 4, 0.0, False),
    ("lcm", 4, 8.0, True),
    ("sana-sprint", 2, 4.5, True),
    ("flux-schnell", 4, 0.0, False),
    ("flux2-klein-kv", 3, 1.0, False),
]


@pytest.mark.parametrize(("name", "steps", "guidance", "embedded"), FEW)
def test_a_watched_call_is_the_pipeline_s_own_and_a_plain_one_is_recognised(
    name: str, steps: int, guidance: float, embedded: bool
) -> None:
    model = model_of(name)
    scale: dict[str, Any] = {k: v for k, v in model.options(guidance).items() if k == "guidance_scale"}
    plain = model.pipe(
        prompt=[row["prompt"] for row in ROWS],
        generator=[generator(row, "noise") for row in ROWS],
        num_inference_steps=steps,
        **{**model.call, **scale},
    )
    assert torch.equal(draw(model, ROWS, steps, guidance), as_tensor(plain))
    assert not learnt_of(model, guidance).guides
    same(recognised(model, ROWS, steps, **scale), watched(model, ROWS, steps, guidance))
    if embedded:
        assert not torch.equal(draw(model, ROWS, steps, guidance), draw(model, ROWS, steps, 2 * guidance))


@pytest.mark.parametrize(("name", "steps", "guidance", "embedded"), FEW)
def test_bins_follow_the_steps_that_there_are(name: str, steps: int, guidance: float, embedded: bool) -> None:
    model = model_of(name)
    settings = Settings(steps=steps, guidance=guidance, bins=20, composite="gradient")
    timesteps = settings.timesteps(model)
    assert timesteps.tolist() == list(schedule_of(model, steps, guidance).timesteps)
    edges = settings.edges(timesteps, model.training_steps)
    assert [bin_of(t, edges) for t in timesteps.tolist()] == list(range(steps)) and len(edges) == steps + 1
    found = measured(model, find_sites(model.network)[:2], AXIS, ROWS, settings)
    assert [each.timestep for each in found] == timesteps.tolist()
    assert all(each.lean.abs().max() > 0 and each.relevance.abs().max() > 0 for each in found)


def test_steps_that_the_pipeline_does_not_allow_are_refused_in_its_words() -> None:
    """SANA-Sprint's intermediate timestep goes with two steps alone."""
    with pytest.raises(InputError, match=r"SanaSprintPipeline refuses its call \(3 steps\): Intermediate timesteps"):
        schedule_of(model_of("sana-sprint"), 3, 4.5)


def test_a_target_that_needs_guidance_is_refused() -> None:
    model = model_of("lcm")
    settings = Settings(steps=2, guidance=8.0, bins=1, target="guidance")
    with pytest.raises(InputError, match="makes no prediction without prompt at this guidance scale"):
        measured(model, find_sites(model.network), AXIS, ROWS, settings)


@pytest.mark.parametrize(("sibling", "full"), [("flux-schnell", "flux"), ("lcm", "sd1")])
def test_a_mask_of_a_few_step_sibling_is_used_on_the_full_model_with_force(sibling: str, full: str) -> None:
    """It has a layer less, or more, than the full model; the sites are the same."""
    made_for, model = model_of(sibling), model_of(full)
    sites = find_sites(made_for.network)
    factors = torch.full((1, sum(site.width for site in sites)), 0.1)
    digests = {"unet_shapes": shapes_digest(made_for.network), "unet_weights": weights_digest(made_for.network)}
    mask = NeuronMask(sites, torch.tensor([1e6, -1e6]), factors, metadata=digests)
    with pytest.raises(InputError, match="other shapes"), suppress(model, mask):
        pass
    before = draw(model, ROWS, 2, 3.0)
    with suppress(model, mask, force=True):
        damped = draw(model, ROWS, 2, 3.0)
    assert has_other_weights(mask, model.network) and not torch.equal(damped, before)
