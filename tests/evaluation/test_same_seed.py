"""Laws of the structural similarity of pairs."""

import pytest
import torch

from stereoclinic.errors import InputError
from stereoclinic.evaluation.instruments import structural_similarity


def pictures(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_a_picture_is_like_itself_and_unlike_noise_and_the_order_of_a_pair_does_not_matter():
    one, other = pictures(0, 3, 2, 3, 32, 32), pictures(1, 3, 2, 3, 32, 32)
    torch.testing.assert_close(structural_similarity(one, one), torch.ones(3, 2, dtype=torch.float64))
    apart = structural_similarity(one, other)
    assert apart.shape == (3, 2) and apart.abs().max() < 0.2
    torch.testing.assert_close(apart, structural_similarity(other, one))


def test_pairs_are_compared_one_by_one_and_bytes_like_numbers():
    one, other = pictures(0, 70, 3, 16, 16), pictures(1, 70, 3, 16, 16)
    together = structural_similarity(one, other)  # in two parts
    assert together[69].item() == pytest.approx(structural_similarity(one[69], other[69]).item(), abs=1e-6)
    torch.testing.assert_close(structural_similarity(one / 255, other / 255), together)


def test_more_of_a_change_is_less_similar():
    one, noise = pictures(0, 1, 3, 32, 32) / 255, pictures(1, 1, 3, 32, 32) / 255
    values = [structural_similarity(one, (1 - part) * one + part * noise).item() for part in (0, 0.1, 0.3, 0.6)]
    assert values == sorted(values, reverse=True)


def test_it_agrees_with_the_formula_on_flat_pictures():
    """Without any structure what is left is the comparison of luma: (2 x y + c) / (x^2 + y^2 + c)."""
    x, y, c = 0.2, 0.6, 0.01**2
    flat = [torch.full((3, 24, 24), value) for value in (x, y)]
    assert structural_similarity(*flat).item() == pytest.approx((2 * x * y + c) / (x**2 + y**2 + c), rel=1e-3)


def test_large_pictures_are_averaged_down_first():
    small = [pictures(seed, 3, 256, 256) / 255 for seed in (0, 1)]
    large = [each.repeat_interleave(2, -1).repeat_interleave(2, -2) for each in small]
    assert structural_similarity(*large).item() == pytest.approx(structural_similarity(*small).item(), abs=1e-5)


def test_wrong_input_is_refused():
    with pytest.raises(InputError, match="one shape"):
        structural_similarity(pictures(0, 3, 16, 16), pictures(0, 3, 16, 17))
    with pytest.raises(InputError, match="one type"):
        structural_similarity(pictures(0, 3, 16, 16), pictures(0, 3, 16, 16).float())
    with pytest.raises(InputError, match="11 or more"):
        structural_similarity(pictures(0, 3, 8, 16), pictures(0, 3, 8, 16))
