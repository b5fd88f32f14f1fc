"""Drawing as a Lightning predict loop: parts of arms, each drawn once and kept in a file of its own.

A part is a batch of one arm. What was drawn lies under the digest of everything that it depends on, so a run that was
cut off goes on where it was, several devices fill one folder, and another run of the same model finds what is there.
"""

import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeGuard

import lightning as L
import torch
from diffusers.configuration_utils import ConfigMixin
from torch import Tensor, nn

from stereoclinic.errors import Incomplete, InputError
from stereoclinic.evaluation.methods.base import Mitigation
from stereoclinic.io.digest import content_digest, plain_digest, weights_digest
from stereoclinic.io.files import load_tensors, save_tensors
from stereoclinic.pipelines.arguments import inner
from stereoclinic.pipelines.images import check_blank, named
from stereoclinic.pipelines.images import draw as draw_pictures
from stereoclinic.pipelines.memory import AdaptiveBatch, Peak
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.watch import Walk
from stereoclinic.prompts.sets import Row
from stereoclinic.runtime.predict import predict

KIND, VERSION = "drawn", 1
#: Ending of a file that did not hold what it should: it is not looked at again, and may be removed.
ASIDE = ".set-aside"


@dataclass(frozen=True)
class Part:
    """One batch of pictures.

    Args:
        mitigation: What is done to the model meanwhile.
        rows: Samples with `prompt` and `seed`; all of them are drawn together.
        steps: Of the scheduler.
        guidance: Scale of classifier-free guidance.
        model: Digest of the model, see `model_digest`.
    """

    mitigation: Mitigation
    rows: list[Row] = field(repr=False)
    steps: int
    guidance: float
    model: str

    @cached_property
    def key(self) -> str:
        samples = [(row["prompt"], row["seed"], *self.mitigation.texts(row)) for row in self.rows]
        return plain_digest([self.model, self.mitigation.key(), samples, self.steps, self.guidance])[:32]


@dataclass(frozen=True)
class Pictures:
    """What was drawn of a part, or of an arm: images (B, 3, H, W) uint8, groups (B,) or None, seconds of sampling, the
    most bytes that it took on a GPU, and the places of pictures that show nothing.

    `device` names what kind of device drew them, or several; seconds of different ones are not to be compared.
    """

    images: Tensor
    allotted: Tensor | None
    seconds: float | None
    device: str = ""
    memory: int | None = None
    blank: tuple[int, ...] = ()


class Store:
    """A folder of drawn parts; every file is written whole or not at all.

    A file holds a digest over the key that it was drawn for and all that is in it, so one that stands under another's
    name, or was damaged since, is noticed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._told = folder, False
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder} cannot be made ({error.strerror}); choose another folder") from error

    def _file(self, part: Part) -> Path:
        return self.folder / f"{part.key}.safetensors"

    def __contains__(self, part: Part) -> bool:
        return self._file(part).is_file()

    def holds(self, part: Part, warn: Callable[[str], None]) -> bool:
        """Whether a part need not be drawn; a file that does not hold it is set aside, of which the first is told."""
        if part not in self:
            return False
        try:
            self._load(part)
        except InputError as error:
            file = self._file(part)
            with suppress(FileNotFoundError):  # another run was first
                os.replace(file, file.with_suffix(ASIDE))
            if not self._told:
                warn(f"{error}: set aside as *{ASIDE} and drawn again, as is any other such file")
                self._told = True
            return False
        return True

    def keep(self, part: Part, drawn: Pictures) -> None:
        tensors = {"images": drawn.images}
        if drawn.allotted is not None:
            tensors["allotted"] = drawn.allotted
        about: dict[str, Any] = {"arm": part.mitigation.name, "seconds": drawn.seconds, "device": drawn.device}
        about |= {"memory": drawn.memory, "blank": list(drawn.blank)}
        content = content_digest(part.key, about, tensors)
        save_tensors(self._file(part), KIND, VERSION, tensors, {**about, "content": content})

    def read(self, parts: Iterable[Part]) -> Pictures:
        """What was drawn of parts, one after the other.

        Raises:
            Incomplete: Something is missing.
            InputError: A file is damaged.
        """
        found: list[Pictures] = []
        for part in parts:
            if part not in self:
                raise Incomplete(f"pictures of {part.mitigation.name!r} are missing in {self.folder}; run again")
            found.append(self._load(part))
            if found[-1].images.shape[1:] != found[0].images.shape[1:]:
                raise InputError(f"{self._file(part)} holds pictures of another size; remove it and run again")
        allotted = [each.allotted for each in found if each.allotted is not None]
        starts = accumulate((len(each.images) for each in found), initial=0)
        return Pictures(
            torch.cat([each.images for each in found]),
            torch.cat(allotted) if allotted else None,
            sum(each.seconds or 0.0 for each in found),
            ", ".join(sorted({each.device for each in found})),
            max((each.memory for each in found if each.memory is not None), default=None),
            tuple(start + place for start, each in zip(starts, found, strict=False) for place in each.blank),
        )

    def _load(self, part: Part) -> Pictures:
        """Raises InputError for a file that does not hold what was drawn of the part."""
        file = self._file(part)
        tensors, about = load_tensors(file, KIND, VERSION)
        if about.pop("content", None) != content_digest(part.key, about, tensors):
            raise InputError(f"{file} does not say, or not rightly, which pictures it holds")
        images, allotted, seconds = tensors.get("images"), tensors.get("allotted"), about.get("seconds")
        blank, memory = about.get("blank"), about.get("memory")
        took = isinstance(seconds, float) and 0 <= seconds < math.inf
        if images is None or not _are_of(part, images, allotted) or not took or not _are_places(blank, len(images)):
            raise InputError(f"{file} holds other pictures than it should")
        memory = memory if isinstance(memory, int) else None
        return Pictures(images, allotted, seconds, str(about.get("device", "")), memory, tuple(blank))


def _are_of(part: Part, pictures: Tensor, groups: Tensor | None) -> bool:
    """Whether what a file holds can be a part's pictures."""
    count = len(part.rows)
    if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[:2] != (count, 3):
        return False
    if groups is not None and (groups.shape != (count,) or groups.dtype != torch.int64):
        return False
    return pictures.numel() > 0


def _are_places(blank: Any, count: int) -> TypeGuard[list[int]]:
    """Whether these are places among so many pictures."""
    return isinstance(blank, list) and all(type(place) is int and 0 <= place < count for place in blank)


class Drawing(L.LightningModule):
    """Draws the parts that are not there yet.

    Args:
        model: The pipeline.
        parts: All there are, on every rank.
        store: Where they go.
        progress: Called with the arm's name and the number of its pictures that are done.
        warn: Told what does not stop the run.
    """

    def __init__(
        self,
        model: Model,
        parts: Sequence[Part],
        store: Store,
        progress: Callable[[str, int], None] | None = None,
        warn: Callable[[str], None] = warnings.warn,
    ) -> None:
        super().__init__()
        self.model, self.parts, self.store, self.progress, self.warn = model, parts, store, progress, warn
        self.network = model.network  # registered, so that Lightning moves it
        self.portions, self.within = AdaptiveBatch(warn=warn), AdaptiveBatch(warn=warn)
        self.blank: list[str] = []

    def on_predict_start(self) -> None:
        """Take two steps for nothing, so that the first arm does not pay for what is done once."""
        self.model.to(self.device)
        first = self.parts[0]
        with torch.no_grad():
            Walk(self.model, first.rows[:1], first.steps, first.guidance, last=2).run()

    def predict_step(self, batch: list[int], batch_idx: int) -> Tensor:
        for part in (self.parts[number] for number in batch):
            if not self.store.holds(part, self.warn):
                drawn = self._draw(part)
                self.store.keep(part, drawn)
                self.blank += [named(part.rows[place], part.mitigation.name) for place in drawn.blank]
                check_blank(self.blank, sum(len(each.rows) for each in self.parts))  # not after hours, where all are
            if self.progress is not None:
                self.progress(part.mitigation.name, len(part.rows))
        return torch.tensor(len(batch))

    def _draw(self, part: Part) -> Pictures:
        def draw(portion: slice) -> tuple[Tensor, Tensor | None, list[int]]:
            rows, blank = part.rows[portion], list[int]()
            how = part.mitigation.begin(rows)
            drawn = draw_pictures(
                self.model, rows, part.steps, part.guidance, how.prompts, how.prepare, self.within,
                lambda place: blank.append(portion.start + place),
            )  # fmt: skip
            return drawn, how.allotted, blank

        with part.mitigation, Peak(self.device) as peak:
            began = time.perf_counter()
            drawn = self.portions.each(draw, len(part.rows))
            seconds = time.perf_counter() - began
        groups = [allotted for _, allotted, _ in drawn if allotted is not None]
        device = self.device.type if self.device.type != "cuda" else torch.cuda.get_device_name(self.device)
        images = torch.cat([images for images, *_ in drawn])
        blank = tuple(place for *_, each in drawn for place in each)
        return Pictures(images, torch.cat(groups) if groups else None, seconds, device, peak.bytes, blank)

    def on_predict_end(self) -> None:
        """Every rank looks for every part: a rank that died must not pass for a finished run."""
        self.trainer.strategy.barrier()
        missing = sum(part not in self.store for part in self.parts)
        if missing:
            raise Incomplete(
                f"{missing} of {len(self.parts)} batches were not drawn into {self.store.folder}; run again, with a"
                " folder that all devices share"
            )


def draw(
    model: Model,
    parts: Sequence[Part],
    store: Store,
    progress: Callable[[str, int], None] | None = None,
    warn: Callable[[str], None] = warnings.warn,
    **trainer: Any,
) -> bool:
    """Draw what is not there yet, on as many devices as the trainer is given.

    Args:
        model: The pipeline.
        parts: What to draw.
        store: Where it goes.
        progress: See `Drawing`.
        warn: See `Drawing`.
        **trainer: Given to `lightning.Trainer`.

    Returns:
        Whether this is rank zero, where the results are to be read.

    Raises:
        InputError: Fewer parts than devices, or a single picture does not fit in memory.
        Incomplete: Parts are missing at the end, or too many pictures show nothing, see `check_blank`.
        KeyboardInterrupt: As pressed; what was drawn is kept.
    """
    module = Drawing(model, parts, store, progress, warn)
    advice = "give fewer devices, or a smaller --batch-size"
    return predict(module, model, range(len(parts)), 1, what="batches", advice=advice, **trainer).is_global_zero


def model_digest(model: Model) -> str:
    """SHA-256 over what a picture depends on: a pipeline's weights, what its parts are set to, scheduler and call."""
    modules = {name: part for name, part in model.pipe.components.items() if isinstance(part, nn.Module)}
    weights = {name: weights_digest(inner(module)) for name, module in sorted(modules.items())}
    # Private entries say where a part came from.
    settings = {
        name: {key: value for key, value in module.config.items() if not key.startswith("_")}
        for name, module in sorted(modules.items())
        if isinstance(module, ConfigMixin)
    }
    scheduler = model.pipe.scheduler
    kind = type(model.pipe).__name__
    return plain_digest([kind, weights, settings, model.call, type(scheduler).__name__, dict(scheduler.config)])
