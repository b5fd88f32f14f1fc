"""What the strongest neurons respond to: where in the picture their relevance lies, in the prompts they matter most in.

FOLDER/sheet.png            a row a neuron: each picture, and the picture with the neuron's relevance over it
FOLDER/01-up-2-conv-1-8.png one neuron
FOLDER/index.json           what they show: neurons, prompts, seeds, and the relevance that each map adds up to
"""

import json
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from stereoclinic.ddtd.maps import Spot, relevance_maps
from stereoclinic.ddtd.relevance import Relevance
from stereoclinic.ddtd.trajectory import Settings
from stereoclinic.errors import InputError
from stereoclinic.io.files import whole_folder
from stereoclinic.pipelines.memory import AdaptiveBatch
from stereoclinic.pipelines.model import Model
from stereoclinic.prompts.axes import Axis
from stereoclinic.prompts.sets import Row, write
from stereoclinic.report.pictures import as_written, lettered
from stereoclinic.report.report import slug

SCHEMA = "stereo inspect --images, 1"
INDEX, SHEET = "index.json", "sheet.png"
#: Labels shown of each neuron: those in which it is largest, either way.
SHOWN = 4

_LETTERS, _LINES = 24, 3  # of the legend
_LONGEST = 24  # letters of a label or a group
_TILE, _GAP, _MARGIN, _LEGEND, _CAPTION, _HEAD, _FOOT = 1.15, 0.05, 0.15, 1.75, 0.2, 0.65, 0.55  # inches
#: Apart for every kind of colour vision, and of no group's colour in particular.
_COLOURS = "PuOr_r"


@dataclass(frozen=True)
class View:
    """One picture with a neuron's map: (3, H, W) in [0, 1], and (h, w) relevance toward the first group."""

    label: str
    prompt: str
    seed: int
    picture: Tensor
    map: Tensor


@dataclass(frozen=True)
class Response:
    """A neuron, as `located.relevance_summary` describes it, and what it was seen to respond to."""

    neuron: dict[str, Any]
    views: list[View]

    @property
    def file(self) -> str:
        """A name that is safe on any system; the rank is put before it."""
        return f"{slug(self.neuron['place'])}-{self.neuron['neuron']}.png"


def settings_of(relevance: Relevance, composite: str | None = None) -> Settings:
    """The settings that relevance was located with, as its metadata has them.

    Args:
        relevance: What was located.
        composite: In place of its own, which a file knows by name alone.

    Raises:
        InputError: They are not those of this version, or ask for a classifier, which no file holds.
    """
    metadata = relevance.metadata
    if metadata.get("target") == "classifier":
        raise InputError(
            "this relevance is of a classifier, which the file does not hold; locate a lean to draw images"
        )
    names = ("composite", "root", "steps", "guidance", "every", "target")
    known = {name: metadata[name] for name in names if name in metadata}
    try:
        return Settings(
            **{**known, **({"composite": composite} if composite else {})}, bins=len(relevance.bin_edges) - 1
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"the relevance's settings cannot be read ({error}); locate again") from error


def axis_of(relevance: Relevance) -> Axis:
    """The axis as it was when relevance was located, whatever its file says by now.

    Raises:
        InputError: The metadata does not hold its words.
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
    """Draw a picture of each row, and map the neurons over those of the labels that they matter most in.

    Neurons of layers that work on text tokens have no place in a picture; they are left out, and `warn` is told.

    Args:
        model: The pipeline that the relevance is of.
        relevance: What was located.
        neurons: Rows of `located.relevance_summary`.
        rows: One for each of these labels, see `samples`.
        settings: Of the walk.
        batch_size: Pictures drawn together.
        warn: Told when fewer fit in memory.
        progress: Called after each measured step with the number of pictures in it.

    Raises:
        InputError: As `maps.relevance_maps`; or no neuron has a place in a picture.
    """
    at = {row["label"]: i for i, row in enumerate(rows)}
    sites = {site.name: site for site in relevance.sites}
    asked, neurons = len(neurons), [each for each in neurons if sites[each["site"]].stream == "image"]
    spots = [Spot(sites[each["site"]], each["neuron"], each["bin"]["number"]) for each in neurons]
    portions = AdaptiveBatch(batch_size, warn)
    found = portions.each(
        lambda part: relevance_maps(
            model, axis_of(relevance), rows[part], settings, relevance.bin_edges, spots, progress=progress
        ),
        len(rows) if spots else 0,
    )
    maps = [torch.cat(parts) for parts in zip(*(part.maps for part in found), strict=True)]
    placed = [spot.site.dim == 1 or _fits(over, found[0].pictures) for spot, over in zip(spots, maps, strict=True)]
    if not any(placed):
        raise InputError(
            f"none of the top {asked} neurons works on image tokens alone, so none has a place in a picture; name more"
            " by --top"
        )
    if sum(placed) < asked:
        warn(f"{asked - sum(placed)} of {asked} neurons work on text tokens too: they have no place in a picture")
    pictures = torch.cat([part.pictures for part in found])

    def view(label: str, own: Tensor) -> View:
        i = at[label]
        return View(label, rows[i]["prompt"], rows[i]["seed"], pictures[i], own[i])

    return [
        Response(neuron, [view(label, own) for label in loudest(neuron, relevance.groups[0])])
        for neuron, own, fits in zip(neurons, maps, placed, strict=True)
        if fits
    ]


def _fits(maps: Tensor, pictures: Tensor) -> bool:
    """Whether (B, h, w) has the shape of the pictures (B, 3, H, W), give or take one row or column of padding."""
    (height, width), (high, wide) = maps.shape[1:], pictures.shape[2:]
    return abs(height - width * high / wide) <= 1 or abs(width - height * wide / high) <= 1


def loudest(neuron: dict[str, Any], group: str, count: int = SHOWN) -> list[str]:
    """The labels in which a neuron's mean relevance is largest, from most toward the group to most away from it."""
    values = {row["label"]: row["relevance"][group] for row in neuron["profile"]}
    known = {label: value for label, value in values.items() if value is not None}
    chosen = sorted(known, key=lambda label: -abs(known[label]))[:count]
    return sorted(chosen, key=lambda label: -known[label])


def samples(prompts: Iterable[Row], neurons: Sequence[dict[str, Any]], group: str, seed: int) -> list[Row]:
    """The first prompt of each label that some neuron matters most in, with the seed.

    Args:
        prompts: Rows with the columns of `prompts.COLUMNS`.
        neurons: Rows of `located.relevance_summary`.
        group: The first of the axis.
        seed: Of the pictures.

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
                f"no prompt has the label {label!r}, in which a neuron is strongest; there are"
                f" {', '.join(list(by_label)[:6])}; give the prompts that were located with"
            )
    return [{**by_label[label], "prompt": write(by_label[label]), "seed": seed} for label in labels]


def write_responses(folder: Path, responses: Sequence[Response], groups: Sequence[str], about: dict[str, Any]) -> None:
    """Write the sheet, a picture a neuron, and the index; all of it or nothing.

    Args:
        folder: Made if it is not there; takes the place of an earlier one.
        responses: What was seen.
        groups: Of the axis.
        about: Plain data on where it came from, for the index.

    Raises:
        InputError: It cannot be written there, or is not ours to replace.
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
    """Refuse, before any work is done, a folder that is not ours to write or to replace.

    Raises:
        InputError: It is a file, in no folder, or holds what `write_responses` did not write.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; pictures go to a folder")
    if not folder.resolve().parent.is_dir():
        raise InputError(f"{folder}: there is no folder {folder.resolve().parent}; make it first")
    if folder.is_dir() and any(folder.iterdir()):
        try:
            ours = json.loads((folder / INDEX).read_text(encoding="utf-8"))["schema"] == SCHEMA
        except (OSError, ValueError, TypeError, KeyError):
            ours = False
        if not ours:
            raise InputError(f"{folder} holds files that are not an earlier run's; give a new or empty folder")


def draw(responses: Sequence[Response], groups: Sequence[str], facts: str = "") -> Figure:
    """A row a neuron: each picture, and in grey with the neuron's relevance over it, each neuron to its own scale."""
    scale = Normalize(-1, 1)
    columns = max(len(response.views) for response in responses)
    shape = responses[0].views[0].picture.shape
    tall = _TILE * shape[1] / shape[2]
    pair, line = 2 * (_TILE + _GAP) + 0.15, tall + _CAPTION + 0.12
    width = max(_MARGIN + _LEGEND + columns * pair + _MARGIN, 5.2)
    height = _HEAD + len(responses) * line + _FOOT
    figure = Figure(figsize=(width, height))

    def text(x: float, y: float, words: str, **options: Any) -> None:
        figure.text(x / width, 1 - y / height, words, **options)

    def tile(x: float, y: float) -> Any:
        axes = figure.add_axes((x / width, 1 - (y + tall) / height, _TILE / width, tall / height))
        axes.set_axis_off()
        return axes

    title = "What the strongest neurons respond to" if len(responses) > 1 else "What a neuron responds to"
    text(_MARGIN, 0.28, title, fontsize=11, fontweight="bold")
    text(_MARGIN, 0.47, lettered(facts, 140), fontsize=7.5)
    for i, response in enumerate(responses):
        y, neuron = _HEAD + i * line, response.neuron
        error = "" if neuron["stderr"] is None else f" ± {neuron['stderr']:.3f}"
        name = lettered(neuron["place"], (_LINES - 1) * _LETTERS)
        names = textwrap.wrap(f"{name} #{neuron['neuron']}", _LETTERS, max_lines=_LINES, placeholder="...")
        times = f"t {neuron['bin']['from']:.0f} to {neuron['bin']['to']:.0f}"
        for j, words in enumerate((*names, times, f"stereotype {neuron['mean']:+.3f}{error}")):
            weight = "bold" if j < len(names) else "normal"
            text(_MARGIN, y + _CAPTION + 0.15 * (j + 1), words, fontsize=7.5, fontweight=weight)
        maps = [_enlarged(view.map, view.picture.shape[1:]) for view in response.views]
        most = max(float(each.abs().max()) for each in maps) or 1.0
        for column, (view, over) in enumerate(zip(response.views, maps, strict=True)):
            x = _MARGIN + _LEGEND + column * pair
            text(
                x, y + _CAPTION - 0.05, f"{lettered(view.label, _LONGEST)}  {float(view.map.sum()):+.3f}", fontsize=7.5
            )
            picture = view.picture.permute(1, 2, 0).float().numpy()
            tile(x, y + _CAPTION).imshow(picture, interpolation="nearest")
            axes = tile(x + _TILE + _GAP, y + _CAPTION)
            # Pale, so that both colours stand out from it.
            axes.imshow(0.5 + 0.5 * picture.mean(2), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            values = (over / most).numpy()
            axes.imshow(values, cmap=_COLOURS, norm=scale, alpha=np.abs(values) ** 0.6)
    bar = figure.add_axes(((_MARGIN + 0.2) / width, 0.3 / height, 1.3 / width, 0.1 / height))
    figure.colorbar(ScalarMappable(scale, _COLOURS), cax=bar, orientation="horizontal", ticks=[-1, 0, 1])
    others = "other groups" if len(groups) > 2 else groups[1]
    bar.set_xticklabels([lettered(others, _LONGEST), "0", lettered(groups[0], _LONGEST)], fontsize=7)
    bar.tick_params(length=2, pad=1)
    note = (
        "Over each picture, and summed up beside its label: relevance toward a group at these timesteps, each neuron to"
        " its own scale.\nstereotype: its mean relevance toward the stereotype, ± one standard error between labels."
    )
    figure.text((_MARGIN + 2.0) / width, 0.33 / height, note, fontsize=7, color="0.35", va="center")
    return as_written(figure)


def _enlarged(values: Tensor, size: Sequence[int]) -> Tensor:
    """(h, w) -> (H, W), bilinear."""
    return torch.nn.functional.interpolate(
        values[None, None].float(), tuple(size), mode="bilinear", align_corners=False
    )[0, 0]
