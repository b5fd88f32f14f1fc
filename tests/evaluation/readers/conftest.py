"""Tiny random models of transformers, built from configurations and saved as folders; nothing is fetched."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTForImageClassification
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from stereoclinic.evaluation.readers import PortraitsNet
from stereoclinic.portraits.model import build_tokenizer
from stereoclinic.prompts.axes import load_axis
from stereoclinic.prompts.occupations import PORTRAITS

CAPTIONS = ["a photo portrait headshot of the face of an old young elderly female male person woman man at work doctor"]
FAIRFACE_AGES = ("0-2", "3-9", "10-19", "20-29", "30-39", "40-49", "50-59", "60-69", "more than 70")


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIPModel on 32 x 32 pictures with its tokenizer and image processor."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(CAPTIONS)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config=sizes | text | ends,
        vision_config=sizes | {"image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    crop = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=crop).save_pretrained(folder)
    return folder


def write_classifier(folder: Path, labels: tuple[str, ...], seed: int = 0, **options: object) -> Path:
    """A ViT that names one of the labels."""
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8,
        id2label=dict(enumerate(labels)), label2id={label: k for k, label in enumerate(labels)}, **options,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    model.classifier.weight.data *= 50  # sure of itself, and differently so for each picture
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`classifier(labels)`: the folder of a tiny ViT with these classes."""
    return lambda labels, **options: write_classifier(tmp_path_factory.mktemp("classifier"), tuple(labels), **options)


@pytest.fixture(scope="session")
def portraits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A portraits reader that has learnt nothing."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("portraits") / "reader"
    axes = {name: load_axis(name).groups for name in ("gender", "skin", "age")}
    PortraitsNet(tuple(PORTRAITS), axes).eval().save_pretrained(folder)
    return folder


@pytest.fixture
def images() -> Tensor:
    """(6, 3, 40, 56) in [0, 1], in whole steps of a byte so that a picture file would hold them."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (6, 3, 40, 56), generator=generator).float() / 255
