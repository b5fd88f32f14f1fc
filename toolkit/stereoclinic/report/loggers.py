"""Every figure of a comparison as TensorBoard scalars: one run for each arm, so that one chart shows all arms.

    FOLDER/01-gender/       parity_gap/guidance 2            the figure
                            parity_gap/guidance 2/low        the ends of its interval
                            parity_gap/guidance 2/high

TensorBoard is not a dependency: `pip install stereoclinic[tensorboard]`.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stereoclinic.errors import InputError
from stereoclinic.evaluation.figures.values import values_of
from stereoclinic.report.report import slug


def check_tensorboard(folder: str | Path) -> None:
    """Refuse, before any work is done, a log that cannot be written.

    Raises:
        InputError: The package `tensorboard` is not installed, or the folder is a file.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise InputError("--tensorboard needs the package tensorboard: pip install 'stereoclinic[tensorboard]'")
    if Path(folder).exists() and not Path(folder).is_dir():
        raise InputError(f"--tensorboard {folder} is a file; expected a folder")


def log_scalars(folder: str | Path, experiments: Sequence[Mapping[str, Any]], step: int = 0) -> None:
    """Write the figures of every arm.

    Args:
        folder: Made if it does not exist; earlier logs in it stay.
        experiments: Results, as in results.json.
        step: Position on TensorBoard's horizontal axis, such as the number of a checkpoint.

    Raises:
        InputError: As `check_tensorboard`.
    """
    check_tensorboard(folder)
    from torch.utils.tensorboard import SummaryWriter

    for i, name in enumerate(dict.fromkeys(arm for results in experiments for arm in results["arms"])):
        with SummaryWriter(str(Path(folder) / f"{i:02d}-{slug(name)}")) as writer:
            for results in experiments:
                at = f"guidance {results['guidance']:g}"
                for key, value in values_of(results, name).items():
                    tag = f"{key.replace('.', '/')}/{at}"
                    writer.add_scalar(tag, value.estimate, step)
                    if value.has_ends:
                        writer.add_scalar(f"{tag}/low", value.low, step)
                        writer.add_scalar(f"{tag}/high", value.high, step)
