"""Two masks, or two relevance files, beside each other: what they have in common, and what chance would show of it.

    overlap           Jaccard |A n B| / |A u B| of two sets    by chance: its mean over random sets of these sizes
    rank correlation  Spearman over neurons                    by chance: 0, give or take 1 / sqrt(n - 1)
    cosine            <x, y> / (|x| |y|) over neurons          by chance: n mean(x) mean(y) / (|x| |y|), its mean over
                                                               random orders of the neurons

x and y are what the two say of the same neurons: damping 1 - factor of masks, mean sign(S) R of relevance.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.pipelines.sites import Site, spans
from stereoclinic.sns.mask import NeuronMask, bin_of

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

    Neurons of sites that both have are compared, timestep bin by timestep bin of both files' edges together. Over all
    bins a neuron counts with its mean over timesteps, and as damped if it is in any bin; of masks that allocate, with
    its mean over groups, and as damped if it is for any group.

    Args:
        a: A mask, or relevance.
        b: Another of the same.
        kind_of: What a site is counted under.

    Returns:
        Plain data, None for what is not defined. `made` lists what differs in how the two were made; `all`, `kinds`,
        `bins`, and `groups` where both masks allocate to the same ones, hold for the two together `neurons`,
        `overlap`, `top` (the same for the largest 1 % and 5 %), `spearman` and `cosine`, each with what chance would
        show, and for each of `a` and `b` the `sum` of damping or of |relevance|, and the number of neurons in its
        `set`: those damped, or those whose relevance is above zero.

    Raises:
        InputError: One is a mask and the other relevance.
    """
    if isinstance(a, NeuronMask) != isinstance(b, NeuronMask):
        raise InputError("a mask and relevance cannot be compared; give two masks, or two relevance files")
    theirs = set(b.sites)
    common = [site for site in a.sites if site in theirs]
    found: dict[str, Any] = {
        "what": "mask" if isinstance(a, NeuronMask) else "relevance",
        "made": differences(_made(a), _made(b)),
        "sites": {"common": len(common), "a": len(a.sites) - len(common), "b": len(b.sites) - len(common)},
        "all": None,
        "kinds": [],
        "bins": [],
        "groups": [],
    }
    if not common:
        return found
    edges = torch.unique(torch.cat([a.bin_edges.double(), b.bin_edges.double()])).flip(0)
    each = [_on(file, common, edges) for file in (a, b)]  # (K or 1, T, N) of a and of b
    measured = torch.stack([x.isfinite().all(2).all(0) for x in each]).all(0)  # (T,)
    weights = torch.where(measured, -edges.diff(), 0.0)
    weights = weights / weights.sum().clamp_min(1e-12)
    floor = 1 - DAMPED if isinstance(a, NeuronMask) else 0.0
    by_bin = [x.mean(0) for x in each]  # (T, N)
    whole = [(weights[:, None] * x.nan_to_num()).sum(0) for x in by_bin]  # (N,)
    sets_by_bin = [(x > floor).any(0) for x in each]
    sets = [x.any(0) for x in sets_by_bin] if isinstance(a, NeuronMask) else [x > floor for x in whole]

    kinds = [kind_of(site) for site in common for _ in range(site.width)]
    found["all"] = _row(whole, sets, floor)
    for kind in dict.fromkeys(kinds):
        of = torch.tensor([its == kind for its in kinds])
        found["kinds"].append({"kind": kind, **_row([x[of] for x in whole], [x[of] for x in sets], floor)})
    for t in range(len(edges) - 1):
        bounds = {"from": edges[t].item(), "to": edges[t + 1].item()}
        row = _row([x[t] for x in by_bin], [x[t] for x in sets_by_bin], floor) if measured[t] else {}
        found["bins"].append({**bounds, **row})
    if isinstance(a, NeuronMask) and isinstance(b, NeuronMask) and a.groups and a.groups == b.groups:
        found["groups"] = [{"group": name, **compare(a.group(name), b.group(name))["all"]} for name in a.groups]
    return found


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What two tables of plain data hold differently, tables in them joined by dots: {"name", "a", "b"}."""
    flat = [dict(_flat(each)) for each in (a, b)]
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
    log = _log_choose(m, k) + _log_choose(size - m, n - k) - _log_choose(size, torch.tensor(n).double())
    return float((log.exp() * k / (m + n - k)).sum())


def jaccard(a: Tensor, b: Tensor) -> float | None:
    """Overlap of two sets, (n,) bool each; None if both are empty."""
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else None


def spearman(x: Tensor, y: Tensor) -> float | None:
    """Rank correlation over (n,), ties at their mean rank; None where one of them is constant."""
    return cosine(*(rank - rank.mean() for rank in map(_ranks, (x, y))))


def cosine(x: Tensor, y: Tensor) -> float | None:
    """<x, y> / (|x| |y|) over (n,); None where one of them is zero."""
    sizes = x.double().norm() * y.double().norm()
    return float(x.double() @ y.double() / sizes) if sizes > 0 else None


def largest(x: Tensor, share: float, floor: float) -> Tensor:
    """The largest of (n,), a share of them, as (n,) bool: none that is not above `floor`, and all that tie."""
    k = max(1, round(share * len(x)))
    return (x >= x.topk(k).values[-1]) & (x > floor)


def _row(values: list[Tensor], sets: list[Tensor], floor: float) -> dict[str, Any]:
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
        "top": [{"share": share, **_overlap(*(largest(each, share, floor) for each in values))} for share in TOP],
        "spearman": {"value": spearman(x, y), "noise": 1 / math.sqrt(n - 1) if n > 1 else None},
        "cosine": {"value": cosine(x, y), "chance": float(n * x.mean() * y.mean() / sizes) if sizes else None},
    }


def _overlap(a: Tensor, b: Tensor) -> dict[str, Any]:
    m, n = int(a.sum()), int(b.sum())
    return {"jaccard": jaccard(a, b), "chance": expected_jaccard(m, n, len(a)), "a": m, "b": n}


def _on(each: "NeuronMask | Relevance", common: list[Site], edges: Tensor) -> Tensor:
    """What it says of the neurons of common sites in finer bins: (K or 1, T, N), NaN where nothing was measured."""
    values = each.damping if isinstance(each, NeuronMask) else each.stereotype()[0]
    values = values.double().cpu().reshape(-1, *values.shape[-2:])
    place = dict(spans(each.sites))
    values = torch.cat([values[..., place[site]] for site in common], dim=-1)
    beyond = torch.full_like(values[:, 0], 0.0 if isinstance(each, NeuronMask) else torch.nan)
    old = [bin_of(each.bin_edges, low) for low in edges[1:].tolist()]
    return torch.stack([beyond if t is None else values[:, t] for t in old], dim=1)


def _made(each: "NeuronMask | Relevance") -> dict[str, Any]:
    """How it was made, as plain data without its results."""
    made: dict[str, Any] = {**each.metadata, "bin edges": each.bin_edges.tolist()}
    if not isinstance(each, NeuronMask):
        return {**made, "groups": list(each.groups), "labels": list(each.labels)}
    selection = {key: value for key, value in (made.pop("selection", None) or {}).items() if key != "bins"}
    return {**made, "allocates to": list(each.groups), "branch": each.branch, "selection": selection}


def _flat(table: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _ranks(x: Tensor) -> Tensor:
    _, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True)
    ranks: Tensor = counts.cumsum(0).double() - (counts - 1) / 2
    return ranks[inverse]


def _log_choose(n: int, k: Tensor) -> Tensor:
    return math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
