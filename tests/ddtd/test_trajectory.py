"""Walking a trajectory: it is the one that is sampled, and each sample's figures are its own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.ddtd.conftest import AXIS, close, measured, rows
from torch import Tensor

from stereoclinic.ddtd import trajectory
from stereoclinic.ddtd.step import Measured, measure
from stereoclinic.ddtd.trajectory import Settings, bin_of, check_prompts, walk
from stereoclinic.errors import InputError
from stereoclinic.pipelines.memory import AdaptiveBatch
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.sites import find_sites
from stereoclinic.prompts.axes import Axis
from stereoclinic.prompts.sets import generator


def test_bins_part_the_timesteps() -> None:
    edges = Settings(bins=5).edges(torch.linspace(999, 0, 20), 1000)
    assert edges.tolist() == [1000, 800, 600, 400, 200, 0]
    assert [bin_of(t, edges) for t in (1000, 999, 800, 799, 200, 199, 0)] == [0, 0, 0, 1, 3, 4, 4]
    with pytest.raises(InputError, match="3 bins, but the 4 measured steps fall into 2 of them"):
        Settings(bins=3).edges(torch.tensor([999.0, 749.0, 99.0, 49.0]), 1000)


@given(st.lists(st.integers(1, 999), min_size=1, max_size=12, unique=True), st.integers(1, 12), st.booleans())
def test_each_bin_holds_a_measured_step(steps: list[int], bins: int, own_unit: bool) -> None:
    """Also where steps are few and uneven, as those of few-step models are, or are counted from 1 to 0."""
    timesteps = torch.tensor(sorted(steps, reverse=True), dtype=torch.float64) / (1000 if own_unit else 1)
    try:
        edges = Settings(bins=bins).edges(timesteps, 1e6 if own_unit else 1000)
    except InputError as error:
        assert len(steps) > bins and f"{bins} bins" in str(error)
        return
    assert (edges.diff() < 0).all()
    assert edges[0] >= timesteps[0] and edges[-1] <= timesteps[-1]
    held = [bin_of(t, edges) for t in timesteps.tolist()]
    assert sorted(set(held)) == list(range(len(edges) - 1))
    assert len(edges) - 1 == min(bins, len(steps))


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 5))
def test_off_axis_rows_that_are_left_out_are_made_up_for(steps: int, bins: int, every: int) -> None:
    """Squares of the weights add up to the number of measured steps of each bin, and each bin has a row."""
    settings = Settings(bins=bins, collateral_every=every)
    timesteps = torch.linspace(999, 0, steps)
    edges = settings.edges(timesteps, 1000)
    weights = torch.tensor(settings.collateral_weights(timesteps, edges))
    held = torch.tensor([bin_of(float(t), edges) for t in timesteps])
    for each in held.unique():
        own = weights[held == each]
        assert own.square().sum().item() == pytest.approx(len(own))
        assert (own > 0).sum() == -(-len(own) // every)


@pytest.mark.parametrize(("guidance", "target"), [(1.0, "lean"), (3.0, "lean"), (3.0, "guidance")])
def test_the_trajectory_is_the_one_that_is_sampled(
    little: Model, monkeypatch: pytest.MonkeyPatch, guidance: float, target: str
) -> None:
    """What the scheduler is given at each step, and the latents in the end, are those of the bare pipeline."""
    taken: list[Tensor] = []
    step = little.pipe.scheduler.step
    monkeypatch.setattr(
        little.pipe.scheduler, "step", lambda f, *rest, **more: taken.append(f) or step(f, *rest, **more)
    )
    settings = Settings(steps=4, every=2, guidance=guidance, target=target)
    ended = walk(little, find_sites(little.network), AXIS, rows(1), settings, lambda _: None, output="latent")
    walked = torch.stack(taken[-4:])  # before that it was asked for prompts' conditions
    taken.clear()
    generators = [generator(row, "noise") for row in rows(1)]
    plain = little.pipe(
        [row["prompt"] for row in rows(1)],
        num_inference_steps=4,
        guidance_scale=guidance,
        generator=generators,
        output_type="latent",
    )
    torch.testing.assert_close(walked, torch.stack(taken))
    torch.testing.assert_close(ended.images, plain.images)
    assert len(taken) == 4


def test_a_walk_is_left_after_the_last_measured_step(little: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(steps=5, every=3, bins=2)
    steps: list[float] = []
    step = little.pipe.scheduler.step
    monkeypatch.setattr(
        little.pipe.scheduler, "step", lambda f, t, *rest, **more: steps.append(float(t)) or step(f, t, *rest, **more)
    )
    found = measured(little, find_sites(little.network, ("ff",)), AXIS, rows(1, 1), settings)
    assert [each.timestep for each in found] == settings.timesteps(little).tolist() == [999, 399]
    assert steps[-4:] == [999, 799, 599, 399]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"target": "beauty"}, "target 'beauty' is not known"),
        ({"root": "sideways"}, "expected plain or rooted"),
        ({"classifier_on": "sounds"}, "expected pictures or latents"),
        ({"steps": 0}, "steps 0: expected 1 or more"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Settings(**settings)


def test_the_target_guidance_needs_guidance(little: Model) -> None:
    with pytest.raises(InputError, match="makes no prediction without prompt at this guidance scale"):
        measured(little, find_sites(little.network), AXIS, rows(1, 1), Settings(steps=1, target="guidance"))


def test_the_target_classifier_needs_one(little: Model) -> None:
    with pytest.raises(InputError, match="no classifier was given"):
        measured(little, [], AXIS, rows(1, 1), Settings(target="classifier"))


def test_a_batch_that_does_not_fit_is_parted_and_measures_the_same(
    little: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites, settings = find_sites(little.network, ("ff",)), Settings(steps=4, every=2, bins=2, guidance=3.0)
    whole = measured(little, sites, AXIS, rows(), settings)
    asked, said = [], []

    def small(*arguments: object) -> tuple[Tensor, Tensor | None, Measured]:
        """Four samples never fit; from the second measured step on, two do not either, and the pass fails late."""
        part = arguments[-1]
        assert isinstance(part, slice)
        asked.append(part.stop - part.start)
        found = measure(*arguments)  # type: ignore[arg-type]
        if asked[-1] > (2 if len(asked) <= 3 else 1):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found

    monkeypatch.setattr(trajectory, "measure", small)
    parted = measured(little, sites, AXIS, rows(), settings, portions=AdaptiveBatch(warn=said.append))
    assert asked == [4, 2, 2, 2, 1, 1, 1, 1]
    assert said == ["4 samples at a time do not fit in memory; going on with 2"]
    for one, two in zip(parted, whole, strict=True):
        for name in ("lean", "value", "relevance", "collateral", "means"):
            close(getattr(one, name), getattr(two, name))


def test_prompts_that_the_model_cannot_tell_apart_are_refused(little: Model) -> None:
    check_prompts(little, AXIS, rows(), 1.0)
    same = Axis("gender", ("female", "male"), ("young", "young"))
    with pytest.raises(InputError, match=r"'a photo of a young doctor' is the same as .* so the axis has no direction"):
        check_prompts(little, same, rows(), 1.0)
    long = [{**rows(1, 1)[0], "prompt": "photo " * 90, "pattern": "photo " * 90 + "{person}"}]
    with pytest.raises(InputError, match="not too long for the model"):
        check_prompts(little, AXIS, long, 3.0)


def test_inference_mode_is_refused(little: Model) -> None:
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode=False"):
        measured(little, find_sites(little.network), AXIS, rows(), Settings(steps=1))
