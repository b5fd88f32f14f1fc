"""Wherever a user may have put a pipeline, a watched call is its own, and the denoiser is seen as it is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import DiffusionPipeline
from peft import LoraConfig
from tests.ddtd.conftest import AXIS, close, measured
from tests.pipelines.tiny import SMALL, build
from torch import Tensor, nn

from stereoclinic.ddtd.module import locate
from stereoclinic.ddtd.trajectory import Settings
from stereoclinic.errors import InputError
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.pictures import as_tensor, draw
from stereoclinic.pipelines.recognise import network_of
from stereoclinic.pipelines.sites import find_sites
from stereoclinic.pipelines.watch import Walk
from stereoclinic.prompts import generator, load_prompts, with_seeds

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


ENVIRONMENTS: dict[str, Callable[[DiffusionPipeline], Any]] = {
    "model offload": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential offload": sequential_offload,
    "attention slicing": lambda pipe: pipe.enable_attention_slicing(1),
    "gradient checkpointing": checkpointing,
    "VAE slicing": lambda pipe: pipe.vae.enable_slicing(),
    "VAE tiling": lambda pipe: pipe.vae.enable_tiling(),
    "channels last": lambda pipe: denoiser_of(pipe).to(memory_format=torch.channels_last),
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
        locate(prepared("sd1", each), AXIS, SAMPLES, Settings(steps=2, bins=1), accelerator="cpu", devices=1)
        for each in (ENVIRONMENTS["model offload"], lambda _: None)
    ]
    torch.testing.assert_close(found[0].relevance_sum, found[1].relevance_sum)
    assert found[0].metadata["unet_weights"] == found[1].metadata["unet_weights"]


def test_weights_that_come_and_go_by_layer_have_no_digest() -> None:
    model = prepared("sd1", sequential_offload)
    with pytest.raises(InputError, match="'meta' device; load or move the model into memory"):
        locate(model, AXIS, SAMPLES, Settings(steps=2, bins=1), accelerator="cpu", devices=1)


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
