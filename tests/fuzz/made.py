"""A small mask and small relevance, with all that their files say of themselves."""

from typing import Any

import torch
from torch import Tensor

from stereoclinic.ddtd.relevance import STATES, Relevance, shapes_of
from stereoclinic.pipelines.sites import Site
from stereoclinic.sns.mask import NeuronMask

SITES = [
    Site("down.0.ff.net.2", "ff", 3),
    Site("single.0.proj_out[:1]", "attention", 1),
    Site("single.0.proj_out[1:]", "ff", 1),
    Site("up.1.conv2", "conv", 2),
]
MADE: dict[str, Any] = {
    "axis": "gender", "words": ["female", "male"], "model": "m", "call": {"eta": 0.5}, "seeds": [0, 3], "samples": 4,
    "unet_shapes": "0" * 64, "unet_weights": "0" * 64, "prompts": "0" * 16, "labels": ["doctor", "nurse"], "steps": 20,
    "guidance": 1.0, "every": 2, "composite": "gradient", "root": "plain", "target": "lean", "dropped": 0,
    "patterns": ["*.ff.net.2"], "versions": {"torch": "2"},
}  # fmt: skip


def a_mask() -> NeuronMask:
    said = {"from": 1000.0, "to": 500.0, "lean_before": 0.5, "lean_after": 0.1, "off_axis": None}
    selection = {"method": "compose", "root": "zero", "bins": [said, said], "of": [{**MADE, "axis": "age"}, MADE]}
    more = {"selection": selection, "dose": {"seeds": [4, 5], "earlier": {"seeds": [6, 7]}}}
    more |= {"adjusted": [{"strength": 1}]}
    generator = torch.Generator().manual_seed(0)
    factors = torch.rand(2, 2, 7, generator=generator)
    edges = torch.tensor([1000.0, 500.0, 0.0])
    return NeuronMask(SITES, edges, factors, torch.zeros(2, 2, 7), metadata=MADE | more, groups=("female", "male"))


def states() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = shapes_of(2, 2, 2, 7, 3)
    return {name: torch.rand(shapes[name], generator=generator, dtype=torch.float64) + 1 for name in STATES}


def a_relevance() -> Relevance:
    edges, timesteps = torch.tensor([1000.0, 500.0, 0.0]), torch.tensor([900.0, 600.0, 300.0])
    labels = ["doctor", "nurse"]
    return Relevance(SITES, ("female", "male"), labels, edges.double(), **states(), metadata=MADE, timesteps=timesteps)
