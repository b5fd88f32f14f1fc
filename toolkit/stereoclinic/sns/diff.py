"""Compares two masks, or two relevance files: what they have in common, and what chance would show.

    overlap           Jaccard |A n B| / |A u B| of two sets    by chance: its mean over random sets of these sizes
    rank correlation  Spearman over neurons                    by chance: 0, give or take 1 / sqrt(n - 1)
    cosine            <x, y> / (|x| |y|) over neurons          by chance: n mean(x) mean(y) / (|x| |y|), its mean over
                                                               random orders of the neurons

x and y are the values of the same neurons: damping 1 - factor of masks, mean sign(S) R of relevance.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.pipelines.bins import bin_within
from stereoclinic.pipelines.sites import Site, spans
from stereoclinic.sns.mask import NeuronMask

if TYPE_CHECKING:
    from stereoclinic.ddtd.relevance import Relevance

#: A neuron counts as damped below this factor; the plan leaves most neurons a rounding error below 1.
DAMPED = 0.999
#: Shares of the neurons whose largest are compared.
TOP = (0.01, 0.05)


def compare(
    a: "NeuronMask | Relevance", b: "NeuronMask | Relevance", kind_of: Callable[[Site], str] = lambda site: site.kind
) -> dict[str, Any]:
    """Overlap and correlation, over all neurons, by kind of site and by timestep bin.

    Neurons of sites that both have are compared, in bins refined to both files' edges. Over all bins a neuron counts
    with its mean over timesteps, and as damped if it is in any bin; in masks that allocate, with its mean over groups,
    and as damped if it is for any group.

    Args:
        a: A mask, or relevance.
        b: Another of the same.
        kind_of: The kind that a site counts under.

    Returns:
        Plain data, None for what is not defined. `made` lists what differs in how the two were made. `all`, `kinds`,
        `bins`, and `groups` (if both masks allocate to the same ones) hold, with what chance would show, `neurons`,
        `overlap`, `top` (the overlap of the largest 1 % and 5 %; None where more neurons tie), `spearman` and `cosine`;
        and for each of `a` and `b` the `sum` of damping or of |relevance|, and the number of neurons in its
        `set`: those damped, or those whose relevance is above zero.

    Raises:
        InputError: One is a mask and the other relevance.
    """
    masks = [file for file in (a, b) if isinstance(file, NeuronMask)]
    if len(masks) == 1:
        raise InputError("a mask and relevance cannot be compared; give two masks, or two relevance files")
    theirs = set(b.sites)
    common = [site for site in a.sites if site in theirs]
    found: dict[str, Any] = {
        "what": "mask" if masks else "relevance",
        "made": differences(_record(a), _record(b)),
        "sites": {"common": len(common), "a": len(a.sites) - len(common), "b": len(b.sites) - len(common)},
        "all": None,
        "kinds": [],
        "bins": [],
        "groups": [],
    }
    if common:
        found |= _compare_values(a, b, common, [kind_of(site) for site in common for _ in range(site.width)])
    if common and masks and masks[0].groups and masks[0].groups == masks[1].groups:
        one, other = masks
        found["groups"] = [{"group": name, **compare(one.group(name), other.group(name))["all"]} for name in one.groups]
    return found


def _compare_values(
    a: "NeuronMask | Relevance", b: "NeuronMask | Relevance", common: list[Site], kinds: list[str]
) -> dict[str, Any]:
    """The figures of all neurons, of each kind (one name a neuron), and of each bin."""
    edges = torch.unique(torch.cat([a.bin_edges.double(), b.bin_edges.double()])).flip(0)
    values = [_values(file, common, edges) for file in (a, b)]  # (K or 1, T, N) each
    measured = torch.stack([x.isfinite().all(2).all(0) for x in values]).all(0)  # (T,)
    weights = torch.where(measured, -edges.diff(), 0.0)
    weights = weights / weights.sum().clamp_min(1e-12)
    is_mask = isinstance(a, NeuronMask)
    floor = 1 - DAMPED if is_mask else 0.0
    by_bin = [x.mean(0) for x in values]  # (T, N)
    whole = [(weights[:, None] * x.nan_to_num()).sum(0) for x in by_bin]  # (N,)
    sets_by_bin = [(x > floor).any(0) for x in values]
    sets = [x.any(0) for x in sets_by_bin] if is_mask else [x > floor for x in whole]

    by_kind, bins = [], []
    for kind in dict.fromkeys(kinds):
        of = torch.tensor([name == kind for name in kinds])
        by_kind.append({"kind": kind, **_figures([x[of] for x in whole], [x[of] for x in sets], floor)})
    for t in range(len(edges) - 1):
        row = _figures([x[t] for x in by_bin], [x[t] for x in sets_by_bin], floor) if measured[t] else {}
        bins.append({"from": edges[t].item(), "to": edges[t + 1].item(), **row})
    return {"all": _figures(whole, sets, floor), "kinds": by_kind, "bins": bins}


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Where two tables of plain data differ: {"name", "a", "b"}, with names of nested tables joined by dots."""
    flat = [dict(_flat(table)) for table in (a, b)]
    names = sorted({*flat[0], *flat[1]})
    rows = [{"name": name, "a": flat[0].get(name), "b": flat[1].get(name)} for name in names]
    return [row for row in rows if row["a"] != row["b"]]


def expected_jaccard(m: int, n: int, size: int) -> float | None:
    """Mean Jaccard overlap of two independent random sets of m and n out of `size`; None if both are empty.

    The overlap k is hypergeometric, so it is the sum over k of P(k) k / (m + n - k).
    """
    if m + n == 0:
        return None
    k = torch.arange(max(0, m + n - size), min(m, n) + 1, dtype=torch.float64)
    # P(k) is as 1 / (k! (m-k)! (n-k)! (size-m-n+k)!). scipy.stats has it, and takes a second to import.
    logits = -torch.stack([k, m - k, n - k, size - m - n + k]).add(1).lgamma().sum(0)
    return float((logits.softmax(0) * k / (m + n - k)).sum())


def jaccard(a: Tensor, b: Tensor) -> float | None:
    """Overlap of two sets, (n,) bool each; None if both are empty."""
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else None


def spearman(x: Tensor, y: Tensor) -> float | None:
    """Rank correlation over (n,), ties at their mean rank; None where one is constant. Not scipy's: see above."""
    return cosine(_centred_ranks(x), _centred_ranks(y))


def _centred_ranks(x: Tensor) -> Tensor:
    """Ranks less their mean, (n,) float64, ties at their mean rank."""
    _, place, number = x.unique(return_inverse=True, return_counts=True)
    ranks: Tensor = number.cumsum(0) - (number.double() + len(x)) / 2
    return ranks[place]


def cosine(x: Tensor, y: Tensor) -> float | None:
    """<x, y> / (|x| |y|) over (n,); None where one of them is zero."""
    sizes = x.double().norm() * y.double().norm()
    return float(x.double() @ y.double() / sizes) if sizes > 0 else None


def largest(x: Tensor, share: float, floor: float) -> Tensor | None:
    """The largest of (n,), a share of them, as (n,) bool: only those above `floor`; None where ties go beyond them."""
    k = max(1, round(share * len(x)))
    members = (x >= x.topk(k).values[-1]) & (x > floor)
    return members if int(members.sum()) <= k else None


def _figures(values: list[Tensor], sets: list[Tensor], floor: float) -> dict[str, Any]:
    """All figures for the values of a and of b, (n,) each, and their sets, (n,) bool each."""
    x, y = values
    n, sizes = len(x), float(x.norm() * y.norm())
    sides = {
        name: {"sum": float(value.abs().sum()), "set": int(members.sum())}
        for name, value, members in zip("ab", values, sets, strict=True)
    }
    return {
        "neurons": n,
        **sides,
        "overlap": _overlap(*sets),
        "top": [_top(share, *(largest(value, share, floor) for value in values)) for share in TOP],
        "spearman": {"value": spearman(x, y), "noise": 1 / math.sqrt(n - 1) if n > 1 else None},
        "cosine": {"value": cosine(x, y), "chance": float(n * x.mean() * y.mean() / sizes) if sizes else None},
    }


def _top(share: float, a: Tensor | None, b: Tensor | None) -> dict[str, Any]:
    undefined = {"jaccard": None, "chance": None, "a": None, "b": None}
    return {"share": share, **(undefined if a is None or b is None else _overlap(a, b))}


def _overlap(a: Tensor, b: Tensor) -> dict[str, Any]:
    m, n = int(a.sum()), int(b.sum())
    return {"jaccard": jaccard(a, b), "chance": expected_jaccard(m, n, len(a)), "a": m, "b": n}


def _values(file: "NeuronMask | Relevance", common: list[Site], edges: Tensor) -> Tensor:
    """The values of the common sites' neurons in finer bins: (K or 1, T, N), NaN where nothing was measured."""
    values = file.damping if isinstance(file, NeuronMask) else file.stereotype()[0]
    values = values.double().cpu().reshape(-1, *values.shape[-2:])
    place = dict(spans(file.sites))
    values = torch.cat([values[..., place[site]] for site in common], dim=-1)
    beyond = torch.full_like(values[:, 0], 0.0 if isinstance(file, NeuronMask) else torch.nan)
    old = [bin_within(low, file.bin_edges) for low in edges[1:].tolist()]
    return torch.stack([beyond if t is None else values[:, t] for t in old], dim=1)


def _record(file: "NeuronMask | Relevance") -> dict[str, Any]:
    """How a file was made, as plain data without its results."""
    record: dict[str, Any] = {**file.metadata, "bin edges": file.bin_edges.tolist()}
    if not isinstance(file, NeuronMask):
        return {**record, "groups": list(file.groups), "labels": list(file.labels)}
    selection = {key: value for key, value in (record.pop("selection", None) or {}).items() if key != "bins"}
    return {**record, "allocates to": list(file.groups), "branch": file.branch, "selection": selection}


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
