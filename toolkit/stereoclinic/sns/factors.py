"""What a mask does to one site: s a + (1 - s) r, and what s and r come to at a strength.

A forward pass damped by factors that are being planned, differentiable in them at every site.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from stereoclinic.errors import InputError
from stereoclinic.pipelines.hooks import Hooks, Inputs
from stereoclinic.pipelines.sites import Site, by_layer, calls_of, neuron_relevance, to_neurons
from stereoclinic.sns.mask import NeuronMask


def damp(a: Tensor, factor: Tensor, dim: int, offset: Tensor | None = None) -> Tensor:
    """``s a + (1 - s) r``, which is ``r + s (a - r)``.

    Args:
        a: (B, ..., C) at a linear site, (B, C, ...) at a convolution.
        factor: (B or 1, C), s.
        dim: Of the channels, -1 or 1.
        offset: (B or 1, C), (1 - s) r; None for a root at zero.

    Returns:
        Of a's shape.
    """
    ones = [1] * (a.ndim - 2)
    shape = (-1, a.shape[1], *ones) if dim == 1 else (-1, *ones, a.shape[-1])
    factor = factor.view(shape)
    if offset is None:
        return a * factor
    offset = offset.view(shape)
    if dim == 1 and a.is_cpu:
        # There addcmul is no vector code where its operands do not vary along the inner dimension: a product and a sum
        # take a half to a fifth of its time at the portraits UNet's sizes.
        return (a * factor).add_(offset)
    return torch.addcmul(offset, a, factor)


def effective(mask: NeuronMask, strength: float) -> tuple[Tensor, Tensor | None]:
    """What a mask amounts to at a strength: ``s = 1 - strength (1 - factor)`` and ``(1 - s) r``.

    Returns:
        Factors and offsets, of the mask's shape, in float32; None for a root at zero. Where a factor is 1 the offset is
        -0, so that ``s a + offset`` is a bit for bit.

    Raises:
        InputError: strength is out of range.
    """
    check_strength(strength)
    factors = (1 - strength * (1 - mask.factors.double())).float()
    if mask.roots is None:
        return factors, None
    return factors, torch.where(factors == 1, -0.0, (1 - factors) * mask.roots)


def check_strength(strength: float) -> None:
    """Raises InputError for one that is no number from 0 to 1."""
    if not isinstance(strength, int | float) or not 0 <= strength <= 1:
        raise InputError(f"strength {strength!r}; expected 0 (no damping) to 1 (as the mask says)")


class Damped(Hooks):
    """Damps every site by factors that are being planned, and keeps what came in and what went on.

    Args:
        network: The denoiser.
        sites: Its sites.
        factor: (N,), s.
        root: (N,), r; None for zero.
    """

    def __init__(self, network: nn.Module, sites: Sequence[Site], factor: Tensor, root: Tensor | None = None) -> None:
        self.sites, self.factor, self.root = list(sites), factor, root
        self._own, self._damped = Inputs(), Inputs()
        self._spans = by_layer(self.sites)
        super().__init__(network, list(self._spans), self._damp)

    @property
    def own(self) -> dict[str, Tensor]:
        """Layer -> its input as the treated network made it; `layer#2` where the pass runs it again."""
        return self._own.whole()

    def began(self) -> None:
        self._own.clear()
        self._damped.clear()

    def _damp(self, name: str, a: Tensor) -> Tensor:
        dim = self._spans[name][0][0].dim
        factor = self._of(self.factor, name, a, 1.0)
        offset = None if self.root is None else (1 - factor) * self._of(self.root, name, a, 0.0)
        damped = damp(a, factor[None], dim, None if offset is None else offset[None])
        if torch.is_grad_enabled() and not damped.requires_grad:
            damped = damped.detach().requires_grad_()
        if torch._C._current_graph_task_id() == -1:  # else this is a checkpoint's recomputation
            self._own.add(name, a.detach(), self.rows_of_pass)
            self._damped.add(name, damped, self.rows_of_pass)
        return damped

    def _of(self, values: Tensor, name: str, a: Tensor, value: float) -> Tensor:
        """(N,) -> (C,) of a layer's channels, with `value` where no site is."""
        (first, start), (last, stop) = self._spans[name][0], self._spans[name][-1]
        width = a.shape[first.dim]
        own = values[start.start : stop.stop].to(a)
        return pad(own, (first.start, width - last.start - last.width), value=value)

    def means(self) -> Tensor:
        """Means over positions: (B, N)."""
        found, own = [], self.own
        for site in self.sites:
            calls = [site.of(own[key]) for key in calls_of(own, site.layer)]
            rows = len(next(iter(own.values())))
            total = sum((to_neurons(a, site.dim) for a in calls), torch.zeros(rows, site.width).to(self.factor))
            found.append(total * site.width / max(sum(a[0].numel() for a in calls), 1))
        return torch.cat(found, dim=1).cpu()

    def grads(self, output: Tensor, cotangent: Tensor, retain: bool) -> Mapping[str, Tensor | None]:
        """Layer -> the vector-Jacobian product of the output at what went on from there."""
        return self._damped.grads(output, cotangent, retain)

    def relevance(self, grads: Mapping[str, Tensor | None]) -> Tensor:
        """sum over positions of (a_j - r_j) g_j: (B, N)."""
        roots, own = None, self.own
        if self.root is not None:
            roots = {}
            for key, a in own.items():
                name = key.partition("#")[0]
                each, here = self._of(self.root, name, a, 0.0), self._spans[name]
                roots[key] = each.view(1, -1, *[1] * (a.ndim - 2)) if here[0][0].dim == 1 else each
        return neuron_relevance(own, grads, self.sites, roots)
