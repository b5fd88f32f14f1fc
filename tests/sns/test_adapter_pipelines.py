"""A pipeline whose mask is loaded, as it is shared, copied, offloaded, saved, compiled or dropped."""

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch
from diffusers import AutoPipelineForText2Image, StableDiffusionImg2ImgPipeline
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from tests.sns.conftest import EDGES, GENDER, PROMPTS, beside, draw, hooks, random_mask

from stereoclinic.errors import InputError
from stereoclinic.pipelines.sites import find_sites
from stereoclinic.sns.adapter import (
    active_masks,
    allot_masks,
    disable_masks,
    enable_masks,
    load_mask,
    loaded_masks,
    set_masks,
    unload_mask,
)
from stereoclinic.sns.damp import suppress
from stereoclinic.sns.mask import NeuronMask


def test_image_to_image_pipelines_are_treated_through_the_unet_that_they_share(pipe, unet):
    other, mask = beside(pipe, kind=StableDiffusionImg2ImgPipeline), random_mask(unet, 1, branch="conditional")
    image = torch.rand(2, 3, 4 * pipe.vae_scale_factor, 4 * pipe.vae_scale_factor, dtype=torch.float64)
    before = draw(other, image=image, strength=1.0)
    with pytest.raises(InputError, match="starts from a given image; give the text-to-image model"):
        load_mask(other, mask)
    assert loaded_masks(pipe) == {}
    load_mask(AutoPipelineForText2Image.from_pipe(other), mask)
    treated = draw(other, image=image, strength=1.0)
    assert not torch.allclose(treated, before)
    assert list(loaded_masks(other)) == ["default"]
    unload_mask(other)
    assert torch.equal(draw(other, image=image, strength=1.0), before)


def test_of_pipelines_that_share_a_unet_the_one_that_was_named_last_says_whether_it_guides(pipe, unet):
    other, mask = beside(pipe), random_mask(unet, 1, branch="conditional")
    expected = {}
    for guidance in (1.0, 3.0):
        with suppress(pipe, mask):
            expected[guidance] = draw(pipe, guidance=guidance)
    load_mask(pipe, mask)
    assert torch.equal(draw(pipe, guidance=1.0), expected[1.0])
    enable_masks(other)
    for guidance in (3.0, 1.0, 3.0):
        assert torch.equal(draw(other, guidance=guidance), expected[guidance])


def test_pictures_of_the_same_noise_are_no_halves_of_a_guided_batch(pipe, unet):
    """Without guidance both of them are treated, and the same call again draws the same."""
    mask = random_mask(unet, 1, branch="conditional")

    def together(guidance: float) -> torch.Tensor:
        side, noise = 4 * pipe.vae_scale_factor, [torch.Generator().manual_seed(0) for _ in PROMPTS]
        options = {"num_inference_steps": 1, "guidance_scale": guidance, "output_type": "latent"}
        return pipe(PROMPTS, side, side, generator=noise, **options).images

    for guidance in (1.0, 3.0):
        with suppress(pipe, replace(mask, branch="both")):
            both = together(guidance)
        load_mask(pipe, mask)
        treated = together(guidance)
        assert torch.equal(together(guidance), treated)
        assert torch.equal(treated, both) == (guidance == 1.0)
        unload_mask(pipe)


def test_a_pipeline_that_is_offloaded_between_its_models_is_treated_alike(pipe, unet):
    mask = random_mask(unet, 1, groups=GENDER, branch="conditional")

    def treated(whole) -> torch.Tensor:
        load_mask(whole, mask)
        allot_masks(whole, ["female", None])
        return draw(whole)

    expected = treated(pipe)
    unload_mask(pipe)
    before = draw(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(treated(pipe), expected)
    unload_mask(pipe)
    assert torch.equal(draw(pipe), before)
    pipe.remove_all_hooks()


def test_a_copied_unet_or_pipeline_is_treated_by_itself(pipe, unet):
    mask = random_mask(unet, 1, groups=GENDER, branch="conditional", rooted=True)
    untreated = draw(pipe)
    load_mask(pipe, mask)
    allot_masks(pipe, ["female", None])
    treated = draw(pipe)

    alone = copy.deepcopy(unet)
    assert hooks(alone) == hooks(unet)
    assert list(alone.state_dict()) == list(unet.state_dict())
    twin = beside(pipe, alone)
    assert torch.equal(draw(twin), treated)  # what was learnt of the pipeline goes with it
    with torch.no_grad():
        alone.conv_in.weight.mul_(2)  # its hooks are on its own layers, and read its own activations
    assert torch.equal(draw(pipe), treated)
    moved = draw(twin)
    unload_mask(twin)
    assert hooks(alone) == 0
    assert not torch.allclose(draw(twin), moved)
    assert torch.equal(draw(pipe), treated)

    whole = copy.deepcopy(pipe)
    assert torch.equal(draw(whole), treated)
    whole_untreated = draw(whole, guidance=1.0)  # it asks itself: two rows, not four
    set_masks(whole, "default", 0.5)
    allot_masks(whole, [None, None])
    assert torch.equal(draw(whole), untreated)
    assert not torch.equal(draw(whole, guidance=1.0)[0], whole_untreated[0])
    assert active_masks(pipe) == {"default": 1.0}
    assert torch.equal(draw(pipe), treated)
    unload_mask(pipe)
    assert torch.equal(draw(pipe), untreated)
    assert active_masks(whole) == {"default": 0.5}


def test_a_bare_unet_does_not_say_who_is_asked(pipe, unet):
    """What was loaded through a pipeline goes on asking it."""
    load_mask(pipe, random_mask(unet, 1, groups=GENDER, branch="conditional"))
    allot_masks(pipe, ["female", None])
    expected = draw(pipe)
    set_masks(unet, "default")
    allot_masks(unet, ["female", None])
    disable_masks(unet)
    enable_masks(unet)
    assert torch.equal(draw(pipe), expected)


def test_a_mask_does_not_keep_its_pipeline_alive(pipe, unet):
    other = beside(pipe)
    load_mask(other, random_mask(unet, 1))
    gone = weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None
    assert active_masks(unet) == {"default": 1.0}
    unload_mask(unet)


def test_a_copied_unet_does_not_keep_the_original_alive(original):
    pipe = beside(original, copy.deepcopy(original.unet))
    load_mask(pipe, random_mask(pipe.unet, 1))
    twin = copy.deepcopy(pipe.unet)
    treated, gone = draw(pipe), weakref.ref(pipe.unet)
    del pipe
    gc.collect()
    assert gone() is None
    assert torch.equal(draw(beside(original, twin)), treated)


def test_a_treated_pipeline_saves_the_untreated_weights(pipe, unet, tmp_path):
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    untreated = draw(pipe)
    mask = random_mask(unet, 1)
    load_mask(pipe, mask)
    treated = draw(pipe)
    pipe.save_pretrained(tmp_path)
    mask.save_pretrained(tmp_path)  # beside its files
    opened = DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.float64)
    opened.set_progress_bar_config(disable=True)
    assert opened.unet.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in opened.unet.state_dict().items())
    assert torch.equal(draw(opened), untreated)
    load_mask(opened, tmp_path)
    assert torch.equal(draw(opened), treated)


def test_a_compiled_model_can_be_allotted_disabled_and_unloaded(pipe, unet):
    drawn = {}
    site = next(site for site in find_sites(unet) if site.name.startswith("mid_block") and site.kind == "conv")
    mask = NeuronMask([site], EDGES, torch.rand(2, 2, site.width), groups=GENDER)
    untreated = draw(pipe)
    load_mask(pipe, mask)
    for samples in ("female", ["male", None]):
        allot_masks(pipe, samples)
        drawn[str(samples)] = draw(pipe)
    torch._dynamo.reset()
    block = unet.get_submodule(site.name.removesuffix(".conv2"))
    block.compile(backend="eager")  # a part, as compile_repeated_blocks does
    for samples in ("female", ["male", None]):
        allot_masks(pipe, samples)
        assert torch.equal(draw(pipe), drawn[str(samples)])
    for change in (lambda: set_masks(pipe, "default", 0.5), lambda: load_mask(pipe, mask, "two")):
        with pytest.raises(InputError, match=r"mid_block.resnets.0 is compiled"):
            change()
    assert torch.equal(draw(pipe), drawn["['male', None]"])
    disable_masks(pipe)
    assert torch.equal(draw(pipe), untreated)
    enable_masks(pipe)
    assert torch.equal(draw(pipe), drawn["['male', None]"])
    unload_mask(pipe)
    assert torch.equal(draw(pipe), untreated)
