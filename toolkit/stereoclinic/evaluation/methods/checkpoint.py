"""Baselines in files: the first rank fits each once; every rank and every later run reads it.

    FOLDER/<name>-<digest>.safetensors      the digest is of everything that it is fitted from

Fits differ in rounding from device to device, and images are kept under the key of the fit. So ranks must not fit
their own. Ranks may not know of each other yet (Lightning starts them when drawing begins, torchrun at once), and a
folder may not be shared after all, so waiting ranks look for the file and for signs of work. A lock would show neither.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from stereoclinic.errors import Incomplete, InputError
from stereoclinic.evaluation.draw import Store, model_digest
from stereoclinic.evaluation.methods import baseline_class
from stereoclinic.evaluation.methods.baseline import Baseline
from stereoclinic.evaluation.methods.calibration import Calibration, Cost
from stereoclinic.evaluation.readers import fingerprint
from stereoclinic.io.digest import content_digest, plain_digest
from stereoclinic.io.tensors import load_tensors, save_tensors
from stereoclinic.pipelines.model import Model
from stereoclinic.prompts.axes import Axis
from stereoclinic.prompts.sets import Row

#: Raise the version when a method fits something else from the same samples.
KIND, VERSION = "baseline", 1
#: Seconds without a sign of work after which a waiting rank gives up, and seconds between two looks.
PATIENCE, EVERY = 1800.0, 0.2


def kept_baselines(
    names: Sequence[str],
    model: Model,
    axis: Axis,
    samples: Sequence[Row],
    calibration: Calibration,
    folder: Path,
    makes: bool = True,
    making: Callable[[str], None] | None = None,
) -> list[Baseline]:
    """Baselines with their default settings, read from a folder, or fitted and kept there.

    Args:
        names: Of `BASELINES`.
        model: The pipeline, untreated.
        axis: The bias axis.
        samples: Rows with `prompt` and `seed`, none of them judged: see `calibration_samples`.
        calibration: How images are drawn and read.
        folder: The same for every rank; made if it is not there.
        makes: Whether this rank fits what is missing; others wait for it.
        making: Called with the name of each that is fitted.

    Raises:
        InputError: As `check_names` and `Baseline.fit`, the folder cannot be made, or a file is damaged.
        Incomplete: The first rank gave no sign for `PATIENCE` seconds.
    """
    Store(folder)  # makes it
    made_from = [
        VERSION,
        model_digest(model),
        asdict(axis),
        [dict(row) for row in samples],
        [calibration.steps, calibration.guidance, dict(calibration.shares), calibration.batch_size],
        fingerprint(calibration.reader),
    ]

    def kept(name: str) -> Baseline:
        kind = baseline_class(name)
        if not kind.fitted:
            return kind.fit(model, axis, samples, calibration)
        digest = plain_digest([name, asdict(kind.defaults), *made_from])[:32]
        file = folder / f"{name}-{digest}.safetensors"
        signs = file.with_suffix(".making")
        if not makes:
            _wait(file, signs)
        elif not file.is_file():
            if making is not None:
                making(name)
            try:
                _give(signs)
                _keep(file, digest, kind.fit(model, axis, samples, calibration, lambda *_: _give(signs)))
            finally:
                signs.unlink(missing_ok=True)
        else:
            signs.unlink(missing_ok=True)  # of a run that was killed
        return _read(file, digest, kind, model, axis)

    return [kept(name) for name in names]


def _keep(file: Path, digest: str, made: Baseline) -> None:
    tensors, plain = made.state()
    about = {"plain": plain, "cost": asdict(made.cost)}
    save_tensors(file, KIND, VERSION, tensors, {**about, "content": content_digest(digest, about, tensors)})


def _read(file: Path, digest: str, kind: type[Baseline], model: Model, axis: Axis) -> Baseline:
    """Refuse a file that does not hold what was kept under its name, with an InputError."""
    tensors, about = load_tensors(file, KIND, VERSION)
    if about.pop("content", None) != content_digest(digest, about, tensors):
        raise InputError(f"{file} holds something else than was made; remove it and run again")
    made = kind.restored(model, axis, tensors, about["plain"])
    made.cost = Cost(**about["cost"])
    return made


def _give(signs: Path) -> None:
    """A sign of work: a file that grows. Its size depends on no clock, as its time would."""
    with signs.open("ab") as file:
        file.write(b".")


def _wait(file: Path, signs: Path) -> None:
    """Wait for a file; raises Incomplete without signs of work."""
    size, since = 0, time.monotonic()
    while not file.is_file():
        try:
            now = signs.stat().st_size
        except FileNotFoundError:  # not begun, or done in this moment
            now = 0
        if now != size:
            size, since = now, time.monotonic()
        if time.monotonic() - since > PATIENCE:
            raise Incomplete(
                f"{file} did not appear, and nothing showed for {PATIENCE:g} s that the first process makes it; run"
                " again, with a folder that all devices share"
            )
        time.sleep(EVERY)
