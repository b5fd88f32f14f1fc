"""Plain-data summaries of relevance and masks: what `stereo locate` and `stereo inspect` print, draw and give as JSON.

Whatever could not be measured is None, so that every summary is valid JSON.
"""

import math
from typing import Any

import torch
from torch import Tensor

from stereoclinic.ddtd.neurons import SITE_KINDS, Site
from stereoclinic.ddtd.relevance import Relevance
from stereoclinic.sns.mask import NeuronMask

#: A neuron counts as damped below this factor; the plan leaves most neurons a rounding error below 1.
DAMPED = 0.999


def lean_summary(relevance: Relevance) -> dict[str, Any]:
    """The lean toward the first group, by label and timestep bin: the forecast of bias.

    Standard errors take every measured step of a sample for an observation of its own. Steps of one sample resemble
    each other, so read them as a lower bound where a bin holds several.

    Args:
        relevance: What was located.

    Returns:
        `rows` holds for each label a list `bins` of {"lean", "stderr", "n"} and their `mean` over measured bins;
        `mean_absolute` is the mean over labels of |lean| by bin, and over bins.
    """
    lean, stderr = relevance.lean()[..., 0], relevance.lean_stderr()[..., 0]  # (P, T)
    rows = []
    for p, label in enumerate(relevance.labels):
        measured = relevance.count[p] > 0
        errors = stderr[p][measured]
        rows.append(
            {
                "label": label,
                "bins": [
                    {"lean": number(lean[p, t]), "stderr": number(stderr[p, t]), "n": int(relevance.count[p, t])}
                    for t in range(len(relevance.bin_edges) - 1)
                ],
                "mean": {
                    "lean": number(lean[p][measured].mean()),
                    "stderr": number(errors.square().sum().sqrt() / len(errors)),
                    "n": int(relevance.count[p].sum()),
                },
            }
        )
    size = [number(column[column.isfinite()].mean()) for column in lean.abs().T]
    known = [value for value in size if value is not None]
    return {
        "axis": relevance.metadata.get("axis"),
        "groups": list(relevance.groups),
        "toward": relevance.groups[0],
        "bins": bin_ranges(relevance.bin_edges),
        "rows": rows,
        "mean_absolute": {"bins": size, "mean": sum(known) / len(known) if known else None},
    }


def mask_summary(mask: NeuronMask) -> dict[str, Any]:
    """How much a mask damps, by kind of site, site and timestep bin.

    `damped` counts neurons with a factor below 0.999 (in a bin, or in any bin), `damping` adds up 1 - factor (in a bin,
    or as the mean over bins).

    Args:
        mask: The mask.
    """
    damped, damping = mask.factors < DAMPED, mask.damping.double()  # (T, N) each
    sites = [
        {
            "name": site.name,
            "kind": site.kind,
            "neurons": site.width,
            "damped": int(damped[:, span].any(0).sum()),
            "damping": float(damping[:, span].sum(1).mean()),
            "bins": damping[:, span].sum(1).tolist(),
        }
        for site, span in mask.spans()
    ]
    forecast = (mask.metadata.get("selection") or {}).get("bins") or []
    # A window may have split bins after they were planned; their forecasts then name bins of other bounds.
    if len(forecast) != len(damped):
        forecast = [{}] * len(damped)
    bins = [
        {**bounds, "damped": int(damped[t].sum()), "damping": float(damping[t].sum()), "forecast": forecast[t]}
        for t, bounds in enumerate(bin_ranges(mask.bin_edges))
    ]
    return {
        "axis": mask.metadata.get("axis"),
        "branch": mask.branch,
        "root": "zero" if mask.roots is None else (mask.metadata.get("selection") or {}).get("root", "stored"),
        "kinds": _by_kind(sites, ("neurons", "damped", "damping")),
        "sites": sites,
        "bins": bins,
        "total": {
            "sites": len(sites),
            "neurons": mask.factors.shape[1],
            "damped": int(damped.any(0).sum()),
            "damping": float(damping.sum(1).mean()),
        },
        "metadata": mask.metadata,
    }


def relevance_summary(relevance: Relevance, top: int = 12) -> dict[str, Any]:
    """Where the stereotype sits: each site's share of |mean stereotype relevance|.

    Shares are taken within each timestep bin and averaged over measured bins, so that no bin drowns the others.

    Args:
        relevance: What was located.
        top: How many single neurons to name.

    Returns:
        `sites` and `kinds` with their shares (which add up to 1), `half`: how many neurons carry half of it, and
        `neurons`: the first `top` by share, with the sign of their relevance (below 0: they counteract the stereotype).
    """
    mean = relevance.stereotype()[0]  # (T, N)
    measured = mean.isfinite().all(1)
    size = torch.where(measured[:, None], mean.abs(), 0.0)
    shares = size / size.sum(1, keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)  # (T, N)
    pooled = shares.sum(0) / measured.sum().clamp_min(1)  # (N,)
    ordered, order = pooled.sort(descending=True)
    spans = list(_spans(relevance.sites))
    sites = [
        {
            "name": site.name,
            "kind": site.kind,
            "neurons": site.width,
            "share": float(pooled[span].sum()),
            "bins": [float(shares[t, span].sum()) if measured[t] else None for t in range(len(shares))],
        }
        for site, span in spans
    ]
    tilt = torch.where(measured[:, None], mean, 0.0).sum(0)
    neurons = []
    for j in order[:top].tolist():
        site, span = next((site, span) for site, span in spans if span.start <= j < span.stop)
        neurons.append(
            {
                "site": site.name,
                "neuron": j - span.start,
                "share": float(pooled[j]),
                "sign": int(tilt[j].sign()),
            }
        )
    return {
        "axis": relevance.metadata.get("axis"),
        "groups": list(relevance.groups),
        "labels": list(relevance.labels),
        "bins": bin_ranges(relevance.bin_edges),
        "kinds": _by_kind(sites, ("neurons", "share")),
        "sites": sites,
        "neurons": neurons,
        "half": int((ordered.cumsum(0) < 0.5 * ordered.sum()).sum()) + 1,
        "total": {"sites": len(sites), "neurons": len(pooled)},
        "metadata": relevance.metadata,
    }


def bin_ranges(edges: Tensor) -> list[dict[str, float]]:
    """Timesteps of each bin, noisiest first: `from` > t >= `to`."""
    return [{"from": high, "to": low} for high, low in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)]


def number(value: Tensor | float) -> float | None:
    """A float, or None for what is not finite: JSON has no NaN."""
    value = float(value)
    return value if math.isfinite(value) else None


def _by_kind(sites: list[dict[str, Any]], sums: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = []
    for kind in SITE_KINDS:
        members = [site for site in sites if site["kind"] == kind]
        if members:
            totals = {name: sum(site[name] for site in members) for name in sums}
            rows.append({"kind": kind, "sites": len(members), **totals})
    return rows


def _spans(sites: list[Site]) -> list[tuple[Site, slice]]:
    spans, start = [], 0
    for site in sites:
        spans.append((site, slice(start, start + site.width)))
        start += site.width
    return spans
