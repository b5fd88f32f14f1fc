"""The linear layers and convolutions of a model, in the order in which the data meets them.

A model lists its parts in the order in which they were made. That is not always the order in which they run: U-Nets of
diffusers list `mid_block` after `up_blocks` and a block's attentions before its resnets. Some transformers list the
embedding of the latents after that of the timestep or the text.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

from torch import nn

from stereoclinic.errors import InputError

#: What embeds the latents, and what ends a network that lists it early, in diffusers' denoisers.
_EMBEDS_LATENTS = ("conv_in", "x_embedder", "all_x_embedder", "pos_embed", "patch_embed", "img_in", "visual_embeddings")
_ENDS = ("all_final_layer",)
_WRAPPERS = {"base_layer", "_orig_mod"}  # peft's, and torch.compile's


@dataclass(frozen=True)
class Layer:
    """One weight of a linear layer or convolution; an adapter's weights have the name of the layer that they adapt."""

    name: str  # module path, without the wrappers of peft and torch.compile
    depth: float  # place among the named layers: 0 for the first that the data meets, 1 for the last
    weight: nn.Parameter  # by which a call is recognised, also under autocast


def find_layers(model: nn.Module) -> list[Layer]:
    """The linear layers and convolutions of a model, in the order in which the data meets them.

    Raises:
        InputError: The model has none, or its weights are loaded for each call (sequential offloading), so that a
            weight does not identify its layer.
    """
    found: list[tuple[str, nn.Parameter]] = []
    for path, module in _walk(model, "", set()):
        weight = module._parameters.get("weight")
        if weight is None or not (hasattr(module, "in_features") or hasattr(module, "in_channels")):
            continue
        if weight.is_meta and hasattr(module, "_hf_hook"):
            raise InputError(
                f"the weights of {type(model).__name__} are loaded call by call (sequential offloading), so that rules "
                "by layer do not find their layers; use enable_model_cpu_offload, or a composite without layers"
            )
        found.append((_public(path), weight))
    if not found:
        raise InputError(f"{type(model).__name__} has no linear layer or convolution: expected a denoiser's network")
    places = {name: place for place, name in enumerate(dict.fromkeys(name for name, _ in found))}
    last = max(len(places) - 1, 1)
    return [Layer(name, places[name] / last, weight) for name, weight in found]


def _public(path: str) -> str:
    parts = []
    for part in path.split("."):
        if part.startswith("lora_"):
            break
        if part not in _WRAPPERS:
            parts.append(part)
    return ".".join(parts)


def _walk(module: nn.Module, path: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    if id(module) in seen:
        return
    seen.add(id(module))
    yield path, module
    for name, child in _in_order(module):
        yield from _walk(child, f"{path}.{name}" if path else name, seen)


def _in_order(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Children by name: what embeds the latents; down, mid, up in a UNet; resnet, attention, resnet, ... in a block."""
    children = dict(module.named_children())
    first = [name for name in _EMBEDS_LATENTS if name in children]
    last = [name for name in _ENDS if name in children]
    names = [*first, *(name for name in children if name not in (*first, *last)), *last]
    if "mid_block" in children and "up_blocks" in children:
        names.remove("mid_block")
        names.insert(names.index("up_blocks"), "mid_block")
    children = {name: children[name] for name in names}
    if "resnets" in children and "attentions" in children:
        pairs = [
            [(f"{name}.{i}", child) for i, child in children.pop(name).named_children()]
            for name in ("resnets", "attentions")
        ]
        for pair in zip_longest(*pairs):
            yield from filter(None, pair)
    yield from children.items()
