"""Wherever a user may have put a pipeline, a watched call is its own, and the denoiser is seen as it is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import DiffusionPipeline
from peft import LoraConfig
from tests.ddtd.conftest import AXIS, close, measured
from tests.pipelines.tiny import build
from tests.pipelines.tiny_table import SMALL
from torch import Tensor, nn

from stereoclinic.ddtd.locate import run_ddtd
from stereoclinic.ddtd.trajectory import Settings
from stereoclinic.errors import InputError
from stereoclinic.io.digest import shapes_digest, weights_digest
from stereoclinic.pipelines.images import as_tensor, draw
from stereoclinic.pipelines.model import Model, network_of
from stereoclinic.pipelines.sites import find_sites
from stereoclinic.pipelines.watch import Walk
from stereoclinic.prompts.sets import generator, load_prompts, with_seeds
from stereoclinic.sns.adapter import load_mask, unload_mask
from stereoclinic.sns.mask import NeuronMask
from stereoclinic.sns.plan import plan_stepwise
from stereoclinic.sns.stepwise import Stepwise

SAMPLES = with_seeds(load_prompts("portraits", 2), 0, 1)
ROWS = list(SAMPLES)


class Away(ModelHook):
    """A layer's weights are on the meta device but for the time of its own pass.

    As accelerate's own hooks of sequential offloading leave them; those cannot run on the CPU.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.execution_device = "cpu"
        self.kept = {name: weight for name, weight in layer._parameters.items() if weight is not None}

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        module._parameters.update(self.kept)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        meta = {name: nn.Parameter(weight.to("meta"), requires_grad=False) for name, weight in self.kept.items()}
        module._parameters.update(meta)
        return output


def sequential_offload(pipe: DiffusionPipeline) -> None:
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            for layer in part.modules():
                if any(weight is not None for weight in layer._parameters.values()):
                    hook = Away(layer)
                    add_hook_to_module(layer, hook)
                    hook.post_forward(layer, None)
            add_hook_to_module(part, ModelHook())


def checkpointing(pipe: DiffusionPipeline) -> None:
    denoiser_of(pipe).enable_gradient_checkpointing()


def denoiser_of(pipe: DiffusionPipeline) -> Any:
    return network_of(pipe)


def in_chunks(pipe: DiffusionPipeline, dim: int) -> None:
    """As `enable_forward_chunking` of the denoisers that have it."""
    for block in denoiser_of(pipe).modules():
        if hasattr(block, "set_chunk_feed_forward"):
            block.set_chunk_feed_forward(1, dim)


ENVIRONMENTS: dict[str, Callable[[DiffusionPipeline], Any]] = {
    "model offload": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential offload": sequential_offload,
    "attention slicing": lambda pipe: pipe.enable_attention_slicing(1),
    "gradient checkpointing": checkpointing,
    "VAE slicing": lambda pipe: pipe.vae.enable_slicing(),
    "VAE tiling": lambda pipe: pipe.vae.enable_tiling(),
    "channels last": lambda pipe: denoiser_of(pipe).to(memory_format=torch.channels_last),
    "feed-forward, some pictures at a time": lambda pipe: in_chunks(pipe, 0),
    "feed-forward, some tokens at a time": lambda pipe: in_chunks(pipe, 1),
}


def prepared(name: str, environment: Callable[[DiffusionPipeline], Any], call: dict[str, Any] | None = None) -> Model:
    pipe = build(name)
    Model(pipe)  # freezes it, as a pipeline that is opened is
    environment(pipe)
    return Model(pipe, call={**SMALL, **(call or {})})


def bare(model: Model, guidance: float) -> Tensor:
    """The pictures of the pipeline's own call."""
    drawn = model.pipe(
        prompt=[row["prompt"] for row in ROWS],
        generator=[generator(row, "noise") for row in ROWS],
        num_inference_steps=2,
        guidance_scale=guidance,
        **model.call,
    )
    return as_tensor(drawn)


def predictions(model: Model, guidance: float = 3.0) -> Tensor:
    """At each step of a walk, (B, D) each."""
    found: list[Tensor] = []
    Walk(model, ROWS, 2, guidance, visit=lambda call: found.append(call.predict())).run()
    return torch.stack(found)


def relevance(model: Model) -> Tensor:
    settings = Settings(steps=1, bins=1, guidance=3.0)
    (step,) = measured(model, find_sites(network_of(model)), AXIS, ROWS, settings)
    return step.relevance


@pytest.mark.parametrize("name", ["sd1", "sd3"])
@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_a_watched_call_is_the_pipeline_s_own_and_measures_the_same(name: str, environment: str) -> None:
    model, plain = prepared(name, ENVIRONMENTS[environment]), prepared(name, lambda _: None)
    for guidance in (1.0, 3.0):
        drawn = draw(model, ROWS, 2, guidance)
        assert torch.equal(drawn, bare(model, guidance))
        torch.testing.assert_close(drawn.float(), bare(plain, guidance).float(), rtol=0, atol=1)
    torch.testing.assert_close(predictions(model), predictions(plain), rtol=1e-4, atol=1e-4)
    close(relevance(model), relevance(plain))
    assert torch.equal(draw(model, ROWS, 2, 3.0), bare(model, 3.0))


@pytest.mark.parametrize(("name", "offloaded"), [("model offload", True), ("VAE slicing", False)])
def test_offloaded_parts_are_left_where_accelerate_has_them(
    name: str, offloaded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked = prepared("sd1", ENVIRONMENTS[name]), []
    monkeypatch.setattr(type(model.pipe), "to", lambda self, device: asked.append(device))
    assert model.offloaded == offloaded and model.device.type == "cpu"
    assert model.to("meta") is model
    assert asked == ([] if offloaded else ["meta"])


def test_relevance_of_a_model_that_is_offloaded_as_a_whole_is_that_of_the_model() -> None:
    found = [
        run_ddtd(prepared("sd1", each), AXIS, SAMPLES, Settings(steps=2, bins=1), accelerator="cpu", devices=1)
        for each in (ENVIRONMENTS["model offload"], lambda _: None)
    ]
    torch.testing.assert_close(found[0].relevance_sum, found[1].relevance_sum)
    assert found[0].metadata["unet_weights"] == found[1].metadata["unet_weights"]


def test_weights_that_come_and_go_by_layer_have_no_digest() -> None:
    model = prepared("sd1", sequential_offload)
    with pytest.raises(InputError, match="'meta' device; load or move the model into memory"):
        run_ddtd(model, AXIS, SAMPLES, Settings(steps=2, bins=1), accelerator="cpu", devices=1)


def test_a_walk_that_is_left_lets_offloaded_parts_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the end of the pipeline's own call would."""
    model, freed = prepared("sd1", ENVIRONMENTS["model offload"]), []
    Walk(model, ROWS, 2, 1.0)
    monkeypatch.setattr(type(model.pipe), "maybe_free_model_hooks", lambda self: freed.append(1))
    Walk(model, ROWS, 2, 1.0, last=1).run()
    assert freed


@pytest.mark.slow
def test_a_compiled_network_is_watched_and_runs_compiled() -> None:
    ran = 0

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            nonlocal ran
            ran += 1
            return graph.forward(*args)

        return run

    def compile_unet(pipe: DiffusionPipeline) -> None:
        pipe.unet = torch.compile(pipe.unet, backend=backend)

    try:
        model, plain = prepared("sd1", compile_unet), prepared("sd1", lambda _: None)
        expected = bare(model, 3.0)
        ran = 0
        assert torch.equal(draw(model, ROWS, 2, 3.0), expected)
        assert ran
        torch.testing.assert_close(predictions(model), predictions(plain), rtol=1e-4, atol=1e-4)
        close(relevance(model), relevance(plain))
        assert type(model.network).__name__ == "OptimizedModule"
    finally:
        torch.compiler.reset()


def add_lora(pipe: DiffusionPipeline) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        targets = ["to_q", "to_out.0", "ff.net.2"]
        denoiser_of(pipe).add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))


@pytest.mark.parametrize("name", ["sd1", "sd3"])
def test_adapters_are_part_of_the_denoiser(name: str) -> None:
    model, plain = prepared(name, add_lora), prepared(name, lambda _: None)
    assert torch.equal(draw(model, ROWS, 2, 3.0), bare(model, 3.0))
    assert not torch.allclose(predictions(model), predictions(plain), rtol=1e-2)
    assert find_sites(model.network) == find_sites(plain.network)
    with_adapter = relevance(model)
    model.network.disable_adapters()
    close(relevance(model), relevance(plain))
    assert not torch.allclose(relevance(model), with_adapter, rtol=1e-2)
    assert torch.equal(draw(model, ROWS, 2, 3.0), draw(plain, ROWS, 2, 3.0))


def load_ip_adapter(pipe: DiffusionPipeline) -> None:
    """Random weights in the shape of an IP-Adapter's, which is to count for nothing."""
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    cross = [name for name in pipe.unet.attn_processors if not name.endswith("attn1.processor")]
    widths = [pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features for name in cross]
    width = pipe.unet.config.cross_attention_dim
    keys = {f"{2 * i + 1}.to_{each}_ip.weight": weight(inner, width) for i, inner in enumerate(widths) for each in "kv"}
    image = {"proj.weight": weight(4 * width, 8), "proj.bias": weight(4 * width)}
    image |= {"norm.weight": weight(width), "norm.bias": weight(width)}
    pipe.unet._load_ip_adapter_weights([{"image_proj": image, "ip_adapter": keys}])
    pipe.set_ip_adapter_scale(0.0)


@pytest.mark.parametrize(("guidance", "halves"), [(1.0, 1), (3.0, 2)])
def test_an_ip_adapter_that_adds_no_picture_adds_nothing(guidance: float, halves: int) -> None:
    embeds = {"ip_adapter_image_embeds": [torch.ones(halves, 1, 8)]}
    model, plain = prepared("sd1", load_ip_adapter, embeds), prepared("sd1", lambda _: None)
    assert torch.equal(draw(model, ROWS, 2, guidance), bare(model, guidance))
    assert torch.equal(draw(model, ROWS, 2, guidance), draw(plain, ROWS, 2, guidance))
    torch.testing.assert_close(predictions(model, guidance), predictions(plain, guidance), rtol=1e-4, atol=1e-4)


CHUNKED = [name for name in ENVIRONMENTS if name.startswith("feed-forward")]


@pytest.mark.parametrize("environment", CHUNKED)
@pytest.mark.parametrize("rooted", [False, True])
def test_relevance_and_plans_are_the_same_in_chunks(environment: str, rooted: bool) -> None:
    """Of layers that run on a part of their input at a time, every part counts."""
    found, settings = [], Settings(steps=1, bins=1, guidance=3.0, root="rooted" if rooted else "plain")
    how = Stepwise(steps=2, until=500.0, guidance=3.0, mu=0.01, keep=0.0, root="group" if rooted else "zero")
    for each in (ENVIRONMENTS[environment], lambda _: None):
        model = prepared("sd1", each)
        (step,) = measured(model, find_sites(network_of(model)), AXIS, ROWS, settings)
        mask = plan_stepwise(model, AXIS, SAMPLES, how)
        found.append((step.relevance, step.means, mask.factors, torch.zeros(1) if mask.roots is None else mask.roots))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3 * float(two.abs().max()))


def test_pictures_that_are_not_finite_or_of_one_colour_are_told() -> None:
    """At eight bits a colour NaN is black, and infinity white: they are looked for before."""
    model = prepared("sd1", lambda _: None)
    decoder, own = model.pipe.vae.decoder, model.pipe.vae.decode

    def told(change: Callable[[Tensor], Any]) -> list[int]:
        def spoil(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            change(output)
            return output

        places: list[int] = []
        with decoder.register_forward_hook(spoil):
            drawn = draw(model, ROWS, 1, 1.0, blank=places.append)
            assert torch.equal(drawn, bare_once(model))
        return places

    def corner(output: Tensor) -> None:
        output[1, :, 0, 0] = torch.inf

    assert told(lambda output: None) == [] and told(corner) == [1]
    assert told(lambda output: output[0].fill_(torch.nan)) == [0]
    assert told(lambda output: output.fill_(0.25)) == [0, 1]
    assert "decode" not in vars(model.pipe.vae) and model.pipe.vae.decode == own


def bare_once(model: Model) -> Tensor:
    generators = [generator(row, "noise") for row in ROWS]
    prompts = [row["prompt"] for row in ROWS]
    return as_tensor(
        model.pipe(prompt=prompts, generator=generators, num_inference_steps=1, guidance_scale=1.0, **model.call)
    )


def fuse_qkv(pipe: DiffusionPipeline) -> None:
    pipe.fuse_qkv_projections()


def mask_for(pipe: DiffusionPipeline) -> NeuronMask:
    sites = find_sites(pipe.unet)
    about = {"unet_shapes": shapes_digest(pipe.unet), "unet_weights": weights_digest(pipe.unet)}
    factors = torch.full((1, sum(site.width for site in sites)), 0.5)
    return NeuronMask(sites, torch.tensor([1000.0, 0.0]), factors, None, "conditional", about)


@pytest.mark.parametrize("environment", [fuse_qkv, load_ip_adapter])
def test_a_mask_is_loaded_before_or_after_what_leaves_its_sites_there(environment: Callable) -> None:
    options: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 3.0, "output_type": "latent", **SMALL}
    if environment is load_ip_adapter:
        options["ip_adapter_image_embeds"] = [torch.ones(2, 1, 8)]
    drawn = []
    for before in (True, False):
        pipe = build("sd1")
        mask = mask_for(pipe)
        if not before:
            environment(pipe)
        load_mask(pipe, mask)
        if before:
            environment(pipe)
        drawn.append(pipe("a photo of a doctor", generator=torch.Generator().manual_seed(0), **options).images)
    unload_mask(pipe)
    plain = pipe("a photo of a doctor", generator=torch.Generator().manual_seed(0), **options).images
    torch.testing.assert_close(drawn[0], drawn[1])
    assert not torch.allclose(drawn[0], plain, atol=1e-3)


def test_projections_that_are_fused_away_take_no_mask() -> None:
    pipe = build("sd1")
    sites = find_sites(pipe.unet, patterns=["attn1.to_q"])
    mask = NeuronMask(sites, torch.tensor([1000.0, 0.0]), torch.full((1, sum(site.width for site in sites)), 0.5))
    pipe.fuse_qkv_projections()
    with pytest.raises(InputError, match=r"attn1.to_q' does not run .* call unfuse_qkv_projections\(\) first"):
        load_mask(pipe, mask)
    pipe.unfuse_qkv_projections()
    load_mask(pipe, mask)
