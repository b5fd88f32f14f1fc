"""Calibrating a comparator: how pictures are drawn and read, and what it costs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stereoclinic.axes import Axis
from stereoclinic.denoisers.base import Denoiser
from stereoclinic.denoisers.sampling import sample_latents
from stereoclinic.errors import InputError
from stereoclinic.evaluation.readers import Reader, group_columns, read_rows
from stereoclinic.prompts import Row, group_prompts
from stereoclinic.sns.allocate import shares_of

Progress = Callable[[str, int], None]
# (samples, step of their run, module's name, what was watched (B, ...))
Keep = Callable[[slice, int, str, Tensor], None]


@dataclass(frozen=True)
class Calibration:
    """How calibration pictures are drawn, and what is aimed at.

    Args:
        steps: Of the scheduler.
        guidance: Scale of classifier-free guidance.
        reader: Says which group a picture shows, for those that need labels of the model's own pictures.
        shares: Of the groups by name; uniform if empty.
        batch_size: Pictures drawn together.
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
    """What making a comparator took: seconds, pictures drawn, and samples passed through the UNet each way."""

    seconds: float = 0.0
    images: int = 0
    forward: int = 0
    backward: int = 0


class Run:
    """A calibration under way: draws, reads, and counts.

    Args:
        name: Of the comparator, for `progress`.
        denoiser: The model.
        axis: The bias axis.
        rows: N calibration samples.
        calibration: See there.
        progress: Called with the name and a number of pictures drawn.
    """

    def __init__(
        self,
        name: str,
        denoiser: Denoiser,
        axis: Axis,
        rows: Sequence[Row],
        calibration: Calibration,
        progress: Progress | None = None,
    ) -> None:
        self.name, self.denoiser, self.axis, self.rows, self.calibration = name, denoiser, axis, list(rows), calibration
        self.target = shares_of(axis.groups, [calibration.shares] if calibration.shares else [])
        self.progress, self.cost, self._step = progress, Cost(), -1
        if not self.rows or any("prompt" not in row or "seed" not in row for row in self.rows):
            raise InputError(f"{name}: no calibration samples; give rows with a prompt and a seed, as with_seeds makes")

    @property
    def neutral(self) -> list[str]:
        return [row["prompt"] for row in self.rows]

    def group(self, k: int) -> list[str]:
        """The samples' prompts for one group."""
        return [group_prompts(row, self.axis)[k] for row in self.rows]

    def batches(self) -> Iterator[slice]:
        size = self.calibration.batch_size
        return (slice(start, min(start + size, len(self.rows))) for start in range(0, len(self.rows), size))

    def timesteps(self) -> Tensor:
        """(T,) of a picture, noisiest first."""
        return self.denoiser.timesteps(self.calibration.steps).float().cpu()

    def draw(
        self,
        prompts: Sequence[str],
        watch: Mapping[str, nn.Module] | None = None,
        keep: Keep | None = None,
        inputs: bool = False,
    ) -> Tensor:
        """Draw one picture a sample: its clean latents (N, C, h, w).

        Args:
            prompts: N, what each is conditioned on.
            watch: Modules by name whose conditional rows are handed over at every step.
            keep: Takes them.
            inputs: Hand over what goes into the modules, rather than what comes out.
        """
        drawn, guidance = [], self.calibration.guidance
        for part in self.batches():
            self._step = -1

            def watcher(name: str, part: slice = part) -> Callable[..., None]:
                def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
                    x = args[0] if inputs else output
                    if keep is not None:
                        keep(part, self._step, name, (x.chunk(2)[1] if guidance > 1 else x).detach())

                return hook

            handles = [module.register_forward_hook(watcher(name)) for name, module in (watch or {}).items()]
            try:
                with self.counted():
                    rows = self.rows[part]
                    drawn.append(
                        sample_latents(self.denoiser, rows, list(prompts[part]), self.calibration.steps, guidance)
                    )
            finally:
                for handle in handles:
                    handle.remove()
            self.cost.images += len(rows)
            if self.progress is not None:
                self.progress(self.name, len(rows))
        return torch.cat(drawn)

    def counted(self) -> "Counted":
        """Count the UNet's passes within a `with` block."""
        return Counted(self)

    def read(self, latents: Tensor) -> Tensor:
        """Which group each sample's picture shows: (N,), by the reader's largest probability.

        Raises:
            InputError: There is no reader, or it does not know the axis.
        """
        reader = self.calibration.reader
        if reader is None:
            raise InputError(f"{self.name} needs labels of the model's own pictures; give its Calibration a reader")
        head, columns = group_columns(reader, self.axis)
        found = [
            read_rows(reader, self.denoiser.decode(latents[part]).cpu(), self.rows[part])[head][:, columns].argmax(1)
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


class Counted:
    """Counts a run's passes through the UNet, and keeps its step."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def _count(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.run._step += 1
        self.run.cost.forward += len(args[0])
        self.run.cost.backward += len(args[0]) if torch.is_grad_enabled() else 0

    def __enter__(self) -> None:
        self._handle = self.run.denoiser.unet.register_forward_pre_hook(self._count)

    def __exit__(self, *failure: object) -> None:
        self._handle.remove()
