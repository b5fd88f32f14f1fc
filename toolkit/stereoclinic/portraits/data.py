"""Training data of the embedded model: images of every cell of the world, and captions that fit them.

The groups of an image are drawn from the planted table *given* the groups that its caption names. Captions that name a
group are more frequent than neutral ones and name both groups equally often, so a rare combination is learnt as well as
a common one, while neutral captions keep the planted tilt.
"""

import itertools
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from stereoclinic.portraits.world import AXES, World

EMPTY, NEUTRAL = 0.08, 0.32  # shares of captions; the rest name groups
NAMED_AXES = {1: 0.5, 2: 0.2, 3: 0.3}
HELD_OUT = 1_000_000  # drawings from this index on are never trained on


def to_tensor(drawings: list[np.ndarray]) -> Tensor:
    """(64, 64, 3) uint8 images -> (n, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(np.stack(drawings)).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def encode_cells(world: World, vae: AutoencoderKL, first_index: int, count: int) -> Tensor:
    """Latents of `count` drawings a cell -> (cells, count, C, 16, 16), on the autoencoder's device."""
    rows = []
    for cell in world.cells:
        pictures = to_tensor([world.draw(*cell, first_index + i) for i in range(count)]).to(vae.device)
        rows.append(torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(64)]))
    return torch.stack(rows)


def cell_labels(world: World, per_cell: int) -> Tensor:
    """(cells * per_cell, 1 + axes): occupation and group indices in the order of `World.cells`."""
    rows = [
        [number, *(names.index(group) for names, group in zip(AXES.values(), groups, strict=True))]
        for number in range(len(world.names))
        for groups in itertools.product(*AXES.values())
    ]
    return torch.tensor(rows).repeat_interleave(per_cell, 0)


class Captions:
    """Every caption of a world, and the planted choice of an image for each."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.named = [
            {axis: group for axis, group in zip(AXES, choice, strict=True) if group is not None}
            for choice in itertools.product(*[(None, *groups) for groups in AXES.values()])
        ]
        self.texts = [""] + [
            world.caption(template, occupation, named)
            for template in world.templates
            for occupation in world.names
            for named in self.named
        ]

    def sample(self, rng: np.random.Generator, count: int) -> tuple[list[int], list[int], list[dict[str, str]]]:
        """Caption indices, cell indices, and what each caption names."""
        captions, cells, names = [], [], []
        groups = list(itertools.product(*AXES.values()))
        for _ in range(count):
            occupation = int(rng.integers(len(self.world.names)))
            kind = rng.random()
            named: dict[str, str] = {}
            if kind >= EMPTY + NEUTRAL:
                size = rng.choice(list(NAMED_AXES), p=list(NAMED_AXES.values()))
                axes = rng.choice(list(AXES), size=size, replace=False)
                named = {axis: str(rng.choice(AXES[axis])) for axis in AXES if axis in axes}
            shares = self.world.occupations[occupation].joint.reshape(-1).copy()
            for i, cell in enumerate(groups):
                if any(named.get(axis, group) != group for axis, group in zip(AXES, cell, strict=True)):
                    shares[i] = 0
            cells.append(occupation * len(groups) + int(rng.choice(len(groups), p=shares / shares.sum())))
            if kind < EMPTY:
                captions.append(0)
            else:
                template = int(rng.integers(len(self.world.templates)))
                captions.append(
                    1 + (template * len(self.world.names) + occupation) * len(self.named) + self.named.index(named)
                )
            names.append(named)
        return captions, cells, names


def save_grid(pictures: Tensor, path: Path, columns: int) -> None:
    """(n, 3, h, w) in [-1, 1] as one image, `columns` to the row, drawn twice as large."""
    rows = pictures.clamp(-1, 1).unflatten(0, (-1, columns))
    grid = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    image = Image.fromarray(((grid.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())
    image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST).save(path)
