"""What comparators share at run time: how they are made, and how they reach into a running model.

    unet(x, t, c):   note t
      module:        output[conditional rows]  <-  steer(input, output)      each row by its own group, or left alone

A batch of B images is B rows of the UNet's batch, or 2 B of which the second half is conditional. Rows that are left
alone, and the unconditional half, come out bit for bit as they were.
"""

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stereoclinic.axes import Axis
from stereoclinic.denoisers.base import Denoiser
from stereoclinic.digest import plain_digest
from stereoclinic.errors import InputError
from stereoclinic.evaluation.baselines.calibration import Calibration, Cost, Progress, Run
from stereoclinic.evaluation.bench.mitigation import Batch, Mitigation
from stereoclinic.prompts import Row
from stereoclinic.sns.allocate import allotted_group
from stereoclinic.sns.reach import check_open


class Baseline(Mitigation):
    """A comparator, made by `fit`; it allots every image a group unless its `begin` says otherwise.

    Args:
        denoiser: The model.
        axis: The bias axis.
        target: (K,) shares of the groups.
        strength: Scales what it does; 0 is nothing.
        timesteps: (T,) it was calibrated at; none where it does not depend on them.
    """

    title: ClassVar[str]  # its name in tables
    source: ClassVar[str]  # paper
    defaults: ClassVar[Any]  # its settings, a frozen dataclass
    fitted: ClassVar[tuple[str, ...]]  # attributes that `fit` finds, and the constructor's arguments of the same names
    both: ClassVar[bool] = False  # whether it also reaches the unconditional half
    by_prompt: ClassVar[bool] = False  # whether it is made for the very prompts it treats, and is of no use on others

    def __init__(
        self, denoiser: Denoiser, axis: Axis, target: Tensor, strength: float, timesteps: Tensor | None = None
    ) -> None:
        super().__init__(self.title)
        self.denoiser, self.axis, self.target, self.strength = denoiser, axis, target, strength
        self.timesteps, self.cost = timesteps, Cost()
        self._groups = torch.empty(0, dtype=torch.long)  # (B,), -1 where an image is left alone
        self._step = 0
        self._handles: list[RemovableHandle] = []

    @classmethod
    def fit(
        cls,
        denoiser: Denoiser,
        axis: Axis,
        samples: Sequence[Row],
        calibration: Calibration,
        progress: Progress | None = None,
        settings: Any = None,
    ) -> Self:
        """Calibrate on samples, none of which may be judged.

        Args:
            denoiser: The model, untreated.
            axis: The bias axis.
            samples: Rows with `prompt` and `seed`.
            calibration: How their pictures are drawn and read.
            progress: Called with the comparator's name and a number of pictures drawn.
            settings: Its own; `defaults` if not given.

        Raises:
            InputError: Samples, reader or model do not serve; said in one line.
        """
        check_open(denoiser.pipe)
        # Forgets encoded texts: their last digits are those of the batch they were in, whoever asked for it before.
        denoiser.to(denoiser.device)
        run = Run(cls.title, denoiser, axis, samples, calibration, progress)
        began = time.perf_counter()
        made = cls._fit(run, cls.defaults if settings is None else settings)
        run.cost.seconds = time.perf_counter() - began
        made.cost = run.cost
        return made

    @classmethod
    def _fit(cls, run: Run, settings: Any) -> Self:
        raise NotImplementedError

    def modules(self) -> dict[str, nn.Module]:
        """Those it reaches into, by name."""
        return {}

    def steer(self, name: str, x: Tensor, output: Tensor, groups: Tensor) -> Tensor:
        """What a module's output becomes.

        Args:
            name: Of the module.
            x: (B, ...) what went in.
            output: (B, ...).
            groups: (B,) of each row.
        """
        raise NotImplementedError

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that its pictures depend on: tensors by name, those of a module as "attribute/module", and plain data."""
        tensors, plain = {"target": self.target}, {"strength": self.strength}
        if self.timesteps is not None:
            tensors["timesteps"] = self.timesteps
        for name in self.fitted:
            value = getattr(self, name)
            if isinstance(value, Tensor):
                tensors[name] = value
            elif isinstance(value, dict) and all(isinstance(each, Tensor) for each in value.values()):
                tensors |= {f"{name}/{module}": each for module, each in value.items()}
            else:
                plain[name] = value
        return tensors, plain

    @classmethod
    def restored(cls, denoiser: Denoiser, axis: Axis, tensors: dict[str, Tensor], plain: dict[str, Any]) -> Self:
        """What `state` was taken of.

        Raises:
            KeyError: Something is missing.
        """
        made: dict[str, Any] = {}
        for name in cls.fitted:
            by_module = {
                key.removeprefix(f"{name}/"): each for key, each in tensors.items() if key.startswith(f"{name}/")
            }
            made[name] = tensors[name] if name in tensors else plain.get(name, by_module)
        return cls(denoiser, axis, tensors["target"], plain["strength"], tensors.get("timesteps"), **made)

    def key(self) -> str:
        tensors, plain = self.state()
        names = sorted(tensors)
        return plain_digest([type(self).__name__, plain, names], *(tensors[name] for name in names))

    def begin(self, rows: list[Row]) -> Batch:
        self._groups = torch.tensor([allotted_group(row, self.target) for row in rows])
        return Batch([row["prompt"] for row in rows], allotted=self._groups.clone())

    def _note(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.timesteps is not None:
            self._step = nearest(self.timesteps, float(args[1]))

    def _hook(self, name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            halves = []
            for part, reached in halves_of(len(output), len(self._groups), self.both):
                x, own = args[0][part], output[part]
                if reached:
                    groups = self._groups.to(own.device)
                    alone = (groups < 0).view(-1, *[1] * (own.ndim - 1))
                    own = torch.where(alone, own, self.steer(name, x, own, groups.clamp_min(0)).to(own.dtype))
                halves.append(own)
            return torch.cat(halves)

        return hook

    def __enter__(self) -> Self:
        if self._handles:
            raise RuntimeError(f"{self.name} is active already")
        check_open(self.denoiser.pipe)
        self._handles = [self.denoiser.unet.register_forward_pre_hook(self._note)]
        self._handles += [module.register_forward_hook(self._hook(name)) for name, module in self.modules().items()]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()


def halves_of(rows: int, images: int, both: bool) -> list[tuple[slice, bool]]:
    """The halves of a batch, and whether each is reached.

    Raises:
        InputError: The batch holds neither as many rows as images were begun, nor twice as many.
    """
    if rows == images:
        return [(slice(0, rows), True)]
    if rows == 2 * images:
        return [(slice(0, images), both), (slice(images, rows), True)]
    raise InputError(f"{rows} rows in a batch of which {images} images were begun; call begin with the rows drawn")


def nearest(timesteps: Tensor, t: float) -> int:
    """Index of the calibrated timestep (T,) that is nearest to t."""
    return int((timesteps - t).abs().argmin())


def unit(x: Tensor) -> Tensor:
    """(..., C) brought to length 1; zero stays zero."""
    length: Tensor = x.norm(dim=-1, keepdim=True)
    return x / length.clamp_min(1e-12)


def attention_blocks(denoiser: Denoiser, kind: str, who: str) -> dict[str, nn.Module]:
    """The UNet's attention blocks by module path: "attn1" is self-attention, "attn2" cross-attention.

    Raises:
        InputError: There is none.
    """
    found = {name: module for name, module in denoiser.unet.named_modules() if name.endswith(f".{kind}")}
    if not found:
        raise InputError(f"{who}: this {type(denoiser.unet).__name__} has no module whose path ends in {kind}")
    return found


def check_strength(who: str, strength: float, most: float = float("inf")) -> None:
    """Raises InputError for a strength below 0 or above `most`."""
    if not 0 <= strength <= most:
        raise InputError(f"{who}: strength {strength}; expected 0 or more" + (f", up to {most:g}" if most < 9 else ""))
