"""The stepwise plan: its rows are derivatives, its masks do what it planned, and it stays where it is told to."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from datasets import Dataset
from diffusers import PNDMScheduler

from stereoclinic.ddtd.lean import group_directions, lean, off_axis
from stereoclinic.errors import InputError
from stereoclinic.pipelines.memory import AdaptiveBatch
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.schedule import schedule_of
from stereoclinic.pipelines.sites import find_sites
from stereoclinic.pipelines.watch import Call, Conditions, Walk, encode_groups
from stereoclinic.prompts.axes import Axis, load_axis
from stereoclinic.prompts.sets import Row, load_prompts, with_seeds
from stereoclinic.runtime.predict import Ranks
from stereoclinic.sns.damp import suppress
from stereoclinic.sns.dose import lean_left
from stereoclinic.sns.plan import plan_stepwise
from stereoclinic.sns.policy import Treatment
from stereoclinic.sns.stepwise import PlannedStep, PlanTask, StepPlanner, Stepwise
from stereoclinic.sns.trial import TrialDamping

AXIS = load_axis("gender")
# A random model's leans are of any size: half a thousand is a small price here.
QUICK = {"steps": 4, "until": 500.0, "guidance": 1.0, "mu": 0.01, "keep": 0.0}


@pytest.fixture(scope="module")
def samples() -> Dataset:
    return with_seeds(load_prompts("portraits", 2), 0, 2)


def at_step(
    model: Model,
    rows: list[Row],
    number: int,
    visit: Callable[[Call, list[list[Conditions]]], Any],
    axes: Sequence[Axis] = (),
) -> Any:
    """What `visit` gives at one step of four, told the conditions of each axis' groups."""
    found: list[Any] = []

    def at(call: Call) -> None:
        if call.step == number:
            found.append(visit(call, groups))

    walk = Walk(model, rows, 4, 1.0, visit=at, last=number + 1)
    groups = encode_groups(walk, rows, axes)
    walk.run()
    return found[0]


@pytest.mark.parametrize("rooted", [False, True])
def test_rows_are_derivatives_by_the_damping_at_a_treated_point(little: Model, rooted: bool) -> None:
    sites = find_sites(little.network)
    neurons = sum(site.width for site in sites)
    generator = torch.Generator().manual_seed(0)
    factor = torch.rand(neurons, generator=generator, dtype=torch.float64)
    factor[5] = 0.0  # a silenced neuron has a derivative too
    root = torch.randn(neurons, generator=generator, dtype=torch.float64) if rooted else None
    rows = list(with_seeds(load_prompts("portraits", 1), 0, 1))

    def check(call: Call, groups: Any) -> None:
        cotangent = torch.randn(call.predict().shape, generator=generator, dtype=torch.float64)

        def value(at: torch.Tensor) -> torch.Tensor:
            with torch.no_grad(), TrialDamping(little.network, sites, at, root):
                return (call.predict() * cotangent).sum()

        with torch.enable_grad(), TrialDamping(little.network, sites, factor, root) as watch:
            prediction = call.predict()
        row = -watch.relevance(watch.grads(prediction, cotangent, retain=False))[0]
        for neuron in (0, 5, neurons // 2, neurons - 1):
            moved = [factor.clone(), factor.clone()]
            moved[0][neuron] -= 1e-5  # more damping
            moved[1][neuron] += 1e-5
            expected = (value(moved[0]) - value(moved[1])) / 2e-5
            assert row[neuron].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-9)
        assert row.abs().min() > 0

    at_step(little, rows, 1, check)


@pytest.mark.parametrize("allocate", [False, True])
@pytest.mark.parametrize("root", ["zero", "group"])
def test_every_step_comes_closer_to_its_target(little: Model, samples: Dataset, allocate: bool, root: str) -> None:
    ticks: list[int] = []
    mask = plan_stepwise(little, AXIS, samples, Stepwise(root=root, **QUICK), allocate, progress=ticks.append)
    said = mask.metadata["selection"]["steps"]
    for steps in said if allocate else [said]:
        assert [each["timestep"] for each in steps] == [999.0, 749.0]
        assert all(each["after"] < 0.9 * each["before"] and each["damping"] > 0 for each in steps)
    assert ticks == [len(samples)] * 2 * (len(AXIS) if allocate else 1)
    assert mask.groups == (AXIS.groups if allocate else ()) and mask.branch == "conditional"
    assert (mask.roots is None) == (root == "zero")
    assert mask.metadata["seeds"] == [0, 1] and mask.metadata["axis"] == "gender"


def test_the_mask_does_what_was_planned(little: Model, samples: Dataset) -> None:
    """Leans of the first step, under the mask as anyone applies it, are those that the plan says it leaves."""
    mask = plan_stepwise(little, AXIS, samples, Stepwise(**QUICK), allocate=True)
    rows = list(samples)

    def check(call: Call, groups: list[list[Conditions]]) -> None:
        balanced, directions = group_directions(call.compare(groups[0]))
        for k, group in enumerate(AXIS.groups):
            with suppress(little.network, mask.group(group)):
                found = lean(call.predict(), balanced, directions)
            goal = lean(balanced + directions[k], balanced, directions)
            planned = mask.metadata["selection"]["steps"][k][0]["after"]
            assert (found - goal).abs().mean().item() == pytest.approx(planned, rel=1e-4)

    at_step(little, rows, 0, check, [AXIS])


def test_batches_change_nothing_but_rounding(little: Model) -> None:
    """Nor what is said of the plan, nor what it leaves; each sample is asked about one of several directions."""
    samples = with_seeds(load_prompts("portraits", 5), 0, 1)
    how = {**QUICK, "guidance": 3.0, "keep": 0.1, "root": "group", "until": 800.0, "replans": 1}
    stay = [Axis("age", ("young", "middle", "old"), ("young", "middle-aged", "old"))]
    whole, *others = (
        plan_stepwise(little, AXIS, samples, Stepwise(batch_size=size, **how), stay=stay) for size in (36, 1, 3)
    )
    leans = lean_left(little, AXIS, samples, whole, 1.0, 4, 3.0)
    assert whole.metadata["selection"]["stay"] == ["age"]
    for mask, size in zip(others, (1, 3), strict=True):
        torch.testing.assert_close(mask.factors, whole.factors, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mask.roots, whole.roots)
        for one, two in zip(*(each.metadata["selection"]["bins"] for each in (mask, whole)), strict=True):
            assert one == pytest.approx(two, rel=1e-4)
        torch.testing.assert_close(lean_left(little, AXIS, samples, whole, 1.0, 4, 3.0, batch_size=size), leans)


def test_a_high_price_leaves_the_model_alone(little: Model, samples: Dataset) -> None:
    dear = plan_stepwise(little, AXIS, samples, Stepwise(**{**QUICK, "mu": 1e9}))
    assert dear.damping.mean() < 1e-3
    cheap = plan_stepwise(little, AXIS, samples, Stepwise(**QUICK))
    assert cheap.damping.mean() > 10 * dear.damping.mean()


def test_a_high_price_of_what_is_to_stay_keeps_it_there(little: Model, samples: Dataset) -> None:
    """Along the age axis, as far as it is not the gender axis too; without it nothing holds that."""
    age, moved = load_axis("age"), list[float]()
    masks = [
        plan_stepwise(little, AXIS, samples, Stepwise(**{**QUICK, "keep": 1e4}), stay=stay) for stay in ([age], [])
    ]

    def measure(call: Call, groups: list[list[Conditions]]) -> None:
        gender, others = (group_directions(call.compare(each))[1] for each in groups)
        along, untreated = off_axis(others[0], gender), call.predict()
        for mask in masks:
            with suppress(little.network, mask):
                change = call.predict() - untreated
            moved.append((change * along).sum(1).abs().mean().item())

    at_step(little, list(samples), 0, measure, [AXIS, age])
    assert moved[0] < 0.2 * moved[1]


def test_only_candidates_are_damped(little: Model, samples: Dataset) -> None:
    neurons = sum(site.width for site in find_sites(little.network))
    candidates = torch.zeros(neurons, dtype=torch.bool)
    candidates[::3] = True
    mask = plan_stepwise(little, AXIS, samples, Stepwise(**QUICK), candidates=candidates)
    assert (mask.factors[:, ~candidates] == 1).all() and (mask.factors[:, candidates] < 1).any()
    with pytest.raises(InputError, match=f"expected \\({neurons},\\)"):
        plan_stepwise(little, AXIS, samples, Stepwise(**QUICK), candidates=candidates[1:])


def test_finer_samplers_are_treated_over_the_same_window(little: Model, samples: Dataset) -> None:
    mask = plan_stepwise(little, AXIS, samples, Stepwise(**QUICK))
    assert mask.bin_edges.tolist() == [1000.0, 874.0, 624.0]
    assert [mask.bin_of(t) for t in (999, 900, 800, 700, 624, 600)] == [0, 0, 1, 1, 1, None]


def test_a_timestep_that_a_sampler_comes_back_to_has_one_damping(
    little: Model, samples: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is all that a mask can hold, so that the treated trajectory is the planned one."""
    solve, solved = StepPlanner._solve, list[float]()

    def counted(planner: StepPlanner, problem: Any) -> Any:
        solved.append(problem.call.timestep)
        return solve(planner, problem)

    monkeypatch.setattr(StepPlanner, "_solve", counted)
    pipe = little.pipe
    kept, pipe.scheduler = pipe.scheduler, PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    try:
        treated = [t for t in schedule_of(little, 4, 1.0).timesteps if t >= 500]
        assert len(set(treated)) < len(treated)
        mask = plan_stepwise(little, AXIS, samples, Stepwise(**QUICK))
        steps = mask.metadata["selection"]["steps"]
        left = lean_left(little, AXIS, samples, mask, 1.0, 4, 1.0)
    finally:
        pipe.scheduler = kept
    assert [each["timestep"] for each in steps] == sorted(set(treated), reverse=True)
    assert [mask.bin_of(t) for t in sorted(set(treated), reverse=True)] == list(range(len(mask.factors)))
    assert solved == sorted(set(treated), reverse=True)  # each once, and what was planned is walked again
    assert left.mean().item() < sum(each["before"] for each in steps) / len(steps)


@pytest.mark.parametrize("overshoot", [0.0, 0.5])
def test_what_is_said_of_a_plan_is_measured_to_the_target(little: Model, samples: Dataset, overshoot: float) -> None:
    """And not to what is aimed at beyond it."""
    mask = plan_stepwise(little, AXIS, samples, Stepwise(**QUICK, overshoot=overshoot))
    steps = mask.metadata["selection"]["steps"]
    said = sum(each["after"] for each in steps) / len(steps)
    assert lean_left(little, AXIS, samples, mask, 1.0, 4, 1.0).mean().item() == pytest.approx(said, rel=1e-3)


def test_a_treated_picture_depends_on_its_own_row_alone(little: Model, samples: Dataset) -> None:
    mask = plan_stepwise(little, AXIS, samples, Stepwise(**QUICK), allocate=True)
    rows = [{"prompt": "a photo of a doctor", "seed": seed} for seed in range(4)]
    rows.append({"prompt": "a photo of a female doctor", "seed": 0})

    def latents(part: list[Row]) -> torch.Tensor:
        return Walk(little, part, 4, 2.0).run().images

    def draw(part: list[Row]) -> torch.Tensor:
        with Treatment(little, mask, [AXIS]) as treatment:
            treatment.begin(part)
            return latents(part)

    together = draw(rows)
    for i, row in enumerate(rows):
        torch.testing.assert_close(draw([row])[0], together[i], rtol=0, atol=1e-9)
    untreated = latents(rows)
    assert torch.equal(together[4], untreated[4])  # it names a group
    assert not torch.allclose(together[0], untreated[0])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"mu": -1.0}, "mu -1.0: expected 0 or a positive number"),
        ({"root": "balanced"}, "expected zero or group"),
        ({"replans": 0}, "replans 0: expected 1 or more"),
    ],
)
def test_settings_out_of_range(wrong: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Stepwise(**wrong)


@pytest.mark.parametrize(("number", "each"), [(1, 4), (2, 2), (3, 2), (12, 1)])
def test_samples_are_asked_about_all_directions_as_often(little: Model, number: int, each: int) -> None:
    """Of which there are three here, and a random one: more at each sample where samples are few."""
    samples = with_seeds(load_prompts("portraits", number), 0, 1)
    stay = [Axis(f"other {k}", ("a", "b", "c")[:k], ("x", "y", "z")[:k]) for k in (2, 2)]
    task = PlanTask(little, AXIS, samples, Stepwise(guidance=2.0), find_sites(little.network), stay)
    planner = StepPlanner(task, list(samples), None, Ranks(), AdaptiveBatch())
    planner.directions = 4
    for step in range(3):
        asked = planner._asked(step)
        assert asked.shape == (each, number)
        assert all(len(set(column)) == len(column) for column in asked.T.tolist())
        often = asked.flatten().bincount(minlength=4)
        assert often.min() >= 1 and often.max() - often.min() <= 1
    assert torch.equal(planner._asked(0), planner._asked(1)) == (each == 4)


class Prepared(StepPlanner):
    """Keeps what is constant at each step, and plans nothing."""

    everything = False  # each sample is asked about all directions

    def plan(self, known: Sequence[PlannedStep], planned: Callable[[PlannedStep], None], steps: int) -> None:
        self.steps: list[Any] = []
        super().plan(known, planned, steps)

    def _asked(self, step: int) -> torch.Tensor:
        if self.everything:
            return torch.arange(self.directions)[:, None].expand(-1, len(self.rows))
        return super()._asked(step)

    def _solve(self, problem: Any) -> Any:
        self.steps.append(problem)
        return PlannedStep(torch.ones(self.task.neurons), None, {}), problem.untreated


def test_a_direction_that_is_asked_about_is_off_the_axis_and_the_others_make_up_for_the_rest(
    little: Model,
) -> None:
    """Each sample's row of what is to stay is that which it had when it was asked about everything."""
    samples, age = with_seeds(load_prompts("portraits", 3), 0, 1), load_axis("age")
    rows = list(samples)
    found: dict[bool, dict[Any, torch.Tensor]] = {}
    for everything in (False, True):
        task = PlanTask(little, AXIS, samples, Stepwise(guidance=2.0, steps=4), find_sites(little.network), [age])
        planner = Prepared(task, rows, None, Ranks(), AdaptiveBatch())
        planner.everything = everything
        planner.plan([], lambda planned: None, 2)
        assert planner.directions == 3  # a random one, the text's, that of age
        step = planner.steps[1]
        found[everything] = {
            (which, b): each[b]
            for who, each in zip(step.asked.tolist(), step.cotangents[len(AXIS) - 1 :], strict=True)
            for b, which in enumerate(who)
        }
        for each in step.cotangents[len(AXIS) - 1 :]:
            along = (each[None] * step.directions).sum(2)
            assert along.abs().max() < 1e-9 * step.directions.norm(dim=2).max()
    assert len(found[False]) < len(found[True]) == len(rows) * 3
    for key, each in found[False].items():
        torch.testing.assert_close(each, found[True][key], rtol=1e-9, atol=1e-12)


def test_a_window_without_steps(little: Model, samples: Dataset) -> None:
    with pytest.raises(InputError, match="no step lies above it"):
        plan_stepwise(little, AXIS, samples, Stepwise(steps=2, until=1000.0))


def test_three_groups(little: Model, samples: Dataset) -> None:
    three = Axis("age", ("young", "middle", "old"), ("young", "middle-aged", "old"))
    mask = plan_stepwise(little, three, samples, Stepwise(**QUICK), allocate=True)
    assert mask.factors.shape[0] == 3
    for steps in mask.metadata["selection"]["steps"]:
        assert all(each["after"] < each["before"] for each in steps)
