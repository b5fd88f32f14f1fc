"""Damping a model that is compiled, has a LoRA, is offloaded or is copied."""

import copy
from dataclasses import replace

import accelerate
import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from tests.sns.conftest import hooks, inputs_of, random_mask, run

from stereoclinic.errors import InputError
from stereoclinic.io.digest import shapes_digest, weights_digest
from stereoclinic.pipelines.sites import find_sites
from stereoclinic.sns.damp import suppress
from stereoclinic.sns.mask import NeuronMask


def test_a_compiled_model_is_refused(network):
    mask = random_mask(network)
    block = network.mid_block
    block.compile(backend="eager")
    try:
        with pytest.raises(InputError, match="mid_block is compiled"), suppress(network, mask):
            pass
    finally:
        block._compiled_call_impl = None
    compiled = torch.compile(network, backend="eager")
    with pytest.raises(InputError, match="UNet2DConditionModel is compiled"), suppress(compiled, mask):
        pass


@pytest.fixture(scope="module")
def small_unet():
    """Two convolutions that are sites, for what takes long."""
    torch.manual_seed(0)
    network = UNet2DConditionModel(
        sample_size=4,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(4,),
        down_block_types=("DownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
        cross_attention_dim=8,
        norm_num_groups=2,
    )
    return network.eval().requires_grad_(False)


def test_a_model_compiled_while_it_is_damped_follows_the_mask_and_its_end(small_unet):
    """One graph serves all bins, so that many bins do not exhaust the compiler's patience."""
    g = torch.Generator().manual_seed(1)
    inputs = torch.randn(4, 2, 4, 4, generator=g), torch.randn(4, 3, 8, generator=g)
    sites = find_sites(small_unet)
    shape = (2, 12, sum(site.width for site in sites))
    factors = torch.rand(shape, generator=g)
    factors[:, 3] = 1.0  # a bin where nothing is damped
    mask = NeuronMask(sites, torch.linspace(1000, 0, 13), factors, None, "conditional", {}, ("a", "b"))
    times = [torch.tensor(t) for t in range(20, 1000, 80)]
    untreated = [run(small_unet, inputs, t) for t in times]
    graphs = []

    def backend(module, _):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    with suppress(small_unet, mask, guided=True) as suppression:
        suppression.allot(["a", None])
        hooked = [run(small_unet, inputs, t) for t in times]
        suppression.allot([None, "b"])
        other = [run(small_unet, inputs, t) for t in times]
        compiled = torch.compile(small_unet, backend=backend)
        for samples, expected in ((["a", None], hooked), ([None, "b"], other)):
            suppression.allot(samples)
            for t, want in zip(times, expected, strict=True):
                assert torch.equal(run(compiled, inputs, t), want)
        assert len(graphs) == 2  # damped, and not
    for t, want in zip(times, untreated, strict=True):
        assert torch.equal(run(compiled, inputs, t), want)


@pytest.fixture
def adapted(network):
    """A copy with a LoRA on attention outputs and feed-forward layers, and the pieces to take it off again."""
    copied = copy.deepcopy(network)
    lora = LoraConfig(r=2, target_modules=["to_out.0", "ff.net.2"], init_lora_weights=False)
    torch.manual_seed(5)
    return copied, lora


@pytest.mark.parametrize("rooted", [False, True])
def test_a_lora_under_a_mask_acts_on_damped_activations_whichever_comes_first(network, inputs, adapted, rooted):
    copied, lora = adapted
    digests = {"unet_shapes": shapes_digest(network), "unet_weights": weights_digest(network)}
    mask = random_mask(network, rooted=rooted, metadata=digests)
    copied.add_adapter(lora)
    undamped = run(copied, inputs)
    with suppress(copied, mask):  # the digests are those of the model beneath
        first = run(copied, inputs)
    assert torch.equal(run(copied, inputs), undamped)
    site = next(site for site in find_sites(copied) if site.kind == "attention")
    with suppress(copied, mask), inputs_of(copied.get_submodule(site.name).lora_A["default"]) as seen:
        with inputs_of(copied.get_submodule(site.name).base_layer) as base:
            run(copied, inputs)
        assert torch.equal(seen[0], base[0])
    state = {name: value for name, value in copied.state_dict().items() if "lora" in name}
    copied.unload_lora()
    assert torch.equal(run(copied, inputs), run(network, inputs))

    with suppress(copied, mask):  # and loaded, or unloaded, beneath a mask that is on
        copied.add_adapter(lora)
        copied.load_state_dict(state, strict=False)
        assert torch.equal(run(copied, inputs), first)
        copied.unload_lora()
        treated = run(copied, inputs)
    with suppress(network, mask):
        assert torch.equal(run(network, inputs), treated)
    assert hooks(copied) == hooks(network)


def test_a_model_that_is_offloaded_between_calls_is_damped_alike(network, inputs):
    mask = random_mask(network, rooted=True)
    with suppress(network, mask):
        expected = run(network, inputs)
    copied = copy.deepcopy(network)
    accelerate.hooks.add_hook_to_module(copied, accelerate.hooks.CpuOffload("cpu"))
    with suppress(copied, mask):
        assert torch.equal(run(copied, inputs), expected)
    accelerate.hooks.remove_hook_from_module(copied)
    with suppress(copied, mask):  # also hooked by the sequential kind, once loaded
        accelerate.cpu_offload(copied, execution_device="cpu")
        assert torch.equal(run(copied, inputs), expected)
    with (
        pytest.raises(InputError, match="'meta' device"),
        suppress(copied, replace(mask, metadata={"unet_weights": "x"})),
    ):
        pass


def test_a_deep_copy_within_the_block_is_refused(network):
    with (
        suppress(network, random_mask(network)),
        pytest.raises(InputError, match="outside the block, or use load_mask"),
    ):
        copy.deepcopy(network)
