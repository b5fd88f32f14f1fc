"""Summaries of leans and masks as plain data: what `stereo locate` and `stereo inspect` print, draw and give as JSON.

A value that could not be measured is None, so that every summary is valid JSON.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stereoclinic.ddtd.relevance import Relevance
from stereoclinic.pipelines.bins import bin_of
from stereoclinic.pipelines.sites import Site, spans
from stereoclinic.report.anatomy import grouped
from stereoclinic.sns.diff import DAMPED
from stereoclinic.sns.mask import NeuronMask


def lean_summary(relevance: Relevance) -> dict[str, Any]:
    """The lean by label, measured timestep and timestep bin: the forecast of bias.

    Standard errors at a timestep are over samples. Those of bins count every measured step of a sample as an
    observation, which gives a lower bound because the steps of one sample resemble each other. Those of means count
    the steps of a sample as copies, which gives an upper bound.

    Returns:
        Leans toward the first group. `rows` has for each label the `curve` over `timesteps`, the `bins` (both lists of
        {"lean", "stderr", "n"}) and the `mean` over measured bins. `mean_absolute` is the mean over labels of |lean|
        by timestep, by bin and over bins. `others` has the same toward each other group if there are more than two
        groups; with two groups the second mirrors the first.
    """
    groups = range(len(relevance.groups))
    leans = [_leans_toward(relevance, k) for k in (groups if len(groups) > 2 else groups[:1])]
    samples = relevance.curve_count.amax(1).tolist() if len(relevance.timesteps) else []
    return {
        "axis": relevance.metadata.get("axis"),
        "groups": list(relevance.groups),
        "bins": bin_ranges(relevance.bin_edges),
        "timesteps": relevance.timesteps.tolist(),
        "samples": {label: int(n) for label, n in zip(relevance.labels, samples, strict=False)},
        **leans[0],
        "others": leans[1:],
    }


def _leans_toward(relevance: Relevance, k: int) -> dict[str, Any]:
    lean, stderr = relevance.lean()[..., k], relevance.lean_stderr()[..., k]  # (P, T)
    curve, errors = relevance.curve()[..., k], relevance.curve_stderr()[..., k]  # (P, M)
    bins = [bin_of(t, relevance.bin_edges) for t in relevance.timesteps.tolist()]
    rows = []
    for p, label in enumerate(relevance.labels):
        measured = relevance.count[p] > 0
        where = measured.nonzero().flatten().tolist()
        by_bin = [float(errors[p, [m for m, own in enumerate(bins) if own == t]].mean()) for t in where]
        rows.append(
            {
                "label": label,
                "curve": _cells(curve[p], errors[p], relevance.curve_count[p]),
                "bins": _cells(lean[p], stderr[p], relevance.count[p]),
                "mean": {
                    "lean": number(lean[p][measured].mean()),
                    "stderr": number(sum(by_bin) / max(len(by_bin), 1)),
                    "n": int(relevance.count[p].sum()),
                },
            }
        )
    size = _mean_absolute(lean)
    known = [value for value in size if value is not None]
    mean = sum(known) / len(known) if known else None
    return {
        "toward": relevance.groups[k],
        "rows": rows,
        "mean_absolute": {"curve": _mean_absolute(curve), "bins": size, "mean": mean},
    }


def _cells(lean: Tensor, stderr: Tensor, count: Tensor) -> list[dict[str, Any]]:
    values = zip(lean.tolist(), stderr.tolist(), count.tolist(), strict=True)
    return [{"lean": number(mean), "stderr": number(error), "n": int(n)} for mean, error, n in values]


def _mean_absolute(lean: Tensor) -> list[float | None]:
    """Mean over labels of |lean|, for each column of (P, columns)."""
    return [number(column[column.isfinite()].mean()) for column in lean.abs().T]


def mask_summary(mask: NeuronMask) -> dict[str, Any]:
    """How much a mask damps, by kind of site, stream, block, site and timestep bin.

    Returns:
        `kinds`, `streams` (empty where the model has one), `blocks`, `sites` and `bins`, each row with `damped`, the
        number of neurons with a factor below 0.999 (in that bin, or in any bin), and `damping`, the sum of 1 - factor
        (in that bin, or the mean over bins). For a mask that allocates, `groups` has their names, damping is the mean
        over groups, and a neuron counts as damped if it is damped for any group. `chosen` says in words how.
    """
    damped, damping = mask.factors < DAMPED, mask.damping.double()
    if mask.allocates:
        damped, damping = damped.any(0), damping.mean(0)  # (K, T, N) -> (T, N)
    counts, sums = fold(damped.any(0), mask.sites), fold(damping, mask.sites)  # (S,), (T, S)

    def row(members: list[int]) -> dict[str, Any]:
        return {
            "sites": len(members),
            "neurons": sum(mask.sites[i].width for i in members),
            "damped": int(counts[members].sum()),
            "damping": float(sums[:, members].sum(1).mean()),
            "bins": sums[:, members].sum(1).tolist(),
        }

    selection = mask.metadata.get("selection") or {}
    forecast = selection.get("bins") or []
    if len(forecast) != len(damped):  # bins were split after the plan, so its forecasts are for other bins
        forecast = [{}] * len(damped)
    bins = [
        {**bounds, "damped": int(damped[t].sum()), "damping": float(damping[t].sum()), "forecast": forecast[t]}
        for t, bounds in enumerate(bin_ranges(mask.bin_edges))
    ]
    return {
        "axis": mask.metadata.get("axis"),
        "groups": list(mask.groups),
        "branch": mask.branch,
        "chosen": _chosen(selection),
        "root": "zero" if mask.roots is None else selection.get("root", "stored"),
        **grouped(mask.sites, row),
        "bins": bins,
        "total": row(list(range(len(mask.sites)))),
        "metadata": mask.metadata,
    }


#: How neurons were chosen, by the `method` in a mask's metadata.
_CHOSEN = {
    "plan": "chosen by a linear plan from relevance",
    "stepwise": "planned step by step",
    "top_k": "chosen by the largest relevance",
    "random_like": "chosen at random",
    "compose": "composed of several masks",
}


def _chosen(selection: dict[str, Any]) -> str:
    method = selection.get("method")
    return _CHOSEN.get(str(method), f"chosen by {method or 'hand'}")


def fold(values: Tensor, sites: Sequence[Site]) -> Tensor:
    """Sum over the neurons of each site: (..., N) -> (..., S)."""
    return torch.stack([values[..., span].sum(-1) for _, span in spans(sites)], dim=-1)


def bin_ranges(edges: Tensor) -> list[dict[str, float]]:
    """Timesteps of each bin, noisiest first: `from` > t >= `to`."""
    return [{"from": high, "to": low} for high, low in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)]


def number(value: Tensor | float) -> float | None:
    """A float, or None for a value that is not finite: JSON has no NaN."""
    value = float(value)
    return value if math.isfinite(value) else None
