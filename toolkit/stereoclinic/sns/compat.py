"""Whether a mask, or relevance, was made for a model: by its sites, its shapes and its weights.

Whether hooks would reach all of a denoiser.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from stereoclinic.errors import InputError
from stereoclinic.io.digest import shapes_digest, weights_digest
from stereoclinic.pipelines.arguments import inner
from stereoclinic.pipelines.model import network_of, outer_network
from stereoclinic.pipelines.sites import channels_of, layer_at
from stereoclinic.sns.mask import NeuronMask

if TYPE_CHECKING:
    from stereoclinic.ddtd.relevance import Relevance


#: Layers that `fuse_qkv_projections` makes, and those that it leaves in place and does not run.
_FUSED, _PARTS = ("to_qkv", "to_kv", "to_added_qkv"), ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


def check_fits(made: "NeuronMask | Relevance", network: nn.Module, force: bool = False) -> None:
    """Refuse a mask, or relevance, that was made for another model.

    A digest that it does not carry (one made by hand) is not compared; its sites always are. Adapters that peft put
    round layers (LoRA) are looked through: what counts is the model they were put on.

    Args:
        made: To be applied, or looked into.
        network: The denoiser.
        force: Accept other weights, and other layers around the same sites, as a few-step sibling of a model has them;
            sites that do not fit are never accepted.

    Raises:
        InputError: Says what differs.
    """
    what = "mask" if isinstance(made, NeuronMask) else "relevance"
    network = inner(network)
    for site in made.sites:
        layer = layer_at(network, site.layer)
        width = None if layer is None else channels_of(layer)
        if width is None:
            raise InputError(
                f"{what} does not fit: this {type(network).__name__} has no site {site.name!r}; use the model "
                "it was made for"
            )
        if (site.dim == 1) != hasattr(layer, "in_channels"):
            raise InputError(
                f"{what} does not fit: site {site.name!r} is of kind {site.kind} in the {what}, and a"
                f" {type(layer).__name__} in this {type(network).__name__}; use the model it was made for"
            )
        if _is_fused_away(network, site.layer):
            raise InputError(
                f"{what} does not fit: site {site.name!r} does not run while this {type(network).__name__} has its"
                " projections fused; call unfuse_qkv_projections() first"
            )
        end = site.start + site.width
        if end > width or (end < width and not site.name.endswith(f"[:{site.width}]")):
            raise InputError(
                f"{what} does not fit: site {site.name!r} has {site.width} neurons in the {what}, {width - site.start} "
                f"in this {type(network).__name__}; use the model it was made for"
            )
    if force:
        return
    bare = _Bare(network)
    made_for = made.metadata.get("unet_shapes")
    if made_for is not None and made_for != (here_shapes := shapes_digest(bare)):
        raise InputError(
            f"{what} does not fit: made for a model of other shapes (digest {_head(made_for)}, here "
            f"{_head(here_shapes)}); use the model it was made for, or force where its sites are the same"
        )
    made_for = made.metadata.get("unet_weights")
    if made_for is not None and made_for != (here_weights := weights_digest(bare)):
        raise InputError(
            f"{what} was made for other weights, or another precision (digest {_head(made_for)}, here "
            f"{_head(here_weights)}); use the model it was made for, or force"
        )


def _is_fused_away(network: nn.Module, layer: str) -> bool:
    """Whether a projection is there and does not run, as a fused one runs in its place."""
    parent, _, leaf = layer.rpartition(".")
    if leaf not in _PARTS:
        return False
    attention: Any = network.get_submodule(parent)
    processor = type(getattr(attention, "processor", None)).__name__
    # A U-Net's attention keeps the mark when it is unfused, and takes back its processor.
    return getattr(attention, "fused_projections", False) and (
        hasattr(attention, "unfuse_projections") or "Fused" in processor
    )


def has_other_weights(mask: NeuronMask, network: nn.Module) -> bool:
    """Whether a mask says that it was made for other weights than these."""
    made_for = mask.metadata.get("unet_weights")
    return made_for is not None and made_for != weights_digest(_Bare(inner(network)))


class _Bare(nn.Module):
    """A model as it was before adapters wrapped its layers, as far as digests see it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        # Not registered as a part of this one: its state dict is what this one shows.
        self._state = without_adapters(model)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._state


def without_adapters(model: nn.Module) -> dict[str, Tensor]:
    """The state dict by the names it had before adapters wrapped layers, and without what they added.

    So with an IP-Adapter, and with projections that are fused, whose weights are those of others once more.
    """
    wrapped, added = set[str](), list[str]()
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):
            wrapped.add(name)
        if "IPAdapter" in type(module).__name__:
            added.append(f"{name}.")
        if getattr(module, "fused_projections", False):
            added += [f"{name}.{each}." for each in _FUSED]
    state: Mapping[str, Tensor] = model.state_dict()
    if not wrapped and not added:
        return dict(state)
    bare = {}
    for key, tensor in state.items():
        if key.startswith(tuple(added)):
            continue
        parts = key.split(".")
        kept: list[str] = []
        for part in parts:
            if ".".join(kept) in wrapped and part != "base_layer":
                break
            kept.append(part)
        else:
            bare[key.replace(".base_layer.", ".")] = tensor
    return bare


def _head(digest: object) -> str:
    return str(digest)[:12]


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
