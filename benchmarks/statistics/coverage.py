"""The coverage of the intervals: a simulated generator with known shares is measured many times.

    python benchmarks/statistics/coverage.py --json benchmarks/statistics/results/coverage.json

Images are drawn from known shares of P prompts, read without error or with a known one, and measured as in a bench.
Coverage is the share of simulations whose 95 % interval contains the truth; 95 +- 1.5 % counts as nominal. The table
also gives the share of intervals that are entirely `above` or `below` the truth. The coverage of gaps depends on the
shares, so there are several models:

    parity      every prompt is fair                        planted   the embedded model's table of gender
    slight      every prompt is half a standard error off   mixed     half fair, half at 0.9 or 0.1
    one off     one prompt at 0.9, the others fair          far       every prompt at 0.85 or 0.15

At parity no interval can be below the true gap, so one that misses 2.5 % on each side elsewhere covers 97.5 % there.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import binomtest
from torch import Tensor

from stereoclinic.portraits.world import World
from stereoclinic.statistics.amplification import amplification
from stereoclinic.statistics.distances import frechet_within_groups, within_groups_ratio
from stereoclinic.statistics.gaps import gap_changes, gap_interval
from stereoclinic.statistics.intervals import (
    Interval,
    PairedDifference,
    bootstrap_interval,
    paired_difference_interval,
    share_statistic,
    wilson_interval,
)
from stereoclinic.statistics.reader_error import corrected_intervals
from stereoclinic.statistics.shares import Gap, fairness_discrepancy, kl_to_target, parity_gap

PROMPTS, NOMINAL, TOLERANCE = 12, 0.95, 0.015
FEATURES = 32  # of a picture; the k-th varies by 1 / k, as a network's do: few of them count
Measured = tuple[str, str, float, Interval | PairedDifference]  # what, method, truth, interval
Once = Callable[[torch.Generator], Iterator[Measured]]  # one simulation


def models(n: int) -> dict[str, Tensor]:
    """(P, 2) true shares by name."""
    off, half = 0.25 / n**0.5, PROMPTS // 2
    first = {
        "parity": [0.5] * PROMPTS,
        "slight": [0.5 + off, 0.5 - off] * half,
        "one off": [0.9] + [0.5] * (PROMPTS - 1),
        "mixed": [0.5] * half + [0.9, 0.1] * (half // 2),
        "planted": [each.share("gender") for each in World.load().occupations][:PROMPTS],
        "far": [0.85, 0.15] * half,
    }
    return {name: _two(torch.tensor(each, dtype=torch.float64)) for name, each in first.items()}


def _two(first: Tensor) -> Tensor:
    return torch.stack([first, 1 - first], dim=-1)


def luck(n: int, generator: torch.Generator) -> Tensor:
    """(P, n): what decides each image's group; the same seed has the same luck before and after."""
    return torch.rand(PROMPTS, n, generator=generator, dtype=torch.float64)


def read(shares: Tensor, fate: Tensor) -> Tensor:
    """Sure reads (P, n, K) of images of (P, K) shares."""
    bounds = shares.cumsum(-1)[:, None, :-1]
    return torch.nn.functional.one_hot((fate[..., None] > bounds).sum(-1), shares.shape[-1]).double()


def of_shares(n: int, generator: torch.Generator) -> Iterator[Measured]:
    """A share of any size, drawn anew each time: counts are few, so at one share alone coverage is high or low."""
    share = torch.rand((), generator=generator, dtype=torch.float64)
    hits = float(torch.binomial(torch.tensor(float(n), dtype=torch.float64), share, generator=generator))
    methods: dict[str, Callable[[], Interval]] = {
        "Wilson": lambda: wilson_interval(hits, n),
        "Clopper-Pearson": lambda: Interval(hits / n, *binomtest(int(hits), n).proportion_ci(NOMINAL, "exact")),
    }
    for name, method in methods.items():
        yield f"share, n = {n}", name, float(share), method()


def of_gaps(
    what: str, shares: Tensor, gap: Gap, n: int, draws: int, generator: torch.Generator, pooled: bool = False
) -> Iterator[Measured]:
    reads = read(shares, luck(n, generator))
    truth = float(gap(shares.mean(0) if pooled else shares, None).mean())
    settings = {"resamples": draws, "generator": generator}
    yield what, "percentile", truth, bootstrap_interval(reads, share_statistic(gap, pooled=pooled), **settings)
    yield what, "inverted", truth, gap_interval(reads, gap, pooled=pooled, **settings)


def of_soft_gaps(what: str, shares: Tensor, n: int, draws: int, generator: torch.Generator) -> Iterator[Measured]:
    """Reads of a reader that is sure to between 0.6 and 1: the true gap is that of the soft shares, by arithmetic."""
    hard = read(shares, luck(n, generator))
    sure = 0.6 + 0.4 * torch.rand(*hard.shape[:2], 1, generator=generator, dtype=torch.float64)
    reads = torch.where(hard > 0, sure, 1 - sure)
    truth = float(parity_gap(0.8 * shares + 0.2 * (1 - shares)).mean())
    settings = {"resamples": draws, "generator": generator}
    yield what, "percentile", truth, bootstrap_interval(reads, share_statistic(parity_gap, hard=False), **settings)
    yield what, "inverted", truth, gap_interval(reads, parity_gap, hard=False, **settings)


def of_changes(
    what: str, before: Tensor, after: Tensor, n: int, draws: int, generator: torch.Generator
) -> Iterator[Measured]:
    """Half of the images of a seed have the same luck before and after, the others luck of their own."""
    fate, fresh = luck(n, generator), luck(n, generator)
    kept = torch.rand(PROMPTS, n, generator=generator) < 0.5
    sides = read(before, fate), read(after, torch.where(kept, fate, fresh))
    truth = float((parity_gap(after) - parity_gap(before)).mean())
    settings = {"resamples": draws, "generator": generator}
    yield what, "percentile", truth, paired_difference_interval(*sides, share_statistic(parity_gap), **settings)
    yield what, "inverted", truth, gap_changes(*sides, {"gap": parity_gap}, **settings)["gap"]


def of_corrected(K: int, n: int, draws: int, generator: torch.Generator) -> Iterator[Measured]:
    """Shares from all over the simplex, read with errors of about 10 % that 100 pictures a group have measured."""
    shares = torch.rand(K, generator=generator, dtype=torch.float64).log()
    shares = shares / shares.sum()
    rates = 0.85 * torch.eye(K, dtype=torch.float64) + 0.15 / K
    rates[0] = torch.tensor([0.95] + [0.05 / (K - 1)] * (K - 1))
    known = torch.multinomial(rates, 100, replacement=True, generator=generator)  # (K, 100)
    confusion = torch.nn.functional.one_hot(known, K).sum(1).double()
    seen = torch.multinomial(shares @ rates, n, replacement=True, generator=generator)
    reads = torch.nn.functional.one_hot(seen, K).double()
    for k, interval in enumerate(corrected_intervals(reads, confusion, draws, generator=generator)):
        yield f"corrected share, K = {K}, n = {n}", "inverted matrix", float(shares[k]), interval
    for k in range(K):
        as_read = wilson_interval(float(reads[:, k].sum()), n)
        yield f"corrected share, K = {K}, n = {n}", "as read (Wilson)", float(shares[k]), as_read


def of_amplification(shares: Tensor, n: int, draws: int, generator: torch.Generator) -> Iterator[Measured]:
    """A model that exaggerates a reference by half."""
    labels = [str(p) for p in range(PROMPTS)]
    reference = 0.5 + (shares - 0.5) / 1.5
    table = {label: {"a": row[0], "b": row[1]} for label, row in zip(labels, reference.tolist(), strict=True)}
    reads = read(shares, luck(n, generator))
    found = amplification(reads, labels, ["a", "b"], table, resamples=draws, generator=generator)
    excess = float((parity_gap(shares) - parity_gap(reference)).mean())
    yield f"amplification, n = {n}", "slope", 1.5, found.slope
    yield f"amplification, n = {n}", "excess gap", excess, found.excess


def people(shares: Tensor, moved: float, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Features (P, n, F) and cells (P, n) of pictures of these shares of two groups, all of them moved."""
    cells = 2 * torch.arange(PROMPTS)[:, None] + read(shares, luck(n, generator)).argmax(-1)
    centres = torch.randn(2 * PROMPTS, FEATURES, generator=torch.Generator().manual_seed(0))
    features = centres[cells] + torch.randn(PROMPTS, n, FEATURES, generator=generator)
    return (features + moved) / torch.arange(1, FEATURES + 1), cells


def three_samples(share: float, moved: float, n: int, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Arm, reference and floor."""
    treated, fair = (_two(torch.full((PROMPTS,), each, dtype=torch.float64)) for each in (share, 0.5))
    return [people(shares, by, n, generator) for shares, by in ((treated, moved), (fair, 0.0), (fair, 0.0))]


@cache
def usual_ratio(share: float, moved: float, n: int) -> float:
    """What the distance over its floor comes to on other seeds, in the mean of its logarithm: of 2,000 of them."""
    generator, total = torch.Generator().manual_seed(1), 0.0
    for _ in range(2000):
        mine, others, chance = (
            (features.flatten(0, 1), cells.flatten()) for features, cells in three_samples(share, moved, n, generator)
        )
        distance, floor = frechet_within_groups(mine, others, chance, 2 * PROMPTS)
        total += math.log(distance / floor)
    return math.exp(total / 2000)


def of_distances(what: str, share: float, moved: float, n: int, generator: torch.Generator) -> Iterator[Measured]:
    """Pictures whose features are moved by so many standard deviations, or not at all."""
    found = within_groups_ratio(*three_samples(share, moved, n, generator), 2 * PROMPTS)
    assert found is not None
    yield what, "jackknife", usual_ratio(share, moved, n), found


def everything(draws: int) -> list[tuple[str, Once]]:
    """What is measured, by name."""
    small, three = models(25), 1 / 3
    planted, fair = small["planted"], small["parity"]
    of_three = torch.tensor([[three] * 3] * 6 + [[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]] * 3, dtype=torch.float64)
    found: list[tuple[str, Once]] = [(f"share {n}", partial(of_shares, n)) for n in (25, 100)]

    def add(what: str, once: Callable[..., Iterator[Measured]], *rest: object, **options: bool) -> None:
        found.append((what, partial(once, what, *rest, draws, **options)))

    for n in (25, 100):
        for name, shares in models(n).items():
            if n == 25 or name in ("parity", "mixed", "planted"):
                add(f"parity gap, {name}, n = {n}", of_gaps, shares, parity_gap, n)
    add("fairness discrepancy, planted, n = 25", of_gaps, planted, fairness_discrepancy, 25)
    add("KL, planted, n = 25", of_gaps, planted, kl_to_target, 25)
    add("parity gap, K = 3, mixed, n = 25", of_gaps, of_three, parity_gap, 25)
    for name in ("parity", "planted"):
        add(f"pooled parity gap, {name}, n = 25", of_gaps, small[name], parity_gap, 25, pooled=True)
        add(f"soft parity gap, {name}, n = 25", of_soft_gaps, small[name], 25)
    for name, after in {"no change": planted, "halved": 0.5 + (planted - 0.5) / 2, "to parity": fair}.items():
        add(f"change of the gap, planted, {name}, n = 25", of_changes, planted, after, 25)
    add("change of the gap, from parity to parity, n = 25", of_changes, fair, fair, 25)
    found += [(f"corrected share, K = {K}", partial(of_corrected, K, 100, draws)) for K in (2, 3)]
    for moved, shares in ((0.0, 0.5), (0.0, 0.9), (0.2, 0.5), (0.2, 0.9), (0.5, 0.5)):
        what = f"distance within groups over its floor, moved {moved:g}, shares {shares:g}, n = 25"
        found.append((what, partial(of_distances, what, shares, moved, 25)))
    return [*found, ("amplification", partial(of_amplification, planted, 25, draws))]


def simulate(once: Once, simulations: int, seed: int) -> list[dict]:
    """Coverage of each method over many simulations."""
    generator = torch.Generator().manual_seed(seed)
    tally: dict[tuple[str, str], list[float]] = {}
    for _ in range(simulations):
        for what, method, truth, interval in once(generator):
            counts = tally.setdefault((what, method), [0, 0, 0, 0.0])
            counts[0] += 1
            counts[1] += interval.low > truth + 1e-9
            counts[2] += interval.high < truth - 1e-9
            counts[3] += interval.high - interval.low
    return [
        {
            "what": what,
            "method": method,
            "intervals": int(count),
            "coverage": 1 - (above + below) / count,
            "above": above / count,
            "below": below / count,
            "width": width / count,
        }
        for (what, method), (count, above, below, width) in tally.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=2000)
    parser.add_argument("--draws", type=int, default=300, help="resamples of each interval; a bench takes more")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="measure what has one of these in its name")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict] = []
    for name, once in everything(options.draws):
        if not options.only or any(part in name for part in options.only):
            rows += simulate(once, options.simulations, options.seed)
            print(f"{name} measured", file=sys.stderr)
            if options.json:  # after each, for the whole takes an hour
                options.json.parent.mkdir(parents=True, exist_ok=True)
                data = {"simulations": options.simulations, "draws": options.draws, "seed": options.seed, "rows": rows}
                options.json.write_text(json.dumps(data, indent=2) + "\n")
    table = Table("", "method", "coverage", "above", "below", "width", "95 +- 1.5 %")
    for row in rows:
        off = row["coverage"] - NOMINAL
        verdict = "yes" if abs(off) <= TOLERANCE else "more" if off > 0 else "LESS"
        figures = [f"{row[key]:.1%}" for key in ("coverage", "above", "below")]
        table.add_row(row["what"], row["method"], *figures, f"{row['width']:.3f}", verdict)
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
