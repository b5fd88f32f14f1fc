"""Which pipelines can be treated, by their class. A new family is a file of its own and one row of `FAMILIES`."""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stereoclinic.errors import InputError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from stereoclinic.denoisers.base import Denoiser


@dataclass(frozen=True)
class Family:
    """Where a family's `Denoiser` lives, and what diffusers calls its single-file checkpoints."""

    module: str
    name: str
    single_file: tuple[str, ...]


FAMILIES = {
    "StableDiffusionPipeline": Family("stable_diffusion", "StableDiffusion", ("v1", "v2")),
    "StableDiffusionXLPipeline": Family("stable_diffusion_xl", "StableDiffusionXL", ("xl_base", "playground-v2-5")),
}


def check_family(name: Any, components: Iterable[str], model: str) -> None:
    """Refuse a pipeline whose family is not known, saying why.

    Args:
        name: Of its class, as model_index.json has it.
        components: Those that it has.
        model: The name it was asked for by.

    Raises:
        InputError: There is no row for it.
    """
    if not isinstance(name, str):  # [module, class] is code that came with the model
        raise InputError(f"model {model!r} brings a pipeline of its own, {name!r}; code from models is not run")
    if name in FAMILIES:
        return
    supported = " and ".join(FAMILIES)
    raise InputError(f"model {model!r} is a {name}: {_reason(name, set(components))}; {supported} are supported")


def _reason(name: str, components: set[str]) -> str:
    if "controlnet" in components or "ControlNet" in name:
        return "a ControlNet steers it by pictures; give the model without it"
    if "Inpaint" in name:
        return "it fills in parts of a given picture; give the text-to-image model"
    if "text_encoder_2" in components and "text_encoder" not in components and "unet" in components:
        return "an SDXL refiner only finishes another model's pictures; give the base model"
    if "Img2Img" in name:
        return "it starts from a given picture; give the text-to-image model"
    if "transformer" in components:
        return "its denoiser is a transformer, and transformer families are not supported yet"
    return "this family is not supported"


def as_denoiser(pipe: "DiffusionPipeline", model: str = "", folder: Path | None = None) -> "Denoiser":
    """A pipeline that is open already, wrapped by its family.

    Args:
        pipe: The pipeline.
        model: Its name, kept in files; its own by default.
        folder: Where it lies, if it is local.

    Raises:
        InputError: Its family is not known, or it is a variant that cannot be treated.
    """
    model = model or str(getattr(pipe, "name_or_path", "") or "")
    name = type(pipe).__name__
    check_family(name, (each for each, value in pipe.components.items() if value is not None), model)
    family = FAMILIES[name]
    kind: type[Denoiser] = getattr(import_module(f"{__package__}.{family.module}"), family.name)
    return kind(pipe, model, folder)
