"""Sums that add up whatever the batches and ranks, and a file that gives back what went in."""

import pytest
import torch

from stereoclinic.ddtd.relevance import SKETCHES, STATES, Relevance, RelevanceSums
from stereoclinic.ddtd.step import Measured
from stereoclinic.errors import InputError
from stereoclinic.io.tensors import save_tensors
from stereoclinic.pipelines.sites import Site

P, T, K, N, M = 3, 2, 2, 5, 4
SITES = [Site("a.ff.net.2", "ff", 3), Site("b.conv2", "conv", 2)]


def step(count: int, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    labels = torch.randint(P, (count,), generator=generator)
    seeds = torch.arange(count)
    return labels, seeds, random(K, count), random(K, count, N), random(count, N), random(K, count, N)


def measured(lean, rows, off, means, faults: dict[int, str] | None = None) -> Measured:
    return Measured(300.0, lean, lean, rows, off, means, faults or {})


def summed(*batches: tuple[torch.Tensor, ...], faults: dict[int, str] | None = None) -> RelevanceSums:
    sums = RelevanceSums(P, T, K, N, M)
    for labels, seeds, *rest in batches:
        sums.update(labels, seeds, 1, 2, measured(*rest, faults))
    return sums


def relevance(**changed: object) -> Relevance:
    parts = {"metadata": {"axis": "gender"}} | summed(step(40, 0)).tensors | changed
    edges = torch.tensor([1000.0, 500.0, 0.0], dtype=torch.float64)
    parts = {"timesteps": torch.tensor([900.0, 600.0, 300.0, 100.0], dtype=torch.float64)} | parts
    return Relevance(SITES, ("female", "male"), ["doctor", "nurse", "chef"], edges, **parts)  # type: ignore[arg-type]


def test_batches_add_up_to_one_pass() -> None:
    whole = step(12, 0)
    halves = [
        (*(w[part] for w in whole[:2]), *(w[:, part] for w in whole[2:4]), whole[4][part], whole[5][:, part])
        for part in (slice(0, 5), slice(5, 12))
    ]
    one, two = summed(whole).tensors, summed(*halves).tensors
    for name in STATES:
        torch.testing.assert_close(two[name], one[name], rtol=1e-13, atol=1e-13)


def test_sums_stay_float64_whatever_the_precision_of_the_run() -> None:
    labels, seeds, *rest = step(12, 0)
    sums = RelevanceSums(P, T, K, N, M)
    sums.update(labels, seeds, 1, 2, measured(*(x.bfloat16() for x in rest)))
    assert all(value.dtype == torch.float64 for value in sums.tensors.values())


def test_means_are_those_of_the_samples() -> None:
    labels, _, lean, rows, off, means = step(40, 0)
    found = relevance()
    mine = labels == 1
    torch.testing.assert_close(found.lean()[1, 1], lean[:, mine].double().mean(1))
    torch.testing.assert_close(found.rows()[1, 1], rows[:, mine].double().mean(1))
    torch.testing.assert_close(found.collateral[1, 1].sum(0), off[mine].double().sum(0))
    torch.testing.assert_close(found.roots()[:, 1], means.double().mean(1))
    stereotype = (lean.sign()[..., None] * rows).double().mean(0)
    mean, error = found.stereotype()
    torch.testing.assert_close(mean[1], stereotype.mean(0))
    assert error[0].isnan().all()  # nothing was measured in that bin
    torch.testing.assert_close(found.lean_stderr()[1, 1], lean[:, mine].double().std(1) / mine.sum() ** 0.5)


def test_the_error_of_the_stereotype_is_that_of_as_many_labels_not_of_as_many_samples() -> None:
    labels, seeds, lean, rows, off, means = step(30, 0)
    labels = torch.arange(30) % P
    tilt = (lean.sign()[..., None] * rows).double().mean(0)
    by_label = torch.stack([tilt[labels == p].mean(0) for p in range(P)])
    found = relevance(**summed((labels, seeds, lean, rows, off, means)).tensors)
    torch.testing.assert_close(found.stereotype()[1][1], by_label.std(0) / P**0.5)
    # Many more samples of the same labels, each a copy: nothing is known that was not known before.
    copied = labels.repeat(9), seeds.repeat(9), *(x.repeat(1, 9) for x in (lean,)), rows.repeat(1, 9, 1)
    copies = relevance(**summed((*copied, off.repeat(9, 1), means.repeat(1, 9, 1))).tensors)
    torch.testing.assert_close(copies.stereotype()[1][1], found.stereotype()[1][1])


def test_a_single_label_has_only_its_samples_to_go_by() -> None:
    labels, *rest = step(30, 0)
    found = relevance(**summed((torch.ones_like(labels), *rest)).tensors)
    tilt = (rest[1].sign()[..., None] * rest[2]).double().mean(0)
    torch.testing.assert_close(found.stereotype()[1][1], tilt.std(0) / 30**0.5)


def test_sketches_of_off_axis_rows_estimate_their_mean_square() -> None:
    """Rows come with random signs, so the squared sums of the sketches add up to the sum of the squares on average."""
    generator = torch.Generator().manual_seed(0)
    row, damping = torch.randn(N, generator=generator), torch.rand(N, generator=generator)
    found = []
    for _ in range(400):
        signs = torch.randint(2, (16, 1), generator=generator) * 2.0 - 1
        zeros = torch.zeros(K, 16), torch.zeros(K, 16, N)
        sums = RelevanceSums(1, 1, K, N, 1)
        step = measured(*zeros, signs * row, zeros[1])
        sums.update(torch.zeros(16, dtype=torch.int64), torch.arange(16), 0, 0, step)
        found.append(float((sums.tensors["collateral"][0, 0] @ damping.double()).square().sum() / 16))
    seen, wanted = torch.tensor(found), float((row @ damping).square())
    assert abs(seen.mean() - wanted) < 4 * seen.std() / len(found) ** 0.5
    assert sums.tensors["collateral"].shape == (1, 1, SKETCHES, N)


def test_the_curve_holds_the_leans_of_each_measured_step_with_their_error_over_samples() -> None:
    labels, _, lean, *_ = step(40, 0)
    found, mine = relevance(), labels == 2
    torch.testing.assert_close(found.curve()[2, 2], lean[:, mine].double().mean(1))
    torch.testing.assert_close(found.curve_stderr()[2, 2], lean[:, mine].double().std(1) / mine.sum() ** 0.5)
    assert found.curve()[:, [0, 1, 3]].isnan().all()  # nothing was measured there


def test_a_sample_with_faults_leaves_no_trace() -> None:
    whole = step(12, 0)
    broken = [each.clone() for each in whole]
    broken[2][:, 3], broken[3][:, 3], broken[4][3] = torch.nan, torch.inf, torch.nan
    kept = [i for i in range(12) if i != 3]
    others = (*(w[kept] for w in whole[:2]), *(w[:, kept] for w in whole[2:4]), whole[4][kept], whole[5][:, kept])
    found, wanted = summed(tuple(broken), faults={3: "activations of a.ff.net.2"}).tensors, summed(others).tensors
    for name in STATES:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-13, atol=1e-13)


def test_a_file_of_an_older_format_is_refused(tmp_path) -> None:
    found = relevance()
    tensors = {name: getattr(found, name) for name in STATES}
    save_tensors(tmp_path / "r.safetensors", "relevance", 1, tensors, {})
    with pytest.raises(InputError, match="version 1"):
        Relevance.load(tmp_path / "r.safetensors")


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_a_file_gives_back_what_went_in(tmp_path, ending: str) -> None:
    first = relevance()
    first.save(tmp_path / f"r{ending}")
    again = Relevance.load(tmp_path / f"r{ending}")
    assert (again.sites, again.groups, again.labels) == (first.sites, first.groups, first.labels)
    assert again.metadata["axis"] == "gender"
    for name in STATES:
        torch.testing.assert_close(getattr(again, name), getattr(first, name), rtol=1e-6, atol=1e-7)


def test_what_is_not_finite_or_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="lean_sum is not finite"):
        relevance(lean_sum=torch.full((P, T, K), torch.nan))
    with pytest.raises(InputError, match="shape"):
        relevance(relevance_sum=torch.zeros(P, T, K, N + 1))
    with pytest.raises(InputError, match="stereotype_sum of shape"):
        relevance(stereotype_sum=torch.zeros(T, N))


def test_a_device_with_less_memory_than_the_machine_refuses_what_would_not_fit_there(monkeypatch: pytest.MonkeyPatch):
    """`meta` stands for a GPU, of which there need be none."""
    sums = RelevanceSums(labels=3, bins=2, groups=2, neurons=5, steps=4)
    monkeypatch.setattr(
        "stereoclinic.ddtd.relevance.memory_of", lambda device: 1000 if device.type == "meta" else 2**40
    )
    with pytest.raises(InputError, match=r"3 labels of .* MiB each do not fit"):
        sums.to("meta")
    assert sums.tensors["count"].device.type == "cpu"
