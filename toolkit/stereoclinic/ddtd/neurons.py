"""Neurons: the input channels of the linear and convolution layers that are watched.

A site is such a layer, by its module path. The hidden units of a feed-forward block (``ff.net.2``), the head
channels of an attention block (``to_out.0``) and the feature maps of a residual block (``conv2``) are all
neurons in this one sense; watching one is a forward-pre-hook on the site, damping one a column of its weight.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stereoclinic.errors import InputError

#: Kind of site -> how its module path ends.
SITE_KINDS: Mapping[str, str] = {"ff": "ff.net.2", "attention": "to_out.0", "conv": "conv2"}


@dataclass(frozen=True)
class Site:
    """A watched layer: its module path, its kind, and its number of input channels."""

    name: str
    kind: str
    width: int


def spans(sites: Iterable[Site]) -> Iterator[tuple[Site, slice]]:
    """Each site with its slice of the N neurons, which are those of one site after another."""
    start = 0
    for site in sites:
        yield site, slice(start, start := start + site.width)


def check_sites(sites: Sequence[Site], where: str) -> None:
    """Refuse sites that no layer can be, as a file may name them.

    Raises:
        InputError: A name is no text, a kind is not known, or a width is none.
    """
    for site in sites:
        plain = isinstance(site.name, str) and isinstance(site.width, int) and not isinstance(site.width, bool)
        if not plain or site.kind not in SITE_KINDS or site.width < 1:
            raise InputError(
                f"{where}: site {site.name!r} of kind {site.kind!r} and width {site.width!r}; expected a module path,"
                f" one of {', '.join(SITE_KINDS)}, and a width of 1 or more"
            )


def find_sites(model: nn.Module, kinds: Sequence[str] = ("ff", "attention", "conv")) -> list[Site]:
    """The sites of a model, in module order.

    Raises:
        InputError: a kind is not known, or the model has no site of these kinds.
    """
    unknown = [kind for kind in kinds if kind not in SITE_KINDS]
    if unknown:
        raise InputError(f"site kind {unknown[0]!r} is not known; choose from {', '.join(SITE_KINDS)}")
    sites = []
    for name, module in model.named_modules():
        for kind in kinds:
            if not f".{name}".endswith(f".{SITE_KINDS[kind]}"):
                continue
            layer = module
            while hasattr(layer, "base_layer"):  # an adapter takes the path of the layer that it wraps
                layer = layer.base_layer
            width = getattr(layer, "in_channels" if kind == "conv" else "in_features", None)
            if isinstance(width, int):
                sites.append(Site(name, kind, width))
    if not sites:
        endings = ", ".join(SITE_KINDS[kind] for kind in kinds)
        raise InputError(
            f"{type(model).__name__} has no site: expected a module path ending in one of "
            f"{endings or '(no kind given)'}; pass the denoiser itself (pipeline.unet), or other kinds"
        )
    return sites


class Watch:
    """Keeps the input of every site for the latest forward pass; leaving the context removes its hooks.

    A site input that does not require grad (nothing upstream does) is replaced by a leaf that does, so that
    relevance can be asked for at it. Under ``torch.no_grad`` inputs are kept as they are.

    Attributes:
        activations: site name -> input tensor, (B, L, C) or (B, C, H, W), in the order the sites ran.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site]) -> None:
        self.model = model
        self.sites = list(sites)
        self.activations: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        modules = dict(self.model.named_modules())
        missing = [site.name for site in self.sites if site.name not in modules]
        if missing:
            raise InputError(
                f"site {missing[0]!r} is not in this {type(self.model).__name__}; "
                "find_sites(model) lists those that are"
            )
        self._handles.append(self.model.register_forward_pre_hook(self._forget))
        for site in self.sites:
            self._handles.append(modules[site.name].register_forward_pre_hook(self._keeper(site.name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _forget(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.activations.clear()

    def _keeper(self, name: str) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0]
            if torch.is_grad_enabled() and not x.requires_grad:
                x = x.detach().requires_grad_()
            # During backward this is a checkpoint's recomputation, whose tensors are not those of the
            # target's graph.
            if torch._C._current_graph_task_id() == -1:
                self.activations[name] = x
            return (x, *args[1:])

        return keep


def to_neurons(x: Tensor, kind: str) -> Tensor:
    """Sum over positions, in float32 or wider.

    Args:
        x: (B, ..., C) at a linear site, (B, C, ...) at a convolution.
        kind: the site's kind, "ff", "attention" or "conv".

    Returns:
        (B, C).
    """
    positions = range(2, x.ndim) if kind == "conv" else range(1, x.ndim - 1)
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.sum(tuple(positions), dtype=wide) if len(positions) else x.to(wide)


def neuron_relevance(
    activations: Mapping[str, Tensor],
    grads: Sequence[Tensor | None],
    sites: Sequence[Site],
    roots: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Relevance of every neuron, ``R_j = sum over positions of (a_j - abar_j) * g_j``, in float32 or wider.

    Args:
        activations: site name -> (B, L, C) or (B, C, H, W).
        grads: what the modified backward pass gave at each site, in site order; None where nothing arrived.
        sites: the sites, in order.
        roots: site name -> abar, of the activation's shape or broadcasting to it (the balanced mean over the
            group passes); None for the plain decomposition, abar = 0.

    Returns:
        (B, N), the sites' neurons one after the other.
    """
    rows = []
    for site, g in zip(sites, grads, strict=True):
        a = activations[site.name].detach()
        wide = torch.promote_types(a.dtype, torch.float32)
        if g is None:
            rows.append(torch.zeros(a.shape[0], site.width, dtype=wide, device=a.device))
            continue
        a = a.to(wide) if roots is None else a.to(wide) - roots[site.name].detach().to(wide)
        rows.append(to_neurons(a * g.detach().to(wide), site.kind))
    return torch.cat(rows, dim=1)
