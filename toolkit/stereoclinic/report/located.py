"""Where in the denoiser the stereotype lies, and which neurons carry it: what `stereo inspect` says about relevance.

Neurons without any effect still show some |relevance|, because of sampling noise. So each share of |relevance| comes
with the share that noise alone would show, `chance`. For the mean m_j over P labels, with standard error s_j,

    E|m_j| = s_j sqrt(2 / pi) / c4(P)          if the true mean is 0 and m_j is normal

c4 corrects a standard deviation estimated from few values (Holtzman 1950); for twelve labels it is 0.98.
"""

import math
from typing import Any

import torch
from torch import Tensor

from stereoclinic.ddtd.relevance import Relevance
from stereoclinic.pipelines.sites import spans
from stereoclinic.report.anatomy import grouped, places
from stereoclinic.report.summary import bin_ranges, fold, number

#: Neurons are ranked by |mean| less this many standard errors, as in `sns.select.top_k`.
Z = 2.0


def relevance_summary(relevance: Relevance, top: int = 12) -> dict[str, Any]:
    """Where the stereotype lies, by kind of site, stream, block, site and timestep bin, and the neurons that carry it.

    Shares are of |mean stereotype relevance| within each timestep bin, then averaged over measured bins, so that all
    bins count alike. A value that could not be measured is None.

    Args:
        relevance: As `locate` returns it.
        top: Number of neurons to list.

    Returns:
        `kinds`, `streams` (empty where the model has one), `blocks` and `sites`: rows with `share` (they add up to 1),
        the share by `chance`, the same by bin, and `net` with its standard error. The net is the signed sum in units of
        the target; layers lie behind each other, so nets do not add up.
        `timesteps`: for each bin the number of samples x steps `n`, `labels`, `size` (the sum of |relevance| over
        neurons), its part by `chance`, and how many neurons carry `half` of it.
        `neurons`: the first `top`, see `_neurons`.
    """
    mean, stderr = relevance.stereotype()  # (T, N) each
    measured = mean.isfinite().all(1)
    size = torch.where(measured[:, None], mean.abs(), 0.0)
    total = size.sum(1, keepdim=True)  # (T, 1)
    shares = size / total.clamp_min(torch.finfo(size.dtype).tiny)
    chance = by_chance(stderr, relevance.count) / total  # (T, N), NaN where there is no standard error
    chance[~measured] = torch.nan
    pooled = shares.sum(0) / measured.sum().clamp_min(1)  # (N,)
    site_shares, site_chance = fold(shares, relevance.sites), fold(chance, relevance.sites)  # (T, S) each
    site_shares[~measured] = torch.nan
    site_sums = fold(relevance.stereotype_sum, relevance.sites)  # (P, T, S)

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
            "bins": [number(value) for value in share],
            "chance_bins": [number(value) for value in floor],
        }

    return {
        "axis": relevance.metadata.get("axis"),
        "groups": list(relevance.groups),
        "labels": list(relevance.labels),
        "bins": bin_ranges(relevance.bin_edges),
        "timesteps": _timesteps(relevance, measured, total, shares, chance),
        **grouped(relevance.sites, row),
        "neurons": _neurons(relevance, mean, stderr, pooled, top),
        "half": _half(pooled),
        "total": {
            "sites": len(relevance.sites),
            "neurons": len(pooled),
            "chance": number(chance.sum(1)[measured].mean()),
        },
        "metadata": relevance.metadata,
    }


def _timesteps(
    relevance: Relevance, measured: Tensor, total: Tensor, shares: Tensor, chance: Tensor
) -> list[dict[str, Any]]:
    """A row for each timestep bin: how much was measured, and how much relevance there is."""
    rows: list[dict[str, Any]] = []
    for t, bounds in enumerate(bin_ranges(relevance.bin_edges)):
        count = {"n": int(relevance.count[:, t].sum()), "labels": int((relevance.count[:, t] > 0).sum())}
        size, half = (number(total[t]), _half(shares[t])) if measured[t] else (None, None)
        rows.append({**bounds, **count, "size": size, "chance": number(chance[t].sum()), "half": half})
    return rows


def by_chance(stderr: Tensor, count: Tensor) -> Tensor:
    """The mean of |mean| where the true mean is 0.

    Args:
        stderr: (T, N) standard error of each mean, from the spread between labels.
        count: (P, T) samples x steps of each label.

    Returns:
        (T, N), NaN where there is no standard error.
    """
    n = torch.where((count > 0).sum(0) > 1, (count > 0).sum(0), count.sum(0)).double()  # (T,), labels
    # In logarithms: the gamma function of many samples overflows.
    c4 = (2 / (n - 1)).sqrt() * (torch.lgamma(n / 2) - torch.lgamma((n - 1) / 2)).exp()
    return stderr * math.sqrt(2 / math.pi) / c4[:, None]


def _neurons(relevance: Relevance, mean: Tensor, stderr: Tensor, pooled: Tensor, top: int) -> list[dict[str, Any]]:
    """The neurons with the largest |mean| - 2 standard errors over all bins.

    Each is described in the bin where this is largest; `profile` is its signed relevance by label. A mean above 0
    carries the stereotype, one below 0 counteracts it.
    """
    measured = mean.isfinite().all(1)
    if not measured.any():
        return []
    error = torch.where(stderr.isfinite(), stderr, 0.0)  # with one sample all are equally unsure
    bins = measured.sum()
    surely = mean[measured].mean(0).abs() - Z * error[measured].square().sum(0).sqrt() / bins  # (N,)
    by_bin = torch.where(measured[:, None], mean.abs() - Z * error, -torch.inf)  # (T, N)
    starts = torch.tensor([span.start for _, span in spans(relevance.sites)])
    lean, at, ranges = relevance.lean(), places(relevance.sites), bin_ranges(relevance.bin_edges)  # (P, T, K) lean
    rows = []
    for j in surely.argsort(descending=True, stable=True)[:top].tolist():
        i = int(torch.searchsorted(starts, j, right=True)) - 1
        t = int(by_bin[:, j].argmax())
        toward = relevance.relevance_sum[:, t, :, j] / relevance.count[:, t, None]  # (P, K)
        profile = [
            {
                "label": label,
                "lean": number(lean[p, t, 0]),
                "relevance": {group: number(toward[p, k]) for k, group in enumerate(relevance.groups)},
            }
            for p, label in enumerate(relevance.labels)
        ]
        rows.append(
            {
                "site": relevance.sites[i].name,
                "place": str(at[relevance.sites[i]]),
                "neuron": j - int(starts[i]),
                "share": float(pooled[j]),
                "sign": int(mean[t, j].sign()),
                "bin": {"number": t, **ranges[t]},
                "mean": number(mean[t, j]),
                "stderr": number(stderr[t, j]),
                "t": number(mean[t, j] / stderr[t, j]),
                "bins": [
                    {"mean": number(m), "stderr": number(s)} for m, s in zip(mean[:, j], stderr[:, j], strict=True)
                ],
                "profile": profile,
            }
        )
    return rows


def _net(sums: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over samples, then over measured bins, of signed sums (P, T), with its standard error between labels.

    The bins of a label are not independent, so each label's deviation is taken over all of its bins.
    """
    n = count.sum(0)  # (T,)
    seen = n > 0
    mean = sums.sum(0) / n
    deviation = ((sums - count * mean) / n)[:, seen].mean(1)  # (P,)
    labels = int((count.sum(1) > 0).sum())
    spread = deviation.square().sum() * labels / (labels - 1) if labels > 1 else torch.tensor(math.nan)
    return mean[seen].mean(), spread.sqrt()


def _half(shares: Tensor) -> int:
    """The smallest number of neurons that together carry half."""
    ordered = shares.sort(descending=True).values
    return int((ordered.cumsum(0) < 0.5 * ordered.sum()).sum()) + 1
