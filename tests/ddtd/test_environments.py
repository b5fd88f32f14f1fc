"""Relevance is the same wherever a user may have put the model: precision, layout, attention, adapters, threads."""

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from peft import LoHaConfig, LoraConfig
from tests.ddtd.conftest import rows
from tests.ddtd.test_check import checked
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from stereoclinic.ddtd.conservation import Conservation, check
from stereoclinic.ddtd.propagate import propagate
from stereoclinic.ddtd.rules import layers as layer_rules
from stereoclinic.ddtd.rules.composites import COMPOSITES, Choice, Composite
from stereoclinic.ddtd.rules.functions import Rule
from stereoclinic.errors import UncoveredOperation
from stereoclinic.pipelines.call import Call
from stereoclinic.pipelines.hooks import Watch
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.sites import find_sites, neuron_relevance
from stereoclinic.pipelines.watch import Walk

RULED = ["epsilon-cp", "epsilon-attnlrp"]
ALL = [*RULED, "deep-taylor"]  # which has rules for linear layers and convolutions too
Inputs = tuple[Tensor, Tensor, Tensor]


def relevance(unet: Any, inputs: Inputs, composite: str | Composite, *, thread: bool = False) -> Tensor:
    """Neuron relevance (B, N) of <f, v>, the latents and the text asked about too; backward outside the context."""
    bare = getattr(unet, "_orig_mod", unet)
    sites = find_sites(bare)
    latents, t, text = inputs
    with Watch(bare, sites) as watch:
        with propagate(composite, unet):
            f = unet(latents.clone().requires_grad_(), t, encoder_hidden_states=text.clone().requires_grad_()).sample
        v = torch.randn(f.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(f.dtype)
        kept = dict(watch.activations)
        box: list[Mapping[str, Tensor | None]] = []

        def backward() -> None:
            box.append(watch.grads(f, v, retain=False))

        if thread:
            worker = threading.Thread(target=backward)
            worker.start()
            worker.join()
        else:
            backward()
        (grads,) = box
    return neuron_relevance(kept, grads, sites)


def agreement(a: Tensor, b: Tensor) -> float:
    """Cosine, of the least agreeing sample."""
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=1).min())


# --- precision


@pytest.mark.parametrize("composite", ALL)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_autocast_is_close_to_float32_and_sums_wide(unet, inputs, composite: str, checkpointing: bool) -> None:
    """Under gradient checkpointing with backward on a thread of its own, as on CUDA, it is still autocast's own."""
    unet.float()
    single = (inputs[0].float(), inputs[1], inputs[2].float())
    exact = relevance(unet, single, composite)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = relevance(unet, single, composite)
    assert got.dtype == torch.float32
    assert agreement(got, exact) > 0.99
    assert ((got - exact).norm() / exact.norm()) < 0.1
    if checkpointing:
        unet.enable_gradient_checkpointing()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            again = relevance(unet, single, composite, thread=True)
        assert torch.equal(again, got)


def test_autocast_conserves_to_its_rounding(unet) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outcome = checked(unet.float())
    assert outcome.fault is None
    assert outcome.error < 0.05


@pytest.mark.parametrize("composite", RULED)
def test_half_precision_is_close_to_float32_and_sums_wide(unet, inputs, composite: str) -> None:
    exact = relevance(unet, inputs, composite)
    half = (inputs[0].bfloat16(), inputs[1], inputs[2].bfloat16())
    got = relevance(unet.bfloat16(), half, composite)
    assert got.dtype == torch.float32
    assert agreement(got, exact) > 0.98


# --- layout, attention, threads: the same relevance to rounding, in float64


def channels_last(unet: UNet2DConditionModel) -> None:
    unet.to(memory_format=torch.channels_last)


def checkpointing(unet: UNet2DConditionModel) -> None:
    unet.train()
    unet.enable_gradient_checkpointing()


ENVIRONMENTS: dict[str, Callable[[UNet2DConditionModel], Any]] = {
    "channels_last": channels_last,
    "gradient checkpointing": checkpointing,
    "AttnProcessor": lambda unet: unet.set_attn_processor(AttnProcessor()),
    "AttnProcessor2_0": lambda unet: unet.set_attn_processor(AttnProcessor2_0()),
    "attention slicing": lambda unet: unet.set_attention_slice("auto"),
    "attention slices of one": lambda unet: unet.set_attention_slice(1),
    "fused projections": lambda unet: unet.fuse_qkv_projections(),
    "trainable weights": lambda unet: unet.requires_grad_(True),
}


@pytest.mark.parametrize("composite", ALL)
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_same_relevance_with_backward_on_another_thread(unet, inputs, name: str, composite: str) -> None:
    plain, error = relevance(unet, inputs, composite), checked(unet, composite).error
    ENVIRONMENTS[name](unet)
    torch.testing.assert_close(relevance(unet, inputs, composite, thread=True), plain)
    assert checked(unet, composite).error == pytest.approx(error, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("composite", RULED)
@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])  # those that a CPU has
def test_same_relevance_by_every_attention_kernel(unet, inputs, backend: SDPBackend, composite: str) -> None:
    plain = relevance(unet, inputs, composite)
    with sdpa_kernel(backend):
        torch.testing.assert_close(relevance(unet, inputs, composite), plain)


def test_attention_slicing_through_the_pipeline(denoiser: Model) -> None:
    outcomes: list[Conservation] = []

    def visit(call: Call) -> None:
        outcomes.append(check(denoiser.network, call.predict, "epsilon-attnlrp"))

    walk = Walk(denoiser, rows(1), 1, 1.0, visit=visit, last=1)
    walk.run()
    denoiser.pipe.enable_attention_slicing(1)
    try:
        walk.run()
    finally:
        denoiser.pipe.unet.set_attn_processor(AttnProcessor2_0())
    plain, sliced = outcomes
    assert sliced.fault is None and sliced.uncovered == {}
    assert sliced.error == pytest.approx(plain.error, rel=1e-6) and plain.error > 1e-9


# --- adapters


def add_lora(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """Random adapters on layers of every kind; returns what each adds to its layer's weight, 3/2 B A."""
    torch.manual_seed(3)
    targets = ["to_q", "to_v", "to_out.0", "ff.net.2", "conv2"]
    unet.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False))
    deltas = {}
    for name, module in unet.named_modules():
        if hasattr(module, "lora_A"):
            a, b = (getattr(module, each)["default"].weight.detach() for each in ("lora_A", "lora_B"))
            deltas[name] = 1.5 * torch.einsum("or,ri...->oi...", b.flatten(1), a)
    attentions, resnets = 4, 8
    assert len(deltas) == attentions * (2 * 3 + 1) + resnets
    return deltas


def everywhere(rule: Rule) -> Composite:
    """A rule on every linear layer and convolution, by their kind."""
    return Composite("everywhere", {**COMPOSITES["epsilon-cp"].rules, "linear": rule, "convolution": rule})


BY_RULE: dict[str, str | Composite] = {
    **{name: name for name in (*RULED, "gamma-cp", "deep-taylor")},
    "epsilon": everywhere(layer_rules.epsilon(0.1)),
    "gamma": everywhere(layer_rules.gamma(0.25)),
    "z_plus": everywhere(layer_rules.z_plus),
    "w_squared": everywhere(layer_rules.w_squared),
    "one layer": Composite(
        "one", COMPOSITES["epsilon-cp"].rules, layers=(Choice(layer_rules.z_plus, "mid_block.*.conv2"),)
    ),
}


@pytest.mark.parametrize("composite", BY_RULE)
@pytest.mark.parametrize("frozen", [False, True])
def test_lora_is_read_as_if_merged(unet, inputs, composite: str, frozen: bool) -> None:
    rules = BY_RULE[composite]
    merged, sites, before = copy.deepcopy(unet), find_sites(unet), relevance(unet, inputs, rules)
    for name, delta in add_lora(unet).items():
        merged.get_submodule(name).weight.data += delta
    assert find_sites(unet) == sites
    if frozen:
        unet.requires_grad_(False)
    got = relevance(unet, inputs, rules)
    torch.testing.assert_close(got, relevance(merged, inputs, rules))
    assert not torch.allclose(got, before, rtol=0.01)
    assert all(parameter.grad is None for parameter in unet.parameters())
    latents, t, text = inputs
    with torch.no_grad():
        plain = unet(*inputs).sample
    with propagate(rules, unet):
        assert torch.equal(unet(latents.clone().requires_grad_(), t, text.clone().requires_grad_()).sample, plain)
    checkpointing(unet)
    torch.testing.assert_close(relevance(unet, inputs, rules, thread=True), got)


#: What a user may do to adapters after the rules were set up, and whether peft can then merge what is left at work.
STATES: dict[str, Callable[[UNet2DConditionModel], Any]] = {
    "two at once": lambda unet: unet.set_adapters(["default", "second"], [0.5, 2.0]),
    "the other alone": lambda unet: unet.set_adapter("second"),
    "disabled": lambda unet: unet.disable_adapters(),
    "merged": lambda unet: unet.fuse_lora(adapter_names=["second"]),
    "one with a bias": lambda unet: unet.add_adapter(
        LoraConfig(r=2, target_modules=["to_out.0"], init_lora_weights=False, lora_bias=True), "biased"
    ),
}


@pytest.mark.parametrize("composite", ["gamma", "z_plus"])
@pytest.mark.parametrize("state", STATES)
def test_adapters_are_read_as_they_are_at_each_pass(unet, inputs, state: str, composite: str) -> None:
    add_lora(unet)
    unet.add_adapter(LoraConfig(r=3, target_modules=["conv1", "to_q", "ff.net.2"], init_lora_weights=False), "second")
    STATES[state](unet)
    got = relevance(unet, inputs, BY_RULE[composite])
    merged = copy.deepcopy(unet)
    for module in merged.modules():
        if hasattr(module, "lora_A") and not module.disable_adapters and not module.merged:
            module.merge()
    bare = dict(merged.named_modules())
    for name, module in bare.items():
        if hasattr(module, "base_layer"):
            parent, _, last = name.rpartition(".")
            setattr(bare[parent], last, module.base_layer)
    torch.testing.assert_close(got, relevance(merged, inputs, BY_RULE[composite]))


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (LoraConfig(r=2, target_modules=["to_q"], use_dora=True), "DoraLinearVariant is more than a product"),
        (LoraConfig(r=2, target_modules=["conv2"], lora_dropout=0.5), r"dropout is active \(call eval"),
        (LoHaConfig(r=2, target_modules=["to_q"]), r"loha\..* is not a LoRA"),
    ],
    ids=["DoRA", "dropout", "LoHa"],
)
def test_adapters_that_are_no_single_weight_are_refused(unet, inputs, config: Any, why: str) -> None:
    unet.add_adapter(config)
    unet.train()
    with pytest.raises(UncoveredOperation, match=f"adapter 'default' on a .* `z_plus`: .*{why}.*merge it first"):
        relevance(unet, inputs, BY_RULE["z_plus"])
    if not isinstance(config, LoHaConfig):
        relevance(unet, inputs, "epsilon-cp")


@pytest.mark.parametrize("composite", ["epsilon-cp", "gamma-cp", "gamma"])
def test_lora_conserves(unet, composite: str) -> None:
    plain = checked(unet, BY_RULE.get(composite, composite))
    add_lora(unet)
    outcome = checked(unet, BY_RULE.get(composite, composite))
    assert outcome.error < 1e-12 and outcome.total != plain.total
    assert outcome.cuts[0].shares["bias"] != 0


# --- torch.compile


def one_level() -> UNet2DConditionModel:
    """The least that has every kind of layer, for tracing takes seconds a block."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return unet.double().requires_grad_(False).eval()


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest, inputs_once: Inputs) -> Iterator[tuple[UNet2DConditionModel, Any]]:
    """A UNet, and itself compiled and used: what is cached by then must not answer for the relevance pass."""
    unet = one_level()
    faster = torch.compile(unet, backend=request.param)
    with torch.no_grad():
        faster(*inputs_once)
    yield unet, faster
    torch.compiler.reset()


@pytest.mark.parametrize("compiled", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)], indirect=True)
def test_a_compiled_unet_gives_the_same_relevance(compiled, inputs_once) -> None:
    unet, faster = compiled
    for composite in RULED:
        plain = relevance(unet, inputs_once, composite)
        assert torch.equal(relevance(faster, inputs_once, composite), plain)
        assert checked(faster, composite) == checked(unet, composite)
