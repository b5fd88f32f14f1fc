"""Where in the image the relevance of the strongest neurons lies, for the prompts where each neuron is strongest.

FOLDER/sheet.png            one row for each neuron: images, and the same with the neuron's relevance over them
FOLDER/01-up-2-conv-1-8.png one neuron
FOLDER/index.json           neurons, prompts, seeds, and the sum of each map
"""

import json
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from stereoclinic.ddtd.maps import Spot, relevance_maps
from stereoclinic.ddtd.relevance import Relevance
from stereoclinic.ddtd.trajectory import Settings
from stereoclinic.errors import InputError
from stereoclinic.io.files import whole_folder
from stereoclinic.io.text import slug
from stereoclinic.pipelines.memory import AdaptiveBatch
from stereoclinic.pipelines.model import Model
from stereoclinic.prompts.axes import Axis
from stereoclinic.prompts.sets import Row, write
from stereoclinic.report.layouts import Page
from stereoclinic.report.pictures import as_written, lettered

SCHEMA = "stereo inspect --images, 1"
INDEX, SHEET = "index.json", "sheet.png"
#: Number of labels shown for each neuron.
SHOWN = 4

_LETTERS, _LINES = 24, 3  # of the legend
_LONGEST = 24  # letters of a label or a group
_TILE, _GAP, _MARGIN, _LEGEND, _CAPTION, _HEAD, _FOOT = 1.15, 0.05, 0.15, 1.75, 0.2, 0.65, 0.55  # inches
#: Distinct for every kind of colour vision, and no group's usual colour.
_COLOURS, _SCALE = "PuOr_r", Normalize(-1, 1)
_NOTE = (
    "Over each image, and summed up at its label: relevance toward a group at these timesteps. Each neuron has its"
    " own scale.\nstereotype: mean relevance toward the stereotype, ± one standard error between labels."
)


@dataclass(frozen=True)
class View:
    """One image with a neuron's map: (3, H, W) in [0, 1], and (h, w) relevance toward the first group."""

    label: str
    prompt: str
    seed: int
    picture: Tensor
    map: Tensor


@dataclass(frozen=True)
class Response:
    """A neuron, as `located.relevance_summary` describes it, with its images."""

    neuron: dict[str, Any]
    views: list[View]

    @property
    def file(self) -> str:
        """File name without the rank, safe on any system."""
        return f"{slug(self.neuron['place'])}-{self.neuron['neuron']}.png"


def settings_of(relevance: Relevance, composite: str | None = None) -> Settings:
    """The settings that relevance was located with, from its metadata.

    Args:
        relevance: As `locate` returns it.
        composite: Replaces the composite in the metadata.

    Raises:
        InputError: The settings cannot be read, or name a classifier, which no file holds.
    """
    metadata = relevance.metadata
    if metadata.get("target") == "classifier":
        raise InputError(
            "this relevance explains a classifier, which the file does not hold; locate a lean to draw images"
        )
    names = ("composite", "root", "steps", "guidance", "every", "target")
    known = {name: metadata[name] for name in names if name in metadata}
    if composite:
        known["composite"] = composite
    try:
        return Settings(**known, bins=len(relevance.bin_edges) - 1)
    except (TypeError, ValueError) as error:
        raise InputError(f"the relevance's settings cannot be read ({error}); locate again") from error


def axis_of(relevance: Relevance) -> Axis:
    """The axis that relevance was located with, even if its file has changed since.

    Raises:
        InputError: The metadata does not hold the words of the axis.
    """
    words = relevance.metadata.get("words")
    if not isinstance(words, list) or len(words) != len(relevance.groups):
        raise InputError("the relevance does not hold the words of its axis; locate again")
    return Axis(str(relevance.metadata.get("axis") or "axis"), relevance.groups, tuple(map(str, words)))


def respond(
    model: Model,
    relevance: Relevance,
    neurons: Sequence[dict[str, Any]],
    rows: list[Row],
    settings: Settings,
    batch_size: int = 8,
    warn: Callable[[str], None] = lambda text: None,
    progress: Callable[[int], None] | None = None,
) -> list[Response]:
    """Draw an image for each row, and map each neuron over the images of the labels where it is strongest.

    Neurons of layers that work on text tokens have no place in an image; they are left out with a warning.

    Args:
        model: The pipeline that the relevance was located in.
        relevance: As `locate` returns it.
        neurons: Rows of `located.relevance_summary`.
        rows: One for each label of these neurons, see `samples`.
        settings: As in the run that located the neurons.
        batch_size: Images drawn together.
        warn: Called with a line about a smaller batch or about neurons that are left out.
        progress: Called after each measured step with the number of images in it.

    Raises:
        InputError: As `maps.relevance_maps`, or no neuron has a place in an image.
    """
    at = {row["label"]: i for i, row in enumerate(rows)}
    sites = {site.name: site for site in relevance.sites}
    asked, neurons = len(neurons), [neuron for neuron in neurons if sites[neuron["site"]].stream == "image"]
    spots = [Spot(sites[neuron["site"]], neuron["neuron"], neuron["bin"]["number"]) for neuron in neurons]
    parts = AdaptiveBatch(batch_size, warn).each(
        lambda part: relevance_maps(
            model, axis_of(relevance), rows[part], settings, relevance.bin_edges, spots, progress=progress
        ),
        len(rows) if spots else 0,
    )
    pictures = torch.cat([part.pictures for part in parts]) if parts else torch.empty(0, 3, 1, 1)
    responses = []
    for i, neuron in enumerate(neurons):
        maps = torch.cat([part.maps[i] for part in parts])
        if spots[i].site.dim == 1 or _fits(maps, pictures):
            rows_of = [at[label] for label in loudest(neuron, relevance.groups[0])]
            views = [View(rows[n]["label"], rows[n]["prompt"], rows[n]["seed"], pictures[n], maps[n]) for n in rows_of]
            responses.append(Response(neuron, views))
    if not responses:
        raise InputError(
            f"none of the top {asked} neurons works on image tokens alone, so none has a place in an image; list more"
            " neurons with --top"
        )
    if (left := asked - len(responses)) > 0:
        warn(f"{left} of {asked} neurons work on text tokens too: they have no place in an image")
    return responses


def _fits(maps: Tensor, pictures: Tensor) -> bool:
    """Whether maps (B, h, w) have the aspect ratio of images (B, 3, H, W), up to one row or column of padding."""
    (height, width), (high, wide) = maps.shape[1:], pictures.shape[2:]
    return abs(height - width * high / wide) <= 1 or abs(width - height * wide / high) <= 1


def loudest(neuron: dict[str, Any], group: str, count: int = SHOWN) -> list[str]:
    """The labels where a neuron's mean relevance is largest in size, from most toward the group to most against it."""
    values = {row["label"]: row["relevance"][group] for row in neuron["profile"]}
    known = {label: value for label, value in values.items() if value is not None}
    chosen = sorted(known, key=lambda label: -abs(known[label]))[:count]
    return sorted(chosen, key=lambda label: -known[label])


def samples(prompts: Iterable[Row], neurons: Sequence[dict[str, Any]], group: str, seed: int) -> list[Row]:
    """The first prompt of each label where some neuron is strongest, with the seed.

    Args:
        prompts: Rows with the columns of `prompts.COLUMNS`.
        neurons: Rows of `located.relevance_summary`.
        group: The first group of the axis.
        seed: Seed of the images.

    Raises:
        InputError: A label has no prompt.
    """
    by_label: dict[str, Row] = {}
    for row in prompts:
        by_label.setdefault(row["label"], row)
    labels = list(dict.fromkeys(label for neuron in neurons for label in loudest(neuron, group)))
    for label in labels:
        if label not in by_label:
            raise InputError(
                f"no prompt has the label {label!r}, where a neuron is strongest; the prompts have"
                f" {', '.join(list(by_label)[:6])}; give the prompts that the relevance was located with"
            )
    return [{**by_label[label], "prompt": write(by_label[label]), "seed": seed} for label in labels]


def write_responses(folder: Path, responses: Sequence[Response], groups: Sequence[str], about: dict[str, Any]) -> None:
    """Write the sheet, one image for each neuron, and the index: all of them or none.

    Args:
        folder: Made if it does not exist; an earlier run's folder is replaced.
        responses: As `respond` returns them.
        groups: Of the axis.
        about: Plain data about the run, for the index.

    Raises:
        InputError: The folder cannot be written or holds other files, see `check_folder`.
    """
    check_folder(folder)
    files = [f"{i:02d}-{response.file}" for i, response in enumerate(responses, start=1)]
    index = {
        "schema": SCHEMA,
        **about,
        "toward": groups[0],
        "sheet": SHEET,
        "neurons": [
            {
                "file": file,
                **{name: response.neuron[name] for name in ("site", "place", "neuron", "bin", "mean", "stderr", "t")},
                "views": [
                    {
                        "label": view.label,
                        "prompt": view.prompt,
                        "seed": view.seed,
                        "relevance": float(view.map.sum()),
                        "map": list(view.map.shape),
                    }
                    for view in response.views
                ],
            }
            for file, response in zip(files, responses, strict=True)
        ],
    }
    names = ("model", "composite", "root", "target", "guidance")
    facts = " · ".join(f"{name} {about[name]}" for name in names if about.get(name) is not None)
    with whole_folder(folder.resolve()) as temporary:
        draw(responses, groups, facts).savefig(temporary / SHEET, dpi=120)
        for file, response in zip(files, responses, strict=True):
            draw([response], groups, facts).savefig(temporary / file, dpi=160)
        (temporary / INDEX).write_text(json.dumps(index, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def check_folder(folder: Path) -> None:
    """Refuse, before any work is done, a folder that cannot be written or replaced.

    Raises:
        InputError: It is a file, its parent does not exist, or it holds files that `write_responses` did not write.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; images go to a folder")
    if not folder.resolve().parent.is_dir():
        raise InputError(f"{folder}: the folder {folder.resolve().parent} does not exist; make it first")
    if folder.is_dir() and any(folder.iterdir()):
        try:
            ours = json.loads((folder / INDEX).read_text(encoding="utf-8"))["schema"] == SCHEMA
        except (OSError, ValueError, TypeError, KeyError):
            ours = False
        if not ours:
            raise InputError(f"{folder} holds files that no earlier run wrote; give a new or empty folder")


def draw(responses: Sequence[Response], groups: Sequence[str], facts: str = "") -> Figure:
    """One row for each neuron: each image, and the same in grey with the neuron's relevance over it."""
    columns = max(len(response.views) for response in responses)
    shape = responses[0].views[0].picture.shape
    tall = _TILE * shape[1] / shape[2]
    pair, row = 2 * (_TILE + _GAP) + 0.15, tall + _CAPTION + 0.12
    height = _HEAD + len(responses) * row + _FOOT
    page = Page(max(_MARGIN + _LEGEND + columns * pair + _MARGIN, 5.2), height, _MARGIN)

    def tile(x: float, y: float) -> Axes:
        axes = page.axes(x, y, _TILE, tall)
        axes.set_axis_off()
        return axes

    title = "What the strongest neurons respond to" if len(responses) > 1 else "What a neuron responds to"
    page.text(0, 0.28, title, 11, fontweight="bold")
    page.text(0, 0.47, lettered(facts, 140), 7.5)
    for i, response in enumerate(responses):
        y = _HEAD + i * row + _CAPTION
        names, facts_of = _legend(response.neuron)
        for n, words in enumerate((*names, *facts_of), start=1):
            page.text(0, y + 0.15 * n, words, 7.5, fontweight="bold" if n <= len(names) else "normal")
        maps = [_enlarged(view.map, view.picture.shape[1:]) for view in response.views]
        most = max(float(each.abs().max()) for each in maps) or 1.0
        for column, (view, enlarged) in enumerate(zip(response.views, maps, strict=True)):
            x = _LEGEND + column * pair
            page.text(x, y - 0.05, f"{lettered(view.label, _LONGEST)}  {float(view.map.sum()):+.3f}", 7.5)
            picture, values = view.picture.permute(1, 2, 0).float().numpy(), (enlarged / most).numpy()
            tile(x, y).imshow(picture, interpolation="nearest")
            axes = tile(x + _TILE + _GAP, y)
            # Pale, so that both colours stand out from it.
            axes.imshow(0.5 + 0.5 * picture.mean(2), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.imshow(values, cmap=_COLOURS, norm=_SCALE, alpha=np.abs(values) ** 0.6)
    bar = page.axes(0.2, height - 0.4, 1.3, 0.1)
    page.figure.colorbar(ScalarMappable(_SCALE, _COLOURS), cax=bar, orientation="horizontal", ticks=[-1, 0, 1])
    others = "other groups" if len(groups) > 2 else groups[1]
    bar.set_xticklabels([lettered(others, _LONGEST), "0", lettered(groups[0], _LONGEST)], fontsize=7)
    bar.tick_params(length=2, pad=1)
    page.text(2.0, height - 0.33, _NOTE, 7, color="0.35", va="center")
    return as_written(page.figure)


def _legend(neuron: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Lines beside a neuron's images: its name, and its timesteps and mean."""
    error = "" if neuron["stderr"] is None else f" ± {neuron['stderr']:.3f}"
    name = lettered(neuron["place"], (_LINES - 1) * _LETTERS)
    names = textwrap.wrap(f"{name} #{neuron['neuron']}", _LETTERS, max_lines=_LINES, placeholder="...")
    times = f"t {neuron['bin']['from']:.0f} to {neuron['bin']['to']:.0f}"
    return names, [times, f"stereotype {neuron['mean']:+.3f}{error}"]


def _enlarged(values: Tensor, size: Sequence[int]) -> Tensor:
    """Resize (h, w) to (H, W), bilinearly."""
    return torch.nn.functional.interpolate(
        values[None, None].float(), tuple(size), mode="bilinear", align_corners=False
    )[0, 0]
