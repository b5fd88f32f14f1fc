"""Writes a mask for programs that know nothing of masks: as LoRA, as full differences, or as (IA)^3 of peft.

    W diag(s) - W   =   -W[:, J] diag(1 - s_J)   =   up @ down        J: the n damped channels of a layer

    lora    up (out, r) and down (r, in, ...); r is n times the size of the kernel, or out if that is less
    diff    the difference itself, and with roots that of the bias
    ia3     s

A LoRA is linear in its strength, and so is a mask: at strength x both give W diag(1 - x (1 - s)).

Layers are named as those who read the file expect. U-Nets have kohya's names (`lora_unet_..._to_out_0.lora_up.weight`
and `.alpha`), transformers those of diffusers (`transformer....to_out.0.lora_B.weight`), which have no alpha: it is r.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor, nn

from stereoclinic.errors import InputError
from stereoclinic.io.files import whole_folder, write_whole
from stereoclinic.pipelines.model import network_of
from stereoclinic.pipelines.sites import layer_at
from stereoclinic.sns.compat import check_fits
from stereoclinic.sns.damp import effective
from stereoclinic.sns.fuse import damped_channels, fold, is_fused, obstacle
from stereoclinic.sns.mask import NeuronMask

FORMATS = ("lora", "diff", "ia3", "checkpoint")
_OTHERWISE = "use --format ia3 (peft) or --format checkpoint"


@dataclass(frozen=True)
class Names:
    """How the layers of a kind of denoiser are named in a file, and who reads it."""

    paths: str  # pattern of the module paths that all readers know
    readers: dict[str, str]  # format -> who reads it
    kohya: bool = False

    def key(self, path: str) -> str:
        """A layer's name, without the ending that says which tensor of it."""
        if not re.fullmatch(self.paths, path):
            raise InputError(
                f"layer {path!r} has no name in a {' or '.join(self.readers)} file, so {self.readers['lora']} would"
                f" leave it out; {_OTHERWISE}"
            )
        return f"lora_unet_{path.replace('.', '_')}" if self.kohya else f"transformer.{path}"

    @property
    def up(self) -> str:
        """How the name of a LoRA's first factor ends."""
        return "lora_up.weight" if self.kohya else "lora_B.weight"

    @property
    def down(self) -> str:
        """How that of its second factor ends."""
        return "lora_down.weight" if self.kohya else "lora_A.weight"


_JOINT = r"transformer_blocks\.\d+\.(attn2?\.(to_out\.0|to_add_out)|ff(_context)?\.net\.(0\.proj|2))"
_UNET = Names(
    r"((down|up)_blocks\.\d+|mid_block)\.(resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)|(down|up)samplers\.0"
    r"\.conv|attentions\.\d+\.(proj_in|proj_out|transformer_blocks\.\d+\.(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj"
    r"|2))))",
    {"lora": "diffusers, ComfyUI, A1111 and Forge", "diff": "ComfyUI, A1111 and Forge"},
    kohya=True,
)
_READERS = {"lora": "diffusers, ComfyUI and Forge", "diff": "ComfyUI and Forge"}
NAMES: Mapping[str, Names] = {
    "UNet2DConditionModel": _UNET,
    "SD3Transformer2DModel": Names(_JOINT, _READERS),
    "FluxTransformer2DModel": Names(rf"{_JOINT}|single_transformer_blocks\.\d+\.proj_out", _READERS),
}
_OTHER = Names(".+", {"lora": "diffusers"})
#: Width of a U-Net's text states -> the base model as kohya names it; A1111 lists a file by it.
_BASES = {768: "sd_v1", 1024: "sd_v2", 2048: "sdxl_base_v1-0"}


@dataclass(frozen=True)
class Exported:
    """What was written.

    Args:
        path: The file; for (IA)^3 a folder.
        readers: Who reads it.
        layers: How many are changed.
        ranks: By layer, of a LoRA.
        lost: By layer, what a truncated LoRA leaves out: the Frobenius norm of the rest over that of the difference.
        lost_of_all: The same for all layers together.
    """

    path: Path
    readers: str
    layers: int
    ranks: dict[str, int]
    lost: dict[str, float]
    lost_of_all: float


def export(
    pipe: Any,
    mask: NeuronMask,
    path: str | Path,
    format: Literal["lora", "diff", "ia3"] = "lora",
    strength: float = 1.0,
    rank: int | None = None,
    force: bool = False,
) -> Exported:
    """Write a mask as a LoRA, as full differences, or as (IA)^3 of peft; the pipeline is not changed.

    Args:
        pipe: The pipeline that the mask was made for, or its denoiser.
        mask: A plain one, the same at all timesteps and on both branches; `static_mask` makes the nearest.
        path: A .safetensors file; for ia3 a new folder.
        format: lora, diff or ia3.
        strength: Of the damping, from 0 (none) to 1 (as in the mask); what reads the file may scale it again.
        rank: Largest rank of a LoRA's layers, which are truncated by SVD; None for exact ones.
        force: Accept a model whose weights differ from those the mask was made for.

    Raises:
        InputError: The mask cannot leave this package or does not fit, an argument is out of range, a layer has no name
            in such a file, a LoRA or (IA)^3 cannot hold the mask's roots, or the file cannot be written.
    """
    path, network = Path(path), network_of(pipe)
    tables = effective(mask, strength)
    check_exportable(mask, path, format, rank)
    if is_fused(network):
        raise InputError("a mask is fused into this model, so its weights are not the original ones; unfuse it first")
    check_fits(mask, network, force)
    changes = damped_channels(mask, network, tables)
    if not changes:
        raise InputError(f"the mask damps nothing at strength {strength:g}; there is nothing to export")
    if format != "diff" and (rooted := [name for name, channels in changes.items() if len(channels) > 1]):
        raise InputError(
            f"layer {rooted[0]!r} is damped toward a root, which changes its bias, and a {format} file holds no biases;"
            " use --format diff, --format checkpoint, or a mask with root zero"
        )
    if format == "ia3":
        return _write_ia3(path, mask, network, {name: channels[0] for name, channels in changes.items()})
    names = _names_of(pipe, network, format)
    keys = {name: names.key(name) for name in changes}
    parts = {name: _difference(name, network, channels) for name, channels in changes.items()}
    write = _as_lora if format == "lora" else _as_differences
    written = write(parts, names, rank)
    tensors = {}
    for name, layer in written.layers.items():
        dtype = network.get_submodule(name).get_parameter("weight").dtype
        for ending, tensor in layer.items():
            tensors[f"{keys[name]}.{ending}"] = tensor.to(dtype if tensor.ndim else torch.float32).contiguous()
    header = _header(mask, network, format, strength)
    write_whole(path, lambda temporary: temporary.write_bytes(safetensors.torch.save(tensors, header)))
    lost, whole = torch.tensor(list(written.norms.values()), dtype=torch.float64).norm(dim=0).tolist()
    by_layer = {name: left_out / norm if norm else 0.0 for name, (left_out, norm) in written.norms.items()}
    return Exported(path, names.readers[format], len(changes), written.ranks, by_layer, lost / whole if whole else 0.0)


def check_exportable(mask: NeuronMask, path: Path, format: str, rank: int | None) -> None:
    """Refuse what can be refused before a model is opened; as `export`, and for checkpoints of `fuse`."""
    if format not in FORMATS:
        raise InputError(f"--format {format!r}: expected {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    if rank is not None and (format != "lora" or rank < 1):
        raise InputError(f"--rank {rank}: expected 1 or more, with --format lora")
    folder = format in ("ia3", "checkpoint")
    if not folder and path.suffix.lower() != ".safetensors":
        raise InputError(f"{path}: expected a file name ending in .safetensors")
    if folder and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} exists and is not an empty folder; choose another")
    if (reason := obstacle(mask)) is not None:
        raise InputError(f"this mask cannot be exported: {reason}, or export the nearest that can (--static)")


def _names_of(pipe: Any, network: nn.Module, format: str) -> Names:
    if format == "checkpoint":
        raise InputError("checkpoints are written by fuse(pipe, mask) and save_fused(pipe, folder)")
    kind = type(network).__name__
    names = NAMES.get(kind, _OTHER)
    if format not in names.readers or (names is _OTHER and "UNet" in kind):
        raise InputError(f"no names of the layers of a {kind} are known that {format} files use; {_OTHERWISE}")
    owner = getattr(pipe, "pipe", pipe)  # of a `Model`
    if format == "lora" and not isinstance(owner, nn.Module) and not hasattr(owner, "load_lora_weights"):
        raise InputError(f"{type(owner).__name__} of diffusers loads no LoRA; {_OTHERWISE}")
    return names


@dataclass(frozen=True)
class _Part:
    """What changes in a layer, in float32 or wider."""

    columns: Tensor  # (n,), which are damped
    difference: Tensor  # (out, n, ...), of these
    bias: Tensor | None  # (out,), of the bias
    width: int  # of all columns


def _difference(name: str, network: nn.Module, channels: list[Tensor]) -> _Part:
    folded = fold(name, network, *channels)
    original = folded.weights[0]
    original = original.to(torch.promote_types(original.dtype, torch.float32))
    factor, *offset = (table[folded.columns].to(original.dtype) for table in channels)
    difference = original * (factor - 1).view(1, -1, *[1] * (original.ndim - 2))
    return _Part(folded.columns, difference, original @ offset[0] if offset else None, channels[0].numel())


@dataclass(frozen=True)
class _Written:
    """Tensors by layer and by the ends of their names; ranks; norms of what is left out and of the whole."""

    layers: dict[str, dict[str, Tensor]]
    ranks: dict[str, int] = field(default_factory=dict)
    norms: dict[str, tuple[float, float]] = field(default_factory=dict)


def _as_differences(parts: Mapping[str, _Part], names: Names, rank: int | None) -> _Written:
    layers = {name: {"diff": _spread(part.difference, part)} for name, part in parts.items()}
    for name, part in parts.items():
        if part.bias is not None:
            layers[name]["diff_b"] = part.bias
    return _Written(layers, norms=dict.fromkeys(parts, (0.0, 0.0)))


def _as_lora(parts: Mapping[str, _Part], names: Names, rank: int | None) -> _Written:
    """One alpha for all layers, and `up` scaled to it.

    diffusers 0.42.1 loses the alphas of attention where they differ, and takes that of most layers for all.
    """
    layers, ranks, norms = {}, {}, {}
    for name, part in parts.items():
        matrix, kernel = part.difference.flatten(1), part.difference.shape[2:]
        full, left_out = min(matrix.shape), 0.0
        if rank is None or rank >= full:
            one = torch.eye(full, dtype=matrix.dtype)
            up, down = (matrix, one) if matrix.shape[1] == full else (one, matrix)
        else:
            u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
            up, down, left_out = u[:, :rank] * s[:rank], v[:rank], s[rank:].norm().item()
        ranks[name], norms[name] = up.shape[1], (left_out, matrix.double().norm().item())
        down = _spread(down.view(len(down), len(part.columns), *kernel), part)
        layers[name] = {names.down: down, names.up: up.view(*up.shape, *[1] * len(kernel))}
    if names.kohya:
        alpha = float(max(ranks.values()))
        for name, layer in layers.items():
            layer |= {names.up: layer[names.up] * (ranks[name] / alpha), "alpha": torch.tensor(alpha)}
    return _Written(layers, ranks, norms)


def _spread(some: Tensor, part: _Part) -> Tensor:
    """(rows, n, ...) of the damped columns -> (rows, width, ...), zero elsewhere."""
    whole = some.new_zeros(some.shape[0], part.width, *some.shape[2:])
    whole[:, part.columns] = some
    return whole


def _header(mask: NeuronMask, network: nn.Module, format: str, strength: float) -> dict[str, str]:
    """The metadata of the file: texts alone, as safetensors has them."""
    kept = ("axis", "model", "unet_shapes", "unet_weights", "created", "versions")
    made = {"format": format, "strength": strength, **{key: mask.metadata[key] for key in kept if key in mask.metadata}}
    header = {"format": "pt", "ss_network_module": "networks.lora", "stereoclinic": json.dumps(made, sort_keys=True)}
    base = _BASES.get(getattr(getattr(network, "config", None), "cross_attention_dim", 0))
    if base and type(network).__name__ in NAMES:
        header |= {"ss_base_model_version": base, "ss_v2": str(base == "sd_v2")}
    return header


def _write_ia3(path: Path, mask: NeuronMask, network: nn.Module, factors: Mapping[str, Tensor]) -> Exported:
    """A folder that `PeftModel.from_pretrained` opens."""
    layers = "|".join(map(re.escape, factors))  # a pattern: names in a list would also fit where a path ends so
    config = {
        "peft_type": "IA3", "base_model_name_or_path": str(mask.metadata.get("model", "")), "inference_mode": True,
        "target_modules": layers, "feedforward_modules": layers, "fan_in_fan_out": False, "init_ia3_weights": True,
    }  # fmt: skip
    tensors = dict(_ia3(network, factors))
    with whole_folder(path.absolute()) as temporary:
        (temporary / "adapter_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        (temporary / "adapter_model.safetensors").write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))
    return Exported(path, "peft", len(factors), {}, {}, 0.0)


def _ia3(network: nn.Module, factors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, factor in factors.items():
        layer: Any = layer_at(network, name)
        shape = (1, -1, 1, 1) if hasattr(layer, "in_channels") else (1, -1)
        yield f"base_model.model.{name}.ia3_l", factor.view(shape).contiguous()
