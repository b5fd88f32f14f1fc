"""Models of transformers for readers, from a hub id or a local folder. No code that comes with a model is run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from stereoclinic.errors import InputError, first_line
from stereoclinic.io.reading import check_layers


def open_model(kind: Any, model: str, spec: str) -> Any:
    """A model of the class `kind` from a hub id or a local folder, frozen.

    Weights are read as tensors alone (safetensors, or torch's with `weights_only`). transformers fills in missing
    weights at random; such a model is refused.

    Args:
        kind: Such as `transformers.CLIPModel`.
        model: A hub id or a folder.
        spec: What messages begin with: "reader 'clip'".

    Raises:
        InputError: Nothing can be opened under this name, or weights are missing.
    """
    check_layers(Path(model) / "config.json", spec)
    with _quiet(), _explained(model, spec):
        found, info = kind.from_pretrained(
            model,
            trust_remote_code=False,
            weights_only=True,
            local_files_only=Path(model).is_dir(),
            output_loading_info=True,
        )
    if missing := sorted([*info["missing_keys"], *info.get("mismatched_keys", ())], key=str):
        raise InputError(
            f"{spec}: {model} lacks weights that a {kind.__name__} needs ({len(missing)}, such as"
            f" {missing[0]}); give a model that was trained for this"
        )
    return found.eval().requires_grad_(False)


def open_part(kind: Any, model: str, spec: str, **options: Any) -> Any:
    """A configuration, tokenizer or image processor, as `open_model` opens a model.

    Raises:
        InputError: Nothing can be opened under this name.
    """
    with _quiet(), _explained(model, spec):
        return kind.from_pretrained(model, trust_remote_code=False, local_files_only=Path(model).is_dir(), **options)


def open_pictures(model: str, spec: str) -> Any:
    """The model's own image processor, always the one on PIL: with and without torchvision, pixels are the same."""
    from transformers import AutoImageProcessor

    return open_part(AutoImageProcessor, model, spec, backend="pil")


def pixels(processor: Any, images: Tensor) -> Tensor:
    """(n, 3, H, W) in [0, 1], of any size -> (n, 3, h, w) as the model was trained on.

    Raises:
        InputError: Another shape.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise InputError(f"images have shape {tuple(images.shape)}; expected (n, 3, H, W) with values from 0 to 1")
    bytes_ = (images.float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    pictures = [Image.fromarray(each) for each in bytes_]
    values: Tensor = processor(images=pictures, return_tensors="pt")["pixel_values"]
    return values


@contextmanager
def _explained(model: str, spec: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever the library raises, the files are not what it needs
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
        what = "the folder" if Path(model).is_dir() else f"no folder here, and https://huggingface.co/{model}"
        raise InputError(f"{spec}: {what} cannot be opened{offline}: {first_line(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's progress bars and warnings off the terminal."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
