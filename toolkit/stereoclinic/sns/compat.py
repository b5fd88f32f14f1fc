"""Whether a mask, or relevance, was made for a model, and whether hooks would run in it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from stereoclinic.errors import InputError
from stereoclinic.io.digest import shapes_digest, weights_digest
from stereoclinic.pipelines.arguments import inner
from stereoclinic.pipelines.model import network_of, outer_network
from stereoclinic.pipelines.sites import Site, channels_of, layer_at
from stereoclinic.sns.mask import NeuronMask

if TYPE_CHECKING:
    from stereoclinic.ddtd.relevance import Relevance

#: Where `fuse` keeps what it replaced: a plain attribute of the denoiser.
FUSED = "_stereoclinic_fused"
#: Layers that `fuse_qkv_projections` adds, and those that it leaves in place and does not run.
_QKV, _QKV_PARTS = (
    ("to_qkv", "to_kv", "to_added_qkv"),
    ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"),
)


def check_fits(made: "NeuronMask | Relevance", network: nn.Module, force: bool = False) -> None:
    """Refuse a mask, or relevance, that was made for another model.

    Its sites are always compared, its digests where it has them (one made by hand has none). Adapters of peft (LoRA)
    are ignored: what counts is the model that they were added to.

    Args:
        made: The mask or relevance.
        network: The denoiser.
        force: Accept other weights, and other layers around the same sites, as few-step siblings of a model have them.

    Raises:
        InputError: Says what differs.
    """
    what = "mask" if isinstance(made, NeuronMask) else "relevance"
    network = inner(network)
    for site in made.sites:
        difference = _site_difference(site, network, what)
        if difference:
            raise InputError(f"{what} does not fit: {difference}")
    if force:
        return
    bare = _Bare(network)
    for key, digest, difference, also in (
        ("unet_shapes", shapes_digest, "a model of other shapes", " where its sites are the same"),
        ("unet_weights", weights_digest, "other weights, or another precision", ""),
    ):
        recorded = made.metadata.get(key)
        if recorded is not None and recorded != (actual := digest(bare)):
            raise InputError(
                f"{what} was made for {difference} (digest {str(recorded)[:12]}, here {actual[:12]}); use the model it"
                f" was made for, or force{also}"
            )


def _site_difference(site: Site, network: nn.Module, what: str) -> str | None:
    """Why a site is not in a model as it is in the file; None if it is."""
    model = f"this {type(network).__name__}"
    layer = layer_at(network, site.layer)
    width = None if layer is None else channels_of(layer)
    if width is None:
        return f"{model} has no site {site.name!r}; use the model it was made for"
    if (site.dim == 1) != hasattr(layer, "in_channels"):
        return (
            f"site {site.name!r} has kind {site.kind} in the {what}, and is a {type(layer).__name__} in {model}; use"
            " the model it was made for"
        )
    if _is_replaced(network, site.layer):
        return (
            f"site {site.name!r} does not run while {model} has its projections fused; call unfuse_qkv_projections()"
            " first"
        )
    end = site.start + site.width
    if end > width or (end < width and not site.name.endswith(f"[:{site.width}]")):
        return (
            f"site {site.name!r} has {site.width} neurons in the {what}, {width - site.start} in {model}; use the model"
            " it was made for"
        )
    return None


def _is_replaced(network: nn.Module, layer: str) -> bool:
    """Whether a projection does not run because a fused one runs in its place."""
    parent, _, leaf = layer.rpartition(".")
    if leaf not in _QKV_PARTS:
        return False
    attention: Any = network.get_submodule(parent)
    processor = type(getattr(attention, "processor", None)).__name__
    # A U-Net's attention keeps the mark when it is unfused, and takes back its processor.
    return getattr(attention, "fused_projections", False) and (
        hasattr(attention, "unfuse_projections") or "Fused" in processor
    )


def has_other_weights(mask: NeuronMask, network: nn.Module) -> bool:
    """Whether the mask's metadata says that it was made for other weights than these."""
    recorded = mask.metadata.get("unet_weights")
    return recorded is not None and recorded != weights_digest(_Bare(inner(network)))


class _Bare(nn.Module):
    """A model without its adapters, as far as digests see it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._state = without_adapters(model)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._state


def without_adapters(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with the names it had before adapters wrapped layers, and without what was added since.

    Layers of peft, of an IP-Adapter and fused projections (copies of other weights) count as added.
    """
    wrapped, added = set[str](), list[str]()
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):
            wrapped.add(name)
        if "IPAdapter" in type(module).__name__:
            added.append(f"{name}.")
        if getattr(module, "fused_projections", False):
            added += [f"{name}.{leaf}." for leaf in _QKV]
    state: Mapping[str, Tensor] = model.state_dict()
    bare = {}
    for key, tensor in state.items():
        if key.startswith(tuple(added)):
            continue
        path: list[str] = []
        for part in key.split("."):
            if ".".join(path) in wrapped and part != "base_layer":
                break
            path.append(part)
        else:
            bare[key.replace(".base_layer.", ".") if wrapped else key] = tensor
    return bare


def check_open(target: Any) -> None:
    """Refuse a denoiser whose hooks would not run, or that has a mask fused in, with an InputError."""
    wrapped = hasattr(outer_network(target), "_orig_mod")
    network = network_of(target)
    for name, module in network.named_modules():
        if wrapped or hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise InputError(
                f"{name or type(module).__name__} is compiled, and would ignore the mask; apply the mask before "
                "compiling, or fuse it"
            )
    if getattr(network, FUSED, None) is not None:
        raise InputError(
            "a mask is fused into this model; unfuse it first, then apply one mask or a composition of several"
        )
