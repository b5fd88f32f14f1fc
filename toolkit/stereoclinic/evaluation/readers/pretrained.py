"""Opening transformers' models for readers: a hub id or a local folder, weights alone, whole or not at all.

Which classes of an image classifier show which group of an axis; several may show one, such as bins of age.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from stereoclinic.errors import InputError, first_line
from stereoclinic.io.reading import check_layers, read_json, read_toml
from stereoclinic.prompts.axes import Axis


def open_model(kind: Any, model: str, spec: str) -> Any:
    """A model of the class `kind` from a hub id or a local folder, frozen.

    Weights are read as tensors alone (safetensors, or torch's with `weights_only`), and no code that comes with a
    model is run. transformers draws what a file lacks at random: a classifier without its head is refused here.

    Args:
        kind: Such as `transformers.CLIPModel`.
        model: A hub id or a folder.
        spec: What it is for, as messages begin: "reader 'clip'".

    Raises:
        InputError: Nothing can be opened under this name, or weights are missing.
    """
    check_layers(Path(model) / "config.json", spec)
    with _quiet(), _told(model, spec):
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
    with _quiet(), _told(model, spec):
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
def _told(model: str, spec: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever the library raises, the files are not what it needs
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
        what = "the folder" if Path(model).is_dir() else f"no folder here, and https://huggingface.co/{model}"
        raise InputError(f"{spec}: {what} cannot be opened{offline}: {first_line(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's own bars and remarks off the terminal, and put them back as they were."""
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


Pairs = list[tuple[str, str]]  # class, group


def parse_classes(given: Iterable[str]) -> Pairs:
    """What `--reader-classes` says: CLASS=GROUP,CLASS=GROUP, or a .toml or .json file with group = [classes].

    Raises:
        InputError: Another form, or no such file.
    """
    pairs: Pairs = []
    for text in given:
        if Path(text).suffix in (".toml", ".json"):
            pairs += _from_file(Path(text))
            continue
        for part in text.split(","):
            label, _, group = part.rpartition("=")  # a class may hold the sign itself
            if not label.strip() or not group.strip():
                raise InputError(
                    f"--reader-classes {text!r}: expected CLASS=GROUP, such as Woman=female,Man=male, or a .toml file"
                    " with group = [classes]"
                )
            pairs.append((label.strip(), group.strip()))
    return pairs


def _from_file(path: Path) -> Pairs:
    table = (read_toml if path.suffix == ".toml" else read_json)(path, "--reader-classes")
    if not isinstance(table, dict) or not all(isinstance(labels, list) for labels in table.values()):
        raise InputError(f"--reader-classes {path}: expected a list of classes for each group, group = [classes]")
    return [(str(label), str(group)) for group, labels in table.items() for label in labels]


def columns_of(axis: Axis, labels: Sequence[str], given: Pairs) -> list[list[int]] | None:
    """The columns of a classifier that show each group of the axis, in its order; None if it cannot tell them apart.

    Args:
        axis: Its groups; without a given class for one, `[reader.hf]` of its file, names and words are looked for.
        labels: The classifier's classes.
        given: Class and group, as from `parse_classes`; groups of other axes are passed over.

    Raises:
        InputError: A given class is not the classifier's, or is given for two groups of the axis.
    """
    own = [(label, group) for label, group in given if group in axis.groups]
    if not own:
        own = [(label, group) for group, word in zip(axis.groups, axis.words, strict=True) for label in (group, word)]
        own += [(label, group) for group in axis.groups for label in axis.classes.get(group, ())]
    place = {_plain(label): column for column, label in enumerate(labels)}
    found: dict[int, str] = {}
    for label, group in own:
        column = place.get(_plain(label))
        if column is None:
            if (label, group) in given:
                shown = ", ".join(labels[:20]) + (", ..." if len(labels) > 20 else "")
                raise InputError(f"--reader-classes: the reader has no class {label!r}; it has {shown}")
            continue
        if found.setdefault(column, group) != group:
            raise InputError(f"--reader-classes: class {label!r} is given for both {found[column]} and {group}")
    columns = [[column for column, group in found.items() if group == each] for each in axis.groups]
    return columns if all(columns) else None


def _plain(label: str) -> str:
    return " ".join(label.casefold().replace("_", " ").split())
