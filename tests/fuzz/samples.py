"""Small valid files of every kind that is read, and what reads them: the seeds of the fuzzing."""

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stereoclinic.axes import load_axis
from stereoclinic.ddtd.composite_file import read_composite
from stereoclinic.ddtd.relevance import STATES, Relevance, shapes_of
from stereoclinic.ddtd.shards import Shards
from stereoclinic.evaluation.bench.arms import SCHEMA
from stereoclinic.evaluation.bench.protocols import load_protocol
from stereoclinic.evaluation.metrics.amplification import load_reference
from stereoclinic.evaluation.readers.classes import parse_classes
from stereoclinic.evaluation.report.located import relevance_summary
from stereoclinic.evaluation.report.summary import lean_summary, mask_summary
from stereoclinic.evaluation.results.truths import load_confusion
from stereoclinic.evaluation.results.versus import compare_results, load_results
from stereoclinic.pipelines.sites import Site
from stereoclinic.portraits.world import DEFAULT_WORLD, World
from stereoclinic.prompts import load_prompts
from stereoclinic.sns.mask import NeuronMask

SITES = [
    Site("down.0.ff.net.2", "ff", 3),
    Site("single.0.proj_out[:1]", "attention", 1),
    Site("single.0.proj_out[1:]", "ff", 1),
    Site("up.1.conv2", "conv", 2),
]
CONFIGURATION = {"samples": 4, "axis": "gender"}


def a_mask() -> NeuronMask:
    metadata = {"axis": "gender", "seeds": [0, 3], "selection": {"how": "plan", "mu": 1.0}, "dose": {"seeds": [4, 5]}}
    generator = torch.Generator().manual_seed(0)
    factors = torch.rand(2, 2, 7, generator=generator)
    edges = torch.tensor([1000.0, 500.0, 0.0])
    return NeuronMask(SITES, edges, factors, torch.zeros(2, 2, 7), metadata=metadata, groups=("female", "male"))


def states() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = shapes_of(2, 2, 2, 7, 3)
    return {name: torch.rand(shapes[name], generator=generator, dtype=torch.float64) + 1 for name in STATES}


def a_relevance() -> Relevance:
    edges, timesteps = torch.tensor([1000.0, 500.0, 0.0]), torch.tensor([900.0, 600.0, 300.0])
    metadata = {"axis": "gender", "model": "m", "samples": 4, "dropped": 0, "seeds": [0, 1], "unet_weights": "0" * 64}
    labels = ["doctor", "nurse"]
    return Relevance(
        SITES, ("female", "male"), labels, edges.double(), **states(), metadata=metadata, timesteps=timesteps
    )


def some_results() -> dict[str, Any]:
    gap = {"estimate": 0.3, "low": 0.2, "high": 0.4, "p_value": 0.01}
    arm = {"parity_gap": gap, "unsure": 0.1, "drift": {"age": 0.1}, "prompts": [{"prompt": "a photo of a doctor"}]}
    one = {
        "axis": "gender", "groups": ["female", "male"], "guidance": 2.0, "images_per_prompt": 4, "seeds": [0, 3],
        "labels": ["doctor"], "masks": ["gender"], "steps": 2, "arms": {"untreated": arm, "gender": arm},
        "group_prompts": {"gender": {"all": gap}},
    }  # fmt: skip
    return {"schema": SCHEMA, "provenance": {"model": "m", "strength": 1.0}, "experiments": [one]}


def read_mask(path: Path) -> None:
    mask = NeuronMask.load(path)
    json.dumps([mask_summary(mask), mask.made_on, len(mask.origins)])


def read_relevance(path: Path) -> None:
    found = Relevance.load(path)
    json.dumps([lean_summary(found), relevance_summary(found, 3)])


def read_shard(path: Path) -> None:
    kept = Shards(path.parent, CONFIGURATION).kept()
    kept.sums(["a", "b"], shapes_of(2, 2, 2, 7, 3))


def read_results(path: Path) -> None:
    found = load_results(path)
    json.dumps(compare_results(found, found))


def _shipped(folder: str, name: str) -> bytes:
    return (files("stereoclinic") / folder / name).read_bytes()


_COMPOSITE = b"""name = "mine"
root = "rooted"
[rules]
convolution = { rule = "gamma", gamma = 0.25 }
attention = "cp"
silu = "gate"
[[layers]]
pattern = "*.ff.net.2"
depth = [0.0, 0.5]
rule = "epsilon"
epsilon = 1e-6
"""

#: Ending and content of texts, and what reads them.
TEXTS: dict[str, tuple[str, bytes, Callable[[Path], Any]]] = {
    "axis": (".toml", _shipped("axes", "gender.toml"), load_axis),
    "composite": (".toml", _COMPOSITE, read_composite),
    "protocol": (".toml", _shipped("evaluation/bench/protocols", "time.toml"), load_protocol),
    "world": (".toml", DEFAULT_WORLD.read_bytes(), World.load),
    "classes": (".toml", b'female = ["Woman", "Girl"]\nmale = ["Man"]\n', lambda path: parse_classes([str(path)])),
    "classes in JSON": (".json", b'{"female": ["Woman"], "male": ["Man"]}', lambda path: parse_classes([str(path)])),
    "reference": (".csv", b"label,group,share\ndoctor,female,0.4\ndoctor,male,0.6\n", load_reference),
    "confusion": (
        ".csv",
        b"group,read,count\nfemale,female,9\nfemale,male,1\nmale,male,8\nmale,female,2\n",
        lambda path: load_confusion(path, ("female", "male")),
    ),
    "results": (".json", json.dumps(some_results()).encode(), read_results),
    "prompts": (".txt", b"a photo of a doctor\na photo of an {group} nurse\n", load_prompts),
    "prompts in CSV": (".csv", b'prompt,occupation\n"a doctor, at work",doctor\na photo of a nurse,\n', load_prompts),
    "prompts in JSON": (".jsonl", b'{"prompt": "a photo of a doctor", "occupation": "doctor"}\n' * 2, load_prompts),
}  # fmt: skip

#: What writes a file of tensors, and what reads it.
TENSORS: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any]]] = {
    "mask": (lambda path: a_mask().save(path), read_mask),
    "relevance": (lambda path: a_relevance().save(path), read_relevance),
}
