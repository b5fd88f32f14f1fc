"""CLIPScore with a tiny random CLIP, offline, against its formula."""

import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer, ViTConfig

from stereoclinic.errors import InputError
from stereoclinic.evaluation.instruments import clip_scores, open_clip

PROMPTS = ["a doctor", "a nurse", "a doctor"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory):
    """A CLIP of two thin layers that spells its words."""
    folder: Path = tmp_path_factory.mktemp("clip")
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz")]
    words = [*letters, "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    thin = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**thin, "vocab_size": len(words), "eos_token_id": len(words) - 1, "projection_dim": 8},
        vision_config={**thin, "image_size": 32, "patch_size": 16, "projection_dim": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    size = {"height": 32, "width": 32}
    pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    return model, CLIPProcessor(pictures, tokenizer)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, 40, 40), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def test_it_is_the_cosine_of_the_embeddings_times_a_hundred_and_never_negative(clip, images):
    model, processor = clip
    found = clip_scores(images, PROMPTS, clip)
    given = processor(text=PROMPTS, images=list(images), return_tensors="pt", padding=True)
    with torch.no_grad():
        seen = model(**given)
    expected = 100 * torch.nn.functional.cosine_similarity(seen.image_embeds, seen.text_embeds)
    torch.testing.assert_close(found, expected.double().clamp_min(0), atol=1e-3, rtol=0)
    assert found.shape == (3,) and found.dtype == torch.float64


def test_the_order_of_the_pairs_does_not_matter(clip, images):
    torch.testing.assert_close(
        clip_scores(images.flip(0), PROMPTS[::-1], clip), clip_scores(images, PROMPTS, clip).flip(0)
    )


def test_a_folder_is_opened_as_the_pair_that_was_saved_there(clip, images, tmp_path: Path):
    for part in clip:
        part.save_pretrained(tmp_path)
    opened = clip_scores(images, PROMPTS, str(tmp_path))
    torch.testing.assert_close(opened, clip_scores(images, PROMPTS, clip), atol=1e-3, rtol=0)


def test_a_prompt_that_clip_does_not_read_to_its_end_is_scored_by_its_beginning(clip, images):
    model, processor = clip
    longest = model.config.text_config.max_position_embeddings
    fits = "a" * (longest - 2)  # the tokenizer spells, and adds a token at either end
    said: list[str] = []
    whole = clip_scores(images, [fits] * 3, clip, said.append)
    assert said == []
    assert torch.equal(clip_scores(images, [fits[:-1] + "bc"] * 3, clip, said.append), whole) is False
    cut = clip_scores(images, [f"{fits} chef", f"{fits} doctor", f"{fits} nurse"], clip, said.append)
    (line,) = said[1:]
    assert f"longer than the {longest} tokens that CLIP reads (3 prompts are)" in line
    torch.testing.assert_close(cut[1:], clip_scores(images[1:], [fits + " x"] * 2, clip, said.append))
    begin = processor.tokenizer(fits + " doctor", truncation=True, max_length=longest)["input_ids"]
    assert begin[-1] == processor.tokenizer.eos_token_id and len(begin) == longest
    with torch.no_grad():
        text = model.get_text_features(torch.tensor([begin]))
        seen = model.get_image_features(**processor(images=list(images), return_tensors="pt"))
    text, seen = (getattr(each, "pooler_output", each) for each in (text, seen))
    expected = 100 * torch.nn.functional.cosine_similarity(seen, text)
    torch.testing.assert_close(cut[1], expected.double().clamp_min(0)[1], atol=1e-3, rtol=0)


def test_wrong_input_is_refused(clip, images, tmp_path: Path):
    with pytest.raises(InputError, match="one prompt for each image"):
        clip_scores(images, PROMPTS[:2], clip)
    with pytest.raises(InputError, match="uint8"):
        clip_scores(images / 255, PROMPTS, clip)
    with pytest.raises(InputError, match="CLIPScore by"):
        clip_scores(images, PROMPTS, str(tmp_path))


def test_what_is_no_clip_is_refused(tmp_path: Path):
    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"CLIPScore by .*: the model is a vit, no CLIP"):
        open_clip(str(tmp_path))
