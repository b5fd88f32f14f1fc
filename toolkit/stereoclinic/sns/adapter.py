"""Masks as adapters of a diffusers pipeline, with functions named as those of diffusers.

    load_mask(pipe, "gender.safetensors", "gender", strength=0.8)
    load_mask(pipe, "owner/age-mask", "age")
    allot_masks(pipe, [{"gender": "female", "age": "old"}, {"gender": "male", "age": None}])     if they allocate
    pipe(["a photo of a doctor"] * 2)
    unload_mask(pipe)

Masks belong to the denoiser. They are kept in a plain attribute of it, outside its state dict, and pipelines that share
a denoiser share its masks. Active masks act as their composition (see `compose`), through one hook a layer.

- `copy.deepcopy` of the denoiser or the pipeline gives an independent copy with the same masks.
- `pipe.save_pretrained` writes the untreated weights, and no mask. Save the mask next to them
  (`mask.save_pretrained(folder)`), or fuse it and call `save_fused`.
- `load_mask`, `set_masks`, `allot_masks` and `enable_masks` learn how the pipeline they are given calls its denoiser: a
  few passes of the denoiser, once a pipeline and scheduler. If several pipelines share a denoiser, call one of these
  with the pipeline that is about to run.
- Pipelines that start from an image are refused there. Use a text-to-image pipeline of the same denoiser:
  `load_mask(AutoPipelineForText2Image.from_pipe(pipe), mask)`.
- Compile a model after loading its masks. Then masks can be allotted, disabled and unloaded; to load others or to
  change strengths, compile again.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stereoclinic.errors import InputError
from stereoclinic.io.tensors import ENDINGS
from stereoclinic.pipelines.model import network_of
from stereoclinic.pipelines.recognise import Recogniser
from stereoclinic.sns.compat import FUSED, check_fits, check_open
from stereoclinic.sns.compose import compose
from stereoclinic.sns.damp import Allotment, Suppression
from stereoclinic.sns.mask import NeuronMask, check_strength

MASKS = "_stereoclinic_masks"

#: What one sample gets: an `Allotment` for all active masks, or one for each by the mask's name.
Sample = Allotment | Mapping[str, Allotment]


@dataclass
class _Adapters:
    """What a denoiser carries."""

    masks: dict[str, NeuronMask] = field(default_factory=dict)
    strengths: dict[str, float] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    enabled: bool = True
    force: bool = False
    suppression: Suppression | None = None


def load_mask(
    pipe: Any, mask: NeuronMask | str | Path, name: str = "default", strength: float = 1.0, force: bool = False
) -> None:
    """Load a mask and make it active, together with those that are.

    Args:
        pipe: A diffusers pipeline; or its denoiser, whose batches are then taken as conditional, and whose timesteps
            as the scheduler's.
        mask: The mask, its file, or a folder or hub repository (see `NeuronMask.from_pretrained`).
        name: The name it gets in this pipeline.
        strength: Scales the damping, from 0 (none) to 1 (as in the mask).
        force: Accept a model whose weights differ from those the mask was made for.

    Raises:
        InputError: A mask of this name is loaded, strength is out of range, the mask cannot be read, does not fit the
            model or the active masks, or the model is compiled or has a mask fused in.
    """
    state = _state(pipe) or _Adapters()
    check_strength(strength)
    if name in state.masks:
        raise InputError(f"a mask named {name!r} is loaded already; unload it first, or choose another name")
    if not isinstance(name, str) or not name:
        raise InputError(f"mask name {name!r}; expected a text such as 'gender'")
    check_open(pipe)
    if not isinstance(mask, NeuronMask):
        is_file = Path(mask).suffix.lower() in ENDINGS and not Path(mask).is_dir()
        mask = NeuronMask.load(mask) if is_file else NeuronMask.from_pretrained(mask)
    check_fits(mask, network_of(pipe), force)
    changed = replace(
        state,
        masks={**state.masks, name: mask},
        strengths={**state.strengths, name: float(strength)},
        active=[*state.active, name],
        force=state.force or force,
    )
    _install(pipe, changed)


def unload_mask(pipe: Any, name: str | None = None) -> None:
    """Unload one mask, or all of them; without masks the model is what it was, bit for bit.

    Raises:
        InputError: There is no such mask, or one of several is to be unloaded from a compiled model.
    """
    state = _loaded(pipe)
    if name is not None:
        _check_known(state, [name])
    if name is None or list(state.masks) == [name]:
        if state.suppression is not None:
            state.suppression.detach()
        delattr(network_of(pipe), MASKS)
        return
    masks = {other: mask for other, mask in state.masks.items() if other != name}
    strengths = {other: state.strengths[other] for other in masks}
    active = [other for other in state.active if other != name]
    _install(pipe, replace(state, masks=masks, strengths=strengths, active=active))


def set_masks(pipe: Any, names: str | Sequence[str], strengths: float | Sequence[float] | None = None) -> None:
    """Make these of the loaded masks active, and no others. Allot samples again afterwards.

    Args:
        pipe: The pipeline, or its denoiser.
        names: One name, or several.
        strengths: One for all, or one each; None keeps the current ones.

    Raises:
        InputError: A name is not loaded or is repeated, a strength is out of range, or the masks do not compose.
    """
    state = _loaded(pipe)
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise InputError("no mask is named; name one or more, or call disable_masks(pipe)")
    _check_known(state, names)
    if len(set(names)) < len(names):
        raise InputError(f"a mask is named twice in {', '.join(names)}; name each once")
    if strengths is None:
        values = [state.strengths[name] for name in names]
    else:
        values = [strengths] * len(names) if isinstance(strengths, int | float) else list(strengths)
    if len(values) != len(names):
        raise InputError(f"{len(values)} strengths for {len(names)} masks; expected one for each, or one for all")
    for value in values:
        check_strength(value)
    changed = dict(zip(names, map(float, values), strict=True))
    _install(pipe, replace(state, strengths={**state.strengths, **changed}, active=names))


def disable_masks(pipe: Any) -> None:
    """Run the model as if no mask were loaded, until `enable_masks`; InputError if none is.

    Masks stay loaded, and can be changed.
    """
    _switch(pipe, False)


def enable_masks(pipe: Any) -> None:
    """Undo `disable_masks`, and recognise the calls of this pipeline from now on; InputError if no mask is loaded."""
    _switch(pipe, True)


def _switch(pipe: Any, enabled: bool) -> None:
    state = _loaded(pipe)
    state.enabled = enabled
    if state.suppression is not None:
        state.suppression.paused = not enabled
        if enabled:
            _bind(state.suppression, pipe)


def loaded_masks(pipe: Any) -> dict[str, NeuronMask]:
    """The loaded masks by name, in the order of loading."""
    state = _state(pipe)
    return {} if state is None else dict(state.masks)


def active_masks(pipe: Any) -> dict[str, float]:
    """The strengths of the masks that are active, by name; none while masks are disabled."""
    state = _state(pipe)
    return {} if state is None or not state.enabled else {name: state.strengths[name] for name in state.active}


def allot_masks(pipe: Any, samples: Iterable[Sample] | Sample) -> None:
    """Say what each image gets, in all calls until you allot again or the active masks change.

    An entry is one of:

    - a group's name, which all active allocating masks must have;
    - a table from a mask's name to a group, to True (a plain mask), or to None (this mask does not touch the image);
      plain masks that are not named act, allocating ones must be named;
    - None: the image is untreated.

    Args:
        pipe: The pipeline, or its denoiser.
        samples: One entry for each image (prompts times images a prompt, in the pipeline's order), or one for all.

    Raises:
        InputError: No mask is active, or an entry names a mask or group that is not.
    """
    if getattr(network_of(pipe), FUSED, None) is not None:
        raise InputError("a fused mask treats all images alike; unfuse it and load the mask, to allot groups")
    state = _loaded(pipe)
    if state.suppression is None:
        raise InputError("no mask is active; call set_masks(pipe, names) first")
    entries = [samples] if samples is None or isinstance(samples, str | bool | Mapping) else list(samples)
    if not entries:
        raise InputError("no image is allotted anything; give one entry an image, or one for all of them")
    choices = [_choices(state, entry) for entry in entries]
    variants = list(dict.fromkeys(choice for choice in choices if any(group is not None for group in choice)))
    _bind(state.suppression, pipe)
    composed = [_composition(state, variant) for variant in variants]
    state.suppression.change(composed, [variants.index(choice) if choice in variants else None for choice in choices])


def _choices(state: _Adapters, entry: Sample) -> tuple[str | bool | None, ...]:
    """For each active mask: a group, True for a plain mask, or None where it does not touch the image."""
    if entry is None or entry is False:
        return (None,) * len(state.active)
    if isinstance(entry, Mapping):
        strange = [name for name in entry if name not in state.active]
        if strange:
            raise InputError(f"mask {strange[0]!r} is not active; those are {', '.join(state.active)}")
        return tuple(_choice(state, name, entry.get(name, True)) for name in state.active)
    if isinstance(entry, str) and not any(entry in state.masks[name].groups for name in state.active):
        known = dict.fromkeys(group for name in state.active for group in state.masks[name].groups)
        hint = f"choose from {', '.join(known)}" if known else "the active masks have none; expected True or None"
        raise InputError(f"group {entry!r} is not known; {hint}")
    return tuple(_choice(state, name, entry if state.masks[name].allocates else True) for name in state.active)


def _choice(state: _Adapters, name: str, value: Allotment) -> str | bool | None:
    groups = state.masks[name].groups
    if value is None or value is False:
        return None
    if (not groups and value is True) or (isinstance(value, str) and value in groups):
        return value
    expected = f"one of {', '.join(groups)}, or None" if groups else "True or None"
    given = "nothing" if value is True else repr(value)
    raise InputError(f"mask {name!r} is allotted {given}; expected {expected}, as in {{{name!r}: ...}}")


def _composition(state: _Adapters, choices: tuple[str | bool | None, ...]) -> NeuronMask:
    """The plain mask that one image gets; masks that do not touch it take part at strength 0."""
    masks, strengths = [], []
    for name, group in zip(state.active, choices, strict=True):
        mask = state.masks[name]
        masks.append(mask.group(group if isinstance(group, str) else mask.groups[0]) if mask.allocates else mask)
        strengths.append(0.0 if group is None else state.strengths[name])
    return compose(masks, strengths, state.force)


def _envelope(mask: NeuronMask) -> NeuronMask:
    """A plain mask that damps wherever a mask may damp, which says what sites need hooks."""
    if not mask.allocates:
        return mask
    roots = None if mask.roots is None else torch.zeros_like(mask.roots[0])
    return replace(mask, factors=mask.factors.amin(0), roots=roots, groups=())


def _install(pipe: Any, state: _Adapters) -> None:
    """Put on the hooks of the active masks in place of those that are there; all or nothing."""
    check_open(pipe)
    before = _state(pipe)
    suppression = None
    if state.active:
        masks = [state.masks[name] for name in state.active]
        strengths = [state.strengths[name] for name in state.active]
        mask = compose([_envelope(mask) for mask in masks], strengths, state.force)
        suppression = Suppression(pipe, mask, movable=True)
        suppression.paused = not state.enabled
        allocating = [", ".join(mask.groups) for mask in masks if mask.allocates]
        if allocating:
            suppression.forget("; ".join(allocating))
    if before is not None and before.suppression is not None:
        before.suppression.detach()
        if suppression is not None and isinstance(pipe, nn.Module):
            suppression.recogniser = before.suppression.recogniser
    state.suppression = suppression
    if suppression is not None:
        suppression.attach()
    setattr(network_of(pipe), MASKS, state)


def _bind(suppression: Suppression, pipe: Any) -> None:
    """Recognise the calls of this pipeline from now on; a bare denoiser leaves it to the one before."""
    if not isinstance(pipe, nn.Module):
        suppression.recogniser = Recogniser(pipe)


def _state(pipe: Any) -> _Adapters | None:
    return getattr(network_of(pipe), MASKS, None)


def _loaded(pipe: Any) -> _Adapters:
    state = _state(pipe)
    if state is None:
        raise InputError("no mask is loaded; load one with load_mask(pipe, mask)")
    return state


def _check_known(state: _Adapters, names: Sequence[str]) -> None:
    for name in names:
        if name not in state.masks:
            raise InputError(f"mask {name!r} is not loaded; those are {', '.join(state.masks)}")
