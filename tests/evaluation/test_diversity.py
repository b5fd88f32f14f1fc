"""Laws of the diversity within cells."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import pdist

from stereoclinic.errors import InputError
from stereoclinic.statistics.distances import diversity_within, pairwise_distance


def sample(seed: int, n: int = 20, cells: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    own = torch.arange(n) % cells
    return torch.randn(n, 4, generator=generator) + 10 * own[:, None], own


@given(seed=st.integers(0, 2**31), n=st.integers(2, 15))
def test_the_distance_of_pairs_is_that_of_scipy_and_scales_with_features(seed, n):
    features, _ = sample(seed, n)
    assert pairwise_distance(features) == pytest.approx(pdist(features.numpy()).mean(), rel=1e-5)
    assert pairwise_distance(3 * features + 7) == pytest.approx(3 * pairwise_distance(features), rel=1e-4)


@given(seed=st.integers(0, 2**31))
def test_the_order_of_images_and_the_names_of_cells_do_not_matter(seed):
    (features, cells), reference = sample(seed), sample(seed + 1)
    order = torch.randperm(len(cells), generator=torch.Generator().manual_seed(seed))
    expected = pytest.approx(diversity_within(features, cells, *reference))
    assert diversity_within(features[order], cells[order], *reference) == expected
    assert diversity_within(features, 5 - cells, reference[0], 5 - reference[1]) == expected


def test_how_far_cells_are_apart_does_not_matter_and_one_face_a_cell_shows():
    features, cells = sample(0, 300)
    judged, compared = diversity_within(features, cells, *sample(1, 300))
    assert judged == pytest.approx(compared, rel=0.1)  # of one distribution
    same = 10.0 * cells[:, None].expand(-1, 4)
    assert diversity_within(same, cells, *sample(1))[0] == 0


def test_a_change_of_groups_alone_moves_both_sides_alike():
    """Cells of unlike diversity: a sample that leans to the wide one is compared with a reference that does."""
    generator = torch.Generator().manual_seed(0)

    def people(narrow: int, wide: int) -> tuple[torch.Tensor, torch.Tensor]:
        cells = torch.cat([torch.zeros(narrow), torch.ones(wide)]).long()
        return torch.randn(narrow + wide, 4, generator=generator) * (1 + 9 * cells[:, None]), cells

    judged, compared = diversity_within(*people(50, 350), *people(200, 200))
    assert judged == pytest.approx(compared, rel=0.1)


def test_cells_with_a_single_picture_on_a_side_are_left_out():
    features, cells = torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([0, 0, 1])
    assert diversity_within(features, cells, torch.tensor([[0.0], [2.0]]), torch.tensor([0, 0])) == (1, 2)
    nothing = diversity_within(features, cells, torch.tensor([[0.0]]), torch.tensor([0]))
    assert all(math.isnan(value) for value in nothing)


def test_wrong_input_is_refused():
    with pytest.raises(InputError, match="at least two images"):
        pairwise_distance(torch.zeros(1, 3))
    with pytest.raises(InputError, match="integers"):
        diversity_within(torch.zeros(3, 2), torch.zeros(3), torch.zeros(3, 2), torch.zeros(3).long())
