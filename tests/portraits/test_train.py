"""Training as a user starts it, in miniature: another world, all stages, interrupted and resumed."""

import itertools
import json
import logging

import pytest
import torch
from diffusers import StableDiffusionPipeline

from stereoclinic.errors import InputError
from stereoclinic.evaluation.readers import PortraitsReader
from stereoclinic.portraits import loop, train
from stereoclinic.portraits.data import Captions
from stereoclinic.portraits.model import build_autoencoder, build_tokenizer, whiten
from stereoclinic.portraits.world import DEFAULT_WORLD, World


@pytest.fixture(scope="module")
def world_file(tmp_path_factory: pytest.TempPathFactory):
    """A world of two of the occupations, under another name and seed."""
    head, *entries = DEFAULT_WORLD.read_text().split("[[occupation]]")
    text = head.replace('name = "portraits"', 'name = "two"').replace("seed = 20251027", "seed = 1")
    path = tmp_path_factory.mktemp("world") / "two.toml"
    path.write_text("[[occupation]]".join([text, *entries[:2]]))
    return path


@pytest.mark.slow
def test_a_world_file_trains_a_pipeline_that_diffusers_opens_and_a_rerun_resumes(world_file, caplog) -> None:
    out = world_file.parent / "model"
    arguments = ["--world", str(world_file), "--out", str(out), "--accelerator", "cpu", "--per-cell", "5"]
    for stage in ("autoencoder", "unet", "reader"):
        arguments += [f"--{stage}-samples", "32"]
    caplog.set_level(logging.INFO, "stereoclinic.portraits")
    train.main([*arguments, "--text-samples", "256", "--upto", "text"])
    assert not out.exists()
    train.main([*arguments, "--text-samples", "512"])  # the end is moved on, and the rest done
    assert "autoencoder: resumed at 32 of 32 samples" in caplog.text
    assert "text: resumed at 256 of 512 samples" in caplog.text

    pipe = StableDiffusionPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("a photo of a nurse", num_inference_steps=1, output_type="pt").images
    assert picture.shape == (1, 3, 64, 64)
    reader = PortraitsReader(out / "reader")
    assert reader.classes["occupation"] == ("doctor", "nurse")
    assert set(reader.read(picture)) == {"occupation", "gender", "skin", "age"}
    assert json.loads((out / "stereoclinic.json").read_text()) == {"steps": 20, "guidance": 2.0}

    other = [each if each != str(world_file) else str(DEFAULT_WORLD) for each in arguments]
    with pytest.raises(InputError, match="another world"):
        train.main([*other, "--upto", "autoencoder"])


def test_every_word_of_the_world_is_one_token_and_other_words_still_work() -> None:
    world = World.load()
    tokenizer = build_tokenizer(Captions(world).texts)
    sentence = "a photo of an old dark-skinned female receptionist"
    assert tokenizer.tokenize(sentence) == [each + "</w>" for each in sentence.replace("-", " - ").split()]
    assert tokenizer.decode(tokenizer("a xylophonist in Zürich").input_ids, skip_special_tokens=True).startswith(
        "a xyl"
    )
    words = {word for text in Captions(world).texts for word in text.replace("-", " ").split()}
    assert all(len(tokenizer.tokenize(word)) == 1 for word in words)
    assert build_tokenizer(Captions(world).texts[::-1]).get_vocab() == tokenizer.get_vocab()


def test_whitening_changes_the_latents_and_not_the_pictures() -> None:
    torch.manual_seed(0)
    vae = build_autoencoder().eval().requires_grad_(False)
    pictures = torch.rand(8, 3, 64, 64) * 2 - 1
    latents = vae.encode(pictures).latent_dist.mean
    before = vae.decode(latents).sample
    whiten(vae, latents)
    white = vae.encode(pictures).latent_dist.mean
    torch.testing.assert_close(white.mean((0, 2, 3)), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(white.std((0, 2, 3)), torch.ones(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(vae.decode(white).sample, before, atol=1e-4, rtol=1e-4)


def test_the_learning_rate_warms_up_holds_and_ends_near_zero() -> None:
    rates = [loop.learning_rate(i / 1000) for i in range(1001)]
    assert rates[0] < 0.02 and rates[-1] == 0
    assert rates[100] == rates[600] == 1
    assert all(late <= early for early, late in itertools.pairwise(rates[650:]))
