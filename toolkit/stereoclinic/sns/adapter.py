"""Masks as adapters of a diffusers pipeline, in diffusers' own spelling.

    load_mask(pipe, "gender.safetensors", "gender", strength=0.8)
    load_mask(pipe, "owner/age-mask", "age")
    allot_masks(pipe, [{"gender": "female", "age": "old"}, {"gender": "male", "age": None}])     if they allocate
    pipe(["a photo of a doctor"] * 2)
    unload_mask(pipe)

Masks belong to the denoiser: they are kept in a plain attribute of it, which is no part of its state dict, and
pipelines that share a denoiser share its masks. Active masks act as their composition (see `compose`), through one hook
a layer.

- `copy.deepcopy` of the denoiser or of the pipeline gives one that is treated by itself: what is loaded into, or taken
  off, either is nothing to the other.
- `pipe.save_pretrained` writes the untreated weights, and no mask. Write the mask beside them
  (`mask.save_pretrained(folder)`), or fuse it and `save_fused`.
- How a pipeline calls its denoiser is learnt when it is given to `load_mask`, `set_masks`, `allot_masks` or
  `enable_masks`: a few passes of the denoiser, once a pipeline and scheduler. Call one of these with the pipeline that
  is about to run, where several share a denoiser.
- Pipelines that start from a picture are refused there; they are treated through a text-to-image pipeline of the same
  denoiser: `load_mask(AutoPipelineForText2Image.from_pipe(pipe), mask)`.
- A model is compiled after its masks are loaded. From then on masks can be allotted, disabled and unloaded; to load
  others or to change strengths, compile again.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stereoclinic.errors import InputError
from stereoclinic.pipelines.model import network_of
from stereoclinic.pipelines.recognise import Recogniser
from stereoclinic.sns.compat import FUSED, check_fits, check_open
from stereoclinic.sns.compose import compose
from stereoclinic.sns.damp import Allotment, Suppression
from stereoclinic.sns.factors import check_strength
from stereoclinic.sns.mask import NeuronMask

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
    """Load a mask and make it active, beside those that are.

    Args:
        pipe: A diffusers pipeline; or its denoiser, whose batches are then taken for conditional as a whole, and whose
            timesteps for the scheduler's.
        mask: The mask, its file, or a folder or hub repository (see `NeuronMask.from_pretrained`).
        name: What to call it here.
        strength: Scales the damping, from 0 (none) to 1 (as the mask says).
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
        mask = NeuronMask.from_pretrained(mask) if _is_folder_or_hub(mask) else NeuronMask.load(mask)
    check_fits(mask, network_of(pipe), force)
    changed = _Adapters(
        {**state.masks, name: mask},
        {**state.strengths, name: float(strength)},
        [*state.active, name],
        state.enabled,
        state.force or force,
    )
    _replace(pipe, changed)


def unload_mask(pipe: Any, name: str | None = None) -> None:
    """Take one mask off, or all of them; the model is then what it was, bit for bit.

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
    strengths = {other: strength for other, strength in state.strengths.items() if other != name}
    active = [other for other in state.active if other != name]
    _replace(pipe, _Adapters(masks, strengths, active, state.enabled, state.force))


def set_masks(pipe: Any, names: str | Sequence[str], strengths: float | Sequence[float] | None = None) -> None:
    """Make these of the loaded masks active, and no others. An allotment is forgotten.

    Args:
        pipe: The pipeline, or its denoiser.
        names: One name, or several.
        strengths: One for all, or one each; None keeps what each has.

    Raises:
        InputError: A name is not loaded or comes twice, a strength is out of range, or the masks do not compose.
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
    given = dict(zip(names, map(float, values), strict=True))
    _replace(pipe, _Adapters(state.masks, {**state.strengths, **given}, names, state.enabled, state.force))


def disable_masks(pipe: Any) -> None:
    """Run the model as if no mask were loaded, until `enable_masks`. Masks stay loaded, and can be changed.

    Raises:
        InputError: No mask is loaded.
    """
    state = _loaded(pipe)
    state.enabled = False
    if state.suppression is not None:
        state.suppression.pause()


def enable_masks(pipe: Any) -> None:
    """Undo `disable_masks`, and recognise the calls of this pipeline from now on.

    Raises:
        InputError: No mask is loaded.
    """
    state = _loaded(pipe)
    state.enabled = True
    if state.suppression is not None:
        _bind(state.suppression, pipe)
        state.suppression.resume()


def loaded_masks(pipe: Any) -> dict[str, NeuronMask]:
    """The loaded masks by name, in the order of loading."""
    state = _state(pipe)
    return {} if state is None else dict(state.masks)


def active_masks(pipe: Any) -> dict[str, float]:
    """The strengths of the masks that are active, by name; none while masks are disabled."""
    state = _state(pipe)
    return {} if state is None or not state.enabled else {name: state.strengths[name] for name in state.active}


def allot_masks(pipe: Any, samples: Iterable[Sample] | Sample) -> None:
    """Say what each image gets, in all calls until it is said anew or the active masks change.

    Args:
        pipe: The pipeline, or its denoiser.
        samples: One entry an image (prompts times images a prompt, in the pipeline's order), or one for all. An entry
            is a group's name, which all active masks that allocate must have; or a table from a mask's name to a group
            (to True, for a plain mask), or to None, which leaves the image alone as far as that mask goes; or None,
            which leaves it alone altogether. Plain masks that an entry does not name act; allocating ones must be
            named.

    Raises:
        InputError: No mask is active, or an entry names no mask or group that is.
    """
    if getattr(network_of(pipe), FUSED, None) is not None:
        raise InputError("a fused mask treats all images alike; unfuse it and load the mask, to allot groups")
    state = _loaded(pipe)
    if state.suppression is None:
        raise InputError("no mask is active; call set_masks(pipe, names) first")
    entries = [samples] if samples is None or isinstance(samples, str | bool | Mapping) else list(samples)
    if not entries:
        raise InputError("no image is allotted anything; give one entry an image, or one for all of them")
    keys = [_key(state, entry) for entry in entries]
    variants = list(dict.fromkeys(key for key in keys if any(group is not None for group in key)))
    _bind(state.suppression, pipe)
    if not variants:
        state.suppression.allot([None] * len(keys))
        return
    composed = [_variant(state, key) for key in variants]
    names = [str(i) for i in range(len(variants))]
    if len(composed) == 1:
        state.suppression.change(composed[0])
        state.suppression.allot([key in variants for key in keys])
        return
    mask, *_ = composed
    roots = None if mask.roots is None else torch.stack([part.roots for part in composed if part.roots is not None])
    factors = torch.stack([part.factors for part in composed])
    state.suppression.change(
        NeuronMask(mask.sites, mask.bin_edges, factors, roots, mask.branch, mask.metadata, tuple(names))
    )
    state.suppression.allot([names[variants.index(key)] if key in variants else None for key in keys])


def _key(state: _Adapters, entry: Sample) -> tuple[str | bool | None, ...]:
    """For each active mask: a group, True for a plain mask, or None to leave alone."""
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


def _variant(state: _Adapters, key: tuple[str | bool | None, ...]) -> NeuronMask:
    """The composition that one image gets; masks that leave it alone take part at strength 0."""
    masks, strengths = [], []
    for name, group in zip(state.active, key, strict=True):
        mask = state.masks[name]
        masks.append(mask.group(group if isinstance(group, str) else mask.groups[0]) if mask.allocates else mask)
        strengths.append(0.0 if group is None else state.strengths[name])
    return compose(masks, strengths, state.force)


def _envelope(mask: NeuronMask) -> NeuronMask:
    """A plain mask that damps whatever a mask may damp: it tells which sites need hooks."""
    if not mask.allocates:
        return mask
    roots = None if mask.roots is None else torch.zeros_like(mask.roots[0])
    return NeuronMask(mask.sites, mask.bin_edges, mask.factors.amin(0), roots, mask.branch, mask.metadata)


def _replace(pipe: Any, state: _Adapters) -> None:
    """Put hooks on for what is active, in place of those that are there; all or nothing."""
    check_open(pipe)
    suppression = None
    if state.active:
        allocates = any(state.masks[name].allocates for name in state.active)
        masks = [state.masks[name] for name in state.active]
        if allocates:
            compose([mask.group(mask.groups[0]) if mask.allocates else mask for mask in masks], force=state.force)
        strengths = [state.strengths[name] for name in state.active]
        reached = compose([_envelope(mask) for mask in masks], strengths, state.force)
        suppression = Suppression(pipe, reached, movable=True)
        if allocates:
            suppression.forget("; ".join(", ".join(mask.groups) for mask in masks if mask.allocates))
    before = _state(pipe)
    if before is not None and before.suppression is not None:
        before.suppression.detach()
        if suppression is not None and isinstance(pipe, nn.Module):
            suppression.recogniser = before.suppression.recogniser
    state.suppression = suppression
    if suppression is not None:
        suppression.attach()
        if not state.enabled:
            suppression.pause()
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


def _is_folder_or_hub(mask: str | Path) -> bool:
    path = Path(mask)
    return path.is_dir() or path.suffix.lower() not in (".pt", ".safetensors")
