"""Laws of the exact tests of single prompts, and their values against scipy."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from stereoclinic.errors import InputError
from stereoclinic.statistics.significance import prompt_p_values


@given(ups=st.integers(0, 60), downs=st.integers(0, 60))
def test_of_one_prompt_and_two_groups_it_is_the_sign_test_of_scipy(ups, downs):
    before = _reads([[0] * ups + [1] * downs + [0, 1]])
    after = _reads([[1] * ups + [0] * downs + [0, 1]])
    expected = binomtest(ups, ups + downs).pvalue if ups + downs else 1.0
    assert prompt_p_values(before, after) == pytest.approx([expected], abs=1e-12)


def _reads(groups: list[list[int]], K: int = 2) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(groups), K).double()


def test_prompts_are_tested_one_by_one_by_the_images_that_moved():
    before = _reads([[0] * 10, [0] * 5 + [1] * 5])
    after = _reads([[1] * 8 + [0] * 2, [1] * 5 + [0] * 5])
    assert prompt_p_values(before, after) == pytest.approx([2 / 2**8, 1.0])
    assert prompt_p_values(before, before) == [1.0, 1.0]


@given(seed=st.integers(0, 2**31), K=st.integers(2, 4))
def test_p_values_ignore_the_order_of_images_and_groups_and_of_before_and_after(seed, K):
    generator = torch.Generator().manual_seed(seed)
    before, after = (torch.rand(3, 12, K, generator=generator).softmax(-1) for _ in range(2))
    images, groups = torch.randperm(12, generator=generator), torch.randperm(K, generator=generator)
    expected = pytest.approx(prompt_p_values(before, after))
    assert prompt_p_values(after, before) == expected
    assert prompt_p_values(before[:, images][..., groups], after[:, images][..., groups]) == expected


@pytest.mark.parametrize("K", [2, 3])
def test_no_change_is_rejected_at_most_as_often_as_the_level(K):
    generator = torch.Generator().manual_seed(1)
    shares = torch.full((K,), 1 / K)
    draws = torch.multinomial(shares, 2 * 2000 * 25, replacement=True, generator=generator).view(2, 2000, 25)
    p_values = prompt_p_values(*torch.nn.functional.one_hot(draws, K).double())
    assert sum(p <= 0.05 for p in p_values) / 2000 <= 0.06


def test_wrong_input_is_refused():
    with pytest.raises(InputError, match="same prompts and seeds"):
        prompt_p_values(torch.rand(1, 3, 2), torch.rand(1, 4, 2))
