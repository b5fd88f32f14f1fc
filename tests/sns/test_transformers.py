"""Masks of transformers: sites that are parts of a layer, streams, and plans of flow models."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from tests.pipelines.table import opened, scale
from torch import Tensor

from stereoclinic.ddtd.trajectory import Measured, Settings, walk
from stereoclinic.errors import InputError
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.sites import Site, find_sites
from stereoclinic.pipelines.watch import Walk
from stereoclinic.prompts.axes import load_axis
from stereoclinic.prompts.sets import Samples, generator, load_prompts, with_seeds
from stereoclinic.sns.adapter import load_mask, unload_mask
from stereoclinic.sns.compose import compose
from stereoclinic.sns.damp import suppress
from stereoclinic.sns.dose import find_dose, lean_left
from stereoclinic.sns.fuse import fuse, save_fused, unfuse
from stereoclinic.sns.mask import NeuronMask
from stereoclinic.sns.plan import plan_stepwise
from stereoclinic.sns.policy import Treatment
from stereoclinic.sns.stepwise import Stepwise

AXIS = load_axis("gender")
EDGES = torch.tensor([1001.0, 0.0])
STEPS = 3
#: One call a step with both halves; one call; two calls; two calls, and norms after sites.
NAMES = ["sd3", "flux", "flux2-klein", "lumina2"]
_OPENED: dict[str, Model] = {}


def model_of(name: str) -> Model:
    if name not in _OPENED:
        _OPENED[name] = opened(name)
    return _OPENED[name]


@pytest.fixture(scope="module")
def samples() -> Samples:
    return with_seeds(load_prompts("portraits", 2), 0, 2)


def draw(model: Model, rows: Any, pipe: Any = None) -> Tensor:
    """Latents of the pipeline's own call."""
    name = next(name for name, each in _OPENED.items() if each is model)
    drawn = (pipe or model.pipe)(
        prompt=[row["prompt"] for row in rows],
        generator=[generator(row, "noise") for row in rows],
        num_inference_steps=STEPS,
        output_type="latent",
        **model.options(scale(name, model)),
    )
    return drawn.images


def arrived(model: Model, rows: Any, layers: list[str]) -> dict[str, Tensor]:
    """What goes into layers in the first call of the denoiser."""
    found: dict[str, Tensor] = {}

    def keep(name: str, args: tuple[Any, ...]) -> None:
        found.setdefault(name, args[0].clone())

    hooks = [
        model.network.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: keep(name, args))
        for name in layers
    ]
    draw(model, rows)
    for hook in hooks:
        hook.remove()
    return found


def random_mask(sites: list[Site], rooted: bool = False, seed: int = 0) -> NeuronMask:
    g = torch.Generator().manual_seed(seed)
    shape = (1, sum(site.width for site in sites))
    factors = torch.where(torch.rand(shape, generator=g) < 0.4, torch.rand(shape, generator=g), 1.0)
    return NeuronMask(sites, EDGES, factors, torch.randn(shape, generator=g) if rooted else None)


def parts_of(model: Model) -> list[Site]:
    return [site for site in find_sites(model.network) if site.name != site.layer]


@pytest.mark.parametrize("rooted", [False, True])
@pytest.mark.parametrize("part", [0, 1], ids=["attention", "feed-forward"])
@pytest.mark.parametrize("name", ["flux", "flux2-klein"])
def test_a_site_that_is_a_part_of_a_layer_is_damped_and_the_rest_of_the_layer_is_not(
    name: str, part: int, rooted: bool, samples: Samples
) -> None:
    model, rows = model_of(name), list(samples)[:2]
    site = parts_of(model)[part]
    factors = torch.linspace(0, 1, site.width)[None]
    mask = NeuronMask([site], EDGES, factors, torch.full_like(factors, 0.3) if rooted else None)
    before = arrived(model, rows, [site.layer])[site.layer]
    with suppress(model, mask):
        after = arrived(model, rows, [site.layer])[site.layer]
    own = slice(site.start, site.start + site.width)
    expected = before[..., own] * factors[0] + ((1 - factors[0]) * 0.3 if rooted else 0.0)
    torch.testing.assert_close(after[..., own], expected)
    rest = torch.ones(before.shape[-1], dtype=torch.bool)
    rest[own] = False
    assert rest.any() and torch.equal(after[..., rest], before[..., rest])


@pytest.mark.parametrize("rooted", [False, True])
def test_the_parts_of_a_layer_act_together_in_whatever_order_they_come(rooted: bool, samples: Samples) -> None:
    model, rows = model_of("flux"), list(samples)[:2]
    attention, ff = parts_of(model)
    other = find_sites(model.network)[0]
    masks = {site: random_mask([site], rooted, seed) for seed, site in enumerate((attention, ff, other))}
    in_order = compose([masks[other], masks[attention], masks[ff]])
    assert in_order.sites == [other, attention, ff]
    with suppress(model, in_order):
        expected = draw(model, rows)
    for order in ([ff, other, attention], [attention, other, ff]):
        mixed = compose([masks[site] for site in order])
        assert mixed.sites == order
        with suppress(model, mixed):
            assert torch.equal(draw(model, rows), expected)
        for site in order:
            load_mask(model, masks[site], site.name)
        assert torch.equal(draw(model, rows), expected)
        unload_mask(model)
    with suppress(model, masks[ff]):
        assert not torch.allclose(draw(model, rows), expected)


def test_sites_that_share_neurons_are_no_mask() -> None:
    part, whole = Site("proj_out[:2]", "attention", 2), Site("proj_out", "other", 5)
    with pytest.raises(InputError, match=r"sites 'proj_out\[:2\]' and 'proj_out' share neurons of one layer"):
        compose([random_mask([part]), random_mask([whole])])
    for site in (Site("proj_out[:3]", "attention", 2), Site("proj_out[1:3]", "ff", 2), Site("proj_out[x]", "ff", 2)):
        with pytest.raises(InputError, match=r"parts of a layer are written as layer\[:64\] and layer\[64:\]"):
            random_mask([site])


def test_a_mask_of_another_architecture_or_of_other_parts_is_refused() -> None:
    model = model_of("flux")
    attention, ff = parts_of(model)
    longer = Site(f"{ff.layer}[{ff.start + 1}:]", "ff", ff.width)
    shorter = Site(ff.name, "ff", ff.width - 1)
    wide = Site(f"{attention.layer}[:{attention.width + ff.width + 1}]", "attention", attention.width + ff.width + 1)
    for site in (longer, shorter, wide):
        with pytest.raises(InputError, match=rf"has {site.width} neurons in the mask, \d+ in this Flux") as caught:
            load_mask(model, random_mask([site]))
        assert "\n" not in str(caught.value)
    with pytest.raises(
        InputError, match=r"this FluxTransformer2DModel has no site 'transformer_blocks.1.attn.to_out.0'"
    ):
        load_mask(model, random_mask(find_sites(model_of("sd3").network)[-2:]))


@pytest.mark.parametrize(("name", "rooted"), [("sd3", True), ("flux", True), ("flux", False), ("lumina2", False)])
def test_fused_it_draws_the_hooked_models_pictures_also_from_a_folder(
    name: str, rooted: bool, samples: Samples, tmp_path: Path
) -> None:
    model, rows = model_of(name), list(samples)[:2]
    mask = random_mask(find_sites(model.network), rooted)
    untreated = draw(model, rows)
    state = {key: value.clone() for key, value in model.network.state_dict().items()}
    with suppress(model, mask):
        hooked = draw(model, rows)
    effect = (hooked - untreated).abs().max()
    fuse(model, mask)
    try:
        fused = draw(model, rows)
        save_fused(model.pipe, tmp_path / "fused")
        written = {key: value.clone() for key, value in model.network.state_dict().items()}
    finally:
        unfuse(model)
    assert (fused - hooked).abs().max() < 1e-3 * effect
    assert all(torch.equal(value, state[key]) for key, value in model.network.state_dict().items())
    assert torch.equal(draw(model, rows), untreated)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "fused")
    assert all(torch.equal(value, written[key]) for key, value in pipe.transformer.state_dict().items())
    assert (draw(model, rows, Model(pipe).pipe) - hooked).abs().max() < 1e-3 * effect


@pytest.mark.parametrize(
    ("name", "first"),
    [("sd3", "transformer_blocks.0."), ("flux", "transformer_blocks.0."), ("lumina2", "noise_refiner.")],
)
def test_damping_the_text_s_stream_reaches_the_picture_s_where_they_meet(
    name: str, first: str, samples: Samples
) -> None:
    model, rows = model_of(name), list(samples)[:2]
    sites = find_sites(model.network)
    text = [site for site in sites if site.stream == "text"]
    beside = [site.layer for site in sites if site.stream == "image" and site.name.startswith(first)]
    after = [site.layer for site in sites if site.stream != "text" and site.layer not in beside]
    assert text and beside and after
    mask = NeuronMask(text, EDGES, torch.zeros(1, sum(site.width for site in text)))
    layers = [text[0].layer, *beside, *after]
    before = arrived(model, rows, layers)
    with suppress(model, mask):
        now = arrived(model, rows, layers)
    assert not now[text[0].layer].any() and before[text[0].layer].any()
    assert all(torch.equal(now[layer], before[layer]) for layer in beside)
    assert all(not torch.allclose(now[layer], before[layer], rtol=1e-3) for layer in dict.fromkeys(after))


@pytest.fixture(scope="module")
def planned(samples: Samples) -> Callable[[str], NeuronMask]:
    """The treatment of each group, planned once for each pipeline."""
    made: dict[str, NeuronMask] = {}

    def plan(name: str) -> NeuronMask:
        if name not in made:
            model = model_of(name)
            settings = Stepwise(mu=0.01, keep=0.0, until=500.0, steps=STEPS, guidance=scale(name, model))
            mask = plan_stepwise(model, AXIS, samples, settings, allocate=True)
            assert mask is not None
            made[name] = mask
        return made[name]

    return plan


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_comes_closer_to_its_target_at_every_step_and_leaves_what_it_said(
    name: str, planned: Callable[[str], NeuronMask], samples: Samples
) -> None:
    """What is left is measured anew, on the treated trajectory: no estimate, also where a norm follows a site."""
    model, mask = model_of(name), planned(name)
    for k, group in enumerate(mask.groups):
        said = mask.metadata["selection"]["steps"][k]
        assert len(said) >= 2 and all(each["after"] < 0.9 * each["before"] for each in said)
        shares = [{each: float(each == group) for each in mask.groups}]
        left = lean_left(model, AXIS, samples, mask, 1.0, STEPS, scale(name, model), shares)
        assert left.mean().item() == pytest.approx(sum(each["after"] for each in said) / len(said), rel=0.02, abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_dose_of_nothing_leaves_the_untreated_lean_and_one_that_is_found_meets_its_bound(
    name: str, planned: Callable[[str], NeuronMask], samples: Samples
) -> None:
    model, mask = model_of(name), planned(name)
    guidance, plain = scale(name, model), mask.group("female")
    walked = list[Measured]()
    walk(
        model,
        find_sites(model.network),
        AXIS,
        list(samples),
        Settings(steps=STEPS, bins=1, guidance=guidance),
        walked.append,
    )
    expected = torch.stack([each.lean.abs().mean() for each in walked if plain.bin_of(each.timestep) is not None])
    found = lean_left(model, AXIS, samples, plain, 0.0, STEPS, guidance)
    assert found.mean().item() == pytest.approx(expected.mean().item(), rel=1e-3)
    untreated = lean_left(model, AXIS, samples, mask, 0.0, STEPS, guidance).mean().item()
    dose = find_dose(model, AXIS, samples, mask, untreated / 2, STEPS, guidance, resolution=0.25)
    assert 0 < dose.strength <= 1 and dose.left <= untreated / 2


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_acts_alike_in_a_plain_call_and_in_a_watched_one(
    name: str, planned: Callable[[str], NeuronMask], samples: Samples
) -> None:
    """Its bins are the scheduler's timesteps, whatever the denoiser is told."""
    model, mask, rows = model_of(name), planned(name), list(samples)
    assert len(mask.factors[0]) >= 2 and not torch.equal(mask.factors[:, 0], mask.factors[:, 1])
    with Treatment(model, mask, [AXIS]) as treatment:
        allotted = treatment.begin(rows)
        plain = draw(model, rows)
        watched = Walk(model, rows, STEPS, scale(name, model)).run().images
    assert set(allotted) == set(AXIS.groups)
    assert torch.equal(plain, watched)
    untreated = draw(model, rows)
    assert (plain - untreated).abs().flatten(1).amax(1).min() > 0
    load_mask(model, replace(mask, factors=mask.factors.flip(2)))  # as much damping of other neurons
    unload_mask(model)
    assert torch.equal(draw(model, rows), untreated)
