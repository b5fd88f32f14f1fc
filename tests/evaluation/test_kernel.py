"""Laws of the kernel distance, and both distances against torchmetrics fed the same features."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from stereoclinic.errors import InputError
from stereoclinic.statistics.distances import frechet_between, kernel_distance

SEEDS = st.integers(0, 2**31)


def features(seed: int, n: int, d: int = 8, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) + shift


class AsGiven(torch.nn.Module):
    """A feature network that hands its input on, so that torchmetrics measures the features we give it."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


@pytest.mark.parametrize("d", [1, 8, 32])
def test_frechet_distance_is_that_of_torchmetrics(d):
    a, b = features(0, 120, d), features(1, 90, d, shift=0.3)
    metric = FrechetInceptionDistance(feature=AsGiven(d)).set_dtype(torch.float64)
    metric.update(a, real=True)
    metric.update(b, real=False)
    assert frechet_between(a, b) == pytest.approx(metric.compute().item(), abs=1e-5)


@pytest.mark.parametrize("d", [1, 8, 32])
@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`")
def test_kernel_distance_is_that_of_torchmetrics(d):
    a, b = features(0, 90, d), features(1, 90, d, shift=0.3)
    metric = KernelInceptionDistance(feature=AsGiven(d), subsets=1, subset_size=90)
    metric.update(a, real=True)
    metric.update(b, real=False)
    assert kernel_distance(a, b) == pytest.approx(metric.compute()[0].item(), abs=1e-5)


@given(seed=SEEDS, n=st.integers(2, 12), m=st.integers(2, 12))
def test_it_is_the_mean_over_pairs_and_symmetric(seed, n, m):
    a, b = features(seed, n, 3), features(seed + 1, m, 3)

    def k(x: torch.Tensor, y: torch.Tensor) -> float:
        return float((x @ y / 3 + 1) ** 3)

    among = [
        sum(k(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j) / (len(x) * (len(x) - 1))
        for x in (a, b)
    ]
    between = sum(k(x, y) for x in a for y in b) / (n * m)
    assert kernel_distance(a, b) == pytest.approx(sum(among) - 2 * between, rel=1e-9, abs=1e-9)
    assert kernel_distance(a, b) == pytest.approx(kernel_distance(b, a), rel=1e-9, abs=1e-9)


@given(seed=SEEDS)
def test_a_rotation_and_the_order_of_images_change_nothing(seed):
    a, b = features(seed, 10), features(seed + 1, 14)
    rotation = torch.linalg.qr(features(seed + 2, 8)).Q
    expected = pytest.approx(kernel_distance(a, b), rel=1e-6, abs=1e-9)
    assert kernel_distance(a @ rotation, b @ rotation) == expected
    assert kernel_distance(a.flip(0), b) == expected


def test_two_samples_of_one_distribution_are_no_distance_apart_on_average_at_any_size():
    for n in (5, 40):
        values = torch.tensor([kernel_distance(features(2 * i, n), features(2 * i + 1, n)) for i in range(300)])
        assert abs(values.mean()) < 3 * values.std() / 300**0.5
        assert (values < 0).any()
    assert kernel_distance(features(0, 40), features(1, 40, shift=1.0)) > 0.5


def test_blocks_of_the_kernel_add_up_to_the_whole(monkeypatch):
    a, b = features(0, 30), features(1, 20)
    expected = kernel_distance(a, b)
    monkeypatch.setattr("stereoclinic.statistics.distances._ROWS", 7)
    assert kernel_distance(a, b) == pytest.approx(expected)


def test_wrong_input_is_refused():
    with pytest.raises(InputError, match="two images"):
        kernel_distance(features(0, 1), features(1, 5))
    with pytest.raises(InputError, match=r"\(n, d\) and \(m, d\)"):
        kernel_distance(features(0, 5, 3), features(1, 5, 4))
    with pytest.raises(InputError, match="not finite"):
        kernel_distance(features(0, 5) / 0, features(1, 5))
