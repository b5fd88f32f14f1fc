"""`stereo export`: files that diffusers draws the same with, and one line where there can be none."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from stereoclinic.ddtd.relevance import Relevance
from stereoclinic.sns.damp import suppress
from stereoclinic.sns.linear import choose, static_mask
from stereoclinic.sns.mask import NeuronMask
from stereoclinic.sns.select import Selection


def test_a_checkpoint_is_one_that_diffusers_opens(model, located, stereo, tmp_path: Path):
    relevance = located.with_name("gender.relevance.safetensors")
    mask = tmp_path / "one.pt"
    result = stereo("mask", relevance, "--one-for-all", "--until", 0, "-o", mask, "--quiet")
    assert result.exit_code == 0, result.stderr
    result = stereo("export", mask, "--format", "checkpoint", "-o", tmp_path / "fused")
    assert result.exit_code == 0, result.stderr
    from diffusers import StableDiffusionPipeline

    StableDiffusionPipeline.from_pretrained(tmp_path / "fused")
    shared = ("-n", 2, "--json", "--quiet", "--steps", 3)
    text = "a photo of a doctor"
    hooked = stereo("apply", text, "--mask", mask, "--model", model, "-o", tmp_path / "h", *shared)
    nothing = ("--mask", mask, "--force", "--strength", 0)
    fused = stereo("apply", text, *nothing, "--model", tmp_path / "fused", "-o", tmp_path / "f", *shared)
    assert fused.exit_code == 0, fused.stderr
    for i in (2, 3):  # treated
        files = [json.loads(each.stdout)["images"][i]["file_name"] for each in (hooked, fused)]
        one, two = (torch.frombuffer(bytearray(Image.open(file).tobytes()), dtype=torch.uint8).int() for file in files)
        assert (one - two).abs().max() <= 1


def draw(pipe) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe("a doctor", num_inference_steps=2, output_type="latent", generator=generator).images


def test_a_lora_of_a_located_mask_loads_and_does_what_the_static_one_does(model, located, stereo, tmp_path: Path):
    file = tmp_path / "gender.safetensors"
    result = stereo("export", located, "--static", "-o", file)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[-1].endswith(f"diffusers opens it: pipe.load_lora_weights({str(file)!r})")
    changed, leans, off_axis = (line for line in result.stderr.splitlines() if line.startswith("note: --static"))
    assert "every timestep gets the damping of timesteps 1000 to 600" in changed
    assert "forecast of mean |lean|" in leans and "untreated" in leans and "the mask" in leans and "static" in leans
    assert "forecast of movement off the axis" in off_axis
    pipe = DiffusionPipeline.from_pretrained(model)
    bare = draw(pipe)
    with suppress(pipe, static_mask(NeuronMask.load(located))):
        expected = draw(pipe)
    pipe.load_lora_weights(file)
    torch.testing.assert_close(draw(pipe), expected, atol=1e-4, rtol=1e-3)
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), bare) and not torch.allclose(bare, expected, atol=1e-3)


def test_json_dry_run_rank_and_several_masks(model, located, stereo, tmp_path: Path):
    other = tmp_path / "other.pt"
    relevance = Relevance.load(located.with_name("gender.relevance.safetensors"))
    choose(relevance, Selection(until=0)).save(other)
    how = ("export", other, located, "--static", "--rank", 1, "-o", tmp_path / "m.safetensors")
    result = stereo(*how, "--dry-run")
    assert result.exit_code == 0 and f"would write {how[-1]}, a lora file" in result.stdout
    assert not how[-1].exists()
    result = stereo(*how, "--json", "--quiet")
    written = json.loads(result.stdout)
    assert set(written["ranks"].values()) == {1} and 0 < written["lost_of_all"] < 1
    assert written["notes"] and written["format"] == "lora" and written["path"] == str(how[-1])
    shown = stereo(*how, "--quiet").stdout
    assert f"--rank 1 loses {written['lost_of_all']:.1%} of the difference (Frobenius norm); most in" in shown


def test_one_group_of_an_allocating_mask(located, stereo, refused, tmp_path: Path):
    mask = static_mask(NeuronMask.load(located))
    both = torch.stack([mask.factors, 1 - 0.5 * mask.damping])
    replace(mask, factors=both, groups=("female", "male")).save(tmp_path / "allocated.pt")
    assert "--group NAME), or export the nearest" in refused("export", "allocated.pt", "-o", "m.safetensors")
    assert "group 'other' is not known" in refused("export", "allocated.pt", "--group", "other", "-o", "m.safetensors")
    result = stereo("export", "allocated.pt", "--group", "female", "-o", "f.safetensors")
    assert result.exit_code == 0, result.stderr
    mask.save("plain.pt")
    stereo("export", "plain.pt", "-o", "g.safetensors")
    files = load_file("f.safetensors"), load_file("g.safetensors")
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    result = stereo("export", "allocated.pt", "--static", "-o", "m.safetensors")
    assert result.exit_code == 0 and "every image gets the mean damping of female, male" in result.stderr
    assert "its relevance is not next to it; bench it" in result.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("-o", "m.safetensors"), "its factors differ between timesteps, but weights serve all of them; make it with"),
        (("-o", "m.safetensors", "--static", "--model", "portraits"), "mask does not fit: "),
        (("-o", "m.safetensors", "--static", "--strength", 2), "strength 2.0; expected 0 (no damping) to 1"),
        (("-o", "m.safetensors", "--static", "--strength", 0), "the mask damps nothing at strength 0"),
        (("-o", "m.pt", "--static"), "m.pt: expected a file name ending in .safetensors"),
        (("-o", "m.safetensors", "--static", "--format", "gguf"), "expected lora, diff, ia3 or checkpoint"),
        (("-o", "m", "--static", "--format", "checkpoint", "--rank", 2), "--rank 2: expected 1 or more, with"),
        (("-o", "m.safetensors", "--static", "--rank", 0), "--rank: Input should be greater than or equal to 1"),
        (("-o", "m.safetensors", "--group", "male"), "group 'male' is not known; this mask has none"),
    ],
)  # fmt: skip
def test_what_cannot_be_exported_is_one_line(located, refused, options, says):
    lines = refused("export", located, "--quiet", *options)
    assert says in lines


def test_a_relevance_file_is_not_a_mask(located, refused):
    assert "relevance" in refused("export", located.with_name("gender.relevance.safetensors"), "-o", "m.safetensors")
