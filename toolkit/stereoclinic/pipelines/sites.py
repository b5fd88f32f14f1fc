"""Sites, the layers that write to the residual stream, and neurons, their input channels.

A neuron is a hidden unit of a feed-forward block, a channel of an attention head, or a feature map of a residual block.
Layers are found by the end of their module path, so that one table serves all pipelines.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from stereoclinic.errors import InputError

#: Kind of site -> how its module path ends (as file names: `*`, `?`).
SITE_KINDS: Mapping[str, tuple[str, ...]] = {
    "ff": (
        *("ff.net.2", "ff_context.net.2", "img_mlp.net.2", "txt_mlp.net.2", "feed_forward.w2", "shared_experts.w2"),
        *("feed_forward.linear_2", "feed_forward.out_layer", "linear_out", "out_projection", "ff.down", "down_proj"),
        *("linear_fc2", "ff.conv_point", "ff_i.w2", "ff_t.w2", "img_mlp.out", "shared_expert.net.2"),
    ),
    "attention": (
        *("to_out.0", "to_add_out", "attn.to_out", "attn1.to_out", "to_out_t"),
        *("self_attention.out_layer", "cross_attention.out_layer"),
    ),
    "conv": ("conv2",),
    "other": (),  # what a user's own pattern names
}
#: Layers whose input holds the channels of attention, then those of a feed-forward block.
MIXED = ("single_transformer_blocks.*.proj_out", "single_transformer_blocks.*.attn.to_out")
#: Routed experts get tokens of all pictures in one row, so whose they are is unknown. Pooling of the text into the
#: time embedding is not on the residual stream.
EXCLUDED = ("*.experts.*", "add_time_condition.*")
#: Parts of a path that show whose tokens a layer works on; where none fits, the image's.
STREAMS = {
    "text": (
        r"to_add_out|ff_context|txt_mlp|to_out_t|ff_t\b|context_refiner|token_refiner|^perceiver|text_transformer_blocks"
    ),
    "joint": r"^single_transformer_blocks|^single_stream_blocks|^layers\.",
}
#: Sites of a mask or of relevance, and characters of a module path.
MOST_SITES, LONGEST_PATH = 10_000, 500


@dataclass(frozen=True)
class Site:
    """A linear layer or convolution, or the part of one that belongs to one kind.

    Args:
        name: Module path of the layer; of a layer that two kinds share, with the channels: `proj_out[:64]`,
            `proj_out[64:]`.
        kind: Of `SITE_KINDS`.
        width: Its number of neurons.
    """

    name: str
    kind: str
    width: int

    @cached_property
    def layer(self) -> str:
        """Module path of the layer."""
        return self.name.partition("[")[0]

    @cached_property
    def start(self) -> int:
        """The first neuron's channel in the layer's input."""
        found = re.search(r"\[(\d+):\]$", self.name)
        return int(found[1]) if found else 0

    @cached_property
    def dim(self) -> int:
        """The dimension of the layer's input that holds channels: 1 in a convolution, else the last."""
        return 1 if self.kind == "conv" or self.name.endswith("conv_point") else -1

    @cached_property
    def stream(self) -> str:
        """Whose tokens the layer works on: the "image"'s, the "text"'s, or both ("joint")."""
        return next((stream for stream, part in STREAMS.items() if re.search(part, self.name)), "image")

    def of(self, x: Tensor) -> Tensor:
        """The site's channels of its layer's input."""
        if x.shape[self.dim] == self.width:
            return x
        return x.narrow(self.dim, self.start, self.width)


def spans(sites: Iterable[Site]) -> Iterator[tuple[Site, slice]]:
    """Each site with its slice of the N neurons, which are those of one site after another."""
    start = 0
    for site in sites:
        yield site, slice(start, start := start + site.width)


def by_layer(sites: Iterable[Site]) -> dict[str, list[tuple[Site, slice]]]:
    """Layer -> its sites with their slices of the N neurons."""
    found: dict[str, list[tuple[Site, slice]]] = {}
    for site, span in spans(sites):
        found.setdefault(site.layer, []).append((site, span))
    return found


def check_sites(sites: Sequence[Site], where: str) -> None:
    """Refuse sites that no layer can be, as a file may name them.

    Raises:
        InputError: A name is not a text, a kind is not known, a width is none, or two sites share neurons.
    """
    if len(sites) > MOST_SITES:
        raise InputError(f"{where}: {len(sites):,} sites; expected up to {MOST_SITES:,}")
    for site in sites:
        plain = isinstance(site.name, str) and isinstance(site.width, int) and not isinstance(site.width, bool)
        if not plain or len(site.name) > LONGEST_PATH or site.kind not in SITE_KINDS or site.width < 1:
            raise InputError(
                f"{where}: site {site.name!r:.80} of kind {site.kind!r:.40} and width {site.width!r:.40}; expected a"
                f" module path, one of {', '.join(SITE_KINDS)}, and a width of 1 or more"
            )
        if site.name not in (site.layer, f"{site.layer}[:{site.width}]", f"{site.layer}[{site.start}:]"):
            raise InputError(
                f"{where}: site {site.name!r} of width {site.width}; parts of a layer are written as layer[:64]"
                " and layer[64:]"
            )
    for here in by_layer(sites).values():
        parts = sorted({site.name: site for site, _ in here}.values(), key=lambda site: site.start)
        for one, two in pairwise(parts):
            if two.start < one.start + one.width:
                raise InputError(f"{where}: sites {one.name!r} and {two.name!r} share neurons of one layer")


def layer_at(model: nn.Module, name: str) -> nn.Module | None:
    """The layer at a path, without the adapters around it; None where there is none."""
    try:
        return _unwrapped(model.get_submodule(name))
    except AttributeError:
        return None


def channels_of(layer: nn.Module) -> int | None:
    """How many channels go into a linear layer or convolution; None for anything else."""
    quantised = callable(getattr(type(layer), "weight", None))  # as torch's own are, which pack their weight
    if not isinstance(layer._parameters.get("weight"), Tensor) and not quantised:
        return None
    width = getattr(layer, "in_features", None) or getattr(layer, "in_channels", None)
    return width if isinstance(width, int) else None


def find_sites(model: nn.Module, kinds: Sequence[str] | None = None, patterns: Sequence[str] = ()) -> list[Site]:
    """The sites of a model, in module order.

    Args:
        model: The denoiser.
        kinds: Of `SITE_KINDS`; None for all.
        patterns: Module paths of further layers, as file names (`blocks.*.proj`); with any, they alone are sites.

    Raises:
        InputError: A kind is not known, a pattern fits no layer, or the model has no such site.
    """
    unknown = [kind for kind in kinds or () if kind not in SITE_KINDS]
    if unknown:
        raise InputError(f"site kind {unknown[0]!r} is not known; choose from {', '.join(SITE_KINDS)}")
    layers = [(name, layer, channels_of(layer)) for name, layer in _layers(model)]
    layers = [(name, layer, width) for name, layer, width in layers if width]
    sites: list[Site] = []
    for pattern in patterns:
        if not any(_fits(name, (pattern,)) for name, *_ in layers):
            raise InputError(
                f"--sites {pattern!r} fits no layer of this {type(model).__name__}; {_layers_said(layers)}"
            )
    for name, layer, width in layers:
        assert width is not None
        if patterns:
            if _fits(name, patterns):
                sites.append(Site(name, "conv" if hasattr(layer, "in_channels") else "other", width))
        elif not any(fnmatchcase(name, pattern) for pattern in EXCLUDED):
            sites += _sites(model, name, width)
    if kinds is not None:
        sites = [site for site in sites if site.kind in kinds]
    if not sites:
        asked = "" if kinds is None else f" of kind {', '.join(kinds) or '(none given)'}"
        raise InputError(
            f"{type(model).__name__} has no site{asked}; {_layers_said(layers)}; name layers by --sites PATTERN, such"
            " as 'blocks.*.proj_out'"
        )
    return sites


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers by path; an adapter takes the path of the layer that it wraps."""
    adapter = None
    for name, module in model.named_modules():
        if adapter is None or not name.startswith(f"{adapter}."):
            adapter = name if hasattr(module, "base_layer") else None
            yield name, _unwrapped(module)


def _unwrapped(layer: Any) -> nn.Module:
    """A layer without the adapters around it."""
    while hasattr(layer, "base_layer"):
        layer = layer.base_layer
    return layer  # type: ignore[no-any-return]


def _fits(name: str, endings: Iterable[str]) -> bool:
    return any(fnmatchcase(f".{name}", f"*.{ending}") for ending in endings)


def _sites(model: nn.Module, name: str, width: int) -> list[Site]:
    """A layer's sites: one, two where attention and a feed-forward block share it, or none."""
    if _fits(name, MIXED):
        attention = _attention_width(model, name)
        if attention and attention < width:
            return [
                Site(f"{name}[:{attention}]", "attention", attention),
                Site(f"{name}[{attention}:]", "ff", width - attention),
            ]
    kind = next((kind for kind, endings in SITE_KINDS.items() if _fits(name, endings)), None)
    return [] if kind is None else [Site(name, kind, width)]


def _attention_width(model: nn.Module, name: str) -> int | None:
    """Channels of a mixed layer's attention: what the values of the attention block in the same block have."""
    block = model.get_submodule(name.rpartition(".")[0])
    attention: Any = getattr(block, "attn", block)
    width = getattr(attention, "inner_dim", None)
    return width if isinstance(width, int) else getattr(getattr(attention, "to_v", None), "out_features", None)


def _layers_said(layers: Sequence[tuple[str, nn.Module, int | None]]) -> str:
    if not layers:
        return "it has no linear layer or convolution; pass a pipeline's denoiser"
    kinds = dict.fromkeys(re.sub(r"\d+", "*", name) for name, *_ in layers)
    names = list(kinds)
    return f"its layers: {', '.join(names[:12])}{f' and {len(names) - 12} more' if len(names) > 12 else ''}"


def calls_of(activations: Mapping[str, object], layer: str) -> list[str]:
    """The keys of a layer's inputs: its path, and `path#2`, ... where one pass runs it several times."""
    return [key for key in activations if key == layer or key.startswith(f"{layer}#")]


def to_neurons(x: Tensor, dim: int) -> Tensor:
    """Sum over positions, in float32 or wider.

    Args:
        x: (B, ..., C), or (B, C, ...).
        dim: Of the channels, -1 or 1.

    Returns:
        (B, C).
    """
    positions = range(2, x.ndim) if dim == 1 else range(1, x.ndim - 1)
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.sum(tuple(positions), dtype=wide) if len(positions) else x.to(wide)


def neuron_relevance(
    activations: Mapping[str, Tensor],
    grads: Mapping[str, Tensor | None],
    sites: Sequence[Site],
    roots: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Relevance of every neuron, ``R_j = sum over positions of (a_j - abar_j) * g_j``, in float32 or wider.

    Args:
        activations: Layer -> its input, (B, ..., C) or (B, C, h, w).
        grads: Layer -> what the modified backward pass gave there; None where nothing arrived.
        sites: The sites, in order.
        roots: Layer -> abar, of the activation's shape or broadcasting to it (the balanced mean over the
            group passes); None for the plain decomposition, abar = 0.

    Returns:
        (B, N), the sites' neurons one after the other.
    """
    rows = []
    for site in sites:
        found: Tensor | None = None
        for key in calls_of(activations, site.layer):
            a, g = activations[key].detach(), grads[key]
            wide = torch.promote_types(a.dtype, torch.float32)
            if g is None:
                continue
            a = site.of(a).to(wide)
            if roots is not None:
                a = a - site.of(roots[key].detach().to(wide))
            own = to_neurons(a * site.of(g.detach()).to(wide), site.dim)
            found = own if found is None else found + own
        if found is None:  # nothing arrived, or the layer does not run
            some = next(iter(activations.values()))
            found = torch.zeros(some.shape[0], site.width, dtype=torch.promote_types(some.dtype, torch.float32))
        rows.append(found.to(next(iter(activations.values())).device))
    return torch.cat(rows, dim=1)
