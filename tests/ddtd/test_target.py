"""The lean, the other targets and the off-axis cotangent: what their definitions promise."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from hypothesis import given
from hypothesis import strategies as st

from stereoclinic.ddtd.lean import (
    TARGETS,
    Classifier,
    Point,
    contrast,
    get_target,
    group_directions,
    lean,
    off_axis_cotangent,
)
from stereoclinic.errors import InputError

ALPHA, SIGMA = 0.6, 0.8
# What a target asks of a pipeline: clean latents of an epsilon prediction, and pictures, brighter than they may be.
PIPE = SimpleNamespace(
    scheduler=SimpleNamespace(config={"prediction_type": "epsilon"}, alphas_cumprod={500: ALPHA**2}),
    vae=SimpleNamespace(
        config=FrozenDict(scaling_factor=1.0), dtype=torch.float64, decode=lambda latents, return_dict: (2 * latents,)
    ),
)


def predictions(groups: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(groups, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


LATENTS = predictions(1, 8).view(3, 2, 4, 4)
MODEL: Any = SimpleNamespace(pipe=PIPE)
CALL: Any = SimpleNamespace(latents=lambda part: LATENTS[part], sign=1, timestep=500.0)


@given(st.integers(2, 5), st.integers(0, 50))
def test_a_group_s_own_prediction_leans_one_and_the_balanced_one_zero(groups: int, seed: int) -> None:
    each = predictions(groups, seed)
    balanced, directions = group_directions(each)
    torch.testing.assert_close(balanced, each.mean(0))
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
    same = predictions(2)[:1].expand(2, -1, -1)
    balanced, directions = group_directions(same)
    assert lean(balanced + 1, balanced, directions).tolist() == [[0, 0, 0], [0, 0, 0]]
    rows = [{"prompt": "a", "seed": i} for i in range(3)]
    assert off_axis_cotangent(directions, rows, 10.0).abs().max() == 0


def test_the_cotangent_is_off_every_axis_and_belongs_to_its_sample_and_timestep() -> None:
    _, directions = group_directions(predictions(3))
    rows = [{"prompt": "a", "seed": i} for i in range(3)]
    found = off_axis_cotangent(directions, rows, 500.0)
    overlap = (directions * found).sum(-1) / directions.norm(dim=-1)
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
    many = off_axis_cotangent(directions.expand(-1, 3000, -1), rows, 1.0)
    seen = (many * movement).sum(1).square()
    wanted = movement.square().sum() / directions[0, 0].square().sum()
    assert abs(seen.mean() - wanted) < 5 * seen.std() / len(rows) ** 0.5


def point(groups: int = 3, classifier: Classifier | None = None, on: str = "latents") -> Point:
    balanced, directions = group_directions(predictions(groups))
    conditional, unconditional = predictions(2, 9)
    return Point(conditional, unconditional, balanced, directions, classifier, on, MODEL, CALL)


def weights(groups: int, seed: int = 4) -> torch.Tensor:
    return torch.randn(32, groups, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def smooth(latents: torch.Tensor) -> torch.Tensor:
    """A classifier that is linear in nothing."""
    return (0.1 * latents.flatten(1) @ weights(3)).tanh()


def inner(cotangents: torch.Tensor, movement: torch.Tensor) -> torch.Tensor:
    """(K, B, D) and (B, D) -> (K, B)."""
    return (cotangents * movement).sum(-1)


@pytest.mark.parametrize("name", TARGETS)
def test_cotangents_are_the_derivative_of_the_values(name: str) -> None:
    at, movement = point(3, smooth), 1e-5 * predictions(2, 5)
    values, cotangents = get_target(name).values(at)
    sides = [
        replace(
            at, conditional=at.conditional + sign * movement[1], unconditional=at.unconditional + sign * movement[0]
        )
        for sign in (1, -1)
    ]
    after, before = (get_target(name).values(side)[0] for side in sides)
    if get_target(name).halves:
        expected = inner(cotangents[:, :3], movement[0]) + inner(cotangents[:, 3:], movement[1])
    else:
        expected = inner(cotangents, movement[1])
    torch.testing.assert_close((after - before) / 2, expected, rtol=1e-6, atol=1e-12)
    assert values.shape == (3, 3)


@pytest.mark.parametrize("name", TARGETS)
def test_the_second_of_two_groups_mirrors_the_first(name: str) -> None:
    """So one backward pass serves both."""
    values, cotangents = get_target(name).values(point(2, lambda latents: latents.flatten(1) @ weights(2)))
    torch.testing.assert_close(values[1], -values[0])
    torch.testing.assert_close(cotangents[1], -cotangents[0])


def test_the_contrast_is_the_lean_before_it_is_divided() -> None:
    at = point()
    size = at.directions.square().sum(-1)
    torch.testing.assert_close(get_target("contrast").values(at)[0], get_target("lean").values(at)[0] * size)
    torch.testing.assert_close(contrast(at.conditional * 10, at.balanced * 10, at.directions * 10)[0],
                               100 * contrast(at.conditional, at.balanced, at.directions)[0])  # fmt: skip


def test_guidance_adds_the_conditional_s_lean_less_the_unconditional_s() -> None:
    at = point()
    assert at.unconditional is not None
    values, cotangents = get_target("guidance").values(at)
    own = lean(at.conditional, at.balanced, at.directions)
    torch.testing.assert_close(values, own - lean(at.unconditional, at.balanced, at.directions))
    torch.testing.assert_close(cotangents[:, :3], -cotangents[:, 3:])
    torch.testing.assert_close(cotangents[:, 3:], get_target("lean").values(at)[1])
    # Where the unconditional prediction is balanced it is the lean itself; where text changes nothing it is nothing.
    torch.testing.assert_close(get_target("guidance").values(replace(at, unconditional=at.balanced))[0], own)
    assert get_target("guidance").values(replace(at, unconditional=at.conditional))[0].abs().max() == 0


@pytest.mark.parametrize("groups", [2, 3])
def test_a_classifier_that_is_linear_in_latents_has_the_cotangents_that_follow_on_paper(groups: int) -> None:
    """logits = W x_0 and x_0 = (x - sigma eps) / alpha, so the cotangent of eps is -sigma / alpha (W_g - mean W)."""
    w = weights(groups)
    at = point(groups, lambda latents: latents.flatten(1) @ w)
    values, cotangents = get_target("classifier").values(at)
    clean = (LATENTS.flatten(1) - SIGMA * at.conditional) / ALPHA
    centred = w - w.mean(1, keepdim=True)
    torch.testing.assert_close(values, (clean @ centred).T)
    expected = (-SIGMA / ALPHA * centred.T)[:, None].expand(groups, 3, -1)
    torch.testing.assert_close(cotangents, expected)


def test_a_classifier_of_pictures_is_given_what_can_be_seen_and_no_more() -> None:
    seen = []

    def classifier(pictures: torch.Tensor) -> torch.Tensor:
        seen.append(pictures.detach())
        return pictures.double().flatten(1) @ weights(3)

    at = point(3, classifier, "pictures")
    _, cotangents = get_target("classifier").values(at)
    (pictures,) = seen
    assert pictures.aminmax() == (0, 1)
    clipped = (pictures == 0) | (pictures == 1)
    assert clipped.any() and not clipped.all()
    assert cotangents[:, clipped.flatten(1)].abs().max() == 0


@pytest.mark.parametrize(
    ("classifier", "says"),
    [
        (None, "needs a classifier"),
        (lambda latents: latents.flatten(1) @ weights(2), r"shape \(3, 2\) for 3 samples; expected \(3, 3\)"),
        (lambda latents: (latents.flatten(1) @ weights(3)).detach(), "without a gradient"),
    ],
)
def test_a_classifier_that_cannot_be_decomposed_is_refused(classifier: Classifier | None, says: str) -> None:
    with pytest.raises(InputError, match=says):
        get_target("classifier").values(point(3, classifier))


def test_a_pipeline_that_steps_with_the_negated_prediction_has_cotangents_of_what_its_denoiser_gives() -> None:
    at = point(2, lambda latents: latents.flatten(1) @ weights(2))
    negated = SimpleNamespace(**{**vars(CALL), "sign": -1})
    values, cotangents = get_target("classifier").values(at)
    other, turned = get_target("classifier").values(replace(at, conditional=-at.conditional, call=negated))
    torch.testing.assert_close(other, values)
    torch.testing.assert_close(turned, -cotangents)


def test_a_prediction_that_no_picture_follows_from_is_refused() -> None:
    """Packed latents, and predictions that are changed before the scheduler gets them."""
    at = point(2, lambda latents: latents.flatten(1) @ weights(2))
    for changed in ({"latents": lambda part: LATENTS.flatten(2)}, {"sign": None}):
        call: Any = SimpleNamespace(**{**vars(CALL), **changed})
        with pytest.raises(InputError, match=r"packs its latents.*use another target"):
            get_target("classifier").values(replace(at, call=call))


def test_an_unknown_target_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="'beauty' is not known; choose one of lean, contrast, guidance, classifier"):
        get_target("beauty")
