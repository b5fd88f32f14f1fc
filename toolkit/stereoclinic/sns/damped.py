"""A forward pass damped by factors that are being planned, differentiable in them at every site."""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stereoclinic.ddtd.neurons import Site, neuron_relevance, spans, to_neurons
from stereoclinic.sns.factors import damp


class Damped:
    """Damps every site by factors that are being planned, and keeps what came in and what went on.

    Args:
        model: The UNet.
        sites: Its sites.
        factor: (N,), s.
        root: (N,), r; None for zero.

    Attributes:
        own: site name -> activation as the treated network made it.
        damped: site name -> what went on from there, in the graph.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], factor: Tensor, root: Tensor | None = None) -> None:
        self.model, self.sites = model, list(sites)
        self.factor, self.root = factor, root
        self.own: dict[str, Tensor] = {}
        self.damped: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        modules = dict(self.model.named_modules())
        for site, span in spans(self.sites):
            self._handles.append(modules[site.name].register_forward_pre_hook(self._hook(site, span)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _hook(self, site: Site, span: slice) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        factor = self.factor[None, span]
        offset = None if self.root is None else (1 - factor) * self.root[None, span]

        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            a = args[0]
            damped = damp(a, factor.to(a), site.kind, None if offset is None else offset.to(a))
            self.own[site.name], self.damped[site.name] = a.detach(), damped
            return (damped, *args[1:])

        return hook

    def means(self) -> Tensor:
        """Means over positions: (B, N)."""
        return torch.cat(
            [to_neurons(each, site.kind) * site.width / each[0].numel() for site, each in self._activations()], dim=1
        ).cpu()

    def _activations(self) -> list[tuple[Site, Tensor]]:
        return [(site, self.own[site.name]) for site in self.sites]

    def relevance(self, grads: Sequence[Tensor | None]) -> Tensor:
        """sum over positions of (a_j - r_j) g_j: (B, N)."""
        roots = None
        if self.root is not None:
            roots = {}
            for site, span in spans(self.sites):
                a = self.own[site.name]
                each = self.root[span].to(a)
                roots[site.name] = each.view(-1, *[1] * (a.ndim - 2)) if site.kind == "conv" else each
        return neuron_relevance(self.own, grads, self.sites, roots)
