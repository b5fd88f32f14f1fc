"""Timestep bins: bin i holds every t with edges[i] > t >= edges[i + 1]; edges descend, as sampling does."""

import torch
from torch import Tensor

from stereoclinic.errors import InputError

#: (noisiest, cleanest) timesteps: holds every t with noisiest > t >= cleanest. One that reaches the first bin edge has
#: no upper end, as the first bin has none.
Window = tuple[float, float]


def bin_of(timestep: float, edges: Tensor) -> int:
    """The bin of a timestep; timesteps beyond the ends belong to the end bins."""
    return sum(timestep < edge for edge in edges[1:-1].tolist())


def bin_within(timestep: float, edges: Tensor) -> int | None:
    """As `bin_of`, but None below the last edge.

    Examples:
        >>> edges = torch.tensor([1000.0, 600.0, 0.0])
        >>> [bin_within(timestep, edges) for timestep in (1200, 1000, 600, 599, -1)]
        [0, 0, 0, 1, None]
    """
    return None if timestep < edges[-1] else bin_of(timestep, edges)


def bins_in(edges: Tensor, window: Window | None) -> Tensor:
    """Which bins a window of timesteps meets: (T,) bool. None is all of them.

    Raises:
        InputError: The window is empty or meets no bin.
    """
    if window is None:
        return torch.ones(len(edges) - 1, dtype=torch.bool)
    high, low = window
    if not high > low:
        raise InputError(f"window {high:g} to {low:g} is empty; give the noisiest timestep first, such as 1000 to 600")
    inside = (edges[1:] < high) & (edges[:-1] > low)
    if not inside.any():
        raise InputError(
            f"window {high:g} to {low:g} meets no timestep bin; they go from {edges[0]:g} to {edges[-1]:g}"
        )
    return inside
