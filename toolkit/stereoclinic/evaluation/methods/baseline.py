"""The base class of baselines: how they are fitted, and how they change the outputs of a running model's modules.

    denoiser(x, t, c):   note the timestep, and which rows see the prompt of which image
      module:            output[those rows]  <-  steer(input, output)      each row by its image's group

The watched call says what a pass is about (`pass_of`), so guidance in one call or in two and split batches all work.
Rows that are left alone, and those without prompt, come out bit for bit as they were.
"""

import time
from collections.abc import Callable, Mapping, Sequence
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
    """A published method, made by `fit`; it allots every image a group unless its `begin` says otherwise.

    A subclass gives the attributes below, `_fit`, and where it steers modules, `modules` and `steer`.

    Args:
        model: The pipeline.
        axis: The bias axis.
        target: (K,) shares of the groups.
        strength: Scales what it does; 0 is nothing.
        timesteps: (T,) it was calibrated at; None if it does not depend on them.
        **fitted: What `fitted` names, set as attributes.
    """

    title: ClassVar[str]  # its name in tables
    source: ClassVar[str]  # paper
    defaults: ClassVar[Any] = None  # its settings, a frozen dataclass with `strength`; None if it has none
    fitted: ClassVar[tuple[str, ...]] = ()  # attributes that `fit` finds: tensors, dicts of tensors, or plain data
    both: ClassVar[bool] = False  # whether it also reaches the rows without prompt
    by_prompt: ClassVar[bool] = False  # whether it is made for the very prompts it treats, and is of no use on others

    def __init__(
        self,
        model: Model,
        axis: Axis,
        target: Tensor,
        strength: float,
        timesteps: Tensor | None = None,
        **fitted: Any,
    ) -> None:
        super().__init__(self.title)
        self.model, self.axis, self.target, self.strength = model, axis, target, strength
        self.timesteps, self.cost = timesteps, Cost()
        for name in self.fitted:
            setattr(self, name, fitted[name])
        self._groups = torch.empty(0, dtype=torch.long)  # (B,), -1 where an image is left alone
        self._step = 0
        self._pass: Pass | None = None
        self._rows = self._images = self._groups  # rows of the pass that are reached, and the image of each
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
            calibration: How their images are drawn and read.
            progress: Called with the baseline's name and a number of images drawn.
            settings: Its own; `defaults` if not given.

        Raises:
            InputError: Samples, reader or model do not fit the method.
        """
        check_open(model)
        run = Run(cls.title, model, axis, list(samples), calibration, progress)
        began = time.perf_counter()
        made = cls._fit(run, cls.defaults if settings is None else settings)
        run.cost.seconds = time.perf_counter() - began if cls.fitted else 0.0
        made.cost = run.cost
        return made

    @classmethod
    def _fit(cls, run: Run, settings: Any) -> Self:
        raise NotImplementedError

    @classmethod
    def _made(cls, run: Run, settings: Any, timesteps: Tensor | None = None, **fitted: Any) -> Self:
        return cls(run.model, run.axis, run.target, settings.strength, timesteps, **fitted)

    def modules(self) -> Mapping[str, str]:
        """The modules that it steers: name -> module path in the denoiser."""
        return {}

    def steer(self, name: str, x: Tensor, output: Tensor, groups: Tensor, images: Tensor) -> Tensor:
        """The new output of a module.

        Args:
            name: Of the module.
            x: (R, ...) its input.
            output: (R, ...).
            groups: (R,) of each row.
            images: (R,) which of the begun images each row is of.
        """
        raise NotImplementedError

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that its images depend on: tensors by name, those of a module as "attribute/module", and plain data."""
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
        """The baseline with this `state`.

        Raises:
            KeyError: Something is missing.
        """
        fitted: dict[str, Any] = {}
        for name in cls.fitted:
            by_module = {key.removeprefix(f"{name}/"): tensors[key] for key in tensors if key.startswith(f"{name}/")}
            fitted[name] = tensors[name] if name in tensors else plain.get(name, by_module)
        return cls(model, axis, tensors["target"], plain["strength"], tensors.get("timesteps"), **fitted)

    def key(self) -> str:
        tensors, plain = self.state()
        names = sorted(tensors)
        return plain_digest([type(self).__name__, plain, names], *(tensors[name] for name in names))

    def begin(self, rows: list[Row]) -> Batch:
        self._groups = torch.tensor([allotted_group(row, self.target) for row in rows])
        return Batch([row["prompt"] for row in rows], allotted=self._groups.clone())

    def _note(self, network: nn.Module, args: tuple[Any, ...]) -> None:
        """Note which rows of the pass to steer; raises InputError if other images were begun than are drawn."""
        if len(self._handles) == 1:  # no module is steered
            return
        if PASS not in network.__dict__:
            raise InputError(f"{self.name} acts on images that `pipelines.images.draw` draws, and on no others")
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
        network = network_of(self.model)
        self._handles = [network.register_forward_pre_hook(self._note)]
        for name, path in self.modules().items():
            self._handles.append(network.get_submodule(path).register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *error: Any) -> None:
        while self._handles:
            self._handles.pop().remove()


def nearest(timesteps: Tensor, t: float) -> int:
    """Index of the calibrated timestep (T,) that is nearest to t."""
    return int((timesteps - t).abs().argmin())


def unit(x: Tensor) -> Tensor:
    """(..., C) scaled to length 1; zero stays zero."""
    length: Tensor = x.norm(dim=-1, keepdim=True)
    return x / length.clamp_min(1e-12)


def attention_blocks(network: nn.Module, cross: bool, who: str) -> dict[str, nn.Module]:
    """The denoiser's blocks of cross-attention, `attn2`, or of self-attention, `attn1`, by module path.

    Raises:
        InputError: There is none, as in transformers whose text and image attend to each other.
    """
    kind, what = ("attn2", "cross-attention") if cross else ("attn1", "self-attention")
    blocks = {
        name: module
        for name, module in network.named_modules()
        if name.endswith(f".{kind}") and getattr(module, "is_cross_attention", cross) == cross
    }
    if not blocks:
        raise InputError(
            f"{who} needs separate {what}, which this {type(network).__name__} does not have (no module path ends in"
            f" {kind})"
        )
    return blocks


def attended(name: str, o: Tensor) -> Tensor:
    """An attention block's output (B, L, C).

    Raises:
        InputError: It is of another form, such as one with a dimension of heads.
    """
    if o.ndim != 3:
        raise InputError(f"{name} gives {tuple(o.shape)}; expected rows, positions and channels")
    return o


def check_strength(who: str, strength: float, most: float = float("inf")) -> None:
    """Refuse a strength below 0 or above `most`, with an InputError."""
    if not 0 <= strength <= most:
        raise InputError(f"{who}: strength {strength}; expected 0 or more" + (f", up to {most:g}" if most < 9 else ""))
