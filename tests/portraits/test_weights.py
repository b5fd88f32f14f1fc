"""The models that ship: small, opened by plain diffusers, good enough to stand on. Their cards have all figures."""

import pytest
import torch
from diffusers import DiffusionPipeline

from stereoclinic.ddtd.trajectory import Measured, Settings, walk
from stereoclinic.evaluation.methods.oracles import allocation_prompts
from stereoclinic.evaluation.readers import PortraitsReader
from stereoclinic.pipelines import open_model
from stereoclinic.pipelines.images import draw
from stereoclinic.pipelines.opening import BUILT_IN
from stereoclinic.pipelines.sites import find_sites
from stereoclinic.portraits.train import reader_accuracy
from stereoclinic.portraits.world import World
from stereoclinic.prompts.axes import load_axis
from stereoclinic.prompts.sets import load_prompts, with_seeds
from stereoclinic.sns.allocate import allotted_group, uniform

ROWS = list(with_seeds(load_prompts("portraits"), 900_000, 2))
both = pytest.mark.parametrize("name", BUILT_IN)


@both
def test_it_is_small_enough_for_a_wheel_and_opens_in_plain_diffusers(name: str) -> None:
    folder = BUILT_IN[name]
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 20e6
    assert (folder / "README.md").is_file()
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a photo of a doctor", num_inference_steps=2).images[0].size == (64, 64)


@both
def test_it_draws_the_occupation_and_obeys_groups(name: str) -> None:
    model = open_model(name)
    reader = PortraitsReader(BUILT_IN[name] / "reader")
    axis = load_axis("gender")
    pictures = draw(model, ROWS, 20, model.defaults.guidance, allocation_prompts(axis, ROWS))
    reads = reader.read(pictures.float() / 255)
    wanted = torch.tensor([reader.classes["occupation"].index(row["label"]) for row in ROWS])
    groups = torch.tensor([allotted_group(row, uniform(2)) for row in ROWS])
    assert (reads["occupation"].argmax(1) == wanted).float().mean() > 0.9  # 24 images: two may go wrong
    assert (reads["gender"].argmax(1) == groups).float().mean() > 0.9


@both
def test_its_early_lean_forecasts_the_planted_tilt(name: str) -> None:
    model, world, axis = open_model(name), World.load(), load_axis("gender")
    sites, measured = find_sites(model.network)[:1], list[Measured]()
    walk(model, sites, axis, ROWS[:12], Settings(steps=20, every=4), measured.append)
    leans = torch.stack([each.lean[0] for each in measured[:2]]).mean(0)
    planted = torch.tensor([world.occupation(row["label"]).share("gender") for row in ROWS[:12]])
    assert torch.corrcoef(torch.stack([leans.float(), planted]))[0, 1] > 0.9


@both
def test_its_reader_is_right_on_drawings_it_never_saw(name: str) -> None:
    net = PortraitsReader(BUILT_IN[name] / "reader").net
    accuracy = reader_accuracy(World.load(), open_model(name).pipe.vae, net, per_cell=1)
    assert min(accuracy.values()) > 0.95  # 96 drawings


def test_the_flow_transformer_draws_the_same_people_by_the_pipeline_s_default_call() -> None:
    """A user of plain diffusers gives no `max_sequence_length`, so T5's 256 zeros go in."""
    reads = []
    for call in (None, {"max_sequence_length": 256}):
        model = open_model("portraits-flow", call=call)
        pictures = draw(model, ROWS[:12], 20, 2.0, allocation_prompts(load_axis("gender"), ROWS[:12]))
        reads.append(PortraitsReader(BUILT_IN["portraits-flow"] / "reader").read(pictures.float() / 255))
    for head in ("occupation", "gender"):
        short, long = (each[head].argmax(1) for each in reads)
        assert (short == long).float().mean() > 0.9  # 12 images: one may differ
