"""CLIPScore: how well pictures fit their prompts, for models whose occupations no reader of ours knows.

    CLIPScore = max(100 cos(E_image, E_text), 0)

torchmetrics computes it. Its own way of opening a CLIP expects that `get_image_features` gives a tensor, where
transformers 5 gives an output whose `pooler_output` is that tensor, so it is handed an adapter in between. It also cuts
off the end-of-text token of a long prompt, which is the one that CLIP's embedding is read at, so prompts are cut first.

Reference: Hessel et al., CLIPScore: A Reference-free Evaluation Metric for Image Captioning, EMNLP 2021, section 3
(there scaled by 2.5 instead of 100).
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
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
def clip_scores(
    images: Tensor,
    prompts: Sequence[str],
    clip: str | tuple[Any, Any] = DEFAULT,
    warn: Callable[[str], None] = warnings.warn,
) -> Tensor:
    """CLIPScore of each picture with its prompt; of a prompt that is longer than CLIP reads, with its beginning.

    Args:
        images: (n, 3, H, W) uint8.
        prompts: n texts.
        clip: A hub id or folder of a CLIPModel, or (model, processor).
        warn: Told of prompts that are too long.

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
    longest = model.config.text_config.max_position_embeddings
    if long := [each for each in dict.fromkeys(prompts) if _tokens(processor, each) > longest]:
        more = f" ({len(long)} prompts are)" if len(long) > 1 else ""
        warn(f"CLIPScore: prompt {long[0]!r} is longer than the {longest} tokens that CLIP reads{more}; its end is cut")
    adapter = _Features(model.eval())
    cut = partial(_processed, processor, longest)
    # One by one: of several at once torchmetrics gives the mean alone.
    pairs = zip(images.to(model.device), prompts, strict=True)
    found = [clip_score(image, prompt, model_name_or_path=lambda: (adapter, cut)) for image, prompt in pairs]
    return torch.stack(found).double().cpu()


def _tokens(processor: Any, prompt: str) -> int:
    return len(processor(text=[prompt])["input_ids"][0])


def _processed(processor: Any, longest: int, **given: Any) -> Any:
    """What a processor makes of pictures, or of a text, cut as CLIP does: the end-of-text token stays last."""
    if "text" in given:
        given |= {"truncation": True, "max_length": longest}
    return processor(**given)


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
