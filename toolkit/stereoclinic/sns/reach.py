"""Whether hooks would reach all of a denoiser."""

from typing import Any

from stereoclinic.errors import InputError
from stereoclinic.pipelines.recognise import network_of, outer_network

#: Where `fuse` keeps what it replaced: a plain attribute of the denoiser.
FUSED = "_stereoclinic_fused"


def check_open(target: Any) -> None:
    """Refuse a denoiser that hooks would not reach, or that has a mask fused in.

    Raises:
        InputError: Says which, and what to do instead.
    """
    wrapped = hasattr(outer_network(target), "_orig_mod")
    module = network_of(target)
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
