"""Applying a mask while a model runs: forward-pre-hooks that leave no trace.

    unet(x, t, c):   note t, pick the bin
      site:          a_j  <-  r_j + s_j (a_j - r_j),     s_j = 1 - strength (1 - factor_j)

Several masks compose by nesting contexts; with roots at zero their factors multiply. Hooks reach only what
torch calls through `Module.__call__`, so a model that is compiled already is refused.
"""

from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stereoclinic.errors import InputError
from stereoclinic.sns.mask import NeuronMask, check_fits


def suppress(
    target: Any, mask: NeuronMask, strength: float = 1.0, guided: bool | None = None, force: bool = False
) -> "Suppression":
    """Damp the mask's neurons within a `with` block.

    Args:
        target: A diffusers pipeline, or the denoiser itself.
        mask: What to damp.
        strength: Scales the damping, 1 - factor, from 0 (none) to 1 (as the mask says).
        guided: Whether a batch holds an unconditional half, first, and a conditional one; matters for masks
            of the conditional branch. None asks a pipeline at every call (`do_classifier_free_guidance`), and
            takes a bare denoiser's batch for conditional as a whole.
        force: Accept a model whose weights differ from those the mask was made for.

    Returns:
        A context manager; the model is untouched before and after it, also when an exception leaves it.

    Raises:
        InputError: strength is out of range; on entering, the mask does not fit the model.
    """
    if not 0 <= strength <= 1:
        raise InputError(f"strength {strength:g}; expected 0 (no damping) to 1 (as the mask says)")
    return Suppression(target, mask, strength, guided, force)


def damp(a: Tensor, factor: Tensor, kind: str, offset: Tensor | None = None) -> Tensor:
    """``s a + (1 - s) r``, which is ``r + s (a - r)``.

    Args:
        a: (B, ..., C) at a linear site, (B, C, ...) at a convolution.
        factor: (B or 1, C), s.
        kind: The site's kind, "ff", "attention" or "conv".
        offset: (B or 1, C), (1 - s) r; None for a root at zero.

    Returns:
        Of a's shape.
    """
    ones = [1] * (a.ndim - 2)
    shape = (-1, a.shape[1], *ones) if kind == "conv" else (-1, *ones, a.shape[-1])
    damped = a * factor.view(shape)
    return damped if offset is None else damped + offset.view(shape)


class Suppression:
    """The hooks of one mask on one model; made by `suppress`."""

    def __init__(self, target: Any, mask: NeuronMask, strength: float, guided: bool | None, force: bool) -> None:
        module = target if isinstance(target, nn.Module) else getattr(target, "unet", None)
        if not isinstance(module, nn.Module):
            raise InputError(
                f"cannot damp a {type(target).__name__}; expected a diffusers pipeline with a UNet, or the UNet itself"
            )
        self.target, self.module, self.mask = target, module, mask
        self.strength, self.guided, self.force = strength, guided, force
        self._bin: int | None = None
        self._handles: list[RemovableHandle] = []
        self._hooked: dict[str, RemovableHandle] = {}
        self.assign(mask.factors[None], None if mask.roots is None else mask.roots[None])

    def assign(self, factors: Tensor, roots: Tensor | None = None) -> None:
        """Replace the factors by each sample's own, as allocation does.

        Args:
            factors: (B or 1, T, N); B samples are those of the conditional half of a guided batch.
            roots: (B or 1, T, N), or None for zero.

        Raises:
            InputError: They are not of the mask's bins and neurons, or factors leave [0, 1].
        """
        for name, value in (("factors", factors), ("roots", roots)):
            if value is not None and (value.ndim != 3 or value.shape[1:] != self.mask.factors.shape):
                raise InputError(
                    f"{name} of shape {tuple(value.shape)}; expected samples x {tuple(self.mask.factors.shape)}"
                )
        if not ((factors >= 0) & (factors <= 1)).all():
            raise InputError("factors leave the range 0 (silenced) to 1 (untouched)")
        effective = 1 - self.strength * (1 - factors.float())  # (B, T, N)
        self._factors = effective
        self._offsets = None if roots is None else (1 - effective) * roots.float()
        #: Site name -> for each bin, whether anything is damped there.
        self._active = {site.name: (effective[..., span] < 1).any(2).any(0) for site, span in self.mask.spans()}
        self._cast: dict[tuple[str, int, torch.device, torch.dtype], tuple[Tensor, Tensor | None]] = {}
        if self._handles:
            self._hook_sites()

    def __enter__(self) -> Self:
        if self._handles:
            raise RuntimeError("this suppression is active already; make another with suppress(...)")
        for name, module in self.module.named_modules():
            if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
                raise InputError(
                    f"{name or type(module).__name__} is compiled, and would ignore the mask; apply the "
                    "mask before "
                    "compiling, or fuse it"
                )
        check_fits(self.mask, self.module, self.force)
        self._handles.append(self.module.register_forward_pre_hook(self._note_timestep, with_kwargs=True))
        self._hook_sites()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in (*self._handles, *self._hooked.values()):
            handle.remove()
        self._handles.clear()
        self._hooked.clear()
        self._cast.clear()
        self._bin = None

    def _hook_sites(self) -> None:
        modules = dict(self.module.named_modules())
        for site, span in self.mask.spans():
            if self._active[site.name].any() and site.name not in self._hooked:
                hook = partial(self._damp_site, site.name, site.kind, span)
                self._hooked[site.name] = modules[site.name].register_forward_pre_hook(hook)

    def _note_timestep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._bin = None
        timestep = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        if timestep is None:
            raise InputError(f"{type(module).__name__} was called without a timestep, which a mask needs")
        values = torch.as_tensor(timestep).flatten()
        if len(values) == 0 or (values != values[0]).any():
            raise InputError(
                f"timesteps {values.tolist()[:4]} differ within a batch; a mask needs one timestep for the whole batch"
            )
        self._bin = self.mask.bin_of(values[0].item())

    def _damp_site(
        self, name: str, kind: str, span: slice, module: nn.Module, args: tuple[Any, ...]
    ) -> tuple[Any, ...] | None:
        if self._bin is None or not self._active[name][self._bin]:
            return None
        a, *rest = args
        factor, offset = self._at(name, span, self._bin, a)
        guided = self._is_guided()
        if guided and len(a) % 2:
            raise InputError(f"a guided batch of {len(a)} has no two halves; pass guided=False if there is no guidance")
        conditional = guided and self.mask.branch == "conditional"
        samples = len(a) // 2 if guided else len(a)
        if len(factor) not in (1, samples):
            raise InputError(f"factors of {len(factor)} samples for a batch of {samples}; assign one row a sample")
        if conditional:  # the unconditional half comes first, and passes through as it is
            damped = torch.cat([a[:samples], damp(a[samples:], factor, kind, offset)])
        elif guided and len(factor) > 1:
            both = torch.cat([factor, factor])
            damped = damp(a, both, kind, None if offset is None else torch.cat([offset, offset]))
        else:
            damped = damp(a, factor, kind, offset)
        return (damped, *rest)

    def _at(self, name: str, span: slice, bin_: int, a: Tensor) -> tuple[Tensor, Tensor | None]:
        """This site's factor and offset in this bin, (B or 1, C), where and as the activation is."""
        key = (name, bin_, a.device, a.dtype)
        if key not in self._cast:
            factor = self._factors[:, bin_, span].to(a.device, a.dtype)
            offset = None if self._offsets is None else self._offsets[:, bin_, span].to(a.device, a.dtype)
            self._cast[key] = (factor, offset)
        return self._cast[key]

    def _is_guided(self) -> bool:
        if self.guided is not None:
            return self.guided
        if self.target is self.module:
            return False
        if self.mask.branch == "both" and len(self._factors) == 1:
            return False  # all of the batch is damped alike, so nobody need be asked
        try:
            return bool(self.target.do_classifier_free_guidance)
        except AttributeError as error:
            raise InputError(
                f"this {type(self.target).__name__} does not say whether it is guiding; pass guided=True "
                "or guided=False"
            ) from error
