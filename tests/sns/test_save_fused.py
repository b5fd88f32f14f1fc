"""A fused model as a folder: plain diffusers opens it, and an interrupted save leaves nothing."""

import os

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from peft import LoraConfig
from tests.sns.conftest import draw, same_bits, state_of, static_mask

from stereoclinic.errors import InputError
from stereoclinic.sns.damp import suppress
from stereoclinic.sns.fuse import fuse, save_fused


def test_a_fused_folder_is_opened_by_plain_diffusers_and_draws_the_hooked_models_picture(pipe, tmp_path):
    mask = static_mask(pipe.unet)
    with suppress(pipe, mask):
        hooked = draw(pipe, ["a photo"])
    fuse(pipe, mask)
    folder = tmp_path / "deep" / "fused"
    save_fused(pipe, folder)
    state = state_of(pipe.unet)
    assert os.listdir(folder.parent) == ["fused"]
    assert not any("stereoclinic" in path.read_text() for path in folder.rglob("*.json"))
    opened = DiffusionPipeline.from_pretrained(folder, dtype=torch.float64)
    opened.set_progress_bar_config(disable=True)
    assert type(opened) is StableDiffusionPipeline
    assert same_bits(state_of(opened.unet), state)
    torch.testing.assert_close(draw(opened, ["a photo"]), hooked, atol=1e-8, rtol=1e-8)


def test_an_interrupted_save_leaves_what_was_there(pipe, tmp_path, monkeypatch):
    fuse(pipe, static_mask(pipe.unet))
    for error in (KeyboardInterrupt, OSError(28, "No space left on device")):

        def fail(folder, error=error, **_):
            (folder / "half").write_text("written")
            raise error

        monkeypatch.setattr(pipe, "save_pretrained", fail)
        empty = tmp_path / "empty"
        empty.mkdir(exist_ok=True)
        for folder in (tmp_path / "new", empty):
            with pytest.raises((KeyboardInterrupt, InputError)):
                save_fused(pipe, folder)
        assert os.listdir(tmp_path) == ["empty"]
        assert os.listdir(empty) == []
    monkeypatch.undo()
    (empty / "kept").write_text("mine")
    for folder in (empty, empty / "kept"):
        with pytest.raises(InputError, match="exists and is not an empty folder; choose another"):
            save_fused(pipe, folder)
    assert (empty / "kept").read_text() == "mine"
    assert os.listdir(empty) == ["kept"]


def test_what_cannot_be_saved_as_fused(pipe, unet, tmp_path):
    with pytest.raises(InputError, match="weights are untreated"):
        save_fused(pipe, tmp_path / "m")
    with pytest.raises(InputError, match="cannot save a UNet2DConditionModel"):
        save_fused(unet, tmp_path / "m")
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    fuse(pipe, static_mask(unet))
    with pytest.raises(InputError, match="unet has a LoRA"):
        save_fused(pipe, tmp_path / "m")
    assert os.listdir(tmp_path) == []
