"""CLIPScore: how well pictures fit their prompts, for models whose occupations no reader of ours knows.

    CLIPScore = max(100 cos(E_image, E_text), 0)

torchmetrics computes it. Its own way of opening a CLIP expects that `get_image_features` gives a tensor, where
transformers 5 gives an output whose `pooler_output` is that tensor, so it is handed an adapter in between.

Reference: Hessel et al., CLIPScore: A Reference-free Evaluation Metric for Image Captioning, EMNLP 2021, section 3
(there scaled by 2.5 instead of 100).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stereoclinic.errors import InputError
from stereoclinic.evaluation.readers.clip import DEFAULT
from stereoclinic.evaluation.readers.pretrained import open_model, open_part, open_pictures


class _Features(nn.Module):
    """A CLIPModel whose features are tensors, whatever the transformers version."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        return _tensor(self.model.get_image_features(pixel_values=pixel_values))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return _tensor(self.model.get_text_features(input_ids=input_ids, attention_mask=attention_mask))


@torch.no_grad()
def clip_scores(images: Tensor, prompts: Sequence[str], clip: str | tuple[Any, Any] = DEFAULT) -> Tensor:
    """CLIPScore of each picture with its prompt.

    Args:
        images: (n, 3, H, W) uint8.
        prompts: n texts.
        clip: A hub id or folder of a CLIPModel, or (model, processor).

    Returns:
        (n,) between 0 and 100, float64.

    Raises:
        InputError: No CLIP under this name, images of another form, or another number of prompts.
    """
    from torchmetrics.functional.multimodal import clip_score

    if images.dim() != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        raise InputError(f"images {tuple(images.shape)} {images.dtype}; expected (n, 3, H, W) uint8")
    if len(images) != len(prompts) or len(prompts) == 0:
        raise InputError(f"{len(images)} images and {len(prompts)} prompts; expected one prompt for each image")
    model, processor = open_clip(clip) if isinstance(clip, str) else clip
    adapter = _Features(model.eval())
    # One by one: of several at once torchmetrics gives the mean alone.
    pairs = zip(images.to(model.device), prompts, strict=True)
    found = [clip_score(image, prompt, model_name_or_path=lambda: (adapter, processor)) for image, prompt in pairs]
    return torch.stack(found).double().cpu()


def open_clip(name: str = DEFAULT, device: str = "cpu") -> tuple[Any, Any]:
    """A CLIPModel and its processor.

    Args:
        name: A hub id or a folder; "clip" is `readers.clip.DEFAULT`.
        device: Where it runs.

    Raises:
        InputError: Nothing can be opened under this name, or it is no CLIP.
    """
    from transformers import AutoConfig, AutoTokenizer, CLIPModel, CLIPProcessor

    name, asked = (DEFAULT if name == "clip" else name), f"CLIPScore by {name!r}"
    if (kind := open_part(AutoConfig, name, asked).model_type) != "clip":
        raise InputError(f"{asked}: the model is a {kind}, no CLIP")
    tokenizer = open_part(AutoTokenizer, name, asked)
    model = open_model(CLIPModel, name, asked).to(device)
    return model, CLIPProcessor(open_pictures(name, asked), tokenizer)


def _tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output
