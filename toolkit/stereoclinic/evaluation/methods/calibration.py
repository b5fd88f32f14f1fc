"""Calibration of a baseline: images are drawn, watched, read and counted."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stereoclinic.errors import InputError
from stereoclinic.evaluation.readers import Reader, group_columns, read_rows
from stereoclinic.pipelines import images as pictures
from stereoclinic.pipelines.arguments import inner
from stereoclinic.pipelines.call import Call
from stereoclinic.pipelines.intercept import Left, Pass, pass_of
from stereoclinic.pipelines.memory import AdaptiveBatch
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.schedule import schedule_of
from stereoclinic.pipelines.watch import Walk
from stereoclinic.prompts.axes import Axis
from stereoclinic.prompts.sets import Row, group_prompts
from stereoclinic.sns.allocate import shares_of

Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class Calibration:
    """How calibration images are drawn, and the target shares.

    Args:
        steps: Of the scheduler.
        guidance: Scale of classifier-free guidance.
        reader: Says which group an image shows, for those that need labels of the model's own images.
        shares: Of the groups by name; uniform if empty.
        batch_size: Images drawn together.
    """

    steps: int
    guidance: float
    reader: Reader | None = None
    shares: Mapping[str, float] = field(default_factory=dict)
    batch_size: int = 24

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or self.guidance < 0:
            raise InputError("calibration: steps and batch size must be 1 or more, guidance 0 or more")


@dataclass
class Cost:
    """What a fit took: seconds, images drawn, and samples passed through the denoiser forward and backward."""

    seconds: float = 0.0
    images: int = 0
    forward: int = 0
    backward: int = 0


@dataclass(frozen=True)
class Look:
    """What is watched while images are drawn.

    Args:
        modules: By name.
        reduce: (module's name, its output for the rows that see the prompt (B, ...)) -> what is kept of it (B, ...).
        keep: Called with (samples, step, module's name, reduced output) after each completed pass.
        inputs: Watch the modules' inputs instead.
    """

    modules: Mapping[str, nn.Module]
    reduce: Callable[[str, Tensor], Tensor]
    keep: Callable[[list[int], int, str, Tensor], None]
    inputs: bool = False


_NOTHING = Look({}, lambda name, x: x, lambda samples, step, name, x: None)


@dataclass
class Run:
    """A calibration under way, of N samples."""

    name: str  # of the baseline, for `progress`
    model: Model
    axis: Axis
    rows: list[Row]
    calibration: Calibration
    progress: Progress | None = None
    cost: Cost = field(default_factory=Cost)
    portions: AdaptiveBatch = field(default_factory=AdaptiveBatch)

    def __post_init__(self) -> None:
        shares = self.calibration.shares
        self.target = shares_of(self.axis.groups, [shares] if shares else [])
        self.steps, self.guidance = self.calibration.steps, self.calibration.guidance
        if not self.rows or any("prompt" not in row or "seed" not in row for row in self.rows):
            raise InputError(
                f"{self.name}: no calibration samples; give rows with a prompt and a seed, as with_seeds makes"
            )

    @property
    def network(self) -> nn.Module:
        """The denoiser."""
        return inner(self.model.network)

    @property
    def neutral(self) -> list[str]:
        return [row["prompt"] for row in self.rows]

    def group(self, k: int) -> list[str]:
        """The samples' prompts for one group."""
        return [group_prompts(row, self.axis)[k] for row in self.rows]

    def batches(self, count: int | None = None) -> Iterator[slice]:
        size, count = self.calibration.batch_size, len(self.rows) if count is None else count
        return (slice(start, min(start + size, count)) for start in range(0, count, size))

    def timesteps(self) -> Tensor:
        """(T,) of an image, noisiest first."""
        return torch.tensor(schedule_of(self.model, self.steps, self.guidance).timesteps)

    def draw(self, prompts: Sequence[str], look: Look = _NOTHING) -> Tensor:
        """Draw one image per sample: (N, 3, H, W) uint8.

        Args:
            prompts: N, one a sample.
            look: What is watched.

        Raises:
            Incomplete: An image shows nothing.
        """
        drawn, blank = [], list[str]()
        for part in self.batches():
            rows = self.rows[part]

            def note(place: int, rows: list[Row] = rows) -> None:
                blank.append(pictures.named(rows[place], self.name))

            with self._counted(part, look):
                drawn.append(
                    pictures.draw(
                        self.model, rows, self.steps, self.guidance, prompts[part], portions=self.portions, blank=note
                    )
                )
        pictures.check_blank(blank, len(self.rows), most=0)
        return torch.cat(drawn)

    def latents(self, prompts: Sequence[str]) -> Tensor:
        """The clean latents (N, C, h, w) of the images that `draw` draws.

        Raises:
            InputError: The pipeline does not give them.
        """
        drawn = []
        for part in self.batches():
            with self._counted(part):
                found = self.walk(self.rows[part], prompts[part]).run("latent").images
            if not isinstance(found, Tensor) or found.ndim != 4:
                raise InputError(f"{self.name}: {type(self.model.pipe).__name__} gives no latents of its images")
            drawn.append(found)
        return torch.cat(drawn)

    def walk(self, rows: Sequence[Row], prompts: Sequence[str], visit: Callable[[Call], None] | None = None) -> Walk:
        """The pipeline's call for some samples, not yet run."""
        return Walk(self.model, rows, self.steps, self.guidance, prompts, visit, self.portions)

    @torch.no_grad()
    def first(self, rows: Sequence[Row], prompts: Sequence[str], look: Look) -> None:
        """One pass of each sample at its first timestep, of the rows that see the prompt; nothing is drawn."""

        def visit(call: Call) -> None:
            self.portions.each(lambda own: call.predict(part=own), call.count)
            raise Left

        for part in self.batches(len(rows)):
            with self._watching(look, part.start):
                self.walk(rows[part], prompts[part], visit).run()

    @contextmanager
    def _counted(self, part: slice, look: Look = _NOTHING) -> Iterator[None]:
        """Watch a batch while it is drawn, and count it."""
        with self._watching(look, part.start):
            yield
        self.cost.images += part.stop - part.start
        if self.progress is not None:
            self.progress(self.name, part.stop - part.start)

    @contextmanager
    def _watching(self, look: Look, start: int) -> Iterator[None]:
        """Count the denoiser's passes, and pass on what is watched; `start` is the batch's first sample."""
        network, kept = self.network, list[tuple[str, Tensor]]()

        def begin(*_: Any) -> None:
            kept.clear()  # of a pass that failed

        def hook(name: str) -> Callable[..., None]:
            def see(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
                now = pass_of(network)
                if now is not None and any(now.conditional):
                    x = rows_of(args[0] if look.inputs else output, now, f"{self.name}: {name}")
                    rows = [row for row, conditional in enumerate(now.conditional) if conditional]
                    kept.append((name, look.reduce(name, x[rows].detach())))

            return see

        def end(*_: Any) -> None:
            now = pass_of(network)
            if now is not None:
                self.cost.forward += len(now.samples)
                pairs = zip(now.samples, now.conditional, strict=True)
                samples = [start + sample for sample, conditional in pairs if conditional]
                for name, x in kept:
                    look.keep(samples, now.step, name, x.cpu())

        with ExitStack() as handles:
            handles.callback(network.register_forward_pre_hook(begin).remove)
            for name, module in look.modules.items():
                handles.callback(module.register_forward_hook(hook(name)).remove)
            handles.callback(network.register_forward_hook(end).remove)
            yield

    def read(self, drawn: Tensor) -> Tensor:
        """Which group each sample's image (N, 3, H, W) uint8 shows: (N,), by the reader's largest probability.

        Raises:
            InputError: There is no reader, or it does not know the axis.
        """
        if self.calibration.reader is None:
            raise InputError(f"{self.name} needs labels of the model's own images; give its Calibration a reader")
        reader = self.calibration.reader
        head, columns = group_columns(reader, self.axis)
        found = [
            read_rows(reader, drawn[part].float() / 255, self.rows[part])[head][:, columns].argmax(1)
            for part in self.batches()
        ]
        return torch.cat(found)

    def shares(self, groups: Tensor) -> dict[str, Tensor]:
        """Neutral prompt -> (K,) shares of the groups among its samples, groups (N,)."""
        one_hot = functional.one_hot(groups, len(self.axis)).double()
        return {
            prompt: one_hot[torch.tensor([each == prompt for each in self.neutral])].mean(0)
            for prompt in dict.fromkeys(self.neutral)
        }


def rows_of(x: Any, now: Pass, name: str) -> Tensor:
    """A module's input or output, which must have a row for each row of the pass.

    Raises:
        InputError: It has another number of rows.
    """
    if not isinstance(x, Tensor) or len(x) != len(now.samples):
        raise InputError(f"{name} has no row for each of the {len(now.samples)} rows of its denoiser's batch")
    return x
