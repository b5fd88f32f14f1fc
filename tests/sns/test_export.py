"""Exporting: what reads the file draws the hooked model's picture, and what cannot hold a mask says so."""

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from tests.pipelines.table import opened, scale
from tests.sns.conftest import draw, random_mask, run, same_bits, state_of, static_mask

from stereoclinic.errors import InputError
from stereoclinic.io.digest import shapes_digest, weights_digest
from stereoclinic.pipelines import open_pipeline
from stereoclinic.pipelines.model import network_of
from stereoclinic.pipelines.sites import Site, find_sites
from stereoclinic.sns.damp import suppress
from stereoclinic.sns.export import export
from stereoclinic.sns.fuse import fuse, unfuse
from stereoclinic.sns.mask import NeuronMask

TEXTS = ["a photo of a doctor"]


def mask_for(network: Any, **changes: Any) -> NeuronMask:
    """Static, over all sites of any denoiser."""
    sites = find_sites(network)
    g = torch.Generator().manual_seed(0)
    shape = (1, sum(site.width for site in sites))
    factors = torch.where(torch.rand(shape, generator=g) < 0.4, torch.rand(shape, generator=g), 1.0)
    return NeuronMask(sites, torch.tensor([1001.0, 0.0]), factors, **changes)


def picture(pipe: Any, **options: Any) -> torch.Tensor:
    """Latents of a call in few steps."""
    generator = [torch.Generator().manual_seed(0)]
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompt=TEXTS, num_inference_steps=2, output_type="latent", generator=generator, **options).images


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).detach().double().norm() / b.detach().double().norm()).item()


def check_lora(pipe: Any, mask: NeuronMask, file: Any, **options: Any) -> None:
    """Loaded by diffusers it does at 1 and 0.5 what the hooks do; unloaded, nothing is left."""
    state, bare = state_of(network_of(pipe)), picture(pipe, **options)
    hooked = {}
    for strength in (1.0, 0.5):
        with suppress(pipe, mask, strength):
            hooked[strength] = picture(pipe, **options)
    mask.export(pipe, file)
    pipe.load_lora_weights(file, adapter_name="mask")
    for strength, expected in hooked.items():
        pipe.set_adapters(["mask"], [strength])
        found = picture(pipe, **options)
        assert difference(found, expected) < 1e-5 < 1e-2 < difference(bare, expected)
    pipe.unload_lora_weights()
    assert torch.equal(picture(pipe, **options), bare)
    assert same_bits(state_of(network_of(pipe)), state)


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux", "flux2-klein", "lumina2", "qwen-image"])
def test_diffusers_draws_with_the_lora_what_it_draws_with_hooks(name, tmp_path):
    model = opened(name)
    check_lora(
        model.pipe, mask_for(model.network), tmp_path / "m.safetensors", **model.options(scale(name, model))
    )  # fmt: skip


@pytest.mark.parametrize("name", ["portraits", "portraits-flow"])
def test_and_so_with_the_embedded_models(name, tmp_path):
    pipe = open_pipeline(name, "cpu")
    check_lora(pipe, mask_for(network_of(pipe)), tmp_path / "m.safetensors", guidance_scale=2.0)


@pytest.mark.parametrize("format", ["lora", "ia3"])
def test_the_strength_of_a_file_is_that_of_the_mask(format, pipe, tmp_path):
    mask = static_mask(pipe.unet)
    with suppress(pipe, mask, 0.5):
        expected = draw(pipe, TEXTS)
    path = tmp_path / ("m.safetensors" if format == "lora" else "m")
    export(pipe, mask, path, format, strength=0.5)
    if format == "lora":
        pipe.load_lora_weights(path)
    else:
        pipe.unet = PeftModel.from_pretrained(pipe.unet, path)
    torch.testing.assert_close(draw(pipe, TEXTS), expected, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("name", ["portraits", "portraits-flow"])
def test_peft_opens_ia3_by_both_ways(name, tmp_path):
    pipe = open_pipeline(name, "cpu")
    part = "unet" if name == "portraits" else "transformer"
    network, options = getattr(pipe, part), {"guidance_scale": 2.0}
    state, bare, mask = state_of(network), picture(pipe, **options), mask_for(network)
    with suppress(pipe, mask):
        hooked = picture(pipe, **options)
    assert export(pipe, mask, tmp_path / "ia3", "ia3").layers == len({site.layer for site in mask.sites})
    setattr(pipe, part, PeftModel.from_pretrained(network, tmp_path / "ia3"))
    assert torch.equal(picture(pipe, **options), hooked)
    setattr(pipe, part, getattr(pipe, part).unload())
    assert torch.equal(picture(pipe, **options), bare) and same_bits(state_of(network), state)
    network.add_adapter(IA3Config.from_pretrained(tmp_path / "ia3"), "mask")
    missing = set_peft_model_state_dict(network, load_file(tmp_path / "ia3" / "adapter_model.safetensors"), "mask")
    assert not missing.unexpected_keys
    assert torch.equal(picture(pipe, **options), hooked)
    network.disable_adapters()
    assert torch.equal(picture(pipe, **options), bare)


def layers_of(file: Any, network: Any, prefix: str) -> dict[str, dict[str, torch.Tensor]]:
    """What a file holds by module path, found from the paths of the model and not from the exporter's own names."""
    by_key = {
        (prefix + path.replace(".", "_") if prefix == "lora_unet_" else prefix + path): path
        for path, _ in network.named_modules()
    }
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(file).items():
        key = max((key for key in by_key if name.startswith(f"{key}.")), key=len)
        found.setdefault(by_key[key], {})[name.removeprefix(f"{key}.")] = tensor
    return found


@pytest.mark.parametrize("rooted", [False, True])
def test_full_differences_added_to_the_weights_are_the_fused_model(rooted, pipe, tmp_path):
    """As ComfyUI and A1111 add `diff` to the weight, and `diff_b` to the bias."""
    mask, file = static_mask(pipe.unet, rooted=rooted), tmp_path / "m.safetensors"
    export(pipe, mask, file, "diff")
    added = state_of(pipe.unet)
    for path, layer in layers_of(file, pipe.unet, "lora_unet_").items():
        assert layer.keys() == ({"diff", "diff_b"} if rooted else {"diff"})
        added[f"{path}.weight"] += layer["diff"]
        added[f"{path}.bias"] += layer.get("diff_b", 0)
    fuse(pipe, mask)
    for name, value in state_of(pipe.unet).items():
        torch.testing.assert_close(added[name], value, atol=1e-12, rtol=1e-12)
    unfuse(pipe)


def test_what_a_truncated_lora_loses_is_said_and_more_rank_loses_less(pipe, tmp_path):
    mask, file, losses = static_mask(pipe.unet), tmp_path / "m.safetensors", []
    export(pipe, mask, file, "diff")
    whole = {path: layer["diff"] for path, layer in layers_of(file, pipe.unet, "lora_unet_").items()}
    for rank in (1, 2, 4, 8, None):
        made = export(pipe, mask, file, rank=rank)
        rest = {}
        for path, layer in layers_of(file, pipe.unet, "lora_unet_").items():
            up, down = layer["lora_up.weight"].flatten(1), layer["lora_down.weight"].flatten(1)
            kept = (up @ down).view_as(whole[path]) * layer["alpha"] / len(down)
            rest[path] = whole[path] - kept
            assert made.ranks[path] == len(down) <= (rank or 8)
            assert made.lost[path] == pytest.approx(float(rest[path].norm() / whole[path].norm()), abs=1e-12)
        norm = sum(float(each.square().sum()) for each in rest.values()) ** 0.5
        assert made.lost_of_all == pytest.approx(
            norm / sum(float(each.square().sum()) for each in whole.values()) ** 0.5, abs=1e-12
        )
        losses.append(made.lost_of_all)
    assert all(more > less for more, less in pairwise(losses[:-1])) and losses[0] > 0.3
    assert losses[-1] == 0 and losses[-2] < 1e-12  # the widest layer has eight outputs


def test_a_file_has_one_alpha_the_weights_precision_and_says_what_it_is(pipe, unet, tmp_path):
    """diffusers mixes up the alphas of attention where layers have several."""
    unet.half()
    mask = static_mask(unet, metadata={"axis": "gender", "unet_weights": weights_digest(unet)})
    made = mask.export(pipe, tmp_path / "m.safetensors", strength=0.5)
    tensors = load_file(tmp_path / "m.safetensors")
    assert len(set(made.ranks.values())) > 1
    assert {float(value) for name, value in tensors.items() if name.endswith(".alpha")} == {max(made.ranks.values())}
    for name, value in tensors.items():
        assert value.dtype == (torch.float32 if name.endswith(".alpha") else torch.float16)
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        header = file.metadata()
    said = json.loads(header["stereoclinic"])
    assert (said["axis"], said["strength"], said["format"]) == ("gender", 0.5, "lora")
    assert said["unet_weights"] == weights_digest(unet)
    with suppress(unet, mask, 0.5):
        expected = run(unet, inputs_of(unet))
    pipe.load_lora_weights(tmp_path / "m.safetensors")
    assert difference(run(unet, inputs_of(unet)), expected) < 5e-3


def inputs_of(unet: Any) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    shapes = (2, unet.config.in_channels, 8, 8), (2, 3, unet.config.cross_attention_dim)
    return tuple(torch.randn(shape, generator=g, dtype=unet.dtype) for shape in shapes)  # type: ignore[return-value]


def test_exporting_leaves_the_pipeline_as_it_was(pipe, tmp_path):
    before, mask = state_of(pipe.unet), static_mask(pipe.unet)
    for format, name in (("lora", "a.safetensors"), ("diff", "b.safetensors"), ("ia3", "c")):
        export(pipe, mask, tmp_path / name, format)
    assert same_bits(state_of(pipe.unet), before)


@pytest.mark.parametrize(
    ("changes", "options", "says"),
    [
        ({"branch": "conditional"}, {}, r"only the conditional half.*--branch both.*nearest that can \(--static\)"),
        ({"bin_edges": torch.tensor([1000.0, 600.0, 1.0])}, {}, "no timesteps below 1,.*--until 0.*--static"),
        ({}, {"strength": 1.5}, "strength 1.5; expected 0"),
        ({}, {"strength": 0.0}, "damps nothing at strength 0; there is nothing to export"),
        ({}, {"format": "gguf"}, "--format 'gguf': expected lora, diff, ia3 or checkpoint"),
        ({}, {"format": "checkpoint", "path": "new"}, r"written by fuse\(pipe, mask\) and save_fused"),
        ({}, {"rank": 0}, "--rank 0: expected 1 or more"),
        ({}, {"rank": 4, "format": "diff"}, "--rank 4: .*with --format lora"),
        ({}, {"path": "m.pt"}, r"m.pt: expected a file name ending in .safetensors"),
        ({}, {"path": "full", "format": "ia3"}, "full exists and is not an empty folder"),
        ({}, {"path": "no/m.safetensors"}, "no/m.safetensors cannot be written"),
        ({"metadata": {"unet_weights": "0" * 64}}, {}, "mask was made for other weights"),
        ({"metadata": {"unet_shapes": "0" * 64}}, {}, "mask was made for a model of other shapes"),
    ],
)  # fmt: skip
def test_what_is_refused_says_what_to_do_and_writes_nothing(changes, options, says, pipe, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").write_text("mine")
    path = tmp_path / options.pop("path", "m.safetensors")
    with pytest.raises(InputError, match=says) as caught:
        export(pipe, replace(static_mask(pipe.unet), **changes), path, **options)
    assert "\n" not in str(caught.value)
    assert [each.name for each in tmp_path.iterdir()] == ["full"]


def test_allocation_timesteps_and_roots_that_a_file_cannot_hold(pipe, tmp_path):
    file = tmp_path / "m.safetensors"
    for mask, says in (
        (random_mask(pipe.unet, groups=("a", "b")), "allocates images to a, b.*--group NAME"),
        (random_mask(pipe.unet), "factors differ between timesteps.*--static"),
        (
            replace(static_mask(pipe.unet), roots=torch.ones(2, random_mask(pipe.unet).factors.shape[1])),
            "root at the c",
        ),
    ):
        with pytest.raises(InputError, match=f"cannot be exported: .*{says}"):
            export(pipe, mask, file)
    rooted = static_mask(pipe.unet, rooted=True)
    for format, path in (("lora", file), ("ia3", tmp_path / "m")):
        with pytest.raises(InputError, match=f"a {format} file holds no biases; use --format diff"):
            export(pipe, rooted, path, format)
    assert not list(tmp_path.iterdir())


def test_a_layer_without_a_name_a_pipeline_without_loras_and_a_model_that_is_changed(pipe, tmp_path):
    file, site = tmp_path / "m.safetensors", Site("time_embedding.linear_2", "other", 32)
    width = pipe.unet.time_embedding.linear_2.in_features
    odd = NeuronMask([replace(site, width=width)], torch.tensor([1000.0, 0.0]), torch.zeros(1, width))
    with pytest.raises(InputError, match=r"layer 'time_embedding.linear_2' has no name.*Forge would leave it out"):
        export(pipe, odd, file)
    assert export(pipe, odd, tmp_path / "odd", "ia3").layers == 1
    fuse(pipe, mask := static_mask(pipe.unet))
    with pytest.raises(InputError, match="a mask is fused into this model"):
        export(pipe, mask, file, force=True)
    unfuse(pipe)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_out.0"], init_lora_weights=False))
    with pytest.raises(InputError, match="has a LoRA"):
        export(pipe, mask, file)
    for name, format, says in (
        ("ovis", "lora", "OvisImagePipeline of diffusers loads no LoRA; use --format ia3"),
        ("kandinsky3", "lora", "no names of the layers of a Kandinsky3UNet are known"),
        ("lumina2", "diff", "no names of the layers of a Lumina2Transformer2DModel are known that diff files use"),
    ):
        model = opened(name)
        with pytest.raises(InputError, match=says):
            export(model.pipe, mask_for(model.network), file, format)
    other = opened("sd1")
    digests = {"unet_shapes": shapes_digest(pipe.unet)}
    with pytest.raises(InputError, match="mask does not fit"):
        export(other.pipe, replace(mask, metadata=digests), file)
    assert [each.name for each in tmp_path.iterdir()] == ["odd"]
