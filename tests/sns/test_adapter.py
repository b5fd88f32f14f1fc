"""Masks as adapters: loaded then unloaded is nothing, and a pipeline treats each image as it was allotted."""

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch
from diffusers import AutoPipelineForText2Image, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from stereoclinic.errors import InputError
from stereoclinic.io.digest import shapes_digest, weights_digest
from stereoclinic.pipelines.learn import learnt_of
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.sites import Site, find_sites
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
from stereoclinic.sns.compose import compose
from stereoclinic.sns.damp import suppress
from stereoclinic.sns.fuse import fuse, unfuse
from stereoclinic.sns.mask import NeuronMask

EDGES = torch.tensor([1000.0, 600.0, 0.0])
GENDER, AGE = ("female", "male"), ("old", "young")
PROMPTS = ["a photo of a doctor", "a photo of a nurse"]


def beside(pipe, unet=None, kind=StableDiffusionPipeline):
    """Another pipeline of the same parts."""
    made = kind(**{**pipe.components, "unet": unet or pipe.unet}, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def pipe(original):
    return beside(original, copy.deepcopy(original.unet))


@pytest.fixture
def unet(pipe):
    return pipe.unet


def draw(pipe, prompts=PROMPTS, guidance=3.0, images=1, **options):
    """Latents (prompts x images, C, h, w), each from noise of its own place in the batch."""
    if "image" not in options:
        side = 4 * pipe.vae_scale_factor
        options |= {"height": side, "width": side}
    return pipe(
        prompts,
        num_inference_steps=2,
        guidance_scale=guidance,
        num_images_per_prompt=images,
        output_type="latent",
        generator=[torch.Generator().manual_seed(i) for i in range(images * len(prompts))],
        **options,
    ).images


def make(unet, seed=0, rooted=False, groups=(), **changes):
    g = torch.Generator().manual_seed(seed)
    sites = find_sites(unet)
    shape = (2, sum(site.width for site in sites))
    if groups:
        shape = (len(groups), *shape)
    factors = torch.where(torch.rand(shape, generator=g) < 0.4, torch.rand(shape, generator=g), 1.0)
    roots = torch.randn(shape, generator=g) if rooted else None
    fields = {"sites": sites, "bin_edges": EDGES, "factors": factors, "roots": roots, "groups": groups}
    return NeuronMask(**{**fields, **changes})


def hooks(unet):
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in unet.modules())


@settings(max_examples=8)
@given(st.lists(st.sampled_from(["load", "unload", "set", "disable", "enable", "draw"]), max_size=8), st.randoms())
def test_whatever_was_done_unloading_leaves_the_model_as_it_was(original, what, random):
    unet = original.unet
    learnt_of(Model(original), 7.5)  # what is known of a pipeline stays
    before, state, count, attributes = draw(original), weights_digest(unet), hooks(unet), set(vars(unet))
    keys = list(unet.state_dict())
    for i, step in enumerate(what):
        names = list(loaded_masks(original))
        if step == "load":
            load_mask(original, make(unet, i, rooted=random.random() < 0.5), f"m{i}", random.random())
        elif names and step == "unload":
            unload_mask(original, random.choice(names))
        elif names and step == "set":
            set_masks(original, random.sample(names, random.randint(1, len(names))), random.random())
        elif names and step in ("disable", "enable"):
            (disable_masks if step == "disable" else enable_masks)(original)
        elif step == "draw":
            draw(original)
        assert list(unet.state_dict()) == keys
        assert weights_digest(unet) == state
    if loaded_masks(original):
        unload_mask(original)
    assert torch.equal(draw(original), before)
    assert hooks(unet) == count
    assert set(vars(unet)) == attributes
    assert loaded_masks(original) == {} and active_masks(original) == {}


@pytest.mark.parametrize("rooted", [False, True])
def test_active_masks_act_as_their_composition_through_one_hook_a_site(pipe, unet, rooted):
    one, two = make(unet, 1, rooted), make(unet, 2, rooted)
    count = hooks(unet)
    with suppress(pipe, compose([one, two], [0.5, 1.0])):
        expected = draw(pipe)
    load_mask(pipe, one, "one", 0.5)
    load_mask(pipe, two, "two")
    assert torch.equal(draw(pipe), expected)
    assert hooks(unet) == count + 1 + len(one.sites)  # and where a pass begins
    assert list(loaded_masks(pipe)) == ["one", "two"]
    assert active_masks(pipe) == {"one": 0.5, "two": 1.0}

    for names, strengths, expected in (
        ("two", None, {"two": 1.0}),
        (["one"], None, {"one": 0.5}),
        (["two", "one"], [0.3, 0.2], {"two": 0.3, "one": 0.2}),
        (["one", "two"], 0.7, {"one": 0.7, "two": 0.7}),
    ):
        set_masks(pipe, names, strengths)
        assert active_masks(pipe) == expected
        drawn = draw(pipe)
        other = beside(pipe, copy.deepcopy(unet))
        unload_mask(other)
        masks = [{"one": one, "two": two}[name] for name in expected]
        with suppress(other, compose(masks, list(expected.values()))):
            assert torch.equal(draw(other), drawn)


def test_disabled_masks_do_nothing_and_come_back(pipe, unet):
    before = draw(pipe)
    load_mask(pipe, make(unet, 1), "one")
    treated = draw(pipe)
    disable_masks(pipe)
    assert active_masks(pipe) == {}
    assert torch.equal(draw(pipe), before)
    load_mask(pipe, make(unet, 2), "two")  # it stays off
    assert torch.equal(draw(pipe), before)
    set_masks(pipe, "one")
    assert torch.equal(draw(pipe), before)
    enable_masks(pipe)
    assert active_masks(pipe) == {"one": 1.0}
    assert torch.equal(draw(pipe), treated)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("images", [1, 2])
def test_each_image_gets_its_groups_with_guidance_or_without(pipe, unet, guidance, images):
    mask = make(unet, 3, rooted=True, groups=GENDER, branch="conditional")
    count = 2 * images
    drawn = {None: draw(pipe, guidance=guidance, images=images)}
    for group in GENDER:
        with suppress(pipe, mask.group(group)):
            drawn[group] = draw(pipe, guidance=guidance, images=images)
    load_mask(pipe, mask)
    for samples in (["female", "male", None, "female"][:count], [None] * count, ["male"] * count):
        allot_masks(pipe, samples)
        got = draw(pipe, guidance=guidance, images=images)
        for i, group in enumerate(samples):
            assert torch.equal(got[i], drawn[group][i])
    allot_masks(pipe, "male")
    assert torch.equal(draw(pipe, guidance=guidance, images=images), drawn["male"])


def test_several_allocating_masks_and_a_plain_one_by_image(pipe, unet):
    gender, age = make(unet, 1, groups=GENDER), make(unet, 2, True, AGE, sites=find_sites(unet))
    plain = make(unet, 3)
    untreated = draw(pipe)
    for name, mask, strength in (("gender", gender, 1.0), ("age", age, 0.5), ("plain", plain, 1.0)):
        load_mask(pipe, mask, name, strength)
    expected = {}
    for key, masks, strengths in (
        ("both", [gender.group("female"), age.group("old"), plain], [1.0, 0.5, 1.0]),
        ("age alone", [gender.group("female"), age.group("young"), plain], [0.0, 0.5, 1.0]),
        ("plain alone", [plain], [1.0]),
        ("not plain", [gender.group("male"), age.group("young")], [1.0, 0.5]),
    ):
        other = beside(pipe, copy.deepcopy(unet))
        unload_mask(other)
        with suppress(other, compose(masks, strengths)):
            expected[key] = draw(other)
    allot_masks(pipe, [{"gender": "female", "age": "old"}, {"gender": None, "age": "young"}])
    got = draw(pipe)
    torch.testing.assert_close(got[0], expected["both"][0], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(got[1], expected["age alone"][1], atol=1e-9, rtol=1e-9)
    allot_masks(pipe, [{"gender": None, "age": None}, {"gender": "male", "age": "young", "plain": False}])
    got = draw(pipe)
    torch.testing.assert_close(got[0], expected["plain alone"][0], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(got[1], expected["not plain"][1], atol=1e-9, rtol=1e-9)
    allot_masks(pipe, None)
    assert torch.equal(draw(pipe), untreated)


def test_masks_that_share_groups_go_by_one_name_and_plain_ones_may_be_gated(pipe, unet):
    untreated = draw(pipe)
    load_mask(pipe, make(unet, 1), "plain")
    treated = draw(pipe)
    allot_masks(pipe, [True, None])
    assert torch.equal(draw(pipe), torch.stack([treated[0], untreated[1]]))
    unload_mask(pipe)
    one, two = make(unet, 1, groups=GENDER), make(unet, 2, groups=GENDER)
    load_mask(pipe, one, "one")
    load_mask(pipe, two, "two")
    allot_masks(pipe, ["female", None])
    got = draw(pipe)
    unload_mask(pipe)
    with suppress(pipe, compose([one, two])) as suppression:
        suppression.allot(["female", None])
        assert torch.equal(draw(pipe), got)
    assert torch.equal(got[1], untreated[1])


def test_an_allotment_holds_until_the_active_masks_change(pipe, unet):
    load_mask(pipe, make(unet, 1, groups=GENDER), "gender")
    with pytest.raises(InputError, match=r"images to female, male, and nothing was allotted yet; .*allot_masks\(pipe"):
        draw(pipe)
    allot_masks(pipe, ["female", "male"])
    first = draw(pipe)
    assert torch.equal(draw(pipe), first)
    disable_masks(pipe)
    draw(pipe)
    enable_masks(pipe)
    assert torch.equal(draw(pipe), first)
    set_masks(pipe, "gender", 0.5)
    with pytest.raises(InputError, match="nothing was allotted yet"):
        draw(pipe)
    allot_masks(pipe, ["female"] * 3)
    with pytest.raises(InputError, match="3 samples are allotted, but the call draws 2"):
        draw(pipe)


def test_image_to_image_pipelines_are_treated_through_the_unet_that_they_share(pipe, unet):
    other, mask = beside(pipe, kind=StableDiffusionImg2ImgPipeline), make(unet, 1, branch="conditional")
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
    other, mask = beside(pipe), make(unet, 1, branch="conditional")
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
    mask = make(unet, 1, branch="conditional")

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


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_images_made_of_images_get_each_their_own_group(pipe, unet, guidance):
    """Image to image at less than full strength, two images a prompt: as if all images of the call had that group."""
    other = beside(pipe, kind=StableDiffusionImg2ImgPipeline)
    side = 4 * pipe.vae_scale_factor
    options = {"guidance": guidance, "images": 2, "strength": 0.5}
    image = torch.rand(2, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = draw(other, image=image, **options)
    load_mask(pipe, make(unet, 1, branch="conditional", groups=GENDER))
    drawn = {}
    for samples in (["female"] * 4, ["male"] * 4, ["female", "male", None, "female"]):
        allot_masks(pipe, samples)
        drawn[tuple(samples)] = draw(other, image=image, **options)
    female, male, mixed = drawn.values()
    assert torch.allclose(mixed, torch.stack([female[0], male[1], before[2], female[3]]))
    assert not torch.allclose(female, male)
    unload_mask(other)
    assert torch.equal(draw(other, image=image, **options), before)


def test_a_pipeline_that_is_offloaded_between_its_models_is_treated_alike(pipe, unet):
    mask = make(unet, 1, groups=GENDER, branch="conditional")

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
    mask = make(unet, 1, groups=GENDER, branch="conditional", rooted=True)
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
    load_mask(pipe, make(unet, 1, groups=GENDER, branch="conditional"))
    allot_masks(pipe, ["female", None])
    expected = draw(pipe)
    set_masks(unet, "default")
    allot_masks(unet, ["female", None])
    disable_masks(unet)
    enable_masks(unet)
    assert torch.equal(draw(pipe), expected)


def test_a_mask_does_not_keep_its_pipeline_alive(pipe, unet):
    other = beside(pipe)
    load_mask(other, make(unet, 1))
    gone = weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None
    assert active_masks(unet) == {"default": 1.0}
    unload_mask(unet)


def test_a_copied_unet_does_not_keep_the_original_alive(original):
    pipe = beside(original, copy.deepcopy(original.unet))
    load_mask(pipe, make(pipe.unet, 1))
    twin = copy.deepcopy(pipe.unet)
    treated, gone = draw(pipe), weakref.ref(pipe.unet)
    del pipe
    gc.collect()
    assert gone() is None
    assert torch.equal(draw(beside(original, twin)), treated)


def test_a_treated_pipeline_saves_the_untreated_weights(pipe, unet, tmp_path):
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    untreated = draw(pipe)
    mask = make(unet, 1)
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


def test_masks_are_loaded_from_files_folders_and_the_hub(pipe, unet, tmp_path, monkeypatch):
    mask = make(unet, 1)
    mask.save(tmp_path / "a.pt")
    mask.save_pretrained(tmp_path / "folder")
    load_mask(pipe, tmp_path / "a.pt", "file")
    load_mask(pipe, str(tmp_path / "folder"), "folder")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(tmp_path / "folder/mask.safetensors"))
    load_mask(pipe, "owner/mask-1.5", "hub")
    assert all(torch.equal(found.factors, mask.factors) for found in loaded_masks(pipe).values())
    with pytest.raises(InputError, match="No such file"):
        load_mask(pipe, tmp_path / "b.safetensors", "absent")


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


def test_a_refused_change_changes_nothing(pipe, unet):
    load_mask(pipe, make(unet, 1), "one")
    treated = draw(pipe)
    with pytest.raises(InputError, match="branches both and conditional"):
        load_mask(pipe, make(unet, 2, branch="conditional"), "two")
    elsewhere = make(unet, 2, sites=[Site("far.conv2", "conv", 256)])
    with pytest.raises(InputError, match=r"has no site 'far.conv2'"):
        load_mask(pipe, elsewhere, "three")
    assert list(loaded_masks(pipe)) == ["one"]
    assert torch.equal(draw(pipe), treated)


def test_masks_that_cannot_be_loaded(pipe, unet):
    digests = {"unet_shapes": shapes_digest(unet), "unet_weights": "of another"}
    load_mask(pipe, make(unet, 1), "one")
    for options, match in (
        ({"name": "one"}, "named 'one' is loaded already; unload it first"),
        ({"name": ""}, "mask name ''"),
        ({"strength": 1.5}, "strength 1.5; expected 0"),
        ({"strength": "full"}, "strength 'full'"),
    ):
        with pytest.raises(InputError, match=match):
            load_mask(pipe, make(unet, 2), **options)
    with pytest.raises(InputError, match="other weights"):
        load_mask(pipe, make(unet, 2, metadata=digests))
    load_mask(pipe, make(unet, 2, metadata=digests), force=True)
    with pytest.raises(InputError, match="cannot damp a str"):
        load_mask("pipe", make(unet, 2))
    unload_mask(pipe)
    fuse(pipe, make(unet, factors=torch.full_like(make(unet).factors, 0.5)))
    with pytest.raises(InputError, match="unfuse it first"):
        load_mask(pipe, make(unet, 2, groups=GENDER))
    with pytest.raises(InputError, match="a fused mask treats all images alike; unfuse it"):
        allot_masks(pipe, ["female", "male"])
    unfuse(pipe)


def test_names_strengths_and_allotments_that_cannot_be(pipe, unet):
    for call in (
        lambda: unload_mask(pipe),
        lambda: set_masks(pipe, "one"),
        lambda: enable_masks(pipe),
        lambda: disable_masks(pipe),
        lambda: allot_masks(pipe, None),
    ):
        with pytest.raises(InputError, match="no mask is loaded; load one with load_mask"):
            call()
    load_mask(pipe, make(unet, 1, groups=GENDER), "gender")
    load_mask(pipe, make(unet, 2, groups=AGE), "age")
    load_mask(pipe, make(unet, 3), "plain")
    for call, match in (
        (lambda: unload_mask(pipe, "other"), "mask 'other' is not loaded; those are gender, age, plain"),
        (lambda: set_masks(pipe, ["age", "other"]), "mask 'other' is not loaded"),
        (lambda: set_masks(pipe, []), "no mask is named"),
        (lambda: set_masks(pipe, ["age", "age"]), "named twice"),
        (lambda: set_masks(pipe, ["age", "gender"], [0.5]), "1 strengths for 2 masks"),
        (lambda: set_masks(pipe, "age", -0.1), "strength -0.1"),
        (lambda: allot_masks(pipe, []), "no image is allotted"),
        (
            lambda: allot_masks(pipe, ["somebody"]),
            "group 'somebody' is not known; choose from female, male, old, young",
        ),
        (lambda: allot_masks(pipe, ["female"]), "mask 'age' is allotted 'female'; expected one of old, young, or None"),
        (lambda: allot_masks(pipe, [True]), "mask 'gender' is allotted nothing; expected one of female, male"),
        (lambda: allot_masks(pipe, [{"gender": "female"}]), "mask 'age' is allotted nothing"),
        (lambda: allot_masks(pipe, [{"sex": "female"}]), "mask 'sex' is not active; those are gender, age, plain"),
        (
            lambda: allot_masks(pipe, [{"gender": None, "age": None, "plain": "x"}]),
            "'plain' is allotted 'x'; expected True",
        ),
    ):
        with pytest.raises(InputError, match=match) as caught:
            call()
        assert "\n" not in str(caught.value)
    set_masks(pipe, "plain")
    with pytest.raises(InputError, match="the active masks have none; expected True or None"):
        allot_masks(pipe, ["female"])


def test_a_mask_of_no_effect_on_any_neuron_is_fine(pipe, unet):
    before = draw(pipe)
    mask = make(unet, 1, groups=GENDER)
    load_mask(pipe, replace(mask, factors=torch.ones_like(mask.factors)))
    allot_masks(pipe, ["female", "male"])
    assert torch.equal(draw(pipe), before)
