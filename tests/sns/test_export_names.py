"""Names of layers in exported files, against what diffusers, ComfyUI and A1111 publish of theirs.

ComfyUI (`model_lora_keys_unet`) and A1111 (`convert_diffusers_name_to_compvis`) turn a name in a file into that of a
layer in the original layout. Their rules are written down here as facts. That they are right is told by diffusers,
which has converters of its own from that layout: name in the file -> original layer -> diffusers' path is the identity.
"""

import re
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.loaders import lora_conversion_utils as published
from diffusers.loaders import single_file_utils as single
from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.pipelines.sites import find_sites
from stereoclinic.sns.export import NAMES

RESNET = {
    "conv1": "in_layers.2", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
XL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048,
    "use_linear_projection": True,
}  # fmt: skip
#: In a block of SD3, of FLUX with both streams, and of FLUX with one; FLUX's single blocks have one name alone.
SD3 = {
    "attn.to_out.0": "x_block.attn.proj", "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj", "ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1", "ff_context.net.2": "context_block.mlp.fc2",
}  # fmt: skip
FLUX = {
    "attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj", "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2", "ff_context.net.0.proj": "txt_mlp.0", "ff_context.net.2": "txt_mlp.2",
}  # fmt: skip


def original(key: str) -> str:
    """The original layer of a U-Net with two layers per block, by its name in a file; both projects agree."""
    match = re.fullmatch(r"lora_unet_(down|up)_blocks_(\d)_(attentions|resnets)_(\d)_(.+)", key)
    if match:
        side, i, kind, j, rest = match.groups()
        place = f"input_blocks.{1 + 3 * int(i) + int(j)}" if side == "down" else f"output_blocks.{3 * int(i) + int(j)}"
        return f"{place}.{int(kind == 'attentions')}.{RESNET.get(rest, rest)}"
    match = re.fullmatch(r"lora_unet_mid_block_(attentions|resnets)_(\d)_(.+)", key)
    assert match is not None, key
    kind, j, rest = match.groups()
    return f"middle_block.{1 if kind == 'attentions' else 2 * int(j)}.{RESNET.get(rest, rest)}"


@pytest.mark.parametrize("config", [{}, XL], ids=["sd1", "sdxl"])
def test_a_unets_names_lead_to_the_layers_that_diffusers_finds_for_the_original_ones(config):
    with torch.device("meta"):
        network = UNet2DConditionModel(**config)
    names = NAMES[type(network).__name__]
    paths = [site.name for site in find_sites(network)]
    others = [path for path, _ in network.named_modules() if re.fullmatch(names.paths, path) and "samplers" not in path]
    assert set(paths) < set(others) and len(paths) > 60
    keys = {path: names.key(path) for path in others}
    assert len(set(keys.values())) == len(keys)
    layers = {path: original(key).replace(".", "_") for path, key in keys.items()}
    for path, layer in layers.items():
        # One at a time: it takes input_blocks_10 for a part of input_blocks_1.
        file = {f"lora_unet_{layer}.lora_down.weight": torch.zeros(1)}
        (name,) = published._maybe_map_sgm_blocks_to_diffusers(file, network.config)
        assert path_of(published._convert_unet_lora_key(name)) == path
    # And the names as they are, without the original layout in between.
    direct = {path_of(published._convert_unet_lora_key(f"{key}.lora_down.weight")) for key in keys.values()}
    assert direct == set(others)


def path_of(name: str) -> str:
    """The module path of a name in diffusers' old form."""
    name = name.replace(".processor.", ".").removesuffix(".weight").removesuffix(".down").replace("_lora", "")
    return name.removesuffix(".lora") + (".0" if name.endswith("to_out") else "")


class Originals(dict[str, Tensor]):
    """A checkpoint in the original layout that has every name; the number in a tensor says which."""

    def __init__(self, names: list[str]) -> None:
        super().__init__({name: torch.zeros(1) for name in names})
        self.asked: list[str] = []

    def __missing__(self, key: str) -> Tensor:
        return torch.zeros(1, 1)

    def pop(self, key: str, *_: Any) -> Tensor:  # type: ignore[override]
        self.asked.append(key)
        return torch.full((7 * 3072 if "linear1" in key else 18, 1), len(self.asked) - 1.0)


def test_names_of_sd3_lead_to_the_layers_that_diffusers_makes_of_the_original_ones():
    with torch.device("meta"):
        network = SD3Transformer2DModel(num_layers=3, dual_attention_layers=(0, 1, 2), qk_norm="rms_norm")
    blocks = [f"joint_blocks.{i}.{part}" for i in range(3) for part in ("x_block.attn2.ln_q", "x_block.attn.ln_q")]
    kept = Originals(blocks)
    made = single.convert_sd3_transformer_checkpoint_to_diffusers(kept)
    check_joint(network, {"transformer_blocks": ("joint_blocks", SD3)}, made, kept.asked)


def test_names_of_flux_lead_to_the_layers_that_diffusers_makes_of_the_original_ones():
    with torch.device("meta"):
        network = FluxTransformer2DModel(num_layers=2, num_single_layers=3)
    kept = Originals([f"double_blocks.{i}" for i in range(2)] + [f"single_blocks.{i}" for i in range(3)])
    made = single.convert_flux_transformer_checkpoint_to_diffusers(kept)
    tables = {
        "transformer_blocks": ("double_blocks", FLUX),
        "single_transformer_blocks": ("single_blocks", {"proj_out": "linear2"}),
    }
    check_joint(network, tables, made, kept.asked)


def check_joint(
    network: Any, tables: dict[str, tuple[str, dict[str, str]]], made: dict[str, Tensor], asked: list[str]
) -> None:
    """ComfyUI knows every name, and takes it for the layer that diffusers makes of the original one."""
    names = NAMES[type(network).__name__]
    paths = {site.layer for site in find_sites(network)}
    known = {path for path, _ in network.named_modules() if re.fullmatch(names.paths, path)}
    assert paths <= known
    for path in known:
        blocks, i, rest = path.split(".", 2)
        to, table = tables[blocks]
        assert names.key(path) == f"transformer.{blocks}.{i}.{rest}"
        assert asked[int(made[f"{path}.weight"].flatten()[0])] == f"{to}.{i}.{table[rest]}.weight"


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("UNet2DConditionModel", "time_embedding.linear_1"),
        ("UNet2DConditionModel", "down_blocks.0.attentions.0.transformer_blocks.0.attn3.to_q"),
        ("SD3Transformer2DModel", "norm_out.linear"),  # ComfyUI would swap its halves
        ("FluxTransformer2DModel", "single_transformer_blocks.0.proj_mlp"),
    ],
)
def test_a_path_that_is_not_known_is_refused(kind, path):
    with pytest.raises(InputError, match=rf"layer '{path}' has no name in a lora or diff file, so"):
        NAMES[kind].key(path)
