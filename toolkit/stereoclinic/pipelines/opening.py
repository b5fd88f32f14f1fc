"""Opening a pipeline: a built-in model, a local folder, a single-file checkpoint, or a hub id.

diffusers does all loading. A model that is missing or not supported is refused before anything large is read or
fetched. No code that comes with a model is run.
"""

import os
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stereoclinic.errors import InputError, first_line
from stereoclinic.io.reading import check_layers, read_json

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from stereoclinic.pipelines.model import Model

_EMBEDDED = Path(__file__).parent.parent / "portraits"
BUILT_IN = {"portraits": _EMBEDDED / "weights", "portraits-flow": _EMBEDDED / "weights-flow"}
DTYPES = ("float32", "bfloat16", "float16")
SINGLE_FILES = (".safetensors", ".ckpt")
#: What makes a folder or a repository a diffusers pipeline.
INDEX = "model_index.json"
#: How weights' names begin in the layout of the original repositories, by part.
_DENOISER = "model.diffusion_model."
_ORIGINAL = {"unet": _DENOISER, "vae": "first_stage_model."}


def open_model(
    model: str | Path = "portraits",
    device: str = "cpu",
    dtype: str = "float32",
    variant: str | None = None,
    call: Mapping[str, Any] | None = None,
    warn: Callable[[str], None] = warnings.warn,
) -> "Model":
    """Open a pipeline, frozen and with options of its call, as the toolkit's functions take it.

    Args:
        model: As in `open_pipeline`, like the next three.
        device: Where it runs.
        dtype: Of its weights.
        variant: Of its weight files.
        call: Options of the pipeline's own call, such as `{"height": 512, "true_cfg_scale": 4.0}`.
        warn: Called with a line where a file contradicts its configuration.

    Raises:
        InputError: Nothing can be opened under this name, the pipeline is not text-to-image with one denoiser, or its
            call does not take an option.
    """
    from stereoclinic.pipelines.model import Model

    opened = Model(open_pipeline(model, device, dtype, variant, warn), str(model), model_folder(model), call)
    opened.variant = variant
    return opened


def model_folder(model: str | Path) -> Path | None:
    """The local folder of a model, or None when it is a file or a hub id."""
    path = BUILT_IN.get(str(model), Path(model))
    return path if path.is_dir() else None


def dtype_of(name: str) -> "torch.dtype":
    """Torch's dtype of this name.

    Raises:
        InputError: Not one that weights are loaded in.
    """
    import torch

    if name not in DTYPES:
        raise InputError(f"dtype {name!r}: weights are loaded in {', '.join(DTYPES)}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def open_pipeline(
    model: str | Path = "portraits",
    device: str = "cpu",
    dtype: str = "float32",
    variant: str | None = None,
    warn: Callable[[str], None] = warnings.warn,
) -> "DiffusionPipeline":
    """Open a model. No code that comes with it is run.

    Args:
        model: A built-in model's name, a diffusers folder, a .safetensors or .ckpt file in the layout of the original
            repositories, or a hub id. A file takes its configuration from the diffusers folder that it lies in, and
            otherwise, as diffusers does, from the hub.
        device: Where it runs.
        dtype: What its weights are loaded in: one of `DTYPES`.
        variant: Of a folder's or repository's weight files: "fp16" opens `model.fp16.safetensors`.
        warn: As of `open_model`.

    Raises:
        InputError: Nothing can be opened under this name, or it is not supported.
    """
    kind, folder, path = dtype_of(dtype), model_folder(model), Path(model)
    with _no_bars():
        if folder is not None:
            pipe = _from_folder(str(model), folder, kind, variant)
        elif path.suffix.lower() in SINGLE_FILES:
            if variant is not None:
                raise InputError(f"--variant {variant}: {path} is a file, and only folders have variants; leave it out")
            pipe = _from_file(path, kind, warn)
        elif path.exists():
            raise InputError(
                f"model {model}: a file; a diffusers pipeline is a folder with {INDEX}, or a checkpoint"
                f" ending in {' or '.join(SINGLE_FILES)}"
            )
        else:
            pipe = _from_hub(str(model), kind, variant)
    _check_whole(pipe, str(model))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def _check_whole(pipe: "DiffusionPipeline", model: str) -> None:
    """Refuse a configuration that asks for weights that the files do not hold, with an InputError."""
    from torch import nn

    for part, component in pipe.components.items():
        if isinstance(component, nn.Module):
            for name, value in component.state_dict().items():
                if value.is_meta:
                    raise InputError(
                        f"model {model}: its {part} lacks the weights {name}, which its configuration asks for"
                    )


def _from_folder(model: str, folder: Path, dtype: "torch.dtype", variant: str | None) -> "DiffusionPipeline":
    _check_index(_read_index(folder, model), model)
    for path in sorted(folder.glob("*/config.json")):
        check_layers(path, f"model {model}")
    try:
        return _from_pretrained(str(folder), dtype, variant, local_files_only=True)
    except Exception as error:  # whatever the library raises, the files are not what it needs
        there = sorted({path.name.split(".")[1] for path in folder.glob("*/*.*.safetensors")})
        hint = f"; its variants: {', '.join(there)}" if there and variant not in there else ""
        raise InputError(f"model {model}: {folder} cannot be opened: {first_line(error)}{hint}") from error


def _from_hub(model: str, dtype: "torch.dtype", variant: str | None) -> "DiffusionPipeline":
    try:  # this small file first: weights of no use here are then never fetched
        path = Path(_fetch(model))
    except Exception as error:
        raise InputError(
            f"model {model!r} is not a built-in model ({', '.join(BUILT_IN)}), a pipeline folder or a checkpoint, and"
            f" https://huggingface.co/{model} could not be fetched{_offline()}: {first_line(error)}"
        ) from error
    _check_index(_read_index(path.parent, model), model)
    try:
        return _from_pretrained(model, dtype, variant, local_files_only=False)
    except Exception as error:
        what = "its weights" if variant is None else f"its weights of variant {variant!r}"
        raise InputError(
            f"model {model!r}: {what} could not be fetched from https://huggingface.co/{model}{_offline()}:"
            f" {first_line(error)}"
        ) from error


def _fetch(repository: str) -> str:
    """The local path of a repository's index."""
    from huggingface_hub import hf_hub_download

    return str(hf_hub_download(repository, INDEX))


def _from_pretrained(
    where: str, dtype: "torch.dtype", variant: str | None, local_files_only: bool
) -> "DiffusionPipeline":
    from diffusers import DiffusionPipeline
    from diffusers.utils import is_accelerate_available

    return DiffusionPipeline.from_pretrained(
        where,
        dtype=dtype,
        variant=variant,
        local_files_only=local_files_only,
        low_cpu_mem_usage=is_accelerate_available(),  # which is no requirement here
    )


def _from_file(path: Path, dtype: "torch.dtype", warn: Callable[[str], None]) -> "DiffusionPipeline":
    """A checkpoint in the layout of the original repositories."""
    from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS, infer_diffusers_model_type

    if not path.is_file():
        raise InputError(f"model {path}: no such file")
    shapes, metadata = _shapes(path)
    if not any(each.startswith(_DENOISER) for each in shapes):
        raise InputError(
            f"model {path}: no denoiser in it (no weights named {_DENOISER}...); give a whole checkpoint, not a"
            " LoRA, an autoencoder or one component of a diffusers folder"
        )
    if (path.parent / INDEX).is_file():
        source, config = str(path.parent), str(path.parent)
        index = _read_index(path.parent, str(path))
    else:
        kind = infer_diffusers_model_type(shapes)
        source, config = DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"], None
        try:
            index = _read_index(Path(_fetch(source)).parent, str(path))
        except Exception as error:
            raise InputError(
                f"model {path} has the kind {kind!r}; its configuration could not be fetched from"
                f" https://huggingface.co/{source}{_offline()}: {first_line(error)}; or put the file into a diffusers"
                " folder, which is then read instead"
            ) from error
    kind_of_pipeline = _check_index(index, str(path))
    where = f"the folder {source}" if config else f"https://huggingface.co/{source}"
    try:
        pipe = kind_of_pipeline.from_single_file(str(path), config=config, dtype=dtype, low_cpu_mem_usage=False)
    except Exception as error:
        hint = "" if config else "; or put the file into a diffusers folder, which is then read instead"
        raise InputError(
            f"model {path} cannot be opened with its configuration from {where}{'' if config else _offline()}:"
            f" {first_line(error)}{hint}"
        ) from error
    for part, prefix in _ORIGINAL.items():
        if getattr(pipe, part, None) is None:
            continue
        held = sum(each.startswith(prefix) for each in shapes)
        if (wanted := len(getattr(pipe, part).state_dict())) > held:  # diffusers leaves the rest at random
            raise InputError(
                f"model {path}: holds {held} weights of a {part}, its configuration from {where} asks for {wanted};"
                " they belong to different models"
            )
    _follow_file(pipe, path, shapes, metadata, warn)
    return pipe


def _follow_file(
    pipe: "DiffusionPipeline",
    path: Path,
    shapes: "Mapping[str, torch.Tensor]",
    metadata: Mapping[str, str],
    warn: Callable[[str], None],
) -> None:
    """Use v-prediction if the checkpoint is marked for it, regardless of its configuration.

    A checkpoint is marked by an empty weight `v_pred` (and `ztsnr`, for a schedule that ends in pure noise) or in its
    metadata.
    """
    wanted: dict[str, Any] = {}
    if "v_pred" in shapes or metadata.get("modelspec.prediction_type") in ("v", "v_prediction"):
        wanted["prediction_type"] = "v_prediction"
    if "ztsnr" in shapes:
        wanted["rescale_betas_zero_snr"] = True
    kind, config = type(pipe.scheduler), pipe.scheduler.config
    for name in [name for name in wanted if name not in config]:
        warn(
            f"model {path} is marked {name}={wanted.pop(name)}, which its {kind.__name__} does not know; give it a"
            " scheduler that does, such as DDIMScheduler"
        )
    changed = {name: value for name, value in wanted.items() if config[name] != value}
    if changed:
        pipe.scheduler = kind.from_config(config, **changed)
        marks = ", ".join(f"{name}={value}" for name, value in changed.items())
        warn(f"model {path} is marked {marks} and opened so, although its configuration says otherwise")


def _shapes(path: Path) -> "tuple[dict[str, torch.Tensor], dict[str, str]]":
    """Empty tensors of the names and shapes in a checkpoint, and its metadata, which .safetensors files have."""
    import torch
    from safetensors import safe_open

    try:
        if path.suffix.lower() == ".safetensors":
            with safe_open(path, framework="pt") as file:
                shapes = {name: file.get_slice(name).get_shape() for name in list(file.keys())}
                metadata = file.metadata() or {}
            return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, metadata
        content: Any = torch.load(path, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"model {path}: holds more than weights, and opening it could run code; convert it to .safetensors, or use"
            " a .safetensors file of the same model"
        ) from error
    except Exception as error:
        raise InputError(f"model {path}: cannot be read as {path.suffix[1:]}: {first_line(error)}") from error
    for _ in range(3):  # no loop without end: a table may hold itself
        content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict):
        raise InputError(f"model {path}: holds a {type(content).__name__}, where named weights are expected")
    return {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}, {}


def _read_index(folder: Path, model: str) -> dict[str, Any]:
    path = folder / INDEX
    if not path.is_file():
        raise InputError(f"model {model}: no {INDEX} in {folder}; a diffusers pipeline folder has one")
    index = read_json(path, f"model {model}:")
    if not isinstance(index, dict) or "_class_name" not in index:
        raise InputError(f"model {model}: {path} names no _class_name, which every diffusers pipeline has")
    return index


def _check_index(index: dict[str, Any], model: str) -> Any:
    """The pipeline class that an index names.

    Raises:
        InputError: It is code that came with the model, not in this diffusers, or not text-to-image.
    """
    import diffusers

    from stereoclinic.pipelines.model import check_class

    name = index.get("_class_name")
    if not isinstance(name, str):  # [module, class]
        raise InputError(f"model {model!r} needs its own pipeline code, {name!r}; code from models is not run")
    kind = getattr(diffusers, name, None)
    if not isinstance(kind, type) or not issubclass(kind, diffusers.DiffusionPipeline):
        raise InputError(
            f"model {model!r} is a {name}, which diffusers {diffusers.__version__} does not have; install a version"
            " that does"
        )
    components = [name for name, value in index.items() if isinstance(value, list) and value and value[0] is not None]
    check_class(kind, components, model)
    return kind


def _offline() -> str:
    return " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""


@contextmanager
def _no_bars() -> Iterator[None]:
    """Switch off the libraries' loading bars for the time of a load."""
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
