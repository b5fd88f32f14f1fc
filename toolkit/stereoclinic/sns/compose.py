"""Combines several masks into one, such as gender with age.

    s = prod_i s_i,      r = sum_i w_i r_i / sum_i w_i,      w_i = -log s_i

This is what the masks do if all pull at once: mask i moves a neuron by da = -w_i (a - r_i) dt, and at t = 1 it alone
gives r_i + s_i (a - r_i). So a neuron's root is the mean of its masks' roots, weighted by how hard each pulls (w_i is
about 1 - s_i for light damping). A mask that silences the neuron, s_i = 0, pulls without bound: its root holds; if
several silence it, the mean of theirs.

- The order of the masks changes nothing, bit for bit, except the order of sites and groups.
- Grouping changes only rounding: compose([compose([a, b]), c]) does the same as compose([a, b, c]), unless two or more
  masks silence one neuron at different roots, whose mean is then taken in another order.
- If the roots of a neuron agree, as they do at zero, nested `suppress` contexts do the same. If they differ, nesting
  depends on the order.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.io.reading import MOST_BINS
from stereoclinic.pipelines.sites import Site
from stereoclinic.sns.allocate import JOINT
from stereoclinic.sns.mask import NeuronMask, check_strength

#: Most factors of a composition, with those of each mask spread over all its sites and bins: `ROOM` (a gigabyte, in
#: double precision and with roots), or `GROWTH` times the masks' own if that is more.
ROOM, GROWTH = 2**26, 16
DIGESTS = {"unet_shapes": "shapes", "unet_weights": "weights"}


def compose(masks: Sequence[NeuronMask], strengths: Sequence[float] | None = None, force: bool = False) -> NeuronMask:
    """One mask that does what several do together.

    It has all their sites, and bins refined to all their edges. Allocating masks of different groups allocate to every
    combination, named "female+old", in the order of the masks; those of the same groups share one allotment; plain
    masks act on every group.

    Args:
        masks: One or more, of the same branch and for the same model.
        strengths: One for each mask; None for 1.
        force: Compose masks that were made for different weights of the same shapes.

    Returns:
        A plain mask, or an allocating one if any of the masks is. Its metadata holds what all of them agree on, and
        under "selection" the strengths and the metadata of each.

    Raises:
        InputError: The masks do not fit together, or a strength is out of range.
    """
    masks = list(masks)
    if not masks:
        raise InputError("no masks to compose; give one or more")
    strengths = [1.0] * len(masks) if strengths is None else list(strengths)
    if len(strengths) != len(masks):
        raise InputError(f"{len(strengths)} strengths for {len(masks)} masks; expected one for each")
    for strength in strengths:
        check_strength(strength)
    _check_alike(masks, force)
    axes = _axes(masks)
    sites = _sites(masks)
    edges = torch.tensor(sorted({t for mask in masks for t in mask.bin_edges.tolist()}, reverse=True)).double()
    _check_room(masks, axes, sites, edges)
    laid_out = [_lay_out(mask, strength, sites, edges) for mask, strength in zip(masks, strengths, strict=True)]
    combinations = list(itertools.product(*axes))
    groups = tuple(JOINT.join(names) for names in combinations) if axes else ()

    planes = []
    for names in combinations:  # a single, empty one without allocating masks
        chosen = [next((mask.groups.index(name) for name in names if name in mask.groups), 0) for mask in masks]
        parts = [(s[k], r[k]) for (s, r), k in zip(laid_out, chosen, strict=True)]
        planes.append(_together(*(torch.stack(tables) for tables in zip(*parts, strict=True))))
    factors, roots = (torch.stack(tables) if axes else tables[0] for tables in zip(*planes, strict=True))
    rooted = any(mask.roots is not None for mask in masks)
    metadata = _metadata(masks, strengths)
    return NeuronMask(sites, edges, factors, roots if rooted else None, masks[0].branch, metadata, groups)


def _check_room(
    masks: Sequence[NeuronMask], axes: Sequence[tuple[str, ...]], sites: Sequence[Site], edges: Tensor
) -> None:
    """Refuse, before anything is made, a composition that is far larger than what it is composed of."""
    layers = math.prod(len(axis) for axis in axes) + sum(max(len(mask.groups), 1) for mask in masks)
    needed = layers * (len(edges) - 1) * sum(site.width for site in sites)
    allowed = max(ROOM, GROWTH * sum(mask.factors.numel() for mask in masks))
    if len(edges) > MOST_BINS + 1:
        raise InputError(f"the masks compose to {len(edges) - 1:,} timestep bins; expected up to {MOST_BINS:,}")
    if needed > allowed:
        raise InputError(
            f"the masks compose to {needed:,} factors in {len(edges) - 1:,} timestep bins, more than {GROWTH} times"
            " their own; give masks that share groups, layers or bins"
        )


def _together(s: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """The law, for M masks: (M, T, N) factors and roots -> (T, N) each. Terms are sorted, so that order is free."""
    silenced = s == 0
    w = torch.where(silenced.any(0), silenced.double(), -torch.log(s))  # log(0) is not chosen
    total = _sum(w)
    root = torch.where(total > 0, _sum(w * r) / torch.where(total > 0, total, 1.0), 0.0)
    return s.sort(0).values.prod(0).float(), root.float()


def _sum(terms: Tensor) -> Tensor:
    return terms.sort(0).values.sum(0)


def _lay_out(mask: NeuronMask, strength: float, sites: list[Site], edges: Tensor) -> tuple[Tensor, Tensor]:
    """Factors at this strength, and roots, over other sites and finer bins: (K or 1, T', N') float64."""
    bins = [mask.bin_of(low) for low in edges[1:].tolist()]
    inside = torch.tensor([t is not None for t in bins])
    taken = torch.tensor([t or 0 for t in bins])
    spans = {site.name: span for site, span in mask.spans()}
    columns = [torch.arange(mask.factors.shape[-1])[spans[site.name]] for site in sites if site.name in spans]
    known = torch.cat([torch.full((site.width,), site.name in spans) for site in sites])

    def spread(values: Tensor, elsewhere: float) -> Tensor:
        values = values.double().reshape(-1, *values.shape[-2:])[:, taken][..., torch.cat(columns)]
        out = torch.full((len(values), len(bins), len(known)), elsewhere, dtype=torch.float64)
        out[..., known] = torch.where(inside[:, None], values, elsewhere)
        return out

    factors = 1 - strength * (1 - spread(mask.factors, 1.0))
    return factors, torch.zeros_like(factors) if mask.roots is None else spread(mask.roots, 0.0)


def _check_alike(masks: Sequence[NeuronMask], force: bool) -> None:
    if len({mask.branch for mask in masks}) > 1:
        raise InputError(
            "one mask damps both halves of guidance and another only the conditional half, so one mask cannot do both;"
            " make all of them conditional (`stereo mask FILE --branch conditional -o NEW`), then combine them"
        )
    for key, what in DIGESTS.items():
        found = {str(mask.metadata[key]) for mask in masks if mask.metadata.get(key) is not None}
        if len(found) > 1 and not (force and key == "unet_weights"):
            first, second, *_ = sorted(found)
            hint = ", or force" if key == "unet_weights" else ""
            raise InputError(
                f"masks were made for models of different {what} (digests {first[:12]} and {second[:12]}); compose "
                f"masks of one model{hint}"
            )


def _axes(masks: Sequence[NeuronMask]) -> list[tuple[str, ...]]:
    """The groups of each allocating mask, once for those that share them."""
    axes: list[tuple[str, ...]] = []
    for mask in masks:
        if not mask.allocates or any(set(mask.groups) == set(axis) for axis in axes):
            continue
        for axis in axes:
            for mine, theirs in itertools.product(mask.groups, axis):
                one, other = (f"{JOINT}{name}{JOINT}" for name in (mine, theirs))
                if one in other or other in one:
                    raise InputError(
                        f"masks allocate to {', '.join(axis)} and to {', '.join(mask.groups)}, which share {mine!r} but"
                        " not all; compose masks with the same groups or with none in common, also within compositions"
                    )
        axes.append(mask.groups)
    return axes


def _sites(masks: Sequence[NeuronMask]) -> list[Site]:
    sites: dict[str, Site] = {}
    for site in itertools.chain.from_iterable(mask.sites for mask in masks):
        known = sites.setdefault(site.name, site)
        if known != site:
            raise InputError(
                f"masks do not fit together: site {site.name!r} is {known.kind} with {known.width} neurons in one, "
                f"{site.kind} with {site.width} in another; compose masks of one model"
            )
    return list(sites.values())


def _metadata(masks: Sequence[NeuronMask], strengths: Sequence[float]) -> dict[str, Any]:
    first = masks[0].metadata
    agreed = {
        key: value
        for key, value in first.items()
        if key != "selection" and all(mask.metadata.get(key, math.nan) == value for mask in masks)
    }
    for key in DIGESTS:  # one that some masks do not carry holds for the others still
        found = {mask.metadata[key] for mask in masks if mask.metadata.get(key) is not None}
        if len(found) == 1:
            agreed[key] = found.pop()
    names = [str(mask.metadata["axis"]) for mask in masks if mask.metadata.get("axis") is not None]
    if names:
        agreed["axis"] = JOINT.join(dict.fromkeys(names))
    selection = {"method": "compose", "strengths": list(strengths), "of": [mask.metadata for mask in masks]}
    return {**agreed, "selection": selection}
