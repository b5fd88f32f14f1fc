"""Where in the image a neuron's relevance lies, from the pass that locates it.

    R_j = sum over positions p of  a_j[p] g_j[p]          the map holds the terms of this sum

A neuron of a convolution has a map of the latents' shape or a coarser one; a neuron of a transformer block has one
value for each token, row by row. A map sums to the neuron's relevance. It is the signed counterpart, for any neuron, of
DAAM's attention maps (Tang et al. 2022, "What the DAAM").
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stereoclinic.ddtd.step import Measured
from stereoclinic.ddtd.trajectory import Settings, walk
from stereoclinic.errors import InputError
from stereoclinic.pipelines.bins import bin_of
from stereoclinic.pipelines.images import as_tensor
from stereoclinic.pipelines.memory import AdaptiveBatch
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.sites import Site, neuron_relevance
from stereoclinic.prompts.axes import Axis
from stereoclinic.prompts.sets import Row


@dataclass(frozen=True)
class Spot:
    """A neuron of a site, within a timestep bin."""

    site: Site
    neuron: int
    bin: int

    def __post_init__(self) -> None:
        if not 0 <= self.neuron < self.site.width:
            raise InputError(f"neuron {self.neuron} of {self.site.name}: expected 0 to {self.site.width - 1}")


@dataclass(frozen=True)
class Maps:
    """The result of `relevance_maps`.

    Args:
        pictures: (B, 3, H, W) in [0, 1], at the end of the trajectories.
        maps: For each spot (B, h, w) at the site's own resolution: relevance toward the group, summed over the
            measured steps of its bin.
    """

    pictures: Tensor
    maps: list[Tensor]


def relevance_maps(
    model: Model,
    axis: Axis,
    rows: list[Row],
    settings: Settings,
    edges: Tensor,
    spots: Sequence[Spot],
    *,
    group: int = 0,
    portions: AdaptiveBatch | None = None,
    progress: Callable[[int], None] | None = None,
) -> Maps:
    """Draw each row's image, and keep the maps of some neurons on the way.

    Args:
        model: The frozen pipeline.
        axis: The bias axis.
        rows: The samples, as `trajectory.walk` takes them.
        settings: As in the run that located the neurons.
        edges: (T + 1,) descending timesteps of the bins.
        spots: The neurons.
        group: Index of the group; maps are of the relevance toward it.
        portions: How many samples fit through the model together.
        progress: Called after each measured step with the number of samples in it.

    Raises:
        InputError: As `trajectory.walk`; no measured step falls into a spot's bin; or values were not finite.
    """
    for spot in spots:
        if not 0 <= spot.bin < len(edges) - 1:
            raise InputError(f"timestep bin {spot.bin} of {spot.site.name}: there are {len(edges) - 1}")
    sites = list({spot.site.name: spot.site for spot in spots}.values())
    neurons = sum(site.width for site in sites)
    keeper = _Keeper(spots)
    found: dict[int, Tensor] = {}  # place of a spot -> its map

    def measured(step: Measured) -> None:
        for row, where in step.faults.items():
            raise InputError(
                f"at timestep {step.timestep:g} of {rows[row]['prompt']!r}, {where} are not finite; try another --dtype"
            )
        kept = step.relevance[group][:, neurons:].split([math.prod(shape) for shape in keeper.shapes], dim=1)
        now = bin_of(step.timestep, edges)
        for i, (spot, flat) in enumerate(zip(spots, kept, strict=True)):
            if spot.bin == now:
                found[i] = found[i] + flat if i in found else flat
        if progress is not None:
            progress(len(rows))

    drawn = walk(model, sites, axis, rows, settings, measured, portions=portions, reduce=keeper, output="pil")
    pictures = as_tensor(drawn).float() / 255
    maps = []
    for i, (spot, shape) in enumerate(zip(spots, keeper.shapes, strict=True)):
        if i not in found:
            high, low = edges[spot.bin : spot.bin + 2].tolist()
            raise InputError(f"no measured step falls between timesteps {high:g} and {low:g}; measure more steps")
        grid = shape if len(shape) == 2 else token_grid(shape[0], pictures.shape[2:])
        maps.append(found[i].unflatten(1, grid).cpu())
    return Maps(pictures, maps)


class _Keeper:
    """`neuron_relevance`, with the maps of some neurons appended to its rows."""

    def __init__(self, spots: Sequence[Spot]) -> None:
        self.spots = list(spots)
        self.shapes: list[Sequence[int]] = []  # (h, w) of each map, or its number of tokens; known after the first pass

    def __call__(
        self,
        activations: Mapping[str, Tensor],
        grads: Mapping[str, Tensor | None],
        sites: Sequence[Site],
        roots: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        inputs = [(spot.site.dim, activations[spot.site.layer].shape) for spot in self.spots]
        self.shapes = [shape[2:] if dim == 1 else (math.prod(shape[1:-1]),) for dim, shape in inputs]
        kept = [_map(spot, activations, grads, roots) for spot in self.spots]
        return torch.cat([neuron_relevance(activations, grads, sites, roots), *kept], dim=1)


def _map(
    spot: Spot,
    activations: Mapping[str, Tensor],
    grads: Mapping[str, Tensor | None],
    roots: Mapping[str, Tensor] | None,
) -> Tensor:
    """(B, positions), in float32 or wider."""

    def values(x: Tensor) -> Tensor:
        picked = spot.site.of(x).select(spot.site.dim, spot.neuron)
        return picked.detach().flatten(1).to(torch.promote_types(x.dtype, torch.float32))

    name = spot.site.layer
    a, grad = values(activations[name]), grads[name]
    if grad is None:
        return torch.zeros_like(a)
    return (a if roots is None else a - values(roots[name])) * values(grad)


def token_grid(tokens: int, picture: Sequence[int]) -> tuple[int, int]:
    """The (h, w) with h w = tokens whose aspect is nearest to that of an image (H, W)."""
    aspect = math.log(picture[0] / picture[1])
    grids = [(h, tokens // h) for h in range(1, tokens + 1) if tokens % h == 0]
    return min(grids, key=lambda grid: abs(math.log(grid[0] / grid[1]) - aspect))
