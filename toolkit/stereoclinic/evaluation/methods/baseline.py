"""What comparators share at run time: how they are made, and how they reach into a running model.

    denoiser(x, t, c):   note the timestep, and which rows see the prompt of which image
      module:            output[those rows]  <-  steer(input, output)      each row by its image's group

What a pass is about is asked of the watched call (`pass_of`): whether the pipeline guides in one call or in two, and
however its batch is parted. Rows that are left alone, and those without prompt, come out bit for bit as they were.
"""

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stereoclinic.errors import InputError
from stereoclinic.evaluation.methods.base import Batch, Mitigation
from stereoclinic.evaluation.methods.calibration import Calibration, Cost, Progress, Run, rows_of
from stereoclinic.io.digest import plain_digest
from stereoclinic.pipelines.intercept import PASS, Pass, pass_of
from stereoclinic.pipelines.model import Model, network_of
from stereoclinic.prompts.axes import Axis
from stereoclinic.prompts.sets import Row
from stereoclinic.sns.allocate import allotted_group
from stereoclinic.sns.compat import check_open


class Baseline(Mitigation):
    """A comparator, made by `fit`; it allots every image a group unless its `begin` says otherwise.

    Args:
        model: The pipeline.
        axis: The bias axis.
        target: (K,) shares of the groups.
        strength: Scales what it does; 0 is nothing.
        timesteps: (T,) it was calibrated at; none where it does not depend on them.
    """

    title: ClassVar[str]  # its name in tables
    source: ClassVar[str]  # paper
    defaults: ClassVar[Any]  # its settings, a frozen dataclass
    fitted: ClassVar[tuple[str, ...]]  # attributes that `fit` finds, and the constructor's arguments of the same names
    both: ClassVar[bool] = False  # whether it also reaches the rows without prompt
    by_prompt: ClassVar[bool] = False  # whether it is made for the very prompts it treats, and is of no use on others

    def __init__(
        self, model: Model, axis: Axis, target: Tensor, strength: float, timesteps: Tensor | None = None
    ) -> None:
        super().__init__(self.title)
        self.model, self.axis, self.target, self.strength = model, axis, target, strength
        self.timesteps, self.cost = timesteps, Cost()
        self._groups = torch.empty(0, dtype=torch.long)  # (B,), -1 where an image is left alone
        self._step = 0
        self._pass: Pass | None = None
        self._rows = self._images = self._groups  # of the pass, that are reached, and which image each is of
        self._handles: list[RemovableHandle] = []

    @classmethod
    def fit(
        cls,
        model: Model,
        axis: Axis,
        samples: Sequence[Row],
        calibration: Calibration,
        progress: Progress | None = None,
        settings: Any = None,
    ) -> Self:
        """Calibrate on samples, none of which may be judged.

        Args:
            model: The pipeline, untreated.
            axis: The bias axis.
            samples: Rows with `prompt` and `seed`.
            calibration: How their pictures are drawn and read.
            progress: Called with the comparator's name and a number of pictures drawn.
            settings: Its own; `defaults` if not given.

        Raises:
            InputError: Samples, reader or model do not serve; said in one line.
        """
        check_open(model)
        run = Run(cls.title, model, axis, samples, calibration, progress)
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

    def steer(self, name: str, x: Tensor, output: Tensor, groups: Tensor, images: Tensor) -> Tensor:
        """What a module's output becomes.

        Args:
            name: Of the module.
            x: (R, ...) what went in.
            output: (R, ...).
            groups: (R,) of each row.
            images: (R,) which of the begun images each row is of.
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
    def restored(cls, model: Model, axis: Axis, tensors: dict[str, Tensor], plain: dict[str, Any]) -> Self:
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
        return cls(model, axis, tensors["target"], plain["strength"], tensors.get("timesteps"), **made)

    def key(self) -> str:
        tensors, plain = self.state()
        names = sorted(tensors)
        return plain_digest([type(self).__name__, plain, names], *(tensors[name] for name in names))

    def begin(self, rows: list[Row]) -> Batch:
        self._groups = torch.tensor([allotted_group(row, self.target) for row in rows])
        return Batch([row["prompt"] for row in rows], allotted=self._groups.clone())

    def _note(self, network: nn.Module, args: tuple[Any, ...]) -> None:
        """Which rows of the pass that begins are reached.

        Raises:
            InputError: Nobody says what the pass is about, or other images were begun than are drawn.
        """
        if len(self._handles) == 1:  # no module is reached
            return
        if PASS not in network.__dict__:
            raise InputError(f"{self.name} acts on pictures that `pipelines.pictures.draw` draws, and on no others")
        now, rows = pass_of(network), list[int]()
        if now is not None and now.treated:
            if now.total != len(self._groups):
                raise InputError(
                    f"{now.total} images are drawn, and {len(self._groups)} were begun; call begin with the rows drawn"
                )
            groups = self._groups.tolist()
            pairs = enumerate(zip(now.samples, now.conditional, strict=True))
            rows = [row for row, (image, sees) in pairs if (sees or self.both) and groups[image] >= 0]
            if self.timesteps is not None:
                self._step = nearest(self.timesteps, now.timestep)
        self._pass, self._rows = now, torch.tensor(rows, dtype=torch.long)
        self._images = torch.tensor(now.samples if now is not None else (), dtype=torch.long)[self._rows]

    def _hook(self, name: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if self._pass is None or not len(self._rows):
                return None
            rows, who = self._rows.to(output.device), f"{self.title}: {name}"
            x, own = rows_of(args[0], self._pass, who)[rows], rows_of(output, self._pass, who)[rows]
            steered = self.steer(name, x, own, self._groups[self._images].to(own.device), self._images)
            return output.index_copy(0, rows, steered.to(own.dtype))

        return hook

    def __enter__(self) -> Self:
        if self._handles:
            raise RuntimeError(f"{self.name} is active already")
        check_open(self.model)
        self._handles = [network_of(self.model).register_forward_pre_hook(self._note)]
        self._handles += [module.register_forward_hook(self._hook(name)) for name, module in self.modules().items()]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()


def nearest(timesteps: Tensor, t: float) -> int:
    """Index of the calibrated timestep (T,) that is nearest to t."""
    return int((timesteps - t).abs().argmin())


def unit(x: Tensor) -> Tensor:
    """(..., C) brought to length 1; zero stays zero."""
    length: Tensor = x.norm(dim=-1, keepdim=True)
    return x / length.clamp_min(1e-12)


def attention_blocks(network: nn.Module, cross: bool, who: str) -> dict[str, nn.Module]:
    """The denoiser's blocks of cross-attention, `attn2`, or of self-attention, `attn1`, by module path.

    Raises:
        InputError: There is none: a transformer in whose blocks text and image attend to each other, say.
    """
    kind, what = ("attn2", "cross-attention") if cross else ("attn1", "self-attention")
    found = {
        name: module
        for name, module in network.named_modules()
        if name.endswith(f".{kind}") and getattr(module, "is_cross_attention", cross) == cross
    }
    if not found:
        raise InputError(
            f"{who}: this {type(network).__name__} has no {what} of its own: no module path ends in {kind}"
        )
    return found


def attended(name: str, o: Tensor) -> Tensor:
    """An attention block's output (B, L, C).

    Raises:
        InputError: It is of another form: one in which heads stay apart, say.
    """
    if o.ndim != 3:
        raise InputError(f"{name} gives {tuple(o.shape)}; expected rows, positions and channels")
    return o


def check_strength(who: str, strength: float, most: float = float("inf")) -> None:
    """Raises InputError for a strength below 0 or above `most`."""
    if not 0 <= strength <= most:
        raise InputError(f"{who}: strength {strength}; expected 0 or more" + (f", up to {most:g}" if most < 9 else ""))
