"""A model folder as `stereoclinic.portraits.train` writes it, tiny and random, and ways to call `stereo`."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from typer.testing import CliRunner, Result

from stereo_cli.main import app
from stereoclinic.evaluation.readers import PortraitsNet
from stereoclinic.portraits.model import (
    LATENT_CHANNELS,
    LATENT_SIZE,
    TEXT_WIDTH,
    build_autoencoder,
    build_pipeline,
    build_text_encoder,
    build_tokenizer,
)
from stereoclinic.prompts.axes import load_axis
from stereoclinic.prompts.occupations import PORTRAITS
from stereoclinic.prompts.sets import group_prompts, load_prompts, write

Call = Callable[..., Result]

AXIS_FILE = 'name = "gender"\ngroups = {}\n[words]\nfemale = "female"\nmale = "male"\n'


def write_model(folder: Path, seed: int, width: int = 8) -> None:
    """A StableDiffusionPipeline with a UNet of two levels, and a reader that knows the three axes."""
    torch.manual_seed(seed)
    axes = [load_axis(name) for name in ("gender", "skin", "age")]
    prompts = load_prompts("portraits")
    captions = [write(row) for row in prompts]
    captions += [text for row in prompts for axis in axes for text in group_prompts(row, axis)]
    tokenizer = build_tokenizer(captions)
    unet = UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(width, 2 * width),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    pipe = build_pipeline(build_autoencoder(), build_text_encoder(tokenizer), tokenizer, unet)
    pipe.save_pretrained(folder)
    reader = PortraitsNet(tuple(PORTRAITS), {axis.name: axis.groups for axis in axes}).eval()
    reader.save_pretrained(folder / "reader")
    (folder / "stereoclinic.json").write_text(json.dumps({"steps": 2, "guidance": 1.0}))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_model(folder, seed=0)
    return folder


@pytest.fixture(scope="session")
def stereo() -> Call:
    """Call the command line within this process; an exception that is not an exit is a failure of the test.

    As in a pipe: processes of tests that run side by side may be given the width of a terminal.
    """

    def call(*arguments: object) -> Result:
        result = CliRunner(env={"COLUMNS": None}).invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return call


@pytest.fixture(scope="session")
def located(model: Path, stereo: Call, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mask for the tiny model, made on seeds 0 and 1 of three prompts; its relevance lies beside it."""
    path = tmp_path_factory.mktemp("located") / "gender.pt"
    result = stereo("locate", "--model", model, "--limit", 3, "--seeds", 2, "--every", 1, "--bins", 2, "-o", path)
    assert result.exit_code == 0, result.stderr
    return path


@pytest.fixture
def refused(stereo: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Call the command line, which refuses, and return its one line."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        result = stereo(*arguments)
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert line.startswith("stereo: ")
        assert sorted(tmp_path.rglob("*")) == before
        return line

    return call


@pytest.fixture
def opening(model: Path, located: Path) -> list[tuple]:
    """Every command that opens a model, called so that it does."""
    relevance = located.with_name("gender.relevance.safetensors")
    return [
        ("locate", "--model", model),
        ("plan", relevance, "--model", model, "--until", 0),
        ("mask", located, "--dose", 0.5, "--model", model, "-o", "dosed.pt"),
        ("bench", "--mask", located, "--model", model, "--reader", model / "reader"),
        ("apply", "a photo of a doctor", "--mask", located, "--model", model),
        ("inspect", relevance, "--images", "pictures", "--model", model),
        ("doctor", "--model", model),
    ]
