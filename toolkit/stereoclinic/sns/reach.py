"""The UNet of a pipeline, and whether hooks would reach all of it."""

from typing import Any

from torch import nn

from stereoclinic.errors import InputError

#: Where `fuse` keeps what it replaced: a plain attribute of the denoiser.
FUSED = "_stereoclinic_fused"


def denoiser_of(target: Any) -> nn.Module:
    """The UNet of a pipeline, or the UNet itself, as it was before `torch.compile` wrapped it.

    Raises:
        InputError: There is none.
    """
    module = target if isinstance(target, nn.Module) else getattr(target, "unet", None)
    if not isinstance(module, nn.Module):
        raise InputError(
            f"cannot damp a {type(target).__name__}; expected a diffusers pipeline with a UNet, or the UNet itself"
        )
    return getattr(module, "_orig_mod", module)


def check_open(target: Any) -> None:
    """Refuse a denoiser that hooks would not reach, or that has a mask fused in.

    Raises:
        InputError: Says which, and what to do instead.
    """
    module = target if isinstance(target, nn.Module) else getattr(target, "unet", target)
    wrapped = hasattr(module, "_orig_mod")
    module = denoiser_of(target)
    for name, part in module.named_modules():
        if wrapped or hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None:
            raise InputError(
                f"{name or type(part).__name__} is compiled, and would ignore the mask; apply the mask before "
                "compiling, or fuse it"
            )
    if getattr(module, FUSED, None) is not None:
        raise InputError(
            "a mask is fused into this model; unfuse it first, then apply one mask or a composition of several"
        )
