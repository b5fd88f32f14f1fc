"""Applies a mask while a model runs, through hooks on its layers.

    denoiser(x, t, c):   find the timestep bin, and what each row of the batch gets
      site:              a_j  <-  r_j + s_j (a_j - r_j),     s_j = 1 - strength (1 - factor_j)

Each row of a batch gets one *variant*: the mask, one group of an allocating mask, or nothing. "Nothing" is a factor of
1 and an offset of -0. Adding -0 changes no number, so an untreated sample is the same, bit for bit, as in an untreated
batch.

Nested contexts combine masks; with roots at zero their factors multiply (see `compose` for other roots). A model that
is compiled already is refused, since hooks would not run. One that is compiled while it is damped follows the mask: the
compiled code reads what to do from plain data.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from stereoclinic.errors import InputError
from stereoclinic.pipelines.hooks import Hooks
from stereoclinic.pipelines.intercept import Pass
from stereoclinic.pipelines.model import network_of, outer_network
from stereoclinic.pipelines.recognise import Recogniser
from stereoclinic.pipelines.sites import Site, by_layer, channels_of, layer_at
from stereoclinic.sns.compat import check_fits, check_open
from stereoclinic.sns.mask import NeuronMask, check_strength

#: What one sample gets: a group's name, True (the mask), or None or False (nothing).
Allotment = str | bool | None
#: The factor and the offset that change nothing.
UNCHANGED = (1.0, -0.0)


def damp(a: Tensor, factor: Tensor, dim: int, offset: Tensor | None = None) -> Tensor:
    """``s a + (1 - s) r``, which is ``r + s (a - r)``.

    Args:
        a: (B, ..., C) at a linear site, (B, C, ...) at a convolution.
        factor: (B or 1, C), s.
        dim: The dimension of the channels, -1 or 1.
        offset: (B or 1, C), (1 - s) r; None for a root at zero.
    """
    ones = [1] * (a.ndim - 2)
    shape = (-1, a.shape[1], *ones) if dim == 1 else (-1, *ones, a.shape[-1])
    factor = factor.view(shape)
    if offset is None:
        return a * factor
    offset = offset.view(shape)
    if dim == 1 and a.is_cpu:
        # addcmul is two to five times slower there, as its operands do not vary along the inner dimension.
        return (a * factor).add_(offset)
    return torch.addcmul(offset, a, factor)


def effective(mask: NeuronMask, strength: float) -> list[Tensor]:
    """Factors of a mask at a strength, ``s = 1 - strength (1 - factor)``, and with roots offsets, ``(1 - s) r``.

    Returns:
        One or two tables of the mask's shape, in float32. Where a factor is 1 the offset is -0, so that
        ``s a + offset`` is a, bit for bit.

    Raises:
        InputError: strength is out of range.
    """
    check_strength(strength)
    factors = (1 - strength * (1 - mask.factors.double())).float()
    if mask.roots is None:
        return [factors]
    return [factors, torch.where(factors == 1, -0.0, (1 - factors) * mask.roots)]


def by_channel(tables: Sequence[Tensor], sites: Sequence[tuple[Site, slice]], network: nn.Module) -> list[Tensor]:
    """One or two tables as of `effective`, (rows, N), for the channels of one layer, (rows, C)."""
    layer: Any = layer_at(network, sites[0][0].layer)
    width = channels_of(layer)
    if sites[0][0].width == width:
        return [table[:, sites[0][1]] for table in tables]
    whole = [table.new_full((len(table), width or 0), UNCHANGED[i]) for i, table in enumerate(tables)]
    for site, span in sites:
        for channels, table in zip(whole, tables, strict=True):
            channels[:, site.start : site.start + site.width] = table[:, span]
    return whole


def suppress(
    target: Any, mask: NeuronMask, strength: float = 1.0, guided: bool | None = None, force: bool = False
) -> "Suppression":
    """Damp the mask's neurons within a `with` block.

    Args:
        target: A diffusers pipeline, a `Model`, or the denoiser itself.
        mask: What to damp. For an allocating one, call `Suppression.allot` with every sample's group.
        strength: Scales the damping, 1 - factor, from 0 (none) to 1 (as in the mask).
        guided: Whether a batch holds an unconditional half, first, and a conditional one; matters where samples or
            branches differ. None detects it for a pipeline, and takes a bare denoiser's batch as conditional.
        force: Accept a model whose weights differ from those the mask was made for.

    Returns:
        A context manager; the model is unchanged before and after it, also after an exception. Within it the model
        cannot be deep-copied, since nothing would take the hooks off the copy (`load_mask` allows copies).

    Raises:
        InputError: strength is out of range; on entering, the mask does not fit the model, or the model is compiled or
            has a mask fused in.
    """
    return Suppression(target, mask, strength, guided, force)


@dataclass
class _PassDamping:
    """What the layers apply during one pass: factors, and offsets if there are roots, (1 or B, C) each."""

    active: frozenset[str]  # the layers where a row is damped
    tables: dict[str, list[Tensor]]  # by layer, for the usual device and dtype
    casts: dict[tuple[str, torch.device, torch.dtype], list[Tensor]] = field(default_factory=dict)

    def at(self, name: str, a: Tensor) -> list[Tensor]:
        """A layer's tables, on the device and in the dtype of its input."""
        tables = self.tables[name]
        if tables[0].dtype == a.dtype and tables[0].device == a.device:
            return tables
        key = (name, a.device, a.dtype)  # autocast, or a model that is spread over devices
        if key not in self.casts:
            self.casts[key] = [table.to(a.device, a.dtype) for table in tables]
        return self.casts[key]


class Suppression(Hooks):
    """The hooks of one mask on one model; made by `suppress`, whose arguments it takes.

    It is `movable` if the denoiser itself holds it, so that a deep copy of the denoiser gets its own. While it is
    `paused`, the hooks stay on and change nothing.
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
        super().__init__(network_of(target), [], self._damp_input)
        self._outer = outer_network(target)
        self.recogniser = Recogniser(target, guided)
        self.strength, self.force, self.movable, self.paused = strength, force, movable, False
        self._now: _PassDamping | None = None
        self._lay_out(mask, [mask.group(name) for name in mask.groups] or [mask])
        self.layers = [name for name, variants in self._damped.items() if variants.any()]
        self._choice: tuple[int, ...] | None = None if mask.allocates else (0,)
        self._groups = ", ".join(mask.groups)

    def _lay_out(self, mask: NeuronMask, variants: Sequence[NeuronMask]) -> None:
        """Tables with a row for each variant, a plain mask; the last row damps nothing."""
        self.mask, self._nothing = mask, len(variants)
        tables = zip(*(effective(variant, self.strength) for variant in variants), strict=True)
        # (V + 1, T, N) each
        self._tables = [torch.stack([*rows, torch.full_like(rows[0], UNCHANGED[i])]) for i, rows in enumerate(tables)]
        self._sites = by_layer(mask.sites)
        #: Layer -> (V + 1, T), whether anything is damped there.
        self._damped = {
            name: torch.stack([(self._tables[0][..., span] < 1).any(2) for _, span in sites]).any(0)
            for name, sites in self._sites.items()
        }
        self._clear()

    def _clear(self) -> None:
        """Drop what was prepared for passes."""
        self._on_device: dict[torch.device, list[Tensor]] = {}
        self._prepared: dict[tuple[Any, ...], _PassDamping] = {}
        self._now = None

    def allot(self, samples: Iterable[Allotment] | Allotment) -> None:
        """Say what each sample gets, from the next forward pass on.

        Args:
            samples: One entry for each sample (those of the conditional half, if the batch is guided; with several
                images a prompt, each image's), or one for the whole batch. For an allocating mask a group's name, for
                a plain one True; None or False leaves the sample untreated.

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
        """Refuse to run until samples are allotted to these groups."""
        self._choice, self._groups = None, groups

    def change(self, variants: Sequence[NeuronMask], samples: Sequence[int | None]) -> None:
        """Damp each sample by one of other plain masks from now on, or by none; they damp no other sites."""
        if variants:
            self._lay_out(variants[0], variants)
        self._choice = tuple(self._nothing if variant is None else variant for variant in samples)

    def _variant(self, entry: Allotment) -> int:
        if entry is None or entry is False:
            return self._nothing
        if not self.mask.allocates:
            if entry is True:
                return 0
            raise InputError(f"sample allotted to {entry!r}, but this mask has no groups; expected True, False or None")
        if not isinstance(entry, str) or entry not in self.mask.groups:
            raise InputError(f"group {entry!r} is not known; choose from {', '.join(self.mask.groups)}, or None")
        return self.mask.groups.index(entry)

    def __enter__(self) -> Self:
        if self.attached:
            raise RuntimeError("this suppression is active already; make another with suppress(...)")
        check_open(self._outer)
        check_fits(self.mask, self.network, self.force)
        return super().__enter__()

    def detach(self) -> None:
        super().detach()
        self._clear()  # code that was compiled meanwhile still calls the hooks: they find nothing to do

    # Never traced: the bin depends on the timestep's value, and each would be compiled anew.
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's own has no annotations
    def begin(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Prepare what the layers apply during this pass."""
        self._now = None
        if self.paused or not self.attached:
            return
        self.follow()
        now = self.recogniser.now(network, args, kwargs)
        if now is None:
            return
        self.rows = len(now.samples)
        bin_, variants = self.mask.bin_of(now.timestep), self._variants(now)
        if bin_ is not None and variants != (self._nothing,):
            latents: Any = args[0] if args else next(iter(kwargs.values()))
            while not isinstance(latents, Tensor):  # a list of rows, or of lists
                latents = latents[0]
            self._now = self._prepare(bin_, variants, latents)

    def _variants(self, now: Pass) -> tuple[int, ...]:
        """The variant of each row of a batch, or one for all of them."""
        choice = self._choice
        if choice is None:
            raise InputError(
                f"the mask allocates images to {self._groups}, and nothing was allotted yet; call allot([...]) on what "
                "suppress(...) returned, or allot_masks(pipe, [...])"
            )
        both = self.mask.branch != "conditional"
        if len(choice) == 1 and (choice[0] == self._nothing or both or all(now.conditional)):
            return choice
        if len(choice) not in (1, now.total):
            raise InputError(
                f"{len(choice)} samples are allotted, but the call draws {now.total}; allot one entry a sample (images"
                " times prompts), or one for all"
            )
        by_sample = choice if len(choice) > 1 else choice * now.total
        pairs = zip(now.samples, now.conditional, strict=True)
        rows = tuple(by_sample[sample] if conditional or both else self._nothing for sample, conditional in pairs)
        return rows[:1] if len(set(rows)) == 1 else rows

    def _prepare(self, bin_: int, variants: tuple[int, ...], latents: Tensor) -> _PassDamping | None:
        """The tables of all layers for a bin and these rows; None where nothing is damped."""
        device = latents.device
        dtype = latents.dtype if latents.is_floating_point() else torch.float32
        key = (bin_, variants, device, dtype)
        if key not in self._prepared:
            active = frozenset(name for name in self.layers if self._damped[name][sorted(set(variants)), bin_].any())
            if len(variants) > 1:  # they are as large as the batch, so only the latest is kept
                self._prepared.clear()
            if device not in self._on_device:
                self._on_device[device] = [table.to(device) for table in self._tables]
            chosen = [_pick(table[:, bin_], variants).to(dtype) for table in self._on_device[device]]
            tables = {name: by_channel(chosen, self._sites[name], self.network) for name in self.layers}
            self._prepared[key] = _PassDamping(active, tables)
        found = self._prepared[key]
        return found if found.active else None

    def _damp_input(self, name: str, a: Tensor) -> Tensor | None:
        now = self._now
        if now is None:
            return None
        if torch.compiler.is_compiling():
            # All hooked layers, so that one graph serves all timestep bins; where a bin damps nothing, times 1.
            factor, *offset = [table.to(a.device, a.dtype) for table in now.tables[name]]
        elif name in now.active:
            factor, *offset = now.at(name, a)
        else:
            return None
        if len(factor) not in (1, len(a)):
            raise InputError(
                f"layer {name!r} ran on {len(a)} rows of a batch of {len(factor)}; samples treated differently need "
                "the batch whole, so disable chunking over it"
            )
        return damp(a, factor, self._sites[name][0][0].dim, *offset)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        if not self.movable:
            raise InputError(
                "the model is deep-copied while suppress(...) damps it, and nothing would undo the copy; copy it "
                "outside the block, or use load_mask"
            )
        twin = copy.copy(self)
        memo[id(self)] = twin
        for name in ("network", "recogniser", "act", "_outer", "_handle", "_places"):
            setattr(twin, name, copy.deepcopy(getattr(self, name), memo))
        twin._clear()
        return twin


def is_damped(network: nn.Module) -> bool:
    """Whether hooks of a mask are on this denoiser."""
    return any(isinstance(getattr(hook, "__self__", None), Suppression) for hook in network._forward_pre_hooks.values())


def _pick(table: Tensor, variants: tuple[int, ...]) -> Tensor:
    """(V + 1, N) -> (1 or B, N)."""
    if len(variants) == 1:
        return table[variants[0] : variants[0] + 1]
    return table.index_select(0, torch.tensor(variants, device=table.device))
