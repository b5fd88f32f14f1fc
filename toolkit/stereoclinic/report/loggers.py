"""Figures, curves and pictures to loggers of Lightning: `--logger NAME`, or `--logger NAME:FOLDER`.

A run of its own for each arm of a bench, so that one chart shows all arms:

    01-gender       parity_gap/guidance 2            the figure
                    parity_gap/guidance 2/low        the ends of its interval
                    parity_gap/guidance 2/high
                    before_after/guidance 2          the picture; csv has none

`locate` logs one run, with a step for each measured timestep:

    gender          timestep
                    lean/female/00-doctor            the lean of a label toward a group, and /stderr
                    mean_absolute/female             the mean of |lean| over labels

Only csv comes with the package. The others are packages of their own, which the error names.
"""

import importlib.util
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from stereoclinic.errors import InputError, first_line
from stereoclinic.evaluation.figures.values import values_of
from stereoclinic.io.text import slug
from stereoclinic.report.card import sheets

#: What to install for each, and its class in `lightning.pytorch.loggers`.
LOGGERS = {
    "csv": (None, "CSVLogger"),
    "tensorboard": ("'stereoclinic[tensorboard]'", "TensorBoardLogger"),
    "wandb": ("wandb", "WandbLogger"),
    "mlflow": ("mlflow", "MLFlowLogger"),
}
#: The project of wandb, and the experiment of mlflow.
PROJECT = "stereoclinic"


class Log(NamedTuple):
    """A logger by its name, and the folder that its files go to."""

    name: str
    folder: Path


def logs_of(texts: Sequence[str], folder: Path | None) -> list[Log]:
    """The loggers that texts of the form NAME or NAME:FOLDER name.

    Args:
        texts: As `--logger` takes them.
        folder: Where files go if a text names no folder; None where there is no such place.

    Raises:
        InputError: A name is not known, its package is not installed, the folder is a file, or none is given.
    """
    found = []
    for text in texts:
        name, _, given = text.partition(":")
        if name not in LOGGERS:
            raise InputError(f"--logger {text!r:.80} is not known; choose from {', '.join(LOGGERS)}")
        install = LOGGERS[name][0]
        if install is not None and importlib.util.find_spec(name) is None:
            raise InputError(f"--logger {name} needs the package {name}: pip install {install}")
        place = Path(given) if given else folder
        if place is None:
            raise InputError(f"--logger {name}: nothing is written, so there is no folder for it; give {name}:FOLDER")
        if next(each for each in (place, *place.absolute().parents) if each.exists()).is_file():
            raise InputError(f"--logger {text!r:.80}: {place} is a file, or below one; give a folder")
        found.append(Log(name, place))
    return found


def log_leans(logs: Sequence[Log], leans: Mapping[str, Any]) -> None:
    """Log the lean of every label at every measured timestep, the noisiest first.

    Args:
        logs: Each gets one run, named after the axis.
        leans: As `report.summary.lean_summary` returns them. What was not measured is left out.

    Raises:
        InputError: A logger fails.
    """
    for log in logs:
        with _run(log, slug(str(leans["axis"]))) as logger:
            for i, timestep in enumerate(leans["timesteps"]):
                found = {"timestep": timestep}
                for toward in (leans, *leans["others"]):
                    group = _tag(toward["toward"])
                    found[f"mean_absolute/{group}"] = toward["mean_absolute"]["curve"][i]
                    for p, row in enumerate(toward["rows"]):
                        tag, cell = f"lean/{group}/{p:02d}-{slug(row['label'])}", row["curve"][i]
                        found |= {tag: cell["lean"], f"{tag}/stderr": cell["stderr"]}
                logger.log_metrics({tag: value for tag, value in found.items() if value is not None}, i)


def log_figures(logs: Sequence[Log], experiments: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Log the figures of every arm, and the before-and-after sheets.

    Args:
        logs: Each gets one run for each arm.
        experiments: Results, as in results.json.
        folder: Where `write_results` wrote the sheets.

    Raises:
        InputError: A logger fails.
    """
    names = dict.fromkeys(arm for results in experiments for arm in results["arms"])
    for log in logs:
        for i, name in enumerate(names):
            with _run(log, f"{i:02d}-{slug(name)}") as logger:
                found: dict[str, float] = {}
                for results in experiments:
                    for key, value in values_of(results, name).items():
                        tag = f"{_tag(key)}/guidance {results['guidance']:g}"
                        found[tag] = value.estimate
                        if value.has_ends:
                            found |= {f"{tag}/low": value.low, f"{tag}/high": value.high}
                logger.log_metrics(found, 0)
                for at, arm, file in sheets(experiments):
                    if arm == name:
                        tag = f"before_after/guidance {experiments[at]['guidance']:g}"
                        with Image.open(folder / file) as picture:
                            _log_picture(log.name, logger, tag, picture)


@contextmanager
def _run(log: Log, run: str) -> Iterator[Any]:
    """One run of a logger, which ends with the context."""
    from lightning.pytorch import loggers

    named: dict[str, Any] = {"name": "", "version": run}
    if log.name == "wandb":
        named = {"name": run, "project": PROJECT, "settings": {"quiet": True}}
    elif log.name == "mlflow":  # its own default, files in a folder, is refused by new versions
        folder = log.folder.absolute()
        server = os.environ.get("MLFLOW_TRACKING_URI")
        named = {"run_name": run, "experiment_name": PROJECT, "tracking_uri": server or f"sqlite:///{folder}/mlflow.db"}
        named |= {} if server else {"artifact_location": (folder / "artifacts").as_uri()}
    log.folder.mkdir(parents=True, exist_ok=True)  # wandb takes another place otherwise
    try:
        logger = getattr(loggers, LOGGERS[log.name][1])(save_dir=str(log.folder), **named)
        yield logger
        logger.save()
        logger.finalize("success")
        if log.name == "wandb":
            logger.experiment.finish()
    except Exception as error:  # the loggers' libraries raise what they like
        raise InputError(f"--logger {log.name} failed ({first_line(error)}); what was computed is kept") from error


def _log_picture(name: str, logger: Any, tag: str, picture: Image.Image) -> None:
    """Each logger takes pictures in its own way; csv takes none."""
    if name == "tensorboard":
        logger.experiment.add_image(tag, np.asarray(picture), 0, dataformats="HWC")
    elif name == "wandb":
        logger.log_image(tag, [picture], 0)
    elif name == "mlflow":
        logger.experiment.log_image(logger.run_id, picture, f"{tag}.png")


def _tag(key: str) -> str:
    """A key or a name in signs that every logger takes; others become their code, so that no two keys are the same."""
    return re.sub(r"[^A-Za-z0-9_/ -]", lambda sign: f"u{ord(sign[0]):x}", key.replace(".", "/"))
