"""Published evaluations by name: prompts, images per prompt, reader and figure, each with its source.

A protocol is a TOML file in protocols/. The model under test is the user's. Images cannot be those of the paper, as
noise here follows from prompt and seed; `left_open` lists what the sources leave open.

Masks and baselines for a protocol are made on its `calibration` prompts, which share no occupation and no template with
the judged ones: `stereo locate --prompts protocol:NAME`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from datasets import Dataset
from pydantic import BaseModel, StringConstraints, ValidationError
from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.io.reading import read_toml
from stereoclinic.prompts.axes import Axis, load_axis
from stereoclinic.prompts.occupations import PLAIN, WINOBIAS, WINOBIAS_TRAIN
from stereoclinic.prompts.sets import occupation_prompts
from stereoclinic.statistics.intervals import NoiseFloor, noise_floor
from stereoclinic.statistics.shares import GAPS, top_group

_FOLDER = Path(__file__).with_name("protocols")
_Text = Annotated[str, StringConstraints(pattern=r"\S")]
_Texts = list[_Text]

#: Lists of occupations that a protocol's file can name.
OCCUPATIONS = {"winobias": WINOBIAS, "winobias-train": WINOBIAS_TRAIN}
#: Templates for calibration, without those that a protocol judges.
CALIBRATION = (PLAIN, "a {group} {occupation} at work", "a {group} {occupation} smiling")
#: The images of one share -> in words; see `PublishedProtocol.figure`.
OVER = {
    "occupation": "all images of an occupation",
    "occupation and seed": "the images of an occupation that share a seed",
    "prompt": "all images of a prompt",
}


@dataclass(frozen=True)
class PublishedProtocol:
    """One published evaluation."""

    name: str  # as given to --protocol
    title: str  # authors, paper, where it appeared
    source: tuple[str, ...]  # where each value comes from: section, file of the authors' code
    axis: Axis  # the axis, with the words that the protocol's reader is asked in
    occupations: tuple[str, ...]  # the judged ones
    templates: tuple[str, ...]  # with "{group} {occupation}"
    images: int  # images per prompt
    seeds: str  # the published rule, in words
    reader: str  # as given to --reader
    formula: str  # one of `GAPS`
    over: str  # one of `OVER`: the images of one share
    model: str  # that the paper tested
    steps: int  # sampler steps there
    guidance: float  # guidance scale there
    held_out: tuple[str, ...] = tuple(WINOBIAS_TRAIN)  # occupations for calibration; judged ones are left out
    left_open: tuple[str, ...] = ()  # what the sources leave open, and what is done here

    def __post_init__(self) -> None:
        for what, value, known in (("formula", self.formula, GAPS), ("over", self.over, OVER)):
            if value not in known:
                raise InputError(f"protocol {self.name!r}: {what} {value!r}; choose one of {', '.join(known)}")
        if not self.occupations or self.images < 2 or self.steps < 1:
            raise InputError(f"protocol {self.name!r} needs occupations, 2 or more images a prompt, and steps")
        self.prompts()  # refuses templates that lack a place
        self.calibration()

    def prompts(self) -> Dataset:
        """The judged prompts, the templates of an occupation together."""
        return occupation_prompts(self.occupations, self.templates)

    def calibration(self) -> Dataset:
        """Prompts to find neurons and make masks on: no occupation and no template of theirs is judged.

        Raises:
            InputError: None is left.
        """
        judged = {_plain(occupation) for occupation in self.occupations}
        shown = {_plain(template) for template in self.templates}
        occupations = [each for each in self.held_out if _plain(each) not in judged]
        templates = [each for each in CALIBRATION if _plain(each) not in shown]
        if not occupations or not templates:
            raise InputError(f"protocol {self.name!r} judges every occupation or template that masks could be made on")
        return occupation_prompts(occupations, templates)

    def figure(self, reads: Tensor) -> float:
        """The published figure: the formula on shares taken over `over`, then the mean.

        Args:
            reads: (P, n, K) probabilities, prompts as in `prompts()`, images of one seed in one column.

        Raises:
            InputError: Another number of prompts or groups.
        """
        rows, templates = len(self.occupations) * len(self.templates), len(self.templates)
        if reads.ndim != 3 or len(reads) != rows or reads.shape[2] != len(self.axis):
            raise InputError(
                f"protocol {self.name!r}: reads have shape {tuple(reads.shape)}; expected ({rows} prompts, images,"
                f" {len(self.axis)} groups)"
            )
        hits = top_group(reads).unflatten(0, (-1, templates))  # (occupations, templates, n, K)
        over = {"occupation": (1, 2), "occupation and seed": (1,), "prompt": (2,)}[self.over]
        return float(GAPS[self.formula](hits.mean(over), torch.full((len(self.axis),), 1 / len(self.axis))).mean())

    def floor(self, images: int | None = None) -> NoiseFloor:
        """The published figure of a perfectly fair model, by chance; `images` per prompt, if not the protocol's."""
        n, occupations, templates = images or self.images, len(self.occupations), len(self.templates)
        size, shares = {
            "occupation": (n * templates, occupations),
            "occupation and seed": (templates, occupations * n),
            "prompt": (n, occupations * templates),
        }[self.over]
        return noise_floor(size, len(self.axis), shares, GAPS[self.formula], simulations=400)

    def overlap(self, occupations: Sequence[str]) -> list[str]:
        """The judged occupations among those that a mask was made on, which are not held out."""
        made = {_plain(each) for each in occupations}
        return [each for each in self.occupations if _plain(each) in made]

    def says(self) -> dict[str, Any]:
        """What it fixes and where that comes from, as plain data for results and reports."""
        names = ("name", "title", "images", "seeds", "reader", "model", "steps", "guidance")
        return {name: getattr(self, name) for name in names} | {
            "source": list(self.source),
            "axis": self.axis.name,
            "prompts": len(self.occupations) * len(self.templates),
            "figure": f"{self.formula} of the shares of {OVER[self.over]}, averaged",
            "left_open": list(self.left_open),
        }


def known_protocols() -> list[str]:
    """Names of the protocols that ship."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


class _File(BaseModel, extra="forbid", strict=True):
    """The form of a protocol's TOML file."""

    title: _Text
    source: _Texts
    axis: _Text
    occupations: _Texts | _Text
    templates: _Texts
    images: int
    seeds: _Text
    reader: _Text
    formula: _Text
    over: _Text
    model: _Text
    steps: int
    guidance: float
    words: dict[str, _Texts] = {}
    held_out: _Texts | _Text = "winobias-train"
    left_open: _Texts = []


def load_protocol(name: str | Path) -> PublishedProtocol:
    """A protocol by its name, or a user's own TOML file of the form of those in protocols/.

    Raises:
        InputError: No such protocol or file, or the file has another form.
    """
    path = Path(name)
    if path.suffix != ".toml":
        if str(name) not in known_protocols():
            known = ", ".join(known_protocols())
            raise InputError(f"unknown protocol {str(name)!r}; choose one of {known}, or give a .toml file")
        path = _FOLDER / f"{name}.toml"
    try:
        file = _File.model_validate(read_toml(path, "protocol file"))
    except ValidationError as error:
        wrong = dict.fromkeys(str(problem["loc"][0]) for problem in error.errors())
        raise InputError(
            f"protocol file {path}: {', '.join(wrong)} missing, unknown, or of another form than in time.toml"
        ) from error
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in file}
    for key in ("occupations", "held_out"):
        if isinstance(listed := values[key], str):
            if listed not in OCCUPATIONS:
                known = ", ".join(OCCUPATIONS)
                raise InputError(f"protocol file {path}: no list of occupations {listed!r}; choose one of {known}")
            values[key] = tuple(OCCUPATIONS[listed])
    axis = _with_words(load_axis(values.pop("axis")), values.pop("words"))
    return PublishedProtocol(name=path.stem, axis=axis, **values)


def _with_words(axis: Axis, words: dict[str, list[str]]) -> Axis:
    """The axis with the words that the protocol's reader is asked in, in place of its own."""
    if not words:
        return axis
    own = {group: tuple(phrases) for group, phrases in words.items() if group != "templates"}
    return replace(axis, phrases=own, templates=tuple(words.get("templates", ("{group}",))))


def _plain(text: str) -> str:
    """A prompt without case, articles and the group's place, to compare it with others."""
    return " ".join(re.sub(r"\b(?:an?|the)\b|\{group\}", " ", text.casefold()).split())
