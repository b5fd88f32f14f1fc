"""Resolves and checks the inputs that are given by name: axis, prompts, model, reader and files.

The files near a mask: the relevance that it was chosen from.

stereo locate    NAME.pt                                  and NAME.relevance.safetensors
stereo plan      NAME-allocated.pt, NAME-balanced.pt      next to those
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stereoclinic.calls.settings import ModelSettings, OpenSettings, call_texts
from stereoclinic.calls.work import Reporter
from stereoclinic.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset
    from diffusers import DiffusionPipeline
    from torch import Tensor

    from stereoclinic.ddtd.relevance import Relevance
    from stereoclinic.pipelines.model import Model
    from stereoclinic.prompts.axes import Axis
    from stereoclinic.sns.mask import NeuronMask


PLANNED = ("-allocated", "-balanced")
_DIGESTS = ("unet_shapes", "unet_weights")


def relevance_file(stem: str) -> str:
    """The name that `stereo locate` gives to relevance, by the stem of its mask."""
    return f"{stem}.relevance.safetensors"


def relevance_near(mask: Path, groups: Sequence[str], model: Mapping[str, Any]) -> "tuple[Path, Relevance] | None":
    """The relevance next to a mask, and its file; None where there is none, or it belongs to something else.

    Args:
        mask: The mask's file.
        groups: Of the axis that is judged.
        model: Digests of the model that is judged, `unet_shapes` and `unet_weights`; the relevance must carry the same.
    """
    from stereoclinic.ddtd.relevance import Relevance
    from stereoclinic.errors import InputError

    for stem in dict.fromkeys([mask.stem, *map(mask.stem.removesuffix, PLANNED)]):
        path = mask.with_name(relevance_file(stem))
        if not path.is_file():
            continue
        try:
            found = Relevance.load(path)
        except InputError:
            continue
        same = all(found.metadata.get(digest) == model[digest] for digest in _DIGESTS)
        if same and tuple(found.groups) == tuple(groups):
            return path, found
    return None


def open_named(
    model: "str | Model | DiffusionPipeline",
    settings: ModelSettings,
    reporter: Reporter,
    place: str = "cpu",
    made: Mapping[str, Any] | None = None,
) -> "Model":
    """A model by its name, or one that is open already.

    Args:
        model: `portraits`, a folder, a checkpoint or a hub id; or a pipeline of diffusers, which stays where it is.
        settings: How it is opened and called.
        reporter: Told what opening it notes.
        place: Device, by torch's name.
        made: Metadata of a file that was made with options of its own; they hold where no other is given.

    Raises:
        InputError: It cannot be opened, or height or width is given alone.
    """

    from stereoclinic.pipelines import open_model
    from stereoclinic.pipelines.model import Model

    call = call_of(settings, made)
    if isinstance(model, str):
        opened = open_model(model, place, settings.dtype, settings.variant, call, reporter.note)
    else:
        opened = model if isinstance(model, Model) else Model(model, call=call)
    steps = settings.steps or opened.defaults.steps
    opened.defaults = replace(opened.defaults, steps=steps)
    return opened


def call_of(settings: OpenSettings, made: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The options of the pipeline's own call; those of a file hold where no other is given.

    Raises:
        InputError: Height or width is given alone, or the file's options are not a table.
    """
    own = {} if made is None else made.get("call", {})
    if not isinstance(own, dict):
        raise InputError(f"the file's call options are {own!r}; expected a table; make the file again")
    sides = {name: value for name in ("height", "width") if (value := getattr(settings, name)) is not None}
    if twice := [name for name in sides if name in settings.call]:
        raise InputError(f"--call: {twice[0]} is given twice")
    whole = {**own, **settings.call, **sides}
    if len(alone := [name for name in ("height", "width") if name in whole]) == 1:
        # Some pipelines would take neither then, and say nothing.
        raise InputError(f"only {alone[0]} is given; give both --height and --width")
    return whole


def own_axis(mask: "NeuronMask") -> "Axis | None":
    """The axis that a mask was made for; None if its metadata has no axis.

    Raises:
        InputError: It was made for several axes, or for one that is not built in.
    """
    from stereoclinic.prompts.axes import made_for, shipped_axis

    name, words = mask.metadata.get("axis"), mask.metadata.get("words")
    if name is None:
        return None
    own = list(dict.fromkeys(str(each.get("axis")) for each in mask.origins))
    if len(own) > 1:
        raise InputError(f"the mask was made for several axes; choose one: --axis {' or --axis '.join(own)}")
    if shipped_axis(own[0], words) is None:
        raise InputError(
            f"the mask was made for axis {name!r}, which is not built in; give its file: --axis {name}.toml"
        )
    return made_for({**mask.metadata, "axis": own[0]})


def neutral_prompts(source: "str | Dataset", limit: int | None) -> "Dataset":
    """Prompts by name, as `load_prompts`; `protocol:NAME` are those that masks for a published protocol are made on."""
    from stereoclinic.prompts.sets import load_prompts

    if not isinstance(source, str):
        return source if limit is None else source.take(min(limit, len(source)))
    kind, _, name = source.partition(":")
    if kind != "protocol":
        return load_prompts(source, limit)
    from stereoclinic.evaluation.protocols import load_protocol

    held_out = load_protocol(name).calibration()
    return held_out.take(min(limit or len(held_out), len(held_out)))


def name_of(model: "str | Model | DiffusionPipeline") -> str:
    """The name that a model was asked for by: of a pipeline, where it was loaded from."""
    if isinstance(model, str):
        return model
    return str(getattr(model, "name", "") or getattr(model, "name_or_path", "") or type(model).__name__)


def reader_folder(model: str, advice: str) -> Path:
    """The reader that a model brings.

    Raises:
        InputError: It brings none, and what to do about it.
    """
    from stereoclinic.pipelines import model_folder

    folder = model_folder(model)
    if folder is None or not (folder / "reader").is_dir():
        where = ", because it is not a local folder" if folder is None else f" in {folder / 'reader'}"
        raise InputError(f"model {model!r} has no reader{where}; {advice}")
    return folder / "reader"


def own_classifier(model: "str | Model | DiffusionPipeline", axis: "Axis") -> "Callable[[Tensor], Tensor]":
    """The reader in the model's folder, whose logits are decomposed."""
    from stereoclinic.evaluation.readers import PortraitsReader

    advice = "from Python, stereoclinic.locate(..., classifier=...) takes your own"
    return PortraitsReader(reader_folder(name_of(model), advice)).classifier(axis)


def patterns_of(made: Mapping[str, Any]) -> list[str]:
    """The --sites that a file was made with.

    Raises:
        InputError: They are not a list of texts.
    """
    found = made.get("patterns", [])
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise InputError(f"the file was made with the sites {found!r}, which are not a list of texts; make it again")
    return found


#: So few steps are all measured.
FEW = 8


def every_of(steps: int) -> int:
    """Which steps `stereo locate` measures by default: every second one, or all of few."""
    return 1 if steps <= FEW else 2


def unguided(model: "Model", steps: int | None) -> float:
    """The guidance scale to locate at by default: none, but the model's own where no prediction without prompt is made.

    Such models take the scale as an argument or not at all, and were trained for their own scale only.
    """
    from stereoclinic.pipelines.learn import learnt_of

    own = model.defaults.guidance
    return 1.0 if learnt_of(model, own, steps).guides else own


def note_differences(reporter: Reporter, name: str, mask: "NeuronMask", model: "Model") -> None:
    """Say that a mask was made for other weights, or with other call options, than it is used with."""
    from stereoclinic.sns.compat import has_other_weights

    if has_other_weights(mask, model.network):
        reporter.note(f"mask {name} was made for other weights than those of {model.name}")
    call = model.call
    for made in (each.get("call") for each in mask.origins):
        if isinstance(made, dict) and made != call:
            spelt = [" ".join(call_texts(each)) or "none" for each in (made, call)]
            reporter.note(f"mask {name} was made with other call options ({spelt[0]}) than are used now ({spelt[1]})")
            return


def check_distinct(paths: list[Path], option: str = "") -> None:
    """Refuse a file that is given twice, with an InputError: a mask would damp twice."""

    for i, path in enumerate(paths):
        if path.resolve() in [each.resolve() for each in paths[:i]]:
            raise InputError(f"{option} {path} is given twice".strip())


def check_target(path: Path, option: str, endings: tuple[str, ...]) -> Path:
    """Refuse, before any work is done, a file that could not be written after it.

    Raises:
        InputError: Another ending, a folder, or in a folder that is not there or not writable.
    """

    if path.suffix.lower() not in endings:
        raise InputError(f"{option} {path}: expected a file name ending in {' or '.join(endings)}")
    if path.is_dir():
        raise InputError(f"{option} {path}: a folder; give a file name")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"{option} {path}: the folder {path.parent} does not exist or is not writable")
    return path


def check_ranks(samples: int, ranks: int) -> None:
    """Refuse fewer samples than ranks, with an InputError."""
    if samples < ranks:
        raise InputError(f"{samples} samples for {ranks} devices: give more prompts or seeds, or fewer devices")


def note_named(reporter: Reporter, rows: "Dataset", axis: "Axis") -> None:
    """Say that some of the neutral prompts name a group: the gate applies no mask to them."""
    from stereoclinic.prompts.sets import write
    from stereoclinic.sns.policy import named_groups

    found = [(prompt, groups) for prompt in map(write, rows) if (groups := named_groups(prompt, axis))]
    if found:
        prompt, groups = found[0]
        reporter.note(
            f"{len(found)} of {len(rows)} prompts name a group, so the gate applies no mask to them: first {prompt!r}"
            f" ({', '.join(groups)})"
        )


def check_length(
    reporter: Reporter, model: "Model", rows: "Dataset", axis: "Axis", guidance: float, steps: int, *more: "Dataset"
) -> None:
    """Say which prompts are too long for the model to read.

    Args:
        reporter: Told so.
        model: The pipeline.
        rows: Neutral prompts, of which those that name a group are made.
        axis: Its words do so.
        guidance: Scale.
        steps: Of the scheduler.
        *more: Further prompts, that name nobody.

    Raises:
        InputError: What is not read is the word of a group.
    """
    from stereoclinic.ddtd.trajectory import check_prompts
    from stereoclinic.pipelines.conditions import TOGETHER, cut_prompts
    from stereoclinic.prompts.sets import group_prompts, write

    texts = [[write(row), *group_prompts(row, axis)] for row in rows]
    others = [write(row) for each in more for row in each]
    cut = cut_prompts(model, [text for each in texts for text in each] + others, guidance, steps)
    long = set(cut)
    near = [{**row, "prompt": each[0]} for row, each in zip(rows, texts, strict=True) if not long.isdisjoint(each)]
    for start in range(0, len(near), TOGETHER):
        check_prompts(model, axis, near[start : start + TOGETHER], guidance, steps)
    note_cut(reporter, model, cut, guidance, steps)


def note_cut(reporter: Reporter, model: "Model", cut: Sequence[str], guidance: float, steps: int) -> None:
    """Note the first word that is cut from a prompt, and how many further prompts are cut."""
    from stereoclinic.pipelines.conditions import first_unread

    if cut:
        number, word = first_unread(model, cut[0], guidance, steps)
        more = f"; so are {len(cut) - 1} more" if len(cut) > 1 else ""
        reporter.note(f"prompt {cut[0]!r} is too long: the model ignores it from word {number} ({word}) on{more}")
