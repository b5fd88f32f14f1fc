"""The reader that ships with the embedded model: a small network that knows its occupations and its three axes."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from stereoclinic.errors import InputError
from stereoclinic.evaluation.reader_kinds import Request
from stereoclinic.evaluation.readers.base import Reader, group_columns
from stereoclinic.io.files import write_text, write_whole
from stereoclinic.io.reading import is_name, read_json
from stereoclinic.prompts.axes import Axis

SIZE = 64  # of the pictures that PortraitsNet was trained on
MOST_CLASSES = 1000  # of all its heads; a class takes 2048 weights


class PortraitsNet(nn.Module):
    """Four convolutions and one linear head for the occupation and for each axis.

    Args:
        occupations: Class names of the occupation head.
        axes: Class names of each other head.
    """

    width = 128

    def __init__(self, occupations: tuple[str, ...], axes: dict[str, tuple[str, ...]]) -> None:
        super().__init__()
        self.classes = {"occupation": tuple(occupations), **{name: tuple(groups) for name, groups in axes.items()}}
        layers: list[nn.Module] = []
        for before, after in ((3, 32), (32, 64), (64, 96), (96, self.width)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleDict({name: nn.Linear(16 * self.width, len(each)) for name, each in self.classes.items()})

    def features(self, pictures: Tensor) -> Tensor:
        """(n, 3, 64, 64) in [-1, 1] -> (n, 128): means over the image, for Frechet distances."""
        seen: Tensor = self.trunk(pictures)
        return seen.mean(dim=(2, 3))

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """(n, 3, 64, 64) in [-1, 1] -> logits (n, classes) of each head."""
        seen = self.trunk(pictures).flatten(1)
        return {name: head(seen) for name, head in self.heads.items()}

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value.contiguous() for name, value in self.state_dict().items()}
        write_whole(folder / "model.safetensors", lambda place: save_file(weights, place))
        write_text(folder / "config.json", json.dumps({"classes": self.classes}, indent=2))

    @classmethod
    def from_pretrained(cls, folder: Path) -> "PortraitsNet":
        try:
            classes = _classes(read_json(folder / "config.json", "reader's configuration"))
            weights = load_file(folder / "model.safetensors")
            occupations = tuple(classes.pop("occupation"))
            net = cls(occupations, {name: tuple(groups) for name, groups in classes.items()})
            net.load_state_dict(weights)
        except (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            what = " ".join(str(error).split())[:300] or type(error).__name__
            raise InputError(f"no portraits reader in {folder}: {what}") from error
        return net.eval().requires_grad_(False)


class PortraitsReader(Reader):
    """The reader that ships with the embedded model, and with any model trained by `stereoclinic.portraits.train`."""

    name = "portraits"
    only_named = True
    limits = ("It was trained on flat cartoon portraits, and knows no photograph.",)

    def __init__(self, folder: Path) -> None:
        self.net = PortraitsNet.from_pretrained(folder)
        self.classes = self.net.classes

    @torch.no_grad()
    def read(self, images: Tensor, persons: Sequence[str] | None = None) -> dict[str, Tensor]:
        logits = self.net(_as_trained(images))
        return {name: value.softmax(1) for name, value in logits.items()}

    def classifier(self, axis: Axis) -> Callable[[Tensor], Tensor]:
        """(n, 3, H, W) in [0, 1] -> logits (n, K), one for each group of the axis, differentiable in the images.

        Raises:
            InputError: The reader does not know the axis.
        """
        head, columns = group_columns(self, axis)

        def logits(images: Tensor) -> Tensor:
            seen: dict[str, Tensor] = self.net.to(images.device)(_as_trained(images))
            return seen[head][:, columns]

        return logits

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        return self.net.features(_as_trained(images))


def open_own(request: Request) -> Reader:
    """`portraits`: the reader in the pipeline's own folder."""
    if request.own is None:
        raise InputError("reader 'portraits' is the one in the model's folder, and this model brings none")
    return PortraitsReader(request.own)


def open_folder(request: Request) -> Reader:
    """`FOLDER`: a reader that `stereoclinic.portraits.train` wrote."""
    folder = Path(request.spec)
    if not (folder / "config.json").is_file():
        raise InputError(f"reader '{folder}': no config.json in this folder, so no reader")
    if (folder / "preprocessor_config.json").exists() or (folder / "processor_config.json").exists():
        raise InputError(f"reader '{folder}': a transformers model; open it by hf:{folder} or clip:{folder}")
    return PortraitsReader(folder)


def _classes(config: Any) -> dict[str, list[str]]:
    """What a configuration says; raises ValueError for anything but heads with names of their classes."""
    classes = config.get("classes") if isinstance(config, dict) else None
    lists = list(classes.values()) if isinstance(classes, dict) else []
    if not lists or not all(isinstance(names, list) and names and all(map(is_name, names)) for names in lists):
        raise ValueError("its config.json does not name the classes of each head")
    if sum(map(len, lists)) > MOST_CLASSES:
        raise ValueError(f"more than {MOST_CLASSES} classes")
    return dict(classes or {})


def _as_trained(images: Tensor) -> Tensor:
    """(n, 3, H, W) in [0, 1] -> (n, 3, 64, 64) in [-1, 1]; area interpolation averages what a smaller pixel covers."""
    images = images.float().clamp(0, 1)
    if images.shape[-2:] != (SIZE, SIZE):
        images = functional.interpolate(images, size=(SIZE, SIZE), mode="area")
    return images * 2 - 1
