"""Applying a mask while a model runs: hooks that leave no trace.

    denoiser(x, t, c):   recognise the pass, pick the bin and what each row gets
      site:              a_j  <-  r_j + s_j (a_j - r_j),     s_j = 1 - strength (1 - factor_j)

Each row of a batch gets one *variant*: the mask, one group of an allocating mask, or nothing at all. "Nothing" is a
factor of 1 and an offset of -0, the one number that leaves every other as it is when added, so that a sample that is
left alone comes out bit for bit as if its batch had not been treated.

Several masks compose by nesting contexts; with roots at zero their factors multiply (see `compose` for other roots).
Hooks reach only what torch calls through `Module.__call__`, so a model that is compiled already is refused. One that is
compiled while it is damped keeps following: what a forward pass is to do is plain data that the hooks read.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stereoclinic.errors import InputError
from stereoclinic.pipelines.hooks import Hooks
from stereoclinic.pipelines.intercept import Pass
from stereoclinic.pipelines.model import network_of, outer_network
from stereoclinic.pipelines.recognise import Recogniser
from stereoclinic.pipelines.sites import Site, by_layer, channels_of, layer_at
from stereoclinic.sns.compat import check_fits, check_open
from stereoclinic.sns.factors import damp, effective
from stereoclinic.sns.mask import NeuronMask

#: What one sample gets: a group's name, True (the mask), or None or False (left alone).
Allotment = str | bool | None


def suppress(
    target: Any, mask: NeuronMask, strength: float = 1.0, guided: bool | None = None, force: bool = False
) -> "Suppression":
    """Damp the mask's neurons within a `with` block.

    Args:
        target: A diffusers pipeline, a `Model`, or the denoiser itself.
        mask: What to damp. An allocating one needs `Suppression.allot` to be told every sample's group.
        strength: Scales the damping, 1 - factor, from 0 (none) to 1 (as the mask says).
        guided: Whether a batch holds an unconditional half, first, and a conditional one; matters where samples or
            branches differ. None finds out for a pipeline, and takes a bare denoiser's batch for conditional.
        force: Accept a model whose weights differ from those the mask was made for.

    Returns:
        A context manager; the model is untouched before and after it, also when an exception leaves it. Within it the
        model cannot be deep-copied, since nothing would undo the copy (`load_mask` makes copies that can be undone).

    Raises:
        InputError: strength is out of range; on entering, the mask does not fit the model, or it is compiled or has a
            mask fused in.
    """
    return Suppression(target, mask, strength, guided, force)


@dataclass
class _Step:
    """What the layers read during one pass."""

    active: frozenset[str]  # the layers where a row is damped
    rows: dict[str, tuple[Tensor, Tensor | None]]  # layer -> (1 or B, C) each, for the usual device and dtype
    casts: dict[tuple[str, torch.device, torch.dtype], tuple[Tensor, Tensor | None]] = field(default_factory=dict)

    def at(self, name: str, a: Tensor) -> tuple[Tensor, Tensor | None]:
        factor, offset = self.rows[name]
        if factor.dtype == a.dtype and factor.device == a.device:
            return factor, offset
        key = (name, a.device, a.dtype)  # autocast, or a model that is spread over devices
        if key not in self.casts:
            self.casts[key] = factor.to(a.device, a.dtype), None if offset is None else offset.to(a.device, a.dtype)
        return self.casts[key]


@dataclass(frozen=True)
class _Place:
    """A layer's neurons in a mask, and their channels among its own."""

    sites: tuple[tuple[Site, slice], ...]
    width: int  # channels of the layer

    @property
    def dim(self) -> int:
        return self.sites[0][0].dim

    def widened(self, x: Tensor, value: float) -> Tensor:
        """(rows, N) -> (rows, C), with `value` where no site is."""
        site, span = self.sites[0]
        if site.width == self.width:
            return x[:, span]
        whole = x.new_full((len(x), self.width), value)
        for site, span in self.sites:
            whole[:, site.start : site.start + site.width] = x[:, span]
        return whole


class Suppression:
    """The hooks of one mask on one model; made by `suppress`.

    Args:
        target: As `suppress`.
        mask: As `suppress`.
        strength: As `suppress`.
        guided: As `suppress`.
        force: As `suppress`.
        movable: The denoiser itself holds this, so that a deep copy of it has one of its own.
    """

    def __init__(
        self,
        target: Any,
        mask: NeuronMask,
        strength: float = 1.0,
        guided: bool | None = None,
        force: bool = False,
        movable: bool = False,
    ) -> None:
        self.module = network_of(target)
        self._open = outer_network(target)
        self.recogniser = Recogniser(target, guided)
        self.strength, self.force, self.movable = strength, force, movable
        self._handles: list[RemovableHandle] = []
        self._hooks: Hooks | None = None
        self._step: _Step | None = None
        self._paused = False
        self._lay_out(mask)
        self._choice: tuple[int, ...] | None = None if mask.allocates else (0,)
        self._groups = ", ".join(mask.groups)

    def _lay_out(self, mask: NeuronMask) -> None:
        """Tables with a row for each variant; the last one leaves alone."""
        factors, offsets = effective(mask, self.strength)
        if not mask.allocates:
            factors, offsets = factors[None], None if offsets is None else offsets[None]
        self.mask = mask
        self._edges = mask.bin_edges.tolist()
        self._alone = len(factors)
        self._factors = torch.cat([factors, torch.ones_like(factors[:1])])  # (V + 1, T, N)
        self._offsets = None if offsets is None else torch.cat([offsets, torch.full_like(offsets[:1], -0.0)])
        self._places: dict[str, _Place] = {}
        for name, here in by_layer(mask.sites).items():
            width = channels_of(layer_at(self.module, name) or self.module)
            self._places[name] = _Place(tuple(here), width or max(site.start + site.width for site, _ in here))
        #: Layer -> (V + 1, T), whether anything is damped there.
        self._damped = {
            name: torch.stack([(self._factors[..., span] < 1).any(2) for _, span in place.sites]).any(0)
            for name, place in self._places.items()
        }
        self._tables: dict[torch.device, tuple[Tensor, Tensor | None]] = {}
        self._steps: dict[tuple[Any, ...], _Step] = {}
        self._step = None

    def allot(self, samples: Iterable[Allotment] | Allotment) -> None:
        """Say what each sample gets, from the next forward pass on.

        Args:
            samples: One entry a sample (those of the conditional half, if the batch is guided; with several images a
                prompt, each image's), or one for the whole batch. For an allocating mask a group's name, for a plain
                one True; None or False leaves the sample alone.

        Raises:
            InputError: A group is not known, or there is no sample.
        """
        if isinstance(samples, Tensor):
            samples = samples.tolist()
        entries = [samples] if samples is None or isinstance(samples, str | bool) else list(samples)
        if not entries:
            raise InputError("no sample is allotted anything; give one entry a sample, or one for all of them")
        self._choice = tuple(self._variant(entry) for entry in entries)

    def forget(self, groups: str) -> None:
        """Refuse to run until samples are allotted to (one of) these groups."""
        self._choice, self._groups = None, groups

    def change(self, mask: NeuronMask) -> None:
        """Damp by another mask from now on, one that damps no other sites; samples are to be allotted anew."""
        self._lay_out(mask)
        self.forget(", ".join(mask.groups))

    def pause(self) -> None:
        """Leave the hooks on, and have them do nothing."""
        self._paused, self._step = True, None

    def resume(self) -> None:
        """Undo `pause`."""
        self._paused = False

    def _variant(self, entry: Allotment) -> int:
        if entry is None or entry is False:
            return self._alone
        if not self.mask.allocates:
            if entry is True:
                return 0
            raise InputError(f"sample allotted to {entry!r}, but this mask has no groups; expected True, False or None")
        if not isinstance(entry, str) or entry not in self.mask.groups:
            raise InputError(f"group {entry!r} is not known; choose from {', '.join(self.mask.groups)}, or None")
        return self.mask.groups.index(entry)

    def __enter__(self) -> Self:
        if self._handles:
            raise RuntimeError("this suppression is active already; make another with suppress(...)")
        check_open(self._open)
        check_fits(self.mask, self.module, self.force)
        self.attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    def attach(self) -> None:
        """Put the hooks on, on sites that any variant damps; nothing is checked."""
        self._handles.append(self.module.register_forward_pre_hook(self._begin, with_kwargs=True))
        damped = [name for name, rows in self._damped.items() if rows.any()]
        self._hooks = Hooks(self.module, damped, self._damp_layer)
        self._hooks.attach()

    def detach(self) -> None:
        """Take them off again."""
        for handle in self._handles:
            handle.remove()
        if self._hooks is not None:
            self._hooks.detach()
        self._handles.clear()
        self._hooks = None
        self._steps.clear()
        self._tables.clear()
        # Code that was compiled meanwhile holds the hooks; it sees that there is nothing left to do.
        self._step = None

    # Never traced: a bin is chosen by the timestep's value, and would be compiled anew for each.
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's own has no annotations
    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._step = None
        if self._paused or self._hooks is None:
            return
        self._hooks.follow()
        now = self.recogniser.now(module, args, kwargs)
        if now is None:
            return
        self._hooks.rows = len(now.samples)
        bin_ = self._bin(now.timestep)
        rows = self._rows(now)
        if bin_ is not None and rows != (self._alone,):
            latents: Any = args[0] if args else next(iter(kwargs.values()))
            while not isinstance(latents, Tensor):  # a list of rows, or of lists
                latents = latents[0]
            self._step = self._prepared(bin_, rows, latents)

    def _bin(self, timestep: float) -> int | None:
        """As `NeuronMask.bin_of`, from numbers alone."""
        above = sum(edge > timestep for edge in self._edges)
        return None if above == len(self._edges) else max(above - 1, 0)

    def _rows(self, now: Pass) -> tuple[int, ...]:
        """The variant of each row of a batch, or one for all of them."""
        choice = self._choice
        if choice is None:
            raise InputError(
                f"the mask allocates images to {self._groups}, and nothing was allotted yet; call allot([...]) on what "
                "suppress(...) returned, or allot_masks(pipe, [...])"
            )
        everywhere = self.mask.branch != "conditional" or all(now.conditional)
        if len(choice) == 1 and (choice[0] == self._alone or everywhere):
            return choice
        if len(choice) not in (1, now.total):
            raise InputError(
                f"{len(choice)} samples are allotted, but the call draws {now.total}; allot one entry a sample (images"
                " times prompts), or one for all"
            )
        every = choice if len(choice) > 1 else choice * now.total
        both = self.mask.branch != "conditional"
        pairs = zip(now.samples, now.conditional, strict=True)
        rows = tuple(every[sample] if conditional or both else self._alone for sample, conditional in pairs)
        return rows[:1] if len(set(rows)) == 1 else rows

    def _prepared(self, bin_: int, rows: tuple[int, ...], latents: Tensor) -> _Step | None:
        dtype = latents.dtype if latents.is_floating_point() else torch.float32
        key = (bin_, rows, latents.device, dtype)
        if key not in self._steps:
            variants = sorted(set(rows))
            assert self._hooks is not None
            layers = self._hooks.layers
            active = frozenset(name for name in layers if self._damped[name][variants, bin_].any())
            if len(rows) > 1:  # they are as large as the batch, so only the latest is kept
                self._steps.clear()
            factors, offsets = (
                None if table is None else _pick(table[:, bin_], rows).to(dtype)
                for table in self._table(latents.device)
            )
            assert factors is not None
            by_layer = {}
            for name in layers:
                place = self._places[name]
                offset = None if offsets is None else place.widened(offsets, -0.0)
                by_layer[name] = place.widened(factors, 1.0), offset
            self._steps[key] = _Step(active, by_layer)
        step = self._steps[key]
        return step if step.active else None

    def _table(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        if device not in self._tables:
            self._tables[device] = (
                self._factors.to(device),
                None if self._offsets is None else self._offsets.to(device),
            )
        return self._tables[device]

    def _damp_layer(self, name: str, a: Tensor) -> Tensor | None:
        step = self._step
        if step is None:
            return None
        if torch.compiler.is_compiling():
            # All hooked layers alike, so that one graph serves all timestep bins; where a bin damps nothing, times 1.
            factor, offset = step.rows[name]
            factor = factor.to(a.device, a.dtype)
            offset = None if offset is None else offset.to(a.device, a.dtype)
        elif name in step.active:
            factor, offset = step.at(name, a)
        else:
            return None
        if len(factor) not in (1, len(a)):
            raise InputError(
                f"layer {name!r} ran on {len(a)} rows of a batch of {len(factor)}; samples treated differently need "
                "the batch whole, so disable chunking over it"
            )
        return damp(a, factor, self._places[name].dim, offset)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        if not self.movable:
            raise InputError(
                "the model is deep-copied while suppress(...) damps it, and nothing would undo the copy; copy it "
                "outside the block, or use load_mask"
            )
        twin = copy.copy(self)
        memo[id(self)] = twin
        for name in ("module", "_open", "recogniser", "_handles", "_hooks"):
            setattr(twin, name, copy.deepcopy(getattr(self, name), memo))
        twin._tables, twin._steps, twin._step = {}, {}, None
        return twin


def is_damped(module: nn.Module) -> bool:
    """Whether hooks of a mask are on this denoiser."""
    return any(isinstance(getattr(hook, "__self__", None), Suppression) for hook in module._forward_pre_hooks.values())


def _pick(table: Tensor, rows: tuple[int, ...]) -> Tensor:
    """(V + 1, N) -> (1 or B, N)."""
    if len(rows) == 1:
        return table[rows[0] : rows[0] + 1]
    return table.index_select(0, torch.tensor(rows, device=table.device))
