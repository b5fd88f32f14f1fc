"""Published evaluations by name: what others drew, how many, how it was read and what was computed.

A protocol is a TOML file in protocols/, each value with its source. It fixes prompts, images a prompt, the reader, its
words and the figure; the model under test is the user's. Pictures cannot be those of the paper: noise here follows from
prompt and seed (see prompts.py), and what a source leaves open is listed in `left_open`.

Masks for a protocol are made on `calibration` prompts, which share no occupation and no template with the judged ones:
`stereo locate --prompts protocol:NAME`. The bench makes other methods on them too, and says so of a mask that was not.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.io.reading import read_toml
from stereoclinic.prompts.axes import Axis, load_axis
from stereoclinic.prompts.occupations import PLAIN, WINOBIAS, WINOBIAS_TRAIN
from stereoclinic.prompts.sets import occupation_prompts
from stereoclinic.statistics.intervals import NoiseFloor, noise_floor
from stereoclinic.statistics.shares import GAPS, top_group

_FOLDER = Path(__file__).with_name("protocols")

#: Lists that a protocol's file can name in place of its own.
OCCUPATIONS = {"winobias": WINOBIAS, "winobias-train": WINOBIAS_TRAIN}
#: Templates that masks are made on; of those, a protocol leaves out what it judges.
CALIBRATION = (PLAIN, "a {group} {occupation} at work", "a {group} {occupation} smiling")
#: What one share is taken over -> in words; see `PublishedProtocol.figure`.
OVER = {
    "occupation": "all images of an occupation",
    "occupation and seed": "the images of an occupation that share a seed",
    "prompt": "all images of a prompt",
}


@dataclass(frozen=True)
class PublishedProtocol:
    """One published evaluation.

    Args:
        name: As given to --protocol.
        title: Authors, paper, where it appeared.
        source: Where each value comes from: section, file of the authors' code.
        axis: The axis, with the words that the protocol's reader is asked in.
        occupations: Those that are judged.
        templates: Those that they are put into.
        images: Images a prompt.
        seeds: The published rule, in words.
        reader: As given to --reader.
        formula: One of `GAPS`.
        over: One of `OVER`: what a share is taken over before the formula.
        model: What the paper tested.
        steps: Sampler steps there.
        guidance: Guidance scale there.
        held_out: Occupations that masks may be made on, before the judged ones are taken out.
        left_open: What the sources leave open, and how it is filled here.
    """

    name: str
    title: str
    source: tuple[str, ...]
    axis: Axis
    occupations: tuple[str, ...]
    templates: tuple[str, ...]
    images: int
    seeds: str
    reader: str
    formula: str
    over: str
    model: str
    steps: int
    guidance: float
    held_out: tuple[str, ...] = tuple(WINOBIAS_TRAIN)
    left_open: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for what, value, known in (("formula", self.formula, GAPS), ("over", self.over, OVER)):
            if value not in known:
                raise InputError(f"protocol {self.name!r}: {what} {value!r}; there are {', '.join(known)}")
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
        """What the published figure would be for a perfectly fair model, by chance alone.

        Args:
            images: Images a prompt, if other than the protocol's.
        """
        n, occupations, templates = images or self.images, len(self.occupations), len(self.templates)
        size, shares = {
            "occupation": (n * templates, occupations),
            "occupation and seed": (templates, occupations * n),
            "prompt": (n, occupations * templates),
        }[self.over]
        return noise_floor(size, len(self.axis), shares, GAPS[self.formula], simulations=400)

    def overlap(self, occupations: Sequence[str]) -> list[str]:
        """Those of the occupations that a mask was made on which are judged here: they are not held out."""
        made = {_plain(each) for each in occupations}
        return [each for each in self.occupations if _plain(each) in made]

    def says(self) -> dict[str, Any]:
        """What it fixes and where that comes from, as plain data for results and reports."""
        return {
            "name": self.name,
            "title": self.title,
            "source": list(self.source),
            "axis": self.axis.name,
            "prompts": len(self.occupations) * len(self.templates),
            "images": self.images,
            "seeds": self.seeds,
            "reader": self.reader,
            "figure": f"{self.formula} of the shares of {OVER[self.over]}, averaged",
            "model": self.model,
            "steps": self.steps,
            "guidance": self.guidance,
            "left_open": list(self.left_open),
        }


def known_protocols() -> list[str]:
    """Names of the protocols that ship."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def load_protocol(name: str | Path) -> PublishedProtocol:
    """A protocol by its name, or a user's own TOML file of the form of those in protocols/.

    Raises:
        InputError: No such protocol or file, or the file is of another form.
    """
    path = Path(name)
    if path.suffix != ".toml":
        if str(name) not in known_protocols():
            known = ", ".join(known_protocols())
            raise InputError(f"unknown protocol {str(name)!r}; there are {known}, or give a .toml file")
        path = _FOLDER / f"{name}.toml"
    data = read_toml(path, "protocol file")
    form: dict[str, tuple[type, ...]] = {
        "title": (str,), "source": (list,), "axis": (str,), "occupations": (list, str), "templates": (list,),
        "images": (int,), "seeds": (str,), "reader": (str,), "formula": (str,), "over": (str,), "model": (str,),
        "steps": (int,), "guidance": (int, float),
    }  # fmt: skip
    optional: dict[str, tuple[type, ...]] = {"words": (dict,), "held_out": (list, str), "left_open": (list,)}
    wrong = [key for key, kinds in form.items() if not isinstance(data.get(key), kinds)]
    wrong += [key for key, kinds in optional.items() if key in data and not isinstance(data[key], kinds)]
    wrong += [key for key in data if key not in form | optional]
    if wrong:
        raise InputError(
            f"protocol file {path}: {', '.join(wrong)} missing, unknown, or of another form than in time.toml"
        )
    lists = {key: value for key, value in data.items() if isinstance(value, list)}
    lists |= {f"words.{group}": phrases for group, phrases in data.get("words", {}).items()}
    for key, value in lists.items():
        if not isinstance(value, list) or not all(isinstance(each, str) and each.strip() for each in value):
            raise InputError(f"protocol file {path}: {key} is no list of words or phrases")
    data = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    for key in ("occupations", "held_out"):
        if isinstance(data.get(key), str):
            data[key] = _list(path, data[key])
    axis = _asked(load_axis(data.pop("axis")), data.pop("words", {}))
    return PublishedProtocol(name=path.stem, axis=axis, **data)


def _list(path: Path, name: str) -> tuple[str, ...]:
    if name not in OCCUPATIONS:
        raise InputError(f"protocol file {path}: no list of occupations {name!r}; there are {', '.join(OCCUPATIONS)}")
    return tuple(OCCUPATIONS[name])


def _asked(axis: Axis, words: dict[str, list[str]]) -> Axis:
    """The axis with the words that the protocol's reader is asked in, in place of its own."""
    if not words:
        return axis
    own = {group: tuple(phrases) for group, phrases in words.items() if group != "templates"}
    return replace(axis, phrases=own, templates=tuple(words.get("templates", ("{group}",))))


def _plain(text: str) -> str:
    """Without what makes no other prompt of it: case, articles, the group's place."""
    return " ".join(re.sub(r"\b(?:an?|the)\b|\{group\}", " ", text.casefold()).split())
