"""Model families: one file each says how prompts are encoded, how noise is predicted and how a step is taken."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from stereoclinic.errors import InputError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from stereoclinic.denoisers.stable_diffusion import StableDiffusion

BUILT_IN = {"portraits": Path(__file__).parent.parent / "portraits" / "weights"}


def model_folder(model: str | Path) -> Path | None:
    """The local folder of a model, or None when it is a hub id."""
    path = BUILT_IN.get(str(model), Path(model))
    return path if path.is_dir() else None


def open_pipeline(model: str | Path = "portraits", device: str = "cpu", dtype: str = "float32") -> "DiffusionPipeline":
    """Open a built-in model by name, a local diffusers folder, or a hub id. No remote code is run.

    Raises:
        InputError: Nothing can be opened under this name; the message says what was tried.
    """
    import torch
    from diffusers import DiffusionPipeline

    folder = model_folder(model)
    path = Path(model)
    if folder is None and path.exists():
        raise InputError(f"model {model}: a file; a diffusers pipeline is a folder with model_index.json")
    if folder is not None and not (folder / "model_index.json").is_file():
        raise InputError(f"model {model}: no model_index.json in {folder}; a diffusers pipeline folder has one")
    try:
        with _no_bars():
            pipe = DiffusionPipeline.from_pretrained(
                str(folder or model),
                dtype=getattr(torch, dtype),
                local_files_only=folder is not None,
                low_cpu_mem_usage=False,  # needs accelerate, which is no requirement here
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise InputError(
            f"model {str(model)!r} is no built-in model ({', '.join(BUILT_IN)}), no pipeline folder, and could not be"
            f" fetched from the hub{offline}: {first}"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Keep the libraries' own loading bars off the terminal, and put them back as they were."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    loggers = [each for each in (diffusers_logging, transformers_logging) if each.is_progress_bar_enabled()]
    for each in loggers:
        each.disable_progress_bar()
    try:
        yield
    finally:
        for each in loggers:
            each.enable_progress_bar()


def open_denoiser(model: str | Path = "portraits", device: str = "cpu", dtype: str = "float32") -> "StableDiffusion":
    """`open_pipeline`, wrapped by the family it belongs to.

    Raises:
        InputError: Also when the pipeline's family is not one that can be treated.
    """
    from diffusers import StableDiffusionPipeline

    from stereoclinic.denoisers.stable_diffusion import StableDiffusion

    pipe = open_pipeline(model, device, dtype)
    if type(pipe) is not StableDiffusionPipeline:
        raise InputError(f"model {str(model)!r} is a {type(pipe).__name__}; StableDiffusionPipeline is supported")
    return StableDiffusion(pipe, str(model), model_folder(model))
