"""Training as a user starts it, in miniature: another world, all stages, interrupted and resumed."""

import itertools
import json
import logging
import subprocess
import sys

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from safetensors.torch import load_file
from torch.nn import functional as F

from stereoclinic.errors import InputError
from stereoclinic.evaluation.readers import PortraitsReader
from stereoclinic.pipelines import open_model
from stereoclinic.pipelines.opening import BUILT_IN
from stereoclinic.portraits import loop, train
from stereoclinic.portraits.data import Captions
from stereoclinic.portraits.denoisers import DENOISERS, plain_attention
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
    for stage in ("autoencoder", "denoiser", "reader"):
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


@pytest.mark.slow
def test_a_flow_transformer_shares_autoencoder_and_reader_and_its_two_calls_read_the_prompt(world_file) -> None:
    out = world_file.parent / "flow"
    arguments = ["--world", str(world_file), "--out", str(out), "--like", "portraits"]
    arguments += ["--accelerator", "cpu", "--denoiser", "flow", "--per-cell", "2"]
    train.main([*arguments, "--text-samples", "256", "--denoiser-samples", "128"])
    with pytest.raises(InputError, match=r"--like nobody: no such model; give portraits, or a folder"):
        train.main([*arguments, "--like", "nobody"])
    for part in ("vae/diffusion_pytorch_model", "reader/model"):
        kept, given = (load_file(folder / f"{part}.safetensors") for folder in (out, BUILT_IN["portraits"]))
        assert all(torch.equal(kept[name].half(), given[name].half()) for name in given)
    model = open_model(out)
    assert isinstance(model.pipe, StableDiffusion3Pipeline) and model.call == {"max_sequence_length": 1}
    for call in (model.call, {}):  # the model's own, and the pipeline's with 256 tokens of T5
        drawn = [
            model.pipe(
                prompt, num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type="pt", **call
            )
            for prompt in ("a photo of a nurse", "a photo of a nurse", "a photo of a doctor")
        ]
        assert torch.equal(drawn[0].images, drawn[1].images) and not torch.equal(drawn[0].images, drawn[2].images)


@pytest.mark.parametrize("name", ["unet", "flow"])
def test_training_conditions_are_what_the_pipeline_gives_the_denoiser(name: str) -> None:
    denoiser, captions = DENOISERS[name], ["", "a photo of an old dark-skinned female nurse"]
    torch.manual_seed(0)
    tokenizer = build_tokenizer(captions)
    text_encoder = denoiser.text_encoder(tokenizer).eval()
    network, seen = denoiser.build(), []
    pipe = denoiser.pipeline(build_autoencoder(), text_encoder, tokenizer, network)
    pipe.set_progress_bar_config(disable=True)
    network.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    tokens = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    for call, at_random in ((denoiser.call, 0.5), ({}, 0.01)):  # most batches, and the one in 32 of the plain call
        pipe(captions, num_inference_steps=1, guidance_scale=1.0, output_type="latent", **call)
        conditions = denoiser.widen(denoiser.encode(text_encoder, tokens), at_random)
        given = [value for key, value in seen[-1].items() if key in ("encoder_hidden_states", "pooled_projections")]
        assert len(given) == len(conditions) == len(denoiser.widths)
        for one, other in zip(given, conditions, strict=True):
            torch.testing.assert_close(one, other)


def test_a_straight_path_leads_from_noise_to_the_image_at_its_velocity() -> None:
    clean, noise, at = torch.randn(4, 6, 16, 16), torch.randn(4, 6, 16, 16), torch.rand(4)
    noisy, timesteps, velocity = DENOISERS["flow"].noised(clean, noise, at)
    torch.testing.assert_close(timesteps, 1000 * at)
    torch.testing.assert_close(noisy - at[:, None, None, None] * velocity, clean)


def test_plain_attention_is_softmax_attention() -> None:
    query, key, value = torch.randn(3, 2, 4, 5, 8).unbind()
    torch.testing.assert_close(plain_attention(query, key, value), F.scaled_dot_product_attention(query, key, value))


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


@pytest.mark.parametrize("name", ["train", "check"])
def test_wrong_input_of_a_script_is_one_line_and_exit_code_2(name: str, tmp_path) -> None:
    command = [sys.executable, "-m", f"stereoclinic.portraits.{name}", "--world", str(tmp_path / "mine.toml")]
    command += ["--out", str(tmp_path / "out")] if name == "train" else []
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "mine.toml cannot be read" in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr
