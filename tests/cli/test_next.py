"""The line `next: ...` that ends a command is one that runs: it opens the same model in the same way."""

import shlex
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from tests.pipelines.tiny import save
from typer.testing import Result

from stereoclinic.pipelines.sites import find_sites
from stereoclinic.sns.mask import NeuronMask

SMALL = ("--limit", 1, "--seeds", 1, "--steps", 2, "--quiet", "--accelerator", "cpu")


def following(result: Result) -> list[str]:
    assert result.exit_code == 0, result.stderr
    first, *command = shlex.split(result.stdout.splitlines()[-1].removeprefix("next: "))
    assert first == "stereo"
    return command


@pytest.fixture(scope="module")
def variant(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a variant of weight files, in half precision."""
    folder = tmp_path_factory.mktemp("models") / "fp16"
    DiffusionPipeline.from_pretrained(model, dtype=torch.float16).save_pretrained(folder, variant="fp16")
    shutil.copytree(model / "reader", folder / "reader")
    shutil.copy(model / "stereoclinic.json", folder)
    return folder


def test_what_follows_opens_the_same_model(variant: Path, stereo, tmp_path: Path, monkeypatch) -> None:
    """By its variant, dtype and options of its call, also where only a file says so."""
    monkeypatch.chdir(tmp_path)
    how = ("--model", variant, "--variant", "fp16", "--dtype", "bfloat16", "--call", "eta=0.5")
    located = following(stereo("locate", *how, *SMALL, "-o", "a.pt"))
    again = following(stereo("mask", "a.relevance.safetensors", "-o", "b.pt"))
    both = following(stereo("mask", "a.pt", "b.pt", "-o", "c.pt"))
    planned = following(
        stereo("plan", "a.relevance.safetensors", *SMALL, "--guidance", 3, "--mu", 0.01, "--keep", 0, "-o", "d.pt")
    )
    for command in (located, again, both, planned):
        text = shlex.join(command)
        for option in ("--dtype bfloat16", "--variant fp16", "--call eta=0.5", f"--model {variant}"):
            assert option in text
        result = stereo(*command, "--limit", 1, "--images", 2, "--dry-run", "--accelerator", "cpu")
        assert result.exit_code == 0, result.stderr
        assert ("guidance 3" in result.stdout) == (command is planned)


def test_what_follows_a_check_takes_what_the_check_was_given(model: Path, stereo, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "who.txt").write_text("a photo of a judge\n")
    given = ("--steps", 3, "--guidance", 2, "--sites", "*.conv2", "--prompts", "who.txt", "--dtype", "bfloat16")
    command = following(stereo("doctor", "--model", model, *given, "--accelerator", "cpu"))
    assert command[0] == "locate" and "*.conv2" in command
    result = stereo(*command, "--dry-run", "--accelerator", "cpu")
    assert result.exit_code == 0 and "would measure 16 samples (1 prompts x 16 seeds) at 3 of 3" in result.stdout


def test_a_fused_checkpoint_is_opened_by_what_is_said(stereo, tmp_path: Path) -> None:
    """Whatever the pipeline's own class."""
    folder = save("sdxl", tmp_path / "sdxl")
    sites = find_sites(DiffusionPipeline.from_pretrained(folder).unet)
    factors = torch.full((1, sum(site.width for site in sites)), 0.5)
    NeuronMask(sites, torch.tensor([1000.0, 0.0]), factors).save(tmp_path / "m.pt")
    result = stereo("export", tmp_path / "m.pt", "--format", "checkpoint", "--model", folder, "-o", tmp_path / "fused")
    assert result.exit_code == 0, result.stderr
    opened = eval(result.stdout.splitlines()[-1].partition("opens it: ")[2])
    assert type(opened) is StableDiffusionXLPipeline
