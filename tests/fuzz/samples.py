"""Small valid files of every kind that the commands read, and what reads them: the seeds of the fuzzing."""

import atexit
import functools
import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import pyarrow
import torch
from pyarrow import parquet
from tests.cli.conftest import write_model
from tests.evaluation.readers.conftest import write_classifier
from tests.fuzz import mutate
from tests.fuzz.made import a_mask, a_relevance, states
from tests.fuzz.reads import (
    CONFIGURATION,
    PART,
    PLANNING,
    read_classes,
    read_classifier,
    read_mask,
    read_model,
    read_options,
    read_part,
    read_reader,
    read_relevance,
    read_results,
    read_shard,
    read_unfinished,
)
from torch import Tensor

from stereoclinic.ddtd.checkpoint import KIND as SHARD
from stereoclinic.ddtd.checkpoint import VERSION as SHARD_VERSION
from stereoclinic.ddtd.relevance import Relevance
from stereoclinic.ddtd.rules.composites import read_composite
from stereoclinic.evaluation.arms import SCHEMA
from stereoclinic.evaluation.draw import KIND as DRAWN
from stereoclinic.evaluation.protocols import load_protocol
from stereoclinic.evaluation.references import load_confusion, load_reference
from stereoclinic.io.digest import content_digest
from stereoclinic.io.tensors import load_tensors, save_tensors
from stereoclinic.portraits.world import DEFAULT_WORLD, World
from stereoclinic.prompts.axes import load_axis
from stereoclinic.prompts.sets import load_prompts
from stereoclinic.sns.mask import NeuronMask
from stereoclinic.sns.plan import KIND as PLAN
from stereoclinic.sns.plan import VERSION as PLAN_VERSION


def some_results() -> dict[str, Any]:
    gap, floor = {"estimate": 0.3, "low": 0.2, "high": 0.4, "p_value": 0.01}, {"mean": 0.1, "upper": 0.2}
    prompt = {"label": "doctor", "prompt": "a photo of a doctor", "shares": {"female": gap}, "parity_gap": 0.3}
    arm = {"parity_gap": gap, "unsure": 0.1, "drift": {"age": 0.1}, "prompts": [prompt]}
    names = ("untreated", "gender", "allocation oracle")
    one = {
        "axis": "gender", "groups": ["female", "male"], "guidance": 2.0, "images_per_prompt": 4, "seeds": [0, 3],
        "labels": ["doctor"], "masks": ["gender"], "steps": 2, "arms": dict.fromkeys(names, arm),
        "group_prompts": {"gender": {"all": gap}}, "target_shares": [0.5, 0.5],
        "noise_floor": {"parity_gap": floor, "drift.age": floor}, "noise_floor_one_prompt": floor,
    }  # fmt: skip
    return {"schema": SCHEMA, "provenance": {"model": "m", "strength": 1.0}, "experiments": [one]}


# What writes a case: into an empty folder, whole, or with something amiss.
Write = Callable[[Path, Random | None], Path]


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Args:
        write: Writes it into a folder, whole or (given random numbers) with something amiss; returns its path.
        read: What a command does with it.
        cases: Of a whole run of the fuzzing.
    """

    write: Write
    read: Callable[[Path], Any]
    cases: int = 600


def _bytes(name: str, whole: bytes, swap: Callable[[Random, bytes], bytes] = mutate.damaged) -> Write:
    def write(folder: Path, random: Random | None) -> Path:
        path = folder / name
        how = mutate.damaged if random is None or random.random() < 0.4 else swap
        path.write_bytes(whole if random is None else how(random, whole))
        return path

    return write


def _tensors(
    name: str, kind: str, version: int, tensors: dict[str, Tensor], head: dict[str, Any], key: str | None = None
) -> Write:
    """A file of tensors; with a key, of those that hold a digest of what is in them."""

    def save(path: Path, tensors: dict[str, Tensor], head: dict[str, Any]) -> None:
        if key is not None:
            head = {**head, "content": content_digest(key, json.loads(json.dumps(head)), tensors)}
        save_tensors(path, kind, version, tensors, head)

    def write(folder: Path, random: Random | None) -> Path:
        path = folder / name
        if random is None:
            save(path, tensors, head)
            return path
        how = random.choice(["head", "head", "tensors", "tensors", "bytes", "odd", "pickle"])
        if how == "head":
            other = mutate.swapped(random, head)
            save(path, tensors, other if isinstance(other, dict) else {"": other})
        elif how == "tensors":
            save(path, mutate.reshaped(random, tensors), head)
        elif how == "bytes" or path.suffix != ".pt":
            save(path, tensors, head)
            path.write_bytes(mutate.damaged(random, path.read_bytes()))
        else:
            text = json.dumps({"kind": kind, "version": version, "metadata": head})
            save(path, tensors, head)
            odd = how == "odd"
            path.write_bytes(
                mutate.odd_objects(random, text, tensors) if odd else mutate.repacked(random, path.read_bytes())
            )
        return path

    return write


def _saved(name: str, made: NeuronMask | Relevance, kind: str) -> Write:
    with TemporaryDirectory() as folder:
        made.save(Path(folder) / "whole.pt")
        return _tensors(name, kind, 2, *load_tensors(Path(folder) / "whole.pt", kind, 2))


def _folder(make: Callable[[], Path], pattern: str, pickled: bool = False) -> Write:
    """One of the files of a folder that fit a pattern is amiss; the rest are links to those of a whole one."""

    def write(folder: Path, random: Random | None) -> Path:
        whole, place = make(), folder / "model"
        shutil.copytree(whole, place, copy_function=os.link)
        path = place / sorted(each.relative_to(whole) for each in whole.glob(pattern))[0]
        if random is None:
            return path
        path = random.choice(sorted(place.glob(pattern)))
        content = path.read_bytes()
        path.unlink()
        if pickled:  # weights that only unpickling could read
            other = path.with_name("pytorch_model.bin" if "text" in str(path) else "diffusion_pytorch_model.bin")
            held = io.BytesIO()
            torch.save(random.choice([{"a": Random(0)}, Random(0), {"a": torch.zeros(2)}, [1], "x"]), held)
            other.write_bytes(mutate.damaged(random, held.getvalue()) if random.random() < 0.3 else held.getvalue())
            return place / "model_index.json" if (place / "model_index.json").exists() else other
        how = mutate.swapped_json if path.suffix == ".json" and random.random() < 0.8 else mutate.damaged
        path.write_bytes(how(random, content))
        return path

    return write


@functools.cache
def _made(what: str) -> Path:
    """A model's folder, or a classifier's, made once a process."""
    folder = Path(mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if what == "model":
        write_model(folder / what, seed=0)
    else:
        write_classifier(folder / what, ("female", "male"))
    return folder / what


def _model() -> Path:
    return _made("model")


def _reader() -> Path:
    return _model() / "reader"


def _classifier() -> Path:
    return _made("classifier")


def _shipped(folder: str, name: str) -> bytes:
    return (files("stereoclinic") / folder / name).read_bytes()


def _parquet() -> bytes:
    table = pyarrow.table({"prompt": ["a photo of a doctor", "a photo of a nurse"] * 20, "occupation": [""] * 40})
    held = io.BytesIO()
    parquet.write_table(table, held)
    return held.getvalue()


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
_OPTIONS = b"""model: portraits
limit: 3
seeds: 2
guidance: 2.0
stream: false
call: [eta=0.5]
select: plan
mu: 1.0
quiet: true
"""
_SAID = dict.fromkeys(("timestep", "before", "after", "off_axis", "damping"), 1.5)
_TABLE = b"label,group,share\ndoctor,female,0.4\ndoctor,male,0.6\n"
_COUNTS = b"group,read,count\nfemale,female,9\nfemale,male,1\nmale,male,8\nmale,female,2\n"
_ROWS = b'{"prompt": "a photo of a doctor", "occupation": "doctor"}\n' * 2
_ONE_ROW = b'[{"prompt": "a photo of a doctor", "occupation": "doctor"}]'


KINDS: dict[str, Kind] = {
    **{
        f"{name}{ending}": Kind(_saved(f"one{ending}", made, name), read, 2000)
        for name, made, read in (("mask", a_mask(), read_mask), ("relevance", a_relevance(), read_relevance))
        for ending in (".pt", ".safetensors")
    },
    "shard": Kind(
        _tensors(
            "a-0.safetensors", SHARD, SHARD_VERSION, {**states(), "done": torch.tensor([0, 2])},
            {"configuration": CONFIGURATION, "labels": ["a", "b"], "dropped": 1},
        ),
        read_shard, 1000,
    ),
    "unfinished plan": Kind(
        _tensors(
            "one.unfinished.safetensors", PLAN, PLAN_VERSION, {"factors": torch.ones(2, 3), "roots": torch.zeros(2, 3)},
            {"configuration": PLANNING, "steps": [_SAID, _SAID]},
        ),
        read_unfinished, 1000,
    ),
    "bench part": Kind(
        _tensors(
            f"{PART.key}.safetensors", DRAWN, 1,
            {"images": torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "allotted": torch.tensor([0, -1])},
            {"arm": "untreated", "seconds": 1.5, "device": "cpu", "memory": None, "blank": [1]}, PART.key,
        ),
        read_part, 1000,
    ),
    "results.json": Kind(
        _bytes("results.json", json.dumps(some_results()).encode(), mutate.swapped_json), read_results, 1500
    ),
    "axis": Kind(_bytes("a.toml", _shipped("prompts/axes", "gender.toml"), mutate.swapped_toml), load_axis),
    "protocol": Kind(
        _bytes("a.toml", _shipped("evaluation/protocols", "time.toml"), mutate.swapped_toml), load_protocol
    ),
    "composite": Kind(_bytes("a.toml", _COMPOSITE, mutate.swapped_toml), read_composite),
    "world": Kind(_bytes("a.toml", DEFAULT_WORLD.read_bytes(), mutate.swapped_toml), World.load),
    "classes in TOML": Kind(
        _bytes("a.toml", b'female = ["Woman", "Girl"]\nmale = ["Man"]\n', mutate.swapped_toml), read_classes
    ),
    "classes in JSON": Kind(
        _bytes("a.json", b'{"female": ["Woman"], "male": ["Man"]}', mutate.swapped_json), read_classes
    ),
    "reference": Kind(_bytes("a.csv", _TABLE), load_reference),
    "confusion": Kind(_bytes("a.csv", _COUNTS), lambda path: load_confusion(path, ("female", "male"))),
    "options": Kind(_bytes("a.yaml", _OPTIONS, mutate.swapped_yaml), read_options, 1500),
    "prompts in text": Kind(_bytes("p.txt", b"a photo of a doctor\na photo of an {group} nurse\n"), load_prompts, 500),
    "prompts in CSV": Kind(
        _bytes("p.csv", b'prompt,occupation\n"a doctor, at work",doctor\na photo of a nurse,\n'), load_prompts, 500
    ),
    "prompts in JSON lines": Kind(_bytes("p.jsonl", _ROWS), load_prompts, 500),
    "prompts in JSON": Kind(_bytes("p.json", _ONE_ROW, mutate.swapped_json), load_prompts, 500),
    "prompts in Parquet": Kind(_bytes("p.parquet", _parquet()), load_prompts, 500),
    "model's defaults": Kind(_folder(_model, "stereoclinic.json"), read_model, 300),
    "model's index": Kind(_folder(_model, "model_index.json"), read_model, 300),
    "scheduler": Kind(_folder(_model, "scheduler/*.json"), read_model, 300),
    "denoiser": Kind(_folder(_model, "unet/*.json"), read_model, 300),
    "autoencoder": Kind(_folder(_model, "vae/*.json"), read_model, 300),
    "text encoder": Kind(_folder(_model, "text_encoder/*.json"), read_model, 300),
    "tokenizer": Kind(_folder(_model, "tokenizer/*.json"), read_model, 300),
    "weights": Kind(_folder(_model, "[tuv]*/*.safetensors"), read_model, 300),
    "pickled weights": Kind(_folder(_model, "[tuv]*/*.safetensors", pickled=True), read_model, 100),
    "reader": Kind(_folder(_reader, "*"), read_reader, 600),
    "classifier": Kind(_folder(_classifier, "*.json"), read_classifier, 300),
}  # fmt: skip


def write_case(kind: Kind, name: str, number: int, folder: Path) -> Path:
    """The case of a number, always the same."""
    return kind.write(folder, Random(f"{name} {number}"))
