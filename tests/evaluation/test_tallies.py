"""Accumulated side effects in batches and merged over ranks equal the pure functions on everything at once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stereoclinic.evaluation.metrics.tallies import AxisDrift, FrechetFeatures, GroupFidelity, UnsureRate

from stereoclinic.errors import Incomplete, InputError
from stereoclinic.statistics.distances import frechet_between
from stereoclinic.statistics.intervals import wilson_interval
from stereoclinic.statistics.shares import sdtv, shares_from_reads, top_group, unsure_rate

SEEDS = st.integers(0, 2**31)
P, K, D, N = 2, 3, 4, 24


def everything(seed: int) -> dict[str, torch.Tensor]:
    """N rows: reads before and after, features on two sides, prompts and wanted groups that each occur."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "before": (2 * torch.randn(N, K, generator=generator, dtype=torch.float64)).softmax(-1),
        "after": (2 * torch.randn(N, K, generator=generator, dtype=torch.float64)).softmax(-1),
        "one": torch.randn(N, D, generator=generator, dtype=torch.float64),
        "other": 1 + torch.randn(N, D, generator=generator, dtype=torch.float64),
        "prompts": torch.arange(N) % P,
        "wanted": torch.arange(N) % K,
    }


def feed(metrics: dict, data: dict[str, torch.Tensor], rows: torch.Tensor) -> None:
    metrics["fidelity"].update(data["wanted"][rows], data["after"][rows])
    metrics["unsure"].update(data["after"][rows])
    metrics["drift"].update(data["prompts"][rows], data["before"][rows], treated=False)
    metrics["drift"].update(data["prompts"][rows], data["after"][rows], treated=True)
    metrics["frechet"].update(data["one"][rows], reference=False)
    metrics["frechet"].update(data["other"][rows], reference=True)


def fresh() -> dict:
    return {
        "fidelity": GroupFidelity(K),
        "unsure": UnsureRate(),
        "drift": AxisDrift(P, K),
        "frechet": FrechetFeatures(D),
    }


@given(seed=SEEDS, ranks=st.integers(1, 3), batch=st.integers(1, 7))
def test_batches_over_ranks_equal_the_pure_functions_on_everything(seed, ranks, batch):
    data = everything(seed)
    each = [fresh() for _ in range(ranks)]
    for i, rows in enumerate(torch.arange(N).split(batch)):
        feed(each[i % ranks], data, rows)
    whole, *others = each
    for other in others:
        for name, metric in whole.items():
            metric.merge_state(other[name])

    hits = top_group(data["after"]).gather(1, data["wanted"][:, None])[:, 0]
    rate = wilson_interval(float(hits.sum()), N)
    found = whole["fidelity"].compute()
    assert found["all"].tolist() == pytest.approx([rate.estimate, rate.low, rate.high])
    assert found["groups"].tolist() == pytest.approx([float(hits[data["wanted"] == k].mean()) for k in range(K)])
    assert float(whole["unsure"].compute()) == pytest.approx(float(unsure_rate(data["after"])))
    sides = [
        torch.stack([shares_from_reads(data[side][data["prompts"] == p], hard=True) for p in range(P)])
        for side in ("after", "before")
    ]
    assert float(whole["drift"].compute()) == pytest.approx(float(sdtv(*sides).mean()))
    assert float(whole["frechet"].compute()) == pytest.approx(frechet_between(data["one"], data["other"]), rel=1e-6)


def test_states_stay_in_double_precision_and_reset():
    metrics = fresh()
    torch.nn.ModuleList(metrics.values()).to(torch.bfloat16)
    feed(metrics, everything(0), torch.arange(N))
    for metric in metrics.values():
        assert all(getattr(metric, name).dtype == torch.float64 for name in metric._defaults)
        metric.reset()
        with pytest.raises(Incomplete), pytest.warns(UserWarning, match="before the ``update``"):
            metric.compute()


def test_an_empty_batch_adds_nothing():
    metrics, again = fresh(), fresh()
    for each in (metrics, again):
        feed(each, everything(0), torch.arange(N))
    feed(again, everything(0), torch.arange(0))
    assert torch.equal(metrics["fidelity"].compute()["all"], again["fidelity"].compute()["all"])
    for name in ("unsure", "drift", "frechet"):
        assert torch.equal(metrics[name].compute(), again[name].compute())


def test_wrong_batches_are_refused():
    metrics, data = fresh(), everything(0)
    with pytest.raises(InputError, match="from 0 to 2"):
        metrics["fidelity"].update(torch.tensor([3]), data["after"][:1])
    with pytest.raises(InputError, match=r"expected \(2, 3\)"):
        metrics["fidelity"].update(torch.tensor([0, 1]), data["after"][:1])
    with pytest.raises(InputError, match="from 0 to 1"):
        metrics["drift"].update(torch.tensor([2]), data["after"][:1], treated=True)
    with pytest.raises(InputError, match=r"expected \(B, 4\)"):
        metrics["frechet"].update(torch.zeros(3, 5), reference=True)
    for wrong in (lambda: GroupFidelity(1), lambda: AxisDrift(0, 2), lambda: UnsureRate(2), lambda: FrechetFeatures(0)):
        with pytest.raises(InputError):
            wrong()
