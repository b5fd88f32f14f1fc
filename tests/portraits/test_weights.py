"""The model that ships: small, opened by plain diffusers, good enough to stand on (its card has the full figures)."""

import torch
from diffusers import StableDiffusionPipeline

from stereoclinic.ddtd.trajectory import Measured, Settings, walk
from stereoclinic.evaluation.methods.oracles import allocation_prompts
from stereoclinic.evaluation.readers import PortraitsReader
from stereoclinic.pipelines import model_folder, open_model
from stereoclinic.pipelines.images import draw
from stereoclinic.pipelines.sites import find_sites
from stereoclinic.portraits.train import reader_accuracy
from stereoclinic.portraits.world import World
from stereoclinic.prompts.axes import load_axis
from stereoclinic.prompts.sets import load_prompts, with_seeds
from stereoclinic.sns.allocate import allotted_group, uniform

FOLDER = model_folder("portraits")
assert FOLDER is not None
ROWS = list(with_seeds(load_prompts("portraits"), 900_000, 2))


def test_it_is_small_enough_for_a_wheel_and_opens_in_plain_diffusers() -> None:
    assert FOLDER is not None
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 40e6
    assert (FOLDER / "README.md").is_file()
    pipe = StableDiffusionPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a photo of a doctor", num_inference_steps=2).images[0].size == (64, 64)


def test_it_draws_the_occupation_and_obeys_groups() -> None:
    model = open_model("portraits")
    reader = PortraitsReader(FOLDER / "reader")
    axis = load_axis("gender")
    pictures = draw(model, ROWS, 20, model.defaults.guidance, allocation_prompts(axis, ROWS))
    reads = reader.read(pictures.float() / 255)
    wanted = torch.tensor([reader.classes["occupation"].index(row["label"]) for row in ROWS])
    groups = torch.tensor([allotted_group(row, uniform(2)) for row in ROWS])
    assert (reads["occupation"].argmax(1) == wanted).float().mean() > 0.9  # 24 images: two may go wrong
    assert (reads["gender"].argmax(1) == groups).float().mean() > 0.9


def test_its_early_lean_forecasts_the_planted_tilt() -> None:
    model, world, axis = open_model("portraits"), World.load(), load_axis("gender")
    sites, measured = find_sites(model.network, ("conv",))[:1], list[Measured]()
    walk(model, sites, axis, ROWS[:12], Settings(steps=20, every=4), measured.append)
    leans = torch.stack([each.lean[0] for each in measured[:2]]).mean(0)
    planted = torch.tensor([world.occupation(row["label"]).share("gender") for row in ROWS[:12]])
    assert torch.corrcoef(torch.stack([leans.float(), planted]))[0, 1] > 0.9


def test_its_reader_is_right_on_drawings_it_never_saw() -> None:
    model = open_model("portraits")
    accuracy = reader_accuracy(World.load(), model.pipe.vae, PortraitsReader(FOLDER / "reader").net, per_cell=1)
    assert min(accuracy.values()) > 0.95  # 96 drawings
