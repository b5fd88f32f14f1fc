"""Forward passes damped by factors that are being planned, differentiable in them at every site."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stereoclinic.pipelines.hooks import Inputs, Watch
from stereoclinic.pipelines.sites import Site, by_layer, calls_of, neuron_relevance, to_neurons
from stereoclinic.sns.damp import by_channel, damp


class TrialDamping(Watch):
    """Damps every site by factors (N,) toward roots (N,), or zero; keeps each layer's input before and after that."""

    def __init__(self, network: nn.Module, sites: Sequence[Site], factor: Tensor, root: Tensor | None = None) -> None:
        super().__init__(network, sites)
        self.sites, self.factor, self.root = list(sites), factor, root
        self._undamped = Inputs()
        self._spans = by_layer(self.sites)

    @property
    def undamped(self) -> dict[str, Tensor]:
        """Layer -> its input before damping; `layer#2` where the pass runs it again."""
        return self._undamped.whole()

    def begin(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().begin(network, args, kwargs)
        self._undamped.clear()

    def _keep(self, name: str, x: Tensor) -> Tensor:
        self._undamped.add(name, x.detach(), self.rows_of_pass)
        tables = [self.factor] if self.root is None else [self.factor, self.root]
        factor, *root = by_channel([table[None].to(x) for table in tables], self._spans[name], self.network)
        offset = (1 - factor) * root[0] if root else None
        return super()._keep(name, damp(x, factor, self._spans[name][0][0].dim, offset))

    def means(self) -> Tensor:
        """Means of the undamped activations over positions: (B, N)."""
        means, undamped = [], self.undamped
        rows = len(next(iter(undamped.values())))
        for site in self.sites:
            inputs = [site.of(undamped[key]) for key in calls_of(undamped, site.layer)]
            total = sum((to_neurons(a, site.dim) for a in inputs), torch.zeros(rows, site.width).to(self.factor))
            means.append(total * site.width / max(sum(a[0].numel() for a in inputs), 1))
        return torch.cat(means, dim=1).cpu()

    def relevance(self, grads: Mapping[str, Tensor | None]) -> Tensor:
        """sum over positions of (a_j - r_j) g_j: (B, N), with g from `grads`."""
        roots, undamped = None, self.undamped
        if self.root is not None:
            roots = {}
            for key, a in undamped.items():
                sites = self._spans[key.partition("#")[0]]
                _, root = by_channel([self.factor[None].to(a), self.root[None].to(a)], sites, self.network)
                roots[key] = root.view(1, -1, *[1] * (a.ndim - 2)) if sites[0][0].dim == 1 else root[0]
        return neuron_relevance(undamped, grads, self.sites, roots)
