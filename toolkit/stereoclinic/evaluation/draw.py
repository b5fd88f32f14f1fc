"""Drawing as a Lightning predict loop: each part of an arm is drawn once and kept in a file of its own.

A part is one batch of one arm. Its file is named by a digest of everything that it depends on. So a run that was cut
off continues, several devices fill one folder, and another run of the same model finds what is there.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import lightning as L
import torch
from diffusers.configuration_utils import ConfigMixin
from torch import Tensor, nn

from stereoclinic.errors import Incomplete, InputError
from stereoclinic.evaluation.methods.base import Mitigation
from stereoclinic.io.digest import content_digest, plain_digest, weights_digest
from stereoclinic.io.files import ASIDE, set_aside
from stereoclinic.io.tensors import load_tensors, save_tensors
from stereoclinic.pipelines.arguments import inner
from stereoclinic.pipelines.images import check_blank, named
from stereoclinic.pipelines.images import draw as draw_pictures
from stereoclinic.pipelines.memory import AdaptiveBatch, Peak
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.watch import Walk
from stereoclinic.prompts.sets import Row
from stereoclinic.runtime.predict import predict

KIND, VERSION = "drawn", 1


@dataclass(frozen=True)
class Part:
    """One batch of images.

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
    """The images of a part, or of an arm.

    Args:
        images: (B, 3, H, W) uint8.
        allotted: (B,) groups; None without allocation.
        seconds: Of sampling.
        device: Kind of device that drew them, or several; seconds of different kinds cannot be compared.
        memory: Most bytes used on a GPU.
        blank: Places of images that show nothing.
    """

    images: Tensor
    allotted: Tensor | None
    seconds: float | None
    device: str = ""
    memory: int | None = None
    blank: tuple[int, ...] = ()


class Store:
    """A folder of drawn parts; every file is written whole or not at all.

    A file holds a digest of its key and its content, so a renamed or damaged one is noticed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._warned = folder, False
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder} cannot be made ({error.strerror}); choose another folder") from error

    def _file(self, part: Part) -> Path:
        return self.folder / f"{part.key}.safetensors"

    def __contains__(self, part: Part) -> bool:
        return self._file(part).is_file()

    def holds(self, part: Part, warn: Callable[[str], None]) -> bool:
        """Whether a part need not be drawn; a damaged file is set aside, with one warning for all of them."""
        if part not in self:
            return False
        try:
            self._load(part)
        except InputError as error:
            set_aside(self._file(part))
            if not self._warned:
                warn(f"{error}: set aside as *{ASIDE} and drawn again, as is any other such file")
                self._warned = True
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
        """The images of parts, one after the other.

        Raises:
            Incomplete: Something is missing.
            InputError: A file is damaged.
        """
        found: list[Pictures] = []
        for part in parts:
            if part not in self:
                raise Incomplete(f"images of {part.mitigation.name!r} are missing in {self.folder}; run again")
            found.append(self._load(part))
            if found[-1].images.shape[1:] != found[0].images.shape[1:]:
                raise InputError(f"{self._file(part)} holds images of another size; remove it and run again")
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
        """Refuse a file that does not hold the part's images, with an InputError."""
        file, count = self._file(part), len(part.rows)
        tensors, about = load_tensors(file, KIND, VERSION)
        if about.pop("content", None) != content_digest(part.key, about, tensors):
            raise InputError(f"{file} has no valid record of the images in it")
        images, allotted, seconds = tensors.get("images"), tensors.get("allotted"), about.get("seconds")
        blank, memory = about.get("blank"), about.get("memory")
        if (
            images is None
            or (images.dtype, images.ndim, images.shape[:2]) != (torch.uint8, 4, (count, 3))
            or images.numel() == 0
            or (allotted is not None and (allotted.dtype, allotted.shape) != (torch.int64, (count,)))
            or not (isinstance(seconds, float) and 0 <= seconds < math.inf)
            or not (isinstance(blank, list) and all(type(place) is int and 0 <= place < count for place in blank))
        ):
            raise InputError(f"{file} holds other images than expected")
        memory = memory if isinstance(memory, int) else None
        return Pictures(images, allotted, seconds, str(about.get("device", "")), memory, tuple(blank))


class Drawing(L.LightningModule):
    """Draws the parts that are not in a store yet; arguments as of `draw`, with all parts on every rank."""

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
        """Take two steps as a warm-up, so that the first arm's seconds can be compared."""
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
                check_blank(self.blank, sum(len(each.rows) for each in self.parts))
            if self.progress is not None:
                self.progress(part.mitigation.name, len(part.rows))
        return torch.tensor(len(batch))

    def _draw(self, part: Part) -> Pictures:
        def draw(portion: slice) -> tuple[Tensor, Tensor | None, list[int]]:
            rows, blank = part.rows[portion], list[int]()
            batch = part.mitigation.begin(rows)
            images = draw_pictures(
                self.model, rows, part.steps, part.guidance, batch.prompts, batch.prepare, self.within,
                lambda place: blank.append(portion.start + place),
            )  # fmt: skip
            return images, batch.allotted, blank

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
        """Every rank looks for every part, so that a dead rank is not taken for a finished one."""
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
    """Draw the parts that are not in a store yet, on as many devices as the trainer is given.

    Args:
        model: The pipeline.
        parts: What to draw.
        store: Where it goes.
        progress: Called with the arm's name and the number of its images that are done.
        warn: Called with what does not stop the run.
        **trainer: Given to `lightning.Trainer`.

    Returns:
        Whether this is rank zero, where the results are to be read.

    Raises:
        InputError: Fewer parts than devices, or a single image does not fit in memory.
        Incomplete: Parts are missing at the end, or too many images show nothing, see `check_blank`.
        KeyboardInterrupt: What was drawn is kept.
    """
    module = Drawing(model, parts, store, progress, warn)
    advice = "give fewer devices, or a smaller --batch-size"
    return predict(module, model, range(len(parts)), 1, what="batches", advice=advice, **trainer).is_global_zero


def model_digest(model: Model) -> str:
    """SHA-256 over what an image depends on: a pipeline's weights, its parts' configurations, scheduler and call."""
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
