"""The lean and the off-axis cotangent: what their definitions promise."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from stereoclinic.ddtd.target import group_directions, lean, off_axis_cotangent


def predictions(groups: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(groups, 3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(st.integers(2, 5), st.integers(0, 50))
def test_a_group_s_own_prediction_leans_one_and_the_balanced_one_zero(groups: int, seed: int) -> None:
    each = predictions(groups, seed)
    balanced, directions = group_directions(each)
    for k in range(groups):
        torch.testing.assert_close(lean(each[k], balanced, directions)[k], torch.ones(3, dtype=torch.float64))
    assert lean(balanced, balanced, directions).abs().max() == 0


@given(st.floats(-3, 3))
def test_the_lean_is_linear_in_the_tilt_and_opposite_for_two_groups(tilt: float) -> None:
    each = predictions(2)
    balanced, directions = group_directions(each)
    found = lean(balanced + tilt * directions[0], balanced, directions)
    torch.testing.assert_close(found[0], torch.full((3,), tilt, dtype=torch.float64))
    torch.testing.assert_close(found[1], -found[0])


def test_the_lean_does_not_depend_on_the_scale_of_the_prediction() -> None:
    each, neutral = predictions(3), predictions(2, 9)[0]
    first = lean(neutral, *group_directions(each))
    torch.testing.assert_close(lean(neutral * 1e-4, *group_directions(each * 1e-4)), first)


def test_half_precision_predictions_lean_to_zero_in_sum() -> None:
    each, neutral = predictions(2).bfloat16(), predictions(2, 9)[0].bfloat16()
    found = lean(neutral, *group_directions(each))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[0], -found[1])


def test_a_model_that_does_not_know_the_groups_has_no_lean() -> None:
    same = predictions(2)[:1].expand(2, -1, -1, -1, -1)
    balanced, directions = group_directions(same)
    assert lean(balanced + 1, balanced, directions).tolist() == [[0, 0, 0], [0, 0, 0]]
    rows = [{"prompt": "a", "seed": i} for i in range(3)]
    assert off_axis_cotangent(directions, rows, 10.0).abs().max() == 0


def test_the_cotangent_is_off_every_axis_and_belongs_to_its_sample_and_timestep() -> None:
    _, directions = group_directions(predictions(3))
    rows = [{"prompt": "a", "seed": i} for i in range(3)]
    found = off_axis_cotangent(directions, rows, 500.0)
    overlap = (directions * found).flatten(2).sum(-1) / directions.flatten(2).norm(dim=-1)
    assert overlap.abs().max() < 1e-4
    turned = off_axis_cotangent(directions.flip(1), rows[::-1], 500.0).flip(0)
    torch.testing.assert_close(turned, found)
    assert not torch.equal(off_axis_cotangent(directions, rows, 499.0), found)


def test_it_is_the_same_whatever_the_default_dtype() -> None:
    _, directions = group_directions(predictions(3))
    rows = [{"prompt": "a", "seed": i} for i in range(3)]
    expected = off_axis_cotangent(directions, rows, 500.0)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(off_axis_cotangent(directions, rows, 500.0), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_its_mean_square_measures_a_movement_off_the_axis_in_units_of_d() -> None:
    _, directions = group_directions(predictions(2)[:, :1])
    movement = torch.randn(directions.shape[1:], dtype=torch.float64)
    along = directions[0, 0] / directions[0, 0].norm()
    movement = movement - (movement * along).sum() * along
    rows = [{"prompt": "a", "seed": i} for i in range(3000)]
    many = off_axis_cotangent(directions.expand(-1, 3000, -1, -1, -1), rows, 1.0)
    seen = (many * movement).flatten(1).sum(1).square()
    wanted = movement.square().sum() / directions[0, 0].square().sum()
    assert abs(seen.mean() - wanted) < 5 * seen.std() / len(rows) ** 0.5
