"""Where in the denoiser the stereotype sits, and which neurons carry it: what `stereo inspect` says of relevance.

A share of |relevance| means little by itself: neurons that carry nothing still show some, by their standard error.
What they would show is given beside each share as `chance`. With a mean m_j of P labels and its standard error s_j,

    E|m_j| = s_j sqrt(2 / pi) / c4(P)          if the true mean were 0, m_j normal and P labels alike

c4 corrects a standard deviation for being estimated from few (Holtzman 1950); it is 0.98 for twelve labels.
"""

import math
from typing import Any

import torch
from torch import Tensor

from stereoclinic.ddtd.relevance import Relevance
from stereoclinic.pipelines.sites import spans
from stereoclinic.report.anatomy import KINDS, STREAMS, by_block, by_kind, by_stream, places
from stereoclinic.report.summary import bin_ranges, number

#: Standard errors that a neuron's mean is lowered by when neurons are ranked, as `sns.select.top_k` does.
Z = 2.0


def relevance_summary(relevance: Relevance, top: int = 12) -> dict[str, Any]:
    """Where the stereotype sits: by kind of site, stream, block, site and timestep bin, and the neurons that carry it.

    Shares are of |mean stereotype relevance|, taken within each timestep bin and averaged over measured bins, so that
    no bin drowns the others. Whatever could not be measured is None.

    Args:
        relevance: What was located.
        top: How many single neurons to name.

    Returns:
        `kinds`, `streams` (empty where there is one alone), `blocks` and `sites`, each with its `share` (they add up
        to 1), the share `chance` alone would show, `net` (the signed sum, in units of the target: layers lie behind
        each other, so nets of several do not add up) with its standard error, clustered by label, and shares and
        chance by bin.
        `timesteps`: for each bin the samples x steps `n`, `labels`, `size` (the sum of |relevance| over neurons), its
        part by `chance`, and how many neurons carry `half` of it.
        `neurons`: the first `top`, see `_neurons`.
    """
    mean, stderr = relevance.stereotype()  # (T, N) each
    measured = mean.isfinite().all(1)
    size = torch.where(measured[:, None], mean.abs(), 0.0)
    total = size.sum(1, keepdim=True)  # (T, 1)
    shares = size / total.clamp_min(torch.finfo(size.dtype).tiny)
    chance = by_chance(stderr, relevance.count) / total  # (T, N), NaN where there is no standard error
    pooled = shares.sum(0) / measured.sum().clamp_min(1)  # (N,)

    at, own = places(relevance.sites), [span for _, span in spans(relevance.sites)]
    site_shares, site_chance = _fold(shares, own), _fold(chance, own)  # (T, S) each
    site_sums = _fold(relevance.stereotype_sum, own)  # (P, T, S)

    def row(members: list[int]) -> dict[str, Any]:
        share, floor = site_shares[:, members].sum(1), site_chance[:, members].sum(1)  # (T,) each
        net, error = _net(site_sums[..., members].sum(2), relevance.count)
        return {
            "sites": len(members),
            "neurons": sum(relevance.sites[i].width for i in members),
            "share": number(share[measured].mean()),
            "chance": number(floor[measured].mean()),
            "net": number(net),
            "net_stderr": number(error),
            "bins": [number(value) if seen else None for value, seen in zip(share, measured, strict=True)],
            "chance_bins": [number(value) if seen else None for value, seen in zip(floor, measured, strict=True)],
        }

    timesteps = [
        {
            **bounds,
            "n": int(relevance.count[:, t].sum()),
            "labels": int((relevance.count[:, t] > 0).sum()),
            "size": number(total[t]) if measured[t] else None,
            "chance": number(chance[t].sum()) if measured[t] else None,
            "half": _half(shares[t]) if measured[t] else None,
        }
        for t, bounds in enumerate(bin_ranges(relevance.bin_edges))
    ]
    return {
        "axis": relevance.metadata.get("axis"),
        "groups": list(relevance.groups),
        "labels": list(relevance.labels),
        "bins": bin_ranges(relevance.bin_edges),
        "timesteps": timesteps,
        "kinds": [
            {"kind": kind, "name": KINDS[kind], **row(members)} for kind, members in by_kind(relevance.sites).items()
        ],
        "streams": [
            {"stream": stream, "name": STREAMS[stream], **row(members)}
            for stream, members in by_stream(relevance.sites).items()
        ],
        "blocks": [{"name": name, **row(members)} for name, members in by_block(relevance.sites).items()],
        "sites": [
            {"name": site.name, "kind": site.kind, "place": str(at[site]), **row([i])}
            for i, site in enumerate(relevance.sites)
        ],
        "neurons": _neurons(relevance, mean, stderr, pooled, top),
        "half": _half(pooled),
        "total": {
            "sites": len(relevance.sites),
            "neurons": len(pooled),
            "chance": number(chance.sum(1)[measured].mean()),
        },
        "metadata": relevance.metadata,
    }


def by_chance(stderr: Tensor, count: Tensor) -> Tensor:
    """What |mean| is on average where the true mean is 0.

    Args:
        stderr: (T, N), of each mean, from the spread between labels.
        count: (P, T) samples x steps of each label.

    Returns:
        (T, N), NaN where there is no standard error.
    """
    witnesses = torch.where((count > 0).sum(0) > 1, (count > 0).sum(0), count.sum(0)).double()  # (T,), labels
    # In logarithms, for the gamma function of many samples is beyond any float.
    log_c4 = torch.lgamma(witnesses / 2) - torch.lgamma((witnesses - 1) / 2)
    c4 = (2 / (witnesses - 1)).sqrt() * log_c4.exp()
    return stderr * math.sqrt(2 / math.pi) / c4[:, None]


def _neurons(relevance: Relevance, mean: Tensor, stderr: Tensor, pooled: Tensor, top: int) -> list[dict[str, Any]]:
    """The neurons whose relevance is surely large, either way: by |mean| - 2 standard errors over all bins.

    Each is described in the one bin in which it stands out most by that measure: `mean` with its `stderr` and their
    ratio `t`, and as `profile` its signed relevance toward each group, by label. A mean above 0 carries the
    stereotype, one below 0 counteracts it.
    """
    measured = mean.isfinite().all(1)
    if not measured.any():
        return []
    error = torch.where(stderr.isfinite(), stderr, 0.0)  # one sample: all are equally unsure
    bins = measured.sum()
    surely = mean[measured].mean(0).abs() - Z * error[measured].square().sum(0).sqrt() / bins  # (N,)
    sure = torch.where(measured[:, None], mean.abs() - Z * error, -torch.inf)  # (T, N)
    starts = torch.tensor([span.stop for _, span in spans(relevance.sites)])
    lean = relevance.lean()  # (P, T, K)
    at, ranges, rows = places(relevance.sites), bin_ranges(relevance.bin_edges), []
    for j in surely.argsort(descending=True, stable=True)[:top].tolist():
        i = int(torch.searchsorted(starts, j, right=True))
        t = int(sure[:, j].argmax())
        site, first = relevance.sites[i], int(starts[i]) - relevance.sites[i].width
        toward = relevance.relevance_sum[:, t, :, j] / relevance.count[:, t, None]  # (P, K)
        rows.append(
            {
                "site": site.name,
                "place": str(at[site]),
                "neuron": j - first,
                "share": float(pooled[j]),
                "sign": int(mean[t, j].sign()),
                "bin": {"number": t, **ranges[t]},
                "mean": number(mean[t, j]),
                "stderr": number(stderr[t, j]),
                "t": number(mean[t, j] / stderr[t, j]),
                "bins": [
                    {"mean": number(mean[b, j]), "stderr": number(stderr[b, j])} for b in range(len(relevance.count[0]))
                ],
                "profile": [
                    {
                        "label": label,
                        "lean": number(lean[p, t, 0]),
                        "relevance": {group: number(toward[p, k]) for k, group in enumerate(relevance.groups)},
                    }
                    for p, label in enumerate(relevance.labels)
                ],
            }
        )
    return rows


def _fold(values: Tensor, own: list[slice]) -> Tensor:
    """Sum over the neurons of each site: (..., N) -> (..., S)."""
    return torch.stack([values[..., span].sum(-1) for span in own], dim=-1)


def _net(sums: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over samples, and then over measured bins, of signed sums (P, T); its standard error between labels.

    The bins of a label are no independent witnesses, so each label's deviation is taken over all of its bins.
    """
    n = count.sum(0)  # (T,)
    seen = n > 0
    mean = sums.sum(0) / n
    deviation = ((sums - count * mean) / n)[:, seen].mean(1)  # (P,)
    labels = int((count.sum(1) > 0).sum())
    spread = deviation.square().sum() * labels / (labels - 1) if labels > 1 else torch.tensor(math.nan)
    return mean[seen].mean(), spread.sqrt()


def _half(shares: Tensor) -> int:
    """How many neurons carry half of it: the first that together reach it, largest first."""
    ordered = shares.sort(descending=True).values
    return int((ordered.cumsum(0) < 0.5 * ordered.sum()).sum()) + 1
