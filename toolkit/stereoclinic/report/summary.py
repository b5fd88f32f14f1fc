"""Plain-data summaries of leans and masks: what `stereo locate` and `stereo inspect` print, draw and give as JSON.

Whatever could not be measured is None, so that every summary is valid JSON.
"""

import math
from typing import Any

from torch import Tensor

from stereoclinic.ddtd.relevance import Relevance
from stereoclinic.ddtd.trajectory import bin_of
from stereoclinic.report.anatomy import KINDS, STREAMS, by_block, by_kind, by_stream, places
from stereoclinic.sns.diff import DAMPED
from stereoclinic.sns.mask import NeuronMask


def lean_summary(relevance: Relevance) -> dict[str, Any]:
    """The lean by label, measured timestep and timestep bin: the forecast of bias.

    Standard errors at a timestep are over samples. Those of bins take every measured step of a sample for an
    observation of its own, which is a lower bound where a bin holds several, for steps of one sample resemble each
    other; those of means take a sample's steps for copies of one another, which is an upper bound.

    Args:
        relevance: What was located.

    Returns:
        Leans toward the first group: `rows` holds for each label the `curve` over `timesteps` and the `bins`, lists of
        {"lean", "stderr", "n"}, and their `mean` over measured bins; `mean_absolute` is the mean over labels of |lean|
        by timestep, by bin, and over bins. `others` holds the same toward each other group, where there are more than
        two; the second of two mirrors the first.
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
        by_bin = [float(errors[p, [m for m, its in enumerate(bins) if its == t]].mean()) for t in where]
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
    """How much a mask damps, by kind of site, stream (where there are several), block, site and timestep bin.

    `damped` counts neurons with a factor below 0.999 (in a bin, or in any bin), `damping` adds up 1 - factor (in a bin,
    or as the mean over bins). Of a mask that allocates, `groups` are named, damping is the mean over them, and a neuron
    counts as damped if it is for any.

    Args:
        mask: The mask.
    """
    damped, damping = mask.factors < DAMPED, mask.damping.double()
    if mask.allocates:
        damped, damping = damped.any(0), damping.mean(0)  # (K, T, N) -> (T, N)
    at = places(mask.sites)
    sites: list[dict[str, Any]] = [
        {
            "name": site.name,
            "kind": site.kind,
            "place": str(at[site]),
            "neurons": site.width,
            "damped": int(damped[:, span].any(0).sum()),
            "damping": float(damping[:, span].sum(1).mean()),
            "bins": damping[:, span].sum(1).tolist(),
        }
        for site, span in mask.spans()
    ]

    def total(members: list[int]) -> dict[str, Any]:
        sums = {name: sum(sites[i][name] for i in members) for name in ("neurons", "damped", "damping")}
        return {"sites": len(members), **sums}

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
        "groups": list(mask.groups),
        "branch": mask.branch,
        "root": "zero" if mask.roots is None else (mask.metadata.get("selection") or {}).get("root", "stored"),
        "kinds": [
            {"kind": kind, "name": KINDS[kind], **total(members)} for kind, members in by_kind(mask.sites).items()
        ],
        "streams": [
            {"stream": stream, "name": STREAMS[stream], **total(members)}
            for stream, members in by_stream(mask.sites).items()
        ],
        "blocks": [{"name": name, **total(members)} for name, members in by_block(mask.sites).items()],
        "sites": sites,
        "bins": bins,
        "total": {
            "sites": len(sites),
            "neurons": mask.factors.shape[-1],
            "damped": int(damped.any(0).sum()),
            "damping": float(damping.sum(1).mean()),
        },
        "metadata": mask.metadata,
    }


def bin_ranges(edges: Tensor) -> list[dict[str, float]]:
    """Timesteps of each bin, noisiest first: `from` > t >= `to`."""
    return [{"from": high, "to": low} for high, low in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)]


def number(value: Tensor | float) -> float | None:
    """A float, or None for what is not finite: JSON has no NaN."""
    value = float(value)
    return value if math.isfinite(value) else None
