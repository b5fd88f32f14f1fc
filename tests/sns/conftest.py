"""A whole pipeline round a UNet of two levels, that UNet alone, masks of random factors for them, and a small mask."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from stereoclinic.pipelines.sites import Site, find_sites
from stereoclinic.sns.mask import NeuronMask

EDGES = torch.tensor([1000.0, 600.0, 0.0])
GROUPS = ("a", "b", "c")
GENDER, AGE = ("female", "male"), ("old", "young")
SITES = [Site("block.ff.net.2", "ff", 3), Site("block.to_out.0", "attention", 2)]
SMALL_EDGES = torch.tensor([1000.0, 600.0, 200.0])
NAMES = ("female", "male", "other")
PROMPTS = ["a photo of a doctor", "a photo of a nurse"]


def two_levels(channels: int, text_width: int) -> UNet2DConditionModel:
    """A frozen UNet on (channels, 8, 8) latents, always the same."""
    torch.manual_seed(0)
    network = UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text_width,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def network() -> UNet2DConditionModel:
    """In single precision, without a pipeline."""
    return two_levels(2, 8)


@pytest.fixture(scope="module")
def inputs() -> tuple[Tensor, Tensor]:
    """Latents (4, 2, 8, 8) and text (4, 3, 8) for that UNet."""
    g = torch.Generator().manual_seed(1)
    return torch.randn(4, 2, 8, 8, generator=g), torch.randn(4, 3, 8, generator=g)


@pytest.fixture(scope="module")
def original(denoiser) -> StableDiffusionPipeline:
    """A pipeline around such a UNet, in double precision."""
    config = denoiser.network.config
    unet = two_levels(config.in_channels, config.cross_attention_dim).double()
    return beside(denoiser.pipe, unet)


@pytest.fixture
def pipe(original) -> StableDiffusionPipeline:
    """The same around a UNet of its own."""
    return beside(original, copy.deepcopy(original.unet))


@pytest.fixture
def unet(pipe) -> UNet2DConditionModel:
    """That pipeline's."""
    return pipe.unet


def beside(pipe: Any, unet: UNet2DConditionModel | None = None, kind: type = StableDiffusionPipeline) -> Any:
    """Another pipeline of the same parts."""
    made = kind(**{**pipe.components, "unet": unet or pipe.unet}, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipe: Any, prompts: list[str] = PROMPTS, guidance: float = 3.0, images: int = 1, **options: Any) -> Tensor:
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


def run(network: UNet2DConditionModel, inputs: Sequence[Tensor], t: Any = 800) -> Tensor:
    """One prediction."""
    latents, text = (value.to(network.dtype) if value.dtype == torch.float64 else value for value in inputs)
    return network(latents, t, encoder_hidden_states=text).sample


def random_mask(
    network: UNet2DConditionModel,
    seed: int = 0,
    rooted: bool = False,
    groups: tuple[str, ...] = (),
    kinds: Sequence[str] | None = None,
    **changes: Any,
) -> NeuronMask:
    """Two bins in which two of five neurons of every site are damped, by factors of their own."""
    g = torch.Generator().manual_seed(seed)
    sites = find_sites(network, kinds)
    shape = (*((len(groups),) if groups else ()), 2, sum(site.width for site in sites))
    factors = torch.where(torch.rand(shape, generator=g) < 0.4, torch.rand(shape, generator=g), 1.0)
    roots = torch.randn(shape, generator=g) if rooted else None
    return NeuronMask(
        **{"sites": sites, "bin_edges": EDGES, "factors": factors, "roots": roots, "groups": groups, **changes}
    )


def static_mask(
    network: UNet2DConditionModel,
    seed: int = 0,
    rooted: bool = False,
    kinds: Sequence[str] | None = None,
    **changes: Any,
) -> NeuronMask:
    """One that can be fused: alike at all timesteps, some factors zero; with a root, of linear layers alone."""
    mask = random_mask(network, seed, rooted, kinds=("ff", "attention") if rooted else kinds)
    factors = mask.factors[:1].clone()
    factors[0, ::7] = 0.0
    roots = None if mask.roots is None else mask.roots[:1].expand(2, -1)
    return replace(mask, **{"factors": factors.expand(2, -1), "roots": roots, **changes})


def state_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of its weights."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def same_bits(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    """Whether two states have the same names, dtypes and values."""
    return one.keys() == two.keys() and all(
        value.dtype == two[name].dtype and torch.equal(value, two[name]) for name, value in one.items()
    )


def small_mask(**changes: Any) -> NeuronMask:
    """Of five neurons of no real model, in two bins."""
    g = torch.Generator().manual_seed(0)
    fields = {
        "sites": SITES,
        "bin_edges": SMALL_EDGES,
        "factors": torch.rand(2, 5, generator=g),
        "roots": torch.randn(2, 5, generator=g),
        "branch": "conditional",
        "metadata": {"axis": "gender", "seeds": [1, 2]},
    }
    return NeuronMask(**{**fields, **changes})


def small_group_mask(**changes: Any) -> NeuronMask:
    """The same for three groups."""
    g = torch.Generator().manual_seed(1)
    fields = {
        "factors": torch.rand(3, 2, 5, generator=g),
        "roots": torch.randn(3, 2, 5, generator=g),
        "groups": NAMES,
    }
    return small_mask(**{**fields, **changes})


def assert_same(one: NeuronMask, two: NeuronMask) -> None:
    """Fail unless they are equal in everything."""
    assert (one.sites, one.branch, one.groups, one.metadata) == (two.sites, two.branch, two.groups, two.metadata)
    for name in ("bin_edges", "factors", "roots"):
        was, now = getattr(one, name), getattr(two, name)
        assert (was is None and now is None) or (was.dtype == now.dtype and torch.equal(was, now))


def hooks(network: torch.nn.Module) -> int:
    """How many there are."""
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in network.modules())


@contextmanager
def inputs_of(module: torch.nn.Module) -> Iterator[list[Tensor]]:
    """What reaches a layer."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    yield seen
    handle.remove()
