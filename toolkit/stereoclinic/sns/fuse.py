"""Folds a mask into weights: an ordinary model, without hooks, that does what the hooked one does.

    W (s a + (1 - s) r) + b   =   (W s) a  +  (b + W ((1 - s) r))

A factor scales a column of the site's weight, and a root adds to its bias. Weights are folded in float32 (or wider, if
they are) and rounded once. Only damped columns change; their originals are kept in a plain attribute of the denoiser,
and `unfuse` restores them bit for bit.

What differs from call to call cannot be folded: timesteps, halves of a guided batch, images. Neither can a root at a
convolution, because padding with zeros makes its share differ at the borders.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from stereoclinic.errors import InputError, first_line
from stereoclinic.io.files import whole_folder
from stereoclinic.pipelines.model import network_of
from stereoclinic.pipelines.sites import by_layer, layer_at
from stereoclinic.sns.compat import FUSED, check_fits
from stereoclinic.sns.damp import by_channel, effective, is_damped
from stereoclinic.sns.mask import NeuronMask

#: Weights that can be folded; float8 and integers would be rounded beyond use.
_FOLDED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_COMMAND = "`stereo mask RELEVANCE --until 0 -o one.pt`"
_ALIKE = f"make it with --until 0 ({_COMMAND})"


@dataclass
class FoldedLayer:
    """One layer with a mask folded in: what a denoiser keeps of it, and what `export` writes differences of."""

    tables: list[Tensor]  # the factor (C,), and the offset (C,) if the bias changes
    columns: Tensor  # (n,) int64, the damped ones
    weights: tuple[Tensor, Tensor]  # original and folded columns, (out, n, ...) of the weight's dtype, on the CPU
    biases: tuple[Tensor, Tensor] | None  # original and folded, (out,)

    def is_in(self, layer: Any) -> bool:
        """Whether a layer has the folded values still."""
        pairs = [(layer.weight[:, self.columns.to(layer.weight.device)], self.weights[1])]
        pairs += [] if self.biases is None else [(layer.bias, self.biases[1])]
        return all(torch.equal(now.detach().cpu(), folded.to(now.dtype)) for now, folded in pairs)

    @torch.no_grad()
    def write(self, layer: Any, folded: bool) -> None:
        """Give a layer the folded values, or the original ones."""
        weight = layer.weight
        weight[:, self.columns.to(weight.device)] = self.weights[folded].to(weight.device, weight.dtype)
        if self.biases is not None:
            layer.bias.copy_(self.biases[folded])


def is_fusable(mask: NeuronMask) -> str | None:
    """Why a mask cannot be folded into weights, and what to do instead; None if it can."""
    reason = obstacle(mask)
    return None if reason is None else f"{reason}, or apply it with hooks (load_mask)"


def obstacle(mask: NeuronMask) -> str | None:
    """The same without hooks as the way out."""
    if mask.allocates:
        groups = ", ".join(mask.groups)
        return (
            f"it allocates images to {groups}, but weights serve all images; make a balancing mask with --until 0"
            f" ({_COMMAND}), or take one group's (mask.group(name), --group NAME)"
        )
    if mask.branch != "both":
        return (
            "it damps only the conditional half of guidance, but weights serve both halves; make it damp both"
            " (`stereo mask FILE --branch both -o both.pt`)"
        )
    damped = mask.factors < 1  # (T, N)
    if not damped.any():
        return None
    if mask.bin_edges[-1] > 0:
        last = mask.bin_edges[-1]
        return f"it damps no timesteps below {last:g}, but weights serve all of them; {_ALIKE}"
    if (mask.factors != mask.factors[0]).any():
        return f"its factors differ between timesteps, but weights serve all of them; {_ALIKE}"
    if mask.roots is None:
        return None
    if ((mask.roots != mask.roots[0]) & damped).any():
        return "its roots differ between timesteps; make it with the same roots in each bin"
    for site, span in mask.spans():
        if site.dim == 1 and ((mask.roots[0, span] != 0) & damped[0, span]).any():
            return (
                f"it has a root at the convolution {site.name!r}, whose padding with zeros makes the root's share"
                " differ at the borders; make it with root zero, or of linear layers alone"
            )
    return None


def fuse(pipe: Any, mask: NeuronMask, strength: float = 1.0, force: bool = False) -> None:
    """Fold a mask into the weights of a pipeline's denoiser. Fusing the same again changes nothing.

    Fuse LoRAs first: one that is loaded later adds to the layer's output from activations that are not damped.

    Args:
        pipe: A diffusers pipeline or its denoiser.
        mask: A plain one, the same at all timesteps and on both branches; see `is_fusable`.
        strength: Scales the damping, from 0 (none) to 1 (as in the mask).
        force: Accept a model whose weights differ from those the mask was made for.

    Raises:
        InputError: The mask cannot be folded or does not fit, another is fused, masks are applied as hooks, strength is
            out of range, or a layer cannot take it (it carries a LoRA, is quantised, has no bias or no weights in
            memory). Nothing is changed then.
    """
    tables = effective(mask, strength)
    reason = is_fusable(mask)
    if reason is not None:
        raise InputError(f"this mask cannot be fused: {reason}")
    network = network_of(pipe)
    check_fits(mask, network, True)
    changes = damped_channels(mask, network, tables)
    fused = _fused(network)
    if fused is not None:
        if _same(changes, {name: layer.tables for name, layer in fused.items()}):
            return
        raise InputError(
            "another mask, or strength, is fused already; unfuse it first, or compose the masks and fuse that"
        )
    if is_damped(network):
        raise InputError(
            "masks are applied to this model as hooks, and would damp on top of what is fused; unload_mask(pipe), or "
            "leave the suppress block, first"
        )
    check_fits(mask, network, force)
    layers = {name: fold(name, network, *tables) for name, tables in changes.items()}
    for name, layer in layers.items():
        layer.write(layer_at(network, name), folded=True)
    setattr(network, FUSED, layers)


def unfuse(pipe: Any) -> None:
    """Restore the weights that `fuse` changed, bit for bit.

    If the model was cast meanwhile, they are what the cast would have made of them.

    Raises:
        InputError: No mask is fused, or its weights have changed since; nothing is changed then.
    """
    network = network_of(pipe)
    fused = _fused(network)
    if fused is None:
        raise InputError("no mask is fused into this model; fuse one with fuse(pipe, mask)")
    for name, layer in fused.items():
        if not layer.is_in(layer_at(network, name)):
            raise InputError(
                f"weights of {name!r} have changed since a mask was fused into them (by training, or a LoRA fused on "
                "top); undo that first, or open the model again"
            )
    for name, layer in fused.items():
        layer.write(layer_at(network, name), folded=False)
    delattr(network, FUSED)


def is_fused(pipe: Any) -> bool:
    """Whether a mask is fused into a pipeline's denoiser, or the denoiser."""
    return _fused(network_of(pipe)) is not None


def save_fused(pipe: Any, folder: str | Path, beside: Sequence[Path] = (), **options: Any) -> None:
    """Write a pipeline with a fused mask as a diffusers folder, which diffusers opens without this package.

    It is written under a temporary name, and renamed when it is complete: an interrupted run leaves what was there.

    Args:
        pipe: A diffusers pipeline with a denoiser that a mask was fused into.
        folder: Must not exist, or be empty.
        beside: Files and folders to copy into it.
        **options: Given to diffusers' `save_pretrained`: safe_serialization, variant.

    Raises:
        InputError: No mask is fused, the folder holds something or cannot be written, or the pipeline carries a LoRA.
    """
    folder = Path(folder)
    if isinstance(pipe, nn.Module) or not hasattr(pipe, "save_pretrained"):
        raise InputError(f"cannot save a {type(pipe).__name__}; expected a diffusers pipeline")
    if not is_fused(pipe):
        raise InputError("no mask is fused into this pipeline, so its weights are untreated; fuse(pipe, mask) first")
    for part, component in pipe.components.items():
        if isinstance(component, nn.Module) and any(hasattr(module, "base_layer") for module in component.modules()):
            raise InputError(
                f"the pipeline's {part} has a LoRA, whose folder plain diffusers would not open; "
                "pipe.unload_lora_weights() first"
            )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not an empty folder; choose another")
    folder = folder.absolute()
    with whole_folder(folder) as temporary:
        try:
            pipe.save_pretrained(temporary, **options)
            for path in beside:
                (shutil.copytree if path.is_dir() else shutil.copyfile)(path, temporary / path.name)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            raise InputError(f"{folder} cannot be written ({reason}); choose another folder") from error


def _fused(network: nn.Module) -> dict[str, FoldedLayer] | None:
    return getattr(network, FUSED, None)


def damped_channels(mask: NeuronMask, network: nn.Module, tables: list[Tensor]) -> dict[str, list[Tensor]]:
    """Damped layer -> its factor (C,), and its offset if that is not zero, of tables that are the same in each bin."""
    changes: dict[str, list[Tensor]] = {}
    for name, sites in by_layer(mask.sites).items():
        factor, *offset = by_channel([table[:1] for table in tables], sites, network)
        if (factor < 1).any():
            changes[name] = [factor[0], *(table[0] for table in offset if (table != 0).any())]
    return changes


def _same(a: dict[str, list[Tensor]], b: dict[str, list[Tensor]]) -> bool:
    return a.keys() == b.keys() and all(
        len(a[name]) == len(b[name]) and all(map(torch.equal, a[name], b[name])) for name in a
    )


def fold(name: str, network: nn.Module, factor: Tensor, offset: Tensor | None = None) -> FoldedLayer:
    """What a layer becomes; it is not changed yet."""
    layer: Any = layer_at(network, name)
    _check_layer(name, network, layer, offset)
    columns = (factor < 1).nonzero().flatten()
    weight = layer.weight.detach()
    original = weight[:, columns.to(weight.device)].cpu()
    wide = torch.promote_types(weight.dtype, torch.float32)
    scale = factor[columns].to(wide).view(1, -1, *[1] * (original.ndim - 2))
    weights = original, (original.to(wide) * scale).to(weight.dtype)
    if offset is None:
        return FoldedLayer([factor], columns, weights, None)
    bias = layer.bias.detach().cpu().clone()
    folded_bias = (bias.to(wide) + original.to(wide) @ offset[columns].to(wide)).to(bias.dtype)
    return FoldedLayer([factor, offset], columns, weights, (bias, folded_bias))


def _check_layer(name: str, network: nn.Module, layer: Any, offset: Tensor | None) -> None:
    if hasattr(network.get_submodule(name), "base_layer"):
        raise InputError(
            f"site {name!r} has a LoRA, whose part would not be damped; merge it first (pipe.fuse_lora(), "
            "pipe.unload_lora_weights(), then fuse with force, as the weights differ), or apply the mask as hooks"
        )
    weight: Any = getattr(layer, "weight", None)
    plain = isinstance(layer, nn.Linear | nn.Conv2d) and getattr(layer, "groups", 1) == 1
    if not plain or type(weight) not in (Tensor, nn.Parameter) or weight.dtype not in _FOLDED:
        raise InputError(
            f"site {name!r} is a {type(layer).__name__} of {getattr(weight, 'dtype', 'packed')} weights, which cannot"
            " be folded into; fuse before it is quantised, or apply the mask as hooks, with load_mask or suppress"
        )
    if weight.is_meta:
        raise InputError(f"the weight of {name!r} is on the 'meta' device; fuse before the model is offloaded")
    if offset is not None and layer.bias is None:
        raise InputError(
            f"site {name!r} has no bias that its root could be folded into; make the mask with root zero, or apply it "
            "as hooks"
        )
